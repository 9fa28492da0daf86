# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""What an answer costs, from the picture to its first token: the whole chain beside LLaVA with all its patches.

The same as `mask-llava bench`, for the shapes of LLaVA-1.5-7B (random weights, 14 GB in bfloat16, in a process that
holds nothing else) and for the small checkpoint inside the package. About twenty minutes on two cores.

    python benchmarks/chain_cost.py
"""

import argparse
from pathlib import Path

from mask_llava_hf import DEFAULT_CHECKPOINT
from mask_llava_hf.evaluation.chain_report import bench
from mask_llava_hf.evaluation.measured_models import PublishedShapes, SavedCheckpoint


RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops-only", action="store_true", help="count operations, and time nothing")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    for models in (SavedCheckpoint(str(DEFAULT_CHECKPOINT)), PublishedShapes()):
        print(bench(models, options.output_dir, options.threads, options.flops_only, repeats=5), flush=True)


if __name__ == "__main__":
    main()
