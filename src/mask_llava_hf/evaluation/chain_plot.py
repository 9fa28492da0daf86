# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A picture of what a chain costs, stage by stage."""

from collections.abc import Sequence
from os import PathLike

from .chain_cost import LLAVA, Row
from .chain_stages import DECODE, STAGES


# Okabe and Ito's palette, and two greys for the stages that every chain has.
_COLORS = ("#999999", "#E69F00", "#56B4E9", "#0072B2", "#444444", "#009E73", "#F0E442", "#D55E00", "#CC79A7")


def draw_chains(rows: Sequence[Row], path: str | PathLike[str], unit: str = "wall_s") -> None:
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
    figure = Figure(figsize=(10, 1.6 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    usual = next(row for row in rows if row["detector"])
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
    axes.set_yticks(places, [_label(row, usual) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel(
        "TFLOP before the answer's first token" if unit == "gflop" else "seconds to the answer's first token"
    )
    axes.spines[["top", "right"]].set_visible(False)
    parts = f"{usual['detector']}, {usual['segmenter']}, {usual['embedding']}"
    figure.suptitle(
        f"{usual['models']}, {usual['dtype']}: one question about one image\nif not told: {parts}", fontsize=10
    )
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def _label(row: Row, usual: Row) -> str:
    """What a chain is, and which of its parts are not the usual ones."""
    if row["chain"] == LLAVA:
        return f"LLaVA, {row['tokens']} tokens"
    if not row["detector"]:
        return f"{row['tokens']} tokens, objects stored"
    parts = [row[name] for name in ("detector", "segmenter", "embedding") if row[name] != usual[name]]
    where = ["in the model"] if row["inversion_in"] == "model" else []
    return ", ".join([f"{row['tokens']} tokens", row["chain"], *where, *parts])
