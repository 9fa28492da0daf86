# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Many scenes of the small world, drawn once and kept as arrays."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from shapes_world import COLORS, KINDS, SIDE, SIZES, make_scene
from tqdm import tqdm


@dataclass(frozen=True)
class ScenePool:
    """The first n scenes of a split.

    Visible pixels belong to one shape at most, so that one map per scene holds all its masks.

    Attributes:
        images: (n, SIDE, SIDE, 3) uint8.
        owners: (n, SIDE, SIDE) uint8, 0 for the background, 1 + i for the pixels of shape i.
        counts: (n,) int, shapes per scene.
        boxes_xyxy: (n, largest count, 4) float32, pixels; behind a scene's last shape without meaning, as below.
        centers_xy: (n, largest count, 2) float32, pixels, of the whole shapes.
        looks: (n, largest count, 3) uint8, which of `SIZES`, `COLORS` and `KINDS`.
    """

    images: np.ndarray
    owners: np.ndarray
    counts: np.ndarray
    boxes_xyxy: np.ndarray
    centers_xy: np.ndarray
    looks: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def boxes(self, index: int) -> np.ndarray:
        """(k, 4) float32: left, top, right, bottom of each shape in pixels."""
        return self.boxes_xyxy[index, : self.counts[index]]

    def masks(self, index: int) -> np.ndarray:
        """(k, SIDE, SIDE) bool: the visible pixels of each shape."""
        return self.owners[index] == np.arange(1, self.counts[index] + 1)[:, None, None]

    def sample(self, rng: np.random.Generator, count: int) -> "ScenePool":
        """Random scenes, each mirrored with probability one half: in a mirrored world all would be as likely."""
        chosen = rng.integers(len(self), size=count)
        images, owners = self.images[chosen], self.owners[chosen]
        boxes, centers = self.boxes_xyxy[chosen], self.centers_xy[chosen]
        mirrored = rng.random(count) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
        owners[mirrored] = owners[mirrored, :, ::-1]
        boxes[mirrored, :, 0::2] = SIDE - boxes[mirrored][..., 2::-2]
        centers[mirrored, :, 0] = SIDE - centers[mirrored, :, 0]
        return ScenePool(images, owners, self.counts[chosen], boxes, centers, self.looks[chosen])


def scene_pool(
    split: str,
    count: int,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    num_shapes: tuple[int, int] = (2, 9),
) -> ScenePool:
    """The first `count` scenes of a split, about 7 ms each to draw.

    Args:
        num_shapes: least and largest number of shapes in a scene.
        cache_dir: folder where the arrays are kept for the next call (about 37 kB a scene).
    """
    path = None if cache_dir is None else Path(cache_dir) / f"{split}_{num_shapes[0]}to{num_shapes[1]}_{count}.npz"
    if path is not None and path.exists():
        with np.load(path) as arrays:
            return ScenePool(**arrays)
    scenes = [make_scene(split, index, num_shapes) for index in range(count)]
    most = max(len(scene.shapes) for scene in scenes)
    pool = ScenePool(
        images=np.empty((count, SIDE, SIDE, 3), np.uint8),
        owners=np.zeros((count, SIDE, SIDE), np.uint8),
        counts=np.array([len(scene.shapes) for scene in scenes]),
        boxes_xyxy=np.zeros((count, most, 4), np.float32),
        centers_xy=np.zeros((count, most, 2), np.float32),
        looks=np.zeros((count, most, 3), np.uint8),
    )
    for index, scene in enumerate(tqdm(scenes, desc=f"drawing {split} scenes", leave=False)):
        pool.images[index] = scene.draw()
        for owner, mask in enumerate(scene.masks, start=1):
            pool.owners[index][mask] = owner
        pool.boxes_xyxy[index, : len(scene.shapes)] = scene.boxes_xyxy
        pool.centers_xy[index, : len(scene.shapes)] = [shape.center_xy for shape in scene.shapes]
        pool.looks[index, : len(scene.shapes)] = [
            [list(SIZES).index(shape.size), list(COLORS).index(shape.color), KINDS.index(shape.kind)]
            for shape in scene.shapes
        ]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.savez(file, **{field.name: getattr(pool, field.name) for field in fields(pool)})
        unfinished.replace(path)
    return pool
