# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
r"""What the model itself costs: against Transformers' LLaVA at the same number of tokens, and by the tokens kept.

Three tables, with random weights. "mid-size" has the tower's grid and width of CLIP L/14-336 and the vocabulary of
LLaVA-1.5, but fewer layers and a narrower language model; "tiny" is the model of `mask_llava_hf.testing`, where next
to nothing is computed and what Python does between operations shows most.

1. Overhead: Mask-LLaVA and LLaVA with the same weights in memory, in turns. Without CLS and objects, and with the
   tower's own grid of patches, Mask-LLaVA is LLaVA: the same call goes to both, and their outputs are compared.
   LLaVA cannot make 57 tokens, but takes them: there both get the same encoded tokens as `mm_encoder_outputs`
   ("encoded"); or ours makes them from pixels and embeddings, and LLaVA's side runs its tower, its projector on 57
   features composed beforehand, and the model on the result ("from pixels"), so that what remains is composing.
   A last line has Mask-LLaVA on both sides: dropping tokens in `generate`, or a prompt that was short from the start.
   `ratio` is of wall time, `ratio_cpu` of the time of all threads, which other programs disturb less.
2. Dropping: one image of CLS + all patches + 20 objects, cut by the knobs of `generate`. Lengths, seconds and cache
   are those of the language model inside `generate`.
3. A second question about an image: seconds to the first token of the answer.

    python benchmarks/model_overhead.py --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from overhead_models import (
    ANSWER,
    SHAPES,
    STEPS,
    TEXT_TOKENS,
    Call,
    as_llava,
    build,
    llava_on_ready_features,
    question,
    ready,
    split,
    steps,
)
from transformers import PreTrainedModel

from mask_llava_hf import MaskLlavaForConditionalGeneration
from mask_llava_hf.evaluation.measuring import (
    SEED,
    circumstances,
    markdown,
    measure,
    measure_pair,
    seconds_of,
    write_rows,
)


RESULTS = Path(__file__).parent / "results" / "model_overhead.csv"
LONG_ANSWER = 32

KNOBS: list[dict[str, Any]] = [{}]
KNOBS += [{"max_visual_tokens": budget} for budget in (57, 42, 29, 15)]
KNOBS += [{"patch_grid_size": 6, "max_object_tokens": objects} for objects in (20, 10, 5, 2, 1, 0)]

COLUMNS = {
    "overhead": ["shape", "what", "image_tokens", "mask_llava_s", "reference_s"]
    + ["ratio", "ratio_lower_quartile", "ratio_upper_quartile", "ratio_cpu"],
    "dropping": ["what", "image_tokens", "prefill_length", "cache_bytes", "prefill_s", "first_token_s"]
    + [f"generate_{LONG_ANSWER}_s"],
    "questions": ["what", "image_tokens", "first_token_s", "first_token_cpu_s"],
}

Row = dict[str, Any]


@torch.no_grad()
def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for shape in options.shapes:
        make_config = SHAPES[shape]
        grid = make_config().patch_grid_size
        like_llava = make_config(use_cls_token=False, max_object_tokens=0)
        alike = build(MaskLlavaForConditionalGeneration, like_llava, getattr(torch, options.dtype))
        ours, full = (build(type(alike), make_config(patch_grid_size=g), alike.dtype, alike) for g in (6, grid))
        found = list(overhead(alike, ours, 10 * options.turns if shape == "tiny" else options.turns))
        if shape == options.shapes[0]:  # where computing decides, if it is among them
            found += [*dropping(full, options.turns), *questions(ours, options.turns)]
        rows += [{"shape": shape, **row} for row in found]
    told = {"dtype": options.dtype, "seed": SEED, **circumstances()}
    print(tables(rows), ", ".join(f"{name} {value}" for name, value in told.items()), sep="\n\n")
    if options.output is not None:
        write_rows(options.output, [{**row, **told} for row in rows])
        print(f"\nwritten to {options.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, help="at least 2, ten times as many of short calls; default: 5")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--output", type=Path, help="CSV; default: results/ beside this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes alone, few turns; keeps no results")
    options = parser.parse_args()
    options.shapes = ("tiny",) if options.quick else ("mid-size", "tiny")
    options.turns = options.turns or (2 if options.quick else 5)
    if options.turns < 2:
        parser.error("--turns: quartiles need at least 2")
    options.output = options.output or (None if options.quick else RESULTS)
    return options


# ----------------------------------------------------------------------------------------------------------- overhead
def overhead(
    alike: MaskLlavaForConditionalGeneration, ours: MaskLlavaForConditionalGeneration, turns: int
) -> Iterator[Row]:
    """Pairs of calls that should cost the same.

    Args:
        alike: composes tokens as LLaVA does.
        ours: composes them as Mask-LLaVA does.
        turns: of each pair; ten times as many of a single token's.
    """
    llava, inputs = as_llava(alike), question(alike)
    tokens = inputs["input_ids"].shape[1] - sum(TEXT_TOKENS)
    for what, first, second in zip(STEPS, steps(alike, inputs), steps(llava, inputs), strict=True):
        yield compare(f"{what}, from pixels", tokens, first, second, turns)

    text, image = split(question(ours))
    encoded = {**text, "mm_encoder_outputs": {"image": ours.get_image_features(**image)}}
    tokens = text["input_ids"].shape[1] - sum(TEXT_TOKENS)
    for what, first, second in zip(STEPS, steps(ours, encoded), steps(llava, encoded), strict=True):
        yield compare(f"{what}, encoded", tokens, first, second, turns)
    first, second = steps(ours, {**text, **image})[0], partial(llava_on_ready_features, llava, text, ready(ours, image))
    yield compare("forward, from pixels", tokens, first, second, turns)

    cut, short = question(ours), question(ours, num_objects=5)
    tokens = short["input_ids"].shape[1] - sum(TEXT_TOKENS)
    first = partial(ours.generate, **cut, **ANSWER, max_object_tokens=5)
    yield compare("generate, dropped", tokens, first, partial(ours.generate, **short, **ANSWER), turns)


def compare(what: str, tokens: int, first: Call, second: Call, turns: int) -> Row:
    """Times two calls in turns, after a look at whether they give the same."""
    torch.testing.assert_close(ending(first()), ending(second()))
    turns = 10 * turns if what.startswith("one token") else turns
    turn_by_turn = measure_pair(first, second, turns)
    low, ratio, high = statistics.quantiles(
        [one.wall / other.wall for one, other in turn_by_turn], n=4, method="inclusive"
    )
    return {
        "table": "overhead",
        "what": what,
        "image_tokens": tokens,
        "mask_llava_s": statistics.median(one.wall for one, _ in turn_by_turn),
        "reference_s": statistics.median(other.wall for _, other in turn_by_turn),
        "ratio": ratio,
        "ratio_lower_quartile": low,
        "ratio_upper_quartile": high,
        "ratio_cpu": statistics.median(one.cpu / other.cpu for one, other in turn_by_turn),
        "turns": turns,
    }


def ending(output: Any) -> torch.Tensor:
    """The last position's logits, or the answer's ids."""
    return output[:, -ANSWER["max_new_tokens"] :] if isinstance(output, torch.Tensor) else output.logits[:, -1]


# ----------------------------------------------------------------------------------------------------------- dropping
def dropping(model: MaskLlavaForConditionalGeneration, turns: int) -> list[Row]:
    """What the knobs of `generate` save; all of them in every turn, so that a busy moment meets them alike."""
    inputs, found = question(model), [dict[str, list[float]]() for _ in KNOBS]
    for turn in range(turns + 1):
        for knobs, values in zip(KNOBS, found, strict=True):
            generate = partial(model.generate, **inputs, **knobs, do_sample=False)
            with LanguageModelWatch(model.model.language_model) as watch:
                first = watch.noted(partial(generate, max_new_tokens=1))
            whole = seconds_of(partial(generate, max_new_tokens=LONG_ANSWER))
            if turn:  # the first is there to warm up
                for name, value in {**first, f"generate_{LONG_ANSWER}_s": whole.wall}.items():
                    values.setdefault(name, []).append(value)
    rows = []
    for knobs, values in zip(KNOBS, found, strict=True):
        # The lower median, which for lengths and bytes stays a whole number
        medians = {name: statistics.median_low(column) for name, column in values.items()}
        what = ", ".join(f"{name}={value}" for name, value in knobs.items()) or "all"
        tokens = medians["prefill_length"] - sum(TEXT_TOKENS)
        rows.append({"table": "dropping", "what": what, "image_tokens": tokens, **medians, "turns": turns})
    return rows


class LanguageModelWatch:
    """Notes, inside a `with`, what reaches the language model, how long it takes and how large the cache is then."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        self.language_model = language_model

    def __enter__(self) -> "LanguageModelWatch":
        self._hooks = (
            self.language_model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.language_model.register_forward_hook(self._after),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def noted(self, generate: Call) -> dict[str, float]:
        """Of an answer of one token, which takes the prefill alone."""
        started = time.perf_counter()
        generate()
        return {**self._noted, "first_token_s": time.perf_counter() - started}

    def _before(self, module: Any, positional: Any, named: dict[str, Any]) -> None:
        self._length, self._started = named["inputs_embeds"].shape[1], time.perf_counter()

    def _after(self, module: Any, positional: Any, output: Any) -> None:
        seconds, layers = time.perf_counter() - self._started, output.past_key_values.layers
        cache_bytes = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
        self._noted = {"prefill_length": self._length, "cache_bytes": cache_bytes, "prefill_s": seconds}


# ---------------------------------------------------------------------------------------------------------- questions
def questions(model: MaskLlavaForConditionalGeneration, turns: int) -> list[Row]:
    text, image = split(question(model))
    side, num_objects = image["pixel_values"].shape[-1], image["object_embeds"].shape[1]
    masks = torch.zeros(1, num_objects, side, side, dtype=torch.uint8)
    for index in range(num_objects):  # rectangles of different sizes and places
        masks[0, index, index * side // 40 : side // 2, index * side // 50 : side - side // (index + 2)] = 1
    inverted = {"pixel_values": image["pixel_values"], "object_masks": masks, "object_counts": image["object_counts"]}
    encoded = {"mm_encoder_outputs": {"image": model.get_image_features(**image)}}
    asked: dict[str, dict[str, Any]] = {
        "first question, masks inverted in the model (object_masks)": inverted,
        "first question, stored embeddings (object_embeds)": image,
        "second question, image as encoded for the first (mm_encoder_outputs)": encoded,
    }
    rows = []
    for what, given in asked.items():
        # MaskInversion takes longer than all else together, and varies little
        repeats = min(turns, 2) if "object_masks" in given else turns
        cost = measure(partial(model.generate, **text, **given, max_new_tokens=1, do_sample=False), repeats)
        tokens = text["input_ids"].shape[1] - sum(TEXT_TOKENS)
        row = {"table": "questions", "what": what, "image_tokens": tokens, "first_token_s": cost.wall_s}
        rows.append({**row, "first_token_cpu_s": cost.cpu_s, "turns": repeats})
    return rows


# -------------------------------------------------------------------------------------------------------------- tables
def tables(rows: Sequence[Row]) -> str:
    parts = []
    for table, columns in COLUMNS.items():
        chosen = [row for row in rows if row["table"] == table]
        parts.append(markdown(chosen, columns))
        if table == "dropping":
            seconds = [name for name in columns if name.endswith("_s")]
            few = [row for row in chosen if row["image_tokens"] < max(r["image_tokens"] for r in chosen)]
            parts.append("\n".join(line(some, name) for some in (chosen, few) for name in seconds))
    return "\n\n".join(parts)


def line(rows: Sequence[Row], column: str) -> str:
    """The straight line through a column, by image tokens."""
    tokens, seconds = [float(row["image_tokens"]) for row in rows], [row[column] for row in rows]
    slope, start = statistics.linear_regression(tokens, seconds)
    away = max(abs(start + slope * x - y) / y for x, y in zip(tokens, seconds, strict=True))
    return (
        f"* up to {max(tokens):.0f} tokens: {column} = {start:.5f} + {slope:.7f} * image tokens, "
        f"at most {away:.0%} from a measured value"
    )


if __name__ == "__main__":
    main()
