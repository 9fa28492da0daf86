"""Where a processor's heavy parts come from, and one cache for all that are loaded.

Parts (detector, segmenter, vision tower) are models. They are not kept on the processor, which is saved as JSON,
printed, copied and sent to other processes, but here: once per source, revision, device and dtype, shared by all
processors of the process.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download


@dataclass(frozen=True)
class PartSource:
    """A Hub repository at a revision, or a local path (then without revision)."""

    location: str
    revision: str | None = None


_parts: dict[tuple[str, PartSource, torch.device, torch.dtype | None], Any] = {}
_parts_lock = threading.RLock()


def is_relative(setting: str | None) -> bool:
    """Whether a part lies inside the checkpoint and moves with it."""
    return setting is not None and setting.startswith("./")


def is_local(setting: str | None) -> bool:
    """Whether a part is a path outside the checkpoint, which exists on this machine only."""
    return setting is not None and not is_relative(setting) and (os.path.isabs(setting) or os.path.exists(setting))


def resolve_source(setting: str, checkpoint: PartSource | None) -> PartSource:
    """The place that a saved setting names.

    Args:
        setting: a Hub id, optionally `id@revision`; a path; or `./folder`, inside the checkpoint.
        checkpoint: where the processor itself was loaded from, if it was.

    Raises:
        ValueError: a relative part of a processor that was not loaded from anywhere, or one that is not there.
    """
    if not is_relative(setting):
        if is_local(setting):
            return PartSource(setting)
        location, _, revision = setting.partition("@")
        return PartSource(location, revision or None)
    if checkpoint is None:
        raise ValueError(
            f"The part {setting!r} lies inside the processor's checkpoint, but this processor was built in memory. "
            "Load it with `from_pretrained(folder)`, or give the part as a path or Hub id."
        )
    root = checkpoint.location
    if not os.path.isdir(root):
        root = snapshot_download(root, revision=checkpoint.revision, allow_patterns=f"{setting[2:]}*")
    path = Path(root, setting)
    if not path.exists():
        raise ValueError(
            f"The checkpoint {checkpoint.location!r} has no {setting!r}, which its processor needs. Save the part "
            "there, or name another source in `object_settings`."
        )
    return PartSource(str(path))


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
    source = Path(resolve_source(setting, checkpoint).location)
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


def default_device() -> torch.device:
    """The process's current accelerator, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None else torch.device("cpu")


def load_part(
    kind: str,
    source: PartSource,
    device: torch.device,
    dtype: torch.dtype | None,
    load: Callable[..., Any],
    **options: Any,
) -> Any:
    """The part from the cache, or `load(location, revision=, device=, dtype=, **options)`; safe from several threads.

    Raises:
        RuntimeError: in a data-loader worker, where each worker would hold its own copy of every part (and a forked
            process cannot use CUDA).
    """
    if torch.utils.data.get_worker_info() is not None:
        raise RuntimeError(
            f"The {kind} was asked for inside a data-loader worker; every worker would load its own copy. Make the "
            "objects beforehand (`mask_llava_hf.precompute`, or `processor.find_objects`) and pass them as "
            "`objects=`, or call the processor with `max_object_tokens=0`."
        )
    key = (kind, source, device, dtype)
    with _parts_lock:
        if key not in _parts:
            _parts[key] = load(source.location, revision=source.revision, device=device, dtype=dtype, **options)
        return _parts[key]


def loaded_part(kind: str, source: PartSource, device: torch.device, dtype: torch.dtype | None) -> Any | None:
    """The part if it is loaded; nothing is loaded."""
    return _parts.get((kind, source, device, dtype))


def unload_parts(kind: str, source: PartSource) -> None:
    """Forgets a part on every device and in every dtype; whoever needs it again loads it again."""
    with _parts_lock:
        for key in [key for key in _parts if key[:2] == (kind, source)]:
            del _parts[key]
