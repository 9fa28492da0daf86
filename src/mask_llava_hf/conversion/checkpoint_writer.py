# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Writes checkpoints tensor by tensor, and whole folders at once or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .checkpoint_files import LazyTensor


MAX_SHARD_BYTES = 5 * 10**9

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without an error.

    Args:
        target: the folder to make; folders above it are made too.
        overwrite: whether a checkpoint that is there may be replaced; until the end it stays as it is.

    Raises:
        ValueError: see `check_target`.
    """
    check_target(target, overwrite)
    target = target.resolve()  # of a link the folder it leads to is replaced, and the link stays
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        _move_over(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a target that must not be replaced.

    Raises:
        ValueError: it is there already and not to be replaced, or is no checkpoint.
    """
    if target.exists() and not overwrite:
        raise ValueError(
            f"`{target}` is there already. Name another target, or replace it with `overwrite=True` (`--overwrite`)."
        )
    if target.exists() and not (target / "config.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise ValueError(
            f"`{target}` is no checkpoint (it has no `config.json`), and replacing it would delete what is in it. Name "
            "another target."
        )


def check_places(sources: Sequence[str | os.PathLike[str] | None], target: Path) -> None:
    """Refuses a target that is, or holds, something it is made from.

    Raises:
        ValueError: replacing the target would delete a source.
    """
    for source in sources:
        if source is None or not os.path.exists(source):
            continue  # not given, or on the Hub
        path = Path(source).resolve()
        if target.resolve() in (path, *path.parents):
            raise ValueError(
                f"The target `{target}` is or holds `{source}`, which it is made from, and which would be deleted in "
                "the end. Name another target."
            )


def _move_over(folder: Path, target: Path) -> None:
    """Gives `folder` the name `target`; what had it before is deleted afterwards, or has it again after a failure."""
    if not target.exists():
        os.replace(folder, target)
        return
    before = folder.with_name(folder.name + "-before")
    os.replace(target, before)
    try:
        os.replace(folder, target)
    except BaseException:
        os.replace(before, target)
        raise
    shutil.rmtree(before)


def write_weights(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes `model.safetensors`, or shards with an index. One tensor at a time is in memory.

    Args:
        tensors: in the order in which they are written.
        dtype: of all; float32, float16 or bfloat16.
        max_shard_bytes: the most a file holds; a larger tensor has a file of its own.

    Raises:
        ValueError: another dtype, not enough room on the disk, or numbers that `dtype` cannot hold.
    """
    if dtype not in _SAFETENSORS_NAMES:
        raise ValueError(f"`dtype` is {dtype}, expected one of {', '.join(map(str, _SAFETENSORS_NAMES))}.")
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: prod(tensor.shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    total = split.metadata["total_size"]
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(
            f"The weights take {total / 1e9:.1f} GB, and the disk of the target has {free / 1e9:.1f} GB left. Make "
            "room, or name a target on another disk."
        )
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: tensors[name] for name in names}, dtype)
    written = [folder / file for file in split.filename_to_tensors]
    if split.is_sharded:
        parameters = sum(prod(tensor.shape) for tensor in tensors.values())
        metadata = {"total_parameters": parameters, "total_size": total}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.append(path)
    return written


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> None:
    """The safetensors format: length of the header (8 bytes), header (JSON), then the numbers of all tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(_bytes(_cast(tensor, dtype)))


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
    loaded = tensor.load()
    if loaded.dtype == dtype:
        return loaded
    cast = loaded.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(loaded.dtype).max and not cast.isfinite().all() and loaded.isfinite().all():
        raise ValueError(
            f"{tensor.name} in `{tensor.file}` has numbers up to {loaded.abs().max().item():.3g}, more than {dtype} "
            "can hold; they would become infinite. Convert with `--dtype bfloat16` or `--dtype float32`."
        )
    return cast


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
