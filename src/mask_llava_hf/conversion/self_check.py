# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Tries a checkpoint as its users will: loads it, shows it a picture, and looks at what comes out."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..modeling.modeling_mask_llava import MaskLlavaForConditionalGeneration
from ..modeling.token_layout import TokenLayout
from ..processing.processing_mask_llava import MaskLlavaProcessor


# Of the picture below, 97 x 61 pixels
BOXES = [[15.0, 10.0, 46.0, 41.0], [60.0, 20.0, 86.0, 56.0]]


def check_picture() -> Image.Image:
    """A disc and a block before a shaded background, wider than high, 97 x 61 pixels."""
    y, x = np.mgrid[0:61, 0:97]
    pixels = np.stack([x * 2, y * 3, 255 - x - y], axis=-1)
    pixels[(x - 30) ** 2 + (y - 25) ** 2 < 15**2] = (220, 40, 30)
    pixels[20:56, 60:86] = (30, 60, 200)
    return Image.fromarray(pixels.astype(np.uint8))


@torch.inference_mode()
def check_checkpoint(folder: Path) -> str:
    """Loads a checkpoint, processes a picture with as many boxes as it takes, and runs a forward pass on the CPU.

    Weights stay in their files (they are mapped), so that a model larger than memory can be checked.

    Returns:
        What was seen, for the report.

    Raises:
        ValueError: weights are missing or left over, placeholders do not match the image's tokens, or an output is
            not finite.
    """
    processor = MaskLlavaProcessor.from_pretrained(folder)
    model, loading = MaskLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    problems = {name: names for name, names in loading.items() if names}
    if problems:
        raise ValueError(f"The converted checkpoint does not load as it was written: {problems}.")
    layout = TokenLayout.from_config(model.config)
    num_boxes = min(len(BOXES), layout.max_object_tokens)
    # Boxes as masks: there is no segmenter to a model that has just been converted
    processor.object_settings = {**processor.object_settings, "mask_source": "boxes"}
    processor.share_vision_tower(model)
    inputs = processor(images=check_picture(), text="<image>", boxes=[BOXES[:num_boxes]], return_tensors="pt")
    expected = layout.num_tokens(num_boxes)
    found = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if found != expected:
        raise ValueError(
            f"The processor writes {found} placeholders for an image that has {expected} tokens in the model."
        )
    outputs = model(**inputs.to(model.dtype), logits_to_keep=1)
    for name, values in {"image features": outputs.image_hidden_states, "logits": outputs.logits}.items():
        broken = int((~values.isfinite()).sum())
        if broken:
            raise ValueError(
                f"In a forward pass {broken} of {values.numel()} {name} are NaN or infinite. The source's weights are "
                f"broken, or too large for {model.dtype}: try `--dtype bfloat16` or `--dtype float32`."
            )
    return f"loads; {found} placeholders for {expected} tokens of a picture; a forward pass is finite"
