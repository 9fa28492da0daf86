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
from typing import Any

import numpy as np
import torch
from shapes_world import COLORS, KINDS, SIZES
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

_ATTRIBUTES = {"size": len(SIZES), "color": len(COLORS), "kind": len(KINDS), "place": 9}
_BATCH_SIZE = 100  # scenes


def probe_vision_tower(
    tower_dir: str | PathLike[str], *, quick: bool = False, cache_dir: str | PathLike[str] | None = None
) -> dict[str, Any]:
    """Probes a tower, and keeps the result beside it in `probes.json`.

    Args:
        tower_dir: folder of `train_vision_tower`.
        quick: few scenes, to try the script.
        cache_dir: folder that keeps drawn scenes for the next call.

    Returns:
        "accuracy": for each source of features ("cls": after the last block, where MaskInversion starts;
        "mask_inversion" of the shape's visible pixels, at the chosen learning rate; "mask_pooling" at layer -2) and
        "chance" (always the class most frequent among the fitted) the part of shapes whose "size", "color", "kind" and
        "place" are told, and their "mean";
        "learning_rates": for each a dict with "learning_rate", the mean "dice_at_start" and "dice" loss before the
        first and after the last step, and the probes' mean "accuracy";
        "chosen_learning_rate": see `choose_learning_rate`; "num_shapes": fitted to, and scored on.
    """
    num_fit, num_test = (30, 20) if quick else (600, 400)
    tower = CLIPVisionModel.from_pretrained(tower_dir).eval()
    image_processor = LlavaImageProcessor.from_pretrained(tower_dir)
    fit, test = (
        read_features(tower, image_processor, scene_pool(split, count, cache_dir))
        for split, count in (("validation", num_fit), ("test", num_test))
    )
    classes, test_classes = fit.pop("attributes"), test.pop("attributes")
    dice = {rate: test.pop(f"dice {rate}").mean(0).tolist() for rate in LEARNING_RATES}
    accuracy = {"chance": (test_classes == classes.mode(dim=0).values).double().mean(0).tolist()}
    for source, features in test.items():
        accuracy[source] = [
            probe_accuracy(fit[source], classes[:, index], features, test_classes[:, index], num_classes)
            for index, num_classes in enumerate(_ATTRIBUTES.values())
        ]
    named = {
        source: {**dict(zip(_ATTRIBUTES, values, strict=True)), "mean": float(np.mean(values))}
        for source, values in accuracy.items()
    }
    rates = [
        {
            "learning_rate": rate,
            "dice_at_start": dice[rate][0],
            "dice": dice[rate][1],
            "accuracy": named[f"mask_inversion {rate}"]["mean"],
        }
        for rate in LEARNING_RATES
    ]
    chosen = choose_learning_rate(rates)
    named["mask_inversion"] = named[f"mask_inversion {chosen}"]
    results = {
        "accuracy": {source: named[source] for source in ("chance", "cls", "mask_inversion", "mask_pooling")},
        "learning_rates": rates,
        "chosen_learning_rate": chosen,
        "num_shapes": [len(classes), len(test_classes)],
    }
    unfinished = Path(tower_dir) / "probes.json.unfinished"
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(unfinished.with_suffix(""))
    return results


@torch.no_grad()
def read_features(
    tower: CLIPVisionModel, image_processor: LlavaImageProcessor, scenes: ScenePool
) -> dict[str, Tensor]:
    """All shapes of the scenes, S of them, as the tower sees them.

    Returns:
        "attributes" (S, 4) int; "cls", "mask_pooling" and, for each learning rate, "mask_inversion RATE" (S, D), and
        "dice RATE" (S, 2), the loss before the first step and after the last.
    """
    found: dict[str, list[Tensor]] = {"attributes": [torch.from_numpy(attributes(scenes)[_shown(scenes)])]}
    masks = torch.from_numpy(scenes.owners[:, None] == np.arange(1, scenes.looks.shape[1] + 1)[:, None, None])
    pixel_values, shown = normalized(scenes.images, image_processor), torch.from_numpy(_shown(scenes))
    for pixels, own, real in zip(*(each.split(_BATCH_SIZE) for each in (pixel_values, masks, shown)), strict=True):
        seen = tower(pixels, output_hidden_states=True)
        states = seen.hidden_states[LAST_BLOCK_INPUT]
        batch = {
            "cls": seen.pooler_output[:, None].expand(-1, own.shape[1], -1),
            "mask_pooling": pool_masks(states[:, 1:], own),
        }
        for rate in LEARNING_RATES:
            # One step more than needed, since the loss is evaluated before each.
            settings = MaskInversionSettings(iterations=ITERATIONS + 1, lr=rate, chunk_size=own.shape[1])
            inverted = invert_masks(tower, states, own, settings, return_history=True)
            batch[f"mask_inversion {rate}"] = inverted.embeddings_history[:, ITERATIONS]
            batch[f"dice {rate}"] = inverted.dice_history[:, [0, ITERATIONS]].transpose(1, 2)
        for name, values in batch.items():
            found.setdefault(name, []).append(values[real])
    return {name: torch.cat(values) for name, values in found.items()}


def _shown(scenes: ScenePool) -> np.ndarray:
    """(n, largest count) bool: which shapes there are."""
    return np.arange(scenes.looks.shape[1]) < scenes.counts[:, None]


def probe_accuracy(
    features: Tensor, classes: Tensor, test_features: Tensor, test_classes: Tensor, num_classes: int, l2: float = 1e-3
) -> float:
    """Part of the test rows whose class is told by a multinomial logistic regression fitted to the other rows.

    Args:
        features: (S, D), standardised with their own mean and deviation.
        classes: (S,) int.
        l2: weight of the squared coefficients beside the mean cross-entropy.
    """
    mean, deviation = features.double().mean(0), features.double().std(0).clamp_min(1e-8)
    features, test_features = ((values.double() - mean) / deviation for values in (features, test_features))
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), classes) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    told = F.linear(test_features, weight, bias).argmax(-1)
    return (told == test_classes).double().mean().item()


def choose_learning_rate(rates: list[dict[str, float]]) -> float:
    """The one with the lowest dice loss, among those whose probes come within LEAST_DIFFERENCE of the best probes."""
    best = max(rate["accuracy"] for rate in rates)
    able = [rate for rate in rates if rate["accuracy"] >= best - LEAST_DIFFERENCE]
    return min(able, key=lambda rate: rate["dice"])["learning_rate"]


def as_markdown(results: dict[str, Any]) -> str:
    """Two tables: accuracies by source of the features, and learning rates."""
    lines = [f"| read from | {' | '.join(_ATTRIBUTES)} | mean |", f"|---{'|--:' * (len(_ATTRIBUTES) + 1)}|"]
    for source, values in results["accuracy"].items():
        lines.append(f"| {source.replace('_', ' ')} | {' | '.join(f'{value:.3f}' for value in values.values())} |")
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
