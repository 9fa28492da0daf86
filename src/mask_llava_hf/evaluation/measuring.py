# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""Seconds, memory and matrix rate of this machine, and the CSV files that keep them."""

import csv
import ctypes
import io
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..whole_files import write_whole


Result = TypeVar("Result")

SEED = 0  # of what is random in a measurement: weights, pictures, boxes


class Seconds(NamedTuple):
    """Wall time, and CPU time of all threads, which other programs disturb less."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Measured:
    """What a call cost.

    Attributes:
        wall_s: median over the calls, seconds.
        cpu_s: of all threads, median over the calls, seconds.
        peak_bytes: most memory of its own (anonymous, so without mapped files) that the process held above what it
            held before the first of the calls.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int


def measure(
    function: Callable[[], object], repeats: int = 1, warm_up: bool = True, enough_s: float = math.inf
) -> Measured:
    """Calls a function and takes its time and memory.

    Args:
        repeats: calls that count, at most.
        enough_s: after calls that have taken so many seconds together there is no other.
        warm_up: call it once before, uncounted: first calls allocate, and choose kernels.
    """
    if warm_up:
        function()
    give_memory_back()
    before = anonymous_bytes()
    with PeakMemory() as memory:
        calls = [seconds_of(function)]
        while len(calls) < repeats and sum(call.wall for call in calls) < enough_s:
            calls.append(seconds_of(function))
    wall, cpu = (statistics.median(column) for column in zip(*calls, strict=True))
    return Measured(wall, cpu, max(0, memory.peak_bytes - before))


def measure_pair(
    first: Callable[[], object], second: Callable[[], object], repeats: int = 5
) -> list[tuple[Seconds, Seconds]]:
    """Times two functions in turns, so that a busy moment of the machine meets both; who comes first alternates.

    Returns:
        seconds of `first` and of `second` for each of `repeats` turns; one more before them does not count.
    """
    first(), second()
    turns = []
    for turn in range(repeats):
        if turn % 2:
            of_second = seconds_of(second)
            turns.append((seconds_of(first), of_second))
        else:
            turns.append((seconds_of(first), seconds_of(second)))
    return turns


def seconds_of(function: Callable[[], object]) -> Seconds:
    """Time of one call."""
    started, cpu_started = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - started, time.process_time() - cpu_started)


class PeakMemory:
    """Watches, inside a `with`, the process's anonymous memory every 10 ms."""

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes = anonymous_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def give_memory_back() -> None:
    """What earlier calls freed goes back to the system, where it is Linux, and does not hide what later ones take."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def anonymous_bytes() -> int:
    """Memory of its own that this process holds now; where the system does not tell (not Linux), its resident peak."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024
    except OSError:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident if sys.platform == "darwin" else resident * 1024


def matrix_rate(dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP per second of this machine's products of square matrices, the fastest of those that fit into the time."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    fastest, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


def in_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function of a module in a process of its own, so that its memory is gone afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def circumstances() -> dict[str, Any]:
    """The machine and the versions that figures of speed hold for."""
    return {
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in ("mask-llava-hf", "torch", "transformers")},
        "date": date.today().isoformat(),
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A CSV with the columns of all rows, whole or not at all."""
    columns = {name: None for row in rows for name in row}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A table with the columns of all rows, or those named; floats have four digits, None is an empty cell."""
    columns = list(columns or {name: None for row in rows for name in row})

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
