# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Records what a checkpoint computes for its example picture, at four depths, for a test to compare with.

Run inside `examples/`:

    python -m default_checkpoint.write_goldens CHECKPOINT_FOLDER GOLDEN_FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import mask_llava_hf  # noqa: F401 - registers Mask-LLaVA with the Auto classes


QUESTIONS = ("How many shapes are there?", "Describe the picture.")


@torch.inference_mode()
def compute(checkpoint: str | Path, object_embeds: torch.Tensor | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs a checkpoint on its `example.png`.

    Args:
        object_embeds: (1, N, D), to take in place of those that detector, segmenter and MaskInversion make now.

    Returns:
        Tensors, all float32: `object_embeds` (1, N, D), `patch_features` (P, D) of the vision feature layer,
        `image_tokens` (1 + g * g + n, text width) after the projector, `logits` (vocabulary) after the first question.
        And `answers`, the text to each question, with `object_counts`.
    """
    checkpoint = Path(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor.share_vision_tower(model)
    image = Image.open(checkpoint / "example.png")
    answers = {}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        if object_embeds is not None:
            inputs["object_embeds"] = object_embeds
        output = model.generate(**inputs, max_new_tokens=120, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers[question] = processor.decode(new, skip_special_tokens=True).strip()
        if question == QUESTIONS[0]:
            features = model.model.get_image_features(
                **{name: inputs[name] for name in ("pixel_values", "object_embeds", "object_counts")}
            )
            layer = model.config.vision_feature_layer
            seen = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer]
            tensors = {
                "object_embeds": inputs["object_embeds"].contiguous(),
                "patch_features": seen[0, 1:].contiguous(),
                "image_tokens": features.pooler_output[0].contiguous(),
                "logits": model(**inputs).logits[0, -1].contiguous(),
            }
            counts = inputs["object_counts"].tolist()
    return tensors, {"answers": answers, "object_counts": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("golden_dir", type=Path)
    options = parser.parse_args()
    tensors, texts = compute(options.checkpoint)
    options.golden_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.golden_dir / "golden.safetensors")
    (options.golden_dir / "golden.json").write_text(json.dumps(texts, indent=2) + "\n")


if __name__ == "__main__":
    main()
