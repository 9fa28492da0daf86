# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""From pictures to objects in keep order, and to the tensors the model reads. What a cap drops is not computed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from .geometry import SquareFrame
from .object_parts import ObjectParts, check_fingerprint
from .object_settings import ObjectSettings
from .objects.image_objects import ImageObjects
from .objects.nested_order import Order, keep_order


logger = logging.get_logger(__name__)

# Images whose masks are in memory at once: fifty candidates of a 12-megapixel photograph take 600 MB.
IMAGES_PER_STEP = 4


def find_objects_in(
    pictures: Sequence[Image.Image],
    given: Sequence[ImageObjects | None],
    cap: int,
    settings: ObjectSettings,
    parts: ObjectParts,
) -> list[ImageObjects]:
    """At most `cap` objects per picture in keep order, each with a mask or, where that is enough, an embedding.

    Args:
        pictures: upright RGB.
        given: the user's objects per picture, kept in their order; None: to be detected.
        cap: the most objects per picture.
    """
    found = [
        ImageObjects.empty((picture.height, picture.width)) if objects is None else objects[:cap]
        for picture, objects in zip(pictures, given, strict=True)
    ]
    to_detect = [index for index, objects in enumerate(given) if objects is None] if cap else []
    if to_detect and settings.detector is None:
        logger.warning_once(
            'No objects: `object_settings["detector"]` is None and no `boxes`, `masks` or `objects` were given, so '
            "images get CLS and patch tokens only. Pass `max_object_tokens=0` if that is meant."
        )
        to_detect = []
    if to_detect:
        detected = parts.detector().detect(
            [pictures[index] for index in to_detect], settings.score_threshold, settings.max_candidates
        )
        for index, objects in zip(to_detect, detected, strict=True):
            # An order that needs no masks comes before the segmenter, which then sees only what is kept
            found[index] = objects if settings.order == "mask_iou" else _first(objects, settings.order, cap)
    found = _with_masks(pictures, found, settings, parts)
    if settings.order == "mask_iou":
        for index in to_detect:
            found[index] = _first(found[index], settings.order, cap)
    if to_detect and not any(len(found[index]) for index in to_detect):
        logger.warning_once(
            f"No objects were found in {len(to_detect)} image(s) at `score_threshold`={settings.score_threshold}; they "
            "get CLS and patch tokens only."
        )
    return found


def find_objects_in_steps(
    pictures: Sequence[Image.Image],
    given: Sequence[ImageObjects | None],
    cap: int,
    settings: ObjectSettings,
    parts: ObjectParts,
    image_processor: Any,
    overrides: Mapping[str, Any],
    keep_masks: bool,
    images_per_step: int = IMAGES_PER_STEP,
) -> tuple[list[ImageObjects], list[Tensor | None]]:
    """`find_objects_in` and `masks_in_frame`, a few images at a time.

    Args:
        keep_masks: whether the objects keep their masks at the size of the image, which can be very large.
        images_per_step: how many images' candidates, with their masks, are in memory at once.
    """
    found: list[ImageObjects] = []
    framed: list[Tensor | None] = []
    for start in range(0, len(pictures), images_per_step):
        step = slice(start, start + images_per_step)
        objects = find_objects_in(pictures[step], given[step], cap, settings, parts)
        masks, objects = masks_in_frame(objects, settings, image_processor, overrides)
        framed += masks
        found += [entry if keep_masks or entry.masks is None else replace(entry, masks=None) for entry in objects]
    return found, framed


def masks_in_frame(
    found: Sequence[ImageObjects], settings: ObjectSettings, image_processor: Any, overrides: Mapping[str, Any]
) -> tuple[list[Tensor | None], list[ImageObjects]]:
    """Each image's masks in the frame of the tower's square input; objects that vanish there are dropped.

    Args:
        overrides: the call's arguments to the image processor, which change the frame as they change the pixels.

    Returns:
        Per image an (n, S, S) bool tensor, or None where embeddings make masks needless; and the objects left.
    """
    masks: list[Tensor | None] = []
    left: list[ImageObjects] = []
    num_dropped = 0
    for objects in found:
        if objects.masks is None or _needs_no_masks(objects, settings):
            masks.append(None)
            left.append(objects)
            continue
        frame = SquareFrame.from_image_processor(image_processor, objects.image_hw, **overrides)
        framed = frame.transform_masks(objects.masks)
        visible = framed.flatten(1).any(1)
        num_dropped += int((~visible).sum())
        masks.append(framed[visible])
        left.append(_where(objects, visible))
    if num_dropped:
        logger.warning(
            f"{num_dropped} of {sum(map(len, found))} objects have no pixel in the part of their image that the vision "
            "tower sees, and give no token."
        )
    return masks, left


def stack_masks(masks: Sequence[Tensor | None], num_slots: int, size: tuple[int, int]) -> Tensor:
    """Per-image masks as one (I, `num_slots`, S, S) uint8 tensor, zeros past each image's masks."""
    stacked = torch.zeros(len(masks), num_slots, *size, dtype=torch.uint8)
    for row, image_masks in zip(stacked, masks, strict=True):
        if image_masks is not None:
            row[: len(image_masks)] = image_masks
    return stacked


def stack_embeddings(found: Sequence[ImageObjects], num_slots: int, embed_size: int) -> Tensor:
    """Per-image embeddings as one (I, `num_slots`, D) float32 tensor, zeros past each image's objects.

    Raises:
        ValueError: embeddings of another width than `embed_size`.
    """
    stacked = torch.zeros(len(found), num_slots, embed_size)
    for index, objects in enumerate(found):
        if objects.embeddings is None:
            continue
        width = objects.embeddings.shape[-1]
        if width != embed_size:
            raise ValueError(
                f'The objects of image {index} have embeddings of width {width}, but `object_settings["embed_size"]` '
                f"is {embed_size}, the width of the model's tower. They come from another tower; make them again with "
                "`find_objects`."
            )
        stacked[index, : len(objects)] = objects.embeddings
    return stacked


def with_embeddings(
    found: Sequence[ImageObjects],
    masks: Sequence[Tensor | None],
    pixel_values: Tensor,
    parts: ObjectParts,
    image_processor: Any,
    overrides: Mapping[str, Any],
) -> list[ImageObjects]:
    """Objects with embeddings: stored ones after a check of their fingerprint, the others made now.

    Args:
        masks: per image (n, S, S) bool in the tower's frame, or None where the objects already have embeddings.
        pixel_values: (I, 3, S, S).
        overrides: the call's arguments to the image processor.
    """
    result = list(found)
    stored = [index for index, objects in enumerate(found) if len(objects) and objects.embeddings is not None]
    missing = [index for index, objects in enumerate(found) if len(objects) and objects.embeddings is None]
    embeddings = None
    if missing:
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        slots = stack_masks([masks[index] for index in missing], max(len(found[i]) for i in missing), size)
        embeddings = parts.mask_embedder().embed(pixel_values[missing], slots.bool())
    if stored or missing:
        fingerprint = parts.fingerprint(image_processor, overrides)
    for index in stored:
        check_fingerprint(found[index], fingerprint, index)
    for index, rows in zip(missing, embeddings if embeddings is not None else (), strict=True):
        result[index] = replace(found[index], embeddings=rows[: len(found[index])], embedding_fingerprint=fingerprint)
    return result


def boxes_to_masks(boxes_xyxy: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """The boxes themselves as masks: the pixels whose centre lies inside, and always the pixel at the box's centre.

    Args:
        boxes_xyxy: (n, 4) in pixels of the image.

    Returns:
        (n, H, W) bool.
    """
    height, width = image_hw
    x1, y1, x2, y2 = boxes_xyxy[:, :, None].unbind(1)  # (n, 1) each

    def inside(start: Tensor, stop: Tensor, length: int) -> Tensor:
        pixels = torch.arange(length)
        middle = ((start + stop) / 2).floor().clamp(0, length - 1)
        return ((pixels + 0.5 >= start) & (pixels + 0.5 < stop)) | (pixels == middle)

    return inside(y1, y2, height)[:, :, None] & inside(x1, x2, width)[:, None, :]


def _first(objects: ImageObjects, order: Order, cap: int) -> ImageObjects:
    return objects[keep_order(objects, order)[:cap]] if len(objects) else objects


def _where(objects: ImageObjects, wanted: Tensor) -> ImageObjects:
    """The objects where `wanted` (n,) is True; the same value where that is all, as masks are large to copy."""
    return objects if wanted.all() else objects[wanted]


def _needs_no_masks(objects: ImageObjects, settings: ObjectSettings) -> bool:
    return settings.mask_inversion == "processor" and objects.embeddings is not None


def _with_masks(
    pictures: Sequence[Image.Image], found: Sequence[ImageObjects], settings: ObjectSettings, parts: ObjectParts
) -> list[ImageObjects]:
    result = list(found)
    missing = [
        index
        for index, objects in enumerate(found)
        if len(objects) and objects.masks is None and not _needs_no_masks(objects, settings)
    ]
    if not missing:
        return result
    if settings.mask_source == "boxes":
        for index in missing:
            result[index] = found[index].with_masks(boxes_to_masks(found[index].boxes_xyxy, found[index].image_hw))
        return result
    masks = parts.segmenter().segment(
        [pictures[index] for index in missing], [found[index].boxes_xyxy for index in missing]
    )
    num_empty = 0
    for index, image_masks in zip(missing, masks, strict=True):
        filled = image_masks.flatten(1).any(1)
        result[index] = _where(found[index].with_masks(image_masks), filled)
        num_empty += int((~filled).sum())
    if num_empty:
        logger.warning(
            f"The segmenter gave {num_empty} of {sum(map(len, masks))} objects an empty mask; they give no token."
        )
    return result
