# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations about the pictures of the small world, for both stages of Mask-LLaVA's training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shapes_world import CAPTION_PROMPT, Question, Scene, ask, ask_many, chat, describe, make_scene
from torch.utils.data import Dataset
from torchvision.ops import box_iou
from tqdm import tqdm

from mask_llava_hf import ImageObjects, ObjectStore

from .scene_pool import scene_pool


def save_pictures(folder: Path, split: str, count: int, cache_dir: str | Path | None = None) -> list[Path]:
    """Writes the first pictures of a split as PNG files; those that are there already stay."""
    paths = [folder / split / f"{index:06d}.png" for index in range(count)]
    if not all(path.exists() for path in paths):
        (folder / split).mkdir(parents=True, exist_ok=True)
        pool = scene_pool(split, count, cache_dir)
        for path, image in zip(paths, tqdm(pool.images, desc=f"saving {split} pictures"), strict=True):
            unfinished = path.with_suffix(".tmp")
            Image.fromarray(image).save(unfinished, format="PNG")
            unfinished.replace(path)
    return paths


class Captions(Dataset):
    """One request to describe each picture, and the description."""

    def __init__(self, pictures: Sequence[Path], store: ObjectStore, split: str = "train") -> None:
        self.pictures = pictures
        self.scenes, self.objects = _scenes_and_objects(pictures, store, split)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        messages = chat((CAPTION_PROMPT, describe(self.scenes[index])))
        picture = str(self.pictures[index])
        return {"id": index, "images": [picture], "messages": messages, "objects": [self.objects[index]]}


class Conversations(Dataset):
    """Several conversations about each picture, with other questions in each.

    One in six is about a marked shape, which is then the only object; one in six asks for a description.

    Args:
        pictures: of the first scenes of the split.
        store: has their objects.
        rounds: conversations about each picture.
        questions: in each.
    """

    def __init__(
        self,
        pictures: Sequence[Path],
        store: ObjectStore,
        split: str = "train",
        rounds: int = 4,
        questions: int = 8,
    ) -> None:
        self.pictures, self.rounds, self.questions = pictures, rounds, questions
        self.scenes, self.objects = _scenes_and_objects(pictures, store, split)

    def __len__(self) -> int:
        return len(self.pictures) * self.rounds

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((index, 3))
        picture = index % len(self.pictures)
        scene, objects = self.scenes[picture], self.objects[picture]
        turns = [(asked.text, asked.answer) for asked in ask_many(scene, rng, self.questions)]
        chance = rng.integers(6)
        if chance == 0:
            asked = ask(scene, "marked", rng)
            marked = marked_object(objects, scene, asked)
            if marked is not None:
                objects, turns = marked, [(asked.text, asked.answer)]
        elif chance == 1:
            turns = [(CAPTION_PROMPT, describe(scene))]
        picture = str(self.pictures[picture])
        return {"id": index, "images": [picture], "messages": chat(*turns), "objects": [objects]}


def _scenes_and_objects(
    pictures: Sequence[Path], store: ObjectStore, split: str
) -> tuple[list[Scene], list[ImageObjects]]:
    """In memory, where a training looks them up in no time."""
    scenes = [make_scene(split, index) for index in range(len(pictures))]
    return scenes, [store.get(path, with_masks=False) for path in tqdm(pictures, desc="reading objects")]


def marked_object(objects: ImageObjects, scene: Scene, asked: Question | None) -> ImageObjects | None:
    """The stored object that a question marks; None where none overlaps the shape's box by half."""
    if asked is None or asked.marked is None or not len(objects):
        return None
    overlap = box_iou(objects.boxes_xyxy, torch.from_numpy(scene.boxes_xyxy[asked.marked : asked.marked + 1]))[:, 0]
    return objects[overlap.argmax()[None]] if overlap.max() >= 0.5 else None
