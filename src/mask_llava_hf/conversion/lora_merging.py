# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Merges a LoRA adapter into the weights it was trained on, one weight at a time, without building the model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from .checkpoint_files import LazyTensor, list_names, open_weights
from .source_files import read_json


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(.+)\.lora_([AB])(?:\.default)?\.weight$")


def merge_adapter(folder: Path, base: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The base's weights with the adapter of `folder` merged in, under the base's names.

    A merged weight is `W + scale * B @ A`, computed in float32 and rounded once, when it is written.

    Args:
        folder: with `adapter_config.json`, `adapter_model.*` and perhaps the research code's `non_lora_trainables.bin`,
            whose weights replace the base's.
        base: the weights of the model that was adapted.

    Raises:
        ValueError: an adapter of another kind than LoRA, or one that does not fit the base.
    """
    settings = read_json(folder / "adapter_config.json")
    if not settings:
        raise ValueError(
            f"`{folder.name}` has an adapter but no `adapter_config.json`, which says how strongly it counts "
            "(`lora_alpha`). Copy it there."
        )
    _check_kind(settings)
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(
            f"`{folder.name}` has an `adapter_config.json` but none of {', '.join(ADAPTER_FILES)}; without the adapter "
            "the result would be its base model. Copy it there."
        )
    merged = dict(base)
    trained = folder / "non_lora_trainables.bin"
    if trained.is_file():
        merged.update({_base_name(name): tensor for name, tensor in open_weights(trained).items()})
    factors: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in open_weights(path).items():
        if match := _FACTOR.match(name):
            factors.setdefault(_base_name(match[1]), {})[match[2]] = tensor
        else:
            merged[_base_name(name)] = tensor
    transposed = bool(settings.get("fan_in_fan_out"))
    _check_factors(factors, merged, transposed)
    for module, pair in factors.items():
        weight = merged[f"{module}.weight"]
        scale = _scale(settings, module, rank=pair["A"].shape[0])
        merged[f"{module}.weight"] = _merged(weight, pair["A"], pair["B"], scale, transposed)
    return merged


def _check_kind(settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA" or settings.get("use_dora"):
        raise ValueError(
            f"The adapter is {'DoRA' if settings.get('use_dora') else kind}, and only LoRA is merged here. Merge it "
            "with PEFT (`merge_and_unload`), save the model, and convert that."
        )


def _base_name(name: str) -> str:
    """The base's name of what the adapter's files call `base_model.model.model...`."""
    # The research code saves the names of a PEFT model, PEFT itself those without its innermost module
    return re.sub(r"\.(?:base_layer|modules_to_save)(?:\.default)?(?=\.)", "", name.removeprefix(_PREFIX))


def _check_factors(
    factors: Mapping[str, Mapping[str, LazyTensor]], base: Mapping[str, LazyTensor], transposed: bool
) -> None:
    lone = [module for module, pair in factors.items() if len(pair) != 2]
    absent = [module for module in factors if f"{module}.weight" not in base]
    misfits = [
        module
        for module, pair in factors.items()
        if module not in lone and module not in absent and not _fits(base[f"{module}.weight"].shape, pair, transposed)
    ]
    problems = {"only one of their two factors": lone, "no such weight in the base": absent, "another shape": misfits}
    said = [
        f"{len(modules)} have {problem} ({list_names(modules)})" for problem, modules in problems.items() if modules
    ]
    if said:
        raise ValueError(
            f"The adapter does not fit its base: of {len(factors)} adapted layers {'; '.join(said)}. Give the model it "
            "was trained on as `--base`."
        )


def _fits(shape: tuple[int, ...], pair: Mapping[str, LazyTensor], transposed: bool) -> bool:
    a, b = pair["A"].shape, pair["B"].shape
    if len(a) != 2 or len(b) != 2:
        return False  # a convolution's
    update = (b[0], a[1])
    return a[0] == b[1] and shape == (update[::-1] if transposed else update)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), module), settings.get("lora_alpha", 8))
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _merged(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float, transposed: bool) -> LazyTensor:
    def merge(loaded: torch.Tensor) -> torch.Tensor:
        update = b.load().float() @ a.load().float()
        return loaded.float().add(update.T if transposed else update, alpha=scale)

    return weight.map(merge)
