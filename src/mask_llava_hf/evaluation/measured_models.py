# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Where the models come from whose cost is measured: published shapes with random weights, or a saved checkpoint."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForObjectDetection,
    AutoProcessor,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.modeling_mask_llava import MaskLlavaMultiModalProjector
from ..processing.objects.detectors import ObjectDetector
from ..processing.objects.segmenters import TransformersSegmenter, load_segmenter
from ..processing.part_sources import PartSource, download, source_of
from ..processing.processing_mask_llava import MaskLlavaProcessor
from .measuring import SEED
from .published_shapes import DETECTORS, SEGMENTERS, Shape, llava_1_5_7b


@dataclass(frozen=True)
class VisionParts:
    """A vision tower, the projector behind it, and the image processor before it."""

    tower: Any
    projector: nn.Module
    image_processor: Any


class Models(Protocol):
    """Loads the models of a chain one by one; must be picklable, as each part is measured in a process of its own."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What all models run in."""
        ...

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names that `detector` takes."""
        ...

    @property
    def segmenters(self) -> tuple[str, ...]:
        """Names that `segmenter` takes."""
        ...

    @property
    def usual_parts(self) -> tuple[str, str]:
        """The detector and the segmenter of most chains; the others are tried in their place."""
        ...

    @property
    def on_meta(self) -> bool:
        """Whether models can be built without weights, to count operations."""
        ...

    def config(self) -> MaskLlavaConfig:
        """The configuration of the Mask-LLaVA."""
        ...

    def detector(self, name: str, device: str) -> tuple[Any, Any]:
        """A detection model and its image processor."""
        ...

    def segmenter(self, name: str, device: str) -> tuple[Any, Any]:
        """A SAM-like model and its image processor."""
        ...

    def vision(self, device: str) -> VisionParts:
        """The tower and what belongs to it."""
        ...

    def language_model(self, device: str) -> Any:
        """A model that takes `inputs_embeds` (1, L, text width) and gives logits."""
        ...


@dataclass(frozen=True)
class PublishedShapes:
    """LLaVA-1.5-7B with published detectors and segmenters, all weights random. See `Models`."""

    dtype: torch.dtype = torch.bfloat16
    name: str = "LLaVA-1.5-7B"
    detectors: tuple[str, ...] = tuple(DETECTORS)
    segmenters: tuple[str, ...] = tuple(SEGMENTERS)
    usual_parts: tuple[str, str] = ("RT-DETR R18", "SAM 2.1 tiny")
    on_meta: bool = True

    def config(self) -> MaskLlavaConfig:
        return llava_1_5_7b()[0]

    def detector(self, name: str, device: str) -> tuple[Any, Any]:
        return self._random(AutoModelForObjectDetection, DETECTORS[name](), device)

    def segmenter(self, name: str, device: str) -> tuple[Any, Any]:
        return self._random(AutoModel, SEGMENTERS[name](), device)

    def vision(self, device: str) -> VisionParts:
        config, image_processor = llava_1_5_7b()
        tower, _ = self._random(CLIPVisionModel, (config.vision_config, None), device)
        with torch.device(device):
            projector = MaskLlavaMultiModalProjector(config).to(self.dtype)
        return VisionParts(tower, projector.requires_grad_(False), image_processor)

    def language_model(self, device: str) -> Any:
        return self._random(AutoModelForCausalLM, (self.config().text_config, None), device)[0]

    def _random(self, auto_class: Any, shape: Shape | tuple[PreTrainedConfig, None], device: str) -> tuple[Any, Any]:
        config, image_processor = shape
        with torch.device(device), no_init_weights():
            build = auto_class._from_config if issubclass(auto_class, PreTrainedModel) else auto_class.from_config
            model = build(config, dtype=self.dtype).eval().requires_grad_(False)
        if device != "meta":
            fill_at_random(model)
        return model, image_processor


@torch.no_grad()
def fill_at_random(model: nn.Module) -> None:
    """Gives every parameter ordinary numbers, in place and quickly: billions of draws would take minutes."""
    block = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(SEED))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # gains of norms, and biases
            parameter.fill_(float(name.endswith("weight")))
            continue
        numbers, flat = block.to(parameter.dtype), parameter.view(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint of Mask-LLaVA with the detector and segmenter that its processor names, on the CPU. See `Models`."""

    source: str
    dtype: torch.dtype = torch.float32
    detectors: tuple[str, ...] = ("its detector",)
    segmenters: tuple[str, ...] = ("its segmenter",)
    usual_parts: tuple[str, str] = ("its detector", "its segmenter")
    on_meta: bool = False

    @property
    def name(self) -> str:
        return self.source.rstrip("/").rsplit("/", 1)[-1]

    def config(self) -> MaskLlavaConfig:
        config = AutoConfig.from_pretrained(self.source)
        if not isinstance(config, MaskLlavaConfig):
            raise ValueError(
                f"{self.source!r} is a {config.model_type!r}, expected a checkpoint of a Mask-LLaVA. A LLaVA becomes "
                "one by `mask-llava convert`."
            )
        return config

    def processor(self) -> MaskLlavaProcessor:
        return AutoProcessor.from_pretrained(self.source)

    def model(self) -> Any:
        """The whole Mask-LLaVA."""
        return AutoModelForImageTextToText.from_pretrained(self.source, dtype=self.dtype).eval().requires_grad_(False)

    def detector(self, name: str, device: str) -> tuple[Any, Any]:
        place = self._part("detector")
        detector = ObjectDetector.from_pretrained(place.location, revision=place.revision, dtype=self.dtype)
        return detector.model, detector.image_processor

    def segmenter(self, name: str, device: str) -> tuple[Any, Any]:
        place = self._part("segmenter")
        segmenter = load_segmenter(place.location, revision=place.revision, dtype=self.dtype)
        if not isinstance(segmenter, TransformersSegmenter):
            raise ValueError(
                "The checkpoint's segmenter is a `.pth` file of segment-anything; its encoder and decoder are measured "
                "only in Transformers' form. Convert it: mask-llava convert FILE.pth FOLDER."
            )
        return segmenter.model, segmenter.image_processor

    def vision(self, device: str) -> VisionParts:
        model = self.model().model
        return VisionParts(model.vision_tower, model.multi_modal_projector, self.processor().image_processor)

    def language_model(self, device: str) -> Any:
        return self.model()

    def _part(self, name: str) -> PartSource:
        setting = self.processor().object_settings.get(name)
        if setting is None:
            raise ValueError(f"{self.source!r} names no {name}, so there is no chain to measure. Save one with it.")
        return download(source_of(setting, PartSource.of(self.source)))
