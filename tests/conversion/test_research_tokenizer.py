import json
import shutil

import pytest
from research_checkpoints import GOLDENS
from transformers import AutoTokenizer

from mask_llava_hf.conversion.research_tokenizer import boundary_mismatches, load_source_tokenizer
from mask_llava_hf.conversion.sentencepiece_model import read_sentencepiece_model
from mask_llava_hf.testing import tiny_tokenizer


SLOW = json.loads((GOLDENS / "slow_tokenizer.json").read_text())
MODEL = GOLDENS / "finetuned_safetensors" / "tokenizer.model"


def write(folder, settings, older=False):
    """Files of the slow tokenizer; `older`: as Transformers wrote them before `added_tokens_decoder`."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(MODEL, folder / "tokenizer.model")
    settings = dict(settings)
    if older:
        added = settings.pop("added_tokens_decoder")
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
        special = {name: settings.pop(name) for name in names if settings.get(name) is not None}
        special["bos_token"] = {"content": special["bos_token"], "normalized": True}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        later = {token["content"]: int(id) for id, token in added.items() if int(id) > 2}
        (folder / "added_tokens.json").write_text(json.dumps(later))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def marked(tokenizer, prompt):
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [-200 if token == image else token for token in tokenizer(prompt).input_ids]


@pytest.mark.parametrize("older", [False, True], ids=["", "older files"])
@pytest.mark.parametrize("variant", SLOW["variants"])
def test_ids_are_those_of_the_slow_tokenizer(tmp_path, variant, older):
    expected = SLOW["variants"][variant]
    loaded = load_source_tokenizer(write(tmp_path / "source", expected["tokenizer_config"], older))
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for prompt, ids in zip(SLOW["prompts"], expected["input_ids"], strict=True):
        assert marked(loaded.tokenizer, prompt) == ids, prompt
        assert marked(saved, prompt) == ids, prompt
    assert boundary_mismatches(saved) == []
    assert loaded.image_token_id == loaded.num_source_ids == loaded.num_ids - 1


def test_without_the_setting_the_older_behaviour_counts(tmp_path):
    settings = dict(SLOW["variants"]["legacy_true"]["tokenizer_config"])
    for said in ({}, {"legacy": None}):
        settings.pop("legacy", None)
        loaded = load_source_tokenizer(write(tmp_path, {**settings, **said}))
        assert any("`legacy`=True" in note for note in loaded.notes)
        for prompt, ids in zip(SLOW["prompts"], SLOW["variants"]["legacy_true"]["input_ids"], strict=True):
            assert marked(loaded.tokenizer, prompt) == ids


def test_text_comes_back_as_it_was():
    tokenizer = load_source_tokenizer(GOLDENS / "finetuned_safetensors").tokenizer
    for text in ("a cup", " two  blanks", "café 中文 🦊", "line\nbreak"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    ids = tokenizer("USER: <image>\nHi").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "USER:  \nHi"


def test_padding_and_length(tmp_path):
    tokenizer = load_source_tokenizer(GOLDENS / "finetuned_safetensors").tokenizer
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length) == ("<unk>", "left", 2048)
    padded = tokenizer(["a", "a cup on it"], padding=True).input_ids
    assert padded[0][0] == 0 and len(padded[0]) == len(padded[1])
    loaded = load_source_tokenizer(GOLDENS / "base_llm")
    assert loaded.tokenizer.pad_token == "<unk>"
    assert loaded.notes == ("pad token: <unk>, as the checkpoint names none",)
    settings = {**SLOW["variants"]["legacy_false"]["tokenizer_config"], "model_max_length": 10**30}
    assert load_source_tokenizer(write(tmp_path, settings), model_max_length=77).tokenizer.model_max_length == 77


def test_new_tokens_come_before_the_image():
    loaded = load_source_tokenizer(GOLDENS / "finetuned_safetensors", ["<im_start>", "<im_end>"])
    assert loaded.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<image>"]) == [320, 321, 322]
    expected = SLOW["variants"]["legacy_false_with_image_marks"]["input_ids"]
    assert [marked(loaded.tokenizer, prompt) for prompt in SLOW["prompts"]] == expected


def test_image_token_that_is_there_already(tmp_path):
    settings = json.loads(json.dumps(SLOW["variants"]["legacy_false"]["tokenizer_config"]))
    settings["added_tokens_decoder"]["320"] = {"content": "<image>", "normalized": False, "special": False}
    settings["added_tokens_decoder"]["321"] = {"content": "<pad>", "special": True}
    loaded = load_source_tokenizer(write(tmp_path, settings))
    assert (loaded.image_token_id, loaded.num_ids) == (320, 322)
    assert loaded.tokenizer.decode([320], skip_special_tokens=True) == ""
    expected = SLOW["variants"]["legacy_false"]["input_ids"]
    assert [marked(loaded.tokenizer, prompt) for prompt in SLOW["prompts"]] == expected


def test_fast_tokenizer_is_taken_where_there_is_no_slow_one(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_source_tokenizer(tmp_path)
    assert loaded.notes == ("tokenizer: from `tokenizer.json`, as there is no `tokenizer.model`",)
    assert loaded.image_token_id == 4 and loaded.num_ids == len(tiny_tokenizer())
    assert loaded.tokenizer("a <image>\ncup").input_ids == tiny_tokenizer()("a <image>\ncup").input_ids
    assert loaded.tokenizer.pad_token == "<pad>"


def test_prompts_that_differ_are_named(tmp_path):
    loaded = load_source_tokenizer(GOLDENS / "finetuned_safetensors").tokenizer
    loaded.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    said["normalizer"]["normalizers"] = said["normalizer"]["normalizers"][1:]  # the one that puts blanks behind images
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    differing = boundary_mismatches(load_source_tokenizer(tmp_path).tokenizer)
    assert "image, line break, text" in differing and "images side by side" in differing


def test_ids_of_another_checkpoint_are_refused(tmp_path):
    settings = json.loads(json.dumps(SLOW["variants"]["legacy_false"]["tokenizer_config"]))
    settings["added_tokens_decoder"]["32000"] = {"content": "<pad>", "special": True}
    with pytest.raises(ValueError, match="'<pad>' the id 32000, which is not the next one after the 320"):
        load_source_tokenizer(write(tmp_path, settings))
    settings["added_tokens_decoder"] = {"7": {"content": "</s>", "special": True}}
    with pytest.raises(ValueError, match="'</s>' the id 7, which is not 2, which it has already"):
        load_source_tokenizer(write(tmp_path, settings))


def field(number, wire_type, content):
    return bytes([number << 3 | wire_type]) + content


def test_tokenizers_unlike_llamas_are_refused(tmp_path):
    settings = SLOW["variants"]["legacy_false"]["tokenizer_config"]
    folder = write(tmp_path, settings)
    for added, message in {
        field(2, 2, b"\x02" + field(3, 0, b"\x01")): "unigram model, not BPE",
        field(
            3, 2, b"\x07" + field(2, 2, b"\x01x") + field(3, 0, b"\x01") + field(4, 0, b"\x00")
        ): "rewrites characters",
        field(3, 2, b"\x02" + field(4, 0, b"\x01")): "removes extra blanks",
        field(1, 2, b"\x05" + field(1, 2, b"\x01~") + field(3, 0, b"\x04")): "pieces defined by its user",
    }.items():
        (folder / "tokenizer.model").write_bytes(MODEL.read_bytes() + added)
        with pytest.raises(ValueError, match=message):
            load_source_tokenizer(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1",
        MODEL.read_bytes()[:3000],
        field(1, 2, b"\x06" + field(1, 2, b"\x01x") + field(3, 2, b"\x01x")),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=f"is not a SentencePiece model, or not all of it \\({len(content)} bytes\\)"):
        read_sentencepiece_model(tmp_path / "tokenizer.model")


def test_broken_fast_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="`tokenizer.json` cannot be read"):
        load_source_tokenizer(tmp_path)
