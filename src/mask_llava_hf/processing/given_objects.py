# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads what the user says about objects: one entry per image, in any of the layouts that images come in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .objects.image_objects import ImageObjects


def given_objects(
    images: Any, pictures: Sequence[Image.Image], boxes: Any = None, masks: Any = None, objects: Any = None
) -> list[ImageObjects | None]:
    """What the user gave for each picture, checked and in one form; None where nothing was given.

    Args:
        images: the images as passed to the processor: one, a list, or a list of lists.
        pictures: the same images, upright, flat in prompt order.
        boxes, masks, objects: one entry per image, flat in prompt order or nested like `images`; a single image may
            drop the outer list. An entry is boxes (n, 4) xyxy in pixels of the upright image; masks (n, H, W) of the
            image's size or a list of COCO RLEs; an `ImageObjects` or its dict. None means not given, [] no objects.

    Raises:
        ValueError: another shape, another number of entries than images, objects of another image size, or more than
            one of the three for one image.
    """
    nesting = [len(row) for row in images] if _is_nested(images) else None
    entries = {
        name: _entries_per_image(name, value, is_entry, len(pictures), nesting)
        for name, value, is_entry in (
            ("boxes", boxes, _is_boxes),
            ("masks", masks, _is_masks),
            ("objects", objects, _is_objects),
        )
    }
    found: list[ImageObjects | None] = []
    for index, picture in enumerate(pictures):
        given = {name: values[index] for name, values in entries.items() if values[index] is not None}
        if len(given) > 1:
            raise ValueError(
                f"Image {index} was given {' and '.join(f'`{name}`' for name in given)}. They say the same thing in "
                "different ways and could contradict each other: give one per image, None for the others."
            )
        image_hw = (picture.height, picture.width)
        try:
            found.append(next((_build(name, entry, image_hw) for name, entry in given.items()), None))
        except ValueError as error:
            raise ValueError(f"Image {index}, `{next(iter(given))}`: {error}") from error
    return found


def _build(name: str, entry: Any, image_hw: tuple[int, int]) -> ImageObjects:
    if not isinstance(entry, ImageObjects) and len(entry) == 0:
        return ImageObjects.empty(image_hw)
    if name == "boxes":
        return ImageObjects.from_boxes(entry, image_hw)
    if name == "masks":
        return ImageObjects.from_masks(entry, image_hw)
    objects = entry if isinstance(entry, ImageObjects) else ImageObjects.from_dict(entry)
    if tuple(objects.image_hw) != image_hw:
        raise ValueError(
            f"these objects belong to an image of {objects.image_hw[0]} x {objects.image_hw[1]} (height x width), but "
            f"this one is {image_hw[0]} x {image_hw[1]} when upright. Their boxes and masks would lie in the wrong "
            "places; pass the objects of this image, in the same order as the images."
        )
    return objects


def _entries_per_image(
    name: str, value: Any, is_entry: Callable[[Any], bool], num_images: int, nesting: list[int] | None
) -> list[Any]:
    value = _from_columns(value)
    if value is None:
        return [None] * num_images
    if num_images == 1 and (is_entry(value) or _is_empty(value)):
        return [value]

    def fits(entries: Any, count: int) -> bool:
        return (
            isinstance(entries, list | tuple | np.ndarray | torch.Tensor)
            and len(entries) == count
            and all(entry is None or _is_empty(entry) or is_entry(entry) for entry in entries)
        )

    if fits(value, num_images):
        return list(value)
    if nesting is not None and isinstance(value, list) and len(value) == len(nesting):
        # As for the whole call, None says nothing of a row, and a row with one image may drop its list
        rows = [
            [None] * count if row is None else [row] if count == 1 and (is_entry(row) or _is_empty(row)) else row
            for row, count in zip(value, nesting, strict=True)
        ]
        if all(fits(row, count) for row, count in zip(rows, nesting, strict=True)):
            return [entry for row in rows for entry in row]
    expected = {
        "boxes": "(n, 4) numbers [x1, y1, x2, y2]",
        "masks": "(n, height, width) of zeros and ones, or n COCO RLEs",
        "objects": "an ImageObjects (or its dict)",
    }[name]
    layout = f"{num_images} image(s)" if nesting is None else f"{num_images} images nested as {nesting}"
    raise ValueError(
        f"`{name}` must have one entry per image, flat or nested like the images: {expected}, None to detect, or [] "
        f"for no objects. For {layout} the call has {_describe(value)}."
    )


def says_nothing(value: Any) -> bool:
    """Whether objects are given for no image at all: None, or lists of nothing."""
    value = _from_columns(value)
    return value is None or (isinstance(value, list) and all(says_nothing(entry) for entry in value))


def _from_columns(value: Any) -> Any:
    """The same layout in lists, whatever sequences a dataset gave, and None where it stores a dict of None."""
    if isinstance(value, Mapping):
        return None if all(entry is None for entry in value.values()) else value
    if isinstance(value, ImageObjects | str) or not isinstance(value, Sequence):
        return value
    return [_from_columns(entry) for entry in value]


def _is_nested(images: Any) -> bool:
    return isinstance(images, list | tuple) and all(isinstance(row, list | tuple) for row in images)


def _is_empty(entry: Any) -> bool:
    return not isinstance(entry, ImageObjects) and hasattr(entry, "__len__") and len(entry) == 0


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of an array, a tensor, or nested lists of numbers; None where there is none."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return tuple(value.shape)
    if isinstance(value, list):
        if not value or isinstance(value[0], Mapping | ImageObjects | str):
            return None
        inner = [_shape(item) for item in value]
        return None if inner[0] is None or any(shape != inner[0] for shape in inner) else (len(value), *inner[0])
    return () if isinstance(value, int | float | np.number | np.bool_) else None


def _is_boxes(value: Any) -> bool:
    shape = _shape(value)
    return shape is not None and len(shape) == 2 and shape[1] == 4


def _is_masks(value: Any) -> bool:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return all("counts" in item and "size" in item for item in value)
    shape = _shape(value)
    return shape is not None and len(shape) == 3


def _is_objects(value: Any) -> bool:
    return isinstance(value, ImageObjects) or (isinstance(value, Mapping) and value.get("boxes_xyxy") is not None)


def _describe(value: Any) -> str:
    shape = _shape(value)
    if shape is not None:
        return f"{type(value).__name__} of shape {shape}"
    if isinstance(value, list):
        inner = [str(_shape(item)) if _shape(item) is not None else type(item).__name__ for item in value[:3]]
        return f"a {type(value).__name__} of {len(value)}: {', '.join(inner)}{', ...' if len(value) > 3 else ''}"
    return f"a {type(value).__name__}"
