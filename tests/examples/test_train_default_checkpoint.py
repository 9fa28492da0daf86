# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The one command that makes the checkpoint inside the package, quickly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor


SCRIPT = Path(__file__).parents[2] / "examples" / "train_default_checkpoint.py"


@pytest.mark.slow
def test_every_stage_runs_once_and_ends_in_a_checkpoint(tmp_path):
    command = [sys.executable, SCRIPT, "--work-dir", tmp_path, "--quick"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert first.returncode == 0, first.stderr[-3000:]

    checkpoint = tmp_path / "published"
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert processor.object_settings["detector"] == "./detector"
    assert model.config.mask_inversion["lr"] in (0.05, 0.1, 0.2, 0.5, 1.0)  # the one that the probes chose
    assert "Scores" in (checkpoint / "README.md").read_text()

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("done before") == 6
