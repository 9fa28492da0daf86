# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The two stages of LLaVA on the small world, by the recipes that users have, with objects from a store."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finetune_full
import recipe
import train_projector
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mask_llava_hf import ObjectStore

from .cpu_attention import use_bfloat16_attention
from .world_conversations import Captions, Conversations


# For a model of two million weights; the published ones, the recipes' defaults, are for one of seven billion.
PROJECTOR = {"learning_rate": 2e-3, "per_device_train_batch_size": 32, "num_train_epochs": 1.0}
FINETUNE = {"learning_rate": 1.5e-3, "per_device_train_batch_size": 32, "num_train_epochs": 1.0}


def learn_captions(
    start: Path, output_dir: Path, pictures: Sequence[Path], store: ObjectStore, **options: Any
) -> dict[str, float]:
    """Stage 1: the projector alone, on one caption per picture. See `_train` for the options."""
    return _train(train_projector, {**PROJECTOR, **options}, start, output_dir, Captions(pictures, store))


def learn_answers(
    start: Path,
    output_dir: Path,
    pictures: Sequence[Path],
    store: ObjectStore,
    *,
    rounds: int,
    **options: Any,
) -> dict[str, float]:
    """Stage 2: projector and language model, on `rounds` conversations per picture. See `_train` for the options."""
    dataset = Conversations(pictures, store, rounds=rounds)
    return _train(finetune_full, {**FINETUNE, **options}, start, output_dir, dataset)


def _train(stage: Any, options: dict[str, Any], start: Path, output_dir: Path, dataset: Dataset) -> dict[str, float]:
    """Trains `start` and saves it to `output_dir`; killed and started again, it goes on.

    Args:
        stage: the recipe.
        options: `max_object_tokens` and `object_dropout` of the collator, all else of the recipe's `TrainingArguments`.
    """
    collator_options = {
        "max_object_tokens": options.pop("max_object_tokens", None),
        "object_dropout": options.pop("object_dropout", None),
    }
    arguments = stage.ProjectorArguments if stage is train_projector else stage.FullArguments
    args = arguments(
        output_dir=os.fspath(output_dir),
        resume_from_checkpoint="last",
        **{
            "global_batch_size": None,
            "use_cpu": True,
            "bf16": True,
            "dataloader_num_workers": 0,
            "warmup_steps": 0.05,
            "max_grad_norm": 1.0,
            "adam_beta2": 0.98,
            "logging_steps": min(50, max(1, len(dataset) // options["per_device_train_batch_size"])),
            "save_steps": 500,
            "report_to": "none",
            "disable_tqdm": not sys.stderr.isatty() and "TQDM_POSITION" not in os.environ,
            **options,
        },
    )
    model = AutoModelForImageTextToText.from_pretrained(start)
    processor = AutoProcessor.from_pretrained(start)
    _compute_in_bfloat16(model)
    trainer = stage.train(model, processor, dataset, args, **collator_options)
    recipe.save(trainer, args.output_dir, processor)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first_loss": losses[0], "last_loss": losses[-1], "steps": trainer.state.global_step}


def _compute_in_bfloat16(model: PreTrainedModel) -> None:
    use_bfloat16_attention(model.model.language_model)
    use_bfloat16_attention(model.model.vision_tower)
