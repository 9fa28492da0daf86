# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Makes the objects of a whole dataset once: images through detector, SAM and MaskInversion into an `ObjectStore`.

A walk can be killed at any point and started again: what is stored is not made again. Under `accelerate launch` several
processes share it. Images that cannot be read are reported and left out; anything else that goes wrong ends the walk.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object, parse_flag_from_env  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset, Value
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers.utils import logging

from .processing.conversations import is_saved_dataset, json_rows, named_dataset
from .processing.image_inputs import upright_images
from .processing.object_store import ObjectStore, ObjectWriter, image_key
from .processing.objects.image_objects import ImageObjects
from .processing.processing_mask_llava import MaskLlavaProcessor
from .whole_files import write_whole


logger = logging.get_logger(__name__)

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}

# At the end the processes wait for the slowest; a few minutes, as is usual, would end a walk of days with an error.
_PATIENCE = timedelta(days=7)

NamedImage = tuple[str, Any]


@dataclass
class PrecomputeReport:
    """What became of the images of a walk.

    Attributes:
        stored: images whose objects were made and stored.
        objects: how many objects these have.
        known: images whose objects were in the store before, or that occurred twice.
        skipped: name and reason of images that cannot be read, or that the models cannot take.
    """

    stored: int = 0
    objects: int = 0
    known: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __add__(self, other: "PrecomputeReport") -> "PrecomputeReport":
        return PrecomputeReport(
            self.stored + other.stored,
            self.objects + other.objects,
            self.known + other.known,
            self.skipped + other.skipped,
        )


@dataclass(frozen=True)
class _OpenedImage:
    """An image whose objects are to be made; without a picture, one whose objects are known or that has a problem."""

    name: str
    picture: Image.Image | None = None
    key: str = ""
    file_stamp: str | None = None
    problem: str | None = None


class PrecomputeWorker:
    """What one process does: finds the objects of images and stores those that the store lacks.

    `precompute_objects` calls one over all images; under other schedulers (Ray Data, Slurm arrays) several can fill one
    store at the same time, each in its own process.

    Args:
        processor: with a detector. Where it embeds objects itself (`mask_inversion="processor"`, the default), their
            embeddings are stored with the masks; otherwise masks alone.
        folder: of the store; is made where it is missing.
        max_object_tokens: at most this many objects per image; default: as saved in the processor.
        batch_size: images that detector and segmenter get at once. Fewer for large photographs: all candidates have a
            mask at the size of their image, 600 MB for an image of 12 megapixels.
        embedding_dtype: of stored embeddings, `torch.float32` or, for half the space, `torch.float16`.
        num_threads: that open images while the models work.
        shard_size, flush_seconds: after so many images, and so much time, what is made is written: that much is lost
            when the process is killed.

    Raises:
        ValueError: the store was made with other settings (the message names the first that differs), the processor
            has no detector, or an argument out of its range.
    """

    def __init__(
        self,
        processor: MaskLlavaProcessor,
        folder: str | os.PathLike[str],
        *,
        max_object_tokens: int | None = None,
        batch_size: int = 8,
        embedding_dtype: torch.dtype = torch.float32,
        num_threads: int = 4,
        shard_size: int = 256,
        flush_seconds: float = 60.0,
    ) -> None:
        fingerprint = processor.object_fingerprint(max_object_tokens)
        if fingerprint["max_object_tokens"] == 0:
            raise ValueError("`max_object_tokens` is 0: there are no objects to make. Pass at least 1.")
        fingerprint["embedding_dtype"] = str(embedding_dtype).removeprefix("torch.")
        self.processor = processor
        self.store = ObjectStore.create_or_open(folder, fingerprint)
        self.max_object_tokens = max_object_tokens
        self.batch_size = batch_size
        self.num_threads = num_threads
        self._writing = {
            "embedding_dtype": embedding_dtype,
            "shard_size": shard_size,
            "flush_seconds": flush_seconds,
        }
        self._file_stamps: set[str | None] = {*self.store.file_stamps()}
        self._added: set[str] = set()  # keys, since the store was opened
        self._works = len(self.store) > 0  # whether objects of any image could be made

    def __call__(
        self, images: Iterable[NamedImage], on_progress: Callable[[int], Any] = lambda number: None
    ) -> PrecomputeReport:
        """Makes and stores the objects of images. When it returns, or raises, all that were made are on disk.

        Args:
            images: pairs of a name, used in messages, and an image in any form the processor takes. They are taken one
                after the other, a little ahead of need.
            on_progress: called with the number of images that were dealt with since the last call.
        """
        report = PrecomputeReport()
        storing: Future[None] | None = None
        # Encoding masks takes some 10 ms an image: in a thread, while the models have the next batch
        with (
            closing(self._new_images(images, report, on_progress)) as new,
            self.store.writer(**self._writing) as writer,
            ThreadPoolExecutor(1) as pool,
        ):
            while batch := list(islice(new, self.batch_size)):
                found = self._find(batch)
                if storing is not None:
                    storing.result()
                storing = pool.submit(self._store, batch, found, writer, report)
                on_progress(len(batch))
            if storing is not None:
                storing.result()
        return report

    def _new_images(
        self, images: Iterable[NamedImage], report: PrecomputeReport, on_progress: Callable[[int], Any]
    ) -> Generator[_OpenedImage, None, None]:
        """Those whose objects are to be made; the others are counted in the report."""
        seen: set[str] = set()
        for image in self._opened(images):
            if image.picture is not None and image.key not in seen:
                seen.add(image.key)
                yield image
                continue
            if image.problem is not None:
                _skip(report, image.name, image.problem)
            else:
                report.known += 1
            on_progress(1)

    def _opened(self, images: Iterable[NamedImage]) -> Iterator[_OpenedImage]:
        """All images in their order, opened in threads up to two batches ahead of the models."""
        pool = ThreadPoolExecutor(self.num_threads)
        pending: deque[Future[_OpenedImage]] = deque()
        try:
            for named in images:
                pending.append(pool.submit(self._open, *_checked(named)))
                if len(pending) > 2 * self.batch_size:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _open(self, name: str, image: Any) -> _OpenedImage:
        stamp = _file_stamp(image)  # before reading: a file that changes meanwhile has another one afterwards
        if stamp is not None and stamp in self._file_stamps:
            return _OpenedImage(name)
        try:
            picture = upright_images(image)
        except UnidentifiedImageError:
            return _OpenedImage(name, problem="not an image in any known format")
        except Exception as error:  # decoders raise whatever they like about damaged files
            return _OpenedImage(name, problem=f"{type(error).__name__}: {error}")
        key = image_key(picture)
        known = key in self.store or key in self._added
        return _OpenedImage(name, None if known else picture, key, stamp)

    def _find(self, batch: Sequence[_OpenedImage]) -> Sequence[ImageObjects | ValueError]:
        """Per image its objects, or why there can be none.

        Where a batch fails, each image is tried alone: one can be more than the models take (a strip of 3000 x 2
        pixels, say), and is not to end a walk of days. Where nothing ever worked, it is not the image that is wrong.
        """
        pictures = [image.picture for image in batch]
        try:
            found = self._find_all(pictures)
        except ValueError:
            found = [self._find_one(picture) for picture in pictures]
            if not self._works and all(isinstance(entry, ValueError) for entry in found):
                raise
        except Exception as error:
            error.add_note(f"This happened at the images {', '.join(image.name for image in batch)}.")
            raise
        self._works = True
        return found

    def _find_all(self, pictures: list[Image.Image | None]) -> Sequence[ImageObjects | ValueError]:
        return self.processor.find_objects(pictures, self.max_object_tokens, self.batch_size)

    def _find_one(self, picture: Image.Image | None) -> ImageObjects | ValueError:
        try:
            return self._find_all([picture])[0]
        except ValueError as error:
            return error

    def _store(
        self,
        batch: Sequence[_OpenedImage],
        found: Sequence[ImageObjects | ValueError],
        writer: ObjectWriter,
        report: PrecomputeReport,
    ) -> None:
        for image, objects in zip(batch, found, strict=True):
            if isinstance(objects, ValueError):
                _skip(report, image.name, f"no objects can be made: {objects}")
                continue
            writer.add(image.key, objects, image.file_stamp)
            self._added.add(image.key)
            self._file_stamps.add(image.file_stamp)
            report.stored += 1
            report.objects += len(objects)


def precompute_objects(
    images: Any,
    processor: MaskLlavaProcessor,
    folder: str | os.PathLike[str],
    *,
    progress: bool = True,
    **options: Any,
) -> PrecomputeReport:
    """Stores the objects of many images, those that are in the store already excepted.

    Every process of `accelerate launch` calls this with the same arguments and takes its share: each image by itself,
    in turn. The folder must be one that all of them see. The images that were skipped in this walk are named in the
    store's `skipped.jsonl`; another walk tries them again.

    Args:
        images: a sequence or an iterable of pairs (name, image), where the image has any form that the processor takes
            and is read when its turn comes; a folder, all of whose images are taken; or a `datasets.Dataset` or
            `IterableDataset` with a column `image` or `images` of pictures or paths.
        processor, folder: see `PrecomputeWorker`.
        progress: whether the main process shows a bar, over its own share of the images.
        options: the other arguments of `PrecomputeWorker`, such as `max_object_tokens` and `batch_size`.

    Returns:
        In every process, what became of the images of all processes.

    Raises:
        ValueError: see `PrecomputeWorker`; also where not one image could be read.
        FileNotFoundError: no such folder.
    """
    # On a machine without accelerator, `accelerate` otherwise takes every process for the only one
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    worker = PrecomputeWorker(processor, folder, **options)
    share, total = _share(images, state.process_index, state.num_processes)
    with tqdm(desc="Objects", total=total, unit=" images", disable=not (progress and state.is_main_process)) as bar:
        report = worker(share, bar.update)
    if state.num_processes > 1:
        report = sum(gather_object([report]), PrecomputeReport())
    if state.is_main_process:
        lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in report.skipped]
        write_whole(worker.store.folder / "skipped.jsonl", lambda file: file.write("".join(lines).encode()))
    if report.skipped and not report.stored and not report.known:
        name, reason = report.skipped[0]
        raise ValueError(
            f"Not one of {len(report.skipped)} images could be read; the first is {name} ({reason}). Do the paths "
            "start from the right folder?"
        )
    return report


def open_images(source: str, image_folder: str | os.PathLike[str] | None = None, split: str = "train") -> Any:
    """Images by the name of their source, for `precompute_objects`.

    Args:
        source: a folder of images; a JSON file in LLaVA's layout, of whose rows only `image` or `images` are read; a
            dataset that `save_to_disk` wrote; a Parquet file; or a dataset on the Hub.
        image_folder: where the paths in a JSON file start; default: the file's own folder.
        split: of a dataset with several.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: no such split, or nothing that could hold images.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        return _json_images(path, path.parent if image_folder is None else Path(image_folder))
    if path.is_dir() and not is_saved_dataset(path):
        return source
    return named_dataset(source, split)


# ------------------------------------------------------------------------------------------------------------- sources
def _share(images: Any, index: int, num_shares: int) -> tuple[Iterable[NamedImage], int | None]:
    """Named images for process `index` of `num_shares`, and how many these are at most, where that is known."""
    if isinstance(images, (str, os.PathLike)):
        images = _folder_images(Path(images))
    if not isinstance(images, (Dataset, IterableDataset)):
        if not isinstance(images, Sequence):
            return islice(images, index, None, num_shares), None
        share = images[index::num_shares]
        return share, len(share)
    names = images.column_names or ()
    column = next((name for name in ("images", "image") if name in names), None)
    if column is None:
        raise ValueError(
            f"The dataset has the columns {sorted(names)}, expected `image` or `images`. Rename the one with the "
            "images (`dataset.rename_column`)."
        )
    feature = (images.features or {}).get(column)
    if isinstance(images, Dataset) and Value("string") in (feature, getattr(feature, "feature", None)):
        paths = _unique_paths(images.select_columns([column])[column])
        return _share([(path, path) for path in paths], index, num_shares)
    # Arrow's own values, because `datasets` would decode the images, and one that is damaged would end the walk
    rows, total = images.select_columns([column]).with_format("arrow"), None
    if isinstance(rows, Dataset):
        rows = rows.select(range(index, len(rows), num_shares))
        total = len(rows) if column == "image" else None
    else:
        rows = islice(rows, index, None, num_shares)
    values = (row[column][0].as_py() for row in rows)
    in_rows = (_images_in_row(index + place * num_shares, value) for place, value in enumerate(values))
    return chain.from_iterable(in_rows), total


def _images_in_row(number: int, value: Any) -> list[NamedImage]:
    """The images in a row of a dataset: none, one, or a list of paths or of `{"bytes": ..., "path": ...}`."""
    named = []
    for position, image in enumerate(value if isinstance(value, list) else [value]):
        if image is None:
            continue
        name = f"row {number}" + (f", image {position}" if isinstance(value, list) else "")
        if isinstance(image, Mapping):
            name += f" ({image['path']})" if image["path"] else ""
            image = image["path"] if image["bytes"] is None else image["bytes"]
        named.append((name, image))
    return named


def _folder_images(folder: Path) -> list[NamedImage]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    images = [path for path in files if path.suffix.lower() in _IMAGE_SUFFIXES]
    if not images:
        raise ValueError(
            f"The folder {str(folder)!r} has {len(files)} files but no images, whose names would end in "
            f"{', '.join(sorted(_IMAGE_SUFFIXES))}."
        )
    if len(images) < len(files):
        others = next(path for path in files if path.suffix.lower() not in _IMAGE_SUFFIXES)
        logger.warning(f"{len(files) - len(images)} files in {str(folder)!r} are no images by name, such as {others}.")
    return [(path.relative_to(folder).as_posix(), path) for path in images]


def _json_images(path: Path, folder: Path) -> list[NamedImage]:
    """The images of a file in LLaVA's layout."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    rows = (row for row in json_rows(str(path)) if isinstance(row, Mapping))
    names = _unique_paths(row.get("images") or row.get("image") for row in rows)
    if not names:
        raise ValueError(f"No row of {str(path)!r} has an `image` with the path of one.")
    return [(name, name if "://" in name else folder / name) for name in names]


def _unique_paths(values: Iterable[Any]) -> list[str]:
    """Each path once, however many rows name it: conversations often share an image."""
    paths: dict[str, None] = {}
    for value in values:
        entries = value if isinstance(value, list) else [value]
        paths.update(dict.fromkeys(path for path in entries if isinstance(path, str) and path))
    return list(paths)


def _file_stamp(image: Any) -> str | None:
    """Names one state of an image's file, without reading it; None for what is no file.

    A file that is written or replaced gets another change time, which no program can set. As a hash, because a store
    may be published, and folders of a machine are nobody's business.
    """
    if not isinstance(image, (str, os.PathLike)) or not os.path.isfile(image):
        return None
    path, stat = os.path.realpath(image), os.stat(image)
    state = f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    return hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest()[:32]


def _checked(named: Any) -> NamedImage:
    if not isinstance(named, tuple) or len(named) != 2 or not isinstance(named[0], str):
        raise ValueError(
            f"An entry of `images` is {str(named)[:100]}, a {type(named).__name__}, expected a pair of a name and an "
            "image: what cannot be read is reported by its name."
        )
    return named


def _skip(report: PrecomputeReport, name: str, reason: str) -> None:
    logger.warning(f"Skipped {name}: {reason}")
    report.skipped.append((name, reason))
