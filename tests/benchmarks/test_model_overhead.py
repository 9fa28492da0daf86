# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
import csv
import sys

import model_overhead
import pytest
import torch
from overhead_models import SHAPES, TEXT_TOKENS, as_llava, build, question

from mask_llava_hf import MaskLlavaForConditionalGeneration


@pytest.fixture(scope="module")
def alike() -> MaskLlavaForConditionalGeneration:
    config = SHAPES["tiny"](use_cls_token=False, max_object_tokens=0)
    return build(MaskLlavaForConditionalGeneration, config, torch.float32)


def test_quick_run_fills_all_tables(tmp_path, monkeypatch, capsys):
    output = tmp_path / "overhead.csv"
    monkeypatch.setattr(model_overhead, "RESULTS", tmp_path / "kept.csv")
    monkeypatch.setattr(sys, "argv", ["model_overhead.py", "--quick", "--output", str(output)])
    model_overhead.main()
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert not (tmp_path / "kept.csv").exists()
    for table, columns in model_overhead.COLUMNS.items():
        assert f"| {' | '.join(columns)} |" in printed
        found = [row for row in rows if row["table"] == table]
        assert found
        assert all(row[column] for row in found for column in (*columns, "dtype", "processor", "torch"))


@torch.no_grad()
def test_both_sides_share_weights_and_give_the_same(alike):
    llava = as_llava(alike)
    assert llava.lm_head.weight.data_ptr() == alike.lm_head.weight.data_ptr()
    inputs = question(alike)
    torch.testing.assert_close(alike(**inputs).logits, llava(**inputs).logits, rtol=0, atol=0)


def test_different_outputs_are_not_timed():
    with pytest.raises(AssertionError):
        model_overhead.compare("forward", 1, lambda: torch.zeros(1, 16), lambda: torch.ones(1, 16), turns=1)


@torch.no_grad()
def test_dropping_counts_what_the_language_model_got(alike):
    full = build(MaskLlavaForConditionalGeneration, SHAPES["tiny"](), torch.float32, alike)
    rows = model_overhead.dropping(full, turns=1)
    assert [row["image_tokens"] for row in rows] == [1 + 144 + 20, 57, 42, 29, 15, 57, 47, 42, 39, 38, 37]
    text = full.config.text_config
    for row in rows:
        assert row["prefill_length"] == row["image_tokens"] + sum(TEXT_TOKENS)
        assert row["cache_bytes"] == row["prefill_length"] * text.num_hidden_layers * 2 * text.hidden_size * 4


def test_line_through_the_tokens():
    rows = [{"image_tokens": tokens, "prefill_s": 0.5 + 0.25 * tokens} for tokens in (15, 29, 57)]
    printed = model_overhead.line(rows, "prefill_s")
    assert "up to 57 tokens: prefill_s = 0.50000 + 0.2500000 * image tokens, at most 0%" in printed
