# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Puts trained parts together into a Mask-LLaVA checkpoint, whose projector is still random."""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM, LlavaImageProcessor

from mask_llava_hf import MaskLlavaConfig, MaskLlavaForConditionalGeneration, MaskLlavaProcessor
from mask_llava_hf.processing.chat_templates import vicuna_v1


def assemble(
    output_dir: Path,
    *,
    vision_tower: Path,
    language_model: Path,
    detector: Path,
    segmenter: Path,
    mask_inversion_lr: float,
    score_threshold: float,
    seed: int = 0,
    **config_overrides,
) -> Path:
    """Writes the checkpoint folder: model, processor, and the parts `./detector` and `./segmenter`.

    Args:
        vision_tower, language_model, detector, segmenter: folders of the trained parts.
        mask_inversion_lr: step size of MaskInversion.
        score_threshold: of the detector.
        seed: of the projector's weights.
        config_overrides: fields of `MaskLlavaConfig`.
    """
    tower, language = CLIPVisionModel.from_pretrained(vision_tower), LlamaForCausalLM.from_pretrained(language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    config = MaskLlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=language.config.tie_word_embeddings,
        mask_inversion={"lr": mask_inversion_lr},
        **config_overrides,
    )
    torch.manual_seed(seed)
    model = MaskLlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.save_pretrained(output_dir)
    settings = {
        "max_object_tokens": config.max_object_tokens,
        "patch_grid_size": config.patch_grid_size,
        "use_cls_token": config.use_cls_token,
        "embed_size": tower.config.hidden_size,
        "image_size": tower.config.image_size,
        "detector": "./detector",
        "segmenter": "./segmenter",
        "score_threshold": score_threshold,
    }
    for name, part in (("detector", detector), ("segmenter", segmenter)):
        shutil.copytree(part, output_dir / name, ignore=shutil.ignore_patterns("scores.json"), dirs_exist_ok=True)
    MaskLlavaProcessor(
        image_processor=LlavaImageProcessor.from_pretrained(vision_tower),
        tokenizer=tokenizer,
        object_settings=settings,
        chat_template=vicuna_v1(system_prompt=None),
    ).save_pretrained(output_dir)
    return output_dir
