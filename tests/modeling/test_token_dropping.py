import pytest
import torch

from mask_llava_hf.modeling.token_dropping import PromptCut, placeholders_to_keep, resolve_knobs
from mask_llava_hf.modeling.token_layout import TokenLayout


FULL = TokenLayout(use_cls_token=True, patch_grid_size=3, max_object_tokens=4)


def test_the_tail_of_each_image_goes_and_text_stays():
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    keep = placeholders_to_keep(mask, [3, 2, 4], [1, 2, 3])
    assert keep.int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1, 1]]


def test_adjacent_images_are_told_apart_by_their_counts():
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert placeholders_to_keep(mask, [3, 2], [2, 1]).int().tolist() == [[1, 1, 0, 1, 0]]


def test_an_image_of_no_tokens_is_no_obstacle():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert placeholders_to_keep(mask, [0, 2, 0], [0, 1, 0]).int().tolist() == [[1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("before", [[3, 3], [4], [2, 3]])
def test_counts_that_do_not_come_out_even_are_refused(before):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[3, 2\] image placeholders per row"):
        placeholders_to_keep(mask, before, [1] * len(before))


def test_a_cut_pads_left_to_the_longest_row_and_no_further():
    ids = torch.tensor([[9, 9, 9, 1, 2], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]).bool()
    cut = PromptCut(keep, mask)
    assert cut.apply(ids, fill=7).tolist() == [[7, 1, 2], [1, 4, 5]]
    assert cut.apply(mask).tolist() == [[0, 1, 1], [1, 1, 1]]
    assert cut.apply(ids[..., None].expand(2, 5, 3).float(), fill=0).shape == (2, 3, 3)


def test_padding_on_the_right_and_inside_stays_where_it_is():
    ids = torch.tensor([[1, 2, 9, 3, 9], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    cut = PromptCut(torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(), mask)
    assert cut.apply(ids, fill=7).tolist() == [[7, 1, 9, 3, 9], [4, 5, 6, 7, 8]]
    assert cut.apply(mask).tolist() == [[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]


def test_a_row_of_padding_alone_becomes_padding():
    ids, mask = torch.tensor([[9, 9, 9], [1, 2, 3]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    cut = PromptCut(torch.ones(2, 3).bool(), mask)
    assert cut.apply(ids, fill=7).tolist() == [[7, 7, 7], [1, 2, 3]]


def test_any_knob_of_a_level_replaces_all_of_the_levels_after_it():
    model = {"max_object_tokens": 1, "patch_grid_size": 1}
    assert resolve_knobs(FULL, {}, model)[0] == TokenLayout(True, 1, 1)
    assert resolve_knobs(FULL, {"max_object_tokens": 2}, model) == (TokenLayout(True, 3, 2), 0)
    assert resolve_knobs(FULL, {"max_visual_tokens": 7}, model) == (TokenLayout(True, 1, 4), 0)
    assert resolve_knobs(FULL, {"max_object_tokens": None}, {"temperature": 1.0}) == (FULL, None)


def test_a_budget_beside_another_knob_raises_within_one_level_only():
    with pytest.raises(ValueError, match="cannot be combined"):
        resolve_knobs(FULL, {}, {"max_visual_tokens": 7, "max_object_tokens": 1})
    assert resolve_knobs(FULL, {"max_object_tokens": 1}, {"max_visual_tokens": 7})[1] == 0
