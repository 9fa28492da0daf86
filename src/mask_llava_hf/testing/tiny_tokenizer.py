# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A small tokenizer trained in memory, and the chat template that goes with it."""

from collections.abc import Iterable
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..processing.chat_templates import vicuna_v1


CHAT_TEMPLATE = vicuna_v1(system_prompt=None)  # which would be half of a short prompt

_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


_TOKENIZER_TEXT = (
    "USER: What is in this picture? ASSISTANT: A woman in an orange suit stands before a flag.",
    "USER: How many cups are on the table? ASSISTANT: There are two cups, and a spoon lies beside one of them.",
    "USER: Describe the image in one sentence. ASSISTANT: The small dog is sitting on a red chair near the window.",
    "USER: Which object is left of the tree? ASSISTANT: To the left of the tree there is a yellow bicycle.",
    "USER: Is anybody wearing a hat? ASSISTANT: No, nobody in the photograph is wearing a hat.",
    "zero one two three four five six seven eight nine ten, 0 1 2 3 4 5 6 7 8 9",
)

_VOCABULARY_SIZE = 400


def tiny_tokenizer(
    texts: Iterable[str] = _TOKENIZER_TEXT, vocabulary_size: int = _VOCABULARY_SIZE
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained in memory, by default on a few sentences of our own.

    Special tokens are `<unk> <s> </s> <pad> <image>` with ids 0 to 4. Every text starts with `<s>`, shorter texts are
    padded on the left, `model_max_length` is 2048, and the chat template is `CHAT_TEMPLATE`. Any text can be written
    with it, since all bytes are tokens.

    Args:
        texts: to learn words from.
        vocabulary_size: most tokens there may be, with the special ones and the 256 bytes.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer(tuple(texts), vocabulary_size)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@cache
def _trained_tokenizer(texts: tuple[str, ...], vocabulary_size: int) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer.to_str()
