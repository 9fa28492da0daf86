# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Embeds masks in the processor, with the vision tower of a checkpoint and without the rest of its model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.object_embedding import embed_masks, required_hidden_states


# Images that share a tower pass: on large batches it is no faster, and takes memory in proportion.
_IMAGES_PER_PASS = 8


@dataclass(frozen=True, eq=False)
class MaskEmbedder:
    """A vision tower, and the settings by which its checkpoint turns masks into embeddings.

    Attributes:
        vision_tower: a CLIP vision tower.
        config: decides the method (`object_embedding`, `mask_inversion`, `vision_feature_layer`).
    """

    vision_tower: PreTrainedModel
    config: MaskLlavaConfig

    @torch.inference_mode()
    def embed(self, pixel_values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Embeds the masks of several images, with one tower pass per image.

        Args:
            pixel_values: (I, 3, S, S) float, as the image processor makes them.
            masks: (I, N, S, S) bool in the same frame; all-zero masks are empty slots.

        Returns:
            (I, N, D) float32 on the CPU, no inference tensor; zeros for empty slots.
        """
        device, layer = self._device(), self.config.vision_feature_layer
        layers = required_hidden_states(self.config, layer)
        result = []
        for pixels, slots in zip(pixel_values.split(_IMAGES_PER_PASS), masks.split(_IMAGES_PER_PASS), strict=True):
            pixels = pixels.to(device, self.vision_tower.dtype)
            states = self.vision_tower(pixels, output_hidden_states=layers, return_dict=True).hidden_states
            result.append(embed_masks(self.vision_tower, states, slots.to(device), self.config, layer).cpu())
        with torch.inference_mode(False):  # training code may use what is made here
            return torch.cat(result).clone()

    def _device(self) -> torch.device:
        # Offloaded weights lie on "meta" between calls; accelerate's hooks know where they will be
        hooks = (getattr(module, "_hf_hook", None) for module in self.vision_tower.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), self.vision_tower.device))
