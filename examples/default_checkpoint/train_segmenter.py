# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Trains a small SAM that turns boxes into masks of the shapes of the small world.

About half an hour on one core. Killed and started again, it goes on. Run inside `examples/`:

    python -m default_checkpoint.train_segmenter OUTPUT_FOLDER --detector-dir DETECTOR_FOLDER
"""

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from shapes_world import SIDE
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou
from transformers import SamConfig, SamImageProcessor, SamModel

from .part_scores import score_segmenter
from .resumable_training import run, train, training_parser, write_scores
from .scene_pool import ScenePool, scene_pool


STEPS = 3600
BOXES_PER_SCENE = 4


def build_segmenter() -> tuple[SamModel, SamImageProcessor]:
    """A segmenter with random weights, and its image processor."""
    patch_size, width = 6, 96
    spread = 0.1  # of the random weights; the defaults suit much wider models, the vision encoder's none
    config = SamConfig(
        initializer_range=spread,
        vision_config={
            "image_size": SIDE,
            "patch_size": patch_size,
            "hidden_size": width,
            "output_channels": width,
            "num_pos_feats": width // 2,
            "mlp_dim": 2 * width,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "window_size": 8,
            "global_attn_indexes": [1, 3],
            "use_rel_pos": False,
            "initializer_range": spread,
        },
        prompt_encoder_config={"hidden_size": width, "image_size": SIDE, "patch_size": patch_size},
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 2 * width,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": width,
            "num_multimask_outputs": 1,
        },
    )
    model = SamModel(config)
    # Frequencies of the places of boxes and patches. By default they go up to tens of turns per picture, and the codes
    # of neighbours have nothing in common; the segment-anything package starts from this.
    nn.init.normal_(model.shared_image_embedding.positional_embedding)
    size, square = {"longest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    return model, SamImageProcessor(size=size, pad_size=square, mask_size=size, mask_pad_size=square)


def train_segmenter(
    output_dir: str | PathLike[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
    quick: bool = False,
    cache_dir: str | PathLike[str] | None = None,
    detector_dir: str | PathLike[str] | None = None,
) -> dict[str, float]:
    """Trains the segmenter, saves it and its image processor, and scores it on held-out scenes.

    Only boxes are trained as prompts.

    Args:
        output_dir: gets the model, and the scores in `scores.json`.
        steps: of 16 scenes with 4 boxes each.
        quick: few steps on few scenes, to try the script.
        cache_dir: folder that keeps drawn scenes for the next call.
        detector_dir: a trained detector, whose boxes are then scored as prompts too.

    Returns:
        scores, see `score_segmenter`, and of the training.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    steps, batch_size, num_train, num_test = (20, 4, 64, 16) if quick else (steps, 16, 8000, 500)
    state_path = output_dir / "training_state.pt"
    torch.manual_seed(seed)
    model, image_processor = build_segmenter()
    pool = scene_pool("train", num_train, cache_dir)

    def loss_at(rng: np.random.Generator) -> Tensor:
        scenes = pool.sample(rng, batch_size)
        pixel_values = image_processor(images=list(scenes.images), return_tensors="pt")["pixel_values"]
        boxes, masks = _prompts(scenes, rng)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(pixel_values=pixel_values, input_boxes=boxes, multimask_output=False)
        logits = F.interpolate(outputs.pred_masks[:, :, 0].float(), size=(SIDE, SIDE), mode="bilinear")
        return mask_loss(logits, masks, outputs.iou_scores[..., 0].float())

    scores = train(
        model, loss_at, state_path, steps=steps, seed=seed, learning_rate=2e-3, save_every=min(200, steps // 4)
    )
    model.save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
    scores |= score_segmenter(output_dir, scene_pool("test", num_test, cache_dir), detector_dir)
    scores["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    write_scores(scores, output_dir / "scores.json")
    state_path.unlink(missing_ok=True)
    return scores


def _prompts(scenes: ScenePool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Boxes (B, n, 4) of random shapes, about as inexact as a detector's, and the shapes' masks (B, n, SIDE, SIDE)."""
    turns = np.arange(BOXES_PER_SCENE)
    chosen = np.stack([_order(scenes.boxes(index), rng)[turns % count] for index, count in enumerate(scenes.counts)])
    boxes = np.take_along_axis(scenes.boxes_xyxy, chosen[..., None], axis=1)
    extent = np.tile(boxes[..., 2:] - boxes[..., :2], 2)
    boxes = boxes + (0.05 * rng.normal(size=boxes.shape) * extent).astype(np.float32)
    masks = scenes.owners[:, None] == 1 + chosen[..., None, None]
    return torch.from_numpy(boxes), torch.from_numpy(masks).float()


def _order(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order (k,) of boxes (k, 4); those that touch others, the difficult ones, tend to come first."""
    touching = (box_iou(*[torch.from_numpy(boxes)] * 2) > 0).sum(1).numpy() > 1
    return np.argsort(rng.random(len(boxes)) - 0.5 * touching)


def mask_loss(logits: Tensor, masks: Tensor, iou_scores: Tensor) -> Tensor:
    """Cross-entropy and dice of the masks (B, n, H, W), and the error of the IoU that the model expects.

    The cross-entropy is divided by the shape's area, or else small shapes would hardly count.
    """
    found, areas = logits.sigmoid(), masks.sum((-2, -1))
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").sum((-2, -1)) / areas
    dice = 1 - 2 * (found * masks).sum((-2, -1)) / (found.sum((-2, -1)) + areas)
    with torch.no_grad():
        both = ((logits > 0) & (masks > 0)).sum((-2, -1))
        iou = both / ((logits > 0) | (masks > 0)).sum((-2, -1))
    return cross_entropy.mean() + dice.mean() + F.mse_loss(iou_scores, iou)


def main() -> None:
    parser = training_parser(__doc__, STEPS)
    parser.add_argument("--detector-dir", type=Path, help="a trained detector, to score its boxes as prompts too")
    run(train_segmenter, parser)


if __name__ == "__main__":
    main()
