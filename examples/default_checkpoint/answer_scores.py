# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""How many questions about held-out scenes a Mask-LLaVA answers rightly, and how many one does without looking."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes_world import QUESTION_KINDS, Question, ask, ask_many, chat, make_scene
from torch import nn

from mask_llava_hf import ImageObjects, MaskLlavaCollator, MaskLlavaProcessor, ObjectStore

from .world_conversations import marked_object


@dataclass(frozen=True)
class AskedPicture:
    """A question about a picture, with the objects that the model is shown."""

    picture: Path
    objects: ImageObjects
    question: Question


def ask_about(
    pictures: Sequence[Path], store: ObjectStore, split: str = "test", each: int = 1, first: int = 0
) -> list[AskedPicture]:
    """`each` questions of every kind about every picture, where the scene allows them.

    A question about a marked shape comes with that shape's object alone, as if the user had drawn a box; one whose
    shape was not found comes without any, and counts.

    Args:
        pictures: of the scenes first, first + 1, ... of the split.
    """
    asked = []
    for index, path in enumerate(pictures, start=first):
        scene, rng = make_scene(split, index), np.random.default_rng((index, 4))
        objects = store.get(path, with_masks=False)
        for kind in QUESTION_KINDS:
            for question in ask_many(scene, rng, each, [kind]):
                shown = objects
                if question.marked is not None:
                    shown = marked_object(objects, scene, question)
                    shown = objects[:0] if shown is None else shown
                asked.append(AskedPicture(path, shown, question))
    return asked


@torch.inference_mode()
def score_answers(
    model: nn.Module,
    processor: MaskLlavaProcessor,
    asked: Sequence[AskedPicture],
    *,
    max_object_tokens: int | None = None,
    patch_grid_size: int | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """The part of right answers per kind of question, and "mean" over the kinds.

    An answer is right if greedy decoding gives exactly it, which holds if every token of the right answer and the end
    token are the most probable after those before: one pass tells, without decoding.

    Args:
        max_object_tokens: most objects to show per picture; default: all.
        patch_grid_size: pools the patches to this grid; default: the model's.
    """
    if patch_grid_size is not None:
        settings = {**processor.object_settings, "patch_grid_size": patch_grid_size}
        processor = MaskLlavaProcessor(
            processor.image_processor, processor.tokenizer, settings, chat_template=processor.chat_template
        )
    collator = MaskLlavaCollator(processor, max_object_tokens=max_object_tokens)
    grid = {} if patch_grid_size is None else {"patch_grid_size": patch_grid_size}
    right, total = Counter(), Counter()
    by_length = sorted(asked, key=lambda entry: len(entry.objects))  # little padding
    for start in range(0, len(by_length), batch_size):
        entries = by_length[start : start + batch_size]
        batch = collator([_sample(entry) for entry in entries])
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch, **grid, use_cache=False).logits[:, :-1].argmax(-1)
        for entry, good in zip(entries, ((predicted == labels) | (labels < 0)).all(1).tolist(), strict=True):
            right[entry.question.kind] += good
            total[entry.question.kind] += 1
    return _with_mean({kind: right[kind] / total[kind] for kind in QUESTION_KINDS if total[kind]})


def prior_scores(asked: Sequence[AskedPicture], num_scenes: int = 3000) -> dict[str, float]:
    """What one scores who never looks, but knows for every question the answer that is most often right.

    Args:
        num_scenes: of the training split, from whose questions that is learned.
    """
    by_text: dict[str, Counter[str]] = {}
    by_kind: dict[str, Counter[str]] = {}
    for index in range(num_scenes):
        scene, rng = make_scene("train", index), np.random.default_rng((index, 5))
        for kind in QUESTION_KINDS:
            question = ask(scene, kind, rng)
            if question is not None:
                by_text.setdefault(question.text, Counter())[question.answer] += 1
                by_kind.setdefault(kind, Counter())[question.answer] += 1
    right, total = Counter(), Counter()
    for entry in asked:
        question = entry.question
        guess = by_text.get(question.text, by_kind[question.kind]).most_common(1)[0][0]
        right[question.kind] += guess == question.answer
        total[question.kind] += 1
    return _with_mean({kind: right[kind] / total[kind] for kind in QUESTION_KINDS if total[kind]})


def _sample(entry: AskedPicture) -> dict[str, Any]:
    question = entry.question
    return {
        "images": [str(entry.picture)],
        "messages": chat((question.text, question.answer)),
        "objects": [entry.objects],
    }


def _with_mean(scores: dict[str, float]) -> dict[str, float]:
    return {**scores, "mean": sum(scores.values()) / len(scores)}
