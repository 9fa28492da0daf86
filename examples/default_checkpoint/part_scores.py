# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""How well a saved detector and a saved segmenter do on scenes, run as the package runs them."""

from os import PathLike

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from mask_llava_hf.processing.objects.detectors import ObjectDetector
from mask_llava_hf.processing.objects.segmenters import load_segmenter

from .scene_pool import ScenePool


MAX_BOXES = 20  # per picture
SCORE_THRESHOLD = 0.4  # of the checkpoint: below it boxes are more and more second ones around a shape


def score_detector(folder: str | PathLike[str], scenes: ScenePool) -> dict[str, float]:
    """Scores a detector's boxes.

    Returns:
        "recall": part of the shapes that some box hits at IoU 0.5; "box_iou": mean IoU of those boxes;
        "candidates": mean number with score 0.05 or more; "precision": part of those that hit, from
        `SCORE_THRESHOLD` on.
    """
    found = ObjectDetector.from_pretrained(folder).detect(_images(scenes), max_candidates=MAX_BOXES)
    hits = [match_boxes(objects.boxes_xyxy, boxes) for objects, boxes in zip(found, _boxes(scenes), strict=True)]
    ious = torch.cat([iou for _, iou in hits])
    sure = torch.cat([objects.scores for objects in found]) >= SCORE_THRESHOLD
    return {
        "recall": (ious > 0).sum().item() / int(scenes.counts.sum()),
        "box_iou": ious.sum().item() / max(1, int((ious > 0).sum())),
        "candidates": len(ious) / len(scenes),
        "precision": (ious[sure] > 0).sum().item() / max(1, int(sure.sum())),
    }


def score_segmenter(
    folder: str | PathLike[str], scenes: ScenePool, detector_dir: str | PathLike[str] | None = None
) -> dict[str, float]:
    """Scores a segmenter's masks.

    Returns:
        "mask_iou": mean IoU with the visible pixels of the shapes, prompted by their true boxes; with a detector also
        "mask_iou_detected", prompted by those of its boxes that hit a shape.
    """
    segmenter, images = load_segmenter(folder), _images(scenes)
    masks = [scenes.masks(index) for index in range(len(scenes))]
    scores = {"mask_iou": _mean_iou(segmenter.segment(images, _boxes(scenes)), masks)}
    if detector_dir is not None:
        found = ObjectDetector.from_pretrained(detector_dir).detect(images, max_candidates=MAX_BOXES)
        prompts, wanted = [], []
        for objects, boxes, own in zip(found, _boxes(scenes), masks, strict=True):
            shape, _ = match_boxes(objects.boxes_xyxy, boxes)
            prompts.append(objects.boxes_xyxy[shape >= 0])
            wanted.append(own[shape[shape >= 0].numpy()])
        scores["mask_iou_detected"] = _mean_iou(segmenter.segment(images, prompts), wanted)
    return scores


def match_boxes(found: Tensor, wanted: Tensor, least_iou: float = 0.5) -> tuple[Tensor, Tensor]:
    """Each found box in turn takes the free wanted box that it covers best.

    Args:
        found: (n, 4) left, top, right, bottom, the most certain first.
        wanted: (k, 4).

    Returns:
        index of the wanted box and IoU with it, (n,) each; -1 and 0 where no free one has `least_iou`.
    """
    overlaps = box_iou(found, wanted)
    index, iou = torch.full((len(found),), -1), torch.zeros(len(found))
    for row in range(len(found)):
        best, column = overlaps[row].max(0)
        if best >= least_iou:
            index[row], iou[row] = column, best
            overlaps[:, column] = 0
    return index, iou


def _images(scenes: ScenePool) -> list[Image.Image]:
    return [Image.fromarray(image) for image in scenes.images]


def _boxes(scenes: ScenePool) -> list[Tensor]:
    return [torch.from_numpy(scenes.boxes(index)) for index in range(len(scenes))]


def _mean_iou(found: list[Tensor], wanted: list[np.ndarray]) -> float:
    """0 where there are none."""
    one, other = torch.cat(found), torch.from_numpy(np.concatenate(wanted))
    ious = (one & other).sum((1, 2)) / (one | other).sum((1, 2))
    return ious.sum().item() / max(1, len(ious))
