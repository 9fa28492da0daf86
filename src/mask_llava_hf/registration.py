# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Makes Transformers' Auto classes, and what looks classes up by name, know Mask-LLaVA. Runs once, on import."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto import modeling_auto

from .modeling.configuration_mask_llava import MaskLlavaConfig
from .modeling.modeling_mask_llava import MaskLlavaForConditionalGeneration, MaskLlavaModel
from .processing.processing_mask_llava import MaskLlavaProcessor


def register() -> None:
    """Registers config, models and processor; safe to call again."""
    AutoConfig.register(MaskLlavaConfig.model_type, MaskLlavaConfig, exist_ok=True)
    AutoModel.register(MaskLlavaConfig, MaskLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(MaskLlavaConfig, MaskLlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(MaskLlavaConfig, MaskLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(MaskLlavaConfig, MaskLlavaProcessor, exist_ok=True)
    # `transformers serve` does not ask the Auto classes but these tables of names
    for table in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        table.setdefault(MaskLlavaConfig.model_type, MaskLlavaForConditionalGeneration.__name__)
