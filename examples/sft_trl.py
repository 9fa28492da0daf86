# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Stage 2 with LoRA on TRL's `SFTTrainer`, for those who train with TRL: pip install "mask-llava-hf[trl]".

    accelerate launch examples/sft_trl.py --checkpoint projector --data llava_v1_5_mix665k.json \
        --image_folder images --object_store objects --object_dropout 0 20 --output_dir finetuned

TRL's own collator would also learn to write image tokens, and drops columns with objects; so it gets ours.
"""

import os
from dataclasses import dataclass
from typing import Any

import recipe
from datasets import Dataset
from finetune_lora import AdapterArguments, merge
from trl import SFTConfig, SFTTrainer

from mask_llava_hf import MaskLlavaCollator, MaskLlavaForConditionalGeneration, MaskLlavaProcessor


@dataclass
class TrlArguments(AdapterArguments, SFTConfig):
    """LLaVA-1.5's published settings where TRL has others; adapter and projector share one rate.

    The batch is for the command line to set: LLaVA's has 128 samples, over all devices and accumulation steps.
    """

    learning_rate: float = 2e-4
    num_train_epochs: float = 1.0
    warmup_steps: float = 0.03
    lr_scheduler_type: str = "cosine"
    max_length: int | None = 2048


def train(
    model: MaskLlavaForConditionalGeneration,
    processor: MaskLlavaProcessor,
    dataset: Dataset,
    args: TrlArguments,
    **collator_options: Any,
) -> SFTTrainer:
    """Wraps the model with an adapter and trains that; `trainer.model` is the `PeftModel`."""
    recipe.train_only(model)
    model.model.multi_modal_projector.float()
    collator = MaskLlavaCollator(processor, **{"seed": args.seed, **collator_options})
    return recipe.run(
        model, dataset, args, collator, SFTTrainer, processing_class=processor, peft_config=args.lora_config()
    )


def main() -> None:
    data, args = recipe.parse(__doc__, TrlArguments)
    model, processor, dataset = recipe.load(data, args)
    trainer = train(model, processor, dataset, args, max_length=args.max_length, **data.collator_options())
    adapter = os.path.join(args.output_dir, "adapter")
    recipe.save(trainer, adapter)
    if args.should_save:
        merge(data.checkpoint, adapter, processor, args.output_dir)


if __name__ == "__main__":
    main()
