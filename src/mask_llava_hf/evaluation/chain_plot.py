# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A picture of what a chain costs, stage by stage."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from .chain_cost import LLAVA
from .chain_stages import DECODE, STAGES


# Okabe and Ito's palette, and two greys for the stages that every chain has.
_COLORS = ("#999999", "#E69F00", "#56B4E9", "#0072B2", "#444444", "#009E73", "#F0E442", "#D55E00", "#CC79A7")


def draw_chains(rows: Sequence[dict[str, Any]], path: str | PathLike[str], unit: str = "wall_s") -> None:
    """Draws stacked bars, LLaVA's on top, up to the answer's first token.

    Args:
        rows: of `measure_chains`.
        path: of the picture.
        unit: "wall_s" or "gflop".

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The plot needs matplotlib: pip install "mask-llava-hf[benchmarks]"') from error
    figure = Figure(figsize=(10, 1.2 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    scale = 1e-3 if unit == "gflop" else 1.0
    places = range(len(rows))
    start = [0.0] * len(rows)
    for stage, color in zip(STAGES, _COLORS, strict=True):
        if stage == DECODE:
            continue
        widths = [scale * row[f"{unit}: {stage}"] for row in rows]
        axes.barh(places, widths, left=start, color=color, label=stage, edgecolor="white", linewidth=0.3)
        start = [one + other for one, other in zip(start, widths, strict=True)]
    for place, end, row in zip(places, start, rows, strict=True):
        axes.text(end, place, f" {row[f'{unit}_ratio']:.2f}x", va="center", fontsize=8)
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel(
        "TFLOP before the answer's first token" if unit == "gflop" else "seconds to the answer's first token"
    )
    axes.set_title(f"{rows[0]['models']}, {rows[0]['dtype']}: one question about one image", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def _label(row: dict[str, Any]) -> str:
    if row["chain"] == LLAVA:
        return f"LLaVA, {row['tokens']} tokens"
    if not row["detector"]:
        return f"{row['tokens']} tokens, objects stored"
    parts = [row["detector"], row["segmenter"], row["embedding"]]
    return f"{row['tokens']} tokens, {row['chain']}: " + ", ".join(parts) + f" in the {row['inversion_in']}"
