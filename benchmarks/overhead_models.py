# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The models that `model_overhead.py` compares, a question for them, and the calls that are timed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from mask_llava_hf import MaskLlavaConfig, MaskLlavaForConditionalGeneration
from mask_llava_hf.evaluation.measuring import SEED
from mask_llava_hf.modeling.token_composition import compose_tokens
from mask_llava_hf.modeling.token_layout import TokenLayout
from mask_llava_hf.testing import tiny_config


TEXT_TOKENS = (35, 13)  # before and after the image: LLaVA-1.5's system prompt, and a question
ANSWER: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
STEPS = ("forward", "one token with the cache", f"generate {ANSWER['max_new_tokens']}")

Call = Callable[[], Any]


def mid_size_config(**composition: Any) -> MaskLlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064, hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=8
    )
    composition = {"patch_grid_size": 24, **composition}
    return MaskLlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, **composition)


def tiny_shape_config(**composition: Any) -> MaskLlavaConfig:
    return tiny_config(**{"patch_grid_size": 12, **composition})


SHAPES: dict[str, Callable[..., MaskLlavaConfig]] = {"mid-size": mid_size_config, "tiny": tiny_shape_config}


def build(model_class: Any, config: Any, dtype: torch.dtype, weights: PreTrainedModel | None = None) -> Any:
    """A model in evaluation mode, random or with the very tensors of another."""
    torch.manual_seed(SEED)
    model = model_class._from_config(config, dtype=dtype).eval()
    if weights is not None:
        model.load_state_dict(weights.state_dict(), assign=True)
    # A random model must neither stop early nor answer with other than greedy choices
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def as_llava(model: MaskLlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    config = model.config
    own = {name: getattr(config, name) for name in ("vision_config", "text_config", "image_token_index")}
    return build(LlavaForConditionalGeneration, LlavaConfig(**own), model.dtype, model)


def question(model: MaskLlavaForConditionalGeneration, num_objects: int | None = None) -> dict[str, Any]:
    """A prompt about one image with as many objects as the model takes, or fewer; all values are random."""
    config, layout = model.config, TokenLayout.from_config(model.config)
    num_objects = layout.max_object_tokens if num_objects is None else num_objects
    generator, vision = torch.Generator().manual_seed(SEED), config.vision_config
    text = torch.randint(1, config.text_config.vocab_size, (sum(TEXT_TOKENS),), generator=generator)
    before, after = text.masked_fill(text == config.image_token_id, 1).split(TEXT_TOKENS)
    placeholders = torch.full((layout.num_tokens(num_objects),), config.image_token_id)
    ids = torch.cat([before, placeholders, after])[None]
    pixel_values = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    object_embeds = torch.randn(1, layout.max_object_tokens, vision.hidden_size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values.to(model.dtype)}
    if layout.max_object_tokens:
        inputs["object_embeds"] = object_embeds[:, :num_objects]
        inputs["object_counts"] = torch.tensor([num_objects])
    return inputs


def split(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs to the text, and what to its image."""
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return text, {name: value for name, value in inputs.items() if name not in text}


# -------------------------------------------------------------------------------------------------------------- calls
def steps(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Call, Call, Call]:
    """What `STEPS` names: a whole forward pass, one token with the cache, and a short answer."""
    cache = model(**inputs, logits_to_keep=1).past_key_values
    token = torch.tensor([[1]])

    def next_token() -> Any:
        output = model(input_ids=token, past_key_values=cache)
        cache.crop(-1)  # a few microseconds, on both sides
        return output

    return partial(model, **inputs, logits_to_keep=1), next_token, partial(model.generate, **inputs, **ANSWER)


def ready(ours: MaskLlavaForConditionalGeneration, image: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pixels, and the features of their tokens before the projector."""
    states = ours.model.vision_tower(image["pixel_values"], output_hidden_states=True).hidden_states
    layout = TokenLayout.from_config(ours.config)
    features = compose_tokens(states[-2], image["object_embeds"], layout, ours.config.norm_scaling)
    return {"pixel_values": image["pixel_values"], "features": features}


def llava_on_ready_features(
    llava: LlavaForConditionalGeneration, text: dict[str, torch.Tensor], image: dict[str, torch.Tensor]
) -> Any:
    """All that LLaVA computes, but on as many tokens as Mask-LLaVA has."""
    outputs = llava.model.vision_tower(image["pixel_values"], output_hidden_states=[-2], return_dict=True)
    outputs.pooler_output = list(llava.model.multi_modal_projector(image["features"]))
    return llava(**text, mm_encoder_outputs={"image": outputs}, logits_to_keep=1)
