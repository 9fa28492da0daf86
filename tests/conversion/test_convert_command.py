import json

import torch
from research_checkpoints import write_base, write_checkpoint
from safetensors.torch import load_file

from mask_llava_hf.cli import main


def test_conversion_says_what_it_did(tmp_path, capsys):
    source = write_checkpoint(tmp_path, more={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    command = ["convert", str(source), str(tmp_path / "target"), "--dtype", "float16"]
    assert main(command) == 0
    said = capsys.readouterr().out
    for line in (
        "source    LLaVA, research layout (its config has `mm_...` fields, with the weights of a whole model)",
        "target    target",
        "GB in float16; 80 tensors written, 1 of the source's not needed",
        "dropped model.layers.0.self_attn.rotary_emb.inv_freq: rotary frequencies; computed from the config",
        "tokens    16 patches = 16 tokens per image",
        "note      vocabulary: 320 rows became 384",
        "note      chat template: vicuna-v1",
        "checked   loads; 16 placeholders for 16 tokens of a picture; a forward pass is finite",
        "time ",
    ):
        assert line in said, line
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--no-self-check", "--chat-template", "plain"]) == 0
    said = capsys.readouterr().out
    assert "checked   not checked" in said and "note      chat template" not in said
    assert "ASSISTANT" not in (tmp_path / "target/chat_template.jinja").read_text()


def test_options_reach_the_conversion(tmp_path, capsys):
    source = write_checkpoint(tmp_path, mm_vision_tower="nowhere/to-be-found")
    command = ["convert", str(source), str(tmp_path / "target"), "--no-self-check"]
    assert main(command) == 2
    assert "--vision-tower FOLDER" in capsys.readouterr().err
    command += ["--vision-tower", str(tmp_path / "vision_tower")]
    assert main([*command, "--from", "llava-hf"]) == 2
    assert "was said to be in the layout 'llava-hf'" in capsys.readouterr().err
    assert main([*command, "--composition", "mask-llava"]) == 2  # this tower has 4 x 4 patches
    assert "`patch_grid_size` must be an integer in 1..4, got 6" in capsys.readouterr().err
    assert main([*command, "--from", "llava", "--composition", "llava"]) == 0
    assert main([*command, "--overwrite", "--base", "x"]) == 2
    assert "would be ignored" in capsys.readouterr().err


def test_way_back(tmp_path, capsys):
    source = write_checkpoint(tmp_path)
    assert main(["convert", str(source), str(tmp_path / "ours"), "--no-self-check"]) == 0
    back = ["convert", str(tmp_path / "ours"), str(tmp_path / "back")]
    assert main(back) == 2
    assert "--to llava" in capsys.readouterr().err
    assert main([*back, "--to", "llava", "--composition", "llava"]) == 2
    assert "leave out `--from`" in capsys.readouterr().err
    base = write_base(tmp_path / "base")
    assert main([*back, "--to", "llava", "--base", str(base)]) == 0
    assert "to LLaVA, research layout" in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "llava_llama"


def test_config_that_does_not_hold_is_told_without_a_traceback(tmp_path, capsys):
    assert main(["convert", str(write_checkpoint(tmp_path)), str(tmp_path / "ours"), "--no-self-check"]) == 0
    path = tmp_path / "ours/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_grid_size": 99}))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "llava"]) == 2
    assert "`patch_grid_size` must be an integer in 1..4, got 99" in capsys.readouterr().err
