# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The way from the upright original image to the vision tower's square input, for boxes and for masks.

Pixels take this way inside Transformers' LLaVA image processor; here boxes and masks follow them, by the same settings
and the same integer rounding. Also here: what "the upright original image" is (`upright_rgb`).

Coordinates are continuous pixels: x to the right, y down, pixel (row, column) covers [column, column + 1) x
[row, row + 1). Pairs are named for their order: `_hw` is (height, width), `_xyxy` is (left, top, right, bottom).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import get_size_dict


# A mask pixel at exactly one half belongs to the mask; sums of float32 weights miss the half by up to about 1e-6.
_HALF = 0.5 - 1e-5


@dataclass(frozen=True)
class SquareFrame:
    """The transform of one image: pad, then resize, then crop (a crop larger than the image pads with zeros).

    Along each axis, `square = (original + pad) * resized / padded - crop`.

    Attributes:
        image_hw: size of the upright original image.
        pad_top_left: rows and columns added before the image.
        padded_hw: size after padding.
        resized_hw: size after resizing.
        crop_top_left: rows and columns cut away after resizing; negative where the crop adds them instead.
        size: side S of the square that reaches the tower.
    """

    image_hw: tuple[int, int]
    pad_top_left: tuple[int, int]
    padded_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    size: int

    @classmethod
    def from_image_processor(
        cls, image_processor: Any, image_hw: tuple[int, int], **call_overrides: Any
    ) -> "SquareFrame":
        """Reads the transform from a LLaVA (or CLIP) image processor.

        Args:
            image_processor: its `do_pad`, `do_resize`, `size`, `do_center_crop` and `crop_size` are read, and its
                `backend`, because the two backends of Transformers place an odd crop padding differently.
            image_hw: size of the upright original image.
            call_overrides: the image processor's call arguments; those that do not move pixels are ignored, None
                stands for the saved setting.

        Raises:
            ValueError: an empty image, a kind of `size` or `do_pad` that is not LLaVA's, or a result that is not
                square.
        """
        height, width = (int(side) for side in image_hw)
        if height < 1 or width < 1:
            raise ValueError(f"`image_hw` is {tuple(image_hw)}, expected a height and a width of at least 1 pixel.")

        def setting(name: str) -> Any:
            value = call_overrides.get(name)
            return getattr(image_processor, name, None) if value is None else value

        pad_top_left, padded_hw = (0, 0), (height, width)
        if setting("do_pad"):
            if not hasattr(image_processor, "pad_to_square"):
                raise ValueError(
                    f"{type(image_processor).__name__} has `do_pad=True` but no `pad_to_square`: it pads in a way this "
                    "frame does not know, and boxes and masks would be shifted against the pixels. Use a LLaVA image "
                    "processor, or set `do_pad=False`."
                )
            side = max(height, width)
            pad_top_left, padded_hw = ((side - height) // 2, (side - width) // 2), (side, side)
        resized_hw = padded_hw
        if setting("do_resize"):
            default_to_square = bool(setting("default_to_square"))
            resized_hw = _resized_hw(padded_hw, _size_dict(setting("size"), "size", default_to_square))
        crop_top_left, cropped_hw = (0, 0), resized_hw
        if setting("do_center_crop"):
            crop = _size_dict(setting("crop_size"), "crop_size", True)
            cropped_hw = (crop["height"], crop["width"])
            backend = getattr(image_processor, "backend", "torchvision")
            crop_top_left = (
                _crop_start(resized_hw[0], cropped_hw[0], backend),
                _crop_start(resized_hw[1], cropped_hw[1], backend),
            )
        if cropped_hw[0] != cropped_hw[1]:
            raise ValueError(
                f"An image of {height} x {width} (height x width) comes out of {type(image_processor).__name__} as "
                f"{cropped_hw[0]} x {cropped_hw[1]}, expected a square, which is all that the vision tower accepts. "
                "Set `do_pad=True`, or `do_center_crop=True`, or a `size` with equal height and width."
            )
        return cls((height, width), pad_top_left, padded_hw, resized_hw, crop_top_left, cropped_hw[0])

    def transform_boxes(self, boxes_xyxy: torch.Tensor) -> torch.Tensor:
        """Boxes in pixels of the square.

        Args:
            boxes_xyxy: (N, 4), pixels of the upright original image.

        Returns:
            (N, 4) float32, clipped to [0, S]; a box outside the crop collapses onto the border.
        """
        if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[-1] != 4:
            raise ValueError(f"`boxes_xyxy` has shape {tuple(boxes_xyxy.shape)}, expected (N, 4).")

        def per_corner(pair_hw: tuple[float, float]) -> torch.Tensor:
            return torch.tensor([pair_hw[1], pair_hw[0]] * 2, dtype=torch.float64, device=boxes_xyxy.device)

        scale = (self.resized_hw[0] / self.padded_hw[0], self.resized_hw[1] / self.padded_hw[1])
        boxes = (boxes_xyxy.double() + per_corner(self.pad_top_left)) * per_corner(scale)
        return (boxes - per_corner(self.crop_top_left)).clamp(0, self.size).float()

    def transform_masks(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks in the square: antialiased bilinear, then one half or more.

        A mask that is lost to its small size becomes the one pixel at the centroid of its visible part; a mask that is
        wholly cropped away, or empty, becomes empty. Masks are taken one at a time and only over their content, so the
        memory beyond input and output is a few float32 maps of one mask.

        Args:
            masks: (N, H, W) bool (or 0 and 1 of another dtype), in the upright original image.

        Returns:
            (N, S, S) bool, on the device of `masks`.
        """
        if masks.ndim != 3 or tuple(masks.shape[1:]) != self.image_hw:
            raise ValueError(
                f"`masks` has shape {tuple(masks.shape)}, expected (N, {self.image_hw[0]}, {self.image_hw[1]}): masks "
                "in the frame of the upright original image. Masks of another frame would cover the wrong pixels."
            )
        squares = torch.zeros(len(masks), self.size, self.size, dtype=torch.bool, device=masks.device)
        for mask, square in zip(masks.bool(), squares, strict=True):
            content = _content(mask)
            if content is not None:
                self._transform_mask(mask, content, square)
        return squares

    def _transform_mask(self, mask: torch.Tensor, content: tuple[slice, slice], square: torch.Tensor) -> None:
        """Writes one (H, W) mask with something in `content` into `square` (S, S)."""
        rows = self._resampling_weights(0, content[0], mask.device)  # (S, h) sparse
        columns = self._resampling_weights(1, content[1], mask.device)  # (S, w) sparse
        resized = torch.sparse.mm(rows, mask[content].float())  # (S, w)
        square.copy_(torch.sparse.mm(columns, resized.T).T >= _HALF)
        if not square.any():
            visible_rows, visible_columns = self._visible(0, content[0]), self._visible(1, content[1])
            visible = mask[visible_rows, visible_columns]
            if visible.any():
                y = self._centroid(0, visible.sum(1), visible_rows.start)
                x = self._centroid(1, visible.sum(0), visible_columns.start)
                square[y, x] = True

    def _resampling_weights(self, axis: int, content: slice, device: torch.device) -> torch.Tensor:
        """Sparse (S, content): how much each original pixel of `content` adds to each pixel of the square."""
        sizes = (self.padded_hw[axis], self.resized_hw[axis], self.pad_top_left[axis], self.crop_top_left[axis])
        indices, weights = _resampling_weights(*sizes, self.size, device)
        used = (indices[1] >= content.start) & (indices[1] < content.stop)
        indices = torch.stack([indices[0, used], indices[1, used] - content.start])
        shape = (self.size, content.stop - content.start)
        return torch.sparse_coo_tensor(indices, weights[used], shape, check_invariants=False)

    def _visible(self, axis: int, content: slice) -> slice:
        """The part of `content` whose pixels reach into the square."""
        scale = self.padded_hw[axis] / self.resized_hw[axis]
        crop, pad = self.crop_top_left[axis], self.pad_top_left[axis]
        start = max(content.start, math.floor(crop * scale - pad))
        return slice(start, max(start, min(content.stop, math.ceil((crop + self.size) * scale - pad))))

    def _centroid(self, axis: int, counts: torch.Tensor, start: int) -> int:
        """The pixel of the square at the mean position of `counts` (mask pixels per original row or column)."""
        counts = counts.double()
        positions = torch.arange(len(counts), dtype=torch.float64, device=counts.device) + start + 0.5
        original = ((counts * positions).sum() / counts.sum()).item()
        scaled = (original + self.pad_top_left[axis]) * self.resized_hw[axis] / self.padded_hw[axis]
        return min(max(math.floor(scaled - self.crop_top_left[axis]), 0), self.size - 1)


@lru_cache(maxsize=16)  # two axes of images of a few sizes: for small masks, making them anew costs more than their use
def _resampling_weights(
    padded: int, resized: int, pad: int, crop: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much original pixels add to pixels of the square along one axis, where it is more than nothing.

    The triangle filter of antialiased bilinear resizing, normalised over the padded image, for the pixels of the square
    that the crop keeps. Padding comes out with indices below zero or past the original.

    Returns:
        (2, n) int64, pixels of the square and of the original; and (n,) float32.
    """
    scale = padded / resized
    support = max(scale, 1.0)
    targets = torch.arange(size, dtype=torch.float64, device=device) + crop
    centres = (targets + 0.5) * scale
    first = (centres - support).floor().long()
    sources = first[:, None] + torch.arange(math.ceil(2 * support) + 2, device=device)  # (S, taps)
    weights = (1 - ((sources + 0.5 - centres[:, None]) / support).abs()).clamp(min=0)
    weights = weights * ((sources >= 0) & (sources < padded))
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    used = weights > 0
    used &= ((targets >= 0) & (targets < resized))[:, None]  # beyond are the zeros that the crop adds
    return torch.stack([used.nonzero()[:, 0], sources[used] - pad]), weights[used].float()


def _size_dict(size: Any, name: str, default_to_square: bool) -> dict[str, int]:
    """`size` in the dictionary form that Transformers' image processors give it."""
    if size is None:
        raise ValueError(
            f"The image processor has no `{name}`, without which boxes and masks cannot follow its pixels."
        )
    given = get_size_dict(
        size if isinstance(size, (int, list, tuple)) else dict(size), default_to_square=default_to_square
    )
    return {key: value for key, value in dict(given).items() if value is not None}


def _resized_hw(image_hw: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """The size after resizing, with the rounding of Transformers' image processors."""
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) == {"shortest_edge"}:
        shortest = size["shortest_edge"]
        height, width = image_hw
        if height <= width:
            return shortest, int(shortest * width / height)
        return int(shortest * height / width), shortest
    raise ValueError(
        f"`size` is {size}, expected {{'shortest_edge': ...}} or {{'height': ..., 'width': ...}} as in LLaVA's image "
        "processor; boxes and masks cannot follow another kind of resizing."
    )


def _crop_start(resized: int, cropped: int, backend: str) -> int:
    """Where a centred crop starts along one axis; negative where it pads.

    An odd padding has its larger half after the image in the torchvision backend and before it in the PIL backend.
    """
    if cropped <= resized:
        return (resized - cropped) // 2
    missing = cropped - resized
    return -((missing + 1) // 2) if backend == "pil" else -(missing // 2)


def _content(mask: torch.Tensor) -> tuple[slice, slice] | None:
    """The smallest rows and columns that hold all of a (H, W) bool mask; None for an empty one."""
    rows = mask.any(1).nonzero()
    if len(rows) == 0:
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = mask[top:bottom].any(0).nonzero()
    return slice(top, bottom), slice(int(columns[0]), int(columns[-1]) + 1)


def upright_rgb(image: Any) -> Image.Image:
    """The image in whose pixels all boxes and masks are given: upright, 8 bit, RGB.

    PIL images are rotated by their EXIF orientation; transparency is laid on white, as Transformers does; 16-bit
    values are scaled to 8 bit rather than clipped.

    Args:
        image: a PIL image of any mode; a NumPy array (H, W) or (H, W, 1 | 3 | 4), or a torch tensor (1 | 3 | 4, H, W)
            or (H, W), of bool, 8-bit or 16-bit integers, or floats in [0, 1]. The other place of the channels is
            accepted where it cannot be mistaken. Wider integers are read as 8 bit where they fit.

    Raises:
        ValueError: an image without pixels, with NaN, of another shape or dtype, or with values out of range.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"The image has {image.height} x {image.width} pixels (height x width), expected some.")
        return _pil_to_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        array = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        return _pil_to_rgb(_array_to_pil(array, channels_first=True))
    if isinstance(image, np.ndarray):
        return _pil_to_rgb(_array_to_pil(image, channels_first=False))
    raise ValueError(
        f"An image is a {type(image).__name__}, expected a PIL image, a NumPy array or a torch tensor. Open a file "
        "with `PIL.Image.open` first."
    )


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        if image.mode == "I":  # 32-bit integers, the form in which Pillow used to open 16-bit PNG files
            if array.min() < 0 or array.max() > 65535:
                raise ValueError(
                    f"A PIL image of mode 'I' has values from {array.min()} to {array.max()}, expected 16 bit "
                    "(0 to 65535). Scale it to 8 bit first."
                )
            array = array.astype(np.uint16)
        return _array_to_pil(array, channels_first=False).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _array_to_pil(array: np.ndarray, channels_first: bool) -> Image.Image:
    """An array of any of the accepted shapes and dtypes as an 8-bit PIL image of mode L, RGB or RGBA."""
    shape = array.shape
    if array.size == 0:
        raise ValueError(f"The image has shape {shape}, so it has no pixels.")
    if array.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
        elif not last:
            array = array[..., :0]
    if array.ndim not in (2, 3) or array.size == 0:
        expected = "(channels, H, W) or (H, W)" if channels_first else "(H, W) or (H, W, channels)"
        raise ValueError(
            f"The image has shape {shape}, expected {expected} with 1, 3 or 4 channels. Pass a batch as a list of "
            "images."
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(_to_8_bit(array)))


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    if np.issubdtype(array.dtype, np.integer):
        if array.min() >= 0 and array.max() <= 255:
            return array.astype(np.uint8)
        raise ValueError(
            f"The image is {array.dtype} with values from {array.min()} to {array.max()}, expected 0 to 255. Cast "
            "16-bit pixels to uint16, so that they are scaled and not clipped."
        )
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(
                f"The image has {int((~np.isfinite(array)).sum())} pixel values that are NaN or infinite; they would "
                "spread to every token of the image. Replace them, for example with `numpy.nan_to_num`."
            )
        if array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"The image is floating point with values from {array.min():.4g} to {array.max():.4g}, expected 0 to "
                "1. Divide by 255, cast to uint8, or undo a normalisation first."
            )
        return np.rint(array * 255).astype(np.uint8)
    raise ValueError(f"The image has dtype {array.dtype}, expected bool, integers or floats.")
