# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
r"""How near MaskInversion comes to the rate at which this machine multiplies matrices.

The tower is a CLIP L/14-336 with random weights, and the states are its own, of random pictures. Each case, so many
images with so many masks each, counts the FLOP of its matrix products, takes the matrix rates right before its own
time, and says what part of its time the products alone would have taken at them: at the rate of square matrices
("percent"), or, for the two large products, at that of their very shapes ("percent_at_shapes"). In the bfloat16 form
these two and the product with the signs of the attention gradients count at the bfloat16 rate; all others are still
float32, and count at the float32 rate.

The last rows are for comparison: a pass of the tower, and two iterations with one mask by plain autograd, as the
specification in the tests writes it. "autograd" computes what is needed, "autograd with weight gradients" also those
of the block's weights, as the published code does: its FLOP are the same. That code also passes the image through the
tower once per mask. The ratios of CPU seconds are extrapolated from these rows: "autograd_over_this" for iterations
alone, "published_over_this" for all passes of the published code and one of ours, and "published_over_shared_pass"
for a pass of ours that somebody else needs anyway, as in a model that reads patches.

    python benchmarks/mask_inversion_rate.py --threads 2
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "modeling"))  # the specification is no package

from plain_mask_inversion import invert_masks_plainly

from mask_llava_hf.evaluation.flop_counts import count_flops
from mask_llava_hf.evaluation.measuring import SEED, Measured, circumstances, markdown, matrix_rate, measure, write_rows
from mask_llava_hf.modeling.mask_inversion import MaskInversionOutput, MaskInversionSettings, invert_masks
from mask_llava_hf.modeling.mask_inversion_block import masks_at_once


RESULTS = Path(__file__).parent / "results" / "mask_inversion_rate.csv"
DTYPES = ("float32", "bfloat16")

Row = dict[str, Any]


class Size(NamedTuple):
    """What is measured: a tower, the cases (images, masks of each), and the effort for a matrix rate."""

    tower: dict[str, int]
    cases: list[tuple[int, int]]
    matrix: dict[str, float]


FULL = Size(
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 336,
        "patch_size": 14,
    },
    [(images, masks) for images in (1, 4) for masks in (1, 5, 20)],
    {"size": 2048, "seconds": 1.0},
)
QUICK = Size(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 64,
        "patch_size": 8,
    },
    [(1, 1), (2, 3)],
    {"size": 128, "seconds": 0.02},
)


@torch.no_grad()
def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    size: Size = options.size
    torch.manual_seed(SEED)
    tower = CLIPVisionModel(CLIPVisionConfig(**size.tower)).eval()
    cases = options.cases or size.cases
    pixels = make_pixels(max(images for images, _ in cases), size.tower["image_size"])
    hidden_states = torch.cat([tower(one[None], output_hidden_states=True).hidden_states[-2] for one in pixels])
    masks = make_masks(len(hidden_states), max(masks for _, masks in cases), size.tower["image_size"])
    rows, dice = [], {}
    for num_images, num_masks in cases:
        for dtype in DTYPES:
            settings = MaskInversionSettings(iterations=options.iterations, compute_dtype=dtype)
            row, found = closed_form(
                tower, hidden_states[:num_images], masks[:num_images, :num_masks], settings, size.matrix
            )
            dice[dtype] = found.dice
            rows.append({**row, "dice_mean": found.dice.mean().item()})
        difference = (dice["bfloat16"] - dice["float32"]).abs()
        rows[-1] |= {"dice_difference_mean": difference.mean().item(), "dice_difference_max": difference.max().item()}
    compared = [tower_pass(tower, pixels[:1])]
    compared += [autograd(tower, hidden_states[0], masks[0, :1], size.matrix, weights) for weights in (False, True)]
    for row in rows:
        row |= ratios(row, *(other["cpu_s"] for other in compared))
    rows += compared
    print(markdown(rows), ", ".join(f"{name} {value}" for name, value in circumstances().items()), sep="\n\n")
    if options.output is not None:
        write_rows(options.output, [{**row, "seed": SEED, **circumstances()} for row in rows])
        print(f"\nwritten to {options.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--iterations", type=int, default=10, help="default: 10")
    parser.add_argument("--case", nargs=2, type=int, metavar=("IMAGES", "MASKS"), help="this alone; keeps no results")
    parser.add_argument("--output", type=Path, help="CSV; default: results/ beside this file")
    parser.add_argument("--quick", action="store_true", help="a tiny tower, two cases; keeps no results")
    options = parser.parse_args()
    options.size = QUICK if options.quick else FULL
    options.cases = [tuple(options.case)] if options.case else None
    options.output = options.output or (None if options.quick or options.case else RESULTS)
    return options


def make_pixels(num_images: int, side: int) -> Tensor:
    """Smooth random blots (B, 3, side, side)."""
    return nn.functional.interpolate(torch.randn(num_images, 3, 8, 8), size=side, mode="bicubic")


def make_masks(num_images: int, num_masks: int, side: int) -> Tensor:
    """Random ellipses, (B, N, side, side) bool, from a twelfth to a third of the side in radius."""
    centre = torch.rand(2, num_images, num_masks, 1, 1) * side
    radius = (torch.rand(2, num_images, num_masks, 1, 1) / 4 + 1 / 12) * side
    rows, columns = torch.arange(side)[:, None], torch.arange(side)
    inside = ((rows - centre[0]) / radius[0]) ** 2 + ((columns - centre[1]) / radius[1]) ** 2 <= 1
    return inside | ((rows == centre[0].long()) & (columns == centre[1].long()))


# -------------------------------------------------------------------------------------------------------- measurement
def flop_of(call: Callable[[int], object], iterations: int) -> int:
    """FLOP of `call(iterations)`, from calls with one and with two: all after the first iteration are alike."""
    first, second = (count_flops(partial(call, count)) for count in (1, 2))
    return first + (iterations - 1) * (second - first)


def bfloat16_flop(config: CLIPVisionConfig, num_tokens: int, num_images: int, num_masks: int, iterations: int) -> int:
    """The part of the FLOP that is in products which bfloat16 rounds.

    Per mask and iteration there are two with the (M, C) matrix, of which in the first iteration one is the same for all
    masks of an image, and one with the signs of the attention gradients.
    """
    with_matrix = num_images * (2 * num_masks * iterations - (num_masks - 1)) * config.intermediate_size
    with_signs = num_images * num_masks * iterations * (num_tokens - 1)
    return 2 * num_tokens * config.hidden_size * (with_matrix + with_signs)


def shape_rate(dtype: torch.dtype, num_rows: int, width: int, mlp_width: int, seconds: float) -> float:
    """As `matrix_rate`, for (rows, M) @ (M, C) and (rows, C) @ (C, M), the two large products of a chunk."""
    matrix = torch.randn(mlp_width, width).to(dtype)
    wide, narrow = (torch.randn(num_rows, columns).to(dtype) for columns in matrix.shape)
    fastest, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or fastest == float("inf"):
        started = time.perf_counter()
        torch.mm(wide, matrix, out=narrow)
        torch.mm(narrow, matrix.T, out=wide)
        fastest = min(fastest, time.perf_counter() - started)
        narrow.fill_(1), wide.fill_(1)  # or they would overflow, turn by turn
    return 4 * num_rows * mlp_width * width / fastest


def closed_form(
    tower: CLIPVisionModel, states: Tensor, masks: Tensor, settings: MaskInversionSettings, matrix: dict[str, float]
) -> tuple[Row, MaskInversionOutput]:
    """Cost and result of inverting masks (B, N, H, W) from states (B, T, C)."""
    config, dtype, found = tower.config, getattr(torch, settings.compute_dtype), []
    num_tokens, width, mlp_width = states.shape[1], config.hidden_size, config.intermediate_size

    def invert(iterations: int) -> None:
        found[:] = [invert_masks(tower, states, masks, replace(settings, iterations=iterations))]

    flop = flop_of(invert, settings.iterations)  # which warms up, too
    rounded = bfloat16_flop(config, num_tokens, *masks.shape[:2], settings.iterations)
    at_once, _ = masks_at_once(states.device, dtype, num_tokens, width, mlp_width, config.num_attention_heads)
    rate, float32_rate = matrix_rate(dtype, **matrix), matrix_rate(torch.float32, **matrix)
    at_shapes = shape_rate(dtype, min(at_once, masks.shape[1]) * num_tokens, width, mlp_width, matrix["seconds"])
    repeats = 3 if masks.shape[:2].numel() <= 5 else 1
    cost = measure(lambda: invert(settings.iterations), repeats, warm_up=False)
    row = {
        "form": "closed form",
        "compute_dtype": settings.compute_dtype,
        **told(*masks.shape[:2], settings.iterations, flop, cost),
        "matrix_gflop_per_s": rate / 1e9,
        "percent": 100 * (rounded / rate + (flop - rounded) / float32_rate) / cost.wall_s,
        "shape_gflop_per_s": at_shapes / 1e9,
        "percent_at_shapes": 100 * (rounded / at_shapes + (flop - rounded) / float32_rate) / cost.wall_s,
    }
    return row, found[0]


def tower_pass(tower: CLIPVisionModel, pixels: Tensor) -> Row:
    flop = count_flops(lambda: tower(pixels))
    cost = measure(lambda: tower(pixels), repeats=3, warm_up=False)
    return {
        "form": "tower pass",
        "compute_dtype": "float32",
        **told(len(pixels), 0, 0, flop, cost),
    }


def autograd(
    tower: CLIPVisionModel, states: Tensor, masks: Tensor, matrix: dict[str, float], weight_gradients: bool
) -> Row:
    """Cost of two iterations of the plain form, for masks (N, H, W) of one image with states (T, C).

    Their cost is that of three less that of one, so that what is done once per image does not count.
    """
    alone = nn.Module()  # the plain form copies the tower that it gets
    alone.config, alone.post_layernorm, alone.encoder = tower.config, tower.post_layernorm, nn.Module()
    alone.encoder.layers = tower.encoder.layers[-1:]
    costs, flop = [], []
    for iterations in (1, 3):
        invert = partial(
            invert_masks_plainly, alone, states, masks, iterations=iterations, weight_gradients=weight_gradients
        )
        flop.append(count_flops(invert))
        costs.append(measure(invert, repeats=3, warm_up=False))
    once, thrice = costs
    cost = replace(thrice, wall_s=thrice.wall_s - once.wall_s, cpu_s=thrice.cpu_s - once.cpu_s)
    rate = matrix_rate(torch.float32, **matrix)
    return {
        "form": "autograd with weight gradients" if weight_gradients else "autograd",
        "compute_dtype": "float32",
        **told(1, len(masks), 2, flop[1] - flop[0], cost),
        "matrix_gflop_per_s": rate / 1e9,
        "percent": 100 * (flop[1] - flop[0]) / rate / cost.wall_s,
    }


def ratios(row: Row, one_pass: float, autograd: float, with_weights: float) -> dict[str, float]:
    """CPU seconds of other forms by those of a row; given are those of a pass, and of two iterations with one mask."""
    images, masks, own = row["images"], row["masks"], row["cpu_s"]
    iterations = masks * row["iterations"] / 2  # of one image, in units of what was measured
    published = images * (masks * one_pass + iterations * with_weights)
    return {
        "autograd_over_this": images * iterations * autograd / own,
        "published_over_this": published / (own + images * one_pass),
        "published_over_shared_pass": published / own,
    }


def told(num_images: int, num_masks: int, iterations: int, flop: int, cost: Measured) -> Row:
    return {
        "images": num_images,
        "masks": num_masks,
        "iterations": iterations,
        "tflop": flop / 1e12,
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "gflop_per_s": flop / cost.wall_s / 1e9,
        "peak_mb": cost.peak_bytes / 1e6,
    }


if __name__ == "__main__":
    main()
