"""The model against Transformers' LLaVA, and against itself in other forms."""

import pytest
import torch
from tiny_models import GRID, NUM_OBJECTS, SIDE, TEXT, VISION, WIDTH, batch, make_config, make_model, prompt, single
from transformers import AutoModel, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from mask_llava_hf.modeling.modeling_mask_llava import (
    MaskLlavaForConditionalGeneration,
    MaskLlavaModel,
    MaskLlavaMultiModalProjector,
)
from mask_llava_hf.modeling.object_embedding import embed_masks, pool_masks
from mask_llava_hf.modeling.token_composition import compose_tokens
from mask_llava_hf.modeling.token_layout import TokenLayout


def make_masks() -> torch.Tensor:
    masks = torch.zeros(3, NUM_OBJECTS, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 0, :8, :8] = masks[0, 1, 8:, 8:] = masks[0, 2, 4:20, 4:20] = masks[0, 3, :, :4] = 1
    masks[1, 0, 3:9, 3:9] = masks[1, 1, 10:19, 3:9] = 1
    return masks


@pytest.mark.parametrize("vision_feature_layer", [-2, -1, [-1, -2]])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_its_streams_it_is_llava_bit_for_bit(vision_feature_layer, attention):
    torch.manual_seed(0)
    shared = {"image_token_index": 0, "vision_feature_layer": vision_feature_layer}
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=dict(VISION), text_config=dict(TEXT), attn_implementation=attention, **shared)
    ).eval()
    ours = make_model(use_cls_token=False, max_object_tokens=0, patch_grid_size=GRID, **shared)
    ours.set_attn_implementation(attention)
    ours.load_state_dict(llava.state_dict(), strict=True)
    inputs = {
        **prompt([[5, (GRID**2,), 6, (GRID**2,), 7], [9, (GRID**2,), 10, 11]]),
        "pixel_values": torch.randn(3, 3, SIDE, SIDE),
    }
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, llava(**inputs).logits)


def test_streams_arrive_in_order_at_their_placeholders():
    model, inputs = make_model(), batch()
    with torch.no_grad():
        features = model.get_image_features(
            inputs["pixel_values"], object_embeds=inputs["object_embeds"], object_counts=inputs["object_counts"]
        )
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == 0] = torch.cat(features.pooler_output)
        by_hand = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        assert [len(tokens) for tokens in features.pooler_output] == [14, 12, 10]
        torch.testing.assert_close(model(**inputs).logits, by_hand)


def test_padding_rows_of_embeddings_have_no_influence():
    model, inputs = make_model(), batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs["object_embeds"][1, 2:] = 1e4
        inputs["object_embeds"][2] = float("nan")
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("object_embedding", ["mask_inversion", "mask_pooling"])
def test_masks_give_what_embeddings_made_from_them_give(object_embedding):
    model, inputs, masks = make_model(object_embedding=object_embedding), batch(), make_masks()
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        inputs["object_embeds"] = embed_masks(model.model.vision_tower, states, masks, model.config, -2)
        expected = model(**inputs).logits
        del inputs["object_embeds"]
        torch.testing.assert_close(model(**inputs, object_masks=masks).logits, expected, atol=1e-4, rtol=0)


def test_mask_pooling_weighs_patches_by_covered_area():
    patches = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])  # 2 x 2 grid
    masks = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    masks[0, 0, :2, :] = 1  # the two upper patches
    masks[0, 1, 0, 0] = masks[0, 1, 2:, 2:] = 1  # a quarter of the first patch, all of the last
    pooled = pool_masks(patches, masks)
    torch.testing.assert_close(pooled.flatten(), torch.tensor([1.5, (0.25 * 1 + 1 * 4) / 1.25, 0.0]))


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_scaling": "none"},
        {"norm_scaling": "fixed", "patch_statistics": [0.3, 2.0]},
        {"use_cls_token": False},
        {"patch_grid_size": 4},
    ],
)
def test_the_configs_composition_reaches_the_projector(fields):
    model, inputs = make_model(**fields), batch()
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = {k: inputs[k] for k in ("pixel_values", "object_embeds", "object_counts")}
    with torch.no_grad():
        model.get_image_features(**images)
        features = model.model.vision_tower(images["pixel_values"], output_hidden_states=True).hidden_states[-2]
    config = model.config
    layout = TokenLayout.from_config(config)
    expected = compose_tokens(
        features, images["object_embeds"], layout, config.norm_scaling, fields.get("patch_statistics")
    )
    torch.testing.assert_close(seen[0], expected)


def test_the_configs_mask_inversion_settings_are_used():
    inputs, masks = batch(), make_masks()
    del inputs["object_embeds"]
    logits = []
    for iterations in (1, 10):
        with torch.no_grad():
            model = make_model(mask_inversion={"iterations": iterations})
            logits.append(model(**inputs, object_masks=masks).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("layer", [-1, -2])
def test_mask_pooling_reads_the_layer_of_the_features(layer):
    model, inputs, masks = (
        make_model(object_embedding="mask_pooling", vision_feature_layer=layer),
        batch(),
        make_masks(),
    )
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        inputs["object_embeds"] = pool_masks(states[layer][:, 1:], masks)
        expected = model(**inputs).logits
        del inputs["object_embeds"]
        torch.testing.assert_close(model(**inputs, object_masks=masks).logits, expected)


def test_mask_pooling_is_float32_under_autocast():
    patches, masks = torch.randn(1, 16, 8), torch.ones(1, 2, 8, 8, dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool_masks(patches, masks)
    assert torch.equal(pooled, pool_masks(patches, masks)) and pooled.dtype == torch.float32


def test_the_projector_is_a_stack_of_linear_layers_with_an_activation_between():
    torch.manual_seed(0)
    config = make_config(projector_type="mlp3x_gelu", multimodal_projector_bias=False, projector_hidden_act="relu")
    projector, x = MaskLlavaMultiModalProjector(config), torch.randn(2, WIDTH)
    first, second, third = (getattr(projector, f"linear_{index}") for index in (1, 2, 3))
    assert first.bias is None and third.bias is None
    torch.testing.assert_close(projector(x), third(second(first(x).relu()).relu()))


def test_recompiling_never_mixes_two_forms_of_the_features():
    model = make_model()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager")
    calls = [(batch(), True), (single(), True), (single(2), False), (batch((1, 1, 1)), False), (single(1), True)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for inputs, grad in calls * 2:
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_placeholders_go_where_the_embeddings_are(monkeypatch):
    # "meta" stands for another device, as with `device_map`; the tally would need its numbers
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    ids, embeds = torch.tensor([[5, 0, 0, 6]]), torch.empty(1, 4, WIDTH, device="meta")
    mask = make_model().model.get_placeholder_mask(ids, embeds, torch.empty(2, WIDTH, device="meta"))
    assert mask.device.type == "meta"


def test_precomputed_features_and_ids_free_prompts_agree():
    model, inputs = make_model(), batch()
    images = {k: inputs.pop(k) for k in ("pixel_values", "object_embeds", "object_counts")}
    with torch.no_grad():
        expected = model(**inputs, **images).logits
        encoded = {"image": model.get_image_features(**images)}
        assert torch.equal(model(**inputs, mm_encoder_outputs=encoded).logits, expected)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        mask = inputs["attention_mask"]
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask, **images).logits, expected)


@pytest.mark.parametrize("projector_type", ["identity", "linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_every_projector_saves_and_loads(projector_type, tmp_path):
    model, inputs = make_model(projector_type=projector_type), batch()
    model.save_pretrained(tmp_path)
    again, report = MaskLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_sharded_saving_and_the_headless_model(tmp_path):
    model, inputs = make_model(), batch()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is MaskLlavaModel
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        assert torch.equal(again(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = make_model().to(dtype)
    inputs, masks = batch(), make_masks()
    logits = model(**inputs).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    del inputs["object_embeds"]
    assert torch.isfinite(model(**inputs, object_masks=masks).logits).all()


def test_only_the_needed_hidden_states_are_kept():
    model, inputs = make_model(), single()
    images = {k: inputs[k] for k in ("pixel_values", "object_embeds", "object_counts")}
    states = model.get_image_features(**images).hidden_states
    assert [i for i, state in enumerate(states) if state is not None] == [2]


def test_without_slots_for_objects_the_tally_is_checked_too():
    model, inputs = make_model(), batch(counts=(0, 0, 0))
    with torch.no_grad():
        expected = model(**inputs).logits  # empty slots
        inputs["object_embeds"] = inputs["object_embeds"][:, :0]
        assert torch.equal(model(**inputs).logits, expected)
        with pytest.raises(ValueError, match="30 tokens"):
            model(**{**batch(), **{name: inputs[name] for name in ("object_embeds", "object_counts")}})


def test_forward_is_one_graph_and_catches_a_wrong_tally():
    model, inputs = make_model(), batch()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, expected)
        inputs["object_counts"] = torch.tensor([4, 1, 0])
        with pytest.raises(RuntimeError):
            compiled(**inputs)


# --------------------------------------------------------------------------------------------------------- training
def test_gradients_reach_projector_tower_and_language_model_but_not_the_embeddings():
    model, inputs = make_model().train(), batch()
    inputs["object_embeds"].requires_grad_()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert inputs["object_embeds"].grad is None
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_a_batch_without_images_touches_tower_and_projector_with_zero_gradient():
    model = make_model().train()
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    loss = model(**text).loss
    loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and not gradient.any()
    with torch.no_grad():
        torch.testing.assert_close(model(**text).loss, loss.detach())
    for tower, projector in ((True, False), (False, True), (False, False)):
        model, calls = make_model().train(), []
        model.model.vision_tower.requires_grad_(tower)
        model.model.multi_modal_projector.requires_grad_(projector)
        model.model.vision_tower.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(**text).loss.backward()
        assert bool(calls) == (tower or projector)


def test_the_zero_of_a_text_batch_is_zero_in_half_precision():
    model = make_model().train().half()
    torch.nn.init.constant_(model.model.multi_modal_projector.linear_2.bias, 3e4)
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, inputs = make_model().train(), batch()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_training_the_tower_beside_stored_embeddings_warns(monkeypatch):
    model, inputs, warned = make_model().train(), single(), []
    logger = logging.get_logger("mask_llava_hf.modeling.modeling_mask_llava")
    monkeypatch.setattr(type(logger), "warning_once", lambda self, message, *a: warned.append(message), raising=False)
    model(**inputs)
    assert any("drift apart" in message for message in warned)
    warned.clear()
    model.model.vision_tower.requires_grad_(False)
    model(**inputs)
    assert not any("drift apart" in message for message in warned)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("object_counts"), "`object_embeds` needs `object_counts`"),
        (lambda i: i.update(object_masks=make_masks()), "Both `object_embeds` and `object_masks`"),
        (lambda i: i.pop("object_embeds"), "`object_counts` was given without"),
        (lambda i: i.update(object_embeds=i["object_embeds"][:2]), "`object_embeds` 2 rows"),
        (lambda i: i.update(object_embeds=torch.zeros(3, 4, 48)), "width 48, but this model's vision tower has 32"),
        (lambda i: i.update(object_counts=torch.tensor([4, 2, 5])), r"must lie in 0..4"),
        (lambda i: i.update(object_embeds=torch.zeros(3, 6, 32)), "6 objects per image, but this model has .*=4"),
        (lambda i: i.pop("pixel_values"), "`object_embeds` was given without `pixel_values`"),
        (lambda i: i.update(object_counts=torch.tensor([4, 1, 0])), "36 image placeholders .* give 35 tokens"),
        (lambda i: i.update(patch_grid_size=4), "`patch_grid_size` must be an integer in 0..3, got 4"),
        (lambda i: i.update(patch_grid_size=2.0), "`patch_grid_size` must be an integer"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    model, inputs = make_model(), batch()
    change(inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(3, 4, 61, 97, dtype=torch.uint8), r"\(3, 4, 61, 97\), expected \(images, objects, 24, 24\)"),
        (torch.zeros(3, 24, 24, dtype=torch.uint8), "object_masks"),
        (torch.zeros(3, 4, 24, 24), "torch.float32, expected bool or uint8"),
    ],
)
def test_masks_of_another_frame_or_type_are_refused(masks, message):
    model, inputs = make_model(), batch()
    del inputs["object_embeds"]
    with pytest.raises(ValueError, match=message):
        model(**inputs, object_masks=masks)


def test_encoded_images_exclude_pixels():
    model, inputs = make_model(), single()
    encoded = {"image": model.get_image_features(inputs["pixel_values"])}
    with pytest.raises(ValueError, match="`pixel_values` and `mm_encoder_outputs`"):
        model(**inputs, mm_encoder_outputs=encoded)


def test_lists_of_feature_layers_refuse_objects():
    model = make_model(vision_feature_layer=[-1, -2], max_object_tokens=0)
    with pytest.raises(ValueError, match="concatenates several layers"):
        model(**single())


def test_a_tower_without_cls_token_is_refused():
    vision = {**VISION, "model_type": "siglip_vision_model"}
    config = make_config()
    model = MaskLlavaForConditionalGeneration(type(config)(vision_config=vision, text_config=dict(TEXT)))
    with pytest.raises(ValueError, match="144 tokens for a 12 x 12 grid.*without CLS token"):
        model.get_image_features(torch.zeros(1, 3, SIDE, SIDE))


def test_the_vision_tower_is_transformers_own():
    assert type(make_model().model.vision_tower) is CLIPVisionModel
    assert make_model().model.vision_tower.config.hidden_size == WIDTH
