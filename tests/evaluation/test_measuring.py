import csv
import os
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mask_llava_hf.evaluation.flop_counts import count_flops
from mask_llava_hf.evaluation.measuring import (
    PeakMemory,
    anonymous_bytes,
    circumstances,
    in_process,
    markdown,
    matrix_rate,
    measure,
    measure_pair,
    write_rows,
)


def test_a_measured_function_is_called_as_often_as_told():
    calls = []
    measured = measure(lambda: calls.append(1), repeats=3)
    assert len(calls) == 4  # the first does not count
    measure(lambda: calls.append(1), repeats=2, warm_up=False)
    assert len(calls) == 6
    assert measured.wall_s > 0 and measured.peak_bytes >= 0


def test_what_takes_long_is_called_less_often():
    calls = []
    measure(lambda: (calls.append(1), time.sleep(0.02)), repeats=10**9, warm_up=False, enough_s=0.03)
    assert len(calls) in (1, 2)


def test_a_pair_takes_turns():
    calls = []
    turns = measure_pair(lambda: (calls.append("a"), time.sleep(0.02)), lambda: calls.append("b"), repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(turns) == 3
    for first, second in turns:  # a sleep is wall time of the first alone, and no CPU time
        assert first.wall >= 0.02 > first.cpu and second.wall < first.wall


def test_tables_have_the_columns_of_all_rows():
    rows = [{"a": 1, "b": 0.123456}, {"a": None, "c": "x"}]
    assert markdown(rows).splitlines() == ["| a | b | c |", "| --- | --- | --- |", "| 1 | 0.1235 |  |", "|  |  | x |"]
    assert markdown(rows, ["c", "a"]).splitlines()[2:] == ["|  | 1 |", "| x |  |"]


def test_memory_that_is_held_for_a_moment_is_seen():
    before = anonymous_bytes()
    with PeakMemory() as memory:
        held = torch.ones(50_000_000, dtype=torch.uint8)
        for _ in range(30):
            held.add_(1)
        del held
    assert memory.peak_bytes - before >= 40_000_000


def test_the_matrix_rate_is_that_of_a_computer():
    assert 1e8 < matrix_rate(torch.float32, size=256, seconds=0.05) < 1e15


def test_a_process_of_its_own():
    assert in_process(os.getpid) != os.getpid()


def test_rows_have_the_columns_of_all(tmp_path):
    write_rows(tmp_path / "new/rows.csv", [{"a": 1}, {"a": 2, "b": "x"}])
    with open(tmp_path / "new/rows.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "x"}]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.csv"]


def test_circumstances_name_machine_and_versions():
    told = circumstances()
    assert told["threads"] == torch.get_num_threads() and told["torch"] == torch.__version__.split("+")[0]
    assert told["processor"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_are_counted_twice_per_multiply_add(device):
    linear = nn.Linear(5, 7, bias=False, device=device)
    assert count_flops(lambda: linear(torch.ones(3, 5, device=device))) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bilinear_sampling_is_counted(device):
    pixels, places = torch.ones(1, 4, 8, 8, device=device), torch.zeros(1, 3, 2, 2, device=device)
    assert count_flops(lambda: F.grid_sample(pixels, places, align_corners=False)) == 8 * 4 * 3 * 2
