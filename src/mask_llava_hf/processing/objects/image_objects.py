"""`ImageObjects`: the objects of one image, the value that passes between detection, segmentation, order and embedding.

Connectors bring other sources into it: plain boxes and masks, COCO run-length encoding, the output of Transformers'
object-detection post-processing and of SAM's mask generators.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class ImageObjects:
    """Objects of one image; rows of all fields belong together.

    All tensors are on the CPU, whatever was given. Boxes are clipped to the image where they reach over its border.

    Attributes:
        boxes_xyxy: (N, 4) float32, left, top, right, bottom in pixels of the upright original image.
        scores: (N,) float32 in [0, 1].
        image_hw: (height, width) of the upright original image.
        masks: (N, H, W) bool in the upright original image, or None.
        embeddings: (N, D) floating point, one per object, or None.
        embedding_fingerprint: what made the embeddings (tower weights and settings): a string or a JSON-able dict;
            given exactly when `embeddings` is.
        labels: N class names, or None.

    Raises:
        ValueError: a field that does not fit; the message names field, row, what was found and what was expected. For
            boxes: NaN or infinite values, reversed corners, no area, or no overlap with the image.
    """

    boxes_xyxy: torch.Tensor
    scores: torch.Tensor
    image_hw: tuple[int, int]
    masks: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    embedding_fingerprint: str | dict[str, Any] | None = None
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        image_hw = _checked_image_hw(self.image_hw)
        boxes = _checked_boxes(self.boxes_xyxy, image_hw)
        number = len(boxes)
        checked = {
            "image_hw": image_hw,
            "boxes_xyxy": boxes,
            "scores": _checked_scores(self.scores, number),
            "masks": _checked_masks(self.masks, number, image_hw),
            "embeddings": _checked_embeddings(self.embeddings, self.embedding_fingerprint, number),
            "labels": _checked_labels(self.labels, number),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def __getitem__(self, index: Any) -> "ImageObjects":
        """The objects at a slice, at a list or tensor of indices (in that order), or where a bool tensor is True."""
        if isinstance(index, (int, np.integer)) or (isinstance(index, torch.Tensor) and index.ndim == 0):
            raise TypeError(
                f"ImageObjects is indexed with {index!r}, expected a slice or a list of indices, because the result is "
                f"ImageObjects again. For one object write objects[{int(index)} : {int(index)} + 1]."
            )
        rows = torch.arange(len(self))
        chosen = rows[index] if isinstance(index, slice) else rows[_as_index(index, len(self))]
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[chosen],
            scores=self.scores[chosen],
            # A slice of masks stays a view: at original size they are by far the largest field.
            masks=None if self.masks is None else self.masks[index if isinstance(index, slice) else chosen],
            embeddings=None if self.embeddings is None else self.embeddings[chosen],
            labels=None if self.labels is None else [self.labels[row] for row in chosen.tolist()],
        )

    def __repr__(self) -> str:
        parts = [f"{len(self)} objects", f"image {self.image_hw[0]} x {self.image_hw[1]}"]
        if self.masks is not None:
            parts.append("masks")
        if self.embeddings is not None:
            parts.append(f"embeddings of width {self.embeddings.shape[1]}")
        if self.labels:
            parts.append(", ".join(self.labels[:5]) + (", ..." if len(self) > 5 else ""))
        return f"ImageObjects({'; '.join(parts)})"

    @classmethod
    def empty(cls, image_hw: tuple[int, int]) -> "ImageObjects":
        """No objects, without masks."""
        return cls(torch.zeros(0, 4), torch.zeros(0), image_hw)

    @classmethod
    def from_boxes(cls, boxes: Any, image_hw: tuple[int, int], scores: Any = None) -> "ImageObjects":
        """Objects from boxes.

        Args:
            boxes: (N, 4) tensor, array or nested list, left, top, right, bottom in pixels of the upright original
                image; an empty list is no object.
            image_hw: size of that image.
            scores: (N,) in [0, 1]; without them all are 1 and the given order is the keep order.

        Raises:
            ValueError: see the class; also where all boxes lie inside the first pixel, as relative coordinates do.
        """
        tensor = _as_tensor(boxes, "boxes_xyxy", torch.float32)
        tensor = tensor.reshape(0, 4) if tensor.numel() == 0 else tensor
        _reject_relative_boxes(tensor, image_hw)
        return cls(tensor, _scores_or_ones(scores, len(tensor)), image_hw)

    @classmethod
    def from_masks(cls, masks: Any, image_hw: tuple[int, int], scores: Any = None) -> "ImageObjects":
        """Objects from masks; boxes are the masks' bounding boxes. Empty masks are dropped with one warning.

        Args:
            masks: (N, H, W) tensor or array of bool or of the numbers 0 and 1; or a list of (H, W) such, or of COCO
                run-length encodings (`{"size": [H, W], "counts": ...}`, compressed or not).
            image_hw: size of the upright original image, which the masks must have.
            scores: (N,) in [0, 1]; without them all are 1 and the given order is the keep order.
        """
        image_hw = _checked_image_hw(image_hw)
        tensor = _as_masks(masks, image_hw)
        boxes, occupied = masks_to_boxes(tensor)
        scores = _as_tensor(_scores_or_ones(scores, len(tensor)), "scores", torch.float32)
        if len(scores) != len(tensor):
            raise ValueError(f"`scores` has {len(scores)} entries for {len(tensor)} masks, expected one per mask.")
        if not occupied.all():
            logger.warning(_empty_masks_message(occupied))
            tensor, boxes, scores = tensor[occupied], boxes[occupied], scores[occupied]
        return cls(boxes, scores, image_hw, tensor)

    @classmethod
    def from_detection(
        cls, result: Mapping[str, Any], image_hw: tuple[int, int], id2label: Mapping[int, str] | None = None
    ) -> "ImageObjects":
        """Objects from one entry of what `post_process_object_detection` of a Transformers image processor returns.

        Boxes that have no area inside the image are dropped with one warning: detectors do predict them.

        Args:
            result: `scores` (N,), `labels` (N,) and `boxes` (N, 4), made with `target_sizes`.
            image_hw: size of the upright original image, as given in `target_sizes`.
            id2label: class names, usually `model.config.id2label`; without it, names are the class numbers.
        """
        missing = [name for name in ("scores", "labels", "boxes") if name not in result]
        if missing:
            raise ValueError(
                f"A detection result has the keys {sorted(result)}, expected 'scores', 'labels' and 'boxes' "
                f"({', '.join(missing)} missing). Pass one entry of the list from `post_process_object_detection`."
            )
        image_hw = _checked_image_hw(image_hw)
        boxes = _as_tensor(result["boxes"], "boxes", torch.float32).reshape(-1, 4)
        _reject_relative_boxes(boxes, image_hw)
        scores = _as_tensor(result["scores"], "scores", torch.float32)
        names = [int(label) for label in result["labels"]]
        labels = [str((id2label or {}).get(name, name)) for name in names]
        if not len(boxes) == len(scores) == len(labels):
            raise ValueError(
                f"A detection result has {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels, expected "
                "equal numbers."
            )
        usable = boxes_inside(boxes, image_hw) | ~boxes.isfinite().all(1)  # NaN is an error, not a small box
        if not usable.all():
            logger.warning(
                f"{int((~usable).sum())} of {len(boxes)} detected boxes have no area inside the image of "
                f"{image_hw[0]} x {image_hw[1]} pixels and are dropped."
            )
        kept = usable.nonzero()[:, 0]
        return cls(boxes[kept], scores[kept], image_hw, labels=[labels[row] for row in kept.tolist()])

    @classmethod
    def from_sam(cls, output: Any, image_hw: tuple[int, int]) -> "ImageObjects":
        """Objects from a generator of masks for the whole image.

        Args:
            output: the list of records of segment-anything's `SamAutomaticMaskGenerator` (its `segmentation` and
                `predicted_iou` are used), or the dictionary with `masks` and `scores` of the "mask-generation"
                pipeline. Predicted IoUs, which may slightly leave [0, 1], are clipped and serve as scores.
            image_hw: size of the upright original image.
        """
        if isinstance(output, Mapping):
            masks, scores = list(output["masks"]), output["scores"]
        else:
            masks = [record["segmentation"] for record in output]
            scores = [record["predicted_iou"] for record in output]
        return cls.from_masks(masks, image_hw, _as_tensor(scores, "scores", torch.float32).clamp(0, 1))

    def with_masks(self, masks: torch.Tensor, scores: torch.Tensor | None = None) -> "ImageObjects":
        """The same objects with other masks (N, H, W) bool, and scores where given; empty masks stay."""
        return replace(self, masks=masks, scores=self.scores if scores is None else scores)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, for `from_dict`; masks as COCO run-length encoding. Nothing is lost."""
        return {
            "image_hw": list(self.image_hw),
            "boxes_xyxy": self.boxes_xyxy.tolist(),
            "scores": self.scores.tolist(),
            "masks": None if self.masks is None else [mask_to_rle(mask) for mask in self.masks],
            "embeddings": None if self.embeddings is None else self.embeddings.tolist(),
            "embedding_dtype": None if self.embeddings is None else str(self.embeddings.dtype).removeprefix("torch."),
            # As text, because columnar stores give all rows of a dictionary the union of their keys.
            "embedding_fingerprint": None if self.embeddings is None else json.dumps(self.embedding_fingerprint),
            "labels": None if self.labels is None else list(self.labels),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageObjects":
        """The objects that `to_dict` wrote; entries that are None may be missing."""
        expected = {field.name for field in fields(cls)} | {"embedding_dtype"}
        unknown = sorted(set(values) - expected)
        missing = sorted({"image_hw", "boxes_xyxy", "scores"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"A dictionary of ImageObjects has unknown keys {unknown} and lacks {missing}; expected "
                f"{sorted(expected)}, as `ImageObjects.to_dict` writes them."
            )
        image_hw = _checked_image_hw(values["image_hw"])
        boxes = torch.tensor(values["boxes_xyxy"], dtype=torch.float32).reshape(-1, 4)
        masks, embeddings = values.get("masks"), values.get("embeddings")
        fingerprint = None
        if embeddings is not None:
            dtype_name = values.get("embedding_dtype") or "float32"
            dtype = getattr(torch, dtype_name, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"`embedding_dtype` is {dtype_name!r}, expected the name of a torch dtype.")
            embeddings = torch.tensor(embeddings, dtype=dtype).reshape(len(boxes), -1)
            fingerprint = json.loads(values["embedding_fingerprint"])
        return cls(
            boxes_xyxy=boxes,
            scores=torch.tensor(values["scores"], dtype=torch.float32),
            image_hw=image_hw,
            masks=None if masks is None else _as_masks(masks, image_hw),
            embeddings=embeddings,
            embedding_fingerprint=fingerprint,
            labels=values.get("labels"),
        )


def boxes_inside(boxes_xyxy: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
    """(N,) bool: which (N, 4) boxes have an area inside the image; False for NaN and reversed corners."""
    clipped = _clipped(boxes_xyxy, image_hw)
    return (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def masks_to_boxes(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounding boxes of masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32 boxes, right and bottom past the last pixel, zeros for empty masks; and (N,) bool, which masks
        are not empty.
    """
    boxes = torch.zeros(len(masks), 4)
    occupied = torch.zeros(len(masks), dtype=torch.bool)
    for row, mask in enumerate(masks):
        ys = mask.any(1).nonzero()
        if len(ys) == 0:
            continue
        xs = mask.any(0).nonzero()
        boxes[row] = torch.stack([xs[0, 0], ys[0, 0], xs[-1, 0] + 1, ys[-1, 0] + 1]).float()
        occupied[row] = True
    return boxes, occupied


def mask_to_rle(mask: torch.Tensor) -> dict[str, Any]:
    """COCO run-length encoding of a (H, W) bool mask, with the compressed counts as an ASCII string."""
    from faster_coco_eval import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def rle_to_mask(rle: Mapping[str, Any], image_hw: tuple[int, int]) -> torch.Tensor:
    """The (H, W) bool mask of a COCO run-length encoding, compressed or not.

    Raises:
        ValueError: no such encoding, or one of another size than the image.
    """
    from faster_coco_eval import mask as coco_mask

    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"A mask has the keys {sorted(rle)}, expected 'size' and 'counts' as in COCO's encoding.")
    size = tuple(int(side) for side in rle["size"])
    if size != tuple(image_hw):
        raise ValueError(
            f"A mask in run-length encoding has size {size}, the image {tuple(image_hw)} (height, width). Encode masks "
            "at the size of the upright original image."
        )
    counts = rle["counts"]
    try:
        if not isinstance(counts, (str, bytes)):
            encoded = coco_mask.frPyObjects({"size": list(size), "counts": [int(count) for count in counts]}, *size)
        else:
            encoded = {"size": list(size), "counts": counts}
        return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(encoded))).bool()
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"The counts of a run-length encoding of size {size} are damaged: {error}") from error


def _as_tensor(value: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
    """`value` on the CPU, without gradient."""
    try:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            value = torch.stack([entry.detach().cpu() for entry in value])
        return torch.as_tensor(value).detach().to("cpu", dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` cannot be read as a table of numbers ({error}); expected a tensor, an array or nested lists of "
            "equal length."
        ) from error


def _as_index(index: Any, number: int) -> torch.Tensor:
    """Row numbers from a list, array or tensor of indices, or of one bool per row."""
    rows = torch.as_tensor(index).cpu()
    if rows.numel() == 0:
        return torch.zeros(0, dtype=torch.long)
    if rows.dtype == torch.bool:
        if rows.shape != (number,):
            raise IndexError(f"A bool index has shape {tuple(rows.shape)}, expected ({number},), one per object.")
        return rows.nonzero()[:, 0]
    if rows.ndim != 1 or rows.is_floating_point():
        raise IndexError(f"An index has shape {tuple(rows.shape)} and dtype {rows.dtype}, expected a list of integers.")
    return rows.long()


def _as_masks(masks: Any, image_hw: tuple[int, int]) -> torch.Tensor:
    """(N, H, W) bool from any of the forms that `from_masks` accepts."""
    if isinstance(masks, (list, tuple)):
        if not masks:
            return torch.zeros(0, *image_hw, dtype=torch.bool)
        if isinstance(masks[0], Mapping):
            return torch.stack([rle_to_mask(rle, image_hw) for rle in masks])
        masks = torch.stack([_zero_one_to_bool(torch.as_tensor(mask), image_hw, row) for row, mask in enumerate(masks)])
    tensor = torch.as_tensor(masks).detach().cpu()
    if tensor.numel() == 0 and tensor.shape[:1] == (0,):
        return torch.zeros(0, *image_hw, dtype=torch.bool)
    if tensor.ndim != 3:
        raise ValueError(
            f"`masks` has shape {tuple(tensor.shape)}, expected (N, {image_hw[0]}, {image_hw[1]}). Write masks[None] "
            "for a single mask."
        )
    return _zero_one_to_bool(tensor, image_hw)


def _zero_one_to_bool(masks: torch.Tensor, image_hw: tuple[int, int], row: int | None = None) -> torch.Tensor:
    where = "`masks`" if row is None else f"`masks[{row}]`"
    if tuple(masks.shape[-2:]) != tuple(image_hw):
        raise ValueError(
            f"{where} has shape {tuple(masks.shape)}, the image {tuple(image_hw)} (height, width): masks of another "
            "frame would cover the wrong pixels. Resize them to the upright original image."
        )
    if masks.dtype == torch.bool:
        return masks
    as_bool = masks != 0
    other = masks[as_bool & (masks != 1)]  # NaN is unequal to both
    if len(other):
        raise ValueError(
            f"{where} has the value {other[0].item()}, expected bool or the numbers 0 and 1. Threshold probabilities "
            "with `masks > 0.5`, logits and 0-to-255 images with `masks > 0`."
        )
    return as_bool


def _scores_or_ones(scores: Any, number: int) -> Any:
    return torch.ones(number) if scores is None else scores


def _empty_masks_message(occupied: torch.Tensor) -> str:
    return f"{int((~occupied).sum())} of {len(occupied)} masks have no pixel and are dropped with their objects."


def _clipped(boxes_xyxy: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
    height, width = image_hw
    return torch.stack(
        [
            boxes_xyxy[:, 0].clamp(0, width),
            boxes_xyxy[:, 1].clamp(0, height),
            boxes_xyxy[:, 2].clamp(0, width),
            boxes_xyxy[:, 3].clamp(0, height),
        ],
        dim=1,
    )


def _reject_relative_boxes(boxes: torch.Tensor, image_hw: tuple[int, int]) -> None:
    """Raises where boxes are fractions of the image: read as pixels they would all mark its upper left corner."""
    if boxes.numel() and boxes.abs().max() <= 1 and min(image_hw) > 2:
        raise ValueError(
            f"All box coordinates lie between {boxes.min():.4g} and {boxes.max():.4g}, expected pixels of an image of "
            f"{image_hw[0]} x {image_hw[1]}; read as pixels they would all mark its upper left corner. Multiply by "
            "width and height, or pass `target_sizes` to `post_process_object_detection`."
        )


def _checked_image_hw(image_hw: Any) -> tuple[int, int]:
    sides = tuple(image_hw) if isinstance(image_hw, Sequence) and not isinstance(image_hw, str) else (image_hw,)
    whole = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"`image_hw` is {image_hw!r}, expected (height, width), two integers above 0.")
    return int(sides[0]), int(sides[1])


def _checked_boxes(boxes_xyxy: Any, image_hw: tuple[int, int]) -> torch.Tensor:
    boxes = _as_tensor(boxes_xyxy, "boxes_xyxy", torch.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"`boxes_xyxy` has shape {tuple(boxes.shape)}, expected (N, 4). Write [[left, top, right, bottom]] for a "
            "single box."
        )
    left, top, right, bottom = boxes.unbind(1)

    def refuse(bad: torch.Tensor, problem: str) -> None:
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            numbers = ", ".join(f"{value:g}" for value in boxes[row].tolist())
            raise ValueError(f"`boxes_xyxy[{row}]` is [{numbers}] {problem}")

    refuse(~boxes.isfinite().all(1), "with NaN or infinite values, expected pixels of the upright original image.")
    refuse(
        (right < left) | (bottom < top),
        "with right < left or bottom < top, expected [left, top, right, bottom]. Was [left, top, width, height] given? "
        "Then add left to the width and top to the height.",
    )
    refuse((right == left) | (bottom == top), "without area, expected right > left and bottom > top.")
    refuse(
        ~boxes_inside(boxes, image_hw),
        f"outside the image of {image_hw[0]} x {image_hw[1]} pixels (height x width). Boxes are in pixels of the "
        "upright original image: not of a resized one, and after the EXIF rotation.",
    )
    return _clipped(boxes, image_hw)


def _checked_scores(scores: Any, number: int) -> torch.Tensor:
    checked = _as_tensor(scores, "scores", torch.float32)
    if checked.shape != (number,):
        raise ValueError(f"`scores` has shape {tuple(checked.shape)}, expected ({number},), one per box.")
    bad = ~((checked >= 0) & (checked <= 1))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"`scores[{row}]` is {checked[row].item():g}, expected a number in [0, 1]. Apply a sigmoid or softmax to "
            "logits."
        )
    return checked


def _checked_masks(masks: Any, number: int, image_hw: tuple[int, int]) -> torch.Tensor | None:
    if masks is None:
        return None
    checked = torch.as_tensor(masks).detach().cpu()
    if checked.dtype != torch.bool:
        raise ValueError(
            f"`masks` has dtype {checked.dtype}, expected torch.bool. `ImageObjects.from_masks` also reads 0 and 1 and "
            "run-length encodings."
        )
    if tuple(checked.shape) != (number, *image_hw):
        raise ValueError(
            f"`masks` has shape {tuple(checked.shape)}, expected {(number, *image_hw)}: one mask per box, in the frame "
            "of the upright original image."
        )
    return checked


def _checked_embeddings(embeddings: Any, fingerprint: Any, number: int) -> torch.Tensor | None:
    if (embeddings is None) != (fingerprint is None):
        found, lacking = ("embeddings", "embedding_fingerprint")[:: 1 if fingerprint is None else -1]
        raise ValueError(
            f"`{found}` is given without `{lacking}`, expected both or neither: embeddings of an unknown vision tower "
            "would be used with the wrong one unnoticed."
        )
    if embeddings is None:
        return None
    try:
        json_able = isinstance(fingerprint, (str, dict)) and bool(json.dumps(fingerprint))
    except (TypeError, ValueError):
        json_able = False
    if not json_able:
        raise ValueError(
            f"`embedding_fingerprint` is {fingerprint!r}, expected a string or a dictionary that JSON can hold."
        )
    checked = torch.as_tensor(embeddings).detach().cpu()
    if checked.ndim != 2 or len(checked) != number or not checked.is_floating_point():
        raise ValueError(
            f"`embeddings` has shape {tuple(checked.shape)} and dtype {checked.dtype}, expected ({number}, D) floating "
            "point, one row per box."
        )
    bad = ~checked.isfinite().all(1)
    if bad.any():
        raise ValueError(f"`embeddings[{int(bad.nonzero()[0, 0])}]` has NaN or infinite values.")
    return checked


def _checked_labels(labels: Any, number: int) -> list[str] | None:
    if labels is None:
        return None
    names = list(labels)
    if isinstance(labels, str) or len(names) != number:
        raise ValueError(f"`labels` has {len(names)} entries, expected {number} class names, one per box.")
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"`labels[{row}]` is {name!r}, expected a string.")
    return names
