# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Scenes of coloured shapes, drawn from a seed: what is where, the picture, and each shape's exact mask and box."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw


SIDE = 96  # pixels

COLORS = {
    "red": (210, 45, 45),
    "yellow": (225, 205, 50),
    "green": (50, 165, 60),
    "cyan": (60, 200, 205),
    "blue": (50, 75, 205),
    "purple": (150, 55, 175),
}
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (6.5, 8.0), "medium": (10.0, 12.0), "large": (15.0, 17.5)}  # radius, pixels

# Scenes of different splits come from different streams of random numbers, whatever their index.
SPLITS = {"train": 0, "validation": 1, "test": 2}

_SUPERSAMPLING = 4
_LEAST_VISIBLE = 0.6  # of a shape's pixels, when all others are drawn


@dataclass(frozen=True)
class Shape:
    """One shape; `center_xy` and `radius` in pixels, `angle` in radians, `tint` added to its colour (RGB)."""

    kind: str
    color: str
    size: str
    center_xy: tuple[float, float]
    radius: float
    angle: float
    tint: tuple[float, float, float]

    @property
    def name(self) -> str:
        return f"{self.size} {self.color} {self.kind}"

    @property
    def place(self) -> str:
        """Which of nine parts of the picture the centre lies in: "top left" ... "middle" ... "bottom right"."""
        column, row = (min(int(3 * value / SIDE), 2) for value in self.center_xy)
        words = [("top", "", "bottom")[row], ("left", "", "right")[column]]
        return " ".join(filter(None, words)) or "middle"


@dataclass(frozen=True)
class Scene:
    """A picture's content: shapes from back to front, and the seed of its textures."""

    shapes: tuple[Shape, ...]
    texture_seed: tuple[int, ...]

    @cached_property
    def masks(self) -> np.ndarray:
        """(n, SIDE, SIDE) bool: the visible pixels of each shape."""
        masks = np.stack([_coverage(shape) >= 0.5 for shape in self.shapes])
        covered = np.zeros((SIDE, SIDE), dtype=bool)
        for mask in masks[::-1]:
            mask &= ~covered
            covered |= mask
        return masks

    @cached_property
    def boxes_xyxy(self) -> np.ndarray:
        """(n, 4) float32: left, top, right, bottom edges of the visible pixels."""
        boxes = []
        for mask in self.masks:
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        return np.array(boxes, dtype=np.float32)

    def draw(self) -> Image.Image:
        """The picture, SIDE x SIDE RGB."""
        rng = np.random.default_rng(self.texture_seed)
        canvas = _background(rng)
        for shape in self.shapes:
            alpha = _coverage(shape)[..., None]
            grain = rng.normal(0, 8, (SIDE, SIDE, 1))
            canvas = canvas * (1 - alpha) + (np.add(COLORS[shape.color], shape.tint) + grain) * alpha
        return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def make_scene(split: str, index: int, num_shapes: tuple[int, int] = (2, 9)) -> Scene:
    """The `index`-th scene of a split; the same arguments give the same scene.

    Args:
        split: "train", "validation" or "test".
        num_shapes: least and largest number of shapes; a crowded picture may end with fewer than were drawn.
    """
    seed = (SPLITS[split], index, *num_shapes)
    rng = np.random.default_rng(seed)
    wanted = int(rng.integers(num_shapes[0], num_shapes[1] + 1))
    shapes: list[Shape] = []
    full: list[np.ndarray] = []  # each shape's own pixels
    visible: list[np.ndarray] = []
    for _ in range(12 * wanted):
        if len(shapes) == wanted:
            break
        shape = _random_shape(rng)
        pixels = _coverage(shape) >= 0.5
        left = [mask & ~pixels for mask in visible]
        if all(mask.sum() >= _LEAST_VISIBLE * own.sum() for mask, own in zip(left, full, strict=True)):
            shapes.append(shape)
            full.append(pixels)
            visible = [*left, pixels]
    return Scene(tuple(shapes), (*seed, 1))


def _random_shape(rng: np.random.Generator) -> Shape:
    size = str(rng.choice(list(SIZES)))
    radius = float(rng.uniform(*SIZES[size]))
    x, y = rng.uniform(radius, SIDE - radius, 2).tolist()
    return Shape(
        kind=str(rng.choice(KINDS)),
        color=str(rng.choice(list(COLORS))),
        size=size,
        center_xy=(x, y),
        radius=radius,
        angle=float(rng.uniform(-0.35, 0.35)),
        tint=tuple(rng.uniform(-18, 18, 3).tolist()),
    )


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners around the origin for a radius of 1, of the kinds that are polygons."""
    if shape.kind == "square":
        corners = [(0.82 * x, 0.82 * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    elif shape.kind == "triangle":
        corners = [(math.sin(turn), -math.cos(turn)) for turn in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    elif shape.kind == "star":
        corners = [
            (
                (0.42 if point % 2 else 1) * math.sin(point * math.pi / 5),
                -(0.42 if point % 2 else 1) * math.cos(point * math.pi / 5),
            )
            for point in range(10)
        ]
    else:  # cross
        arm = 0.32
        corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        corners += [(-x, -y) for x, y in corners]
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


def _coverage(shape: Shape) -> np.ndarray:
    """(SIDE, SIDE) float in [0, 1]: the part of each pixel that the shape covers."""
    size = SIDE * _SUPERSAMPLING
    fine = Image.new("L", (size, size))
    pen = ImageDraw.Draw(fine)
    x, y, radius = (value * _SUPERSAMPLING for value in (*shape.center_xy, shape.radius))
    if shape.kind in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape.kind == "ring":
            hole = 0.55 * radius
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _outline(shape)], fill=255)
    return np.asarray(fine.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _background(rng: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) float: a dull colour with blotches, stripes and grain."""
    base = rng.uniform(70, 190) + rng.uniform(-20, 20, 3)
    blotches = Image.fromarray(rng.uniform(-1, 1, (6, 6)).astype(np.float32)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    rows, columns = np.mgrid[:SIDE, :SIDE]
    turn, period = rng.uniform(0, math.pi), rng.uniform(6, 24)
    stripes = np.sin(2 * math.pi * (columns * math.cos(turn) + rows * math.sin(turn)) / period)
    light = 18 * np.asarray(blotches) + rng.uniform(0, 14) * stripes
    return base + light[..., None] + rng.normal(0, 5, (SIDE, SIDE, 3))
