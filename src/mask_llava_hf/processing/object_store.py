# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Objects of many images on disk, found again by what an image shows.

A store is a folder: `store.json` says how all of its objects were made, and `objects-*.parquet` hold them, a row per
image, masks as COCO run-length encoding. Such a file appears whole or not at all and never changes, and every writer
gives its own files names of their own. So processes, also on several machines, can fill one store together, and a kill
at any point costs only what was not yet written. Where two files have the same image, the first by name counts.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from PIL import Image

from ..whole_files import write_whole
from .image_inputs import upright_images
from .objects.image_objects import ImageObjects


_FORMAT = 1
_DESCRIPTION = "store.json"
_SHARDS = "objects-*.parquet"
_KEY_LENGTH = 32

# A look-up reads a row group, so it should be small; more groups make a file slower to open.
_ROWS_PER_GROUP = 8

_EMBEDDING_TYPES = {torch.float32: pa.float32(), torch.float16: pa.float16()}


def image_key(image: Any) -> str:
    """Identifies an image by what it shows: a hash of the size and the pixels of the upright RGB image.

    A path, the bytes of the file, a PIL image and an array of the same picture have one key. A picture that was resized
    or compressed anew has another.

    Args:
        image: one image, in any form the processor takes.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: no image, or several.
    """
    picture = upright_images(image)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"A key belongs to one image, got a {type(image).__name__} with {len(picture)} entries.")
    digest = hashlib.sha256(f"{picture.width} x {picture.height}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:_KEY_LENGTH]


class ObjectStore:
    """The objects of many images in a folder, by `image_key`.

    An opened store shows what was in the folder at that time. It holds no open files, so it can be pickled, and used in
    forked or spawned data-loader workers and in several threads. Given back to the processor, its objects cost nothing:

        store = ObjectStore.open("objects")
        inputs = processor(images=images, text=texts, objects=[store.get(image) for image in images])

    Attributes:
        folder: where it lies.
        fingerprint: what decided about its objects, as `MaskLlavaProcessor.object_fingerprint` tells it.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Use `open` or `create_or_open`."""
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        self._shards = sorted(path.name for path in folder.glob(_SHARDS))
        columns = [self._read_column(shard, "key") for shard in self._shards]
        places = [(shard, row) for shard, column in enumerate(columns) for row in range(len(column))]
        keys = [key for column in columns for key in column]
        # Arrays, because Python objects are copied into every forked worker that so much as looks at them
        self._keys, first = np.unique(np.array(keys, dtype=f"S{_KEY_LENGTH}"), return_index=True)
        self._places = np.array(places, dtype=np.int32).reshape(-1, 2)[first]  # (images, 2): shard and row

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "ObjectStore":
        """Opens a store for reading.

        Raises:
            FileNotFoundError: there is none in `folder`.
            ValueError: it was written by a newer version, or a file in it is damaged or from another store.
        """
        folder = Path(folder).absolute()
        description = folder / _DESCRIPTION
        if not description.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no object store: it has no `{_DESCRIPTION}`. Make one with `mask-llava "
                "precompute`."
            )
        content = json.loads(description.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(
                f"The object store {str(folder)!r} has format {content['format']}, but this version of mask-llava-hf "
                f"reads format {_FORMAT}. Update the package, or make the store again with `mask-llava precompute`."
            )
        return cls(folder, content["fingerprint"])

    @classmethod
    def create_or_open(cls, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> "ObjectStore":
        """Opens a store for objects made in one certain way, and makes it where there is none yet.

        Args:
            fingerprint: JSON-able; everything that decides about the objects.

        Raises:
            ValueError: the store was made in another way; the message names the first field that differs.
        """
        folder = Path(folder)
        if not (folder / _DESCRIPTION).exists():
            folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"format": _FORMAT, "fingerprint": fingerprint}, indent=2)
            write_whole(folder / _DESCRIPTION, lambda file: file.write(f"{content}\n".encode()))
        store = cls.open(folder)  # another process may have made it at the same time
        store.check(fingerprint)
        return store

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Checks that objects made with these settings belong into this store.

        Raises:
            ValueError: names the first field that differs, with both values.
        """
        difference = _first_difference(self.fingerprint, json.loads(json.dumps(fingerprint)))
        if difference is not None:
            name, stored, given = difference
            raise ValueError(
                f"The objects in the store {str(self.folder)!r} were made with {name}={stored!r}, but now it is "
                f"{given!r}. Objects of both kinds would be mixed and nobody could tell them apart. Use the settings "
                "the store was made with (see its `store.json`), or another folder."
            )

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return self._position(key) is not None

    def __iter__(self) -> Iterator[str]:
        """The keys of all images."""
        return (key.decode() for key in self._keys)

    def __repr__(self) -> str:
        return f"ObjectStore({str(self.folder)!r}; {len(self)} images)"

    def __getitem__(self, key: str) -> ImageObjects:
        """The objects of the image with this key, as `get` returns them.

        Raises:
            KeyError: there are none.
        """
        return self._read(key, None)

    def get(self, image: Any, with_masks: bool | None = None) -> ImageObjects:
        """The objects of an image.

        Args:
            image: one image, in any form the processor takes.
            with_masks: whether masks are decoded, (N, H, W) bool at the size of the image. Default: where there are no
                embeddings, without which the processor needs them.

        Raises:
            KeyError: the store has no objects of this image; the message names the image.
        """
        key = image_key(image)
        if key not in self:
            raise KeyError(
                f"The store {str(self.folder)!r} ({len(self)} images) has no objects of {_name(image)} (key {key}). "
                "Add them with `mask-llava precompute`, with the settings the store was made with; images are known by "
                "their pixels, so one that was resized or compressed anew is another image."
            )
        return self._read(key, with_masks)

    def file_stamps(self) -> set[str]:
        """The stamps of the files whose objects are stored, as their writers gave them (see `ObjectWriter.add`)."""
        stamps = {stamp for shard in self._shards for stamp in self._read_column(shard, "file_stamp")}
        return stamps - {None}

    def writer(self, **options: Any) -> "ObjectWriter":
        """A writer of more images' objects; for its options see there. This store shows them when opened again."""
        return ObjectWriter(self.folder, self.fingerprint, **options)

    def _position(self, key: str) -> int | None:
        encoded = key.encode()
        position = int(np.searchsorted(self._keys, encoded))
        return position if position < len(self._keys) and self._keys[position] == encoded else None

    def _read(self, key: str, with_masks: bool | None) -> ImageObjects:
        position = self._position(key)
        if position is None:
            raise KeyError(key)
        shard, row = self._places[position].tolist()
        with self._open_shard(self._shards[shard]) as file:

            def read(*columns: str) -> pa.Table:
                group, offset = divmod(row, _ROWS_PER_GROUP)
                return file.read_row_group(group, columns=columns, use_threads=False).slice(offset, 1)

            embeddings = read("embeddings")["embeddings"].combine_chunks()
            embedded = embeddings.null_count == 0
            columns = ["image_hw", "boxes_xyxy", "scores", "labels"]
            if with_masks or (with_masks is None and not embedded):
                columns.append("masks")
            objects = ImageObjects.from_dict(read(*columns).to_pylist()[0])
        if not embedded:
            return objects
        # Through NumPy: lists of Python numbers would take longer than all the rest
        values = torch.from_numpy(embeddings.flatten().to_numpy().copy()).reshape(len(objects), -1)
        return replace(objects, embeddings=values, embedding_fingerprint=self.fingerprint["embedding"])

    def _read_column(self, shard: str, column: str) -> list[Any]:
        with self._open_shard(shard) as file:
            stored = json.loads(file.schema_arrow.metadata[b"fingerprint"])
            difference = _first_difference(self.fingerprint, stored)
            if difference is not None:
                name, ours, theirs = difference
                raise ValueError(
                    f"The file {shard!r} in the object store {str(self.folder)!r} has objects made with "
                    f"{name}={theirs!r}, the store has {ours!r}. It belongs to another store: move it away."
                )
            return file.read(columns=[column], use_threads=False)[column].to_pylist()

    def _open_shard(self, shard: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.folder / shard, memory_map=True, pre_buffer=False)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"The file {shard!r} in the object store {str(self.folder)!r} is damaged: {error} Delete it; "
                "`mask-llava precompute` makes its objects again."
            ) from error


class ObjectWriter:
    """Writes objects into a store, many images to a file; a context manager, which at the end writes what is left.

    Args:
        folder: of the store.
        fingerprint: of the store.
        embedding_dtype: `torch.float32`, or `torch.float16` for half the space.
        shard_size: images per file at most; so many can be lost by a kill.
        flush_seconds: a file is also written when an image is added so long after the last one was.

    Raises:
        ValueError: another dtype.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        embedding_dtype: torch.dtype = torch.float32,
        shard_size: int = 256,
        flush_seconds: float = 60.0,
    ) -> None:
        if embedding_dtype not in _EMBEDDING_TYPES:
            raise ValueError(f"`embedding_dtype` is {embedding_dtype}, expected torch.float32 or torch.float16.")
        self.folder = folder
        self.fingerprint = fingerprint
        self.embedding_dtype = embedding_dtype
        self.shard_size = shard_size
        self.flush_seconds = flush_seconds
        self._name = uuid.uuid4().hex
        self._num_shards = 0
        self._rows: list[dict[str, Any]] = []
        self._last_flush = time.monotonic()

    def add(self, key: str, objects: ImageObjects, file_stamp: str | None = None) -> None:
        """Adds the objects of an image.

        Args:
            key: the image's `image_key`.
            objects: with embeddings or masks, or both. Without objects both may be missing.
            file_stamp: a text that names one state of the file the image was read from, so that a later walk can tell
                without reading it that the image is stored.

        Raises:
            ValueError: objects without what the processor needs of them, or embeddings made in another way than those
                of this store.
        """
        embeddings = objects.embeddings if len(objects) else None
        if len(objects) and embeddings is None and objects.masks is None:
            raise ValueError(
                f"The objects of image {key} have neither masks nor embeddings, so a model could not use them. Store "
                "what `find_objects` returns."
            )
        if embeddings is not None and objects.embedding_fingerprint != self.fingerprint.get("embedding"):
            raise ValueError(
                f"The embeddings of image {key} were made with {objects.embedding_fingerprint!r}, those of the store "
                f"{str(self.folder)!r} with {self.fingerprint.get('embedding')!r}. They would be read as what they "
                "are not."
            )
        row = replace(objects, embeddings=None, embedding_fingerprint=None).to_dict()
        if embeddings is not None:
            row["embeddings"] = embeddings.to(self.embedding_dtype).flatten().numpy()
        self._rows.append({**row, "key": key, "file_stamp": file_stamp})
        if len(self._rows) >= self.shard_size or time.monotonic() - self._last_flush >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what was added; when it returns, that is safe on disk."""
        if self._rows:
            schema = _schema(self.embedding_dtype).with_metadata({"fingerprint": json.dumps(self.fingerprint)})
            table = pa.Table.from_pylist(self._rows, schema)
            # Embeddings fill these files and do not compress
            options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            write_whole(
                self.folder / _SHARDS.replace("*", f"{self._name}-{self._num_shards:06d}"),
                lambda file: pq.write_table(table, file, row_group_size=_ROWS_PER_GROUP, **options),
            )
            self._num_shards += 1
            self._rows = []
        self._last_flush = time.monotonic()

    def __enter__(self) -> "ObjectWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.flush()


def _schema(embedding_dtype: torch.dtype) -> pa.Schema:
    rle = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    return pa.schema(
        [
            ("key", pa.string()),
            ("file_stamp", pa.string()),
            ("image_hw", pa.list_(pa.int32())),
            ("boxes_xyxy", pa.list_(pa.list_(pa.float32()))),
            ("scores", pa.list_(pa.float32())),
            ("labels", pa.list_(pa.string())),
            ("masks", pa.list_(rle)),
            ("embeddings", pa.list_(_EMBEDDING_TYPES[embedding_dtype])),  # (N, D) row by row
        ]
    )


def _first_difference(stored: Any, given: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first field in which two fingerprints differ.

    Where a part lies (`source`) is not compared: it may move, and its weights tell whether it is the same.
    """
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        for field in {**stored, **given}:  # in their order: settings stand before what follows from them
            if field != "source":
                inner = f"{name}.{field}" if name else field
                difference = _first_difference(stored.get(field), given.get(field), inner)
                if difference is not None:
                    return difference
        return None
    return None if stored == given else (name, stored, given)


def _name(image: Any) -> str:
    """What people call an image."""
    if isinstance(image, (str, os.PathLike)):
        return f"the image {os.fspath(image)[:200]!r}"
    if getattr(image, "filename", None):
        return f"the image {image.filename!r}"
    return f"a {type(image).__name__}"
