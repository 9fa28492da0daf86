# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
r"""Does it behave as the paper says? Accuracy on held-out scenes of the small world, by tokens per image.

The streams are compared at equal budgets of 57, 42, 29 and 15 tokens: patches alone, CLS and patches, and all three,
each trained so from several seeds; then all three with 0 to 20 objects, and ablations. Every run is a process of its
own with one thread. A run that was killed starts again; one that is finished is not repeated.

    python examples/train_default_checkpoint.py --work-dir WORK --stages \
        vision_tower language_model detector segmenter probes start objects
    python benchmarks/accuracy_by_tokens.py --work-dir WORK
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the small world and its trainings are no package

from accuracy_report import draw, merge, summary
from accuracy_runs import ABLATIONS, VARIANTS, Schedule, run, with_mean
from default_checkpoint.answer_scores import ask_about, prior_scores

from mask_llava_hf import ObjectStore
from mask_llava_hf.evaluation.measuring import write_rows
from mask_llava_hf.whole_files import write_whole


HERE = Path(__file__).parent
QUICK = Schedule(pictures=32, rounds=1, test_pictures=8)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    bench = Benchmark(options.work_dir.absolute(), options.schedule)
    if options.run:
        bench.run_here(options.run[0], int(options.run[1]))
        return
    failed = [] if options.merge_only else bench.run_all(options.runs, options.jobs)
    output_dir = options.output_dir or (bench.folder if options.quick else HERE / "results")
    print(f"\n{bench.publish(output_dir)}\n\nwritten to {output_dir}")
    if failed:
        sys.exit(f"{len(failed)} run(s) failed; their logs: {', '.join(map(str, failed))}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="of train_default_checkpoint.py")
    parser.add_argument("--output-dir", type=Path, help="of CSV and plot; default: results/ beside this file")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--ablations", nargs="*", choices=ABLATIONS, default=list(ABLATIONS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the variants; default: 0 1 2")
    parser.add_argument("--ablation-seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--num-pictures", type=int, default=4000, help="to train on; default: 4000")
    parser.add_argument("--rounds", type=int, default=4, help="conversations about each; default: 4")
    parser.add_argument("--num-test", type=int, default=300, help="held-out pictures; default: 300")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; default: 2")
    parser.add_argument("--merge-only", action="store_true", help="publish what is finished, and run nothing")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "SEED"), help="this run alone, in this process")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try it; results stay in the work folder")
    options = parser.parse_args()
    options.schedule = QUICK if options.quick else Schedule(options.num_pictures, options.rounds, options.num_test)
    options.runs = [(name, seed) for seed in options.seeds for name in options.variants]
    options.runs += [(name, seed) for seed in options.ablation_seeds for name in options.ablations]
    return options


class Benchmark:
    """All runs from one starting checkpoint with one schedule; their results lie in a folder of their own.

    Attributes:
        start: a hash of the starting checkpoint and of how the objects were made.
        folder: has per run a folder of checkpoints, a log, and when it is finished a CSV.
    """

    def __init__(self, work_dir: Path, schedule: Schedule) -> None:
        self.work_dir, self.schedule = work_dir, schedule
        files = [work_dir / name for name in ("start/config.json", "start/model.safetensors", "objects/store.json")]
        for path in files:
            if not path.is_file():
                sys.exit(f"{path} is not there: run the stages up to `objects` of train_default_checkpoint.py first.")
        self.start = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
        name = f"{self.start}-{schedule.pictures}x{schedule.rounds}-{schedule.test_pictures}"
        self.folder = work_dir / "accuracy_by_tokens" / name

    def part(self, name: str, seed: int) -> Path:
        """Where a finished run has left its rows."""
        return self.folder / f"{name.replace(' ', '_')}-{seed}.csv"

    def run_here(self, name: str, seed: int) -> None:
        """One run, in this process."""
        part = self.part(name, seed)
        rows = run(name, seed, self.schedule, self.work_dir, part.with_suffix(""))
        told = {
            "test_pictures": self.schedule.test_pictures,
            "start": self.start,
            **{package: version(package) for package in ("mask-llava-hf", "torch", "transformers")},
            "date": date.today().isoformat(),
        }
        write_rows(part, [{**row, **told} for row in rows])

    def run_all(self, runs: list[tuple[str, int]], jobs: int) -> list[Path]:
        """The runs that are not finished, some at a time; returns the logs of those that failed."""
        todo = [one for one in runs if not self.part(*one).exists()]
        print(f"{len(runs) - len(todo)} of {len(runs)} runs were finished before; logs and results: {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            self.schedule.paths(self.work_dir, split)  # what is missing is drawn once, not by every run
        with ThreadPoolExecutor(jobs) as waiting_for:
            return [log for log in waiting_for.map(lambda one: self._run_in_process(*one), todo) if log is not None]

    def _run_in_process(self, name: str, seed: int) -> Path | None:
        log, started = self.part(name, seed).with_suffix(".log"), time.perf_counter()
        command = [sys.executable, __file__, "--work-dir", self.work_dir, "--run", name, seed]
        command += ["--num-pictures", self.schedule.pictures, "--rounds", self.schedule.rounds]
        command += ["--num-test", self.schedule.test_pictures]
        print(f"{name}, seed {seed}: started", flush=True)
        with open(log, "w") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(list(map(str, command)), env=environment, stdout=output, stderr=subprocess.STDOUT)
        minutes = (time.perf_counter() - started) / 60
        print(f"{name}, seed {seed}: {'failed' if done.returncode else 'done'}, {minutes:.1f} minutes", flush=True)
        return log if done.returncode else None

    def publish(self, output_dir: Path) -> str:
        """Writes CSV and plot of all runs that are finished, and returns a summary."""
        parts = sorted(self.folder.glob("*-[0-9]*.csv"))  # not what was published there
        if not parts:
            sys.exit(f"No run is finished in {self.folder}.")
        rows = merge(parts, self.prior())
        write_rows(output_dir / "accuracy_by_tokens.csv", rows)
        draw(rows, output_dir / "accuracy_by_tokens.png")
        return summary(rows)

    def prior(self) -> dict[str, float]:
        """What one scores who never looks, per kind of question."""
        path = self.folder / "prior.json"
        if not path.exists():
            store = ObjectStore.open(self.work_dir / "objects")
            asked = ask_about(self.schedule.paths(self.work_dir, "test"), store)
            content = json.dumps(with_mean(prior_scores(asked)))
            write_whole(path, lambda file: file.write(content.encode()))
        return json.loads(path.read_text())


if __name__ == "__main__":
    main()
