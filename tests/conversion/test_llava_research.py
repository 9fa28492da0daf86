"""Every variant of the research layout, compared with LLaVA's forward pass written out step by step."""

import json
import shutil

import pytest
import torch
from research_checkpoints import (
    ABSENT,
    NUM_ROWS,
    VISION,
    language_tensors,
    plain_logits,
    projector_tensors,
    random_tensors,
    tower_tensors,
    write_base,
    write_checkpoint,
    write_config,
    write_tokenizer,
    write_tower,
    write_weights,
)
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mask_llava_hf.conversion import convert_checkpoint


IDS = [1, 281, 305, -200, 281, 13, 295, 287]


def converted_logits(target, photo, ids=IDS):
    """Logits of the converted checkpoint, for the rows the source has."""
    processor = AutoProcessor.from_pretrained(target)
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if "type" not in name}
    pixels = LlavaImageProcessorPil(**settings)(photo, return_tensors="pt")["pixel_values"]
    model = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        num_tokens = len(model.get_image_features(pixels).pooler_output[0])
        image = model.config.image_token_id
        whole = [token for i in ids for token in ([image] * num_tokens if i == -200 else [i])]
        logits = model(input_ids=torch.tensor([whole]), pixel_values=pixels).logits[0]
    return logits[:, : model.config.source_vocab_size]


def check(source, target, photo, tensors, tower=None, config=None, **options):
    """Converts, and compares with the plain forward pass of `tensors` and `tower`."""
    report = convert_checkpoint(source, target, **options)
    config = config or json.loads((source / "config.json").read_text())
    expected = plain_logits(tensors, tower or tower_tensors(), config, photo, IDS)
    torch.testing.assert_close(
        converted_logits(target, photo), expected, rtol=0, atol=2e-5 * expected.abs().max().item()
    )
    return report


def weights_of(**changes):
    config = {"mm_projector_type": "mlp2x_gelu", **changes}
    kind = "linear" if config["mm_projector_type"] is ABSENT else config["mm_projector_type"]
    return {**language_tensors(config), **projector_tensors(kind)}


VARIANTS = {
    "linear projector": {"mm_projector_type": "linear"},
    "projector not named": {"mm_projector_type": ABSENT},
    "one layer": {"mm_projector_type": "mlp1x_gelu"},
    "three layers": {"mm_projector_type": "mlp3x_gelu"},
    "no projector": {"mm_projector_type": "identity"},
    "CLS and patches": {"mm_vision_select_feature": "cls_patch"},
    "feature not named": {"mm_vision_select_feature": ABSENT},
    "last layer": {"mm_vision_select_layer": -1},
    "layer from the start": {"mm_vision_select_layer": 1},
    "tied head": {"tie_word_embeddings": True},
    "grouped queries": {"num_key_value_heads": 2},
    "longer positions": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "other base of positions": {"rope_theta": 500.0},
    "oldest model type": {"model_type": "llava"},
    "Mistral": {"model_type": "llava_mistral", "num_key_value_heads": 2, "sliding_window": None},
    "cropped images": {"image_aspect_ratio": ABSENT},
    "square images": {"image_aspect_ratio": "square"},
    "tower in the older field": {"mm_vision_tower": ABSENT, "vision_tower": "vision_tower"},
    "more rows than tokens": {"vocab_size": 330},
    "rows that are no multiple of anything": {"vocab_size": 321},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_the_plain_forward_pass(tmp_path, photo, changes):
    source = write_checkpoint(tmp_path, **changes)
    check(source, tmp_path / "target", photo, weights_of(**changes))


@pytest.mark.parametrize("form", ["safetensors shards", "bin", "bin shards", "bin, older than archives"])
def test_every_form_of_weight_files(tmp_path, photo, form):
    source = write_checkpoint(tmp_path, form="safetensors" if "older" in form else form)
    if "older" in form:
        tensors = load_file(source / "model.safetensors")
        (source / "model.safetensors").unlink()
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check(source, tmp_path / "target", photo, weights_of())


def test_sharded_result(tmp_path, photo):
    report = check(write_checkpoint(tmp_path), tmp_path / "target", photo, weights_of(), max_shard_bytes=100_000)
    shards = sorted((tmp_path / "target").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)]
    assert max(sum(t.nbytes for t in load_file(path).values()) for path in shards) <= 100_000 < report.num_bytes


def test_sliding_window_that_is_switched_off_stays_off(tmp_path):
    mistral = {"model_type": "llava_mistral", "sliding_window": None}
    convert_checkpoint(write_checkpoint(tmp_path, **mistral), tmp_path / "target", self_check=False)
    assert json.loads((tmp_path / "target/config.json").read_text())["text_config"]["sliding_window"] is None


def test_whole_clip_as_the_tower(tmp_path, photo):
    source = write_checkpoint(tmp_path)
    write_tower(tmp_path / "clip", clip=True)
    report = check(source, tmp_path / "target", photo, weights_of(), vision_tower=str(tmp_path / "clip"))
    assert set(report.dropped) == {
        "text_model.final_layer_norm.weight",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
        "vision_model.embeddings.position_ids",
    }


def inside(seed):
    return {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower_tensors(seed).items()}


def test_tower_inside_counts_when_it_was_trained(tmp_path, photo):
    source = write_checkpoint(tmp_path, more=inside(seed=7), unfreeze_mm_vision_tower=True)
    report = check(source, tmp_path / "target", photo, weights_of(), tower=tower_tensors(7))
    assert not report.dropped


@pytest.mark.parametrize("said", [False, ABSENT])
def test_tower_inside_gives_way_to_the_named_one_otherwise(tmp_path, photo, said):
    source = write_checkpoint(tmp_path, more=inside(seed=7), unfreeze_mm_vision_tower=said)
    report = check(source, tmp_path / "target", photo, weights_of(), tower=tower_tensors(1))
    assert set(report.dropped) == set(inside(seed=7))
    assert "unfreeze_mm_vision_tower" in next(iter(report.dropped.values()))


def test_keys_that_nobody_needs_are_named_in_the_report(tmp_path, photo):
    stale = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    source = write_checkpoint(tmp_path, more=stale)
    report = check(source, tmp_path / "target", photo, weights_of())
    assert set(report.dropped) == set(stale)
    assert "rotary frequencies" in str(report)
    saved = json.loads((tmp_path / "target/conversion_report.json").read_text())
    assert set(saved["dropped"]) == set(stale)
    assert str(tmp_path) not in json.dumps(saved)


def test_head_that_is_saved_although_it_is_tied(tmp_path, photo):
    tensors = language_tensors({"tie_word_embeddings": True})
    same = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    source = write_checkpoint(tmp_path, more=same, tie_word_embeddings=True)
    report = check(source, tmp_path / "target", photo, weights_of(tie_word_embeddings=True))
    assert list(report.dropped) == ["lm_head.weight"]
    assert "lm_head.weight" not in load_file(tmp_path / "target/model.safetensors")

    other = {"lm_head.weight": same["lm_head.weight"] + 1}
    source = write_checkpoint(tmp_path, name="other", more=other, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings.*lm_head.weight differs"):
        convert_checkpoint(source, tmp_path / "no")


# ------------------------------------------------------------------------------------------------- stage 1 and LoRA
def write_projector(root, dtype=torch.bfloat16, more=None, **changes):
    folder = root / "projector"
    folder.mkdir()
    write_config(folder, changes)
    tensors = {**projector_tensors("mlp2x_gelu"), **(more or {})}
    torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "mm_projector.bin")
    if not (root / "vision_tower").exists():
        write_tower(root / "vision_tower")
    return folder


def test_projector_and_its_base(tmp_path, photo):
    base = write_base(tmp_path / "base")
    tensors = weights_of()
    tensors |= {name: t.bfloat16().float() for name, t in tensors.items() if "mm_projector" in name}
    source = write_projector(tmp_path)
    report = check(source, tmp_path / "target", photo, tensors, base=str(base))
    assert "a projector alone" in report.layout and report.dtype == "float32"
    template = (tmp_path / "target/chat_template.jinja").read_text()
    assert "ASSISTANT" not in template


def test_projector_with_new_tokens_gets_a_head_of_mean_rows(tmp_path, photo):
    base = write_base(tmp_path / "base")
    embeddings = torch.cat([language_tensors({})["model.embed_tokens.weight"], torch.full((2, 32), 0.5)])
    source = write_projector(
        tmp_path,
        torch.float32,
        more={"model.embed_tokens.weight": embeddings},
        mm_use_im_start_end=True,
        vocab_size=NUM_ROWS + 2,
    )
    head = language_tensors({})["lm_head.weight"]
    tensors = weights_of(vocab_size=NUM_ROWS + 2) | language_tensors({}) | {"model.embed_tokens.weight": embeddings}
    tensors["lm_head.weight"] = torch.cat([head, head.mean(0, keepdim=True).expand(2, -1)])
    check(source, tmp_path / "target", photo, tensors, base=str(base))
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "target").tokenizer
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<image>"]) == [320, 321, 322]


def test_marks_around_images_stand_in_the_chat_template(tmp_path):
    source = write_checkpoint(tmp_path, mm_use_im_start_end=True, vocab_size=NUM_ROWS + 2)
    convert_checkpoint(source, tmp_path / "target")
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt.endswith("questions. USER: <im_start><image><im_end>\nWhy? ASSISTANT:")


def test_missing_base_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="holds only a projector, and no base model is given.*--base"):
        convert_checkpoint(write_projector(tmp_path), tmp_path / "target")
    whole = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="holds a whole model, so `--base .*` would be ignored"):
        convert_checkpoint(whole, tmp_path / "target", base=str(whole))


# ------------------------------------------------------------------------------------------ what the result is like
def test_default_composition_is_plain_llava(tmp_path):
    report = convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "target")
    config = json.loads((tmp_path / "target/config.json").read_text())
    assert (config["use_cls_token"], config["patch_grid_size"], config["max_object_tokens"]) == (False, 4, 0)
    assert report.tokens_per_image == "16 patches = 16 tokens"


def test_mask_llava_composition_is_a_start_for_training(tmp_path, photo):
    # The six by six grid of the defaults needs a tower with at least as many patches
    side = {"image_size": 56}
    tower = random_tensors({"vision_model.embeddings.position_embedding.weight": (65, 32)}, 5)
    write_tower(tmp_path / "vision_tower", {**tower_tensors(), **tower})
    config = json.loads((tmp_path / "vision_tower/config.json").read_text())
    (tmp_path / "vision_tower/config.json").write_text(json.dumps({**config, **side}))
    (tmp_path / "vision_tower/preprocessor_config.json").unlink()
    source = write_checkpoint(tmp_path)
    report = convert_checkpoint(source, tmp_path / "target", composition="mask-llava")
    assert report.tokens_per_image == "1 CLS + 36 patches + up to 20 objects = at most 57 tokens"
    assert report.self_check.startswith("loads; 39 placeholders")  # with two boxes
    assert any("56 x 56" in note for note in report.notes)
    assert any("no detector" in note for note in report.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "target")
    processor.object_settings["mask_source"] = "boxes"
    inputs = processor(images=photo, text="<image>", boxes=[[[5, 5, 40, 40]]], return_tensors="pt")
    assert inputs["object_embeds"].shape == (1, 20, 32)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 38
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(("dtype", "found"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_dtype_is_the_sources_or_the_one_asked_for(tmp_path, dtype, found):
    report = convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "target", dtype=dtype)
    saved = load_file(tmp_path / "target/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {found}
    assert report.dtype == str(found).removeprefix("torch.")
    assert torch.equal(saved["lm_head.weight"][:NUM_ROWS], language_tensors({})["lm_head.weight"].to(found))


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path):
    large = {"model.norm.weight": torch.full((32,), 1e6)}
    source = write_checkpoint(tmp_path, more=large)
    with pytest.raises(ValueError, match="model.norm.weight.*up to 1e\\+06.*torch.float16.*--dtype bfloat16"):
        convert_checkpoint(source, tmp_path / "target", dtype=torch.float16)
    assert not list(tmp_path.glob("*target*"))


def test_processor_comes_along(tmp_path, photo):
    convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "target")
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    assert (processor.tokenizer.padding_side, processor.tokenizer.pad_token) == ("left", "<unk>")
    assert processor.tokenizer.model_max_length == 2048
    assert processor.image_processor.do_pad
    assert dict(processor.image_processor.size) == {"height": 28, "width": 28}
    chat = [
        {"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
    ]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    answer = inputs["input_ids"][0][inputs["assistant_masks"][0].bool()]
    assert processor.decode(answer) == "A cup.</s>"
    assert processor.tokenizer("A", text_pair=None).input_ids[0] == processor.tokenizer.bos_token_id


def test_generation_never_gives_an_added_row(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path, vocab_size=330), tmp_path / "target")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "target")
    assert model.generation_config.suppress_tokens == list(range(320, 330))
    assert model.generation_config.pad_token_id == 0 and model.generation_config.eos_token_id == 2
    with torch.no_grad():  # even where such a row is the best one
        model.lm_head.weight[325] = 100 * model.lm_head.weight[:320].abs().max() * torch.sign(model.lm_head.weight[5])
        model.lm_head.weight[326] = -model.lm_head.weight[325]
    ids = torch.tensor([[1, 281, 305]])
    assert model(input_ids=ids).logits[0, -1].argmax() in (325, 326)
    assert model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).max() < 320


def test_token_without_a_row_gets_one(tmp_path):
    source = write_checkpoint(tmp_path)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["pad_token"] = "[PAD]"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    report = convert_checkpoint(source, tmp_path / "target")
    assert any("1 tokens of the source's tokenizer had no row" in note for note in report.notes)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "target")
    assert model.config.image_token_id == 321
    assert model.config.text_config.pad_token_id == 320
    assert 320 in model.generation_config.suppress_tokens


# ------------------------------------------------------------------------------------------------------- what fails
MISFITS = {
    "model_type": ({"model_type": "llava_mpt"}, 'model_type "llava_mpt", expected one of'),
    "several views": ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
    "feature": ({"mm_vision_select_feature": "cls"}, '"cls", expected "patch" or "cls_patch"'),
    "layer": ({"mm_vision_select_layer": -5}, r"-5, expected an integer in -4\.\.3"),
    "projector": ({"mm_projector_type": "resampler"}, 'Unknown `projector_type`="resampler"'),
    "rope": ({"rope_scaling": {"type": "magic", "factor": 2.0}}, 'of type "magic", expected one of'),
    "width": ({"mm_hidden_size": 64}, "width 64 .*but the tower found has 32"),
    "no tower": ({"mm_vision_tower": ABSENT}, "names no vision tower"),
    "tower nowhere": ({"mm_vision_tower": "./nowhere"}, "`./nowhere` is no folder.*--vision-tower"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_what_cannot_be_expressed_is_refused(tmp_path, changes, message):
    root = tmp_path / "sources"
    source = write_checkpoint(root)
    write_config(source, changes)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_weights_that_do_not_fit_the_config_are_listed(tmp_path):
    source = write_checkpoint(tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["model.extra.weight"] = torch.ones(2)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    del tensors["model.norm.weight"]
    tensors["model.mm_projector.0.weight"] = torch.ones(32, 16)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].int()
    write_weights(source, tensors, "safetensors")
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(source, tmp_path / "target")
    message = str(caught.value)
    assert "2 weights that are unknown: model.extra.weight, model.layers.0.self_attn.q_proj.bias" in message
    assert "1 weights that are missing: model.language_model.norm.weight" in message
    assert "model.mm_projector.0.weight [32, 16] instead of [32, 32]" in message
    assert "model.layers.1.mlp.up_proj.weight torch.int32" in message
    assert not (tmp_path / "target").exists()


def test_rows_that_do_not_fit_the_config_are_named_as_they_are(tmp_path):
    source = write_checkpoint(tmp_path)
    write_config(source, {"vocab_size": 300})
    with pytest.raises(ValueError, match=r"lm_head.weight \[320, 32\] instead of \[300, 32\]"):
        convert_checkpoint(source, tmp_path / "target")


def test_long_lists_are_cut(tmp_path):
    source = write_checkpoint(tmp_path, more={f"model.extra.{i:03}": torch.ones(1) for i in range(100)})
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(source, tmp_path / "target")
    message = str(caught.value)
    assert "100 weights that are unknown" in message and "and 80 more" in message
    assert message.count("model.extra.") == 20


def test_targets(tmp_path):
    source = write_checkpoint(tmp_path / "sources")
    target = tmp_path / "target"
    convert_checkpoint(source, target, self_check=False)
    before = (target / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="is there already.*--overwrite"):
        convert_checkpoint(source, target, self_check=False)
    broken = write_checkpoint(tmp_path / "broken", more={"model.extra": torch.ones(1)})
    with pytest.raises(ValueError, match="model.extra"):
        convert_checkpoint(broken, target, overwrite=True)
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    report = convert_checkpoint(source, target, overwrite=True, self_check=False)
    assert report.self_check is None and "not checked" in str(report)
    assert (target / "model.safetensors").stat().st_mtime_ns != before
    for place in (source, tmp_path / "sources"):
        with pytest.raises(ValueError, match="is no checkpoint|would be deleted"):
            convert_checkpoint(source, place, overwrite=True)
    assert (source / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "sources", "target"]


def test_self_check_finds_a_broken_result(tmp_path):
    broken = {"model.norm.weight": torch.full((32,), torch.nan)}
    source = write_checkpoint(tmp_path / "sources", more=broken)
    with pytest.raises(ValueError, match="forward pass .* logits are NaN or infinite"):
        convert_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_folder_names_do_not_matter(tmp_path):
    source = write_checkpoint(tmp_path)
    renamed = tmp_path / "sam-lora-llava-hf-projector.pth"
    shutil.copytree(source, renamed)
    report = convert_checkpoint(renamed, tmp_path / "target", self_check=False)
    assert report.layout.startswith("LLaVA, research layout")
    assert (
        VISION["hidden_size"]
        == json.loads((tmp_path / "target/config.json").read_text())["vision_config"]["hidden_size"]
    )


def test_tokenizer_of_the_source_is_needed(tmp_path):
    source = write_checkpoint(tmp_path)
    (source / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="neither `tokenizer.model` nor `tokenizer.json`"):
        convert_checkpoint(source, tmp_path / "target")
    write_tokenizer(source)
    convert_checkpoint(source, tmp_path / "target", self_check=False)
