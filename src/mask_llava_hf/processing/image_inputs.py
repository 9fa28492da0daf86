# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Images in all the forms and layouts people pass them, as upright RGB pictures."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import get_session
from PIL import Image, UnidentifiedImageError

from .geometry import upright_rgb


def upright_images(images: Any) -> Any:
    """The same layout with every image as an upright RGB picture; paths, URLs and encoded images are opened."""
    if isinstance(images, Mapping) and set(images) == {"bytes", "path"}:  # as `datasets` stores an image
        images = images["bytes"] if images["bytes"] is not None else images["path"]
    if isinstance(images, bytes) or hasattr(images, "read"):
        images = Image.open(io.BytesIO(images) if isinstance(images, bytes) else images)
    if isinstance(images, Sequence) and not isinstance(images, str):
        return [upright_images(image) for image in images]
    if getattr(images, "ndim", 3) == 4:
        return [upright_rgb(image) for image in images]  # a batch in one array
    return upright_rgb(_open(images) if isinstance(images, str | os.PathLike) else images)


def _open(source: str | os.PathLike) -> Image.Image:
    # Not Transformers' `load_image`: its RGB conversion clips 16-bit images to white and blackens transparency
    if os.path.isfile(source):
        return Image.open(source)
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, follow_redirects=True)
        response.raise_for_status()
        return Image.open(io.BytesIO(response.content))
    try:
        encoded = "".join(source.rpartition(",")[2].split())  # after "data:image/png;base64,", without line breaks
        return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))
    except (ValueError, UnidentifiedImageError) as error:
        raise ValueError(
            f"An image is given as {source[:80]!r}, which is no file here, no web address and no base64 of an image."
        ) from error


def flat_pictures(images: Any) -> list[Image.Image]:
    """All pictures in prompt order, from one picture, a list, or a list of lists."""
    if not isinstance(images, list):
        return [images]
    return [picture for entry in images for picture in (entry if isinstance(entry, list) else [entry])]
