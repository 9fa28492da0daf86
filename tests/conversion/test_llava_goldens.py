"""LLaVA's own outputs against those of the converted checkpoints."""

import json

import pytest
import torch
from PIL import Image
from research_checkpoints import GOLDENS
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mask_llava_hf.conversion import convert_checkpoint, export_checkpoint
from mask_llava_hf.processing.chat_templates import VICUNA_V1


CASES = {
    "finetuned": ("finetuned_safetensors", {}),
    "stage1": ("stage1_projector", {"base": str(GOLDENS / "base_llm")}),
}
NUM_ROWS = 320


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder, options = CASES[request.param]
    target = tmp_path_factory.mktemp("converted") / request.param
    convert_checkpoint(GOLDENS / folder, target, **options)
    processor = AutoProcessor.from_pretrained(target)
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if "type" not in name}
    processor.image_processor = LlavaImageProcessorPil(**settings)
    model = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    golden = load_file(GOLDENS / f"golden_{request.param}.safetensors")
    prompts = json.loads((GOLDENS / f"golden_{request.param}.json").read_text())["cases"]
    return model.eval(), processor, golden, prompts


def picture(name):
    return Image.open(GOLDENS / "images" / name)


@pytest.mark.parametrize("name", ["landscape", "portrait"])
def test_pixels_features_logits_and_answer_are_those_of_the_research_code(case, name):
    model, processor, golden, prompts = case
    inputs = processor(images=picture(f"{name}.png"), text=prompts[name]["prompt"], return_tensors="pt")
    if f"pixel_values.{name}" in golden:
        assert torch.equal(inputs["pixel_values"], golden[f"pixel_values.{name}"])
    ids, image = inputs["input_ids"][0], model.config.image_token_id
    assert (ids == image).sum() == 64
    first = int((ids == image).nonzero()[0])
    assert [*ids[:first], -200, *ids[first + 64 :]] == golden[f"input_ids.{name}"][0].tolist()
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        logits = model(**inputs).logits
    torch.testing.assert_close(features, golden[f"image_features.{name}"][0], rtol=0, atol=5e-6)
    torch.testing.assert_close(logits[..., :NUM_ROWS], golden[f"logits.{name}"], rtol=0, atol=1.5e-5)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, ids.shape[0] :]
    assert torch.equal(answer, golden[f"generated.{name}"])
    loss = torch.nn.functional.cross_entropy(logits[0, -7:-1, :NUM_ROWS], ids[-6:])
    torch.testing.assert_close(loss, golden[f"loss_last6.{name}"].squeeze(), rtol=0, atol=5e-6)


def test_chat_template_writes_the_prompts_of_the_research_code(case):
    _, processor, _, prompts = case
    for name, question in (
        ("landscape", "what is shown in the image?"),
        ("portrait", "how many objects are there, and what colour is the cup on the table?"),
    ):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        written = processor.apply_chat_template(chat, chat_template=VICUNA_V1, add_generation_prompt=True)
        assert written == prompts[name]["prompt"]


def test_batch_text_and_two_pictures(case):
    model, processor, golden, prompts = case
    both = ("landscape", "portrait")
    two = prompts["two_images"]
    calls = {
        "batch": {"images": [picture(f"{name}.png") for name in both], "text": [prompts[n]["prompt"] for n in both]},
        "text": {"text": prompts["text"]["prompt"]},
        "two_images": {"images": [picture(name) for name in two["images"]], "text": two["prompt"]},
    }
    for name, call in calls.items():
        with torch.no_grad():
            logits = model(**processor(**call, padding=True, return_tensors="pt")).logits[:, -1, :NUM_ROWS]
        torch.testing.assert_close(logits, golden[f"logits_last.{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", json.loads((GOLDENS / "tokenization.json").read_text())["prompts"].values())
def test_prompts_get_the_ids_of_the_research_code(case, prompt):
    model, processor, _, _ = case
    ids = processor.tokenizer(prompt["text"]).input_ids
    assert [-200 if token == model.config.image_token_id else token for token in ids] == prompt["input_ids"]
    num_images = prompt["text"].count("<image>")
    if num_images:  # and the same around all placeholders of an image
        whole = processor(images=[picture("square.png")] * num_images, text=prompt["text"])["input_ids"][0]
        expected = [
            t
            for token in prompt["input_ids"]
            for t in ([model.config.image_token_id] * 64 if token == -200 else [token])
        ]
        assert whole == expected


def test_added_rows_lose_every_greedy_step_even_unsuppressed(case):
    model, processor, _, prompts = case
    inputs = processor(images=picture("square.png"), text=prompts["portrait"]["prompt"], return_tensors="pt")
    assert model.config.text_config.vocab_size == 384
    assert set(model.generation_config.suppress_tokens) == set(range(NUM_ROWS, 384))
    with torch.no_grad():
        logits = model(**inputs).logits
    added, own = logits[..., NUM_ROWS:], logits[..., :NUM_ROWS]
    assert (added.amax(-1) < own.amax(-1)).all()
    torch.testing.assert_close(added[..., 0], own.mean(-1), rtol=0, atol=2e-3)  # rounded to float16 when it was saved


def test_there_and_back_gives_the_same_weights(tmp_path):
    convert_checkpoint(GOLDENS / "finetuned_safetensors", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    shards = (GOLDENS / "finetuned_safetensors").glob("*.safetensors")
    expected = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for found, wanted in (
        (load_file(tmp_path / "back/model.safetensors"), expected),
        (
            load_file(tmp_path / "back/vision_tower/model.safetensors"),
            load_file(GOLDENS / "vision_tower/model.safetensors"),
        ),
    ):
        assert found.keys() == wanted.keys()
        assert all(
            torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted
        )
    config = json.loads((tmp_path / "back/config.json").read_text())
    source = json.loads((GOLDENS / "finetuned_safetensors/config.json").read_text())
    free = {"_name_or_path", "attention_dropout", "freeze_mm_mlp_adapter", "mm_projector_lr", "pretraining_tp"}
    free |= {"transformers_version", "tune_mm_mlp_adapter", "use_cache"}
    assert {name: config.get(name) for name in source if name not in free} == {
        name: value for name, value in source.items() if name not in free
    }
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "back" / file).read_bytes() == (GOLDENS / "finetuned_safetensors" / file).read_bytes()

    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    for file in (tmp_path / "ours").rglob("*"):
        if file.is_file() and file.name != "conversion_report.json":
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "ours")).read_bytes(), file


def test_loading_and_saving_changes_no_name_and_no_weight(case, tmp_path):
    model, processor, _, _ = case
    saved = load_file(f"{model.name_or_path}/model.safetensors")
    AutoModelForImageTextToText.from_pretrained(model.name_or_path, dtype="auto").save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
