# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Stage 2 of LLaVA-1.5: finetunes projector and language model on conversations; the vision tower stays frozen.

    accelerate launch examples/finetune_full.py --checkpoint projector --data llava_v1_5_mix665k.json \
        --image_folder images --object_store objects --object_dropout 0 20 --output_dir finetuned

A language model of 7 billion weights needs several GPUs: give `accelerate launch` an FSDP or DeepSpeed config.
"""

from dataclasses import dataclass
from typing import Any

import recipe
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from mask_llava_hf import MaskLlavaCollator, MaskLlavaForConditionalGeneration, MaskLlavaProcessor


@dataclass
class FullArguments(recipe.LlavaTrainingArguments):
    """LLaVA-1.5's published settings of stage 2."""

    learning_rate: float = 2e-5
    per_device_train_batch_size: int = 16
    global_batch_size: int | None = 128


def train(
    model: MaskLlavaForConditionalGeneration,
    processor: MaskLlavaProcessor,
    dataset: Dataset,
    args: TrainingArguments,
    **collator_options: Any,
) -> Trainer:
    """Trains projector, language model and its head in place.

    Args:
        dataset: with `messages` and `images`, as `load_conversations` gives it; rows without images may be among them.
        collator_options: of `MaskLlavaCollator`, such as `object_store` and `object_dropout`.
    """
    recipe.train_only(model, model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    collator = MaskLlavaCollator(processor, **{"seed": args.seed, **collator_options})
    return recipe.run(model, dataset, args, collator)


def main() -> None:
    data, args = recipe.parse(__doc__, FullArguments)
    model, processor, dataset = recipe.load(data, args)
    trainer = train(model, processor, dataset, args, max_length=args.max_length, **data.collator_options())
    recipe.save(trainer, args.output_dir, processor)


if __name__ == "__main__":
    main()
