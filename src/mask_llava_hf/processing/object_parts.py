# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The heavy parts of one processor: found by its settings, loaded when first needed, shared through the part cache."""

import contextlib
import hashlib
import json
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.modeling_mask_llava import MaskLlavaModel
from .mask_embedder import MaskEmbedder
from .object_settings import ObjectSettings
from .objects.detectors import ObjectDetector
from .objects.image_objects import ImageObjects
from .objects.segmenters import Segmenter, load_segmenter
from .part_sources import (
    PartSource,
    concrete_device,
    load_part,
    loaded_part,
    refuse_in_worker,
    source_of,
)
from .vision_towers import find_tower, fingerprint_settings, fingerprint_weights, read_model_config, read_tower


logger = logging.get_logger(__name__)

PART_NAMES = ("detector", "segmenter", "vision_tower")

_MENDS = {
    "detector": "so no objects can be found. Name a detector (any object-detection model of Transformers), or give "
    "`boxes`, `masks` or `objects`.",
    "segmenter": "so boxes cannot become masks. Name a segmenter (SAM or its kin), set "
    '`object_settings["mask_source"]` to "boxes" to take the boxes themselves, or give `masks`.',
    "vision_tower": "and this processor was not loaded from a checkpoint, so nothing can embed objects. Call "
    "`share_vision_tower(model)`, load the processor from the model's checkpoint, name a tower, or set "
    '`object_settings["mask_inversion"]` to "model".',
}

# Models whose tower processors share, by the key those processors carry. A processor does not keep a model alive.
_shared_models: weakref.WeakValueDictionary[str, MaskLlavaModel] = weakref.WeakValueDictionary()


def share_model(model: torch.nn.Module) -> str:
    """Makes a model's tower available under the returned key, as long as the model lives.

    Raises:
        ValueError: not a Mask-LLaVA model, with or without head or PEFT wrapper.
    """
    unwrap: Any = getattr(model, "get_base_model", None)  # of a PEFT model
    inner: Any = model if unwrap is None else unwrap()
    inner = getattr(inner, "base_model", inner)
    if not isinstance(inner, MaskLlavaModel):
        raise ValueError(
            f"`share_vision_tower` needs a Mask-LLaVA model, got {type(model).__name__}: its tower would not be the "
            "one this processor's embeddings are made for."
        )
    key = uuid.uuid4().hex
    _shared_models[key] = inner
    return key


@dataclass(frozen=True)
class ObjectParts:
    """Detector, segmenter and mask embedder of a processor.

    Attributes:
        settings: name the sources.
        checkpoint: where the processor was loaded from; None if it was built in memory.
        device, dtype: where parts run; None: the current accelerator or CPU, and each part's own dtype.
        shared_model_key: of `share_model`; its tower goes before any other.
    """

    settings: ObjectSettings
    checkpoint: PartSource | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    shared_model_key: str | None = None

    def detector(self) -> ObjectDetector:
        return self._load("detector", ObjectDetector.from_pretrained)

    def segmenter(self) -> Segmenter:
        return self._load("segmenter", load_segmenter)

    def mask_embedder(self) -> MaskEmbedder:
        """The tower that embeds masks: a shared one, the one the settings name, or the checkpoint's own."""
        refuse_in_worker("vision_tower")
        shared = self._shared_model()
        if shared is not None:
            return MaskEmbedder(shared.vision_tower, shared.config)
        source, config = self._find_tower()
        device, dtype = concrete_device(self.device), self.dtype
        tower = load_part("vision_tower", source, lambda found: read_tower(found, device, dtype), device, dtype)
        return MaskEmbedder(tower, config)

    def require_tower(self) -> None:
        """Fails now, before other parts have worked in vain, if no tower can be found. Nothing is loaded."""
        refuse_in_worker("vision_tower")
        if self._shared_model() is None:
            self._find_tower()

    def fingerprint(self, image_processor: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """What embeddings made now depend on, as far as it is known.

        The tower's hash is missing where the tower is not loaded, and the method's settings where no checkpoint tells
        them.
        """
        shared = self._shared_model()
        tower, config = (None, None) if shared is None else (shared.vision_tower, shared.config)
        if shared is None:
            with contextlib.suppress(ValueError):  # stored embeddings do for a processor that knows no tower
                source, config = self._find_tower()
                tower = loaded_part("vision_tower", source, concrete_device(self.device), self.dtype)
        fingerprint = fingerprint_settings(config, image_processor, overrides)
        in_worker = torch.utils.data.get_worker_info() is not None  # where a shared tower may be out of reach
        return (
            fingerprint if tower is None or in_worker else {"vision_tower": fingerprint_weights(tower), **fingerprint}
        )

    def objects_fingerprint(self, image_processor: Any, cap: int) -> dict[str, Any]:
        """Everything that objects found now depend on, JSON-able; the parts are loaded, as their weights belong to it.

        Where a part lies (`source`) is told for people; what it does shows in its weights and its preprocessing.

        Args:
            cap: the most objects per image.
        """
        settings = self.settings
        parts: dict[str, Any] = {"detector": self.detector()}
        if settings.mask_source == "segmenter":
            parts["segmenter"] = self.segmenter()
        embedder = self.mask_embedder() if settings.mask_inversion == "processor" else None
        models = {name: part.model for name, part in parts.items()}
        if embedder is not None:
            models["vision_tower"] = embedder.vision_tower
        choices = ("score_threshold", "max_candidates", "mask_source", "order", "mask_inversion")
        return {
            "max_object_tokens": cap,
            **{name: getattr(settings, name) for name in choices},
            **{name: {"source": getattr(settings, name), **_fingerprint_part(part)} for name, part in parts.items()},
            "pixels": fingerprint_settings(None, image_processor)["pixels"],
            "embedding": None if embedder is None else self.fingerprint(image_processor, {}),
            # Embeddings made in another precision can end elsewhere
            "dtypes": {name: str(next(model.parameters()).dtype)[6:] for name, model in models.items()},
        }

    def _find_tower(self) -> tuple[PartSource, MaskLlavaConfig]:
        """Where the tower is, and the config to embed with; both without loading weights."""
        source = self._source("vision_tower")
        if source is None:
            raise ValueError(f'`object_settings["vision_tower"]` is None, {_MENDS["vision_tower"]}')
        place, config = load_part("tower location", source, find_tower)
        if config is None and self.checkpoint is not None:  # a bare tower
            config = load_part("model config", self.checkpoint, read_model_config)
        return place, config or MaskLlavaConfig()

    def _shared_model(self) -> MaskLlavaModel | None:
        if self.shared_model_key is None:
            return None
        model = _shared_models.get(self.shared_model_key)
        if model is None:
            logger.warning_once(
                "The model whose vision tower was shared with this processor is gone (or in another process); the "
                "checkpoint's own tower makes the embeddings instead, which may have other weights."
            )
        return model

    def _source(self, name: str) -> PartSource | None:
        setting = getattr(self.settings, name)
        if setting is not None:
            return source_of(setting, self.checkpoint)
        return self.checkpoint if name == "vision_tower" else None

    def _load(self, name: str, load: Callable[..., Any]) -> Any:
        source = self._source(name)
        if source is None:
            raise ValueError(f'`object_settings["{name}"]` is None, {_MENDS[name]}')
        refuse_in_worker(name)
        device, dtype = concrete_device(self.device), self.dtype
        return load_part(
            name,
            source,
            lambda found: load(found.location, revision=found.revision, device=device, dtype=dtype),
            device,
            dtype,
        )


def _fingerprint_part(part: Any) -> dict[str, str]:
    """Hashes of a detector's or segmenter's weights and preprocessing (segment-anything's own is part of its code)."""
    processing = {} if getattr(part, "image_processor", None) is None else part.image_processor.to_dict()
    text = json.dumps(processing, default=dict, sort_keys=True)
    return {
        "weights": fingerprint_weights(part.model),
        "preprocessing": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def check_fingerprint(objects: ImageObjects, expected: Mapping[str, Any], image: int) -> None:
    """Checks that stored embeddings were made as this processor would make them.

    Args:
        expected: of `ObjectParts.fingerprint`; what is not known there is not compared.

    Raises:
        ValueError: names the first field that differs, with both values.
    """
    found = objects.embedding_fingerprint
    stored = found if isinstance(found, dict) else {"embedding_fingerprint": found}
    for name in sorted(expected):
        if stored.get(name) != expected.get(name):
            raise ValueError(
                f"The embeddings in `objects` of image {image} were made with {name}={stored.get(name)!r}, but this "
                f"processor makes them with {expected.get(name)!r}. The model would read them as something else. "
                "Make them again with `find_objects`, or drop them: `dataclasses.replace(objects, embeddings=None, "
                "embedding_fingerprint=None)`."
            )
