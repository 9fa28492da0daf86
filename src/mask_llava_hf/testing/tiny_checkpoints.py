# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Mask-LLaVA itself, small and random, and a whole checkpoint folder with all its parts."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaImageProcessor

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.modeling_mask_llava import MaskLlavaForConditionalGeneration
from ..processing.processing_mask_llava import MaskLlavaProcessor
from .reproducible_weights import reproducible_weights
from .tiny_detectors import DetectorKind, tiny_detector
from .tiny_segmenters import SegmenterKind, tiny_segmenter
from .tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer


_IMAGE_SIZE, _PATCH_SIZE, _WIDTH = 168, 14, 64


def tiny_config(tokenizer: Any = None, **overrides: Any) -> MaskLlavaConfig:
    """The config of a Mask-LLaVA with 0.3 million parameters.

    Its CLIP tower sees 168 x 168 pixels as 12 x 12 patches, in 3 layers of width 64; its Llama has 2 layers of width
    64. An image has 1 CLS + 6 x 6 patches + at most 20 objects.

    Args:
        tokenizer: decides vocabulary size and special token ids; default: `tiny_tokenizer()`.
        overrides: fields of `MaskLlavaConfig` to set otherwise; `vision_config` and `text_config`, as dicts, change
            single fields of the tiny ones.
    """
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    vision = {
        "image_size": _IMAGE_SIZE,
        "patch_size": _PATCH_SIZE,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "projection_dim": _WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": _WIDTH**-0.5,  # with the usual 0.02, so narrow a model hardly looks at its input
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values: dict[str, Any] = {
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "patch_grid_size": 6,
        "max_object_tokens": 20,
        "use_cls_token": True,
    }
    return MaskLlavaConfig(
        vision_config=CLIPVisionConfig(**{**vision, **overrides.pop("vision_config", {})}),
        text_config=LlamaConfig(**{**text, **overrides.pop("text_config", {})}),
        **{**values, **overrides},
    )


def tiny_model(config: MaskLlavaConfig | None = None, *, seed: int = 0) -> MaskLlavaForConditionalGeneration:
    """A Mask-LLaVA in evaluation mode, float32, on the CPU; default config: `tiny_config()`."""
    config = config if config is not None else tiny_config()
    with reproducible_weights(seed):
        return MaskLlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


def tiny_image_processor(image_size: int = _IMAGE_SIZE) -> LlavaImageProcessor:
    """LLaVA-1.5's image processor (pads to a square, resizes, crops, normalises) for `image_size` x `image_size`."""
    side = {"height": image_size, "width": image_size}
    return LlavaImageProcessor(do_pad=True, size=dict(side), crop_size=dict(side))


def build_tiny_checkpoint(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    detector: DetectorKind | None = "rt_detr",
    segmenter: SegmenterKind | None = "sam",
    **object_settings: Any,
) -> Path:
    """Writes a whole Mask-LLaVA checkpoint that `AutoProcessor` and `AutoModelForImageTextToText` load.

    The folder holds the model, the processor, and the parts `./detector` and `./segmenter`. The model's config has
    `untrained = True`, so that a program can say that its answers are noise.

    Args:
        folder: is created where it is missing; files of an earlier checkpoint in it are replaced.
        detector: kind of `tiny_detector`; None: the checkpoint has none.
        segmenter: kind of `tiny_segmenter`; None: none, and boxes serve as masks.
        object_settings: of the processor, see `ObjectSettings`; those that the model's config has too
            (`max_object_tokens`, `patch_grid_size`, `use_cls_token`, `image_size`) are set there as well.

    Returns:
        `folder`.
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    shared = ("max_object_tokens", "patch_grid_size", "use_cls_token")
    overrides: dict[str, Any] = {name: object_settings[name] for name in shared if name in object_settings}
    image_size = object_settings.get("image_size", _IMAGE_SIZE)
    config = tiny_config(tokenizer, vision_config={"image_size": image_size}, untrained=True, **overrides)
    settings: dict[str, Any] = {
        **{name: getattr(config, name) for name in shared},
        "image_size": image_size,
        "embed_size": config.vision_config.hidden_size,
        "score_threshold": 0.05,
    }
    tiny_model(config, seed=seed).save_pretrained(folder)
    parts = {
        "detector": tiny_detector(detector, seed=seed) if detector is not None else None,
        "segmenter": tiny_segmenter(segmenter, seed=seed) if segmenter is not None else None,
    }
    for name, part in parts.items():
        if part is not None:
            for half in part:
                half.save_pretrained(folder / name)
            settings[name] = f"./{name}"
    if segmenter is None:
        settings["mask_source"] = "boxes"
    MaskLlavaProcessor(
        image_processor=tiny_image_processor(image_size),
        tokenizer=tokenizer,
        object_settings={**settings, **object_settings},
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
