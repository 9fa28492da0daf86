import csv

import pytest
import torch

from mask_llava_hf.cli import main
from mask_llava_hf.evaluation import chain_stages
from mask_llava_hf.evaluation.chain_cost import LLAVA, NO_SEGMENTER, chains, measure_chains, table
from mask_llava_hf.evaluation.chain_stages import (
    COMPOSITION,
    DECODE,
    DECODER,
    DETECTOR,
    ENCODER,
    INVERSION,
    PREFILL,
    READ,
    TOWER,
    Questions,
    Stage,
    grouped,
    random_boxes,
)
from mask_llava_hf.evaluation.flop_counts import count_flops
from mask_llava_hf.evaluation.measured_models import PublishedShapes, SavedCheckpoint, fill_at_random


pytestmark = pytest.mark.usefixtures("without_gradients")
QUESTIONS = Questions(prompt_tokens=5, answer_tokens=4)
INVERTED = "MaskInversion, 10 iterations"


@pytest.fixture(scope="module")
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(tiny_checkpoint):
    return SavedCheckpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def bench(models):
    return chain_stages._Bench(models, "cpu", QUESTIONS)


@pytest.fixture(scope="module")
def counted(models):
    return measure_chains(models, chains(models, 20, (57, 42)), questions=QUESTIONS, flops_only=True)


def test_operations_of_an_inversion_follow_from_few_masks_and_iterations(bench):
    # The chain's own formula against a count of all of it; the batching of small products differs by no operation
    stage = Stage(INVERSION, INVERTED, 7)
    assert bench.gflop(stage) == pytest.approx(count_flops(bench.build(stage)) / 1e9, rel=1e-9)


def test_operations_of_an_answer_follow_from_its_first_and_last_token(bench):
    stage = Stage(DECODE, "", 57)
    assert bench.gflop(stage) == pytest.approx(count_flops(bench.build(stage)) / 1e9, rel=1e-9)


def test_decoding_leaves_the_cache_as_it_was(bench):
    run = bench.build(Stage(DECODE, "", 15))
    assert count_flops(run) == count_flops(run)


def test_every_stage_of_a_checkpoint_runs(bench, models):
    for group in grouped(stage for chain in chains(models, 3, (15,)) for stage in (*chain.once, *chain.each)):
        for stage in group:
            bench.build(stage)()


def test_a_chain_is_the_sum_of_its_stages(counted):
    stage_rows, chain_rows = counted
    gflop = {(row["stage"], row["part"], row["count"]): row["gflop"] for row in stage_rows}
    row = next(row for row in chain_rows if row["chain"] == "made now, box_iou" and row["tokens"] == 42)
    assert row["inversion_in"] == "processor"
    tower = gflop[TOWER, "", 0]
    expected = [
        gflop[DETECTOR, "its detector", 0],
        gflop[ENCODER, "its segmenter", 0],
        gflop[DECODER, "its segmenter", 5],
        2 * tower,
        gflop[INVERSION, INVERTED, 5],
        gflop[COMPOSITION, "mask-llava", 42],
        gflop[PREFILL, "", 42],
    ]
    assert row["gflop: before the answer"] == pytest.approx(sum(expected), abs=2e-4)
    assert row["gflop: all"] - row["gflop: before the answer"] == pytest.approx(gflop[DECODE, "", 42], abs=2e-4)


def test_chains_differ_in_what_they_need(models):
    found = {
        (chain.name, chain.tokens, chain.inversion_in, chain.embedding): chain
        for chain in chains(models, 20)
        if chain.segmenter != NO_SEGMENTER
    }

    def counts(name, place):
        stages = (*found[name].once, *found[name].each)
        return sum(stage.name == place for stage in stages), max(
            (stage.count for stage in stages if stage.name == place), default=0
        )

    by_mask, by_box = (("made now, " + order, 42, "processor", INVERTED) for order in ("mask_iou", "box_iou"))
    assert counts(by_mask, DECODER) == (1, 20) and counts(by_box, DECODER) == (1, 5)
    assert counts(by_mask, INVERSION) == counts(by_box, INVERSION) == (1, 5)
    assert counts(by_mask, TOWER)[0] == 2
    assert counts(("made now, mask_iou", 42, "model", INVERTED), TOWER)[0] == 1
    stored = ("stored", 42, "", "")
    assert found[stored].once == () and counts(stored, TOWER)[0] == 1


def test_llava_is_what_chains_are_compared_with(counted):
    llava = next(row for row in counted[1] if row["chain"] == LLAVA)
    assert llava["gflop_ratio"] == 1 and llava["break_even_questions"] is None
    stored = [row for row in counted[1] if row["chain"] == "stored"]
    assert all(row["break_even_questions"] in (0, None) for row in stored)


def test_the_table_has_a_line_per_chain(counted):
    lines = table(counted[1]).splitlines()
    assert len(lines) == 2 + len(counted[1])
    assert len({line.count("|") for line in lines}) == 1


def test_the_command_measures_and_writes(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    # In this process: a new one each would take the test half a minute
    monkeypatch.setattr("mask_llava_hf.evaluation.chain_cost.in_process", lambda call, *arguments: call(*arguments))
    threads = str(torch.get_num_threads())
    assert main(["bench", str(tiny_checkpoint), str(tmp_path), "--repeats", "1", "--threads", threads]) == 0
    name = tiny_checkpoint.name.lower()
    with open(tmp_path / f"chain_cost_{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["chain"] == LLAVA and float(rows[0]["wall_s_ratio"]) == 1
    assert all(float(row["wall_s: all"]) > 0 and float(row["peak_gb"]) >= 0 for row in rows)
    assert (tmp_path / f"chain_cost_{name}.png").stat().st_size > 10_000
    assert "break-even questions" in capsys.readouterr().out


def test_the_command_refuses_a_checkpoint_of_something_else(tiny_checkpoint, tmp_path, capsys):
    assert main(["bench", str(tiny_checkpoint / "detector"), str(tmp_path)]) == 2
    assert "expected a checkpoint of a Mask-LLaVA" in capsys.readouterr().err


def test_published_shapes_have_their_published_sizes():
    models = PublishedShapes()
    found = {name: models.detector(name, "meta")[0] for name in models.detectors}
    found |= {name: models.segmenter(name, "meta")[0] for name in models.segmenters[:3]}  # the fourth needs timm
    found |= {"language model": models.language_model("meta"), "tower": models.vision("meta").tower}
    millions = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in found.items()}
    published = {
        "Deformable DETR R50": 40,
        "RT-DETR R50": 43,
        "RT-DETR R18": 20,
        "SAM ViT-H": 641,
        "SAM ViT-B": 94,
        "SAM 2.1 tiny": 31,
        "language model": 6739,
        "tower": 304,
    }
    assert millions == pytest.approx(published, rel=0.03)  # heads of Deformable DETR are shared only after loading


def test_random_weights_are_ordinary_numbers():
    model = torch.nn.Sequential(torch.nn.Linear(2000, 1000), torch.nn.LayerNorm(1000))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    fill_at_random(model)
    assert model[0].weight.std().item() == pytest.approx(0.02, rel=0.01) and not model[0].bias.any()
    assert model[1].weight.eq(1).all() and not model[1].bias.any()


def test_random_boxes_lie_in_the_picture():
    boxes = random_boxes(50)
    assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_part_is_loaded_once_for_all_its_stages(models):
    groups = grouped(stage for chain in chains(models) for stage in (*chain.once, *chain.each))
    assert sorted(sorted({stage.name for stage in group}) for group in groups) == sorted(
        map(
            sorted,
            [
                (READ, DETECTOR),
                (READ, ENCODER, DECODER),
                (READ, TOWER, INVERSION, COMPOSITION),
                (PREFILL, DECODE),
            ],
        )
    )
