import numpy as np
import pytest

from mask_llava_hf.modeling.configuration_mask_llava import MaskLlavaConfig
from mask_llava_hf.modeling.token_layout import TokenLayout, check_integer


FULL = TokenLayout(use_cls_token=True, patch_grid_size=6, max_object_tokens=20)


@pytest.mark.parametrize(
    ("budget", "grid", "objects"),
    [(57, 6, 20), (42, 6, 5), (29, 4, 12), (15, 3, 5), (41, 4, 20), (7, 1, 5), (6, 0, 5), (2, 0, 1), (1, 0, 0)],
)
def test_budgets_have_the_published_compositions_and_never_exceed(budget, grid, objects):
    layout = FULL.reduced(max_visual_tokens=budget)
    assert (layout.use_cls_token, layout.patch_grid_size, layout.max_object_tokens) == (True, grid, objects)
    assert layout.max_tokens <= budget


def test_a_large_budget_keeps_everything():
    assert FULL.reduced(max_visual_tokens=10_000) == FULL


def test_budget_without_cls_takes_the_one_away():
    layout = TokenLayout(use_cls_token=False, patch_grid_size=6, max_object_tokens=20).reduced(max_visual_tokens=41)
    assert (layout.patch_grid_size, layout.max_object_tokens, layout.max_tokens) == (6, 5, 41)


def test_budget_of_a_full_grid_falls_back_to_the_coarser_grids():
    full = TokenLayout(use_cls_token=True, patch_grid_size=24, max_object_tokens=20)
    assert full.reduced(max_visual_tokens=582).patch_grid_size == 24
    assert full.reduced(max_visual_tokens=581).patch_grid_size == 6


@pytest.mark.parametrize("grid", [1, 2, 3, 6, 24])
@pytest.mark.parametrize("objects", [0, 1, 3, 5, 20])
@pytest.mark.parametrize("use_cls_token", [True, False])
def test_a_budget_for_everything_keeps_everything(grid, objects, use_cls_token):
    full = TokenLayout(use_cls_token, grid, objects)
    assert full.reduced(max_visual_tokens=full.max_tokens) == full
    for budget in range(1, full.max_tokens, 7):
        assert full.reduced(max_visual_tokens=budget).max_tokens <= budget


def test_counts():
    assert FULL.max_tokens == 57
    assert FULL.num_tokens(7) == 44
    assert FULL.num_tokens(99) == 57
    assert FULL.reduced(max_object_tokens=5).max_tokens == 42
    assert FULL.reduced(max_object_tokens=99) == FULL
    assert FULL.reduced(patch_grid_size=3).num_fixed_tokens == 10
    assert TokenLayout.from_config(MaskLlavaConfig()) == FULL


@pytest.mark.parametrize("value", [True, False, 2.0, -1, "5", float("nan")])
@pytest.mark.parametrize("knob", ["max_object_tokens", "patch_grid_size", "max_visual_tokens"])
def test_bad_values_name_argument_and_value(knob, value):
    with pytest.raises(ValueError, match=f"`{knob}` must be an integer.*{value!r}"):
        FULL.reduced(**{knob: value})


def test_zero_is_a_count_but_neither_a_grid_nor_a_budget():
    assert FULL.reduced(max_object_tokens=0).max_tokens == 37
    for knob in ("patch_grid_size", "max_visual_tokens"):
        with pytest.raises(ValueError, match=knob):
            FULL.reduced(**{knob: 0})


def test_a_grid_finer_than_the_models_raises():
    with pytest.raises(ValueError, match=r"`patch_grid_size` must be an integer in 1..6, got 7"):
        FULL.reduced(patch_grid_size=7)


def test_budget_excludes_the_other_knobs():
    with pytest.raises(ValueError, match="cannot be combined with `max_object_tokens`"):
        FULL.reduced(max_visual_tokens=42, max_object_tokens=5)
    with pytest.raises(ValueError, match="cannot be combined with `patch_grid_size`"):
        FULL.reduced(max_visual_tokens=42, patch_grid_size=3)


def test_numpy_integers_count():
    assert check_integer("n", np.int64(3), 0) == 3
