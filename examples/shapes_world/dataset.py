# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The small world as a dataset of `datasets`, in the form that the training recipes read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from mask_llava_hf import ImageObjects

from .language import CAPTION_PROMPT, Question, ask_many, describe
from .scenes import make_scene


_BLOCK = {"type": Value("string"), "text": Value("string")}
_FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": List(_BLOCK)}),
        "boxes": List(List(List(Value("float32"), length=4))),
        "masks": List(List({"size": List(Value("int32")), "counts": Value("string")})),
        "names": List(Value("string")),
        "caption": Value("string"),
        "questions": List(
            {"kind": Value("string"), "text": Value("string"), "answer": Value("string"), "marked": Value("int32")}
        ),
    }
)


def load_shapes_world(
    split: str = "train",
    num_scenes: int = 1000,
    *,
    task: str = "questions",
    questions_per_scene: int = 8,
    first: int = 0,
    num_shapes: tuple[int, int] = (2, 9),
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Scenes with what is in them, and a conversation about each.

    Args:
        split: "train", "validation" or "test"; scenes of different splits share no seed.
        num_scenes: a thousand take about ten seconds, once; `datasets` keeps them.
        task: what the conversation is: "captions", a request to describe the picture and the description; or
            "questions", `questions_per_scene` questions of all kinds but "marked", and their answers.
        first: index of the first scene.
        num_shapes: least and largest number of shapes in a scene.
        streaming: draws scenes when they are read.

    Returns:
        Columns `id`; `images` (one picture, 96 x 96) and `messages`, which the recipes train on; and of the one image
        `boxes` (one list of (x1, y1, x2, y2) in pixels), `masks` (one list of COCO RLE), `names` ("small red circle"),
        `caption`, and `questions` with `kind`, `text`, `answer` and, for a question about a marked shape, its index.

    The column names `boxes` and `masks` are those of the processor's arguments: a dataset that keeps them makes a
    recipe use these exact objects instead of detected ones.
    """
    if task not in ("captions", "questions"):
        raise ValueError(f'`task` must be "captions" or "questions", got {task!r}.')
    arguments = {
        "split": split,
        "indices": list(range(first, first + num_scenes)),
        "task": task,
        "questions_per_scene": questions_per_scene,
        "num_shapes": num_shapes,
    }
    if streaming:
        return IterableDataset.from_generator(_rows, features=_FEATURES, gen_kwargs=arguments)
    return Dataset.from_generator(_rows, features=_FEATURES, gen_kwargs=arguments)


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    """A conversation about one picture, as `messages`, from its questions and answers."""
    messages = []
    for index, (question, answer) in enumerate(turns):
        image = [] if index else [{"type": "image", "text": None}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def questions_of(split: str, index: int, count: int, num_shapes: tuple[int, int] = (2, 9)) -> list[Question]:
    """The questions that the dataset asks about a scene."""
    return ask_many(make_scene(split, index, num_shapes), np.random.default_rng((index, count, 2)), count)


def _rows(
    split: str, indices: list[int], task: str, questions_per_scene: int, num_shapes: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    for index in indices:
        scene = make_scene(split, index, num_shapes)
        caption = describe(scene)
        questions = questions_of(split, index, questions_per_scene, num_shapes)
        turns = (
            [(CAPTION_PROMPT, caption)] if task == "captions" else [(asked.text, asked.answer) for asked in questions]
        )
        objects = ImageObjects.from_masks(torch.from_numpy(scene.masks), (scene.masks.shape[1], scene.masks.shape[2]))
        yield {
            "id": f"{split}-{index}",
            "images": [scene.draw()],
            "messages": chat(*turns),
            "boxes": [scene.boxes_xyxy.tolist()],
            "masks": [objects.to_dict()["masks"]],
            "names": [shape.name for shape in scene.shapes],
            "caption": caption,
            "questions": [vars(asked) for asked in questions],
        }
