# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Mask-LLaVA (arXiv 2602.04864): Transformers' LLaVA with three streams of visual tokens. Only what differs is here."""

from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_mask_llava import MaskLlavaConfig
from .generation_mask_llava import MaskLlavaGenerationMixin
from .object_embedding import embed_masks, required_hidden_states
from .token_composition import compose_tokens
from .token_layout import TOKEN_KNOBS, TokenLayout, check_integer


logger = logging.get_logger(__name__)

# For `BitsAndBytesConfig(llm_int8_skip_modules=...)` and its kin: quantises the language model alone, as LLaVA is
# usually quantised. By default Transformers would quantise tower and projector too, and MaskInversion reads the
# tower's weights. Patterns match from the start of a name, with or without the head's "model.".
QUANTIZATION_SKIP_MODULES = [r"(model\.)?vision_tower", r"(model\.)?multi_modal_projector", "lm_head"]


class MaskLlavaMultiModalProjector(nn.Module):
    """LLaVA's projector for every `projector_type`: `linear_1 ... linear_N` with an activation in between.

    Maps (..., vision width) to (..., text width). With N = 2 the parameter names are those of Transformers' LLaVA.
    """

    def __init__(self, config: MaskLlavaConfig):
        super().__init__()
        num_feature_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        width = config.vision_config.hidden_size * num_feature_layers
        self.num_layers = config.num_projector_layers
        self.act = ACT2FN[config.projector_hidden_act]
        for index in range(1, self.num_layers + 1):
            layer = nn.Linear(width, config.text_config.hidden_size, bias=config.multimodal_projector_bias)
            self.add_module(f"linear_{index}", layer)
            width = config.text_config.hidden_size

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden_states = image_features
        for index in range(1, self.num_layers + 1):
            hidden_states = self.get_submodule(f"linear_{index}")(hidden_states)
            if index < self.num_layers:
                hidden_states = self.act(hidden_states)
        return hidden_states


class MaskLlavaPreTrainedModel(LlavaPreTrainedModel):
    config: MaskLlavaConfig
    config_class = MaskLlavaConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        # Initialising outside code, Transformers passes over modules without parameters of their own, so that a tower
        # missing from a checkpoint would not get CLIP's initial values. It protects models that fill weights in place;
        # this one leaves all initialisation to the library's classes.
        return cls.is_remote_code()

    def post_init(self):
        super().post_init()
        # CLIP's vision tower also names the layers of its text model, and FSDP refuses names of layers it cannot find
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}


class MaskLlavaModel(MaskLlavaPreTrainedModel, LlavaModel):
    """The vision tower, the projector and the language model, without a head.

    Takes what Transformers' `LlavaModel` takes, and per image `object_embeds` or `object_masks` with `object_counts`,
    as [`MaskLlavaProcessor`] makes them.
    """

    def __init__(self, config: MaskLlavaConfig):
        # Not LlavaModel's own: it would build a projector of fixed depth, to be thrown away
        super(LlavaModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = MaskLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        object_embeds: torch.Tensor | None = None,
        object_masks: torch.Tensor | None = None,
        object_counts: torch.Tensor | None = None,
        patch_grid_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes images to the tokens that take the place of their placeholders.

        Args:
            pixel_values: (I, 3, S, S) float, one row per image.
            vision_feature_layer: index into the tower's hidden states, or a list to concatenate (then without
                objects); default: the config's.
            object_embeds: (I, N, D) float, MaskInversion embeddings in keep order, D the tower's width; zeros past
                each image's count. Constants: no gradient reaches what made them.
            object_masks: (I, N, H, W) uint8 or bool in place of `object_embeds`, in the frame of the tower's square
                input; inverted here, sharing the tower's pass.
            object_counts: (I,) int64, 0..N; needed with either of the two. Neither means zero objects.
            patch_grid_size: pools the patches to this grid (1..g) instead of the config's; 0 leaves them out.

        Returns:
            `BaseModelOutputWithPooling` whose `pooler_output` is a list with one (1 + g * g + n_i, text width) tensor
            per image and whose `last_hidden_state` is the tower's.

        Raises:
            ValueError: embeddings and masks at once, either without counts, rows or widths that do not fit the
                images, counts outside 0..N, or a tower without CLS token.
        """
        outputs, tokens, num_fixed, counts = self._encode_images(
            pixel_values, vision_feature_layer, object_embeds, object_masks, object_counts, patch_grid_size, **kwargs
        )
        lengths = [num_fixed + count for count in counts.tolist()]
        outputs.pooler_output = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        outputs.num_fixed_tokens = num_fixed  # tells objects from patches, whatever the grid was
        return outputs

    def _encode_images(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None,
        object_embeds: torch.Tensor | None,
        object_masks: torch.Tensor | None,
        object_counts: torch.Tensor | None,
        patch_grid_size: int | None,
        **kwargs,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor, int, torch.Tensor]:
        """The tower's output, (I, fixed + N, text width) projected tokens, `fixed`, and (I,) counts of real objects."""
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        self._check_object_inputs(pixel_values, layers, object_embeds, object_masks, object_counts)
        wanted = [layers] if isinstance(layers, int) else list(layers)
        inverts = object_masks is not None and object_masks.shape[1] > 0  # then the layer is a single one
        if inverts:
            wanted += required_hidden_states(self.config, wanted[0])
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = wanted  # only these are kept alive
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        features = (
            outputs.hidden_states[layers]
            if isinstance(layers, int)
            else torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        )
        self._check_tower_has_cls(features, pixel_values)
        if object_masks is not None and inverts:
            states = outputs.hidden_states
            object_embeds = embed_masks(self.vision_tower, states, object_masks, self.config, wanted[0])

        layout = TokenLayout.from_config(self.config)
        if patch_grid_size is not None:
            grid = check_integer("patch_grid_size", patch_grid_size, 0, layout.patch_grid_size)
            layout = replace(layout, patch_grid_size=grid)
        tokens = compose_tokens(features, object_embeds, layout, self.config.norm_scaling, self.config.patch_statistics)
        tokens = self.multi_modal_projector(tokens.to(self._projector_dtype(tokens.dtype)))
        if object_counts is None:
            object_counts = torch.zeros(len(pixel_values), dtype=torch.long)
        return outputs, tokens, layout.num_fixed_tokens, object_counts.to(tokens.device)

    def _projector_dtype(self, default: torch.dtype) -> torch.dtype:
        # A quantised weight has an integer dtype; the bias beside it still tells the compute dtype
        parameters = self.multi_modal_projector.parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), default)

    def _check_object_inputs(self, pixel_values, layers, object_embeds, object_masks, object_counts) -> None:
        if object_embeds is not None and object_masks is not None:
            raise ValueError(
                "Both `object_embeds` and `object_masks` were given. They are two forms of the same objects; pass one."
            )
        objects = object_embeds if object_embeds is not None else object_masks
        name = "object_embeds" if object_embeds is not None else "object_masks"
        if objects is None:
            if object_counts is not None:
                raise ValueError(
                    "`object_counts` was given without `object_embeds` or `object_masks`, so there is nothing to "
                    "count. Pass all outputs of the processor to the model."
                )
            return
        if object_counts is None:
            raise ValueError(
                f"`{name}` needs `object_counts` ({len(objects)} integers): rows are padded to {objects.shape[1]} "
                "objects, and padding would pass for objects. Pass all outputs of the processor to the model."
            )
        if len(objects) != len(pixel_values) or len(object_counts) != len(pixel_values):
            raise ValueError(
                f"`pixel_values` has {len(pixel_values)} images, but `{name}` {len(objects)} rows and `object_counts` "
                f"{len(object_counts)}. Each image needs one row of each. A pipeline with `batch_size` > 1 loses rows "
                "when a sample has several images: use `batch_size=1` there."
            )
        if objects.shape[1] and not isinstance(layers, int):
            raise ValueError(
                f"`vision_feature_layer`={layers} concatenates several layers, while an object embedding has the width "
                "of one. Use a single layer, or no objects (`max_object_tokens=0`)."
            )
        if objects.shape[1] > self.config.max_object_tokens:
            raise ValueError(
                f"`{name}` has {objects.shape[1]} objects per image, but this model has `max_object_tokens`="
                f"{self.config.max_object_tokens}. Call the processor with at most that many, or raise the config's."
            )
        if object_masks is not None:
            side = tuple(pixel_values.shape[-2:])
            if object_masks.ndim != 4 or tuple(object_masks.shape[-2:]) != side:
                raise ValueError(
                    f"`object_masks` has shape {tuple(object_masks.shape)}, expected (images, objects, {side[0]}, "
                    f"{side[1]}): the frame of `pixel_values`, in which the model would read them. Masks of the "
                    "original image go to the processor (`masks=`), which brings them there."
                )
            if object_masks.dtype not in (torch.bool, torch.uint8):
                raise ValueError(
                    f"`object_masks` has dtype {object_masks.dtype}, expected bool or uint8 zeros and ones."
                )
        if object_embeds is not None and object_embeds.shape[1]:
            width = self.config.vision_config.hidden_size
            if object_embeds.shape[-1] != width:
                raise ValueError(
                    f"`object_embeds` has width {object_embeds.shape[-1]}, but this model's vision tower has {width}. "
                    "The embeddings come from another tower; make them again with this checkpoint's processor."
                )
        torch_compilable_check(
            (object_counts >= 0).all() & (object_counts <= objects.shape[1]).all(),
            lambda: f"`object_counts` must lie in 0..{objects.shape[1]} (the rows of `{name}`), got {object_counts}.",
        )

    def _check_tower_has_cls(self, features: torch.Tensor, pixel_values: torch.Tensor) -> None:
        grid_height, grid_width = (size // self.config.vision_config.patch_size for size in pixel_values.shape[-2:])
        if features.shape[1] != 1 + grid_height * grid_width or grid_height != grid_width:
            raise ValueError(
                f"The vision tower gave {features.shape[1]} tokens for a {grid_height} x {grid_width} grid of patches; "
                f"1 CLS token + a square grid is expected. A tower without CLS token (such as SigLIP) would lose its "
                "first patch here; use a CLIP tower."
            )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where image tokens go: bool (B, L, 1), checked against the number of `image_features` (n, text width)."""
        return self._checked_placeholders(input_ids, inputs_embeds, len(image_features))

    def _checked_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, num_tokens: int | torch.Tensor
    ) -> torch.Tensor:
        mask = self._placeholder_positions(input_ids, inputs_embeds).to(inputs_embeds.device)
        found, layout = mask.sum(), TokenLayout.from_config(self.config)
        torch_compilable_check(
            found == num_tokens,
            lambda: (
                f"The text has {int(found)} image placeholders (id {self.config.image_token_id}), but the images give "
                f"{int(num_tokens)} tokens. This model makes {layout.num_cls_tokens} CLS + {layout.num_patch_tokens} "
                "patches + the objects counted in `object_counts` per image. Was the text processed with other "
                "objects, another `max_object_tokens` or `patch_grid_size`, or cut? Pass text and images through one "
                "processor call."
            ),
        )
        return mask.unsqueeze(-1)

    def _placeholder_positions(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, L) bool; without ids the placeholders are told by their embedding."""
        if inputs_embeds is None or input_ids is not None:
            return input_ids == self.config.image_token_id
        token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        object_embeds: torch.Tensor | None = None,
        object_masks: torch.Tensor | None = None,
        object_counts: torch.Tensor | None = None,
        patch_grid_size: int | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaModelOutputWithPast:
        """Runs the model; see `get_image_features` for the image inputs and `LlavaModel.forward` for the rest.

        Args:
            input_ids: (B, L) int64 with one placeholder per image token, or `inputs_embeds` (B, L, text width).
            mm_encoder_outputs: `{"image": get_image_features(...)}` in place of `pixel_values`; the image's other
                inputs are then already in it.

        Returns:
            As `LlavaModel.forward`. `image_hidden_states` (n, text width) begins with the tokens of all images in
            order; where images have fewer objects than slots, rows without meaning follow.

        Raises:
            ValueError: placeholders and image tokens differ in number, or inputs that exclude each other.
        """
        encoded = None if mm_encoder_outputs is None else mm_encoder_outputs.get("image")
        own_inputs = {
            "pixel_values": pixel_values,
            "object_embeds": object_embeds,
            "object_masks": object_masks,
            "object_counts": object_counts,
            "patch_grid_size": patch_grid_size,
        }
        given = [name for name, value in own_inputs.items() if value is not None]
        if encoded is not None and given:
            raise ValueError(
                f"`{given[0]}` and `mm_encoder_outputs` were both given. The latter holds images that are already "
                "encoded and projected, so the former could not have any effect."
            )
        if given and pixel_values is None:
            raise ValueError(f"`{given[0]}` was given without `pixel_values`; objects and patches belong to an image.")

        tokens = None
        if pixel_values is not None:
            if self.training and object_embeds is not None:
                self._warn_if_embeddings_go_stale()
            inputs_embeds, tokens = self._embed_with_images(
                input_ids,
                inputs_embeds,
                pixel_values,
                vision_feature_layer,
                object_embeds,
                object_masks,
                object_counts,
                patch_grid_size,
            )
            input_ids = None
        elif encoded is None and self._image_path_runs_without_images(past_key_values):
            zero = self._zero_from_image_path()  # before the text, as images are
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.get_input_embeddings()(input_ids), None
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if tokens is not None:
            outputs.image_hidden_states = tokens
        return outputs

    def _embed_with_images(
        self,
        input_ids,
        inputs_embeds,
        pixel_values,
        layers,
        object_embeds,
        object_masks,
        object_counts,
        patch_grid_size,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, text width) embeddings with image tokens in place, and the tokens, real ones first.

        Shapes do not depend on counts, which keeps the forward pass one graph: the scatter reads only as many rows as
        there are placeholders.
        """
        _, tokens, num_fixed, counts = self._encode_images(
            pixel_values, layers, object_embeds, object_masks, object_counts, patch_grid_size
        )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        tokens, counts = tokens.to(inputs_embeds.device, inputs_embeds.dtype), counts.to(inputs_embeds.device)
        slots, tokens = tokens.shape[1], tokens.flatten(0, 1)
        num_tokens: int | torch.Tensor = len(tokens)
        if slots > num_fixed:  # slots of objects, some of which may be empty
            valid = torch.arange(slots, device=tokens.device) < num_fixed + counts[:, None]
            real_first = torch.sort(valid.flatten().logical_not(), stable=True).indices
            tokens, num_tokens = tokens[real_first], valid.sum()
        placeholders = self._checked_placeholders(input_ids, inputs_embeds, num_tokens)
        return inputs_embeds.masked_scatter(placeholders, tokens), tokens

    def _image_path_runs_without_images(self, past_key_values: Cache | None) -> bool:
        # FSDP and ZeRO-3 gather a module's shards when it runs, and DDP waits for the gradients of all trained weights:
        # a process whose batch has no image would skip the tower and the projector, and the others would wait forever
        if self.training and torch.is_grad_enabled() and self._image_path_is_trainable():
            return True
        # Frozen weights are sharded, too. With a cache this is generation, where all processes have the same input
        if past_key_values is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        modules = (*self.vision_tower.modules(), *self.multi_modal_projector.modules())
        return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules) or any(
            hasattr(parameter, "ds_id") for module in modules for parameter in module.parameters(recurse=False)
        )

    def _image_path_is_trainable(self) -> bool:
        modules = (self.vision_tower, self.multi_modal_projector)
        return any(p.requires_grad for module in modules for p in module.parameters())

    def _zero_from_image_path(self) -> torch.Tensor:
        """A zero that the tower and the projector made from a blank image."""
        vision = self.config.vision_config
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        blank = torch.zeros(size, dtype=self.vision_tower.dtype, device=self.vision_tower.device)
        tokens = torch.cat(self.get_image_features(blank, return_dict=True).pooler_output)
        return (tokens * 0).sum()  # not sum * 0: a 16-bit sum can overflow to NaN

    def _warn_if_embeddings_go_stale(self) -> None:
        if any(p.requires_grad for p in self.vision_tower.parameters()):
            logger.warning_once(
                "The vision tower is being trained while `object_embeds` come from the processor, so objects and "
                "patches will drift apart. Freeze the tower, or set the processor's `mask_inversion` to "
                '"model" so that the current tower makes them.'
            )


class MaskLlavaForConditionalGeneration(
    MaskLlavaPreTrainedModel, MaskLlavaGenerationMixin, LlavaForConditionalGeneration
):
    """Mask-LLaVA with its language modelling head; `generate` takes `max_object_tokens` and its two siblings."""

    def __init__(self, config: MaskLlavaConfig):
        # Not LlavaForConditionalGeneration's own: it would build a whole LlavaModel, to be thrown away
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MaskLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; `generation_config.json` keeps `max_object_tokens` and its siblings."""
        if any(getattr(self.generation_config, knob, None) is not None for knob in TOKEN_KNOBS):
            # A config marked as derived from the model's drops custom keys when it is loaded again
            self.generation_config._from_model_config = None
        return super().save_pretrained(*args, **kwargs)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        object_embeds: torch.Tensor | None = None,
        object_masks: torch.Tensor | None = None,
        object_counts: torch.Tensor | None = None,
        patch_grid_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`MaskLlavaModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            object_embeds=object_embeds,
            object_masks=object_masks,
            object_counts=object_counts,
            patch_grid_size=patch_grid_size,
            **kwargs,
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        object_embeds: torch.Tensor | None = None,
        object_masks: torch.Tensor | None = None,
        object_counts: torch.Tensor | None = None,
        patch_grid_size: int | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaCausalLMOutputWithPast:
        """As [`MaskLlavaModel.forward`], with `labels` (B, L) int64 (-100 is ignored) for a loss, and logits.

        Written out because `generate`, `Trainer` and PEFT read argument names from the signature.
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            object_embeds=object_embeds,
            object_masks=object_masks,
            object_counts=object_counts,
            patch_grid_size=patch_grid_size,
            labels=labels,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


__all__ = [
    "QUANTIZATION_SKIP_MODULES",
    "MaskLlavaForConditionalGeneration",
    "MaskLlavaModel",
    "MaskLlavaPreTrainedModel",
]
