# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Stage 2 of LLaVA-1.5 with LoRA: low-rank updates of the language model, and the whole projector at a rate of its own.

    accelerate launch examples/finetune_lora.py --checkpoint projector --data llava_v1_5_mix665k.json \
        --image_folder images --object_store objects --object_dropout 0 20 --output_dir finetuned

The adapter is saved in OUTPUT_DIR/adapter, and the model with the adapter merged into it in OUTPUT_DIR.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import recipe
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Trainer

from mask_llava_hf import MaskLlavaCollator, MaskLlavaForConditionalGeneration, MaskLlavaProcessor


# All linear layers inside the language model, and none of the tower or the projector.
LANGUAGE_MODEL_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class AdapterArguments:
    """LLaVA-1.5's published settings of the adapter."""

    lora_r: int = field(default=128, metadata={"help": "rank of the updates"})
    lora_alpha: int = field(default=256, metadata={"help": "the updates are scaled by lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the input of the updates"})

    def lora_config(self) -> LoraConfig:
        """Updates of the language model, and the projector as a whole."""
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=LANGUAGE_MODEL_LAYERS,
            modules_to_save=["multi_modal_projector"],
            task_type="CAUSAL_LM",
        )


@dataclass
class LoraArguments(AdapterArguments, recipe.LlavaTrainingArguments):
    """LLaVA-1.5's published settings of stage 2 with LoRA."""

    learning_rate: float = 2e-4
    projector_learning_rate: float = field(default=2e-5, metadata={"help": "of the projector, which is trained whole"})
    per_device_train_batch_size: int = 16
    global_batch_size: int | None = 128


class TwoRatesTrainer(Trainer):
    """Trains the projector with `args.projector_learning_rate`."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        named = (model if model is not None else self.model).named_parameters()
        projector = {id(weight) for name, weight in named if "multi_modal_projector" in name}
        for group in list(optimizer.param_groups):
            weights = group["params"]
            group["params"] = [weight for weight in weights if id(weight) not in projector]
            own = [weight for weight in weights if id(weight) in projector]
            optimizer.add_param_group({**group, "params": own, "lr": self.args.projector_learning_rate})
        return optimizer


def train(
    model: MaskLlavaForConditionalGeneration,
    processor: MaskLlavaProcessor,
    dataset: Dataset,
    args: LoraArguments,
    **collator_options: Any,
) -> Trainer:
    """Wraps the model with an adapter and trains that; `trainer.model` is the `PeftModel`.

    Args:
        dataset: with `messages` and `images`, as `load_conversations` gives it; rows without images may be among them.
        collator_options: of `MaskLlavaCollator`, such as `object_store` and `object_dropout`.
    """
    recipe.train_only(model)
    model.model.multi_modal_projector.float()
    collator = MaskLlavaCollator(processor, **{"seed": args.seed, **collator_options})
    return recipe.run(get_peft_model(model, args.lora_config()), dataset, args, collator, TwoRatesTrainer)


def merge(checkpoint: str, adapter: str, processor: MaskLlavaProcessor, folder: str) -> None:
    """Saves the checkpoint an adapter was trained on with the adapter merged into it, in the checkpoint's dtype."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    data, args = recipe.parse(__doc__, LoraArguments)
    model, processor, dataset = recipe.load(data, args)
    trainer = train(model, processor, dataset, args, max_length=args.max_length, **data.collator_options())
    adapter = os.path.join(args.output_dir, "adapter")
    recipe.save(trainer, adapter)
    if args.should_save:
        merge(data.checkpoint, adapter, processor, args.output_dir)


if __name__ == "__main__":
    main()
