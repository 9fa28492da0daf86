# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""A training loop that, killed and started again, ends with the same weights as one never killed."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange


def train(
    model: nn.Module,
    loss_at: Callable[[np.random.Generator], Tensor],
    state_path: Path,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    save_every: int,
    beta2: float = 0.999,
) -> dict[str, float]:
    """Trains a model with AdamW, a short warm-up and a cosine fall of the learning rate to zero.

    All that is random in a step comes from the seed and the step's number: from the generator that `loss_at` gets, and
    from torch's own, seeded anew. So the saved state needs no state of random numbers.

    Args:
        loss_at: loss of one step.
        state_path: where weights and optimizer are saved every `save_every` steps; found there, training goes on from
            it. The caller removes it when the trained model is saved.
        beta2: of AdamW.

    Returns:
        "first_loss", "last_loss" (means of the first and last twentieth of the steps) and "minutes".

    Raises:
        ValueError: the state found is of a training with other steps, seed or learning rate.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, beta2), weight_decay=0.01, fused=True
    )
    settings = {"steps": steps, "seed": seed, "learning_rate": learning_rate}
    losses: list[float] = []
    seconds = 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{str(state_path)!r} is of a training with {state['settings']}, this one has {settings}. Give it "
                "another folder, or remove that file to start afresh."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, seconds = state["losses"], state["seconds"]
    model.train()
    started = time.perf_counter() - seconds
    warm_up = min(100, steps // 10)
    progress = trange(len(losses), steps, initial=len(losses), total=steps, mininterval=5, desc=state_path.parent.name)
    for step in progress:
        torch.manual_seed((seed << 32) + step)
        fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / (warm_up + 1), 1) * fall
        loss = loss_at(np.random.default_rng((seed, step)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
        if (step + 1) % max(1, save_every) == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            _save(state | {"settings": settings, "seconds": time.perf_counter() - started}, state_path)
    some = max(1, steps // 20)
    return {
        "first_loss": float(np.mean(losses[:some])),
        "last_loss": float(np.mean(losses[-some:])),
        "minutes": (time.perf_counter() - started) / 60,
    }


def _save(state: dict[str, Any], path: Path) -> None:
    """Under another name first, so that a kill while writing leaves the state before."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def write_scores(scores: dict[str, float], path: Path) -> None:
    """JSON, rounded to what differs between trainings."""
    path.write_text(json.dumps({name: round(value, 4) for name, value in scores.items()}, indent=2) + "\n")


def training_parser(doc: str, steps: int) -> argparse.ArgumentParser:
    """The command line that the trainings of all parts share, described by the first paragraph of `doc`."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="folder for the model and its scores")
    parser.add_argument("--steps", type=int, default=steps, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and noise")
    parser.add_argument("--quick", action="store_true", help="few steps on few scenes, to try the script")
    parser.add_argument("--cache-dir", type=Path, help="folder that keeps drawn scenes for the next call")
    parser.add_argument("--threads", type=int, default=1, help="of torch; models so small win little by more")
    return parser


def run(training: Callable[..., dict[str, float]], parser: argparse.ArgumentParser) -> None:
    """Calls a training with what the command line says, and prints its scores."""
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    print(json.dumps(training(**options), indent=2))
