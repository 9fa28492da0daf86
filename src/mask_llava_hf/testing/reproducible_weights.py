# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Random weights that depend on their seed alone, and carry signals through narrow models."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def reproducible_weights(seed: int) -> Iterator[None]:
    # The CPU's generator alone: torch.manual_seed would reseed the accelerators as well
    state, dtype = torch.default_generator.get_state(), torch.get_default_dtype()
    try:
        with torch.device("cpu"):
            torch.set_default_dtype(torch.float32)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.default_generator.set_state(state)


@torch.no_grad()
def spread_signals(model: nn.Module) -> None:
    """Gives weights the size at which signals neither vanish nor grow from layer to layer.

    Transformers' initial values (0.02, 0.01 and even 1e-10) are meant for wide models or for weights to be loaded; in
    these narrow ones they leave every output the same whatever the image.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else module.in_channels
            nn.init.normal_(module.weight, std=fan_in**-0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
