# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What an answer costs: Mask-LLaVA's whole chain, stage by stage, beside LLaVA with all its patches."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..modeling.token_layout import TokenLayout
from .chain_stages import (
    COMPOSITION,
    DECODE,
    DECODER,
    DETECTOR,
    EMBEDDINGS,
    ENCODER,
    INVERSION,
    PREFILL,
    READ,
    STAGES,
    TOWER,
    Questions,
    Stage,
    grouped,
    measure_stages,
)
from .measured_models import Models
from .measuring import SEED, circumstances, in_process, markdown


BUDGETS = (57, 42, 29, 15)  # tokens per image; the paper's
NO_SEGMENTER = "boxes as masks"
LLAVA = "LLaVA"
QUESTIONS = Questions()

Row = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """One way to answer a question.

    Attributes:
        name: LLaVA, or where the objects come from: made for the question, or stored before.
        tokens: per image.
        once: stages that make the image's objects; they are not needed again for a second question.
        each: the rest.
    """

    name: str
    tokens: int
    detector: str = ""
    segmenter: str = ""
    embedding: str = ""
    inversion_in: str = ""
    once: tuple[Stage, ...] = field(default=(), repr=False)
    each: tuple[Stage, ...] = field(default=(), repr=False)


def chains(models: Models, candidates: int = 50, budgets: Sequence[int] = BUDGETS) -> list[Chain]:
    """LLaVA, and Mask-LLaVA at all budgets with the usual parts; other parts at the first and the second budget.

    Args:
        candidates: boxes that are segmented before `order="mask_iou"` chooses among them; `"box_iou"` segments those
            it keeps.
    """
    vision = models.config().vision_config
    num_patches = (vision.image_size // vision.patch_size) ** 2
    result = [Chain(LLAVA, num_patches, each=_answer("llava", num_patches))]
    usual = (*models.usual_parts, next(iter(EMBEDDINGS)))
    for budget in budgets:
        for place in ("processor", "model"):
            for order in ("mask_iou", "box_iou"):
                result.append(_made_now(models, budget, order, candidates, *usual, place))
        result.append(Chain("stored", budget, each=_answer("mask-llava", budget)))
    other_parts = [
        *((detector, *usual[1:]) for detector in models.detectors if detector != usual[0]),
        *((usual[0], segmenter, usual[2]) for segmenter in (*models.segmenters, NO_SEGMENTER) if segmenter != usual[1]),
        *((*usual[:2], embedding) for embedding in list(EMBEDDINGS)[1:]),
    ]
    if len(models.detectors) > 1:
        other_parts.append((models.detectors[0], models.segmenters[0], usual[2]))  # the paper's
    for parts in other_parts:
        result.append(_made_now(models, budgets[0], "mask_iou", candidates, *parts, "processor"))
        result.append(_made_now(models, budgets[min(1, len(budgets) - 1)], "box_iou", candidates, *parts, "processor"))
    return result


def _made_now(
    models: Models, budget: int, order: str, candidates: int, detector: str, segmenter: str, embedding: str, place: str
) -> Chain:
    layout = TokenLayout.from_config(models.config()).reduced(max_visual_tokens=budget)
    kept = layout.max_object_tokens
    once = [Stage(READ, detector), Stage(DETECTOR, detector)]
    if segmenter != NO_SEGMENTER:
        boxes = kept if order == "box_iou" else max(candidates, kept)
        once += [Stage(READ, segmenter), Stage(ENCODER, segmenter), Stage(DECODER, segmenter, boxes)]
    if place == "processor":
        once.append(Stage(TOWER))  # its own pass; in the model the inversion shares the one that is needed anyway
    once.append(Stage(INVERSION, embedding, kept))
    return Chain(
        f"made now, {order}", budget, detector, segmenter, embedding, place, tuple(once), _answer("mask-llava", budget)
    )


def _answer(composition: str, tokens: int) -> tuple[Stage, ...]:
    return (
        Stage(READ, "file"),
        Stage(READ, "tower"),
        Stage(TOWER),
        Stage(COMPOSITION, composition, tokens),
        Stage(PREFILL, "", tokens),
        Stage(DECODE, "", tokens),
    )


def measure_chains(
    models: Models,
    wanted: Iterable[Chain],
    *,
    questions: Questions = QUESTIONS,
    threads: int | None = None,
    flops_only: bool = False,
    repeats: int = 3,
) -> tuple[list[Row], list[Row]]:
    """Measures every stage once, each model in a process of its own, and adds them up.

    Args:
        repeats: calls of a stage at most, of which the median counts; none after ten seconds of them.

    Returns:
        rows of stages, and rows of chains with their sums. "gflop_ratio", "wall_s_ratio" and "cpu_s_ratio" compare
        everything before the first token of the answer with LLaVA's; "break_even_questions" is how many questions about
        one image make up for its objects, by wall time (by operations with `flops_only`), where LLaVA too encodes an
        image only once.
    """
    wanted = list(wanted)
    told = {"models": models.name, "dtype": str(models.dtype)[6:]}
    groups = grouped(stage for chain in wanted for stage in (*chain.once, *chain.each))
    stage_rows: list[Row] = []
    for group in tqdm(groups, desc="measuring", unit="model"):
        arguments = (models, group, questions, threads, flops_only, repeats)
        rows = measure_stages(*arguments) if flops_only else in_process(measure_stages, *arguments)
        stage_rows += [{**told, **row} for row in rows]
    found = {Stage(row["stage"], row["part"], row["count"]): row for row in stage_rows}
    units = ("gflop",) if flops_only else ("gflop", "wall_s", "cpu_s")
    chain_rows = [{**told, **_sum_up(chain, found, units)} for chain in wanted]
    llava = next((row for row in chain_rows if row["chain"] == LLAVA), None)
    for row in chain_rows:
        if llava is not None:
            row.update(_compared(row, llava, units))
    around = {
        "prompt_tokens": questions.prompt_tokens,
        "answer_tokens": questions.answer_tokens,
        "seed": SEED,
        **circumstances(),
    }
    if threads is not None:
        around["threads"] = threads
    return [{**row, **around} for row in stage_rows], [{**row, **around} for row in chain_rows]


def _sum_up(chain: Chain, found: dict[Stage, Row], units: Sequence[str]) -> Row:
    row: Row = {
        "chain": chain.name,
        "tokens": chain.tokens,
        "detector": chain.detector,
        "segmenter": chain.segmenter,
        "embedding": chain.embedding,
        "inversion_in": chain.inversion_in,
    }
    for unit in units:
        by_stage: Counter[str] = Counter()
        for stage in (*chain.once, *chain.each):
            by_stage[stage.name] += found[stage][unit]
        row |= {f"{unit}: {name}": round(by_stage[name], 4) for name in STAGES}
        row[f"{unit}: objects"] = round(sum(found[stage][unit] for stage in chain.once), 4)
        row[f"{unit}: before the answer"] = round(sum(by_stage.values()) - by_stage[DECODE], 4)
        row[f"{unit}: all"] = round(sum(by_stage.values()), 4)
    if "wall_s" in units:
        row["peak_gb"] = max(found[stage]["peak_gb"] for stage in (*chain.once, *chain.each))
    return row


def _compared(row: Row, llava: Row, units: Sequence[str]) -> Row:
    compared = {
        f"{unit}_ratio": round(row[f"{unit}: before the answer"] / llava[f"{unit}: before the answer"], 3)
        for unit in units
    }
    unit = "wall_s" if "wall_s" in units else "gflop"

    def per_question(of: Row) -> float:
        return of[f"{unit}: {PREFILL}"] + of[f"{unit}: {DECODE}"]

    saved = per_question(llava) - per_question(row)
    worth = row[f"{unit}: objects"] / saved if saved > 0 else None
    return {**compared, "break_even_questions": None if row is llava or worth is None else round(worth, 2)}


def table(rows: Sequence[Row]) -> str:
    """Chains in Markdown: operations and seconds before the answer's first token, and how they compare with LLaVA's."""
    lines = []
    for row in rows:
        line = {
            "objects": row["chain"],
            **{name: row[name] for name in ("tokens", "detector", "segmenter", "embedding", "inversion_in")},
            "TFLOP": f"{row['gflop: before the answer'] / 1e3:.3g}",
            "of LLaVA's": f"{row['gflop_ratio']:.2f}",
        }
        if "wall_s: all" in row:
            line |= {
                "seconds": f"{row['wall_s: before the answer']:.3g}",
                "of LLaVA's seconds": f"{row['wall_s_ratio']:.2f}",
                "CPU seconds": f"{row['cpu_s: before the answer']:.3g}",
                "seconds with answer": f"{row['wall_s: all']:.3g}",
                "peak GB": f"{row['peak_gb']:.2f}",
            }
        lines.append({**line, "break-even questions": row["break_even_questions"]})
    return markdown(lines)
