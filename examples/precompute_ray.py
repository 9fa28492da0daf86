# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Makes the objects of a folder of images on a cluster: `mask-llava precompute` as a step of Ray Data.

Every actor fills the same store, so all machines must see its folder. Started again, it makes only what is missing.

    pip install "mask-llava-hf[ray]"
    python examples/precompute_ray.py IMAGES STORE --checkpoint FOLDER_OR_HUB_ID --actors 8 --gpus-per-actor 1
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ray
from transformers import AutoProcessor

from mask_llava_hf.precompute import PrecomputeWorker


class StoreObjects:
    """An actor: holds the models, and stores the objects of one block of images after the other."""

    def __init__(self, checkpoint: str, store: str) -> None:
        self.worker = PrecomputeWorker(AutoProcessor.from_pretrained(checkpoint), store)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        report = self.worker(zip(block["path"].tolist(), block["bytes"].tolist(), strict=True))
        return {"stored": [report.stored], "known": [report.known], "skipped": [json.dumps(report.skipped)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("images", help="a folder, also on S3 or the like")
    parser.add_argument("store", help="folder of the store, which all machines see")
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id")
    parser.add_argument("--actors", type=int, default=1, help="processes, on all machines together")
    parser.add_argument("--gpus-per-actor", type=float, default=0)
    options = parser.parse_args()

    checkpoint = str(Path(options.checkpoint).resolve()) if Path(options.checkpoint).exists() else options.checkpoint
    blocks = ray.data.read_binary_files(options.images, include_paths=True).map_batches(
        StoreObjects,
        fn_constructor_args=(checkpoint, str(Path(options.store).resolve())),
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_gpus=options.gpus_per_actor,
    )
    stored = known = 0
    for block in blocks.iter_rows():
        stored, known = stored + block["stored"], known + block["known"]
        for name, reason in json.loads(block["skipped"]):
            print(f"skipped {name}: {reason}")
    print(f"{options.store}: stored the objects of {stored} images; {known} were there already")


if __name__ == "__main__":
    main()
