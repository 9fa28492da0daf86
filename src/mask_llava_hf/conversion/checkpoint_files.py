# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads the weights of a checkpoint without loading them: names and shapes now, numbers when they are asked for.

Files are mapped into memory, so that what is read stays in the system's page cache and costs no memory of the process.
Pickles are read with `weights_only=True`: nothing in them is run.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


# Preferred first, as by Transformers.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHARD = re.compile(r"^(?:model|pytorch_model)-(\d+)-of-(\d+)\.(?:safetensors|bin)$")

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

# Names in an error message; the rest is a count.
_MOST_NAMES = 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is needed, and not kept.

    Attributes:
        name: in its file; for messages.
        file: name of the file; for messages.
        load: gives the tensor; it may lie on a mapped file, so it is not to be written to.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None):
        """The same tensor after `function`, which may change its shape to `shape`."""
        return replace(self, load=lambda: function(self.load()), shape=self.shape if shape is None else shape)


def list_names(names: Any) -> str:
    """At most twenty names, then how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model in one of the usual files."""
    return any((folder / name).is_file() for name in _WEIGHT_FILES) or any(
        _SHARD.match(path.name) for path in folder.iterdir()
    )


def open_checkpoint(folder: Path) -> dict[str, LazyTensor]:
    """All weights of a folder: safetensors where it has them, else `.bin`; one file, or shards with or without index.

    Raises:
        ValueError: no weights, a missing shard, names twice, or what `open_weights` raises.
    """
    files, promised = _files_of(folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"`{folder.name}` lacks {len(missing)} of its {len(files)} weight files: {list_names(missing)}. Without "
            "them layers would stay random. Download them and convert again."
        )
    tensors: dict[str, LazyTensor] = {}
    for name in files:
        opened = open_weights(folder / name)
        twice = set(opened) & set(tensors)
        if twice:
            raise ValueError(
                f"`{folder.name}` has {len(twice)} weights in two of its files ({list_names(twice)}), and which counts "
                "is not said. Are these shards of two checkpoints in one folder? Keep one."
            )
        tensors.update(opened)
    absent = set(promised) - set(tensors)
    if absent:
        raise ValueError(
            f"The index of `{folder.name}` lists {len(absent)} weights that its files do not have: "
            f"{list_names(absent)}. The files are of another checkpoint than the index; download it again."
        )
    return tensors


def _files_of(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the weight files, and of the weights that an index promises."""
    for name in _WEIGHT_FILES:
        path = folder / name
        if path.is_file() and name.endswith(".json"):
            try:
                weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"`{name}` in `{folder.name}` is no index of weights ({error!r}), expected a JSON object with the "
                    "file of every weight as `weight_map`. Fetch it again."
                ) from error
            return sorted(set(weight_map.values())), list(weight_map)
        if path.is_file():
            return [name], []
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.match(path.name))
    if not shards:
        raise ValueError(
            f"`{folder.name}` has no weights; expected one of {', '.join(_WEIGHT_FILES)}. Download them and convert "
            "again."
        )
    # Without an index the names of the shards still tell how many there are
    first = _SHARD.match(shards[0])
    assert first is not None
    total = int(first[2])
    place = slice(first.start(1), first.end(1))
    width = place.stop - place.start
    names = [shards[0][: place.start] + f"{i:0{width}}" + shards[0][place.stop :] for i in range(1, total + 1)]
    return names, []


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file or pickle.

    Raises:
        ValueError: a file that is not complete, not what its name says, holds more than tensors, or is quantised.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"`{path.name}` is a Git LFS pointer, not the weights themselves. Fetch them with `git lfs pull`."
        )
    tensors = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path, start)
    quantised = [name for name, tensor in tensors.items() if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool]
    if quantised:
        first = tensors[min(quantised)]
        raise ValueError(
            f"`{path.name}` holds {len(quantised)} tensors of 8 bits (such as {first.name}, {first.dtype}): it is "
            "quantised, and its full weights cannot be had exactly. Convert the checkpoint it was made from; the "
            "result can be quantised when it is loaded."
        )
    return tensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(path, framework="pt")
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 - a safetensors file is no mapping
            part = handle.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"`{path.name}` has {name} in the dtype {part.get_dtype()}, expected one of "
                    f"{', '.join(_SAFETENSORS_DTYPES)}. Save it in one of these, and convert again."
                )
            shape = tuple(part.get_shape())
            tensors[name] = LazyTensor(name, path.name, shape, dtype, partial(handle.get_tensor, name))
        return tensors
    except SafetensorError as error:
        raise ValueError(
            f"`{path.name}` ({os.path.getsize(path)} bytes) is no complete safetensors file ({error}). Its download or "
            "copy was probably cut short: fetch it again."
        ) from error


def _open_pickle(path: Path, start: bytes) -> dict[str, LazyTensor]:
    is_zip = zipfile.is_zipfile(path)
    if start.startswith(b"PK") and not is_zip:
        raise _not_complete(path, "its table of contents, which stands at the end, is missing")
    if not is_zip and not start.startswith(b"\x80"):  # how pickles begin
        raise _not_complete(path, f"it is no file of PyTorch but begins with {start[:16]!r}")
    try:
        # Files from before PyTorch 1.6 are no archives and cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{path.name}` holds more than tensors ({_reason(error)}), and loading it would run code from the file. "
            "Nothing of it was run. If, and only if, you trust where it comes from, keep its tensors alone and convert "
            f"again: `w = torch.load({path.name!r}, weights_only=False); torch.save({{k: v for k, v in w.items() if "
            f"torch.is_tensor(v)}}, {path.name!r})`."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise _not_complete(path, str(error).splitlines()[0] if str(error) else "it ends early") from error
    if isinstance(loaded, Mapping) and set(loaded) == {"state_dict"}:
        loaded = loaded["state_dict"]
    others = (
        [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
        if isinstance(loaded, Mapping)
        else [type(loaded).__name__]
    )
    if others:
        raise ValueError(
            f"`{path.name}` is no flat table of weights; beside tensors it holds {list_names(map(str, others))}. Save "
            "the model's `state_dict()` alone."
        )
    return {
        name: LazyTensor(name, path.name, tuple(tensor.shape), tensor.dtype, tensor.detach)
        for name, tensor in loaded.items()
    }


def _not_complete(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`{path.name}` ({os.path.getsize(path)} bytes) cannot be read: {reason}. Its download or copy was probably "
        "cut short: fetch it again."
    )


def _reason(error: Exception) -> str:
    """What the file wanted to run, out of PyTorch's long message."""
    found = re.search(r"(?:Unsupported global: GLOBAL|GLOBAL) (\S+)", str(error))
    return f"it asks for {found[1]}" if found else str(error).splitlines()[0]
