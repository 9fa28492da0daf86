import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from plain_mask_inversion import dice_loss, invert_masks_plainly, normalised_map
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mask_llava_hf.modeling import mask_inversion, mask_inversion_block
from mask_llava_hf.modeling.mask_inversion import MaskInversionOutput, MaskInversionSettings, invert_masks


GOLDENS = Path(__file__).parents[1] / "goldens" / "mask_inversion"
EXACT = MaskInversionSettings(compute_dtype="float32")


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_same(actual: MaskInversionOutput, expected: MaskInversionOutput):
    torch.testing.assert_close(actual.embeddings, expected.embeddings, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.dice, expected.dice, rtol=1e-5, atol=1e-6)


class Golden:
    def __init__(self, name: str):
        folder = GOLDENS / name
        self.tower = CLIPVisionModelWithProjection.from_pretrained(folder, attn_implementation="eager").eval()
        self.projection = None if name == "case_w" else self.tower.visual_projection
        hyper_parameters = json.loads((folder / "case.json").read_text())["hyper_parameters"]
        self.settings = MaskInversionSettings(
            **{key: hyper_parameters[key] for key in ("iterations", "lr", "alpha", "weight_decay")},
            compute_dtype="float32",
            reduction="mean",
        )
        self.arrays = load_file(folder / "case.safetensors")
        self.masks = self.arrays["masks"][None].bool()
        with torch.no_grad():
            states = self.tower(self.arrays["pixel_values"], output_hidden_states=True).hidden_states
        self.hidden_states = states[-2]

    def invert(self, **settings):
        return invert_masks(
            self.tower,
            self.hidden_states,
            self.masks,
            replace(self.settings, **settings),
            self.projection,
            return_explanation_maps=True,
            return_history=True,
        )


@pytest.fixture(scope="module", params=["case_a", "case_b", "case_d", "case_w"])
def golden(request):
    return Golden(request.param)


def prepare(tower, hidden_states, masks, projection=None, dtype=torch.float32, chunk_size=5):
    """One image (T, C) and its targets, as `invert_masks` makes them."""
    device = hidden_states.device
    block = mask_inversion_block.read_last_block(getattr(tower, "vision_model", tower), projection, device, dtype)
    workspace = mask_inversion_block.Workspace(block, len(hidden_states), len(masks), chunk_size)
    image = mask_inversion_block.LinearisedImage(block, hidden_states, workspace)
    side = int((len(hidden_states) - 1) ** 0.5)
    frame = mask_inversion._MapFrame(side, tower.config.patch_size, tuple(masks.shape[1:]), device)
    return image, mask_inversion._MaskTargets(frame, masks)


def test_each_golden_step_from_the_stored_embeddings(golden):
    """Teacher-forced: each iteration starts from the recorded embeddings, so no error accumulates."""
    arrays = golden.arrays
    with torch.no_grad():
        image, targets = prepare(golden.tower, golden.hidden_states[0], golden.masks[0], golden.projection)
        torch.testing.assert_close(image.image_embedding, arrays["image_embed"][0], rtol=0, atol=1e-5)
        steps = [mask_inversion._explain(image, targets, embeddings) for embeddings in arrays["embeddings"][:-1]]
    relevance, dice, grads = (torch.stack(parts) for parts in zip(*steps, strict=True))
    assert relative_error(relevance, arrays["relevance"]) < 1e-5
    assert relative_error(grads / len(golden.masks[0]), arrays["grads"]) < 1e-5
    torch.testing.assert_close(dice, arrays["loss_dice_per_mask"], rtol=0, atol=5e-6)
    torch.testing.assert_close(dice.mean(dim=1), arrays["loss_total"], rtol=0, atol=5e-6)


def test_golden_steps_of_the_optimiser(golden):
    arrays = golden.arrays
    embeddings = arrays["embeddings"][0].clone()
    optimizer = mask_inversion._AdamW(embeddings, golden.settings.lr, golden.settings.weight_decay)
    for grads, expected in zip(arrays["grads"], arrays["embeddings"][1:], strict=True):
        optimizer.step(embeddings, grads)
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


def test_golden_maps_of_the_stored_relevance(golden):
    arrays = golden.arrays
    side, patch_size = arrays["relevance"].shape[-1], golden.tower.config.patch_size
    frame = mask_inversion._MapFrame(side, patch_size, tuple(golden.masks.shape[2:]), torch.device("cpu"))
    for step, name in ((0, "expl_map_first"), (-1, "expl_map_final")):
        maps = frame.explanation_maps(arrays["relevance"][step])
        torch.testing.assert_close(maps, arrays[name], rtol=0, atol=5e-5)


def test_golden_end_to_end(golden):
    output, arrays = golden.invert(), golden.arrays
    final = output.embeddings[0]
    torch.testing.assert_close(output.embeddings_history[0], arrays["embeddings"], rtol=0, atol=2e-4)
    torch.testing.assert_close(final, arrays["embeddings"][-1], rtol=0, atol=2e-4)
    assert torch.cosine_similarity(final.double(), arrays["embeddings"][-1].double(), dim=-1).min() > 0.999999
    torch.testing.assert_close(output.dice[0], arrays["loss_dice_per_mask"][-1], rtol=0, atol=5e-6)
    torch.testing.assert_close(output.dice_history[0], arrays["loss_dice_per_mask"], rtol=0, atol=5e-6)
    torch.testing.assert_close(output.explanation_maps[0], arrays["expl_map_final"], rtol=0, atol=5e-5)
    assert relative_error(output.relevance[0], arrays["relevance"]) < 1e-5
    assert relative_error(output.grads[0], arrays["grads"]) < 1e-5


def test_golden_mean_split_bfloat16(golden):
    exact, rounded = golden.invert(), golden.invert(compute_dtype="bfloat16")
    torch.testing.assert_close(rounded.dice, exact.dice, rtol=0, atol=6e-3)
    assert not torch.equal(rounded.embeddings, exact.embeddings)


def make_tower(hidden_act="quick_gelu", with_projection=False, seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 24}
    config = CLIPVisionConfig(
        **{**sizes, "num_hidden_layers": 2, "image_size": 40, "patch_size": 8, "hidden_act": hidden_act, **kwargs}
    )
    tower = (CLIPVisionModelWithProjection if with_projection else CLIPVisionModel)(config).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
            elif parameter.ndim == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    return tower


@pytest.fixture(scope="module")
def tower():
    return make_tower()


def make_hidden_states(num_images=2, num_tokens=26, width=32, seed=1):
    return torch.randn(num_images, num_tokens, width, generator=torch.Generator().manual_seed(seed))


def make_masks(height=40, width=40, num_images=2):
    """(num_images, 3, height, width) bool: rectangles, different in each image."""
    masks = torch.zeros(num_images, 3, height, width, dtype=torch.bool)
    for index in range(num_images):
        masks[index, 0, : height // 2, index : width // 2] = True
        masks[index, 1, height // 3 :, width // 2 - index :] = True
        masks[index, 2, height // 4 : height // 2 + index, width // 4 : width // 2] = True
    return masks


@pytest.fixture(scope="module")
def hidden_states():
    return make_hidden_states()


@pytest.fixture(scope="module")
def masks():
    return make_masks()


@pytest.fixture(scope="module")
def expected(tower, hidden_states, masks):
    return invert_masks(tower, hidden_states, masks, EXACT)


@pytest.mark.parametrize(
    ("tower_kwargs", "settings", "mask_hw"),
    [
        ({}, {}, (40, 40)),
        ({"hidden_act": "gelu"}, {"reduction": "mean"}, (40, 40)),
        ({"hidden_act": "gelu_pytorch_tanh"}, {}, (40, 40)),
        ({"with_projection": True}, {"alpha": 0.7}, (53, 31)),
        ({"hidden_act": "gelu", "with_projection": True}, {"weight_decay": 0.3, "lr": 0.05}, (16, 90)),
        ({"patch_size": 5, "image_size": 25}, {"alpha": 0.3, "weight_decay": 0.1, "reduction": "mean"}, (25, 25)),
        ({"patch_size": 1, "image_size": 5}, {}, (5, 5)),
    ],
)
def test_closed_form_matches_the_plain_autograd_twin(tower_kwargs, settings, mask_hw):
    """Maps and losses within float32 of a float64 twin, step by step and to the end, for each of two images."""
    tower = make_tower(**tower_kwargs)
    projection = tower.visual_projection if tower_kwargs.get("with_projection") else None
    hidden_states, masks = make_hidden_states(), make_masks(*mask_hw).float()
    masks[:, 1] *= torch.linspace(0.1, 0.9, mask_hw[1])  # a soft mask
    settings = {"iterations": 4, "lr": 0.1, **settings}
    output = invert_masks(
        tower,
        hidden_states,
        masks,
        MaskInversionSettings(compute_dtype="float32", chunk_size=2, **settings),
        projection,
        return_explanation_maps=True,
        return_history=True,
    )
    for index in range(len(masks)):
        plain = invert_masks_plainly(
            tower,
            hidden_states[index],
            masks[index],
            visual_projection=None if projection is None else projection.weight,
            dtype=torch.float64,
            **settings,
        )
        plain = type(plain)(*(array.float() for array in plain))
        assert relative_error(output.relevance[index], plain.relevance) < 1e-5
        assert relative_error(output.grads[index], plain.grads) < 1e-5
        torch.testing.assert_close(output.dice_history[index], plain.dice, rtol=0, atol=5e-6)
        torch.testing.assert_close(output.dice[index], plain.dice[-1], rtol=0, atol=5e-6)
        torch.testing.assert_close(output.embeddings_history[index], plain.embeddings, rtol=0, atol=2e-4)
        torch.testing.assert_close(output.explanation_maps[index], plain.explanation_maps, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("grid_size", "patch_size", "mask_hw"), [(6, 14, (84, 84)), (5, 7, (20, 61)), (3, 2, (9, 6))])
def test_loss_at_patch_resolution_is_the_loss_at_full_resolution(grid_size, patch_size, mask_hw, monkeypatch):
    monkeypatch.setattr(mask_inversion, "_MASKS_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    relevance = torch.rand(4, grid_size, grid_size, generator=generator, dtype=torch.float64).float()
    masks = (torch.rand(4, *mask_hw, generator=generator) > 0.6).float()
    frame = mask_inversion._MapFrame(grid_size, patch_size, mask_hw, torch.device("cpu"))
    dice, gradients = mask_inversion._MaskTargets(frame, masks).dice(relevance, slice(0, 4))
    for index in range(4):
        leaf = relevance[index].double().requires_grad_()
        loss = dice_loss(normalised_map(leaf, patch_size, mask_hw), masks[index].double())
        loss.backward()
        torch.testing.assert_close(dice[index], loss.detach().float(), rtol=0, atol=2e-6)
        assert relative_error(gradients[index], leaf.grad.float()) < 1e-5


@pytest.mark.parametrize("group_size", [1, 2, 20])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 20])
def test_chunks_and_groups_do_not_change_the_result(
    tower, hidden_states, masks, expected, chunk_size, group_size, monkeypatch
):
    monkeypatch.setattr(mask_inversion_block, "_CACHE_BYTES", group_size * 4 * 4 * 26 * 25)
    assert_same(invert_masks(tower, hidden_states, masks, replace(EXACT, chunk_size=chunk_size)), expected)
    exact = invert_masks(
        tower, hidden_states, masks, replace(EXACT, chunk_size=chunk_size, iterations=1), return_history=True
    )
    settings = MaskInversionSettings(compute_dtype="bfloat16", chunk_size=chunk_size, iterations=1)
    rounded = invert_masks(tower, hidden_states, masks, settings, return_history=True)
    assert relative_error(rounded.grads, exact.grads) < 5e-3


VIT_L = {"num_tokens": 577, "width": 1024, "mlp_width": 4096, "num_heads": 16}
SMALL = {"num_tokens": 145, "width": 128, "mlp_width": 384, "num_heads": 4}


@pytest.mark.parametrize(
    ("sizes", "dtype", "expected"),
    [
        (VIT_L, torch.float32, (5, 1)),
        (VIT_L, torch.bfloat16, (7, 1)),
        (SMALL, torch.float32, (215, 8)),
        ({**VIT_L, "num_tokens": 10001}, torch.float32, (1, 1)),
    ],
)
def test_masks_at_once_on_a_cpu(sizes, dtype, expected):
    assert mask_inversion_block.masks_at_once(torch.device("cpu"), dtype, **sizes) == expected
    assert mask_inversion_block.masks_at_once(torch.device("cpu"), dtype, **sizes, chunk_size=1) == (1, 1)


@pytest.mark.parametrize(
    ("device", "free", "unused", "dtype", "expected"),
    [
        ("mps", 0, 0, torch.float32, 28),
        ("cuda", 8e9, 0, torch.float32, 28),
        ("cuda", 8e9, 0, torch.bfloat16, 20),
        ("cuda", 1e9, 1e9, torch.float32, 14),
        ("cuda", 1e6, 0, torch.float32, 1),
    ],
)
def test_masks_at_once_on_an_accelerator(device, free, unused, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10**9 + int(unused))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    assert mask_inversion_block.masks_at_once(torch.device(device), dtype, **VIT_L) == (expected, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_masks", "chunk_size"), [(3, None), (20, None), (20, 5)])
def test_workspace_takes_the_memory_it_is_given(tower, num_masks, chunk_size, dtype, monkeypatch):
    monkeypatch.setattr(mask_inversion_block, "_CPU_BYTES", 60_000)
    monkeypatch.setattr(mask_inversion_block, "_CACHE_BYTES", 30_000)
    block = mask_inversion_block.read_last_block(tower, None, torch.device("cpu"), dtype)
    workspace = mask_inversion_block.Workspace(block, 26, num_masks, chunk_size)
    sizes = {id(buffer): buffer.nbytes for buffer in vars(workspace).values() if isinstance(buffer, torch.Tensor)}
    assert workspace.chunk_size == (chunk_size or min(num_masks, 7 if dtype == torch.bfloat16 else 6))
    assert workspace.group_size == 2 and workspace.attention.nbytes <= 30_000
    if chunk_size is None:
        of_groups = {id(buffer) for buffer in (workspace.scratch, workspace.attention, workspace.positive)}
        assert sum(size for buffer, size in sizes.items() if buffer not in of_groups) <= 60_000


class HostWaits(TorchDispatchMode):
    """Records the operations at which a host waits for an accelerator, or would, if the tensors were on one."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        waits = name in self.NAMES or (name in ("_to_copy", "copy_") and len({one.device for one in tensors}) > 1)
        if name in ("index", "index_put", "index_put_"):  # by true and false: looks for what is true
            waits = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        if waits:
            self.found.append(name)
        return result


def test_host_waits_are_seen():
    values = torch.arange(3.0)
    with HostWaits() as waits:
        values[1].item(), bool(values[1]), values[values > 1]
        values[values > 1] = values[:1]
        values[torch.tensor([1, 0])] = torch.where(values > 1, 0.0, values)[:2]
    assert waits.found == ["_local_scalar_dense", "_local_scalar_dense", "index", "index_put_"]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_iterations_and_images_never_wait_for_the_device(tower, hidden_states, masks, compute_dtype):
    def waits(iterations, num_images, chunk_size):
        settings = MaskInversionSettings(
            iterations=iterations, compute_dtype=compute_dtype, chunk_size=chunk_size, alpha=0.1, weight_decay=0.1
        )
        asked = {"return_explanation_maps": True, "return_history": True}
        with HostWaits() as waits:
            invert_masks(tower, hidden_states[:num_images], masks[:num_images].float(), settings, **asked)
        return waits.found

    once = waits(1, 1, None)
    assert "nonzero" in once
    assert waits(7, 1, None) == waits(7, 2, None) == waits(7, 2, 1) == once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_iterations_on_a_device_without_numbers(tower, dtype):
    """Tensors that say they are on a CUDA device and hold nothing: what asks for their values cannot go on."""
    block = mask_inversion_block.read_last_block(tower, None, torch.device("cpu"), dtype)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        device = torch.empty(0).device
        parts = {field.name: getattr(block, field.name) for field in fields(block)}
        parts = tree_map_only(torch.Tensor, lambda one: torch.empty(one.shape, dtype=one.dtype), parts)
        block = replace(block, **parts)
        workspace = mask_inversion_block.Workspace(block, 26, 3, chunk_size=2)
        image = mask_inversion_block.LinearisedImage(block, torch.empty(26, 32), workspace)
        frame = mask_inversion._MapFrame(5, tower.config.patch_size, (40, 40), device)
        targets = mask_inversion._MaskTargets(frame, torch.empty(3, 40, 40))
        start = image.image_embedding
        embeddings = start.repeat(3, 1)
        optimizer = mask_inversion._AdamW(embeddings, 0.1, 0.1)
        with HostWaits() as waits:
            for step in range(2):
                relevance, dice, grads = mask_inversion._explain(image, targets, embeddings, alike=step == 0)
                grads -= mask_inversion._cosine_gradient(embeddings, start)
                optimizer.step(embeddings, grads)
        assert workspace.group_size == 2 and not waits.found
        assert all(values.device == device for values in (relevance, dice, grads, embeddings))


def test_images_and_masks_do_not_touch_each_other(tower, hidden_states, masks, expected):
    for index in range(len(masks)):
        alone = invert_masks(tower, hidden_states[index : index + 1], masks[index : index + 1], EXACT)
        torch.testing.assert_close(alone.embeddings[0], expected.embeddings[index], rtol=1e-5, atol=1e-5)
        first = invert_masks(tower, hidden_states[index : index + 1], masks[index : index + 1, :1], EXACT)
        torch.testing.assert_close(first.embeddings[0], expected.embeddings[index, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty_masks_are_skipped_and_do_not_touch_their_neighbours(tower, hidden_states, masks, reduction):
    settings = replace(EXACT, reduction=reduction)
    expected = invert_masks(tower, hidden_states, masks, settings)
    empty = torch.zeros_like(masks[:, :1])
    padded = torch.cat([masks[:, :1], empty, masks[:, 1:], empty], dim=1)
    padded[1] = torch.cat([masks[1], empty[1], empty[1]])
    output = invert_masks(tower, hidden_states, padded, settings, return_explanation_maps=True, return_history=True)
    kept = [[0, 2, 3], [0, 1, 2]]
    for index, slots in enumerate(kept):
        torch.testing.assert_close(output.embeddings[index, slots], expected.embeddings[index], rtol=1e-5, atol=1e-5)
        empty_slots = [slot for slot in range(5) if slot not in slots]
        for values in (output.embeddings, output.explanation_maps):
            assert not values[index, empty_slots].any()
        for values in (output.embeddings_history, output.grads, output.relevance):
            assert not values[index, :, empty_slots].any()
        assert (output.dice[index, empty_slots] == 1).all() and (output.dice_history[index, :, empty_slots] == 1).all()


@pytest.mark.parametrize(("num_images", "num_masks"), [(2, 0), (0, 3), (0, 0), (2, 3)])
def test_nothing_to_invert(tower, num_images, num_masks):
    hidden_states, masks = torch.randn(num_images, 26, 32), torch.zeros(num_images, num_masks, 40, 40)
    output = invert_masks(
        tower, hidden_states, masks, EXACT, torch.zeros(24, 32), return_explanation_maps=True, return_history=True
    )
    assert output.embeddings.shape == (num_images, num_masks, 24) and not output.embeddings.any()
    assert output.dice.shape == (num_images, num_masks) and (output.dice == 1).all()
    assert output.explanation_maps.shape == (num_images, num_masks, 40, 40)
    assert output.embeddings_history.shape == (num_images, 11, num_masks, 24)
    assert output.relevance.shape == (num_images, 10, num_masks, 5, 5)
    assert output.grads.shape == (num_images, 10, num_masks, 24)
    assert output.dice_history.shape == (num_images, 10, num_masks)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_map_stays_finite(tower, masks, value):
    """Tokens that are all alike have a map without contrast: 0 / 0 in the published code."""
    hidden_states = value * make_hidden_states(2, 1).expand(-1, 26, -1)
    output = invert_masks(tower, hidden_states, masks, EXACT, return_explanation_maps=True, return_history=True)
    for values in (output.embeddings, output.dice, output.explanation_maps, output.grads):
        assert values.isfinite().all()
    torch.testing.assert_close(output.embeddings_history[:, 0], output.embeddings)


def test_constant_map_does_not_poison_its_neighbours():
    relevance = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.ones(2, 8, 8)
    frame = mask_inversion._MapFrame(4, 2, (8, 8), torch.device("cpu"))
    targets = mask_inversion._MaskTargets(frame, masks)
    dice, gradients = targets.dice(relevance, slice(0, 2))
    for constant in (0.0, 0.3):
        relevance[1] = constant
        other_dice, other_gradients = targets.dice(relevance, slice(0, 2))
        torch.testing.assert_close(other_dice[0], dice[0])
        torch.testing.assert_close(other_gradients[0], gradients[0])
        assert not other_gradients[1].any() and other_dice[1].isfinite()
        assert not frame.explanation_maps(relevance)[1].any()


def test_result_is_a_constant_in_every_grad_mode(hidden_states, masks, expected):
    tower = make_tower()
    for parameter in tower.parameters():
        parameter.requires_grad_()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            inputs = hidden_states * 1.0
            if mode is torch.enable_grad:
                inputs.requires_grad_()
            output = invert_masks(tower, inputs, masks, EXACT, return_explanation_maps=True)
        assert torch.equal(output.embeddings, expected.embeddings) and torch.equal(output.dice, expected.dice)
        assert not output.embeddings.requires_grad and not output.embeddings.is_inference()
    assert all(parameter.grad is None for parameter in tower.parameters())
    # Stored embeddings enter training steps, whatever mode they were made in.
    weight = torch.ones(32, requires_grad=True)
    (output.embeddings * weight).sum().backward()


def test_autocast_changes_nothing(tower, hidden_states, masks, expected):
    with torch.autocast("cpu", torch.bfloat16):
        output = invert_masks(tower, hidden_states, masks, EXACT)
    assert torch.equal(output.embeddings, expected.embeddings)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_masks_of_any_dtype(tower, hidden_states, masks, expected, kind):
    assert torch.equal(invert_masks(tower, hidden_states, masks.to(kind), EXACT).embeddings, expected.embeddings)


@pytest.mark.parametrize("with_projection", [False, True])
def test_offloaded_tower(hidden_states, masks, with_projection):
    tower = make_tower(with_projection=with_projection)
    projection = tower.visual_projection if with_projection else None
    expected = invert_masks(tower, hidden_states, masks, EXACT, projection)
    cpu_offload(tower, execution_device=torch.device("cpu"))
    assert next(tower.parameters()).is_meta
    output = invert_masks(tower, hidden_states, masks, EXACT, projection)
    assert torch.equal(output.embeddings, expected.embeddings)
    assert next(tower.parameters()).is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tower_computes_in_float32(hidden_states, masks, dtype):
    tower, same_in_float32 = make_tower().to(dtype), make_tower().to(dtype).float()
    output = invert_masks(tower, hidden_states.to(dtype), masks, EXACT)
    expected = invert_masks(same_in_float32, hidden_states.to(dtype).float(), masks, EXACT)
    assert output.embeddings.dtype == torch.float32
    assert torch.equal(output.embeddings, expected.embeddings)


def test_auto_takes_bfloat16_for_16_bit_towers_where_the_device_has_it(tower, hidden_states, masks, monkeypatch):
    half = make_tower().bfloat16()
    auto = MaskInversionSettings()
    by_name = {name: MaskInversionSettings(compute_dtype=name) for name in ("float32", "bfloat16")}
    for has_bfloat16, model, same in ((True, half, "bfloat16"), (False, half, "float32"), (True, tower, "float32")):
        monkeypatch.setattr(mask_inversion, "_has_bfloat16", lambda device, answer=has_bfloat16: answer)
        output = invert_masks(model, hidden_states, masks, auto)
        assert torch.equal(output.embeddings, invert_masks(model, hidden_states, masks, by_name[same]).embeddings)


def test_mean_split_bfloat16_at_the_size_of_vit_l():
    """Rounding averages out over heads, queries and channels, so its size is a statement about a full-size block."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    tower = make_tower(num_hidden_layers=1, image_size=336, patch_size=14, **sizes)
    for name, parameter in tower.encoder.layers[-1].named_parameters():
        if parameter.ndim == 2:  # the spread that CLIP's initialisation gives to the last of 24 layers
            depth = 1.0 if name in ("self_attn.out_proj.weight", "mlp.fc1.weight") else 48**-0.5
            nn.init.normal_(parameter, std=depth * (2048 if name == "mlp.fc1.weight" else 1024) ** -0.5)
    hidden_states, masks = make_hidden_states(1, 577, 1024), make_masks(336, 336, num_images=1)
    settings = MaskInversionSettings(compute_dtype="float32", iterations=3)
    exact = invert_masks(tower, hidden_states, masks, settings, return_history=True)
    settings = replace(settings, compute_dtype="bfloat16")
    rounded = invert_masks(tower, hidden_states, masks, settings, return_history=True)
    assert relative_error(rounded.relevance[:, 0], exact.relevance[:, 0]) < 1e-5
    torch.testing.assert_close(rounded.dice_history, exact.dice_history, rtol=0, atol=6e-3)
    assert rounded.embeddings.dtype == torch.float32


def test_regulariser_pulls_towards_the_image_embedding(tower, hidden_states, masks):
    def similarity(alpha):
        output = invert_masks(tower, hidden_states, masks, replace(EXACT, alpha=alpha), return_history=True)
        return torch.cosine_similarity(output.embeddings, output.embeddings_history[:, 0], dim=-1)

    assert (similarity(10.0) > similarity(0.0)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 0),
        ("iterations", True),
        ("iterations", 2.0),
        ("chunk_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", "0.1"),
        ("alpha", -1.0),
        ("weight_decay", float("inf")),
        ("compute_dtype", "float16"),
        ("reduction", "none"),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value!r}"):
        MaskInversionSettings(**{field: value})


def with_nan(hidden_states):
    hidden_states = hidden_states.clone()
    hidden_states[1, 3, :2] = float("nan")
    return hidden_states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states, masks: (with_nan(states), masks), "`hidden_states` holds 2 NaN"),
        (lambda states, masks: (states[..., :16], masks), r"\(2, 26, 16\), expected \(images, tokens, 32\)"),
        (lambda states, masks: (states[0], masks), r"\(26, 32\), expected \(images, tokens, 32\)"),
        (lambda states, masks: (states[:, 1:], masks), "25 tokens, expected 1 CLS"),
        (lambda states, masks: (states, masks[0]), r"`masks` has the shape \(3, 40, 40\)"),
        (lambda states, masks: (states, masks[:1]), "`masks` holds 1 images, `hidden_states` 2"),
        (lambda states, masks: (states, masks[..., :0]), "masks without pixels"),
        (lambda states, masks: (states, masks.byte() * 255), r"\(torch.uint8\) holds values from 0 to 255"),
        (lambda states, masks: (states, masks * 2.0 - 1), "values from -1.0 to 1.0"),
        (lambda states, masks: (states, masks / 0.0), "values from nan to nan"),
    ],
)
def test_tensors_are_checked(tower, hidden_states, masks, change, message):
    with pytest.raises(ValueError, match=message):
        invert_masks(tower, *change(hidden_states, masks), EXACT)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (torch.zeros(24, 16), r"shape \(24, 16\), expected \(embedding size, 32\)"),
        (nn.Linear(32, 24), "has a bias"),
    ],
)
def test_projection_is_checked(tower, hidden_states, masks, projection, message):
    with pytest.raises(ValueError, match=message):
        invert_masks(tower, hidden_states, masks, EXACT, projection)


class QuantisedLinear(nn.Linear):
    """Stands in for the quantised linear layers, which keep integers in `weight`."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.uint8), requires_grad=False)


def quantise(tower):
    tower.encoder.layers[-1].mlp.fc1 = QuantisedLinear(tower.encoder.layers[-1].mlp.fc1)
    return tower


def quantise_without_weight(tower):
    packed = nn.Module()
    packed.qweight = nn.Buffer(torch.zeros(4, dtype=torch.int32))
    tower.encoder.layers[-1].self_attn.v_proj = packed
    return tower


def wrap_with_lora(tower):
    return get_peft_model(tower, LoraConfig(target_modules=["fc1"]))


def shard(tower):
    tower.encoder.layers[-1].mlp.fc2.weight = nn.Parameter(torch.empty(0))
    return tower


def add_a_gate(tower):
    tower.encoder.layers[-1].gate = nn.Linear(1, 1)
    return tower


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantise, r"`mlp.fc1` is a .*QuantisedLinear whose weight is Parameter of torch.uint8.*int8_skip_modules"),
        (quantise_without_weight, r"`self_attn.v_proj` is a .*Module whose weight is missing.*quantisation"),
        (wrap_with_lora, r"`mlp.fc1` is wrapped by an adapter \(peft.*merge_and_unload"),
        (shard, r"`mlp.fc2.weight` has the shape \(0,\), expected \(32, 64\).*GatheredParameters"),
        (lambda tower: tower.to("meta"), "is on the meta device"),
        (add_a_gate, r"\(CLIPEncoderLayer\) has the parts \('gate', "),
    ],
)
@pytest.mark.parametrize("compute_dtype", ["auto", "float32"])
def test_last_block_that_cannot_be_read(hidden_states, masks, change, message, compute_dtype):
    with pytest.raises(ValueError, match=message):
        invert_masks(change(make_tower()), hidden_states, masks, MaskInversionSettings(compute_dtype=compute_dtype))


def test_lora_outside_the_last_block_is_fine(hidden_states, masks, expected):
    adapted = get_peft_model(make_tower(), LoraConfig(target_modules=["layers.0.mlp.fc1"]))
    assert torch.equal(invert_masks(adapted, hidden_states, masks, EXACT).embeddings, expected.embeddings)


def test_tower_without_cls(masks):
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=40, patch_size=8
    )
    with pytest.raises(ValueError, match="SiglipVisionModel has no `embeddings.class_embedding`"):
        invert_masks(SiglipVisionModel(config), torch.randn(2, 26, 32), masks, EXACT)


def test_unknown_activation(hidden_states, masks):
    with pytest.raises(ValueError, match="`hidden_act` is 'relu'"):
        invert_masks(make_tower("relu"), hidden_states, masks, EXACT)
