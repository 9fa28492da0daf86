"""Two processes train as one does, under DDP and under FSDP, also where only one of them has images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_training
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor


TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    distributed_training.main("single", folder)
    return folder


def losses(folder, training):
    history = json.loads((folder / "results.json").read_text())[training]
    steps = [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    assert len(steps) == 4
    return torch.tensor(steps)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind, alone, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(TESTS.parent / "examples"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(TESTS / "distributed_training.py"), kind, str(tmp_path)]
    # Processes that wait for each other end themselves earlier, and say where
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]

    for training in ("full", "language model only"):
        torch.testing.assert_close(losses(tmp_path, training), losses(alone, training), rtol=1e-4, atol=1e-4)
    found, expected = (json.loads((folder / "results.json").read_text())["evaluation"] for folder in (tmp_path, alone))
    assert found == pytest.approx(expected, rel=1e-4)

    weights = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(weights, load_file(alone / "model.safetensors"), rtol=0, atol=1e-4)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    start, _ = distributed_training.build()
    for before, after in zip(start.model.vision_tower.parameters(), model.model.vision_tower.parameters(), strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(start.lm_head.weight, model.lm_head.weight)
    assert AutoProcessor.from_pretrained(tmp_path).object_settings["patch_grid_size"] == 2
