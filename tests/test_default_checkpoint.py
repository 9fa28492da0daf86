# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The trained checkpoint inside the package: does what it did when it was made, and answers as its card says."""

import json
from pathlib import Path

import pytest
import torch
from default_checkpoint.write_goldens import compute
from PIL import Image
from safetensors.torch import load_file
from shapes_world import MARKED_PROMPT, make_scene, questions_of
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from mask_llava_hf import DEFAULT_CHECKPOINT


GOLDENS = Path(__file__).parent / "goldens" / "default_checkpoint"

# Sums of float32 in another order, on another machine; objects also pass through thresholds of pixels.
TOLERANCE = {"patch_features": 1e-4, "image_tokens": 1e-4, "logits": 1e-3}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "golden.safetensors"), json.loads((GOLDENS / "golden.json").read_text())


@pytest.fixture(scope="module")
def computed(golden):
    return compute(DEFAULT_CHECKPOINT, golden[0]["object_embeds"])


@pytest.fixture(scope="module")
def parts():
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(DEFAULT_CHECKPOINT).eval()
    return model, processor.share_vision_tower(model)


@pytest.mark.parametrize("depth", TOLERANCE)
def test_tensors_are_as_recorded(computed, golden, depth):
    torch.testing.assert_close(computed[0][depth], golden[0][depth], rtol=TOLERANCE[depth], atol=TOLERANCE[depth])


def test_answers_are_as_recorded(computed, golden):
    assert computed[1] == golden[1]


def test_the_whole_chain_finds_the_objects_recorded(golden):
    tensors, texts = compute(DEFAULT_CHECKPOINT)
    assert texts == golden[1]
    count = texts["object_counts"][0]
    similar = torch.cosine_similarity(
        tensors["object_embeds"][0, :count], golden[0]["object_embeds"][0, :count], dim=-1
    )
    assert similar.min() > 0.99


def test_it_is_small_and_has_its_parts_inside():
    files = [path for path in Path(DEFAULT_CHECKPOINT).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {"detector", "segmenter"} <= {path.parent.name for path in files}
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth")]
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text()]


def test_it_computes_in_float32_though_stored_in_half_the_space(parts):
    model, _ = parts
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    own_parts = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)._parts()
    assert own_parts.mask_embedder().vision_tower.dtype == torch.float32
    assert own_parts.detector().model.dtype == own_parts.segmenter().model.dtype == torch.float32
    stored = load_file(Path(DEFAULT_CHECKPOINT) / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert all(torch.equal(weight, weight.half().float()) for weight in model.parameters())


def test_it_answers_most_questions_about_pictures_it_never_saw(parts):
    model, processor = parts
    right, asked = 0, 0
    for index in range(1000, 1010):
        questions = questions_of("test", index, 6)
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}] for q in questions
        ]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        image = make_scene("test", index).draw()
        objects = processor.find_objects(image)
        inputs = processor(
            images=[[image]] * len(prompts),
            text=prompts,
            objects=objects * len(prompts),
            padding=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() == q.answer for answer, q in zip(answers, questions, strict=True))
        asked += len(questions)
    assert right / asked > 0.65  # who never looks has a third


def test_it_names_the_object_in_a_box_of_the_user(parts):
    model, processor = parts
    right = 0
    for index in range(2000, 2010):
        scene = make_scene("test", index)
        shape = scene.shapes[-1]  # in front of all others
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARKED_PROMPT}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=scene.draw(), text=prompt, boxes=scene.boxes_xyxy[-1:].tolist(), return_tensors="pt")
        assert inputs["object_counts"].tolist() == [1]
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        right += (
            processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == shape.name
        )
    assert right >= 5  # one of 108 names by chance


def test_the_pipeline_answers():
    answer = pipeline("image-text-to-text", model=DEFAULT_CHECKPOINT)(
        text=[
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.open(Path(DEFAULT_CHECKPOINT) / "example.png")},
                    {"type": "text", "text": "How many shapes are there?"},
                ],
            }
        ],
        max_new_tokens=4,
        return_full_text=False,
    )
    recorded = json.loads((GOLDENS / "golden.json").read_text())["answers"]["How many shapes are there?"]
    assert answer[0]["generated_text"].strip() == recorded
