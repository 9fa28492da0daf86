# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What the training recipes beside this file share: their arguments, how a model is trained, and how it is saved."""

import os
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from mask_llava_hf import MaskLlavaCollator, MaskLlavaProcessor, ObjectStore, load_conversations


@dataclass
class DataArguments:
    """What is trained, and on what."""

    checkpoint: str = field(metadata={"help": "Mask-LLaVA checkpoint to start from: a folder or a Hub id"})
    data: str = field(
        metadata={
            "help": "LLaVA's JSON file, or a dataset with `messages` and `images`: a folder, a Parquet file or a Hub id"
        }
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "what paths of images start from; default: the folder of the JSON file"}
    )
    split: str = field(default="train", metadata={"help": "split of the dataset"})
    object_store: str | None = field(
        default=None,
        metadata={"help": "objects of all images, made by `mask-llava precompute`; needed with data-loader workers"},
    )
    object_dropout: list[int] | None = field(
        default=None,
        metadata={"help": "LOW HIGH: a random number of objects per image and epoch; default: all there are"},
    )
    max_object_tokens: int | None = field(
        default=None, metadata={"help": "at most so many objects per image, 0 for none; default: the checkpoint's"}
    )

    def __post_init__(self):
        if self.object_dropout is not None and len(self.object_dropout) != 2:
            raise ValueError(f"--object_dropout takes two numbers, LOW HIGH, but got {self.object_dropout}.")

    def collator_options(self) -> dict[str, Any]:
        """As keyword arguments of `MaskLlavaCollator`."""
        return {
            "object_store": None if self.object_store is None else ObjectStore.open(self.object_store),
            "object_dropout": None if self.object_dropout is None else tuple(self.object_dropout),
            "max_object_tokens": self.max_object_tokens,
        }


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what all of LLaVA-1.5's trainings have in common."""

    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "samples per step over all devices; sets `gradient_accumulation_steps` to what is missing"},
    )
    max_length: int = field(default=2048, metadata={"help": "most tokens of a sample; what is longer loses its end"})
    num_train_epochs: float = 1.0
    warmup_steps: float = field(default=0.03, metadata={"help": "number of steps, or below 1 a part of all steps"})
    lr_scheduler_type: str = "cosine"
    bf16: bool | None = field(
        default=None, metadata={"help": "True or False: mixed precision; default: where there is a GPU that has it"}
    )
    dataloader_num_workers: int = 4
    save_total_limit: int | None = 1
    logging_steps: float = 10
    # Every trained weight gets a gradient from every batch, also from one without images
    ddp_find_unused_parameters: bool | None = False
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": 'a checkpoint folder of an earlier run, or "last": the newest in --output_dir, if any'},
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        if self.global_batch_size is not None:
            at_once = self.train_batch_size * self.world_size
            if self.global_batch_size % at_once:
                raise ValueError(
                    f"--global_batch_size {self.global_batch_size} is no multiple of the {at_once} samples that "
                    f"{self.world_size} process(es) take at once. Change --per_device_train_batch_size "
                    f"({self.per_device_train_batch_size})."
                )
            self.gradient_accumulation_steps = self.global_batch_size // at_once


def parse(description: str, training_arguments: type[TrainingArguments]) -> tuple[DataArguments, Any]:
    """Reads the command line."""
    parser = HfArgumentParser((DataArguments, training_arguments), description=description, formatter_class=_Help)
    return parser.parse_args_into_dataclasses()


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the commands in the description as they are."""


def load(data: DataArguments, args: TrainingArguments) -> tuple[PreTrainedModel, MaskLlavaProcessor, Dataset]:
    """Model, processor and conversations that the command line names."""
    model = AutoModelForImageTextToText.from_pretrained(data.checkpoint, dtype="auto")
    processor = AutoProcessor.from_pretrained(data.checkpoint)
    with args.main_process_first(desc="reading the conversations"):  # the others find them in the cache
        dataset = load_conversations(data.data, image_folder=data.image_folder, split=data.split)
    return model, processor, dataset


def train_only(model: nn.Module, *modules: nn.Module) -> None:
    """Freezes all of a model but some modules, which go to float32: in 16 bits small updates round to nothing."""
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True).float()


def run(
    model: nn.Module,
    dataset: Dataset,
    args: TrainingArguments,
    collator: MaskLlavaCollator,
    trainer_class: type[Trainer] = Trainer,
    **trainer_options: Any,
) -> Trainer:
    """Trains what is not frozen, from the start or from an earlier run's checkpoint."""
    by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if by_length and args.length_column_name not in dataset.column_names:
        lengths = dataset.map(_count_characters, input_columns="messages", remove_columns=dataset.column_names)
        dataset = dataset.add_column(args.length_column_name, lengths["length"])
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        model.float()  # FSDP shards weights of one dtype; its mixed precision computes in 16 bits all the same
    args.remove_unused_columns = False  # the collator decides which columns are needed
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[collator.epoch_callback()],
        **trainer_options,
    )
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    # `Trainer` does this in the outer config only, and every step would copy all keys and values into a cache
    model.config.get_text_config().use_cache = False
    trainer.train(resume_from_checkpoint=resume)
    model.config.use_cache = model.config.get_text_config().use_cache = True
    return trainer


def _count_characters(messages: list[dict[str, Any]]) -> dict[str, int]:
    return {"length": sum(len(block["text"] or "") for message in messages for block in message["content"])}


def save(trainer: Trainer, folder: str, processor: MaskLlavaProcessor | None = None) -> None:
    """Saves what `from_pretrained` loads: the model or adapter, and the processor with its detector and segmenter.

    Under DDP and FSDP all processes have to call it. Weights of a model that were trained in float32 go back to the
    dtype of those that were not; an adapter stays as it is.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.should_save:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not isinstance(model, PeftModel):
            state = {name: weight.to(model.dtype) for name, weight in state.items()}
        model.save_pretrained(folder, state_dict=state)
        if processor is not None:
            processor.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
