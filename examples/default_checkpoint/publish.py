# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Rounds a trained checkpoint to float16, in which it takes half the space; it is still run in float32."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def publish(source: Path, target: Path) -> None:
    """Copies a checkpoint, with all weights rounded to float16, in which they are stored; it still runs in float32.

    Transformers computes in the dtype that a config names, whatever the weights are stored in.

    Args:
        target: appears by renaming when everything is written; one that is there is deleted just before.
    """
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("checkpoint-*", "scores.json", "*.bin"))
    for path in unfinished.rglob("model.safetensors"):
        weights = {name: _rounded(weight) for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        config_path = path.with_name("config.json")
        config = json.loads(config_path.read_text())
        config["dtype"] = "float32"
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            part.pop("_name_or_path", None)  # a folder of the machine that trained it
        config_path.write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    if not weight.is_floating_point():
        return weight
    rounded = weight.half()
    if not rounded.isfinite().all():
        raise ValueError(f"A weight of size {weight.abs().max():.3g} is too large for float16 (65504 at most).")
    return rounded.contiguous()
