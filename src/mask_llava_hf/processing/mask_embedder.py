"""Embeds masks in the processor: the vision tower of a checkpoint, without the rest of the model."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, CLIPVisionModel, PreTrainedModel
from transformers.utils import cached_file

from ..modeling.configuration_mask_llava import MaskLlavaConfig
from ..modeling.object_embedding import embed_masks, required_hidden_states
from .part_sources import PartSource


@dataclass(frozen=True, eq=False)
class MaskEmbedder:
    """A vision tower, and the settings by which its checkpoint turns masks into embeddings.

    Attributes:
        vision_tower: a CLIP vision tower.
        config: the checkpoint's, or for a bare tower the default one.
    """

    vision_tower: PreTrainedModel
    config: MaskLlavaConfig

    @torch.inference_mode()
    def embed(self, pixel_values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Embeds the masks of several images with one tower pass.

        Args:
            pixel_values: (I, 3, S, S) float, as the image processor makes them.
            masks: (I, N, S, S) bool in the same frame; all-zero masks are empty slots.

        Returns:
            (I, N, D) float32 on the CPU; zeros for empty slots.
        """
        pixel_values = pixel_values.to(self.vision_tower.device, self.vision_tower.dtype)
        layers = required_hidden_states(self.config)
        states = self.vision_tower(pixel_values, output_hidden_states=layers, return_dict=True).hidden_states
        embeddings = embed_masks(self.vision_tower, states, masks.to(pixel_values.device), self.config)
        # A copy that is no inference tensor, so that training code may use it
        return torch.empty(embeddings.shape, dtype=torch.float32).copy_(embeddings)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What embeddings depend on: the tower's weights and the method's settings."""
        return {"vision_tower": fingerprint_weights(self.vision_tower), **fingerprint_settings(self.config)}


def fingerprint_settings(config: MaskLlavaConfig) -> dict[str, Any]:
    """The part of an embedding's fingerprint that is known without loading the tower."""
    if config.object_embedding == "mask_pooling":
        return {"object_embedding": "mask_pooling", "vision_feature_layer": config.vision_feature_layer}
    return {"object_embedding": "mask_inversion", **(config.mask_inversion or {})}


def fingerprint_weights(module: torch.nn.Module) -> str:
    """A short hash of a module's weights, the same whether they were loaded in 32 or 16 bit.

    It reads the first 64 numbers of every tensor, rounded to bfloat16: any training step changes some of them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        start = tensor.detach().flatten()[:64].to("cpu", torch.bfloat16)
        digest.update(start.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_mask_embedder(
    location: str,
    *,
    revision: str | None = None,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    settings_from: MaskLlavaConfig | None = None,
) -> MaskEmbedder:
    """Loads only the vision tower of a Mask-LLaVA checkpoint (the shards that hold it), or a bare CLIP vision tower.

    Args:
        location: folder or Hub id. A PEFT adapter (a folder with `adapter_config.json`) leads to its base model.
        settings_from: the config to take the embedding's settings from when `location` is a bare tower.

    Raises:
        ValueError: a checkpoint of another kind, or one whose tower weights are not complete.
    """
    adapter = _find_file(location, revision, "adapter_config.json")
    if adapter is not None and _find_file(location, revision, "config.json") is None:
        with open(adapter, encoding="utf-8") as file:
            base = json.load(file)
        return load_mask_embedder(
            base["base_model_name_or_path"], revision=base.get("revision"), device=device, dtype=dtype
        )
    if _find_file(location, revision, "config.json") is None:
        raise ValueError(
            f"{location!r} holds no `config.json`, so there is no vision tower to make object embeddings with. "
            'Call `processor.share_vision_tower(model)`, set `object_settings["vision_tower"]`, or load the processor '
            "from the model's own checkpoint."
        )
    config = AutoConfig.from_pretrained(location, revision=revision)
    if config.model_type in ("clip", "clip_vision_model"):
        tower = CLIPVisionModel.from_pretrained(location, revision=revision, dtype=dtype or "auto")
        config = settings_from or MaskLlavaConfig(vision_config=tower.config)
    elif config.model_type == MaskLlavaConfig.model_type:
        tower = _read_tower(PartSource(location, revision), config, dtype)
    else:
        raise ValueError(
            f'{location!r} is a "{config.model_type}" checkpoint; a Mask-LLaVA checkpoint or a CLIP vision tower is '
            'needed for object embeddings. Name one in `object_settings["vision_tower"]`.'
        )
    return MaskEmbedder(tower.to(device).eval().requires_grad_(False), config)


def read_model_config(source: PartSource) -> MaskLlavaConfig | None:
    """The Mask-LLaVA config beside a processor, if there is one."""
    path = _find_file(source.location, source.revision, "config.json")
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    return MaskLlavaConfig.from_dict(values) if values.get("model_type") == MaskLlavaConfig.model_type else None


def _find_file(location: str, revision: str | None, name: str) -> str | None:
    return cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)


def _read_tower(source: PartSource, config: MaskLlavaConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The tower of a Mask-LLaVA checkpoint, read strictly: each of its weights must be there, and no other."""
    index = _find_file(source.location, source.revision, "model.safetensors.index.json")
    if index is not None:
        with open(index, encoding="utf-8") as file:
            files = {name for key, name in json.load(file)["weight_map"].items() if _tower_key(key)}
    else:
        files = {"model.safetensors"}
    state: dict[str, torch.Tensor] = {}
    for name in sorted(files):
        path = _find_file(source.location, source.revision, name)
        if path is None:
            raise ValueError(f"{source.location!r} has no `{name}`, where its vision tower's weights should be.")
        with safe_open(path, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if (tower_key := _tower_key(key)) is not None:
                    state[tower_key] = shard.get_tensor(key)
    with torch.device("meta"):
        tower = CLIPVisionModel(config.vision_config)
    expected = set(tower.state_dict())
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or unexpected:
        raise ValueError(
            f"The vision tower in {source.location!r} does not fit its config: {len(missing)} weights are missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}. Embeddings from it would be noise."
        )
    tower = CLIPVisionModel._from_config(config.vision_config, dtype=dtype or next(iter(state.values())).dtype)
    tower.load_state_dict(state, strict=True)
    return tower


def _tower_key(key: str) -> str | None:
    """`key` without what precedes the tower's own names, or None for a weight outside the tower."""
    _, found, rest = key.rpartition("vision_tower.")
    # Transformers keeps CLIP's older layout in files, with one more level than its modules have
    return rest.removeprefix("vision_model.") if found else None
