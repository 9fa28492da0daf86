"""LoRA finetunings of the research code, merged, against PEFT's own merge."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from research_checkpoints import (
    TEXT,
    language_tensors,
    projector_tensors,
    random_tensors,
    write_base,
    write_config,
    write_tower,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mask_llava_hf.conversion import convert_checkpoint
from mask_llava_hf.conversion.checkpoint_files import open_checkpoint
from mask_llava_hf.conversion.lora_merging import merge_adapter


def adapted(**settings):
    """A PEFT model around the base's weights, with random factors."""
    fields = {name: value for name, value in TEXT.items() if value is not None}
    base = LlamaForCausalLM(LlamaConfig(**fields))
    base.load_state_dict(language_tensors({}))
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj"], **settings}
    model = get_peft_model(base, LoraConfig(**options))
    factors = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    model.load_state_dict(random_tensors(factors, seed=11), strict=False)
    return model


def write_adapter(root, model, form="bin", extra=None):
    """As the research code leaves it: PEFT's files, and the projector among `non_lora_trainables.bin`."""
    folder = root / "adapter"
    model.save_pretrained(folder)
    if form == "bin":
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    projector = {f"base_model.model.{name}": tensor for name, tensor in projector_tensors("mlp2x_gelu").items()}
    torch.save({**projector, **(extra or {})}, folder / "non_lora_trainables.bin")
    write_config(folder, {})
    write_tower(root / "vision_tower")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"target_modules": ["lm_head", "o_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "rank-stabilised", "patterns", "head", "trained head"],
)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_merged_weights_are_those_of_peft(tmp_path, settings, form):
    base = write_base(tmp_path / "base")
    model = adapted(**settings)
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    source = write_adapter(tmp_path, model, form)
    report = convert_checkpoint(source, tmp_path / "target", base=str(base))
    assert "with a LoRA adapter" in report.layout
    merged = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "target/model.safetensors")
    changed = 0
    for name, tensor in merged.items():
        ours = found[name.replace("model.", "model.language_model.", 1)][: len(tensor)]
        torch.testing.assert_close(ours, tensor, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(ours, language_tensors({})[name])
    assert changed
    expected = projector_tensors("mlp2x_gelu")["model.mm_projector.2.weight"]
    assert torch.equal(found["model.multi_modal_projector.linear_2.weight"], expected)


def test_base_is_taken_from_the_adapter_where_none_is_given(tmp_path):
    base = write_base(tmp_path / "base")
    source = write_adapter(tmp_path, adapted())
    settings = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    convert_checkpoint(source, tmp_path / "target")
    (source / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "./gone"}))
    with pytest.raises(ValueError, match="base model `./gone` is no folder.*--base"):
        convert_checkpoint(source, tmp_path / "again")


@pytest.mark.parametrize("place", ["base", "vision_tower"])
def test_what_the_sources_files_name_is_never_replaced(tmp_path, place):
    base = write_base(tmp_path / "base")
    source = write_adapter(tmp_path, adapted())
    settings = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match=f"/{place}`, which it is made from.*would be deleted"):
        convert_checkpoint(source, tmp_path / place, overwrite=True)


def test_scale_of_an_adapter_is_never_guessed(tmp_path):
    base = write_base(tmp_path / "base")
    source = write_adapter(tmp_path, adapted())
    (source / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="no `adapter_config.json`.*`lora_alpha`"):
        convert_checkpoint(source, tmp_path / "target", base=str(base))


def test_merging_is_done_in_float32_and_rounded_once(tmp_path):
    base = {name: tensor.half() for name, tensor in language_tensors({}).items()}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    model = adapted()
    merged = merge_adapter(write_adapter(tmp_path, model), open_checkpoint(folder))
    name = "model.layers.0.self_attn.q_proj"
    state = model.state_dict()
    factors = [state[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "BA"]
    exact = base[f"{name}.weight"].double() + 3 * factors[0].double() @ factors[1].double()
    found = merged[f"{name}.weight"].load()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_transposed_weights(tmp_path):
    weight, a, b = torch.randn(6, 4), torch.randn(2, 6), torch.randn(4, 2)
    (tmp_path / "base").mkdir()
    save_file({"m.weight": weight}, tmp_path / "base/model.safetensors")
    torch.save(
        {"base_model.model.m.lora_A.weight": a, "base_model.model.m.lora_B.weight": b}, tmp_path / "adapter_model.bin"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "fan_in_fan_out": True}))
    merged = merge_adapter(tmp_path, open_checkpoint(tmp_path / "base"))
    torch.testing.assert_close(merged["m.weight"].load(), weight + (b @ a).T)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    with pytest.raises(ValueError, match=r"1 have another shape \(m\)"):
        merge_adapter(tmp_path, open_checkpoint(tmp_path / "base"))


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    write_base(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    folder = write_adapter(tmp_path, adapted())
    path = folder / "adapter_model.bin"
    good = torch.load(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    for changes, message in (
        ({f"{name}B.weight": None}, "1 have only one of their two factors"),
        ({f"{name}B.weight": torch.ones(7, 4)}, r"1 have another shape \(model.layers.0.self_attn.q_proj\)"),
        ({f"{name}A.weight": torch.ones(4, 32, 1, 1)}, "1 have another shape"),
        (
            {
                "base_model.model.x.lora_A.weight": torch.ones(4, 3),
                "base_model.model.x.lora_B.weight": torch.ones(3, 4),
            },
            r"of 7 adapted layers 1 have no such weight in the base \(x\).*--base",
        ),
    ):
        torch.save({k: v for k, v in {**good, **changes}.items() if v is not None}, path)
        with pytest.raises(ValueError, match=message):
            merge_adapter(folder, base)
    path.unlink()
    with pytest.raises(ValueError, match="none of adapter_model.safetensors, adapter_model.bin"):
        merge_adapter(folder, base)


@pytest.mark.parametrize(("settings", "kind"), [({"use_dora": True}, "DoRA"), ({"peft_type": "LOHA"}, "LOHA")])
def test_other_kinds_of_adapters_are_refused(tmp_path, settings, kind):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"The adapter is {kind}, and only LoRA.*merge_and_unload"):
        merge_adapter(tmp_path, {})


def test_unknown_weights_of_an_adapter_are_listed(tmp_path):
    base = write_base(tmp_path / "base")
    other = {"base_model.model.model.resampler.query": torch.ones(2)}
    source = write_adapter(tmp_path, adapted(), extra=other)
    with pytest.raises(ValueError, match="1 weights that are unknown: base_model.model.model.resampler.query"):
        convert_checkpoint(source, tmp_path / "target", base=str(base))
