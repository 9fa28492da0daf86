# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Trains a small RT-DETR that finds the shapes of the small world, whatever their kind.

About ten minutes on one core. Killed and started again, it goes on. Run inside `examples/`:

    python -m default_checkpoint.train_detector OUTPUT_FOLDER
"""

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from shapes_world import SIDE
from torch import nn
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

from .part_scores import score_detector
from .resumable_training import run, train, training_parser, write_scores
from .scene_pool import ScenePool, scene_pool


STEPS = 3400


def build_detector() -> tuple[RTDetrForObjectDetection, RTDetrImageProcessor]:
    """A detector with random weights, and its image processor."""
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 96],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    width = 64
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,  # nothing pretrained to keep
        d_model=width,
        encoder_hidden_dim=width,
        encoder_in_channels=backbone.hidden_sizes[1:],
        encoder_ffn_dim=2 * width,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        decoder_in_channels=[width] * 3,
        decoder_ffn_dim=2 * width,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=20,
        num_denoising=20,
        id2label={0: "object"},
        label2id={"object": 0},
    )
    model = RTDetrForObjectDetection(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Transformers draws those outside the backbone around zero, made to be overwritten by trained ones.
            nn.init.ones_(module.weight)
    return model, RTDetrImageProcessor(size={"height": SIDE, "width": SIDE})


def train_detector(
    output_dir: str | PathLike[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
    quick: bool = False,
    cache_dir: str | PathLike[str] | None = None,
) -> dict[str, float]:
    """Trains the detector, saves it and its image processor, and scores it on held-out scenes.

    Args:
        output_dir: gets the model, and the scores in `scores.json`.
        steps: of 16 scenes each.
        quick: few steps on few scenes, to try the script.
        cache_dir: folder that keeps drawn scenes for the next call.

    Returns:
        scores, see `score_detector`, and of the training.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    steps, batch_size, num_train, num_test = (20, 4, 64, 16) if quick else (steps, 16, 8000, 500)
    state_path = output_dir / "training_state.pt"
    torch.manual_seed(seed)
    model, image_processor = build_detector()
    pool = scene_pool("train", num_train, cache_dir)

    def loss_at(rng: np.random.Generator) -> torch.Tensor:
        scenes = pool.sample(rng, batch_size)
        pixel_values = image_processor(images=list(scenes.images), return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixel_values, labels=_labels(scenes)).loss

    scores = train(
        model, loss_at, state_path, steps=steps, seed=seed, learning_rate=2e-3, save_every=min(200, steps // 4)
    )
    model.save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
    scores |= score_detector(output_dir, scene_pool("test", num_test, cache_dir))
    scores["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    write_scores(scores, output_dir / "scores.json")
    state_path.unlink(missing_ok=True)
    return scores


def _labels(scenes: ScenePool) -> list[dict[str, torch.Tensor]]:
    """Boxes as the model's loss wants them: centre, width and height relative to the picture."""
    labels = []
    for index in range(len(scenes)):
        boxes = box_convert(torch.from_numpy(scenes.boxes(index)) / SIDE, "xyxy", "cxcywh")
        labels.append({"class_labels": torch.zeros(len(boxes), dtype=torch.long), "boxes": boxes})
    return labels


def main() -> None:
    run(train_detector, training_parser(__doc__, STEPS))


if __name__ == "__main__":
    main()
