# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
import csv
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accuracy_by_tokens
import accuracy_runs
import pytest
import torch
from accuracy_by_tokens import Benchmark
from accuracy_report import draw, merge, summary
from accuracy_runs import ABLATIONS, BUDGETS, MEAN, OBJECT_CAPS, VARIANTS, Schedule
from default_checkpoint import train_mask_llava
from default_checkpoint.answer_scores import AskedPicture, ask_about, prior_scores, score_answers
from PIL import Image
from shapes_world import QUESTION_KINDS, make_scene
from transformers import AutoModelForImageTextToText, AutoProcessor

from mask_llava_hf import MaskLlavaConfig, ObjectStore
from mask_llava_hf.evaluation.measuring import write_rows
from mask_llava_hf.modeling.token_layout import TokenLayout
from mask_llava_hf.precompute import precompute_objects
from mask_llava_hf.testing import build_tiny_checkpoint


SCHEDULE = Schedule(pictures=6, rounds=40, test_pictures=3)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    """With the stages "start" and "objects" of `train_default_checkpoint.py`, tiny and random."""
    folder = tmp_path_factory.mktemp("work")
    build_tiny_checkpoint(folder / "start", score_threshold=0.3)
    processor = AutoProcessor.from_pretrained(folder / "start")
    pictures = SCHEDULE.paths(folder, "train") + SCHEDULE.paths(folder, "test")
    named = [(path.name, path) for path in pictures]
    precompute_objects(named, processor, folder / "objects", max_object_tokens=20, progress=False)
    return folder


@pytest.fixture(scope="module")
def finished(work_dir) -> tuple[list[dict], Path]:
    """Rows and folder of a run that has learned when an answer ends, and to say "yes"."""
    folder = work_dir / "runs" / "all_three-0"
    (folder / "start").mkdir(parents=True)
    (folder / "start" / "left over").touch()
    with pytest.MonkeyPatch.context() as patch:
        for stage in (train_mask_llava.PROJECTOR, train_mask_llava.FINETUNE):
            patch.setitem(stage, "learning_rate", 5e-3)
            patch.setitem(stage, "per_device_train_batch_size", 4)
        return accuracy_runs.run("all three", 0, SCHEDULE, work_dir, folder), folder


def made_up_rows(name: str, seed: int) -> list[dict]:
    """Rows as `run` makes them."""
    config = {"use_cls_token": True, "patch_grid_size": 6, "max_object_tokens": 20, **VARIANTS[name].config}
    rows = []
    for budget, knob, value, left in accuracy_runs.compositions(TokenLayout(**config)):
        for shift, kind in enumerate((MEAN, *QUESTION_KINDS)):
            accuracy = 0.3 + left.max_tokens / 200 + shift / 50 + seed / 100
            row = {"variant": name, "seed": seed, "training_pictures": 6, "training_rounds": 40}
            row |= {"budget": budget or "", "knob": knob, "value": value, "tokens_per_image": left.max_tokens}
            row |= {"masks": "detected", "question_kind": kind, "accuracy": accuracy, "test_pictures": 3}
            rows.append(row)
    return rows


def with_answer(entry: AskedPicture, answer: str) -> AskedPicture:
    return replace(entry, question=replace(entry.question, answer=answer))


# ------------------------------------------------------------------------------------------------ compositions


@pytest.mark.parametrize(
    ("name", "tokens"), [("patches", [49, 36, 25, 9]), ("CLS + patches", [50, 37, 26, 10]), ("all three", [*BUDGETS])]
)
def test_budgets_are_spent(name, tokens):
    layout = TokenLayout.from_config(MaskLlavaConfig(**VARIANTS[name].config))
    by_budget = [left.max_tokens for budget, *_, left in accuracy_runs.compositions(layout) if budget]
    assert by_budget == tokens
    caps = [value for _, knob, value, _ in accuracy_runs.compositions(layout) if knob == "max_object_tokens"]
    assert caps == ([*OBJECT_CAPS] if name == "all three" else [])


# ------------------------------------------------------------------------------------------------ a run


@pytest.mark.parametrize("name", {**VARIANTS, **ABLATIONS})
def test_start_of_a_variant(name, work_dir, tmp_path):
    variant = {**VARIANTS, **ABLATIONS}[name]
    pictures = SCHEDULE.paths(work_dir, "train")
    processor = accuracy_runs.save_start(variant, 1, work_dir / "start", tmp_path, pictures)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    given = AutoModelForImageTextToText.from_pretrained(work_dir / "start")
    for field, value in variant.config.items():
        assert getattr(model.config, field) == value
    assert TokenLayout.from_config(model.config) == processor._settings().layout
    for key, weight in given.state_dict().items():
        same = torch.equal(model.state_dict()[key], weight)
        assert same == ("projector" not in key or key.endswith("bias")), key
    if name == "fixed norm scaling":
        average, deviation = model.config.patch_statistics
        assert (average, deviation) == pytest.approx(accuracy_runs.patch_statistics(tmp_path, pictures), rel=1e-5)
        assert abs(average) < deviation


def test_pooled_objects_are_the_same_objects(work_dir, tmp_path):
    pictures, source = SCHEDULE.paths(work_dir, "test"), ObjectStore.open(work_dir / "objects")
    variant = ABLATIONS["mask pooling"]
    processor = accuracy_runs.save_start(variant, 0, work_dir / "start", tmp_path / "start", pictures)
    store = accuracy_runs.embed_again(source, pictures[:2], processor, tmp_path / "objects")
    store = accuracy_runs.embed_again(source, pictures, processor, tmp_path / "objects")
    assert len(store) == len(pictures)
    assert len(list((tmp_path / "objects").glob("*.parquet"))) == 2  # what was there was not made again
    for path in pictures:
        inverted, pooled = source.get(path), store.get(path)
        assert torch.equal(pooled.boxes_xyxy, inverted.boxes_xyxy)
        assert not torch.allclose(pooled.embeddings, inverted.embeddings)
        inputs = processor(images=str(path), text="<image>", objects=pooled)  # refuses another method's
        assert torch.equal(inputs["object_embeds"][0, : len(pooled)], pooled.embeddings)


def test_true_objects_are_the_shapes(work_dir):
    pictures, processor = SCHEDULE.paths(work_dir, "test"), AutoProcessor.from_pretrained(work_dir / "start")
    known = accuracy_runs.true_objects(pictures, processor)
    for index, path in enumerate(pictures):
        scene, objects = make_scene("test", index), known.get(path)
        assert sorted(objects.boxes_xyxy.tolist()) == sorted(scene.boxes_xyxy.tolist())
        assert len(objects.embeddings) == len(scene.shapes)


def test_rows_of_a_run(finished):
    rows, folder = finished
    assert not (folder / "start" / "left over").exists()
    measured = {(row["masks"], row["knob"], row["value"]) for row in rows}
    assert measured == {
        *(("detected", "max_visual_tokens", budget) for budget in BUDGETS),
        *(("detected", "max_object_tokens", cap) for cap in OBJECT_CAPS),
        ("ground truth", "max_visual_tokens", BUDGETS[0]),
    }
    for row in rows:
        most = sum(map(int, row["composition"].split("+")))
        assert 0 <= row["accuracy"] <= 1 and row["questions"] > 0
        assert row["tokens_per_image"] <= most <= (row["budget"] or 57)
    assert max(row["accuracy"] for row in rows) > 0.2
    agreeing = [row["agrees_with_generate"] for row in rows]
    assert all(re.fullmatch(r"(\d+) of \1", told) for told in agreeing), agreeing


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_generate_answers_is_what_is_scored(finished, work_dir, budget):
    folder = finished[1] / "finetuned"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    asked = ask_about(SCHEDULE.paths(work_dir, "test"), ObjectStore.open(work_dir / "objects"))
    answers = accuracy_runs.generated_answers(model, processor, asked, {"max_visual_tokens": budget})
    own = [with_answer(entry, answer) for entry, answer in zip(asked, answers, strict=True)]
    layout = TokenLayout.from_config(model.config).reduced(max_visual_tokens=budget)
    counts = {"max_object_tokens": layout.max_object_tokens, "patch_grid_size": layout.patch_grid_size}
    assert score_answers(model, processor, own, **counts)["mean"] == 1
    others = [
        replace(entry, question=replace(entry.question, answer=f"{entry.question.answer} or so")) for entry in own
    ]
    assert score_answers(model, processor, others, **counts)["mean"] == 0


# ------------------------------------------------------------------------------------------------ all runs


def test_finished_runs_are_skipped_and_failed_ones_repeated(work_dir, monkeypatch):
    bench, started = Benchmark(work_dir, Schedule(6, 1, 3)), []
    failing = {"CLS + patches"}

    def fake_run(command, stdout, **options):
        name, seed = command[command.index("--run") + 1 :][:2]
        started.append((name, int(seed)))
        stdout.write("its log")
        if name not in failing:
            write_rows(bench.part(name, int(seed)), made_up_rows(name, int(seed)))
        return SimpleNamespace(returncode=int(name in failing))

    monkeypatch.setattr(accuracy_by_tokens.subprocess, "run", fake_run)
    runs = [(name, seed) for seed in (0, 1) for name in ("patches", "CLS + patches")]
    logs = bench.run_all(runs, jobs=1)
    assert started == runs
    assert [log.read_text() for log in logs] == ["its log"] * 2
    started.clear()
    failing.clear()
    assert bench.run_all(runs, jobs=2) == []
    assert sorted(started) == [("CLS + patches", 0), ("CLS + patches", 1)]

    monkeypatch.setattr(bench, "prior", lambda: dict.fromkeys((MEAN, *QUESTION_KINDS), 0.25))
    table = bench.publish(bench.folder)
    assert bench.publish(bench.folder) == table  # does not take what it wrote for results
    assert bench.publish(work_dir / "published") == table
    assert "| CLS + patches |" in table and "all three" not in table
    with open(work_dir / "published" / "accuracy_by_tokens.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["variant"], row["seed"]) for row in rows} == {(name, str(seed)) for name, seed in runs}
    assert Image.open(work_dir / "published" / "accuracy_by_tokens.png").size[0] > 1000


def test_another_start_has_other_results(work_dir, tmp_path):
    for name in ("start/config.json", "start/model.safetensors", "objects/store.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((work_dir / name).read_bytes())
    before = Benchmark(tmp_path, SCHEDULE)
    assert before.folder.name == Benchmark(work_dir, SCHEDULE).folder.name
    assert before.folder != Benchmark(tmp_path, replace(SCHEDULE, rounds=2)).folder
    (tmp_path / "objects" / "store.json").write_text("{}")
    assert before.folder != Benchmark(tmp_path, SCHEDULE).folder
    (tmp_path / "objects" / "store.json").unlink()
    with pytest.raises(SystemExit, match="store.json is not there: run the stages"):
        Benchmark(tmp_path, SCHEDULE)


def test_prior_is_for_the_same_questions(work_dir, monkeypatch):
    monkeypatch.setattr(accuracy_by_tokens, "prior_scores", partial(prior_scores, num_scenes=50))
    bench = Benchmark(work_dir, SCHEDULE)
    bench.folder.mkdir(parents=True, exist_ok=True)
    prior = bench.prior()
    assert set(prior) == {MEAN, *QUESTION_KINDS} and 0 < prior[MEAN] < 1
    assert bench.prior() == prior


# ------------------------------------------------------------------------------------------------ what is published


def test_table_and_plot(tmp_path):
    for name in VARIANTS:
        for seed in (0, 1):
            write_rows(tmp_path / f"{name}-{seed}.csv", made_up_rows(name, seed))
    rows = merge(tmp_path.glob("*.csv"), dict.fromkeys((MEAN, *QUESTION_KINDS), 0.25))
    assert [row["variant"] for row in rows] == sorted((row["variant"] for row in rows), key=list(VARIANTS).index)
    table = summary(rows)
    assert "| all three | 59.0 ± 0.7 (57) | 51.5 ± 0.7 (42) | 45.0 ± 0.7 (29) | 38.0 ± 0.7 (15) | 2 |" in table
    assert "never looks scores 25.0" in table
    draw(rows, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").format == "PNG"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv"] * 6 + [".png"]  # no unfinished files
