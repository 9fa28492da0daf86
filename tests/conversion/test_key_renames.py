import pytest

from mask_llava_hf.conversion.key_renames import (
    CLIP,
    LLAVA_HF,
    LLAVA_RESEARCH,
    MASK_LLAVA_RESEARCH,
    Drop,
    rename,
    to_clip,
    to_llava_research,
)


RESEARCH = {
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.31.mlp.up_proj.weight": "model.language_model.layers.31.mlp.up_proj.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    "model.mm_projector.10.bias": "model.multi_modal_projector.linear_6.bias",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias": (
        "model.vision_tower.encoder.layers.3.mlp.fc1.bias"
    ),
}


@pytest.mark.parametrize("table", [LLAVA_RESEARCH, MASK_LLAVA_RESEARCH])
def test_research_names_and_back(table):
    for theirs, ours in RESEARCH.items():
        assert rename(theirs, table) == ours
        assert to_llava_research(ours, "mlp6x_gelu") == theirs


def test_linear_projector_has_no_place():
    ours = "model.multi_modal_projector.linear_1.weight"
    assert rename("model.mm_projector.weight", LLAVA_RESEARCH) == ours
    assert to_llava_research(ours, "linear") == "model.mm_projector.weight"
    assert to_llava_research(ours, "mlp1x_gelu") == "model.mm_projector.0.weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.mm_projector.1.weight",  # an activation has no weights
        "model.image_newline",  # LLaVA-NeXT
        "model.vision_resampler.query",
        "model.mm_projector.0.weight.absmax",  # quantised
        "base_model.model.lm_head.weight",
        "xmodel.norm.weight",
        "vision_model.encoder.layers.0.mlp.fc1.bias",
    ],
)
def test_unknown_names_stay_unknown(name):
    assert rename(name, LLAVA_RESEARCH) is None


def test_dropped_names_have_a_reason():
    for name, table in {
        "model.layers.0.self_attn.rotary_emb.inv_freq": LLAVA_RESEARCH,
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": LLAVA_RESEARCH,
        "text_model.encoder.layers.0.mlp.fc1.bias": CLIP,
        "logit_scale": CLIP,
        "vision_tower.vision_model.embeddings.position_ids": LLAVA_HF,
    }.items():
        outcome = rename(name, table)
        assert isinstance(outcome, Drop) and outcome.reason


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_clip_names_and_back(prefix):
    ours = rename(f"{prefix}post_layernorm.weight", CLIP)
    assert ours == "model.vision_tower.post_layernorm.weight"
    assert to_clip(ours) == "vision_model.post_layernorm.weight"
    assert to_clip("lm_head.weight") is None


def test_both_layouts_of_transformers_llava():
    pairs = {
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.post_layernorm.bias": "model.vision_tower.post_layernorm.bias",
    }
    for published, ours in pairs.items():
        assert rename(published, LLAVA_HF) == ours
        assert rename(ours, LLAVA_HF) == ours
