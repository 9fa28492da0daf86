# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of the checkpoint inside the package, written from the scores of its stages."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [mask-llava, synthetic]
---

# Mask-LLaVA, the small one

A Mask-LLaVA (arXiv 2602.04864) of {million:.1f} million weights with its own detector and segmenter, trained on a CPU,
so that everything in the package `mask_llava_hf` can be tried without a network. It knows one thing: 96 x 96 pictures
of two to nine coloured shapes (`examples/shapes_world/`), and English of some hundred words about them.

## What it cannot do

Anything else. On a photograph its answers mean nothing. It says nothing about how a Mask-LLaVA of 7 billion weights
behaves. Its answers are often wrong even in its own world; the tables tell how often.

## How it was made

`python examples/train_default_checkpoint.py`, seed 0, on 2 CPU cores, with torch {torch} and transformers
{transformers}. Weights are stored in float16, to which they were rounded, and run in float32.

{parts}

Objects are those of the real chain: detector, SAM, MaskInversion. Other work ran on the machine at the same time, so
that the minutes are upper bounds.

## Scores, on scenes of other seeds

Detector: recall {detector[recall]:.3f} of boxes at IoU 0.5 with at most 20 boxes. Segmenter:
mean IoU {mask_iou:.3f} with the visible pixels, prompted by true boxes, {mask_iou_detected:.3f}
by detected ones.

What linear probes read about a shape, by where they read it:

{probes}

Position is not in the embeddings of MaskInversion: object tokens tell what, and hardly where. MaskInversion's learning
rate, {rate}, is the one with the lowest dice loss after 10 iterations among those whose probes come within 0.02 of the
best:

{rates}

Answers to single questions, exactly right: with all tokens (1 + 36 + up to 20), with 5 object tokens or fewer, and
with none; "without looking" is who knows for every question the answer that is most often right:

{answers}

A "marked" question comes with the one object that a box of the user stands for.
"""


_PARTS = {
    "tower": (
        "vision tower",
        "CLIP, 12 x 12 patches of 8 x 8, width 128, 4 layers",
        "captions with hard negatives, as CLIP; each patch also names the shape it shows",
    ),
    "detector": ("detector", "RT-DETR, class-agnostic", "boxes"),
    "segmenter": ("segmenter", "SAM, prompted by boxes", "masks"),
    "language": ("language model", "Llama, width 160, 4 layers", "scenes told in words, and questions about them"),
    "projector": ("projector", "two layers", "captions; all else frozen"),
    "finetuned": ("projector and language model", "", "questions and answers; the tower frozen"),
}


def write_card(work_dir: Path, answers: dict[str, dict[str, float]], masks: dict[str, float], output_dir: Path) -> None:
    """Writes `README.md` into the checkpoint's folder.

    Args:
        work_dir: with a folder for each stage.
        answers: columns of a table, each with the part of right answers for each kind of question.
        masks: "mask_iou" and "mask_iou_detected" of the segmenter.
    """
    stages = {
        name: json.loads((work_dir / folder / "scores.json").read_text())
        for name, folder in {
            "tower": "vision_tower",
            "detector": "detector",
            "segmenter": "segmenter",
            "language": "language_model",
            "projector": "projector",
            "finetuned": "finetuned",
        }.items()
    }
    probes = json.loads((work_dir / "vision_tower" / "probes.json").read_text())
    text = _CARD.format(
        **stages,
        **masks,
        million=(stages["tower"]["parameters"] + stages["language"]["parameters"]) / 1e6,
        parts=_table(
            ["part", "what it is", "trained on", "weights", "minutes"],
            [
                [*_PARTS[name], scores.get("parameters", ""), round(scores["minutes"])]
                for name, scores in stages.items()
            ],
        ),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        rate=probes["chosen_learning_rate"],
        probes=_table(["", "size", "color", "kind", "place"], _probe_rows(probes)),
        rates=_table(
            ["learning rate", "dice at start", "dice after", "probes"],
            [
                [row["learning_rate"], row["dice_at_start"], row["dice"], row["accuracy"]]
                for row in probes["learning_rates"]
            ],
        ),
        answers=_table(
            ["question", *answers],
            [[kind, *(scores[kind] for scores in answers.values())] for kind in answers["right"]],
        ),
    )
    (output_dir / "README.md").write_text(text)


def _probe_rows(probes: dict[str, Any]) -> list[list[Any]]:
    names = {"chance": "chance", "cls": "CLS", "mask_inversion": "MaskInversion", "mask_pooling": "mask pooling"}
    return [
        [title, *(probes["accuracy"][source][field] for field in ("size", "color", "kind", "place"))]
        for source, title in names.items()
    ]


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"

    return "\n".join(
        [line(heads), line(["---" if isinstance(cell, str) else "--:" for cell in rows[0]]), *map(line, rows)]
    )
