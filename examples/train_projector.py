# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Stage 1 of LLaVA-1.5: teaches the projector, and nothing else, to speak to the language model, on image captions.

    mask-llava precompute blip_laion_cc_sbu_558k.json objects --image-folder images --checkpoint START
    accelerate launch examples/train_projector.py --checkpoint START --data blip_laion_cc_sbu_558k.json \
        --image_folder images --object_store objects --object_dropout 0 20 --output_dir projector

START is a Mask-LLaVA checkpoint with a pretrained vision tower and language model.
"""

from dataclasses import dataclass
from typing import Any

import recipe
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from mask_llava_hf import MaskLlavaCollator, MaskLlavaForConditionalGeneration, MaskLlavaProcessor


# LLaVA's "plain" format: the image, its caption, a line break, and nothing of a chat. Instructions of this stage
# ("Describe the image briefly.") are left out, because a projector could learn to stand for them. Stage 2 brings chats.
CAPTION_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string or messages | length != 2 %}"
    "{{ raise_exception('a caption needs a user message with the image, and one answer; chats are for stage 2') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{% for block in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% else %}"
    "{% set text = message['content'] | map(attribute='text') | join(' ') %}"
    "{% generation %}{{ text + '\\n' }}{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
)


@dataclass
class ProjectorArguments(recipe.LlavaTrainingArguments):
    """LLaVA-1.5's published settings of stage 1."""

    learning_rate: float = 1e-3
    per_device_train_batch_size: int = 32
    global_batch_size: int | None = 256


def train(
    model: MaskLlavaForConditionalGeneration,
    processor: MaskLlavaProcessor,
    dataset: Dataset,
    args: TrainingArguments,
    **collator_options: Any,
) -> Trainer:
    """Trains the projector in place.

    Args:
        dataset: with `messages` (a user's image, the caption) and `images`, as `load_conversations` gives it.
        collator_options: of `MaskLlavaCollator`, such as `object_store` and `object_dropout`.
    """
    recipe.train_only(model, model.model.multi_modal_projector)
    collator = MaskLlavaCollator(
        processor, **{"chat_template": CAPTION_TEMPLATE, "seed": args.seed, **collator_options}
    )
    return recipe.run(model, dataset, args, collator)


def main() -> None:
    data, args = recipe.parse(__doc__, ProjectorArguments)
    model, processor, dataset = recipe.load(data, args)
    trainer = train(model, processor, dataset, args, max_length=args.max_length, **data.collator_options())
    recipe.save(trainer, args.output_dir, processor)


if __name__ == "__main__":
    main()
