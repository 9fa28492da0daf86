# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Mask-LLaVA: LLaVA's, and how an image's tokens are composed."""

import math
import re
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from .mask_inversion import MaskInversionSettings
from .token_layout import TokenLayout, check_integer


# What a checkpoint fixes of MaskInversion; chunk size and compute dtype are choices of the running machine.
_MASK_INVERSION_FIELDS = ("iterations", "lr", "alpha", "weight_decay")


@strict
class MaskLlavaConfig(LlavaConfig):
    r"""Configuration of [`MaskLlavaModel`] and [`MaskLlavaForConditionalGeneration`].

    `MaskLlavaConfig()` has the shapes of LLaVA-1.5-7B (CLIP L/14-336, Llama 7B) with 1 + 36 + 20 tokens per image.
    With `use_cls_token=False`, `max_object_tokens=0` and `patch_grid_size` equal to the tower's grid (24) the model
    *is* LLaVA. Fields that are not listed are LLaVA's, see [`LlavaConfig`]. What the paper (arXiv 2602.04864) does not
    state is marked "our choice".

    Args:
        use_cls_token (`bool`, defaults to `True`):
            Whether the tower's CLS token, at `vision_feature_layer`, is the first token of an image.
        patch_grid_size (`int`, defaults to 6):
            g: the tower's patches are average-pooled to g x g tokens.
        max_object_tokens (`int`, defaults to 20):
            The most object tokens per image. `generate` may use fewer.
        norm_scaling (`"per_image"`, `"fixed"` or `"none"`, defaults to `"per_image"`):
            How CLS and object tokens are scaled before the projector: to mean and standard deviation over all patches
            and channels of their own image, to the two numbers in `patch_statistics`, or not at all. The paper scales
            to the image's patch statistics; the exact formula is our choice.
        patch_statistics (`tuple[float, float]`, *optional*):
            (mean, standard deviation) for `norm_scaling="fixed"`; must be None otherwise.
        object_embedding (`"mask_inversion"` or `"mask_pooling"`, defaults to `"mask_inversion"`):
            How a mask becomes an embedding: MaskInversion (arXiv 2407.20034) in the tower's width, or the
            area-weighted mean of the patch features under the mask.
        mask_inversion (`dict`, *optional*):
            `iterations`, `lr`, `alpha`, `weight_decay` of MaskInversion; missing keys take the defaults of
            [`MaskInversionSettings`]. Our choice, as the paper gives none.
        projector_type (`str`, defaults to `"mlp2x_gelu"`):
            `"linear"`, `"mlpNx_gelu"` (N >= 1 linear layers) or `"identity"` (needs equal widths).

    `image_seq_length` is derived (the most tokens an image can have), and `vision_feature_select_strategy` stays
    `"default"`: `use_cls_token` decides about CLS.
    """

    model_type = "mask_llava"

    use_cls_token: bool = True
    patch_grid_size: int = 6
    max_object_tokens: int = 20
    norm_scaling: Literal["per_image", "fixed", "none"] = "per_image"
    patch_statistics: list[float] | tuple[float, ...] | None = None
    object_embedding: Literal["mask_inversion", "mask_pooling"] = "mask_inversion"
    mask_inversion: dict[str, Any] | None = None
    projector_type: str = "mlp2x_gelu"
    vision_feature_select_strategy: Literal["default"] = "default"

    def __post_init__(self, **kwargs):
        defaults = {f.name: f.default for f in fields(MaskInversionSettings) if f.name in _MASK_INVERSION_FIELDS}
        given = self.mask_inversion or {}
        unknown = sorted(set(given) - set(defaults))
        if unknown:
            raise ValueError(
                f"`mask_inversion` has unknown keys {unknown}; it takes {list(defaults)}. "
                "A misspelled key would silently leave the default in place."
            )
        self.mask_inversion = {**defaults, **given}
        if self.patch_statistics is not None:
            self.patch_statistics = list(self.patch_statistics)  # as JSON gives it back
        super().__post_init__(**kwargs)
        self.image_seq_length = TokenLayout.from_config(self).max_tokens

    def validate_composition(self):
        """Checks the fields that decide which tokens an image has, and their scaling."""
        vision = self.vision_config
        if not hasattr(vision, "hidden_size"):
            raise ValueError(
                f'`vision_config` has model_type "{vision.model_type}", which is no vision tower by itself. Give its '
                'vision part: model_type "clip_vision_model".'
            )
        grid = vision.image_size // vision.patch_size if hasattr(vision, "patch_size") else None
        check_integer("patch_grid_size", self.patch_grid_size, 1, grid)
        check_integer("max_object_tokens", self.max_object_tokens, 0)
        if (self.norm_scaling == "fixed") != (self.patch_statistics is not None):
            raise ValueError(
                f'`norm_scaling`="{self.norm_scaling}" with `patch_statistics`={self.patch_statistics}: the two '
                'numbers (mean, standard deviation) go with "fixed" and with nothing else.'
            )
        numbers = self.patch_statistics or [0.0, 1.0]
        if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
            raise ValueError(f"`patch_statistics` must be (mean, standard deviation > 0), got {self.patch_statistics}.")
        if not isinstance(self.vision_feature_layer, int) and self.max_object_tokens > 0:
            raise ValueError(
                f"`vision_feature_layer`={self.vision_feature_layer} concatenates several layers, while an object "
                "embedding has the width of one. Use a single layer, or `max_object_tokens=0`."
            )
        self.mask_inversion_settings()

    def validate_projector(self):
        """Checks `projector_type` against the widths it has to connect."""
        if self.num_projector_layers == 0:
            layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
            source, target = self.vision_config.hidden_size * layers, self.text_config.hidden_size
            if source != target:
                raise ValueError(
                    f'`projector_type`="identity" needs equal widths, but the vision features have {source} channels '
                    f'and the language model {target}. Use "linear" or "mlp2x_gelu".'
                )

    @property
    def num_projector_layers(self) -> int:
        """Linear layers of the projector: 0 for identity, 1 for linear, N for mlpNx_gelu.

        Raises:
            ValueError: `projector_type` is none of these.
        """
        if self.projector_type in ("identity", "linear"):
            return int(self.projector_type == "linear")
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.projector_type)
        if match is None:
            raise ValueError(
                f'Unknown `projector_type`="{self.projector_type}". Known: "linear", "mlpNx_gelu" (such as '
                '"mlp2x_gelu"), "identity".'
            )
        return int(match.group(1))

    def mask_inversion_settings(self) -> MaskInversionSettings:
        """The settings that `invert_masks` takes.

        Raises:
            ValueError: a value out of its range.
        """
        return MaskInversionSettings(**(self.mask_inversion or {}))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f'This checkpoint has model_type "{found}", but {cls.__name__} reads "{cls.model_type}". Loading it '
                "anyway would leave weights random under names that do not match. Convert it first: `mask-llava "
                "convert SOURCE TARGET`."
            )
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        # Arguments of `from_pretrained` are set as attributes after the checks of construction
        config.image_seq_length = TokenLayout.from_config(config).max_tokens
        config.validate()
        return loaded


__all__ = ["MaskLlavaConfig"]
