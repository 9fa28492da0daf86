"""The heavy parts of one processor: found by its settings, loaded when first needed, shared through the part cache."""

import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.modeling_mask_llava import MaskLlavaModel
from .mask_embedder import MaskEmbedder, fingerprint_settings, load_mask_embedder, read_model_config
from .object_settings import ObjectSettings
from .objects.detectors import ObjectDetector
from .objects.image_objects import ImageObjects
from .objects.segmenters import load_segmenter
from .part_sources import PartSource, default_device, load_part, loaded_part, resolve_source, unload_parts


PART_NAMES = ("detector", "segmenter", "vision_tower")

_LOADERS: dict[str, Callable[..., Any]] = {
    "detector": ObjectDetector.from_pretrained,
    "segmenter": load_segmenter,
    "vision_tower": load_mask_embedder,
}
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
        return self._load("detector")

    def segmenter(self) -> Any:
        return self._load("segmenter")

    def mask_embedder(self) -> MaskEmbedder:
        """The tower that embeds masks: a shared one, the one the settings name, or the checkpoint's own."""
        shared = self._shared_model()
        if shared is not None:
            return MaskEmbedder(_tower(shared), shared.config)
        return self._load("vision_tower", settings_from=self._embedding_config())

    def unload(self) -> None:
        for name in PART_NAMES:
            source = self._source(name)
            if source is not None:
                unload_parts(name, source)

    def check_fingerprint(self, objects: ImageObjects, image: int) -> None:
        """Checks that stored embeddings were made as this processor would make them.

        The tower's weights are compared when this processor has it loaded; otherwise the settings alone are.

        Raises:
            ValueError: names the first field that differs, with both values.
        """
        expected = self._expected_fingerprint()
        found = objects.embedding_fingerprint
        for name in sorted({*expected, *(found if isinstance(found, dict) else {})}):
            if name not in expected and name == "vision_tower":
                continue
            stored = found.get(name) if isinstance(found, dict) else found
            if stored != expected.get(name):
                raise ValueError(
                    f"The embeddings in `objects` of image {image} were made with {name}={stored!r}, but this "
                    f"processor makes them with {expected.get(name)!r}. The model would read them as something else. "
                    "Make them again with `find_objects`, or drop them: `dataclasses.replace(objects, "
                    "embeddings=None, embedding_fingerprint=None)`."
                )

    def _expected_fingerprint(self) -> dict[str, Any]:
        shared, source = self._shared_model(), self._source("vision_tower")
        if shared is not None:
            return MaskEmbedder(_tower(shared), shared.config).fingerprint
        embedder = loaded_part("vision_tower", source, self._device(), self.dtype) if source is not None else None
        return embedder.fingerprint if embedder else fingerprint_settings(self._embedding_config())

    def _embedding_config(self) -> MaskLlavaConfig:
        beside = read_model_config(self.checkpoint) if self.checkpoint is not None else None
        return beside or MaskLlavaConfig()

    def _shared_model(self) -> MaskLlavaModel | None:
        return None if self.shared_model_key is None else _shared_models.get(self.shared_model_key)

    def _device(self) -> torch.device:
        return self.device if self.device is not None else default_device()

    def _source(self, name: str) -> PartSource | None:
        setting = getattr(self.settings, name)
        if setting is not None:
            return resolve_source(setting, self.checkpoint)
        return self.checkpoint if name == "vision_tower" else None

    def _load(self, name: str, **options: Any) -> Any:
        source = self._source(name)
        if source is None:
            raise ValueError(f'`object_settings["{name}"]` is None, {_MENDS[name]}')
        return load_part(name, source, self._device(), self.dtype, _LOADERS[name], **options)


def _tower(model: MaskLlavaModel) -> PreTrainedModel:
    return model.vision_tower
