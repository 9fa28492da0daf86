import pytest
import torch

from mask_llava_hf.modeling import token_composition
from mask_llava_hf.modeling.token_composition import (
    compose_tokens,
    patch_statistics,
    pool_patches,
    scale_to_statistics,
)
from mask_llava_hf.modeling.token_layout import TokenLayout


def test_pooling_averages_blocks_row_major():
    grid = torch.arange(16.0).reshape(1, 16, 1)  # 4 x 4
    assert pool_patches(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_patches(grid, 1).flatten().tolist() == [7.5]
    assert pool_patches(grid, 4) is grid
    assert pool_patches(grid, 0).shape == (1, 0, 1)


def test_pooling_a_grid_that_does_not_divide_covers_every_patch():
    grid = torch.zeros(1, 25, 1)
    grid[0, 12] = 1  # the centre of 5 x 5 lies in all four bins of 2 x 2
    assert (pool_patches(grid, 2) > 0).all()


def test_scaling_by_hand():
    tokens = torch.tensor([[[1.0, 3.0]]])  # mean 2, variance 1
    expected = torch.tensor([[[-1.0, 1.0]]]) / (1 + 1e-6) ** 0.5 * 5 + 7
    torch.testing.assert_close(scale_to_statistics(tokens, 7.0, 5.0), expected)


def test_statistics_are_per_image_over_patches_and_channels():
    patches = torch.stack([torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.full((2, 2), 4.0)])
    mean, std = patch_statistics(patches)
    torch.testing.assert_close(mean.flatten(), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(std.flatten(), torch.tensor([3.5**0.5, 0.0]))


def test_streams_in_order_and_only_cls_and_objects_are_scaled():
    torch.manual_seed(0)
    features, objects = torch.randn(2, 17, 8) * 3 + 1, torch.randn(2, 5, 8) * 40
    layout = TokenLayout(use_cls_token=True, patch_grid_size=2, max_object_tokens=5)
    tokens = compose_tokens(features, objects, layout, "per_image")
    assert tokens.shape == (2, 1 + 4 + 5, 8)
    torch.testing.assert_close(tokens[:, 1:5], pool_patches(features[:, 1:], 2))
    mean, std = patch_statistics(features[:, 1:])
    torch.testing.assert_close(tokens[:, :1], scale_to_statistics(features[:, :1], mean, std))
    torch.testing.assert_close(tokens[:, 5:].mean(-1), mean.flatten()[:, None].expand(2, 5))
    torch.testing.assert_close(tokens[:, 5:].std(-1, correction=0), std.flatten()[:, None].expand(2, 5))

    plain = compose_tokens(features, objects, layout, "none")
    torch.testing.assert_close(plain[:, 5:], objects)
    torch.testing.assert_close(plain[:, :1], features[:, :1])
    fixed = compose_tokens(features, objects, layout, "fixed", (2.0, 3.0))
    torch.testing.assert_close(fixed[:, 5:].mean(-1), torch.full((2, 5), 2.0))
    torch.testing.assert_close(fixed[:, 5:].std(-1, correction=0), torch.full((2, 5), 3.0))


def test_moments_are_taken_only_where_something_is_scaled(monkeypatch):
    features = torch.randn(1, 5, 8)
    monkeypatch.setattr(token_composition, "patch_statistics", lambda patches: pytest.fail("nobody reads them"))
    layout = TokenLayout(use_cls_token=False, patch_grid_size=2, max_object_tokens=0)
    for objects in (None, torch.empty(1, 0, 8)):
        assert torch.equal(compose_tokens(features, objects, layout, "per_image"), features[:, 1:])


def test_fixed_scaling_without_numbers_is_refused():
    layout = TokenLayout(use_cls_token=True, patch_grid_size=1, max_object_tokens=0)
    with pytest.raises(ValueError, match="patch_statistics"):
        compose_tokens(torch.randn(1, 5, 8), None, layout, "fixed")


def test_statistics_do_not_mix_images():
    torch.manual_seed(0)
    features, objects = torch.randn(2, 17, 8), torch.randn(2, 3, 8)
    layout = TokenLayout(use_cls_token=True, patch_grid_size=4, max_object_tokens=3)
    together = compose_tokens(features, objects, layout, "per_image")
    alone = compose_tokens(features[1:], objects[1:], layout, "per_image")
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaling_runs_in_float32_also_under_autocast(dtype):
    torch.manual_seed(0)
    tokens = (torch.randn(1, 5, 64) * 1e-3 + 200).to(dtype)
    reference = scale_to_statistics(tokens, 0.1, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scale_to_statistics(tokens, 0.1, 0.5), reference)
    assert reference.dtype == torch.float32
    layout = TokenLayout(use_cls_token=True, patch_grid_size=1, max_object_tokens=5)
    assert compose_tokens(tokens, tokens.float(), layout, "none").dtype == dtype


def test_statistics_and_objects_take_no_gradient():
    features = torch.randn(1, 17, 8, requires_grad=True)
    objects = torch.randn(1, 2, 8, requires_grad=True)
    layout = TokenLayout(use_cls_token=False, patch_grid_size=1, max_object_tokens=2)
    compose_tokens(features, objects, layout, "per_image").sum().backward()
    assert objects.grad is None
    # only the pooled mean reaches the patches: the same gradient everywhere
    torch.testing.assert_close(features.grad[:, 1:], torch.full((1, 16, 8), 1 / 16))
