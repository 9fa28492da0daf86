# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""`generate` with a say in how many tokens an image costs.

Inside `generate` the prompt, its mask and the image features can be cut together only before anything is prepared, so
the cut happens first, and the user's full prompt is put back in front of the answer afterwards.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .token_dropping import PromptCut, placeholders_to_keep, resolve_knobs
from .token_layout import TOKEN_KNOBS, TokenLayout


# Tensors aligned with the prompt that may accompany it.
_ALIGNED_INPUTS = ("attention_mask", "token_type_ids", "mm_token_type_ids", "inputs_embeds")
_OBJECT_INPUTS = ("object_embeds", "object_masks", "object_counts")


class MaskLlavaGenerationMixin(GenerationMixin):
    """Adds three knobs to `generate` and to the generation config: see `generate`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        max_object_tokens: int | None = None,
        patch_grid_size: int | None = None,
        max_visual_tokens: int | None = None,
        **kwargs,
    ) -> ModelOutput | torch.LongTensor:
        r"""Generates as `GenerationMixin.generate` does, with fewer tokens per image where asked.

        The prompt is shortened before the prefill: fewer positions to compute, and a smaller cache. Objects that were
        already segmented and inverted by the processor are not saved by this; cap the processor's call for that, or
        let the model invert (`mask_inversion="model"`).

        Args:
            max_object_tokens (`int`, *optional*):
                Keep at most this many object tokens per image (>= 0); a number above what is there keeps all.
            patch_grid_size (`int`, *optional*):
                Pool the patches to this grid (1..g).
            max_visual_tokens (`int`, *optional*):
                A budget (>= 1) of tokens per image; the composition follows (`TokenLayout.reduced`).
            inputs, generation_config, args, kwargs:
                As in `GenerationMixin.generate`. The three knobs may also stand in a generation config; any knob in
                the call replaces all of a config's.

        Returns:
            As `GenerationMixin.generate`. Sequences begin with the full prompt that was passed in. After a drop,
            `past_key_values` is None: its positions no longer match the sequence, and continuing from it would go
            wrong silently. To keep a cache over several turns, cap in the processor. Streamers, logits processors and
            stopping criteria see the shortened prompt.

        Raises:
            ValueError: a knob with a bad value, a budget beside another knob, or a drop that cannot be right (a cache
                of the caller's, embeddings without ids, another grid for images that are already projected).
        """
        self._refuse_paged_cache(generation_config, kwargs)
        call = {
            "max_object_tokens": max_object_tokens,
            "patch_grid_size": patch_grid_size,
            "max_visual_tokens": max_visual_tokens,
        }
        kwargs["inputs"] = inputs
        cut = None
        # An assistant model works on the prompt that the main model has already shortened
        if not getattr(generation_config, "is_assistant", False):
            kwargs, cut = self._shorten_prompt(call, generation_config, kwargs)
        inputs = kwargs.pop("inputs")
        if cut is None:
            return super().generate(inputs, generation_config, *args, **kwargs)

        prompt, shortened = cut
        generation_config, kwargs = self._shift_length_limits(
            generation_config, kwargs, prompt.shape[1], prompt.shape[1] - shortened.shape[1]
        )
        output = super().generate(inputs, generation_config, *args, **kwargs)
        return _with_full_prompt(output, prompt, shortened.shape[1])

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """Continuous batching, for text: it knows token ids only, so prompts with images are refused."""
        if any(self.config.image_token_id in row for row in inputs):
            raise ValueError(
                "`generate_batch` passes token ids only: the images of these prompts would be ignored silently. "
                "Use `generate`."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def _refuse_paged_cache(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        config = generation_config if generation_config is not None else self.generation_config
        paged = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None)) == "paged"
        if paged and (kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")):
            raise ValueError(
                '`cache_implementation="paged"` passes token ids only: the images would be ignored silently. '
                "Use another cache."
            )

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        # The base class moves a keyword that is also an attribute of the merged config into that config, where
        # `get_image_features` could not find it; and the knobs have done their work once the prompt is cut
        patch_grid_size = kwargs.pop("patch_grid_size", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for knob in TOKEN_KNOBS:
            if hasattr(generation_config, knob):
                delattr(generation_config, knob)
        if patch_grid_size is not None:
            model_kwargs["patch_grid_size"] = patch_grid_size
        return generation_config, model_kwargs

    def _shorten_prompt(
        self, call: dict[str, Any], generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor] | None]:
        """`kwargs` for a shorter prompt, and (prompt, shortened prompt) as (B, L) ids, or None without a drop."""
        full = TokenLayout.from_config(self.config)
        configs = [vars(config) for config in (generation_config, self.generation_config) if config is not None]
        wanted, level = resolve_knobs(full, call, *configs)
        ids_name = "input_ids" if kwargs.get("inputs") is None else "inputs"
        ids = kwargs.get(ids_name)
        pixel_values, encoded = kwargs.get("pixel_values"), (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if pixel_values is None and encoded is None:
            self._refuse_knobs_without_images(call, kwargs, ids)
            return kwargs, None
        if level is None:
            return kwargs, None

        knobs = _describe((call, *configs)[level])
        before = self._image_token_counts(full, pixel_values, encoded, kwargs)
        after = [wanted.num_tokens(tokens - full.num_fixed_tokens) for tokens in before]
        if before == after:
            return kwargs, None
        if encoded is not None and wanted.patch_grid_size != full.patch_grid_size:
            raise ValueError(
                f"{knobs} asks for {wanted.patch_grid_size} x {wanted.patch_grid_size} patches, but "
                f"`mm_encoder_outputs` holds images that are already projected with {full.patch_grid_size} x "
                f"{full.patch_grid_size}. Encode them with `get_image_features(..., patch_grid_size=...)`, or pass "
                "`pixel_values`."
            )
        if ids is None or not ids.numel():
            raise ValueError(
                "Image tokens can only be dropped where their placeholders are: pass `input_ids` beside "
                f"`inputs_embeds`, or leave out {knobs} (also in the generation config)."
            )
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"A cache (`past_key_values`) was given, and {knobs} drops {sum(before) - sum(after)} image tokens "
                "from the prompt: the cache would hold fewer positions than the sequence that is returned, and "
                "continuing from it would go wrong silently. Cap in the processor's call to keep a cache."
            )

        # What `generate` would infer from the full prompt; from the cut one it could not tell our padding from the
        # user's
        config, _ = super()._prepare_generation_config(generation_config, **kwargs)
        self._prepare_special_tokens(config, device=ids.device)
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is None:
            attention_mask = self._prepare_attention_mask_for_generation(ids, config, {})
        if attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, expected {tuple(ids.shape)}: a mask "
                f"between positions cannot be cut together with the prompt that {knobs} shortens."
            )
        keep = placeholders_to_keep(ids == self.config.image_token_id, before, after)
        cut = PromptCut(keep, attention_mask)
        kwargs = {**kwargs, ids_name: cut.apply(ids, fill=self._padding_id(config))}
        kwargs["attention_mask"] = attention_mask
        kwargs.pop("position_ids", None)  # they counted what is dropped; `generate` counts anew from the mask
        for name in _ALIGNED_INPUTS:
            if kwargs.get(name) is not None:
                kwargs[name] = cut.apply(kwargs[name])
        if encoded is not None:
            pooled = [row[:count] for row, count in zip(encoded.pooler_output, after, strict=True)]
            image = BaseModelOutputWithPooling(last_hidden_state=encoded.last_hidden_state, pooler_output=pooled)
            kwargs["mm_encoder_outputs"] = {**kwargs["mm_encoder_outputs"], "image": image}
        else:
            for name in ("object_embeds", "object_masks"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][:, : wanted.max_object_tokens]
            if kwargs.get("object_counts") is not None:
                kwargs["object_counts"] = kwargs["object_counts"].clamp(max=wanted.max_object_tokens)
            kwargs["patch_grid_size"] = wanted.patch_grid_size
        return kwargs, (ids, kwargs[ids_name])

    def _refuse_knobs_without_images(
        self, call: dict[str, Any], kwargs: dict[str, Any], ids: torch.Tensor | None
    ) -> None:
        """Text alone is fine; images that are in a cache or in embeddings already cannot be cut."""
        for name in _OBJECT_INPUTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` was given without `pixel_values`; objects belong to an image.")
        if not _describe(call):
            return
        if ids is None and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"{_describe(call)} was given with `inputs_embeds` alone, in which image tokens cannot be told from "
                "text. Pass `input_ids` and `pixel_values`, or merge fewer tokens."
            )
        if ids is not None and _cache_length(kwargs) and bool((ids == self.config.image_token_id).any()):
            raise ValueError(
                f"{_describe(call)} was given with a cache that already holds {_cache_length(kwargs)} positions: "
                "image tokens in a cache cannot be dropped. Cap in the first turn's processor call instead."
            )

    def _image_token_counts(self, full: TokenLayout, pixel_values, encoded, kwargs: dict[str, Any]) -> list[int]:
        """Tokens each image has before anything is dropped."""
        if encoded is not None:
            counts = [len(tokens) for tokens in encoded.pooler_output]
            fixed = getattr(encoded, "num_fixed_tokens", min([full.num_fixed_tokens, *counts]))
            if fixed != full.num_fixed_tokens:
                raise ValueError(
                    f"`mm_encoder_outputs` holds images of {counts} tokens with {fixed} of CLS and patches, where this "
                    f"model's have {full.num_fixed_tokens}, so their objects cannot be told apart. Encode the images "
                    "without `patch_grid_size` to drop tokens later."
                )
            return counts
        objects = kwargs.get("object_counts")
        if objects is None:
            return [full.num_fixed_tokens] * len(pixel_values)
        if len(objects) != len(pixel_values):
            raise ValueError(
                f"`pixel_values` has {len(pixel_values)} images, but `object_counts` {len(objects)} rows. A pipeline "
                "with `batch_size` > 1 loses rows when a sample has several images: use `batch_size=1` there."
            )
        return [full.num_fixed_tokens + count for count in objects.tolist()]

    def _padding_id(self, config: GenerationConfig) -> int:
        known = [config.pad_token_id, self.config.get_text_config().pad_token_id]
        # Without one any id will do, as padding is never attended to, except that of an image
        fallback = 0 if self.config.image_token_id != 0 else 1
        return next((i for i in known if i is not None and i != self.config.image_token_id), fallback)

    def _shift_length_limits(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], prompt_length: int, num_dropped: int
    ) -> tuple[GenerationConfig | None, dict[str, Any]]:
        # `max_length` and `min_length` count the prompt the user gave, `generate` the shortened one
        generation_config, kwargs = copy.deepcopy(generation_config), dict(kwargs)
        given = {} if generation_config is None else vars(generation_config)
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if kwargs.get(new) is not None or given.get(new) is not None:
                continue  # which counts new tokens alone and goes before the limit
            limits = (kwargs.get(name), given.get(name), getattr(self.generation_config, name))
            limit = next((limit for limit in limits if limit is not None), None)
            if limit is None:
                continue
            if name == "max_length" and limit <= prompt_length:
                raise ValueError(
                    f"`max_length`={limit} leaves no room for an answer to a prompt of {prompt_length} tokens; it "
                    "counts the prompt as it was passed in. Use `max_new_tokens`."
                )
            if kwargs.get(name) is not None or generation_config is None:
                kwargs[name] = max(limit - num_dropped, 0)
            else:
                setattr(generation_config, name, max(limit - num_dropped, 0))
        return generation_config, kwargs


def _with_full_prompt(output: ModelOutput | torch.Tensor, prompt: torch.Tensor, shortened_length: int):
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    copies = len(sequences) // len(prompt)
    prompt = prompt.repeat_interleave(copies, dim=0).to(sequences.device)
    sequences = torch.cat([prompt, sequences[:, shortened_length:]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    output.past_key_values = None
    return output


def _cache_length(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _describe(knobs: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`={knobs[name]!r}" for name in TOKEN_KNOBS if knobs.get(name) is not None)
