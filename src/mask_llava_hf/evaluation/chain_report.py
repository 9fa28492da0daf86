# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Measures the chain of some models and writes what came out: tables as CSV, and a picture."""

import importlib.util
from pathlib import Path

from .chain_cost import BUDGETS, chains, measure_chains, table
from .chain_plot import draw_chains
from .measured_models import Models
from .measuring import write_rows


def bench(
    models: Models,
    output_dir: Path,
    threads: int | None = None,
    flops_only: bool = False,
    repeats: int = 3,
    candidates: int = 50,
) -> str:
    """Measures all chains of `chains`.

    Args:
        models: to measure.
        output_dir: gets `chain_cost_NAME.csv`, `chain_stages_NAME.csv`, and where matplotlib is installed a picture of
            the first. With `flops_only` all names end in `_flops`.
        threads, flops_only, repeats: see `measure_chains`.
        candidates: see `chains`.

    Returns:
        the table in Markdown.
    """
    patches = (models.config().vision_config.image_size // models.config().vision_config.patch_size) ** 2
    wanted = chains(models, candidates, [budget for budget in BUDGETS if budget < patches])
    stage_rows, chain_rows = measure_chains(models, wanted, threads=threads, flops_only=flops_only, repeats=repeats)
    name = models.name.lower() + "_flops" * flops_only
    write_rows(output_dir / f"chain_stages_{name}.csv", stage_rows)
    write_rows(output_dir / f"chain_cost_{name}.csv", chain_rows)
    if importlib.util.find_spec("matplotlib") is not None:
        draw_chains(chain_rows, output_dir / f"chain_cost_{name}.png", "gflop" if flops_only else "wall_s")
    return f"{models.name}, {str(models.dtype)[6:]}, {chain_rows[0]['threads']} threads\n\n{table(chain_rows)}\n"
