# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Masks in the forms people have them: arrays of zeros and ones, COCO run-length encoding, and boxes around them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def masks_to_boxes(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounding boxes of masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32 boxes, right and bottom past the last pixel, zeros for empty masks; and (N,) bool, which masks
        are not empty.
    """
    boxes = torch.zeros(len(masks), 4)
    occupied = torch.zeros(len(masks), dtype=torch.bool)
    for row, mask in enumerate(masks):
        ys = mask.any(1).nonzero()
        if len(ys) == 0:
            continue
        xs = mask.any(0).nonzero()
        boxes[row] = torch.stack([xs[0, 0], ys[0, 0], xs[-1, 0] + 1, ys[-1, 0] + 1]).float()
        occupied[row] = True
    return boxes, occupied


def mask_to_rle(mask: torch.Tensor) -> dict[str, Any]:
    """COCO run-length encoding of a (H, W) bool mask, with the compressed counts as an ASCII string."""
    from faster_coco_eval import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def rle_to_mask(rle: Mapping[str, Any], image_hw: tuple[int, int]) -> torch.Tensor:
    """The (H, W) bool mask of a COCO run-length encoding, compressed or not.

    Raises:
        ValueError: no such encoding, or one of another size than the image.
    """
    from faster_coco_eval import mask as coco_mask

    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"A mask has the keys {sorted(rle)}, expected 'size' and 'counts' as in COCO's encoding.")
    size = tuple(int(side) for side in rle["size"])
    if size != tuple(image_hw):
        raise ValueError(
            f"A mask in run-length encoding has size {size}, the image {tuple(image_hw)} (height, width). Encode masks "
            "at the size of the upright original image."
        )
    counts = rle["counts"]
    try:
        if not isinstance(counts, (str, bytes)):
            encoded = coco_mask.frPyObjects({"size": list(size), "counts": [int(count) for count in counts]}, *size)
        else:
            encoded = {"size": list(size), "counts": counts}
        return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(encoded))).bool()
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"The counts of a run-length encoding of size {size} are damaged: {error}") from error


def as_masks(masks: Any, image_hw: tuple[int, int]) -> torch.Tensor:
    """(N, H, W) bool from any of the forms that `from_masks` accepts."""
    if isinstance(masks, (list, tuple)):
        if not masks:
            return torch.zeros(0, *image_hw, dtype=torch.bool)
        if isinstance(masks[0], Mapping):
            return torch.stack([rle_to_mask(rle, image_hw) for rle in masks])
        masks = torch.stack([_zero_one_to_bool(torch.as_tensor(mask), image_hw, row) for row, mask in enumerate(masks)])
    tensor = torch.as_tensor(masks).detach().cpu()
    if tensor.numel() == 0 and tensor.shape[:1] == (0,):
        return torch.zeros(0, *image_hw, dtype=torch.bool)
    if tensor.ndim != 3:
        raise ValueError(
            f"`masks` has shape {tuple(tensor.shape)}, expected (N, {image_hw[0]}, {image_hw[1]}). Write masks[None] "
            "for a single mask."
        )
    return _zero_one_to_bool(tensor, image_hw)


def _zero_one_to_bool(masks: torch.Tensor, image_hw: tuple[int, int], row: int | None = None) -> torch.Tensor:
    where = "`masks`" if row is None else f"`masks[{row}]`"
    if tuple(masks.shape[-2:]) != tuple(image_hw):
        raise ValueError(
            f"{where} has shape {tuple(masks.shape)}, the image {tuple(image_hw)} (height, width): masks of another "
            "frame would cover the wrong pixels. Resize them to the upright original image."
        )
    if masks.dtype == torch.bool:
        return masks
    as_bool = masks != 0
    other = masks[as_bool & (masks != 1)]  # NaN is unequal to both
    if len(other):
        raise ValueError(
            f"{where} has the value {other[0].item()}, expected bool or the numbers 0 and 1. Threshold probabilities "
            "with `masks > 0.5`, logits and 0-to-255 images with `masks > 0`."
        )
    return as_bool
