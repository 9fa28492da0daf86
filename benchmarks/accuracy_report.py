# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What `accuracy_by_tokens.py` publishes: its CSV, a table in Markdown, and a plot."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from accuracy_runs import ABLATIONS, BUDGETS, MEAN, OBJECT_CAPS, VARIANTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shapes_world import QUESTION_KINDS

from mask_llava_hf.whole_files import write_whole


Row = dict[str, Any]

# Okabe and Ito's palette: eyes of all kinds tell these apart.
_COLORS = {"patches": "#D55E00", "CLS + patches": "#0072B2", "all three": "#009E73"}
_KIND_COLORS = ("#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#D55E00", "#999999", "#B8A800", "#6A3D9A")


def merge(parts: Iterable[Path], prior: dict[str, float]) -> list[Row]:
    """The rows of all runs, by variant and seed, beside what one scores who never looks."""
    rows: list[Row] = []
    for path in parts:
        with open(path, newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    names = [*VARIANTS, *ABLATIONS]
    rows.sort(key=lambda row: (names.index(row["variant"]), int(row["seed"])))
    seeds = Counter(row["variant"] for row in {(row["variant"], row["seed"]): row for row in rows}.values())
    return [
        {**row, "seeds_of_variant": seeds[row["variant"]], "prior": round(prior[row["question_kind"]], 4)}
        for row in rows
    ]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with certain values; detected masks and the mean over kinds of questions unless told otherwise."""
    wanted = {"masks": "detected", "question_kind": MEAN, **wanted}
    return [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]


def average(rows: Sequence[Row], name: str = "accuracy") -> float:
    return mean(float(row[name]) for row in rows)


def num_seeds(rows: Sequence[Row]) -> int:
    return len({row["seed"] for row in rows})


def summary(rows: Sequence[Row]) -> str:
    """Tables in Markdown: percent of right answers by budget, and by the most objects."""
    prior = average(select(rows), "prior")
    lines = [
        "Right answers in percent, mean over seeds ± their standard deviation (in brackets: tokens per image that were "
        f'really used); questions of all kinds but "marked". Who never looks scores {100 * prior:.1f}.',
        "",
        f"| variant | {' | '.join(f'{budget} tokens' for budget in BUDGETS)} | seeds |",
        f"| --- |{' ---: |' * (len(BUDGETS) + 1)}",
    ]
    for masks in ("detected", "ground truth"):
        for name in {row["variant"]: None for row in rows if row["masks"] == masks}:
            found = [select(rows, variant=name, masks=masks, budget=budget) for budget in BUDGETS]
            title = name if masks == "detected" else f"{name}, asked with ground-truth masks"
            lines.append(f"| {title} | {' | '.join(map(_cell, found))} | {num_seeds(found[0])} |")
    lines += ["", "| at most so many objects | " + " | ".join(map(str, OBJECT_CAPS)) + " | seeds |"]
    lines.append(f"| --- |{' ---: |' * (len(OBJECT_CAPS) + 1)}")
    for name in {row["variant"]: None for row in select(rows, knob="max_object_tokens")}:
        found = [select(rows, variant=name, knob="max_object_tokens", value=cap) for cap in OBJECT_CAPS]
        lines.append(f"| {name} | {' | '.join(map(_cell, found))} | {num_seeds(found[0])} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "–"
    spread = f" ± {100 * stdev(float(row['accuracy']) for row in rows):.1f}" if len(rows) > 1 else ""
    return f"{100 * average(rows):.1f}{spread} ({average(rows, 'tokens_per_image'):.0f})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Two panels: the streams at equal budgets, and all three with fewer objects."""
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    by_tokens, by_objects = figure.subplots(1, 2)
    prior = 100 * average(select(rows), "prior")
    for axes in (by_tokens, by_objects):
        axes.axhline(prior, color="#555555", ls="--", lw=1.2, label="all but marked, without looking")
        axes.set_ylabel("right answers, %")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_streams(by_tokens, rows)
    _draw_objects(by_objects, rows)
    first = rows[0]
    figure.suptitle(
        "Accuracy on held-out scenes of the small world by tokens per image\n"
        f"trained on {first['training_pictures']} pictures x {first['training_rounds']} conversations; "
        f"asked about {first['test_pictures']} others; large marks: means over seeds, small ones: each seed",
        fontsize=11,
    )
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw_streams(axes: Axes, rows: Sequence[Row]) -> None:
    for name, color in _COLORS.items():
        points = []
        for budget in BUDGETS:
            found = select(rows, variant=name, budget=budget)
            if found:
                points.append((average(found, "tokens_per_image"), 100 * average(found)))
                xs = [float(row["tokens_per_image"]) for row in found]
                axes.plot(xs, [100 * float(row["accuracy"]) for row in found], ".", color=color, alpha=0.5, ms=5)
        seeds = num_seeds(select(rows, variant=name))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, lw=2, label=f"{name} ({_seeds(seeds)})")
    axes.set_xlabel(f"tokens per image, mean of what was used (budgets {', '.join(map(str, BUDGETS))})")
    axes.set_title('Streams at equal budgets, all kinds of questions but "marked"', fontsize=10)
    axes.legend(fontsize=9, loc="best")


def _draw_objects(axes: Axes, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row["variant"] == "all three" and row["knob"] == "max_object_tokens"]
    places = range(len(OBJECT_CAPS))
    for kind, color in zip((*QUESTION_KINDS, MEAN), (*_KIND_COLORS, "black"), strict=True):
        found = [select(rows, question_kind=kind, value=cap) for cap in OBJECT_CAPS]
        if all(found):
            width = 3 if kind == MEAN else 1.1
            axes.plot(places, [100 * average(part) for part in found], ".-", color=color, lw=width, label=kind)
            if kind == MEAN:
                for place, part in zip(places, found, strict=True):
                    accuracies = [100 * float(row["accuracy"]) for row in part]
                    axes.plot([place] * len(part), accuracies, ".", color=color, alpha=0.5, ms=5)
    axes.set_xticks(places, [str(cap) for cap in OBJECT_CAPS])
    axes.set_xlabel("max_object_tokens")
    axes.set_title(f"All three streams with fewer objects, by question ({_seeds(num_seeds(rows))})", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _seeds(number: int) -> str:
    return f"{number} seed" if number == 1 else f"{number} seeds"
