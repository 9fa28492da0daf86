# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads `tokenizer.model` files of SentencePiece, as far as a BPE tokenizer needs them, without that package.

The file is one protocol buffer message; its fields are listed in `sentencepiece_model.proto` of github.com/google/
sentencepiece.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


PieceKind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]

_KINDS: dict[int, PieceKind] = {
    1: "normal",
    2: "unknown",
    3: "control",
    4: "user_defined",
    5: "unused",
    6: "byte",
}
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_FIXED_WIDTHS = {1: 8, 5: 4}  # bytes, by wire type


@dataclass(frozen=True)
class SentencePiece:
    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says.

    Attributes:
        pieces: in the order of their ids.
        model_type: "unigram", "bpe", "word" or "char".
        add_dummy_prefix: whether a blank is put before every text.
        remove_extra_whitespaces: whether runs of blanks are collapsed.
        rewrites_text: whether characters are replaced beforehand, as by Unicode normalisation.
    """

    pieces: tuple[SentencePiece, ...]
    model_type: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    rewrites_text: bool


def read_sentencepiece_model(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Reads a file.

    Raises:
        ValueError: not a SentencePiece model, or one that ends early.
    """
    try:
        return _parse_model(Path(path).read_bytes())
    except (IndexError, KeyError, ValueError, struct.error, _WireError) as error:
        raise ValueError(
            f"`{Path(path).name}` is not a SentencePiece model, or not all of it ({Path(path).stat().st_size} bytes): "
            "the vocabulary cannot be read from it. Download it again (a file of some hundred bytes is a Git LFS "
            "pointer: `git lfs pull`)."
        ) from error


class _WireError(Exception):
    """The bytes are no protocol buffer message."""


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces: list[SentencePiece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise _WireError
        if number == 1:
            pieces.append(_parse_piece(dict(_fields(value))))  # type: ignore[arg-type]
        elif number == 2:
            trainer = dict(_fields(value))  # type: ignore[arg-type]
        elif number == 3:
            normalizer = dict(_fields(value))  # type: ignore[arg-type]
    if not pieces:
        raise _WireError
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_MODEL_TYPES[int(trainer.get(3, 1))],
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        rewrites_text=bool(normalizer.get(2, b"")),
    )


def _parse_piece(fields: dict[int, int | bytes]) -> SentencePiece:
    text, score = fields[1], fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise _WireError
    return SentencePiece(text.decode(), struct.unpack("<f", score)[0], _KINDS[int(fields.get(3, 1))])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: an integer, or the bytes of anything else."""
    position = 0
    while position < len(data):
        tag, position = _integer(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _integer(data, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _integer(data, position)
        elif wire_type in _FIXED_WIDTHS:
            length = _FIXED_WIDTHS[wire_type]
        else:
            raise _WireError
        if position + length > len(data):
            raise _WireError
        yield number, data[position : position + length]
        position += length


def _integer(data: bytes, position: int) -> tuple[int, int]:
    """A base-128 integer, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
