# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
import csv
import sys

import mask_inversion_rate
import pytest
import torch
from mask_inversion_rate import QUICK, bfloat16_flop, flop_of, invert_masks_plainly, make_masks, ratios
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from mask_llava_hf.modeling.mask_inversion import MaskInversionSettings, invert_masks


def test_quick_run_fills_the_table(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rate.csv"
    monkeypatch.setattr(mask_inversion_rate, "RESULTS", tmp_path / "kept.csv")
    arguments = ["--quick", "--iterations", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["mask_inversion_rate.py", *arguments])
    mask_inversion_rate.main()
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert not (tmp_path / "kept.csv").exists()
    assert "| form | compute_dtype | images | masks | iterations | tflop |" in capsys.readouterr().out
    closed, compared = rows[:-3], rows[-3:]
    assert [(row["compute_dtype"], row["images"], row["masks"]) for row in closed] == [
        (dtype, str(images), str(masks)) for images, masks in QUICK.cases for dtype in ("float32", "bfloat16")
    ]
    assert [row["form"] for row in compared] == ["tower pass", "autograd", "autograd with weight gradients"]
    for row in closed:
        assert all(float(row[name]) > 0 for name in ("tflop", "wall_s", "percent", "published_over_this"))
        assert bool(row["dice_difference_max"]) == (row["compute_dtype"] == "bfloat16")
        assert row["torch"] and row["processor"]
    assert float(compared[2]["tflop"]) > float(compared[1]["tflop"]) > 0


class BFloat16Flop(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm) and args[0].dtype == torch.bfloat16:
            self.count += 2 * args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("iterations", [1, 4])
def test_flop(iterations):
    """From two short runs as from the whole; and as much of it is in bfloat16 as is told."""
    tower, masks = CLIPVisionModel(CLIPVisionConfig(**QUICK.tower)).eval(), make_masks(2, 3, 64)
    states = torch.randn(2, 65, QUICK.tower["hidden_size"])

    def invert(steps):
        invert_masks(tower, states, masks, MaskInversionSettings(iterations=steps, compute_dtype="bfloat16"))

    with FlopCounterMode(display=False) as counter:
        invert(iterations)
    assert flop_of(invert, iterations) == counter.get_total_flops()
    with BFloat16Flop() as rounded:
        invert(iterations)
    assert bfloat16_flop(tower.config, 65, 2, 3, iterations) == rounded.count


def test_weight_gradients_change_nothing_but_the_cost():
    tower, masks = CLIPVisionModel(CLIPVisionConfig(**QUICK.tower)).eval(), make_masks(1, 2, 64)[0]
    states = torch.randn(65, QUICK.tower["hidden_size"])
    lean, full = (invert_masks_plainly(tower, states, masks, iterations=2, weight_gradients=w) for w in (False, True))
    for one, other in zip(lean, full, strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_ratios_are_extrapolated_from_what_was_measured():
    row = {"images": 2, "masks": 3, "iterations": 10, "cpu_s": 6.0}
    assert ratios(row, one_pass=1.0, autograd=2.0, with_weights=4.0) == {
        "autograd_over_this": 2 * 3 * 10 / 6,
        "published_over_this": 2 * (3 + 30 * 2) / (6 + 2),
        "published_over_shared_pass": 2 * (3 + 30 * 2) / 6,
    }
