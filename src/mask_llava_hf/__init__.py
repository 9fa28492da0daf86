# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Mask-LLaVA (arXiv 2602.04864) as native Hugging Face Transformers classes.

Importing this package registers them: `AutoModelForImageTextToText`, `AutoProcessor`, `pipeline("image-text-to-text")`
and their kin then load Mask-LLaVA checkpoints like any other.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .modeling.configuration_mask_llava import MaskLlavaConfig
from .modeling.modeling_mask_llava import QUANTIZATION_SKIP_MODULES, MaskLlavaForConditionalGeneration, MaskLlavaModel
from .processing.collator import MaskLlavaCollator
from .processing.conversations import load_conversations
from .processing.objects.image_objects import ImageObjects
from .processing.processing_mask_llava import MaskLlavaProcessor
from .registration import register


if TYPE_CHECKING:
    from .processing.object_store import ObjectStore

__version__ = "0.1.0.dev0"

# A small trained Mask-LLaVA with all its parts, for `from_pretrained`: its README.md says how it was made and what it
# cannot do.
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "default_checkpoint")

__all__ = [
    "DEFAULT_CHECKPOINT",
    "QUANTIZATION_SKIP_MODULES",
    "ImageObjects",
    "MaskLlavaCollator",
    "MaskLlavaConfig",
    "MaskLlavaForConditionalGeneration",
    "MaskLlavaModel",
    "MaskLlavaProcessor",
    "ObjectStore",
    "load_conversations",
]


def __getattr__(name: str) -> Any:
    if name == "ObjectStore":  # reads Parquet; whoever only runs models need not wait for pyarrow
        from .processing.object_store import ObjectStore

        return ObjectStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
