# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Objects of images by any detector that Transformers' `AutoModelForObjectDetection` loads."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .image_objects import ImageObjects
from .object_fields import boxes_inside


class ObjectDetector:
    """A detection transformer with its image processor.

    Candidates are taken from the model's own outputs, best class per query. Transformers' post-processing is not used,
    because for some families (Deformable DETR, RT-DETR) it ranks query-class pairs, so that one box can come twice.

    Args:
        model: a detector whose outputs have `logits` (B, Q, C) and `pred_boxes` (B, Q, 4), centre x, centre y, width,
            height relative to the image. On a CPU its convolutions are laid out channels last.
        image_processor: the one it was trained with.
        batch_size: images per forward pass.
    """

    def __init__(self, model: PreTrainedModel, image_processor: Any, batch_size: int = 8) -> None:
        self.model = model.eval()
        if next(model.parameters()).device.type == "cpu":
            # A fifth faster for RT-DETR with ResNet-50; scores move by less than 1e-5, boxes by less than 1e-3 pixels
            model.to(memory_format=torch.channels_last)
        self.image_processor = image_processor
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "ObjectDetector":
        """Loads a detector.

        Args:
            source: Hub id or folder, with the image processor's settings beside the weights.
            revision: branch, tag or commit on the Hub.
            device: where the model runs; objects come back to the CPU.
            dtype: None for the one the checkpoint was saved in.

        Raises:
            ValueError: the checkpoint is not a detector.
        """
        config = AutoConfig.from_pretrained(source, revision=revision)
        if config.model_type not in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            raise ValueError(
                f"The detector {str(source)!r} has model_type {config.model_type!r}, expected one that "
                "AutoModelForObjectDetection loads, such as 'deformable_detr', 'rt_detr' or 'd_fine'."
            )
        model = AutoModelForObjectDetection.from_pretrained(
            source, revision=revision, config=config, dtype=dtype or "auto"
        )
        image_processor = AutoImageProcessor.from_pretrained(source, revision=revision)
        return cls(model.to(device), image_processor)

    def detect(
        self, images: Sequence[Image.Image], score_threshold: float = 0.05, max_candidates: int = 50
    ) -> list[ImageObjects]:
        """Finds the objects of each image.

        Images are never padded for the sake of a batch: those that the image processor brings to one size share a
        forward pass, so that an image's objects do not depend on its neighbours.

        Args:
            images: upright RGB images.
            score_threshold: lowest score of a candidate.
            max_candidates: candidates per image, those with the highest scores.

        Returns:
            per image the candidates by falling score, without masks, labelled by the detector's class names. Boxes
            without area inside the image are left out.

        Raises:
            ValueError: NaN in the detector's output, or outputs of another kind than a detection transformer's.
        """
        inputs = [self.image_processor(images=image, return_tensors="pt") for image in images]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, entry in enumerate(inputs):
            by_shape.setdefault(tuple(entry["pixel_values"].shape), []).append(index)
        found: dict[int, ImageObjects] = {}
        for indices in by_shape.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                scores, classes, boxes = self._forward([inputs[index] for index in batch])
                for row, index in enumerate(batch):
                    image_hw = (images[index].height, images[index].width)
                    pixels = boxes[row] * self._pixels_per_unit(inputs[index], image_hw)
                    found[index] = self._candidates(
                        scores[row], classes[row], pixels, image_hw, score_threshold, max_candidates
                    )
        return [found[index] for index in range(len(images))]

    def _forward(self, inputs: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores (B, Q), classes (B, Q) and relative boxes (B, Q, 4) left, top, right, bottom; float32 on the CPU."""
        parameter = next(self.model.parameters())
        arguments = {
            "pixel_values": torch.cat([entry["pixel_values"] for entry in inputs]).to(parameter.device, parameter.dtype)
        }
        if all("pixel_mask" in entry for entry in inputs):
            # YOLOS' image processor makes a mask that its model does not take, but tolerates.
            arguments["pixel_mask"] = torch.cat([entry["pixel_mask"] for entry in inputs]).to(parameter.device)
        with torch.inference_mode():
            outputs = self.model(**arguments)
        logits, centres = outputs.get("logits"), outputs.get("pred_boxes")
        if logits is None or centres is None:
            raise ValueError(
                f"The detector (model_type {self.model.config.model_type!r}) returned {sorted(outputs)}, expected "
                "'logits' and 'pred_boxes' as from a detection transformer. Use one of the DETR, YOLOS or D-FINE kind."
            )
        # Copied outside inference mode, so that anything may be done with what comes of them.
        logits, centres = (values.to("cpu", torch.float32, copy=True) for values in (logits, centres))
        for name, values in (("logits", logits), ("pred_boxes", centres)):
            if values.isnan().any():
                raise ValueError(
                    f"The detector returned NaN in {int(values.isnan().sum())} of {values.numel()} {name}; its objects "
                    f"would be arbitrary. It runs in {parameter.dtype}: load it with dtype torch.float32 or "
                    "torch.bfloat16, and check the image for NaN pixels."
                )
        scores, classes = class_probabilities(logits, self.model.config.num_labels).max(-1)
        middle, extent = centres[..., :2], centres[..., 2:]
        return scores, classes, torch.cat([middle - extent / 2, middle + extent / 2], dim=-1)

    def _pixels_per_unit(self, inputs: Any, image_hw: tuple[int, int]) -> torch.Tensor:
        """(4,) original pixels per unit of a relative box.

        Only an image processor with a fixed `pad_size` pads a single image (right and below). It then also makes
        training boxes relative to the padded frame, so a unit is that frame.
        """
        height, width = image_hw
        mask = inputs.get("pixel_mask")
        if mask is not None:
            height = height * mask.shape[-2] / int(mask[0].any(1).sum())
            width = width * mask.shape[-1] / int(mask[0].any(0).sum())
        return torch.tensor([width, height, width, height])

    def _candidates(
        self,
        scores: torch.Tensor,
        classes: torch.Tensor,
        boxes: torch.Tensor,
        image_hw: tuple[int, int],
        score_threshold: float,
        max_candidates: int,
    ) -> ImageObjects:
        """The best queries of one image; of equal scores the earlier query first."""
        usable = (scores >= score_threshold) & boxes_inside(boxes, image_hw)
        ranked = scores.masked_fill(~usable, -1).argsort(descending=True, stable=True)
        kept = ranked[: min(max_candidates, int(usable.sum()))]
        id2label = self.model.config.id2label
        labels = [str(id2label.get(label, label)) for label in classes[kept].tolist()]
        return ImageObjects(boxes[kept], scores[kept], image_hw, labels=labels)


def class_probabilities(logits: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Class probabilities of a detection transformer's queries.

    The width of the logits tells which of the two kinds of head they come from. One class more than `num_labels`: the
    last is "no object" and a softmax spans all (DETR, Table Transformer, YOLOS). Exactly `num_labels`: each class is
    its own yes or no (Deformable, Conditional, DAB, RT, LW and RF DETR, D-FINE, DEIM).

    Args:
        logits: (..., num_labels) or (..., num_labels + 1).

    Returns:
        (..., num_labels) in [0, 1].

    Raises:
        ValueError: logits of another width.
    """
    if logits.shape[-1] == num_labels + 1:
        return logits.softmax(-1)[..., :-1]
    if logits.shape[-1] == num_labels:
        return logits.sigmoid()
    raise ValueError(
        f"The detector's logits have width {logits.shape[-1]}, expected {num_labels} (a sigmoid per class) or "
        f"{num_labels + 1} (softmax with a last class for no object), as its config has num_labels={num_labels}. "
        "With another width the scores would be wrong: correct `id2label` in its config."
    )
