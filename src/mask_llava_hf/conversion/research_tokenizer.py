# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A fast tokenizer that reads prompts with images as LLaVA's research code does with the slow Llama tokenizer.

The research code cuts a prompt at every `<image>` and gives each piece to the tokenizer by itself, which puts a blank
before it. So there is a blank behind an image, where a fast tokenizer that knows `<image>` as one of its tokens has
none, and the text behind an image would become other ids than the model was trained with. Here the normalizer puts the
blank there.

The slow tokenizer meant is `LlamaTokenizer` of Transformers 4.37, which the research code pins. Its setting `legacy`
decides whether the blank also comes behind other special tokens (`True`) or only at the start of a piece (`False`).
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .sentencepiece_model import SentencePieceModel, read_sentencepiece_model
from .source_files import read_json


IMAGE_TOKEN = "<image>"
SLOW_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# Inside our checkpoint: what the way back to the research code needs, and Transformers would only stumble over.
SLOW_TOKENIZER_FOLDER = "research_tokenizer"

_BLANK = "▁"
_NAMED_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}

# The ways in which text meets images in LLaVA's prompts
_PROMPT_SHAPES = {
    "image, line break, text": "USER: <image>\nWhat is this? ASSISTANT:",
    "image, word": "<image>a cup",
    "image between blanks": "look at <image> and describe it.",
    "images on two lines": "<image>\n<image>\nHow many?",
    "images side by side": "USER: <image><image>\nHow many?",
    "second turn": "USER: <image>\nHi ASSISTANT: Yes.</s>USER: Why? ASSISTANT:",
}


@dataclass(frozen=True)
class LoadedTokenizer:
    """A source's tokenizer, ready for our processor.

    Attributes:
        tokenizer: pads on the left; `<image>` is one of its special tokens.
        num_source_ids: one more than the highest id of the source's own tokens.
        notes: what was assumed where its files say nothing.
        slow_tokenizer: the folder whose `tokenizer.model` it was made from; None: it was made from a `tokenizer.json`.
    """

    tokenizer: PreTrainedTokenizerFast
    num_source_ids: int
    notes: tuple[str, ...]
    slow_tokenizer: Path | None

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @property
    def num_ids(self) -> int:
        """One more than the highest id of any token."""
        return max(self.tokenizer.get_vocab().values()) + 1


def load_source_tokenizer(
    folder: Path, new_tokens: Iterable[str] = (), model_max_length: int | None = None
) -> LoadedTokenizer:
    """The tokenizer in a checkpoint: its `tokenizer.model` or, where there is none, its `tokenizer.json`.

    Args:
        folder: of the checkpoint.
        new_tokens: special tokens that the research code adds when it loads the checkpoint, such as `<im_start>`.
        model_max_length: in tokens, where the tokenizer's own files give none.

    Raises:
        ValueError: neither file, one that is not complete, or a tokenizer that this form cannot express.
    """
    settings = read_json(folder / "tokenizer_config.json")
    has_slow_tokenizer = (folder / "tokenizer.model").is_file()
    # Where the normalizer puts a blank behind images, they are looked for in its output
    puts_blanks = has_slow_tokenizer and not _is_legacy(settings)
    image_token = AddedToken(IMAGE_TOKEN, special=True, normalized=puts_blanks)
    if has_slow_tokenizer:
        named = _named_tokens(settings, folder)
        backend = _backend_of_slow_tokenizer(folder, settings, named, image_token)
        notes = []
        if settings.get("legacy") is None:
            notes.append("tokenizer: `legacy`=True, as the research code's version takes it where it is not said")
    elif (folder / "tokenizer.json").is_file():
        backend = _backend_from_file(folder / "tokenizer.json")
        named = {name: token for name, token in _named_tokens(settings, folder).items() if _has(backend, token)}
        notes = ["tokenizer: from `tokenizer.json`, as there is no `tokenizer.model`"]
    else:
        raise ValueError(
            f"`{folder.name}` has neither `tokenizer.model` nor `tokenizer.json`, so no prompt could be read. Copy the "
            "tokenizer files of its language model there."
        )
    backend.add_special_tokens([_plain_token(token) for token in new_tokens if not _has(backend, token)])
    num_source_ids = 1 + max(id for token, id in backend.get_vocab(True).items() if token != IMAGE_TOKEN)
    if backend.post_processor is None:
        backend.post_processor = _start_and_end(backend, settings, named)
    backend.add_special_tokens([image_token])

    if named.get("pad_token") is None:
        named["pad_token"] = named.get("unk_token") or named.get("eos_token")
        notes.append(f"pad token: {named['pad_token']}, as the checkpoint names none")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in named.items() if token is not None},
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **_length_limit(settings.get("model_max_length"), model_max_length),
    )
    return LoadedTokenizer(tokenizer, num_source_ids, tuple(notes), folder if has_slow_tokenizer else None)


def copy_slow_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a slow tokenizer into a folder that is there, those of them that are in the source."""
    for name in SLOW_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def boundary_mismatches(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The shapes of prompts that get other ids whole than cut at `<image>`, as the research code cuts them."""
    image, bos = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.bos_token_id
    differing = []
    for shape, prompt in _PROMPT_SHAPES.items():
        first, *others = [tokenizer(piece).input_ids for piece in prompt.split(IMAGE_TOKEN)]
        expected = list(first)
        for ids in others:
            expected += [image, *(ids[1:] if ids[:1] == [bos] else ids)]
        if tokenizer(prompt).input_ids != expected:
            differing.append(shape)
    return differing


# --------------------------------------------------------------------------------------------------- tokenizer.model
def _backend_of_slow_tokenizer(
    folder: Path, settings: Mapping[str, Any], named: Mapping[str, str | None], image_token: AddedToken
) -> Tokenizer:
    model = read_sentencepiece_model(folder / "tokenizer.model")
    _check_expressible(model)
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(model, vocabulary),
            unk_token=next((piece.text for piece in model.pieces if piece.kind == "unknown"), None),
            fuse_unk=True,
            byte_fallback=any(piece.kind == "byte" for piece in model.pieces),
        )
    )
    is_legacy = _is_legacy(settings)
    blank_first = model.add_dummy_prefix or not is_legacy
    _set_blanks(backend, is_legacy, blank_first)
    strip = [decoders.Strip(" ", 1, 0)] if blank_first else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for id, token in sorted(_added_tokens(settings, folder).items()):
        token = image_token if token.content == IMAGE_TOKEN else token
        known, size = backend.token_to_id(token.content), backend.get_vocab_size()
        if id != (size if known is None else known):
            right = f"the next one after the {size} before it" if known is None else f"{known}, which it has already"
            raise ValueError(
                f"The tokenizer's files give {token.content!r} the id {id}, which is not {right}: the model would read "
                "it as another token. Were `tokenizer.model` and `added_tokens.json` or `tokenizer_config.json` taken "
                "from different checkpoints?"
            )
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    backend.add_special_tokens([_plain_token(token) for token in named.values() if token is not None])
    return backend


def _is_legacy(settings: Mapping[str, Any]) -> bool:
    return settings.get("legacy") is not False  # as Transformers 4.37 takes it where nothing is said


def _check_expressible(model: SentencePieceModel) -> None:
    problems = {
        f"is a {model.model_type} model, not BPE": model.model_type != "bpe",
        "rewrites characters before it looks for pieces": model.rewrites_text,
        "removes extra blanks": model.remove_extra_whitespaces,
        "has pieces defined by its user": any(piece.kind == "user_defined" for piece in model.pieces),
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ValueError(
            f"`tokenizer.model` {' and '.join(found)}, unlike Llama's, and would not be reproduced exactly. Convert it "
            "to a `tokenizer.json` (for example with Transformers' AutoTokenizer), put that beside it, and remove "
            "`tokenizer.model`."
        )


def _merges(model: SentencePieceModel, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that are joined, best first: SentencePiece joins to the piece with the highest score."""
    ranked = []
    for index, piece in enumerate(model.pieces):
        if piece.kind != "normal":
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-piece.score, index, vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def _set_blanks(backend: Tokenizer, is_legacy: bool, blank_first: bool) -> None:
    """Where blanks are put that the text does not have."""
    to_blank = normalizers.Replace(" ", _BLANK)
    if is_legacy:
        # A normalizer gets each stretch between special tokens by itself
        prefix = [normalizers.Prepend(_BLANK)] if blank_first else []
        backend.normalizer = normalizers.Sequence([*prefix, to_blank])
        return
    # Special tokens other than `<image>` are found before normalization, and end a stretch
    behind_image = Regex(rf"(?<={IMAGE_TOKEN})(?!{IMAGE_TOKEN}|\z)")
    backend.normalizer = normalizers.Sequence([normalizers.Replace(behind_image, _BLANK), to_blank])
    # The first stretch of a text gets a blank even where it begins with one. Metaspace would then leave it out, so it
    # looks for the kind of blank that the normalizer leaves none of; the second turns that into the usual one.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(_BLANK, prepend_scheme="never", split=False),
        ]
    )


# ---------------------------------------------------------------------------------------------------- tokenizer.json
def _backend_from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # what the tokenizers library raises is a bare Exception
        raise ValueError(
            f"`{path.name}` cannot be read ({error}); without it no prompt can be tokenized. Download it again."
        ) from error


# ---------------------------------------------------------------------------------------------------- what both need
def _start_and_end(
    backend: Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str | None]
) -> processors.TemplateProcessing:
    start = named.get("bos_token") if settings.get("add_bos_token", True) else None
    end = named.get("eos_token") if settings.get("add_eos_token", False) else None
    parts = [token for token in (start, "$A", end) if token is not None]
    pair = [part.replace("$A", "$B") for part in parts]
    special = [(token, backend.token_to_id(token)) for token in (start, end) if token is not None]
    return processors.TemplateProcessing(single=parts, pair=[*parts, *pair], special_tokens=special)


def _named_tokens(settings: Mapping[str, Any], folder: Path) -> dict[str, str | None]:
    """Start, end, unknown and padding token. Files without a list of added tokens leave the say to the older file."""
    files = (
        [settings] if "added_tokens_decoder" in settings else [read_json(folder / "special_tokens_map.json"), settings]
    )
    named = dict(_NAMED_TOKENS)
    for name in named:
        said = next((file[name] for file in files if file.get(name) is not None), named[name])
        named[name] = said["content"] if isinstance(said, Mapping) else said
    return named


def _added_tokens(settings: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    if "added_tokens_decoder" in settings:
        return {
            int(id): AddedToken(
                said["content"],
                single_word=said.get("single_word", False),
                lstrip=said.get("lstrip", False),
                rstrip=said.get("rstrip", False),
                normalized=False,
                special=said.get("special", False),
            )
            for id, said in settings["added_tokens_decoder"].items()
        }
    special = read_json(folder / "special_tokens_map.json").get("additional_special_tokens", [])
    names = {said["content"] if isinstance(said, Mapping) else said for said in special}
    older = read_json(folder / "added_tokens.json")
    return {id: AddedToken(token, normalized=False, special=token in names) for token, id in older.items()}


def _plain_token(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _has(backend: Tokenizer, token: str | None) -> bool:
    return token is not None and backend.token_to_id(token) is not None


def _length_limit(own: Any, other: int | None) -> dict[str, int]:
    # Absent limits are saved as 10^30
    limit = next((limit for limit in (own, other) if isinstance(limit, int) and 0 < limit < 10**9), None)
    return {} if limit is None else {"model_max_length": limit}
