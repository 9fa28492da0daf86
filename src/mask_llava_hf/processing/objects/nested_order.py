# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The keep order of an image's objects: every prefix of it is a good choice of that many objects."""

from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from .image_objects import ImageObjects


Order = Literal["mask_iou", "box_iou", "score"]
ORDERS: tuple[Order, ...] = ("mask_iou", "box_iou", "score")

# Words of 64 pixels per step, so that one step over all masks stays in the processor's cache.
_WORDS_AT_ONCE = 8192


def keep_order(objects: ImageObjects, order: Order = "mask_iou") -> torch.Tensor:
    """Row numbers of `objects`, the one to keep longest first.

    Repeatedly, of all objects that take part in a pair with the highest IoU, the one with the lowest score is dropped
    (then the smaller, then the later one), until one is left; the keep order is the dropping order reversed. Among
    objects that do not overlap this is the order of the scores. IoUs are compared as exact fractions, so that the
    result depends neither on the machine nor on the order of additions.

    Args:
        objects: N objects.
        order: "mask_iou" for overlaps of masks (needs masks), "box_iou" for overlaps of boxes (known before
            segmentation), "score" for scores alone. Equal scores are told apart by the area of what the order looks
            at: masks for "mask_iou", otherwise boxes.

    Returns:
        (N,) int64.

    Raises:
        ValueError: an unknown order, or "mask_iou" without masks.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` is {order!r}, expected one of {', '.join(map(repr, ORDERS))}.")
    overlaps: dict[tuple[int, int], Fraction] = {}
    areas: list[int] | list[Fraction]
    if order == "mask_iou":
        if objects.masks is None:
            raise ValueError(
                '`order="mask_iou"` needs masks, but these objects have only boxes. Segment them first, or use '
                '"box_iou" or "score".'
            )
        counts = mask_intersections(objects.masks)  # (N, N), areas on the diagonal
        areas = [counts[row][row] for row in range(len(counts))]
        for i, row in enumerate(counts):
            for j in range(i):
                if row[j]:
                    overlaps[i, j] = Fraction(row[j], areas[i] + areas[j] - row[j])
    else:
        corners = [[Fraction(value) for value in box] for box in objects.boxes_xyxy.tolist()]
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in corners]
        if order == "box_iou":
            overlaps = _box_overlaps(corners, areas)
    scores = objects.scores.tolist()
    dropped = _dropping_order(overlaps, [(scores[i], areas[i], -i) for i in range(len(objects))])
    return torch.tensor(dropped[::-1], dtype=torch.long)


def mask_intersections(masks: torch.Tensor) -> list[list[int]]:
    """Pixels that each two masks share, counted exactly.

    Args:
        masks: (N, H, W) bool.

    Returns:
        N x N integers, symmetric, areas on the diagonal.
    """
    number, pixels = len(masks), masks[0].numel() if len(masks) else 0
    words = np.zeros((number, -(-pixels // 64)), dtype=np.uint64)  # 64 pixels each; the rest of the last word is zero
    for packed, mask in zip(words.view(np.uint8), masks, strict=True):
        bits = np.packbits(mask.cpu().numpy().reshape(-1))
        packed[: len(bits)] = bits
    counts = np.zeros((number, number), dtype=np.int64)
    for start in range(0, words.shape[1], _WORDS_AT_ONCE):
        block = words[:, start : start + _WORDS_AT_ONCE]
        for row in range(number):
            counts[row, : row + 1] += np.bitwise_count(block[row] & block[: row + 1]).sum(1, dtype=np.int64)
    return (counts + np.tril(counts, -1).T).tolist()


def _box_overlaps(corners: list[list[Fraction]], areas: list[Fraction]) -> dict[tuple[int, int], Fraction]:
    """IoU of each two boxes that overlap."""
    overlaps = {}
    for i, first in enumerate(corners):
        for j, second in enumerate(corners[:i]):
            width = min(first[2], second[2]) - max(first[0], second[0])
            height = min(first[3], second[3]) - max(first[1], second[1])
            if width > 0 and height > 0:
                shared = width * height
                overlaps[i, j] = shared / (areas[i] + areas[j] - shared)
    return overlaps


def _dropping_order(overlaps: dict[tuple[int, int], Fraction], worth: list[tuple]) -> list[int]:
    """Row numbers in the order in which they are dropped, the one that is left included as the last.

    Args:
        overlaps: IoU above zero by pair of rows.
        worth: by row, what is compared among the candidates; the least is dropped.
    """
    groups: dict[Fraction, list[tuple[int, int]]] = {}
    for pair, iou in overlaps.items():
        groups.setdefault(iou, []).append(pair)
    alive = set(range(len(worth)))
    dropped = []

    def drop_least(candidates: set[int]) -> None:
        least = min(candidates, key=worth.__getitem__)
        alive.remove(least)
        dropped.append(least)

    # Dropping only ever removes pairs, so one pass from the highest IoU down meets each pair in time.
    for iou in sorted(groups, reverse=True):
        while candidates := {row for pair in groups[iou] if alive.issuperset(pair) for row in pair}:
            drop_least(candidates)
    while alive:
        drop_least(alive)
    return dropped
