# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Chat templates of LLaVA-1.5, with `generation` spans around what a model is trained to say."""

VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def vicuna_v1(system_prompt: str | None = VICUNA_SYSTEM_PROMPT, image: str = "<image>") -> str:
    """Vicuna v1 as LLaVA-1.5 uses it: a turn's images come before its text, each on a line of its own.

    The blank before an answer belongs to it, since tokenizers join it to the first word and the generation prompt ends
    before it; so does the end token, so that a model finetuned on the `generation` spans learns to stop.

    Args:
        system_prompt: for chats that begin without one; None: they stay without.
        image: what stands for an image, for example `<im_start><image><im_end>`.
    """
    default_system = (
        "{% if loop.first and message['role'] != 'system' %}{{ " + repr(system_prompt + " ") + " }}{% endif %}"
        if system_prompt is not None
        else ""
    )
    return (
        "{% for message in messages %}"
        + default_system
        + _TEXT_OF_MESSAGE
        + "{% if message['role'] == 'system' %}{{ text + ' ' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}"
        "{% else %}"
        "{{ message['role'].upper() + ': ' }}" + _images_of_message(image + "\\n") + "{{ text + ' ' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def plain(image: str = "<image>") -> str:
    """LLaVA's pretraining of the projector: the image, its caption and a line break, without roles.

    Args:
        image: what stands for an image.
    """
    return (
        "{% for message in messages %}" + _TEXT_OF_MESSAGE + "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ text + '\\n' }}{% endgeneration %}"
        "{% else %}" + _images_of_message(image) + "{{ text }}{% endif %}"
        "{% endfor %}"
    )


_TEXT_OF_MESSAGE = (
    "{% set content = message['content'] %}"
    "{% if content is string %}{% set text = content %}"
    "{% else %}{% set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
)


def _images_of_message(image: str) -> str:
    return (
        "{% if content is not string %}"
        "{% for block in content | selectattr('type', 'equalto', 'image') %}{{ '" + image + "' }}{% endfor %}"
        "{% endif %}"
    )


VICUNA_V1 = vicuna_v1()
PLAIN = plain()
