# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""`ImageObjects`: the objects of one image, the value that passes between detection, segmentation, order and embedding.

Connectors bring other sources into it: plain boxes and masks, COCO run-length encoding, the output of Transformers'
object-detection post-processing and of SAM's mask generators.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .mask_formats import as_masks, mask_to_rle, masks_to_boxes
from .object_fields import (
    as_index,
    as_tensor,
    boxes_inside,
    checked_boxes,
    checked_embeddings,
    checked_image_hw,
    checked_labels,
    checked_masks,
    checked_scores,
    reject_relative_boxes,
)


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
        image_hw = checked_image_hw(self.image_hw)
        boxes = checked_boxes(self.boxes_xyxy, image_hw)
        number = len(boxes)
        checked = {
            "image_hw": image_hw,
            "boxes_xyxy": boxes,
            "scores": checked_scores(self.scores, number),
            "masks": checked_masks(self.masks, number, image_hw),
            "embeddings": checked_embeddings(self.embeddings, self.embedding_fingerprint, number),
            "labels": checked_labels(self.labels, number),
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
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self  # nothing of it changes, and checking it again takes longer than anything else here
        rows = torch.arange(len(self))
        chosen = rows[index] if isinstance(index, slice) else rows[as_index(index, len(self))]
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
        tensor = as_tensor(boxes, "boxes_xyxy", torch.float32)
        tensor = tensor.reshape(0, 4) if len(tensor.shape) and len(tensor) == 0 else tensor
        reject_relative_boxes(tensor, image_hw)
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
        image_hw = checked_image_hw(image_hw)
        tensor = as_masks(masks, image_hw)
        boxes, occupied = masks_to_boxes(tensor)
        scores = as_tensor(_scores_or_ones(scores, len(tensor)), "scores", torch.float32)
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
        image_hw = checked_image_hw(image_hw)
        boxes = as_tensor(result["boxes"], "boxes", torch.float32).reshape(-1, 4)
        reject_relative_boxes(boxes, image_hw)
        scores = as_tensor(result["scores"], "scores", torch.float32)
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
        return cls.from_masks(masks, image_hw, as_tensor(scores, "scores", torch.float32).clamp(0, 1))

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
            "embedding_width": None if self.embeddings is None else self.embeddings.shape[1],
            # As text, because columnar stores give all rows of a dictionary the union of their keys.
            "embedding_fingerprint": None if self.embeddings is None else json.dumps(self.embedding_fingerprint),
            "labels": None if self.labels is None else list(self.labels),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageObjects":
        """The objects that `to_dict` wrote; entries that are None may be missing."""
        expected = {field.name for field in fields(cls)} | {"embedding_dtype", "embedding_width"}
        unknown = sorted(set(values) - expected)
        missing = sorted({"image_hw", "boxes_xyxy", "scores"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"A dictionary of ImageObjects has unknown keys {unknown} and lacks {missing}; expected "
                f"{sorted(expected)}, as `ImageObjects.to_dict` writes them."
            )
        image_hw = checked_image_hw(values["image_hw"])
        boxes = torch.tensor(values["boxes_xyxy"], dtype=torch.float32)
        boxes = boxes.reshape(0, 4) if len(values["boxes_xyxy"]) == 0 else boxes
        masks, embeddings = values.get("masks"), values.get("embeddings")
        fingerprint = values.get("embedding_fingerprint")
        if embeddings is not None:
            dtype_name = values.get("embedding_dtype") or "float32"
            dtype = getattr(torch, dtype_name, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"`embedding_dtype` is {dtype_name!r}, expected the name of a torch dtype.")
            embeddings = torch.tensor(embeddings, dtype=dtype)
            if len(embeddings) == 0:
                embeddings = embeddings.reshape(0, values.get("embedding_width") or 0)
            fingerprint = json.loads(fingerprint) if isinstance(fingerprint, str) else fingerprint
        return cls(
            boxes_xyxy=boxes,
            scores=torch.tensor(values["scores"], dtype=torch.float32),
            image_hw=image_hw,
            masks=None if masks is None else as_masks(masks, image_hw),
            embeddings=embeddings,
            embedding_fingerprint=fingerprint,
            labels=values.get("labels"),
        )


def _scores_or_ones(scores: Any, number: int) -> Any:
    return torch.ones(number) if scores is None else scores


def _empty_masks_message(occupied: torch.Tensor) -> str:
    return f"{int((~occupied).sum())} of {len(occupied)} masks have no pixel and are dropped with their objects."
