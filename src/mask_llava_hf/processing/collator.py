# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""From conversations to batches for training: labels on answers only, stored objects, and a random number of them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from transformers.utils import logging

from ..modeling.token_layout import check_integer
from .chat_blocks import OBJECT_KEYS
from .given_objects import given_objects
from .image_inputs import upright_images
from .objects.image_objects import ImageObjects
from .processing_mask_llava import MaskLlavaProcessor


if TYPE_CHECKING:
    from transformers import TrainerCallback


logger = logging.get_logger(__name__)

# What the loss of every Transformers model passes over.
IGNORED_LABEL = -100

_GENERATION_SPAN = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ObjectSource(Protocol):
    """Anything that knows the objects of an image, such as an `ObjectStore`."""

    def get(self, image: Any) -> ImageObjects: ...


class MaskLlavaCollator:
    """Makes batches for `Trainer` (`data_collator=`) from conversations, as `load_conversations` gives them.

    A sample is a dict with

    * `messages`: a chat whose image blocks are `{"type": "image"}`;
    * `images`: one entry per image block, in order, in any form the processor takes; missing or empty for text only;
    * optional `objects`, `boxes` or `masks`: one entry per image, as in the processor's call;
    * optional `id`, for messages.

    The loss is on what the chat template marks as generated (`{% generation %}`), hence on answers with their end
    token; all else, padding and image placeholders included, is labelled -100. Objects are those of the sample, else
    those of `object_store`, else the processor finds them, which it refuses in a data-loader worker.

    `object_dropout=(low, high)` shows the model a random number of each image's objects, as training with a varying
    number teaches it to do with fewer (arXiv 2602.04864): a prefix in keep order, itself a good set, of a length drawn
    evenly from low ... high. The draw depends on `seed`, on the epoch and on the sample (its text and its objects), and
    on nothing else: not on the batch, the number of workers or processes, or on where a training was resumed. The epoch
    is what the collator cannot know; add `callbacks=[collator.epoch_callback()]` to the `Trainer`, or call `set_epoch`.

    Args:
        processor: its own state is not changed.
        max_length: the most tokens of a sample. What is longer is cut at its end, counted in the log; a sample whose
            images do not fit, or that has no answer left, is an error. Default: no limit.
        max_object_tokens: as in the processor's call; 0 leaves objects out.
        object_store: has `get(image) -> ImageObjects`; asked for images whose sample names no objects.
        object_dropout: (low, high), numbers of objects; None: all there are.
        seed: of the dropout.
        chat_template: a Jinja template, or the name of one of the processor's; default: the processor's own.
        pad_to_multiple_of: rounds the length of batches up, for hardware or compiled models that like it.

    Raises:
        ValueError: a template without generation spans, a tokenizer without a padding token, or a range that is none.
    """

    def __init__(
        self,
        processor: MaskLlavaProcessor,
        *,
        max_length: int | None = None,
        max_object_tokens: int | None = None,
        object_store: ObjectSource | None = None,
        object_dropout: tuple[int, int] | None = None,
        seed: int = 0,
        chat_template: str | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        if processor.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token, so samples of different length cannot share a batch. Set one: "
                "`processor.tokenizer.pad_token = processor.tokenizer.unk_token` (its positions are masked)."
            )
        template = processor._resolve_chat_template(chat_template)
        if not _GENERATION_SPAN.search(template):
            raise ValueError(
                "The chat template has no `{% generation %} ... {% endgeneration %}`, so nothing tells answers from "
                "questions and the model would learn to ask, too. Put the two around what the assistant says, its end "
                "token included, and set `processor.chat_template` or pass `chat_template`."
            )
        if max_length is not None:
            check_integer("max_length", max_length, 1)
        if object_dropout is not None:
            low, high = object_dropout
            check_integer("object_dropout[0]", low, 0)
            check_integer("object_dropout[1]", high, low)
        self.processor = processor
        self.max_length = max_length
        self.max_object_tokens = max_object_tokens
        self.object_store = object_store
        self.object_dropout = object_dropout
        self.seed = seed
        self.chat_template = template
        self.pad_to_multiple_of = pad_to_multiple_of
        # Shared memory, so that data-loader workers that outlive an epoch see the next one
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._num_cut = 0

    def set_epoch(self, epoch: int) -> None:
        """Tells which epoch begins, for the draws of `object_dropout`; workers that are already running see it."""
        self._epoch[0] = epoch

    def epoch_callback(self) -> "TrainerCallback":
        """A callback that lets a `Trainer` tell the epoch: `Trainer(..., callbacks=[collator.epoch_callback()])`."""
        from transformers import TrainerCallback  # seconds to import, which only training needs

        collator = self

        class TellEpoch(TrainerCallback):
            def on_epoch_begin(self, args, state, control, **kwargs):
                collator.set_epoch(int(state.epoch or 0))

        return TellEpoch()

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes a batch.

        Returns:
            `input_ids`, `attention_mask` and `labels` (B, L) int64, padded on the right; and where the batch has images
            the processor's `pixel_values`, `object_counts` and `object_embeds` or `object_masks`, one row per image.

        Raises:
            ValueError: a sample whose messages and images do not fit together, without an answer, or with images past
                `max_length`; the message names it.
            KeyError: an image that `object_store` does not know.
        """
        pictures = [self._pictures(sample, position) for position, sample in enumerate(samples)]
        objects = [
            entry
            for position, (sample, row) in enumerate(zip(samples, pictures, strict=True))
            for entry in self._objects(sample, row, position)
        ]
        encoded = self.processor.apply_chat_template(
            [sample["messages"] for sample in samples],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "images": pictures,
                "objects": objects or None,
                "max_object_tokens": self.max_object_tokens,
                "padding": False,
            },
        )
        ids, answers = encoded.pop("input_ids"), encoded.pop("assistant_masks")
        batch = self._padded(samples, ids, answers)
        return {**batch, **{name: encoded[name] for name in encoded if isinstance(encoded[name], torch.Tensor)}}

    # ------------------------------------------------------------------------------------------------ images, objects
    def _pictures(self, sample: Mapping[str, Any], position: int) -> list[Image.Image]:
        if "messages" not in sample:
            raise ValueError(
                f"{_name(sample, position)} has {sorted(sample)}, expected `messages` and `images`. If `Trainer` "
                "removed columns, set `remove_unused_columns=False`; to read other layouts, use `load_conversations`."
            )
        images = sample.get("images")
        images = [] if images is None else list(images)
        blocks = [block["type"] for message in sample["messages"] for block in _blocks(message)]
        if blocks.count("image") != len(images):
            raise ValueError(
                f"{_name(sample, position)} has {blocks.count('image')} image blocks in its `messages` but "
                f"{len(images)} `images`; each block stands for one image."
            )
        if any(self.processor.image_token in text for text in _texts(sample)):
            raise ValueError(
                f"{_name(sample, position)} has {self.processor.image_token!r} in its text, which would be read as one "
                "more image. Images are blocks of their own; take it out of the text."
            )
        try:
            return upright_images(images)
        except Exception as error:  # a broken file among a million: decoders raise whatever they like
            raise ValueError(f"{_name(sample, position)} has an image that cannot be read: {error}") from error

    def _objects(
        self, sample: Mapping[str, Any], pictures: list[Image.Image], position: int
    ) -> list[ImageObjects | None]:
        """Objects per picture, fewer by dropout; None: for the processor to find."""
        if not pictures or self.max_object_tokens == 0:
            return [None] * len(pictures)
        try:
            objects = given_objects(pictures, pictures, **{name: sample.get(name) for name in OBJECT_KEYS})
            if self.object_store is not None:
                objects = [
                    self.object_store.get(picture) if entry is None else entry
                    for entry, picture in zip(objects, pictures, strict=True)
                ]
        except (ValueError, KeyError) as error:
            raise type(error)(f"{_name(sample, position)}: {error.args[0]}") from error
        if self.object_dropout is None:
            return objects
        low, high = self.object_dropout
        missing = [index for index, entry in enumerate(objects) if entry is None]
        if missing and self.processor.object_settings["detector"] is not None:
            found = self.processor.find_objects([pictures[index] for index in missing], self.max_object_tokens)
            for index, made in zip(missing, found, strict=True):
                objects[index] = made
        for index, entry in enumerate(objects):
            if entry is not None:
                # A hash of all that the draw depends on, in place of a generator with a state
                digest = hashlib.blake2b("\n".join(_texts(sample)).encode(), digest_size=8)
                digest.update(f"{self.seed} {int(self._epoch)} {index}".encode())
                digest.update(entry.boxes_xyxy.numpy().tobytes())
                objects[index] = entry[: low + int.from_bytes(digest.digest(), "big") % (high - low + 1)]
        return objects

    # ------------------------------------------------------------------------------------------------ tokens, labels
    def _padded(
        self, samples: Sequence[Mapping[str, Any]], ids: list[list[int]], answers: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        for position, row in enumerate(ids):
            if self.max_length is not None and len(row) > self.max_length:
                self._check_cut(samples[position], position, row)
                del row[self.max_length :], answers[position][self.max_length :]
            if not any(answers[position]):
                raise ValueError(
                    f"{_name(samples[position], position)} has no token to learn from: the chat template marks none of "
                    f"its {len(row)} tokens as generated. It needs an answer by the assistant"
                    + (f", and one that begins before `max_length`={self.max_length}." if self.max_length else ".")
                )
        length = max(map(len, ids))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(ids), length)
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id)
        attention_mask, is_answer = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for position, row in enumerate(ids):
            input_ids[position, : len(row)] = torch.tensor(row)
            attention_mask[position, : len(row)] = 1
            is_answer[position, : len(row)] = torch.tensor(answers[position], dtype=torch.bool)
        labels = input_ids.masked_fill(~is_answer, IGNORED_LABEL)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _check_cut(self, sample: Mapping[str, Any], position: int, row: list[int]) -> None:
        lost = row[self.max_length :].count(self.processor.image_token_id)
        if lost:
            raise ValueError(
                f"{_name(sample, position)} has {len(row)} tokens, and {lost} of its image tokens lie past "
                f"`max_length`={self.max_length}: cut there, images and text would no longer fit together. Raise "
                "`max_length`, or show fewer objects (`max_object_tokens`)."
            )
        self._num_cut += 1
        if str(self._num_cut).strip("0") == "1":  # 1, 10, 100, ...
            logger.warning(
                f"{self._num_cut} sample(s) so far in this process had more than `max_length`={self.max_length} tokens "
                f"and lost their end; the last one was {_name(sample, position)} with {len(row)}."
            )


def _blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(sample: Mapping[str, Any]) -> list[str]:
    blocks = (block for message in sample["messages"] for block in _blocks(message))
    return [block["text"] for block in blocks if block["type"] == "text"]


def _name(sample: Mapping[str, Any], position: int) -> str:
    if sample.get("id") is not None:
        return f"Sample {sample['id']!r}"
    texts = _texts(sample) if "messages" in sample else []
    return f"Sample {position} of the batch" + (f" ({texts[0][:60]!r})" if texts else "")


__all__ = ["IGNORED_LABEL", "MaskLlavaCollator", "ObjectSource"]
