# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of the fields of `ImageObjects`: each returns the field in its one form, or says what is wrong with it."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def boxes_inside(boxes_xyxy: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
    """(N,) bool: which (N, 4) boxes have an area inside the image; False for NaN and reversed corners."""
    clipped = _clipped(boxes_xyxy, image_hw)
    return (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def as_tensor(value: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
    """`value` on the CPU, without gradient."""
    try:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            value = torch.stack([entry.detach().cpu() for entry in value])
        return torch.as_tensor(value).detach().to("cpu", dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` cannot be read as a table of numbers ({error}); expected a tensor, an array or nested lists of "
            "equal length."
        ) from error


def as_index(index: Any, number: int) -> torch.Tensor:
    """Row numbers from a list, array or tensor of indices, or of one bool per row."""
    rows = torch.as_tensor(index).cpu()
    if rows.numel() == 0:
        return torch.zeros(0, dtype=torch.long)
    if rows.dtype == torch.bool:
        if rows.shape != (number,):
            raise IndexError(f"A bool index has shape {tuple(rows.shape)}, expected ({number},), one per object.")
        return rows.nonzero()[:, 0]
    if rows.ndim != 1 or rows.is_floating_point():
        raise IndexError(f"An index has shape {tuple(rows.shape)} and dtype {rows.dtype}, expected a list of integers.")
    return rows.long()


def _clipped(boxes_xyxy: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
    height, width = image_hw
    return torch.stack(
        [
            boxes_xyxy[:, 0].clamp(0, width),
            boxes_xyxy[:, 1].clamp(0, height),
            boxes_xyxy[:, 2].clamp(0, width),
            boxes_xyxy[:, 3].clamp(0, height),
        ],
        dim=1,
    )


def reject_relative_boxes(boxes: torch.Tensor, image_hw: tuple[int, int]) -> None:
    """Raises where boxes are fractions of the image: read as pixels they would all mark its upper left corner."""
    if boxes.numel() and boxes.abs().max() <= 1 and min(image_hw) > 2:
        raise ValueError(
            f"All box coordinates lie between {boxes.min():.4g} and {boxes.max():.4g}, expected pixels of an image of "
            f"{image_hw[0]} x {image_hw[1]}; read as pixels they would all mark its upper left corner. Multiply by "
            "width and height, or pass `target_sizes` to `post_process_object_detection`."
        )


def checked_image_hw(image_hw: Any) -> tuple[int, int]:
    sides = tuple(image_hw) if isinstance(image_hw, Sequence) and not isinstance(image_hw, str) else (image_hw,)
    whole = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"`image_hw` is {image_hw!r}, expected (height, width), two integers above 0.")
    return int(sides[0]), int(sides[1])


def checked_boxes(boxes_xyxy: Any, image_hw: tuple[int, int]) -> torch.Tensor:
    boxes = as_tensor(boxes_xyxy, "boxes_xyxy", torch.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"`boxes_xyxy` has shape {tuple(boxes.shape)}, expected (N, 4). Write [[left, top, right, bottom]] for a "
            "single box."
        )
    left, top, right, bottom = boxes.unbind(1)

    def refuse(bad: torch.Tensor, problem: str) -> None:
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            numbers = ", ".join(f"{value:g}" for value in boxes[row].tolist())
            raise ValueError(f"`boxes_xyxy[{row}]` is [{numbers}] {problem}")

    refuse(~boxes.isfinite().all(1), "with NaN or infinite values, expected pixels of the upright original image.")
    refuse(
        (right < left) | (bottom < top),
        "with right < left or bottom < top, expected [left, top, right, bottom]. Was [left, top, width, height] given? "
        "Then add left to the width and top to the height.",
    )
    refuse((right == left) | (bottom == top), "without area, expected right > left and bottom > top.")
    refuse(
        ~boxes_inside(boxes, image_hw),
        f"outside the image of {image_hw[0]} x {image_hw[1]} pixels (height x width). Boxes are in pixels of the "
        "upright original image: not of a resized one, and after the EXIF rotation.",
    )
    return _clipped(boxes, image_hw)


def checked_scores(scores: Any, number: int) -> torch.Tensor:
    checked = as_tensor(scores, "scores", torch.float32)
    if checked.shape != (number,):
        raise ValueError(f"`scores` has shape {tuple(checked.shape)}, expected ({number},), one per box.")
    bad = ~((checked >= 0) & (checked <= 1))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"`scores[{row}]` is {checked[row].item():g}, expected a number in [0, 1]. Apply a sigmoid or softmax to "
            "logits."
        )
    return checked


def checked_masks(masks: Any, number: int, image_hw: tuple[int, int]) -> torch.Tensor | None:
    if masks is None:
        return None
    checked = torch.as_tensor(masks).detach().cpu()
    if checked.dtype != torch.bool:
        raise ValueError(
            f"`masks` has dtype {checked.dtype}, expected torch.bool. `ImageObjects.from_masks` also reads 0 and 1 and "
            "run-length encodings."
        )
    if tuple(checked.shape) != (number, *image_hw):
        raise ValueError(
            f"`masks` has shape {tuple(checked.shape)}, expected {(number, *image_hw)}: one mask per box, in the frame "
            "of the upright original image."
        )
    return checked


def checked_embeddings(embeddings: Any, fingerprint: Any, number: int) -> torch.Tensor | None:
    if (embeddings is None) != (fingerprint is None):
        found, lacking = ("embeddings", "embedding_fingerprint")[:: 1 if fingerprint is None else -1]
        raise ValueError(
            f"`{found}` is given without `{lacking}`, expected both or neither: embeddings of an unknown vision tower "
            "would be used with the wrong one unnoticed."
        )
    if embeddings is None:
        return None
    try:
        json_able = isinstance(fingerprint, (str, dict)) and bool(json.dumps(fingerprint))
    except (TypeError, ValueError):
        json_able = False
    if not json_able:
        raise ValueError(
            f"`embedding_fingerprint` is {fingerprint!r}, expected a string or a dictionary that JSON can hold."
        )
    checked = torch.as_tensor(embeddings).detach().cpu()
    if checked.ndim != 2 or len(checked) != number or not checked.is_floating_point():
        raise ValueError(
            f"`embeddings` has shape {tuple(checked.shape)} and dtype {checked.dtype}, expected ({number}, D) floating "
            "point, one row per box."
        )
    bad = ~checked.isfinite().all(1)
    if bad.any():
        raise ValueError(f"`embeddings[{int(bad.nonzero()[0, 0])}]` has NaN or infinite values.")
    return checked


def checked_labels(labels: Any, number: int) -> list[str] | None:
    if labels is None:
        return None
    names = list(labels)
    if isinstance(labels, str) or len(names) != number:
        raise ValueError(f"`labels` has {len(names)} entries, expected {number} class names, one per box.")
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"`labels[{row}]` is {name!r}, expected a string.")
    return names
