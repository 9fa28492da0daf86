# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations about images, from LLaVA's JSON files or from `datasets`, in one form: `messages` and `images`."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


_MARKER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_OBJECT_COLUMNS = ("objects", "boxes", "masks")

# LLaVA's instruction file is a single list of 1 GB, which as one Python value takes 6 GB.
_CHUNK_CHARACTERS = 1 << 22
_MAX_ROW_CHARACTERS = 1 << 26
# Part of the key under which `datasets` keeps converted files: a change of what rows become must change it.
_LAYOUT_VERSION = 1


def load_conversations(
    source: Any, *, image_folder: str | os.PathLike | None = None, split: str = "train"
) -> "Dataset":
    """Reads conversations to train on, from any of the forms in which they are published.

    * A JSON file in the layout of LLaVA (`blip_laion_cc_sbu_558k.json`, `llava_v1_5_mix665k.json`; a list or one row a
      line): `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}`.
      `image` may be missing or a list. A JSON file of rows with `messages` and `images` is read as well.
    * A dataset with `messages` and `images` (or `image`), or with LLaVA's columns: a `Dataset`, a `DatasetDict`, a
      folder, a Parquet file, or a name on the Hub.

    A file is read once, row by row, and kept in the cache of `datasets`; a changed file is read anew.

    Args:
        source: what to read, see above.
        image_folder: what relative paths of images start from; default: the folder of the JSON file.
        split: of a dataset with several; a JSON file has "train" only.

    Returns:
        A `datasets.Dataset` with the columns

        * `messages`: a list of `{"role": "user" | "assistant" | "system", "content": [block, ...]}`, where a block is
          `{"type": "image", "text": None}` or `{"type": "text", "text": "..."}`;
        * `images`: a list with one entry per image block, in order; paths (`str`), or pictures where the source holds
          pictures;
        * `id`, and of a dataset `objects`, `boxes` and `masks`, where the source has them.

    Raises:
        ValueError: no such file or split, a file that is not JSON or ends early, an image file that is missing, an
            unknown speaker, or a row whose `<image>` markers are not as many as its images. The message names the row.
    """
    import datasets

    if isinstance(source, datasets.DatasetDict):
        source = _split_of(source, split, "The dataset")
    if isinstance(source, datasets.Dataset):
        return _unified(source, image_folder)
    path = Path(os.path.expanduser(os.fspath(source)))
    if path.is_file() and path.suffix != ".parquet":
        return _read_json(path, image_folder, split)
    if path.suffix in (".json", ".jsonl") and not path.exists():
        raise ValueError(f"There is no file {str(path)!r} to read conversations from.")
    return _unified(named_dataset(str(path) if path.exists() else os.fspath(source), split), image_folder)


def named_dataset(source: str, split: str) -> "Dataset":
    """One split of the dataset that a folder or a Parquet file holds, or that has this name on the Hub.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: no such split.
    """
    import datasets

    path = Path(source)
    if is_saved_dataset(path):
        loaded = datasets.load_from_disk(source)
        return _split_of(loaded, split, repr(source)) if isinstance(loaded, datasets.DatasetDict) else loaded
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=source, split=split)
    return datasets.load_dataset(source, split=split)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it, which `datasets.load_dataset` refuses."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _split_of(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise ValueError(f"{name} has the splits {sorted(splits)}, but `split` is {split!r}.")
    return splits[split]


# ---------------------------------------------------------------------------------------------------------- JSON files
def _read_json(path: Path, image_folder: str | os.PathLike | None, split: str) -> "Dataset":
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    if split != "train":
        raise ValueError(f"{str(path)!r} is one JSON file and has no splits, but `split` is {split!r}.")
    folder = path.parent if image_folder is None else Path(image_folder)
    if not folder.is_dir():
        raise ValueError(f"`image_folder` is {str(folder)!r}, but there is no such folder to take images from.")
    arguments = {"path": os.path.abspath(path), "image_folder": os.path.abspath(folder)}
    state = path.stat()
    key = json.dumps([_LAYOUT_VERSION, arguments, state.st_size, state.st_mtime_ns])
    try:
        return Dataset.from_generator(
            _json_conversations,
            gen_kwargs=arguments,
            features=_features(),
            fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # what is wrong with the row, not that something is
        raise


def _json_conversations(path: str, image_folder: str) -> Iterator[dict[str, Any]]:
    locate = _image_locator(image_folder)
    for index, row in enumerate(json_rows(path)):
        lost = [name for name in _OBJECT_COLUMNS if isinstance(row, Mapping) and row.get(name) is not None]
        if lost:
            raise ValueError(
                f"Row {index} of {path!r} has `{lost[0]}`, which would be lost: from a JSON file only text and images "
                f'are read. Load it with `datasets.load_dataset("json", data_files={path!r})` and pass the dataset.'
            )
        yield _converted(row, index, locate)


def json_rows(path: str) -> Iterator[Any]:
    """The rows of a JSON list, or of a file with one JSON value a line, without holding more than a few in memory."""
    decoder, content = json.JSONDecoder(), re.compile(r"[^\s,]")

    def next_content(text: str, position: int) -> int:
        found = content.search(text, position)
        return found.start() if found else len(text)

    with open(path, encoding="utf-8-sig") as file:
        text = file.read(_CHUNK_CHARACTERS)
        position = next_content(text, 0)
        is_list = text.startswith("[", position)
        position += is_list
        while True:
            position = next_content(text, position)
            if is_list and text.startswith("]", position):
                return
            try:
                row, position = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK_CHARACTERS) if len(text) - position < _MAX_ROW_CHARACTERS else ""
                if more:  # the row goes on
                    text, position = text[position:] + more, 0
                elif position == len(text) and not is_list:
                    return
                else:
                    raise ValueError(
                        f"{path!r} is no list of JSON rows, and not one JSON row a line either, or it ends early: "
                        f"{error.msg} near {text[position : position + 60]!r}. Was it downloaded completely?"
                    ) from error
            else:
                yield row


# -------------------------------------------------------------------------------------------------------------- rows
def _converted(row: Any, index: int, locate: Callable[[str], str]) -> dict[str, Any]:
    """One row of a file or dataset in the form that `load_conversations` promises."""
    try:
        if not isinstance(row, Mapping):
            raise ValueError(f"is a {type(row).__name__}, expected an object with `conversations` or `messages`.")
        if row.get("conversations") is not None:
            messages = [_message_of_turn(turn) for turn in _objects_in(row, "conversations")]
        elif row.get("messages") is not None:
            messages = [_message(message) for message in _objects_in(row, "messages")]
        else:
            raise ValueError(
                f"has neither `conversations` nor `messages` but {sorted(row)}; expected LLaVA's layout or messages."
            )
        images = row.get("images") if row.get("images") is not None else row.get("image")
        images = [image for image in (images if isinstance(images, list) else [images]) if image not in (None, "")]
        images = [locate(image) if isinstance(image, str) else image for image in images]
        num_blocks = sum(block["type"] == "image" for message in messages for block in message["content"])
        if num_blocks != len(images):
            raise ValueError(
                f"has {num_blocks} `{_MARKER}` marker(s) or image block(s) but {len(images)} image(s), so that text "
                "and images would not belong together. Each image needs one marker in the text of a user."
            )
    except ValueError as error:
        name = f" (id {row['id']!r})" if isinstance(row, Mapping) and row.get("id") is not None else ""
        raise ValueError(f"Row {index}{name} {error}") from error
    number = row.get("id")
    return {"messages": messages, "images": images, "id": None if number is None else str(number)}


def _objects_in(holder: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The list of JSON objects under a name."""
    entries = holder[name]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"has {str(entries)[:100]} as `{name}`, expected a list of objects.")
    return entries


def _message_of_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in _ROLES:
        raise ValueError(f"has a turn from {speaker!r}, expected one of {sorted(_ROLES)}.")
    if not isinstance(value, str):
        raise ValueError(f"has a turn from {speaker!r} whose `value` is {value!r}, expected text.")
    return {"role": _ROLES[speaker], "content": _blocks(value)}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise ValueError(f"has a message of role {role!r}, expected one of {sorted(set(_ROLES.values()))}.")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": _blocks(content)}
    blocks = []
    for block in _objects_in(message, "content") if content else ():
        said = {name: value for name, value in block.items() if value is not None}
        if said.get("type") == "text" and set(said) == {"type", "text"}:
            blocks.append(said)
        elif said == {"type": "image"}:
            blocks.append({"type": "image", "text": None})
        else:
            raise ValueError(
                f"has a block with {sorted(said)} of type {said.get('type')!r}, expected "
                '{"type": "text", "text": ...} or {"type": "image"}; images stand in the column `images`.'
            )
    return {"role": _ROLES[role], "content": blocks}


def _blocks(text: str) -> list[dict[str, str | None]]:
    """A turn's text and images in their order; blanks around markers, such as LLaVA's line break, belong to neither."""
    if _MARKER not in text:
        return [{"type": "text", "text": text}]
    blocks: list[dict[str, str | None]] = []
    for number, part in enumerate(text.split(_MARKER)):
        if number:
            blocks.append({"type": "image", "text": None})
        if part.strip():
            blocks.append({"type": "text", "text": part.strip()})
    return blocks


def _image_locator(folder: str | os.PathLike | None) -> Callable[[str], str]:
    """Gives an image's path from `folder` on, after a check that the file is there.

    Folders are listed once, as asking for each of a million files takes minutes on a network drive.
    """
    listed: dict[str, set[str]] = {}

    def locate(image: str) -> str:
        if "://" in image:
            return image
        path = image if folder is None else os.path.join(folder, image)
        parent, name = os.path.split(path)
        if parent not in listed:
            listed[parent] = set(os.listdir(parent or ".")) if os.path.isdir(parent or ".") else set()
        if name not in listed[parent]:
            raise ValueError(
                f"names the image {image!r}, but there is no file {path!r}. Give the folder that its path starts from "
                "as `image_folder`, or download what is missing."
            )
        return path

    return locate


# ---------------------------------------------------------------------------------------------------------- datasets
def _features(image: Any = None, **others: Any) -> Any:
    from datasets import Features, List, Value

    text = Value("string")
    return Features(
        {
            "messages": List({"role": text, "content": List({"type": text, "text": text})}),
            "images": List(text if image is None else image),
            "id": text,
            **others,
        }
    )


def _unified(dataset: "Dataset", image_folder: str | os.PathLike | None) -> "Dataset":
    """A dataset with the promised columns: as it is where it has them, else converted by `datasets`, which caches."""
    from datasets import Image, List

    names = set(dataset.column_names)
    if not names & {"messages", "conversations"}:
        raise ValueError(
            f"The dataset has the columns {sorted(names)}, expected `messages` and `images`, or LLaVA's "
            "`conversations` and `image`. Rename its columns (`dataset.rename_column`)."
        )
    column = next((name for name in ("images", "image") if name in names), None)
    feature = dataset.features[column] if column else None
    feature = feature.feature if isinstance(feature, List) else feature
    holds_pictures = isinstance(feature, Image)
    kept = [name for name in ("id", *_OBJECT_COLUMNS) if name in names]
    if {"messages", "images"} <= names and (holds_pictures or image_folder is None) and _has_blocks(dataset):
        return dataset.select_columns(["messages", "images", *kept])
    if holds_pictures:  # or each picture would be decoded and encoded again
        raw = List(Image(decode=False)) if column == "images" else Image(decode=False)
        dataset = dataset.cast_column(column, raw)
    locate = _image_locator(image_folder)
    features = _features(feature if holds_pictures else None)
    if "id" not in names:
        features.pop("id")
    features.update({name: dataset.features[name] for name in kept if name != "id"})

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        converted = _converted(row, index, locate)
        return {name: converted[name] for name in converted if name in features}

    dropped = [name for name in dataset.column_names if name not in features]
    return dataset.map(convert, with_indices=True, features=features, remove_columns=dropped)


def _has_blocks(dataset: "Dataset") -> bool:
    """Whether the messages of a dataset are lists of blocks already, rather than plain text."""
    if len(dataset) == 0:
        return True
    messages = dataset.select_columns(["messages"])[0]["messages"]
    return all(isinstance(message.get("content"), list) for message in messages)
