# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Where a processor's parts come from, and one cache for all that are loaded.

Parts (detector, segmenter, vision tower) are models. They are not kept on the processor, which is saved as JSON,
printed, copied and sent to other processes, but here: once per place, device and dtype, shared by all processors of the
process, and loaded anew when their files have changed.
"""

import os
import posixpath
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download


# What a part is made of; other files in its folder, such as a tokenizer's, may change without it changing.
_PART_FILES = (
    "*.safetensors",
    "*.bin",
    "*.pth",
    "*.index.json",
    "config.json",
    "adapter_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class PartSource:
    """A Hub repository at a revision, or a local path (absolute, without revision)."""

    location: str
    revision: str | None = None

    @classmethod
    def of(cls, location: str, revision: str | None = None) -> "PartSource":
        """Local paths become absolute, so that they keep their meaning when the working directory changes."""
        return cls(os.path.realpath(location)) if os.path.exists(location) else cls(location, revision)

    @property
    def is_local(self) -> bool:
        return os.path.isabs(self.location)


_Key = tuple[str, PartSource, torch.device | None, torch.dtype | None]
_parts: dict[_Key, tuple[Any, Any]] = {}  # values: the state of the files, and the part
_parts_lock = threading.RLock()


def is_relative(setting: str | None) -> bool:
    """Whether a part lies inside the checkpoint and moves with it."""
    return setting is not None and setting.startswith("./")


def is_local(setting: str | None) -> bool:
    """Whether a part is a path outside the checkpoint, which exists on this machine only."""
    return setting is not None and not is_relative(setting) and (os.path.isabs(setting) or os.path.exists(setting))


def source_of(setting: str, checkpoint: PartSource | None) -> PartSource:
    """The place that a saved setting names, without a look at the network.

    Args:
        setting: a Hub id, optionally `id@revision`; a path; or `./folder`, inside the checkpoint.
        checkpoint: where the processor itself was loaded from, if it was. A relative part of a Hub checkpoint keeps
            its form `repository/./folder`, which `download` understands.

    Raises:
        ValueError: a relative part of a processor that was not loaded from anywhere.
    """
    if not is_relative(setting):
        if is_local(setting):
            return PartSource.of(setting)
        location, _, revision = setting.partition("@")
        return PartSource(location, revision or None)
    if checkpoint is None:
        raise ValueError(
            f"The part {setting!r} lies inside the processor's checkpoint, but this processor was built in memory. "
            "Load it with `from_pretrained(folder)`, or give the part as a path or Hub id."
        )
    if checkpoint.is_local:
        return PartSource(os.path.realpath(os.path.join(checkpoint.location, setting)))
    return PartSource(f"{checkpoint.location}/{setting}", checkpoint.revision)


def download(source: PartSource) -> PartSource:
    """The same source with a part inside a Hub repository brought to a local folder; others as they are.

    Raises:
        ValueError: the part is not there.
    """
    if not source.is_local:
        repository, inside, part = source.location.partition("/./")
        if not inside:
            return source
        part = posixpath.normpath(part)
        root = snapshot_download(repository, revision=source.revision, allow_patterns=[part, f"{part}/*"])
        source = PartSource(os.path.join(root, part))
    if not os.path.exists(source.location):
        raise ValueError(
            f"There is no {source.location!r}, which this processor's checkpoint needs. Save the part there, or name "
            "another source in `object_settings`."
        )
    return source


def copy_relative_part(setting: str, checkpoint: PartSource | None, target: str | os.PathLike) -> None:
    """Copies a relative part into another checkpoint folder, whole or not at all, in place of one that is there.

    Args:
        setting: `./folder` or `./file`.
        checkpoint: where the processor was loaded from. A processor built in memory has nothing to copy: its part must
            be in `target` already.
        target: the checkpoint folder that is being saved.
    """
    destination = Path(target, setting)
    if checkpoint is None and destination.exists():
        return
    source = Path(download(source_of(setting, checkpoint)).location)
    if destination.exists() and source.samefile(destination):
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        copy, old = Path(temporary, "copy"), Path(temporary, "old")
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            shutil.copyfile(source, copy)
        if destination.exists():
            os.replace(destination, old)
        os.replace(copy, destination)


def concrete_device(device: torch.device | str | None) -> torch.device:
    """One name per device: "cuda" and "cuda:0" are one place. None: the process's current accelerator, else the CPU."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator if accelerator is not None else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is None and torch.accelerator.is_available():
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device


def refuse_in_worker(kind: str) -> None:
    """Heavy parts belong to the main process.

    Raises:
        RuntimeError: in a data-loader worker, where each worker would hold its own copy of every part (and a forked
            process cannot use CUDA).
    """
    if torch.utils.data.get_worker_info() is not None:
        raise RuntimeError(
            f"The {kind.replace('_', ' ')} was asked for inside a data-loader worker; every worker would load its own "
            "copy. Make the objects beforehand (`mask-llava precompute`, or `processor.find_objects`) and pass them as "
            "`objects=`, or call the processor with `max_object_tokens=0`."
        )


def load_part(
    kind: str,
    source: PartSource,
    load: Callable[[PartSource], Any],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The part from the cache, or `load(source)`; safe from several threads. A change of local files is noticed."""
    key, state = (kind, source, device, dtype), _file_state(source)
    with _parts_lock:
        if key not in _parts or _parts[key][0] != state:
            _parts.pop(key, None)  # a part that has changed makes room first
            _parts[key] = (state, load(download(source)))
        return _parts[key][1]


def loaded_part(kind: str, source: PartSource, device: torch.device | None, dtype: torch.dtype | None) -> Any | None:
    """The part if it is loaded from files that have not changed since; nothing is loaded."""
    state, part = _parts.get((kind, source, device, dtype), (None, None))
    return part if state == _file_state(source) else None


def unload_parts() -> None:
    """Forgets all parts; whoever needs one again loads it again."""
    with _parts_lock:
        _parts.clear()


def _file_state(source: PartSource) -> tuple:
    """Names, sizes and times of a local part's files; empty for the Hub, whose revisions are not watched."""
    path = Path(source.location)
    if not source.is_local or not path.exists():
        return ()
    files = [path] if path.is_file() else {file for pattern in _PART_FILES for file in path.glob(pattern)}
    stats = [(file.name, file.stat()) for file in files]
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))
