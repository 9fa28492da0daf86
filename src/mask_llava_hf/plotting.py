# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of objects over their image. They are returned, never shown or saved; PIL is all that is needed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .modeling.token_layout import check_integer
from .processing.geometry import upright_rgb
from .processing.objects.image_objects import ImageObjects


# Okabe and Ito's palette without black and grey: eyes of all kinds tell these seven apart.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_GREY, _DARK = "#B0B0B0", "#282828"
_FILL_OPACITY = 0.42

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Pen:
    """Sizes in pixels of the picture, in proportion to its longer side."""

    line: int
    thin: int
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    small_font: ImageFont.FreeTypeFont | ImageFont.ImageFont

    @classmethod
    def for_size(cls, size: tuple[int, int]) -> "_Pen":
        side = max(size)
        return cls(
            line=max(1, round(side / 300)),
            thin=max(1, round(side / 600)),
            font=ImageFont.load_default(max(10, side / 36)),
            small_font=ImageFont.load_default(max(8, side / 54)),
        )


def draw_objects(image: Any, objects: ImageObjects, keep: int | None = None, *, min_side: int = 512) -> Image.Image:
    """Draws masks, boxes and keep order over an image.

    The tag n is the n-th object in keep order, counted from 1: `max_object_tokens=n` keeps the tags 1 to n. The first
    `keep` objects are in colour, with a translucent mask, its outline and the box; the others, which would be dropped,
    in grey, with a faint outline and a dashed box. Where masks overlap, the smaller one colours the pixels, so that no
    number of masks hides the image.

    Args:
        image: in any form that `upright_rgb` takes: PIL, array or tensor. EXIF rotation is applied.
        objects: of this image, in keep order, as `MaskLlavaProcessor.find_objects` returns them; masks may be missing.
        keep: how many objects are kept; default, and where there are fewer: all.
        min_side: an image whose longer side has fewer pixels is enlarged to it, so that tags can be read; 0 leaves the
            size alone.

    Returns:
        RGB, of the size of the upright image or enlarged. The given image is not changed.

    Raises:
        ValueError: objects of an image of another size, or a `keep` or `min_side` that is not an integer >= 0.
    """
    if not isinstance(objects, ImageObjects):
        raise ValueError(
            f"`objects` is a {type(objects).__name__}, expected the ImageObjects of this image. `find_objects` returns "
            "a list with one per image: pass an entry of it."
        )
    kept = len(objects) if keep is None else min(check_integer("keep", keep, 0), len(objects))
    upright = upright_rgb(image)
    if objects.image_hw != (upright.height, upright.width):
        raise ValueError(
            f"The objects belong to an image of {objects.image_hw[0]} x {objects.image_hw[1]} pixels (height x width), "
            f"but this one, upright, has {upright.height} x {upright.width}; masks and boxes would lie in wrong "
            "places. Pass the image that `find_objects` was given."
        )
    scale = max(1.0, check_integer("min_side", min_side, 0) / max(upright.size))
    size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    picture = upright.resize(size, Image.Resampling.BICUBIC) if size != upright.size else upright.copy()
    pen = _Pen.for_size(picture.size)

    large_first = _large_first(objects)
    dropped_first = [i for i in large_first if i >= kept] + [i for i in large_first if i < kept]
    if objects.masks is not None:
        _paint_masks(picture, objects.masks.numpy(), dropped_first, kept, pen)
    draw = ImageDraw.Draw(picture)
    boxes = [_scaled_box(objects.boxes_xyxy[i].tolist(), objects.image_hw, picture.size) for i in range(len(objects))]
    for i in dropped_first:
        if i < kept:
            draw.rectangle(boxes[i], outline=_COLOURS[i % len(_COLOURS)], width=pen.line)
        else:
            _dashed_rectangle(draw, boxes[i], pen.thin)
    _paint_tags(draw, boxes, kept, pen, picture.size)
    return picture


def _large_first(objects: ImageObjects) -> list[int]:
    if objects.masks is not None:
        areas = [float(mask.sum()) for mask in objects.masks]
    else:
        sides = objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]
        areas = sides.prod(1).tolist()
    return sorted(range(len(objects)), key=lambda i: -areas[i])


def _paint_masks(picture: Image.Image, masks: np.ndarray, order: list[int], kept: int, pen: _Pen) -> None:
    """Fills kept masks (N, H, W) bool and draws the outlines of all, in the given order, later over earlier."""
    fill = np.zeros((picture.height, picture.width), dtype=np.uint8)  # 0, or 1 + a number of colour
    line = np.zeros_like(fill)
    dropped_colour = len(_COLOURS) + 1
    for i in order:
        mask = Image.fromarray(masks[i]).resize(picture.size, Image.Resampling.NEAREST)
        corners = mask.getbbox()
        if corners is None:
            continue
        left, top, right, bottom = corners
        inside = np.asarray(mask)[top:bottom, left:right]
        colour = 1 + i % len(_COLOURS) if i < kept else dropped_colour
        outline = inside & ~_eroded(inside, pen.line if i < kept else pen.thin)
        if i < kept:
            # A mask that lies above hides outlines below it, as its fill does
            fill[top:bottom, left:right][inside] = colour
            line[top:bottom, left:right][inside] = 0
        line[top:bottom, left:right][outline] = colour
    for numbers, opacity, dropped_opacity in ((fill, _FILL_OPACITY, 0.0), (line, 1.0, 0.5)):
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[1 : dropped_colour + 1] = [ImageColor.getrgb(c)[:3] for c in (*_COLOURS, _GREY)]
        alpha = np.zeros(256, dtype=np.uint8)
        alpha[1:dropped_colour] = round(255 * opacity)
        alpha[dropped_colour] = round(255 * dropped_opacity)
        picture.paste(Image.fromarray(palette[numbers]), mask=Image.fromarray(alpha[numbers]))


def _eroded(mask: np.ndarray, width: int) -> np.ndarray:
    """A (h, w) bool mask without the `width` pixels along its border; beyond the array is outside."""
    eroded = np.pad(mask, width)
    for _ in range(2):  # rows, then (transposed) columns, and back
        window, target = 1, 2 * width + 1
        while window < target:  # by doubling the window, rather than neighbour by neighbour
            step = min(window, target - window)
            eroded = eroded[:-step] & eroded[step:]
            window += step
        eroded = eroded.T
    return eroded


def _scaled_box(box_xyxy: list[float], image_hw: tuple[int, int], size: tuple[int, int]) -> Box:
    """The first and last pixels of the picture that a box covers; at least one pixel each way."""
    factors = (size[0] / image_hw[1], size[1] / image_hw[0])
    left, top = (min(int(box_xyxy[k] * factors[k]), size[k] - 1) for k in (0, 1))
    right, bottom = (min(round(box_xyxy[k + 2] * factors[k]) - 1, size[k] - 1) for k in (0, 1))
    return left, top, max(left, right), max(top, bottom)


def _dashed_rectangle(draw: ImageDraw.ImageDraw, box: Box, width: int) -> None:
    left, top, right, bottom = box
    dash = 5 * width
    for x in range(left, right + 1, 2 * dash):
        for y in (top, max(top, bottom - width + 1)):
            draw.rectangle((x, y, min(x + dash, right), min(y + width - 1, bottom)), fill=_GREY)
    for y in range(top, bottom + 1, 2 * dash):
        for x in (left, max(left, right - width + 1)):
            draw.rectangle((x, y, min(x + width - 1, right), min(y + dash, bottom)), fill=_GREY)


def _paint_tags(draw: ImageDraw.ImageDraw, boxes: list[Box], kept: int, pen: _Pen, size: tuple[int, int]) -> None:
    """Numbers the boxes; tags avoid each other as far as there is room, those of kept objects first and on top."""
    placed: list[Box] = []
    tags = []
    for i, box in enumerate(boxes):
        font, colour = (pen.font, _COLOURS[i % len(_COLOURS)]) if i < kept else (pen.small_font, _DARK)
        padding = 2 * pen.line if i < kept else pen.line
        left, top, right, bottom = draw.textbbox((0, 0), str(i + 1), font=font)
        height = round(bottom - top) + 2 * padding
        width = max(height, round(right - left) + 2 * padding)  # a single figure in a square
        tag = next(
            (spot for spot in _tag_spots(box, width, height, size) if not any(_overlap(spot, p) for p in placed)),
            next(_tag_spots(box, width, height, size)),
        )
        placed.append(tag)
        tags.append((tag, str(i + 1), font, colour))
    for tag, number, font, colour in reversed(tags):
        draw.rectangle(tag, fill=colour)
        text_colour = _GREY if colour == _DARK else _readable_on(colour)
        left, top, right, bottom = draw.textbbox((0, 0), number, font=font)
        x, y = (tag[0] + tag[2] + 1 - left - right) / 2, (tag[1] + tag[3] + 1 - top - bottom) / 2
        draw.text((x, y), number, fill=text_colour, font=font)


def _tag_spots(box: Box, width: int, height: int, size: tuple[int, int]) -> Iterator[Box]:
    """Places for a tag, best first: the corners inside the box, along its top and left side, beside it.

    A box of which the tag would hide over a quarter gets it beside.
    """
    left, top, right, bottom = box
    corners = [(left, top), (right - width + 1, top), (left, bottom - height + 1), (right - width + 1, bottom - height)]
    along = [(x, top) for x in range(left + width, max(right - width, left + 1), width)]
    down = [(left, y) for y in range(top + height, max(bottom - height, top + 1), height)]
    beside = [(left, top - height), (right + 1, top), (left - width, top), (left, bottom + 1)]
    inside = [*corners, *along, *down]
    is_small = 4 * width * height > (right - left + 1) * (bottom - top + 1)
    for x, y in beside + inside if is_small else inside + beside:
        x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        yield x, y, x + width - 1, y + height - 1


def _overlap(first: Box, second: Box) -> bool:
    return first[0] <= second[2] and second[0] <= first[2] and first[1] <= second[3] and second[1] <= first[3]


def _readable_on(colour: str) -> str:
    """Black or white, whichever contrasts more (WCAG relative luminance)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


__all__ = ["draw_objects"]
