# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint's files are: a folder, or a repository on the Hub of which only what is needed is fetched."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from .checkpoint_files import list_names


_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*tokenizer.model",  # in a checkpoint of ours it lies in a folder
    "mm_projector.bin",
    "non_lora_trainables.bin",
    "adapter_model.*",
]


def local_folder(location: str | os.PathLike[str], role: str, mend: str) -> Path:
    """The folder of a checkpoint; one on the Hub (`id` or `id@revision`) is fetched.

    Of a repository that has its weights as safetensors and as pickles, only the former are fetched.

    Args:
        location: a path or an id.
        role: what it is, for the message: "source", "vision tower".
        mend: what the user can do instead, for the message.

    Raises:
        ValueError: neither a folder nor a repository that can be reached.
    """
    path = Path(location)
    if path.is_dir():
        return path.absolute()
    repository, _, revision = os.fspath(location).partition("@")
    if path.is_absolute() or repository.startswith(("./", "../", "~")):
        raise ValueError(f"The {role} `{location}` is no folder. {mend}")

    def fetch(weights: str) -> Path:
        # Without a connection this gives what was fetched before
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*_SMALL_FILES, weights]))

    try:
        has_safetensors = any(fetch("model*.safetensors").glob("*.safetensors*"))  # an index counts
        # A star goes across folders: into that of a vision tower, but not into another program's where all is pickles
        return fetch("*.safetensors" if has_safetensors else "pytorch_model*.bin")
    except (OSError, HFValidationError) as error:  # no connection, no such repository, no permission, no valid id
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"The {role} `{location}` is no folder here, and cannot be fetched from the Hub ({reason}). {mend}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's `config.json`.

    Raises:
        ValueError: none there, or one that is no JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = list_names(entry.name for entry in folder.iterdir()) or "nothing"
        raise ValueError(
            f"`{folder.name}` has no `config.json`, which says what its weights are; it has {found}. Name the "
            "folder of a checkpoint."
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        ValueError: not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path.name}` in `{path.parent.name}` is not JSON: {error}. Fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{path.name}` in `{path.parent.name}` holds {type(values).__name__}, expected an object.")
    return values
