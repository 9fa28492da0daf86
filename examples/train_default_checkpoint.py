# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Makes the checkpoint inside the package: trains all parts of a small Mask-LLaVA on the small world, on a CPU.

Each stage leaves `scores.json` in its folder and is then skipped; one that was killed goes on where it was. The first
four do not need each other and run two at a time.

    python examples/train_default_checkpoint.py --work-dir default_work
    python examples/train_default_checkpoint.py --work-dir quick_work --quick    # every stage, in minutes
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from default_checkpoint.answer_scores import ask_about, prior_scores, score_answers
from default_checkpoint.assemble import assemble
from default_checkpoint.card import write_card
from default_checkpoint.part_scores import SCORE_THRESHOLD, score_segmenter
from default_checkpoint.probe_vision_tower import probe_vision_tower
from default_checkpoint.publish import publish
from default_checkpoint.resumable_training import write_scores
from default_checkpoint.scene_pool import scene_pool
from default_checkpoint.train_mask_llava import learn_answers, learn_captions
from default_checkpoint.world_conversations import save_pictures
from shapes_world import make_scene
from transformers import AutoModelForImageTextToText, AutoProcessor

from mask_llava_hf import ObjectStore


EXAMPLES = Path(__file__).parent

EXAMPLE_SCENE = 106  # of the test split, one with six shapes that the checkpoint answers rightly about

PARTS = ("vision_tower", "language_model", "detector", "segmenter")  # the longest first
STAGES = (*PARTS, "probes", "start", "objects", "projector", "finetuned", "published")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("default_work"), help="gets a folder per stage")
    parser.add_argument("--output-dir", type=Path, help="of the finished checkpoint; default: WORK_DIR/published")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="only these; default: all")
    parser.add_argument("--quick", action="store_true", help="few steps on few scenes, to try every stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="parts to train at the same time, one core each")
    options = parser.parse_args()
    torch.set_num_threads(options.jobs)
    work = Work(options.work_dir.absolute(), options.output_dir, options.quick, options.seed, options.jobs)
    work.train_parts([stage for stage in options.stages if stage in PARTS])
    for stage in STAGES[len(PARTS) :]:
        if stage in options.stages:
            work.run(stage)


class Work:
    """The stages, in a folder each."""

    def __init__(self, folder: Path, output_dir: Path | None, quick: bool, seed: int, jobs: int) -> None:
        self.folder, self.quick, self.seed, self.jobs = folder, quick, seed, jobs
        self.output_dir = output_dir or folder / "published"
        self.num_train, self.num_test, self.rounds = (48, 8, 1) if quick else (6000, 300, 24)

    def done(self, stage: str) -> bool:
        return self._scores_file(stage).exists()

    def scores(self, stage: str) -> dict:
        return json.loads(self._scores_file(stage).read_text())

    def _scores_file(self, stage: str) -> Path:
        return self.folder / stage / "scores.json"

    def train_parts(self, names: list[str]) -> None:
        """Trains the parts, each in a process of its own with one thread: models so small win little by a second."""
        with ThreadPoolExecutor(self.jobs) as waiting_for:
            list(waiting_for.map(self._train_part, [name for name in names if not self.done(name)]))

    def _train_part(self, name: str) -> None:
        command = [sys.executable, "-m", f"default_checkpoint.train_{name}", str(self.folder / name)]
        command += ["--seed", str(self.seed), "--cache-dir", str(self.folder / "scenes")] + ["--quick"] * self.quick
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_POSITION": str(PARTS.index(name))}
        subprocess.run(command, cwd=EXAMPLES, env=environment, check=True)

    def run(self, stage: str) -> None:
        """Runs one of the other stages, unless it is done."""
        if self.done(stage):
            print(f"{stage}: done before")
            return
        started = time.perf_counter()
        steps: dict[str, Callable[[], dict[str, float]]] = {
            "probes": self.probe,
            "start": self.assemble,
            "objects": self.precompute,
            "projector": self.train_projector,
            "finetuned": self.finetune,
            "published": self.publish,
        }
        scores = steps[stage]()
        scores["minutes"] = (time.perf_counter() - started) / 60
        self._scores_file(stage).parent.mkdir(parents=True, exist_ok=True)
        write_scores(scores, self._scores_file(stage))
        print(f"{stage}: {json.dumps(self.scores(stage))}")

    def probe(self) -> dict[str, float]:
        found = probe_vision_tower(self.folder / "vision_tower", quick=self.quick, cache_dir=self.folder / "scenes")
        return {"chosen_learning_rate": found["chosen_learning_rate"]}

    def assemble(self) -> dict[str, float]:
        assemble(
            self.folder / "start",
            **{name: self.folder / name for name in PARTS},
            mask_inversion_lr=self.scores("probes")["chosen_learning_rate"],
            score_threshold=SCORE_THRESHOLD,
            seed=self.seed,
        )
        return {}

    def pictures(self, split: str) -> list[Path]:
        count = self.num_train if split == "train" else self.num_test
        return save_pictures(self.folder / "pictures", split, count, self.folder / "scenes")

    def precompute(self) -> dict[str, float]:
        """As a user would, several processes sharing the pictures out (`accelerate launch --cpu` starts only one)."""
        num_pictures = len(self.pictures("train") + self.pictures("test"))
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.jobs)]
        command = [*launch, "-m", "mask_llava_hf.cli", "precompute", self.folder / "pictures", self.folder / "objects"]
        command += ["--checkpoint", self.folder / "start", "--batch-size", "32", "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run([str(word) for word in command], env=environment, check=True)
        return {"pictures": num_pictures}

    def store(self) -> ObjectStore:
        return ObjectStore.open(self.folder / "objects")

    def train_projector(self) -> dict[str, float]:
        pictures, store = self.pictures("train"), self.store()
        return learn_captions(self.folder / "start", self.folder / "projector", pictures, store, seed=self.seed)

    def finetune(self) -> dict[str, float]:
        pictures, store = self.pictures("train"), self.store()
        return learn_answers(
            self.folder / "projector", self.folder / "finetuned", pictures, store, rounds=self.rounds, seed=self.seed
        )

    def publish(self) -> dict[str, float]:
        publish(self.folder / "finetuned", self.output_dir)
        make_scene("test", EXAMPLE_SCENE).draw().save(self.output_dir / "example.png")
        model = AutoModelForImageTextToText.from_pretrained(self.output_dir)
        processor = AutoProcessor.from_pretrained(self.output_dir)
        asked = ask_about(self.pictures("test"), self.store())
        answers = {
            "right": score_answers(model, processor, asked),
            "with 5 objects": score_answers(model, processor, asked, max_object_tokens=5),
            "with none": score_answers(model, processor, asked, max_object_tokens=0),
            "without looking": prior_scores(asked),
        }
        pool = scene_pool("test", 16 if self.quick else 500, self.folder / "scenes")
        masks = score_segmenter(self.folder / "segmenter", pool, self.folder / "detector")
        write_card(self.folder, answers, masks, self.output_dir)
        return {f"{how}: {kind}": score for how, scores in answers.items() for kind, score in scores.items()}


if __name__ == "__main__":
    main()
