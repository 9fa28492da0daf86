# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What a saved vision tower knows about a masked shape, and which learning rate inverts its masks best.

About five minutes on one core. Run inside `examples/`:

    python -m default_checkpoint.probe_vision_tower TOWER_FOLDER

A probe is a linear classifier on frozen features: what it can tell, a language model can read. Probes are fitted to
shapes of the "validation" scenes and scored on those of the "test" scenes; the tower's training saw neither.
"""

import argparse
import json
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlavaImageProcessor

from mask_llava_hf.modeling.mask_inversion import MaskInversionSettings, invert_masks
from mask_llava_hf.modeling.object_embedding import LAST_BLOCK_INPUT, pool_masks

from .scene_pool import ScenePool, scene_pool
from .statements import attributes
from .train_vision_tower import normalized


LEARNING_RATES = (0.05, 0.1, 0.2, 0.5, 1.0)
ITERATIONS = 10
LEAST_DIFFERENCE = 0.02  # between mean accuracies, for the probes to tell two learning rates apart
SOURCES = ("chance", "cls", "mask_inversion", "mask_pooling")
ATTRIBUTES = ("size", "color", "kind", "place")  # in the order of `attributes`


def probe_vision_tower(
    tower_dir: str | PathLike[str], *, quick: bool = False, cache_dir: str | PathLike[str] | None = None
) -> dict[str, Any]:
    """Probes a tower, and keeps the results beside it in `probes.json`.

    Args:
        tower_dir: folder of `train_vision_tower`.
        quick: few scenes, to try the script.
        cache_dir: folder that keeps drawn scenes for the next call.

    Returns:
        "accuracy": from each source, the part of shapes whose "size", "color", "kind" and "place" are told. Sources are
        "chance" (always the most frequent class), "cls" (after the last block, where MaskInversion starts),
        "mask_inversion" of the visible pixels (at the chosen rate), and "mask_pooling" of layer -2;
        "learning_rates": of each the mean "dice_at_start" and, after the last step, "dice" loss, and the probes' mean
        "accuracy"; "chosen_learning_rate", see there; "num_shapes" that probes were fitted to, and scored on.
    """
    tower = CLIPVisionModel.from_pretrained(tower_dir).eval()
    image_processor = LlavaImageProcessor.from_pretrained(tower_dir)
    fit = read_features(tower, image_processor, scene_pool("validation", 20 if quick else 600, cache_dir))
    test = read_features(tower, image_processor, scene_pool("test", 10 if quick else 400, cache_dir))
    classes, test_classes = fit.pop("attributes"), test.pop("attributes")
    losses = {rate: test.pop(f"dice {rate}").mean(0).tolist() for rate in LEARNING_RATES}
    told = {"chance": (test_classes == classes.mode(dim=0).values).double().mean(0).tolist()}
    for source, features in test.items():
        columns = zip(classes.unbind(1), test_classes.unbind(1), strict=True)
        told[source] = [probe_accuracy(fit[source], own, features, other) for own, other in columns]
    rates = [
        {"learning_rate": rate, "dice_at_start": start, "dice": end, "accuracy": fmean(told[f"inverted {rate}"])}
        for rate, (start, end) in losses.items()
    ]
    chosen = choose_learning_rate(rates)
    told["mask_inversion"] = told[f"inverted {chosen}"]
    results = {
        "accuracy": {source: dict(zip(ATTRIBUTES, told[source], strict=True)) for source in SOURCES},
        "learning_rates": rates,
        "chosen_learning_rate": chosen,
        "num_shapes": [len(classes), len(test_classes)],
    }
    unfinished = Path(tower_dir, "probes.json.unfinished")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(unfinished.with_suffix(""))
    return results


@torch.no_grad()
def read_features(tower: CLIPVisionModel, image_processor: LlavaImageProcessor, scenes: ScenePool) -> dict[str, Tensor]:
    """How the tower sees the scenes' shapes, S in all.

    "attributes" is (S, 4) int; "cls", "mask_pooling" and, for each learning rate, "inverted RATE" are (S, D), and
    "dice RATE" is (S, 2), the loss before the first step and after the last.
    """
    masks = torch.from_numpy(scenes.owners[:, None] == np.arange(1, scenes.looks.shape[1] + 1)[:, None, None])
    seen = tower(normalized(scenes.images, image_processor), output_hidden_states=True)
    states = seen.hidden_states[LAST_BLOCK_INPUT]
    found = {
        "attributes": torch.from_numpy(attributes(scenes)),
        "cls": seen.pooler_output[:, None].expand(-1, masks.shape[1], -1),
        "mask_pooling": pool_masks(states[:, 1:], masks),
    }
    for rate in LEARNING_RATES:  # with one step more, since the loss is known before each
        settings = MaskInversionSettings(iterations=ITERATIONS + 1, lr=rate)
        inverted = invert_masks(tower, states, masks, settings, return_history=True)
        found[f"inverted {rate}"] = inverted.embeddings_history[:, ITERATIONS]
        found[f"dice {rate}"] = inverted.dice_history[:, [0, ITERATIONS]].transpose(1, 2)
    shown = masks.flatten(2).any(-1)
    return {name: values[shown] for name, values in found.items()}


def probe_accuracy(features: Tensor, classes: Tensor, test_features: Tensor, test_classes: Tensor) -> float:
    """Part of the test rows whose class is told by a logistic regression, with L2, fitted to the other rows.

    Features are (rows, D), standardised as those fitted to; classes (rows,) int.
    """
    mean, deviation = features.double().mean(0), features.double().std(0).clamp_min(1e-8)
    features, test_features = ((values.double() - mean) / deviation for values in (features, test_features))
    weight = torch.zeros(int(classes.max()) + 1, features.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), classes) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (F.linear(test_features, weight, bias).argmax(-1) == test_classes).double().mean().item()


def choose_learning_rate(rates: list[dict[str, float]]) -> float:
    """The one with the lowest dice loss, among those whose probes come within LEAST_DIFFERENCE of the best probes."""
    best = max(rate["accuracy"] for rate in rates)
    able = (rate for rate in rates if rate["accuracy"] >= best - LEAST_DIFFERENCE)
    return min(able, key=lambda rate: rate["dice"])["learning_rate"]


def as_markdown(results: dict[str, Any]) -> str:
    """Two tables: accuracies by source of the features, and learning rates."""
    lines = [f"| read from | {' | '.join(ATTRIBUTES)} | mean |", f"|---{'|--:' * (len(ATTRIBUTES) + 1)}|"]
    for source, values in results["accuracy"].items():
        told = (*values.values(), fmean(values.values()))
        lines.append(f"| {source.replace('_', ' ')} | {' | '.join(f'{part:.3f}' for part in told)} |")
    lines += ["", f"| learning rate | dice at start | after {ITERATIONS} steps | mean accuracy |", "|--:|--:|--:|--:|"]
    for rate in results["learning_rates"]:
        name = f"{rate['learning_rate']}{' (chosen)' * (rate['learning_rate'] == results['chosen_learning_rate'])}"
        lines.append(f"| {name} | {rate['dice_at_start']:.3f} | {rate['dice']:.3f} | {rate['accuracy']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tower_dir", type=Path, metavar="TOWER_FOLDER", help="where the tower is; gets probes.json")
    parser.add_argument("--quick", action="store_true", help="few scenes, to try the script")
    parser.add_argument("--cache-dir", type=Path, help="folder that keeps drawn scenes for the next call")
    print(as_markdown(probe_vision_tower(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
