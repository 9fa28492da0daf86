# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Floating-point operations of a call, also on the meta device, where nothing is computed."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _grid_sample_flops(*_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Bilinear sampling, of deformable attention: four corners weighted and added, 8 operations per number."""
    return 8 * prod(out_shape)


_ALSO_COUNTED = {torch.ops.aten.grid_sampler_2d: _grid_sample_flops}


def count_flops(function: Callable[[], object]) -> int:
    """Operations of matrix products, convolutions, attention and bilinear sampling; a multiply-add is two.

    Not counted: norms, activations, softmax, resizing, and other operations on single elements, some percent of the
    time of these models.
    """
    with FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED) as counter:
        function()
    return counter.get_total_flops()
