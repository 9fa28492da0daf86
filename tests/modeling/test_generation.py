"""`generate` with fewer tokens must equal generating from a prompt that never had them, in every mode."""

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny_models import IMAGE, NUM_OBJECTS, TEXT, VISION, batch, cut_by_hand, make_model, prompt, single
from transformers import AutoModelForImageTextToText, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer


NEW = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return make_model()


@contextmanager
def prefill_lengths(model):
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def new_tokens(output, inputs) -> list:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("cap", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_dropping_equals_never_having_had_them(model, cap, options):
    inputs = batch()
    by_hand = cut_by_hand(inputs, cap)
    expected = model.generate(**by_hand, **NEW, **options)
    found = model.generate(**inputs, **NEW, **options, max_object_tokens=cap)
    assert new_tokens(found, inputs) == new_tokens(expected, by_hand)
    copies = options.get("num_return_sequences", 1)
    prompt_length = inputs["input_ids"].shape[1]
    assert torch.equal(found[:, :prompt_length], inputs["input_ids"].repeat_interleave(copies, 0))


def test_the_prefill_is_really_shorter(model):
    inputs, lengths = single(), {}
    for name, knobs in {
        "all": {},
        "many": {"max_object_tokens": 999},
        "two": {"max_object_tokens": 2},
        "none": {"max_object_tokens": 0},
        "grid": {"patch_grid_size": 2},
        "budget": {"max_visual_tokens": 10},
        "least": {"max_visual_tokens": 1},
    }.items():
        with prefill_lengths(model) as seen:
            model.generate(**inputs, **NEW, **knobs)
        lengths[name] = seen[0]
    # 3 text tokens beside 1 + 9 + 4; a budget of 10 is 1 + 4 + 4 (1 + 9 leaves too few objects)
    assert lengths == {"all": 17, "many": 17, "two": 15, "none": 13, "grid": 12, "budget": 12, "least": 4}


def test_a_batch_is_as_short_as_its_longest_row(model):
    inputs = batch()  # rows of 30 and 12 attended positions
    with prefill_lengths(model) as seen:
        model.generate(**inputs, **NEW, max_visual_tokens=1)
    assert seen[0] == 2 + 4


@pytest.mark.parametrize(
    "knobs", [{"patch_grid_size": 1}, {"patch_grid_size": 2, "max_object_tokens": 1}, {"max_visual_tokens": 2}]
)
def test_other_grids_equal_encoding_with_that_grid(model, knobs):
    inputs = single()
    layout = {"patch_grid_size": knobs.get("patch_grid_size", 0)}
    cap = knobs.get("max_object_tokens", 1 if "max_visual_tokens" in knobs else NUM_OBJECTS)
    with torch.no_grad():
        encoded = model.get_image_features(
            inputs["pixel_values"],
            object_embeds=inputs["object_embeds"][:, :cap],
            object_counts=torch.tensor([cap]),
            **layout,
        )
    text = prompt([[5, (len(encoded.pooler_output[0]),), 7, 8]])
    expected = model.generate(**text, mm_encoder_outputs={"image": encoded}, **NEW)
    assert new_tokens(model.generate(**inputs, **NEW, **knobs), inputs) == new_tokens(expected, text)


def test_model_side_masks_are_cut_before_they_are_inverted(model, monkeypatch):
    from mask_llava_hf.modeling import object_embedding

    inputs, seen = single(), []
    del inputs["object_embeds"]
    inputs["object_masks"] = torch.zeros(1, NUM_OBJECTS, 24, 24, dtype=torch.uint8)
    for index in range(NUM_OBJECTS):
        inputs["object_masks"][0, index, index * 5 : index * 5 + 8] = 1
    invert = object_embedding.invert_masks
    monkeypatch.setattr(
        object_embedding, "invert_masks", lambda *args, **kw: seen.append(args[2].shape[1]) or invert(*args, **kw)
    )
    found = model.generate(**inputs, **NEW, max_object_tokens=2)
    assert seen == [2]
    by_hand = {
        **prompt([[5, (12,), 7, 8]]),
        "pixel_values": inputs["pixel_values"],
        "object_masks": inputs["object_masks"][:, :2],
        "object_counts": torch.tensor([2]),
    }
    assert new_tokens(found, inputs) == new_tokens(model.generate(**by_hand, **NEW), by_hand)


def test_features_encoded_before_are_cut_too(model):
    inputs = batch()
    images = {k: inputs.pop(k) for k in ("pixel_values", "object_embeds", "object_counts")}
    expected = model.generate(**inputs, **images, **NEW, max_object_tokens=1)
    encoded = model.get_image_features(**images)
    for _ in range(2):  # the caller's features are not changed by the first call
        found = model.generate(**inputs, mm_encoder_outputs={"image": encoded}, **NEW, max_object_tokens=1)
        assert torch.equal(found, expected)


def test_aligned_inputs_are_cut_along(model):
    inputs = batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model.generate(**inputs, **NEW, max_object_tokens=1)
    assert torch.equal(model.generate(**inputs, inputs_embeds=embeds, **NEW, max_object_tokens=1), expected)
    found = model.generate(**inputs, position_ids=positions, **NEW, max_object_tokens=1)
    assert torch.equal(found, expected)  # positions are counted anew, as of a prompt that never had the tokens


def test_padding_on_the_right(model):
    inputs, padding = single(2), torch.full((1, 3), 60)
    right = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], padding], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], 0 * padding], 1),
    }
    by_hand = cut_by_hand(inputs, 1)
    by_hand["input_ids"] = torch.cat([by_hand["input_ids"], padding], 1)
    by_hand["attention_mask"] = torch.cat([by_hand["attention_mask"], 0 * padding], 1)
    found = model.generate(**right, **NEW, max_object_tokens=1)
    assert new_tokens(found, right) == new_tokens(model.generate(**by_hand, **NEW), by_hand)


@pytest.mark.parametrize("where", ["config", "call"])
def test_a_missing_mask_is_told_from_the_padding(where):
    model, inputs = make_model(text_config={**TEXT, "pad_token_id": 60 if where == "config" else None}), batch()
    if where == "config":
        model.generation_config.pad_token_id = 60
    options = {"max_visual_tokens": 1, "eos_token_id": 98, **({"pad_token_id": 60} if where == "call" else {})}
    expected = model.generate(**inputs, **NEW, **options)
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    assert torch.equal(model.generate(**bare, **NEW, **options), expected)


def test_no_padding_id_at_all(model):
    model = make_model(text_config={**TEXT, "pad_token_id": None})
    inputs = batch()
    model.generation_config.pad_token_id = None
    expected = make_model().generate(**inputs, **NEW, max_visual_tokens=3)
    assert new_tokens(model.generate(**inputs, **NEW, max_visual_tokens=3), inputs) == new_tokens(expected, inputs)


def test_assisted_decoding(model):
    inputs = single()
    expected = model.generate(**inputs, **NEW, max_object_tokens=1)
    assistant = copy.deepcopy(model)
    assistant.generation_config.max_object_tokens = 3  # its own setting is no business of the main model's prompt
    assert torch.equal(model.generate(**inputs, **NEW, max_object_tokens=1, assistant_model=assistant), expected)


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts = []

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        pass


def test_streamers_get_every_new_token(model):
    inputs, streamer = single(), Recorder()
    output = model.generate(**inputs, **NEW, max_object_tokens=0, streamer=streamer)
    assert [token for put in streamer.puts[1:] for token in put] == new_tokens(output, inputs)[0]


@pytest.mark.parametrize("where", ["call", "passed config", "own config"])
def test_length_limits_count_the_full_prompt(where):
    model, inputs = make_model(), single()
    limits = {"max_length": inputs["input_ids"].shape[1] + 3, "min_length": inputs["input_ids"].shape[1] + 2}
    if where == "call":
        output = model.generate(**inputs, **limits, do_sample=False, max_object_tokens=0)
    elif where == "passed config":
        config = GenerationConfig(**limits, do_sample=False, max_object_tokens=0)
        output = model.generate(**inputs, generation_config=config)
        assert config.max_length == limits["max_length"]
    else:
        model.generation_config = GenerationConfig(**limits, do_sample=False)
        output = model.generate(**inputs, max_object_tokens=0)
    assert output.shape[1] == limits["max_length"]


def test_min_length_counts_the_full_prompt():
    model, inputs = make_model(), single()
    length = inputs["input_ids"].shape[1]
    first = int(model.generate(**inputs, **NEW, max_object_tokens=0)[0, length])
    limits = {"min_length": length + 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": first}
    output = model.generate(**inputs, **limits, pad_token_id=60, max_object_tokens=0)
    assert first not in output[0, length : length + 3].tolist()  # the end is put off until three tokens are there
    without = model.generate(**inputs, **{**limits, "min_length": 0}, pad_token_id=60, max_object_tokens=0)
    assert without.shape[1] == length + 1


def test_a_limit_of_the_models_config_brings_no_warning(monkeypatch):
    from transformers.generation import utils

    model, inputs, messages = make_model(), single(), []
    monkeypatch.setattr(type(utils.logger), "warning_once", lambda self, m, *a: messages.append(m), raising=False)
    model.generation_config.max_length = 500
    model.generate(**inputs, generation_config=GenerationConfig(**NEW), max_object_tokens=0)
    assert not [message for message in messages if "deprecated" in message]


def test_settings_set_after_loading_are_saved_too(tmp_path):
    make_model().save_pretrained(tmp_path / "a")
    (tmp_path / "a/generation_config.json").unlink()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    model.generation_config.max_object_tokens = 1
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    assert again.generation_config.max_object_tokens == 1


def test_dict_outputs_lose_the_cache_only_when_something_was_dropped(model):
    inputs = single()
    options = {**NEW, "return_dict_in_generate": True, "output_scores": True}
    dropped = model.generate(**inputs, **options, max_object_tokens=1)
    assert dropped.past_key_values is None
    assert len(dropped.scores) == 5
    assert model.compute_transition_scores(dropped.sequences, dropped.scores).shape == (1, 5)
    kept = model.generate(**inputs, **options, max_object_tokens=NUM_OBJECTS)
    assert kept.past_key_values is not None


def test_settings_are_saved_and_the_call_replaces_all_of_them(tmp_path):
    model, inputs = make_model(), single()
    model.generation_config.max_object_tokens = 1
    model.generation_config.patch_grid_size = 2
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again.generation_config.eos_token_id = None
    for knobs, length in [({}, 1 + 4 + 1), ({"max_object_tokens": 2}, 1 + 9 + 2), ({"max_visual_tokens": 3}, 3)]:
        with prefill_lengths(again) as seen:
            again.generate(**inputs, **NEW, **knobs)
        assert seen[0] == 3 + length
    with prefill_lengths(again) as seen:
        again.generate(**inputs, generation_config=GenerationConfig(**NEW, max_object_tokens=0))
    assert seen[0] == 3 + 1 + 9


def test_text_only(model):
    inputs = prompt([[5, 6, 7]])
    assert model.generate(**inputs, **NEW, max_object_tokens=0).shape == (1, 8)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("value", [-1, True, 1.0, "2"])
@pytest.mark.parametrize("knob", ["max_object_tokens", "patch_grid_size", "max_visual_tokens"])
def test_bad_knobs(model, knob, value):
    with pytest.raises(ValueError, match=f"`{knob}` must be an integer"):
        model.generate(**single(), **NEW, **{knob: value})


def test_a_budget_beside_a_count(model):
    with pytest.raises(ValueError, match="`max_visual_tokens`=9 is a budget .* cannot be combined"):
        model.generate(**single(), **NEW, max_visual_tokens=9, max_object_tokens=1)


def test_limits_and_masks_that_do_not_fit_the_prompt(model):
    inputs = single()
    with pytest.raises(ValueError, match="`max_length`=15 leaves no room .* of 17 tokens"):
        model.generate(**inputs, max_length=15, max_object_tokens=0)
    inputs["attention_mask"] = torch.ones(1, 1, 17, 17)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 17, 17\), expected \(1, 17\)"):
        model.generate(**inputs, **NEW, max_object_tokens=0)


def test_misspelled_arguments(model):
    with pytest.raises(ValueError, match="max_objekt_tokens"):
        model.generate(**single(), **NEW, max_objekt_tokens=1)


def test_a_drop_that_cannot_be_right_is_refused(model):
    inputs = single()
    with pytest.raises(ValueError, match="Cap in the processor's call to keep a cache"):
        model.generate(**inputs, **NEW, past_key_values=DynamicCache(config=model.config), max_object_tokens=1)
    cache = DynamicCache(config=model.config)
    model.generate(**inputs, **NEW, past_key_values=cache, max_object_tokens=NUM_OBJECTS)  # drops nothing
    follow_up = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="cannot be dropped"):
        model.generate(**follow_up, **NEW, past_key_values=cache, max_object_tokens=1)

    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        model.generate(inputs_embeds=embeds, **inputs, **NEW, max_object_tokens=1)
    assert model.generate(inputs_embeds=embeds, **inputs, **NEW, max_object_tokens=4).shape == (1, 5)
    with pytest.raises(ValueError, match="`inputs_embeds` alone"):
        model.generate(inputs_embeds=embeds, **NEW, max_object_tokens=1)
    with pytest.raises(ValueError, match="without `pixel_values`"):
        model.generate(**follow_up, object_counts=inputs["object_counts"], **NEW)


def test_projected_images_cannot_change_their_grid(model):
    inputs = single()
    images = {k: inputs.pop(k) for k in ("pixel_values", "object_embeds", "object_counts")}
    encoded = {"image": model.get_image_features(**images)}
    with pytest.raises(ValueError, match="already projected"):
        model.generate(**inputs, mm_encoder_outputs=encoded, **NEW, patch_grid_size=2)
    coarse = {"image": model.get_image_features(**images, patch_grid_size=1)}
    with pytest.raises(ValueError, match="cannot be told apart"):
        model.generate(**inputs, mm_encoder_outputs=coarse, **NEW, max_object_tokens=1)


def test_objects_do_not_pass_for_patches_that_are_missing():
    model, inputs = make_model(patch_grid_size=2), single(fixed=2)  # 1 + 1 + 4 tokens, more than the usual 1 + 4
    images = {k: inputs.pop(k) for k in ("pixel_values", "object_embeds", "object_counts")}
    coarse = {"image": model.get_image_features(**images, patch_grid_size=1)}
    assert len(coarse["image"].pooler_output[0]) == 6
    with pytest.raises(ValueError, match="cannot be told apart"):
        model.generate(**inputs, mm_encoder_outputs=coarse, **NEW, max_object_tokens=0)


def test_lost_rows_are_named(model):
    inputs = batch()
    inputs["object_counts"] = inputs["object_counts"][:2]
    with pytest.raises(ValueError, match="batch_size=1"):
        model.generate(**inputs, **NEW, max_object_tokens=1)


def test_continuous_batching_refuses_images(model):
    with pytest.raises(ValueError, match="paged"):
        model.generate(**single(), **NEW, cache_implementation="paged")
    with pytest.raises(ValueError, match="generate_batch"):
        model.generate_batch(inputs=[[5, IMAGE, 6]])


def test_published_budgets_have_their_published_prefill():
    """1 + 36 + 20 tokens from a 24 x 24 grid, as LLaVA-1.5's tower has it."""
    vision = {**VISION, "image_size": 48, "patch_size": 2}
    model = make_model(vision_config=vision, patch_grid_size=6, max_object_tokens=20)
    inputs = {
        **prompt([[5, (57,), 7, 8]]),
        "pixel_values": torch.randn(1, 3, 48, 48),
        "object_embeds": torch.randn(1, 20, 32),
        "object_counts": torch.tensor([20]),
    }
    knobs = [{"max_visual_tokens": n} for n in (57, 42, 29, 15)] + [{"max_object_tokens": n} for n in (20, 5, 0)]
    lengths = []
    for knob in knobs:
        with prefill_lengths(model) as seen:
            model.generate(**inputs, **NEW, **knob)
        lengths.append(seen[0] - 3)  # 3 text tokens
    assert lengths == [57, 42, 29, 15, 57, 42, 37]
