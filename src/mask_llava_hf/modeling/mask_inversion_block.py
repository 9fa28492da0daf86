# Copyright 2026 The mask-llava-hf authors. Licensed under the Apache License, Version 2.0.
"""The last block of a CLIP vision tower, differentiated by hand around one image.

MaskInversion (arXiv 2407.20034) needs two things from the tower: the LeGrad map (arXiv 2404.03214) of an embedding e,
that is the gradient of the similarity between e and the image with respect to the last block's attention weights, and
the gradient of a loss on that map with respect to e. For a fixed image the first is linear in e up to one clamp at
zero, and the second is its transpose. Both are written out here as matrix products, so nothing needs autograd.

Shapes: E embedding size, C tower width, M MLP width, H heads, d = C / H, T = 1 + g * g tokens with CLS at index 0,
K = T - 1 patch keys, n directions (unit embeddings) handled at once. Results are float32 where nothing else is told.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F


_BLOCK_LAYOUT = {
    "": ("layer_norm1", "layer_norm2", "mlp", "self_attn"),
    "self_attn": ("k_proj", "out_proj", "q_proj", "v_proj"),
    "mlp": ("activation_fn", "fc1", "fc2"),
}
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Memory of `Workspace` where nobody sets the masks handled at once: of the buffers that grow with them on a CPU ...
_CPU_BYTES = 64 * 10**6
# ... and of all on an accelerator, whose free memory may allow less.
_ACCELERATOR_BYTES = 10**9
_PART_OF_FREE_MEMORY = 0.25
# On a CPU, attention gradients that stay in the cache between the passes over them. Measured with 0.1 to 2 MB per mask
# (145 to 257 tokens, 4 to 12 heads): the time is flat from 1 to 4 MB, and 10 to 20 % worse for one small mask at a
# time, by the overhead of the calls, or for over 6 MB.
_CACHE_BYTES = 3 * 10**6


def _quick_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = (1.702 * x).sigmoid_()
    value = x * gate
    return value, torch.addcmul(gate, value, 1 - gate, value=1.702)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    cdf = (x / math.sqrt(2)).erf_().add_(1).mul_(0.5)
    density = (x * x).mul_(-0.5).exp_().div_(math.sqrt(2 * math.pi))
    return x * cdf, torch.addcmul(cdf, x, density)


def _tanh_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * scale * (1 + 3 * cubic * x**2)


# Each gives (value, slope).
_ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "quick_gelu": _quick_gelu,
    "gelu": _gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}


class _Linear(NamedTuple):
    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)


class _Norm(NamedTuple):
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float

    def standardise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x over its last dimension with mean 0 and variance 1, before gain and bias, and the divisor (..., 1)."""
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        sigma = torch.sqrt(variance + self.eps)
        return (x - mean) / sigma, sigma


@dataclass(frozen=True, eq=False)
class LastBlock:
    """The last block, the final LayerNorm and the projection of one tower, float32 on one device.

    Float32 weights that are already there are referred to, not copied.
    """

    num_heads: int
    activation: Callable[[Tensor], tuple[Tensor, Tensor]]
    attention_norm: _Norm
    query: _Linear
    key: _Linear
    value: _Linear
    output: _Linear
    mlp_norm: _Norm
    fc1: _Linear
    fc2: _Linear
    final_norm: _Norm
    projection: Tensor  # (E, C); the identity where the inversion happens in the tower's own width
    mlp_to_attention: Tensor  # (M, C) float32: gradient at the MLP's activations -> at the attention output, by head
    mlp_to_attention_product: Tensor  # the same matrix, in the dtype of the two large products


def find_vision_model(vision_tower: nn.Module) -> Any:
    """The module holding `embeddings`, `encoder.layers` and `post_layernorm`, checked to be built as CLIP's.

    Raises:
        ValueError: the tower has no CLS token, or its last block has other parts than CLIP's.
    """
    found = type(vision_tower).__name__
    model: Any = getattr(vision_tower, "vision_model", vision_tower)
    if not isinstance(getattr(getattr(model, "embeddings", None), "class_embedding", None), Tensor):
        raise ValueError(
            f"{found} has no `embeddings.class_embedding`, but MaskInversion needs a CLIP vision tower with a CLS "
            "token: every mask starts from the CLS embedding, and the first token is taken out of the explanation "
            "map. Without one, a patch would be dropped and the map shifted. Use a CLIP tower (CLIPVisionModel, "
            'CLIPVisionModelWithProjection), or `object_embedding="mask_pooling"`.'
        )
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or not hasattr(model, "post_layernorm"):
        raise ValueError(
            f"{found} has no `encoder.layers` or no `post_layernorm`; MaskInversion differentiates the last block of "
            "a CLIP vision tower (CLIPVisionModel, CLIPVisionModelWithProjection) by hand and knows no other layout."
        )
    for path, expected in _BLOCK_LAYOUT.items():
        children = tuple(sorted(name for name, _ in layers[-1].get_submodule(path).named_children()))
        if children != expected:
            raise ValueError(
                f"The last block of {found} ({type(layers[-1]).__name__}) has the parts {children} in `{path or '.'}` "
                f"where CLIP's has {expected}. The gradients are written out for CLIP's block and would be wrong "
                "here; use a CLIP vision tower (CLIPVisionModel, CLIPVisionModelWithProjection)."
            )
    return model


def _read(module: nn.Module, name: str, kind: type, shape: tuple[int, ...], device: torch.device) -> _Linear:
    """Weight and bias (zeros if there is none) of a plain linear or norm layer, float32 on `device`.

    Raises:
        ValueError: the layer is wrapped by an adapter, quantised, sharded, on the meta device, or of another shape.
    """
    # Every PEFT layer keeps the layer it wraps under this name; asking for it spares importing PEFT.
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise ValueError(
            f"`{name}` is wrapped by an adapter ({type(module).__module__}.{type(module).__name__}). MaskInversion "
            "reads the plain weights of the tower's last block, so the adapter would be left out silently. Merge it "
            "(`model.merge_and_unload()`), or keep the last vision block out of `target_modules`."
        )
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(weight).__name__ == "DTensor":
        raise ValueError(
            f"`{name}.weight` is a DTensor, sharded over several processes; MaskInversion needs the whole matrix in "
            "each. Keep the vision tower unsharded, or run the inversion in the processor with its own tower."
        )
    if (
        not isinstance(module, kind)
        or not isinstance(weight, Tensor)
        or type(weight) not in (Tensor, nn.Parameter)
        or weight.dtype not in _FLOAT_DTYPES
    ):
        what = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else "missing"
        raise ValueError(
            f"`{name}` is a {type(module).__module__}.{type(module).__name__} whose weight is {what}; expected a "
            f"plain {kind.__name__} with a floating-point weight. MaskInversion reads the numbers of the tower's last "
            "block, and a quantised weight does not hold them. Leave the vision tower out of quantisation "
            "(`llm_int8_skip_modules=mask_llava_hf.QUANTIZATION_SKIP_MODULES`), or run the inversion in the processor "
            "with its own tower."
        )
    if weight.is_meta:
        raise ValueError(
            f"`{name}.weight` is on the meta device without an accelerate hook that could load it, so it has no "
            "numbers. Load the checkpoint first, or keep the vision tower unsharded."
        )
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"`{name}.weight` has the shape {tuple(weight.shape)}, expected {shape}. An empty or flat weight is a "
            "parameter that FSDP or ZeRO-3 has sharded: gather it first (`summon_full_params`, "
            "`deepspeed.zero.GatheredParameters`), or keep the vision tower unsharded."
        )
    weight = weight.detach().to(device, torch.float32)
    bias = getattr(module, "bias", None)
    if bias is None:
        return _Linear(weight, weight.new_zeros(shape[0]))
    return _Linear(weight, bias.detach().to(device, torch.float32))


def projection_size(vision_model: Any, visual_projection: nn.Linear | Tensor | None) -> int:
    """Embedding size E; raises ValueError where `visual_projection` does not take the tower's width without a bias."""
    width = vision_model.config.hidden_size
    if visual_projection is None:
        return width
    if isinstance(visual_projection, Tensor):
        shape = tuple(visual_projection.shape)
    else:
        shape = (visual_projection.out_features, visual_projection.in_features)
        if getattr(visual_projection, "bias", None) is not None:
            raise ValueError(
                "`visual_projection` has a bias; CLIP's has none. Pass its weight alone, or another projection."
            )
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(
            f"`visual_projection` has a weight of shape {shape}, expected (embedding size, {width}): "
            f"the tower's width is {width}. Is the projection from another checkpoint?"
        )
    return shape[0]


def has_16_bit_weights(vision_model: Any) -> bool:
    weight = getattr(vision_model.encoder.layers[-1].mlp.fc1, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16)


def read_last_block(
    vision_model: Any,
    visual_projection: nn.Linear | Tensor | None,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> LastBlock:
    """Collect what the closed form needs from a tower that `find_vision_model` has returned.

    Offloaded weights are brought in through their accelerate hooks for the time of the call.

    Raises:
        ValueError: an unknown activation, or weights that cannot be read (see `_read`).
    """
    config, block = vision_model.config, vision_model.encoder.layers[-1]
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"The vision tower's `hidden_act` is {config.hidden_act!r}; MaskInversion has the derivatives of "
            f"{', '.join(_ACTIVATIONS)} only."
        )
    width, mlp_width = config.hidden_size, config.intermediate_size

    def linear(module: nn.Module, name: str, shape: tuple[int, int]) -> _Linear:
        return _read(module, name, nn.Linear, shape, device)

    def norm(module: Any, name: str) -> _Norm:
        return _Norm(*_read(module, name, nn.LayerNorm, (width,), device), eps=module.eps)

    with ExitStack() as stack:
        modules = [*block.modules(), *vision_model.post_layernorm.modules()]
        if isinstance(visual_projection, nn.Module):
            modules.extend(visual_projection.modules())
        for module in modules:
            stack.enter_context(align_module_device(module))

        attention, mlp = block.self_attn, block.mlp
        output = linear(attention.out_proj, "self_attn.out_proj", (width, width))
        fc1 = linear(mlp.fc1, "mlp.fc1", (mlp_width, width))
        mlp_norm = norm(block.layer_norm2, "layer_norm2")
        if visual_projection is None:
            projection = torch.eye(width, device=device)
        elif isinstance(visual_projection, Tensor):
            projection = visual_projection.detach().to(device, torch.float32)
        else:
            size = projection_size(vision_model, visual_projection)
            projection = linear(visual_projection, "visual_projection", (size, width)).weight

        gained = fc1.weight * mlp_norm.weight
        mlp_to_attention = (gained - gained.mean(dim=1, keepdim=True)) @ output.weight
        return LastBlock(
            num_heads=config.num_attention_heads,
            activation=_ACTIVATIONS[config.hidden_act],
            attention_norm=norm(block.layer_norm1, "layer_norm1"),
            query=linear(attention.q_proj, "self_attn.q_proj", (width, width)),
            key=linear(attention.k_proj, "self_attn.k_proj", (width, width)),
            value=linear(attention.v_proj, "self_attn.v_proj", (width, width)),
            output=output,
            mlp_norm=mlp_norm,
            fc1=fc1,
            fc2=linear(mlp.fc2, "mlp.fc2", (width, mlp_width)),
            final_norm=norm(vision_model.post_layernorm, "post_layernorm"),
            projection=projection,
            mlp_to_attention=mlp_to_attention,
            mlp_to_attention_product=mlp_to_attention.to(compute_dtype),
        )


def masks_at_once(
    device: torch.device,
    compute_dtype: torch.dtype,
    num_tokens: int,
    width: int,
    mlp_width: int,
    num_heads: int,
    chunk_size: int | None = None,
) -> tuple[int, int]:
    """How many masks share the two large products (a chunk), and the passes over attention gradients (a group).

    On a CPU a chunk takes at most 64 MB, and a group's attention gradients 3 MB. On an accelerator, which rather wants
    few and large launches, both are the same and take at most 1 GB, or a quarter of the memory that is free. One mask
    is the least, whatever it takes; a `chunk_size` that is given stays.
    """
    rounded_bytes = 0 if compute_dtype == torch.float32 else compute_dtype.itemsize
    in_chunk = (4 + rounded_bytes) * width + compute_dtype.itemsize * mlp_width
    in_group = 4 * num_heads * (num_tokens - 1)
    if device.type == "cpu":
        chunk_size = chunk_size or max(1, _CPU_BYTES // (num_tokens * in_chunk))
        return chunk_size, min(chunk_size, max(1, _CACHE_BYTES // (num_tokens * in_group)))
    in_group += rounded_bytes * num_heads * (num_tokens - 1) + 4 * _scratch_width(compute_dtype, width, mlp_width)
    chunk_size = chunk_size or max(1, _accelerator_bytes(device) // (num_tokens * (in_chunk + in_group)))
    return chunk_size, chunk_size


def _accelerator_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _ACCELERATOR_BYTES
    # What torch holds and does not use is free for us too.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_ACCELERATOR_BYTES, int(_PART_OF_FREE_MEMORY * free))


def _scratch_width(compute_dtype: torch.dtype, width: int, mlp_width: int) -> int:
    return width if compute_dtype == torch.float32 else max(width, mlp_width)


class Workspace:
    """The large buffers of the iterations, made once per call and written over by every chunk of masks.

    A new tensor of this size costs a CPU more in page faults than the arithmetic that fills it.

    Args:
        num_masks: the most that an image has.
        chunk_size: masks handled together; None leaves it to `masks_at_once`.
    """

    def __init__(self, block: LastBlock, num_tokens: int, num_masks: int, chunk_size: int | None = None) -> None:
        product = block.mlp_to_attention_product
        device, dtype, (mlp_width, width) = product.device, product.dtype, product.shape
        at_once = masks_at_once(device, dtype, num_tokens, width, mlp_width, block.num_heads, chunk_size)
        self.chunk_size, self.group_size = chunk_size, group_size = [min(num_masks, size) for size in at_once]

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.tokens = buffer(chunk_size, num_tokens, width)
        self.wide = buffer(chunk_size, num_tokens, mlp_width, dtype=dtype)
        # What enters and leaves the large products, where their dtype is not float32.
        self.rounded_tokens = self.tokens
        if dtype != torch.float32:
            self.rounded_tokens = buffer(chunk_size, num_tokens, width, dtype=dtype)
        self.scratch = buffer(group_size, num_tokens, _scratch_width(dtype, width, mlp_width))
        self.attention = buffer(group_size, block.num_heads, num_tokens, num_tokens - 1)
        # 1 where attention gradients are positive, else 0: whole numbers, which no dtype rounds.
        self.positive = self.attention
        if dtype != torch.float32:
            self.positive = buffer(*self.attention.shape, dtype=dtype)

    def groups(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.group_size):
            yield slice(start, min(start + self.group_size, count))


class LinearisedImage:
    """The last block around one image: everything about it that no mask and no iteration changes.

    Args:
        block: weights, float32.
        hidden_states: (T, C) float32, input of the last block.
        workspace: buffers of this call.
    """

    def __init__(self, block: LastBlock, hidden_states: Tensor, workspace: Workspace) -> None:
        num_tokens, width = hidden_states.shape
        self.block, self.workspace = block, workspace
        self.num_tokens = num_tokens

        def heads(linear: _Linear) -> Tensor:
            states = F.linear(normed, *linear)
            return states.view(num_tokens, block.num_heads, -1).transpose(0, 1)  # (H, T, d)

        normed = F.layer_norm(hidden_states, (width,), *block.attention_norm)
        value = heads(block.value)
        query, key = heads(block.query) * value.shape[-1] ** -0.5, heads(block.key)
        # Head by head, so that no (H, T, T) is held.
        attended = torch.stack([(q @ k.T).softmax(dim=-1) @ v for q, k, v in zip(query, key, value, strict=True)])
        self.value = value[:, 1:].contiguous()  # (H, K, d): the map has no CLS key
        residual = hidden_states + F.linear(attended.transpose(0, 1).reshape(num_tokens, width), *block.output)

        normed, sigma = block.mlp_norm.standardise(residual)  # (T, C), (T, 1)
        self.normed_to_attention = normed @ block.output.weight  # (T, C)
        without_bias = F.linear(normed * block.mlp_norm.weight, block.fc1.weight)  # (T, M)
        active, slope = block.activation(without_bias + F.linear(block.mlp_norm.bias, *block.fc1))
        slope /= sigma
        self.slope_times_input = without_bias.mul_(slope).div_(width)  # (T, M)
        self.mean_slope: Tensor | None = None
        self.slope = slope  # (T, M)
        if block.mlp_to_attention_product.dtype != torch.float32:
            # Naive bfloat16 costs up to 3e-2 in cosine; the part shared by all tokens carries most of the sum, so
            # only the deviation from it is rounded.
            self.mean_slope = slope.mean(dim=0)  # (M,)
            self.slope = slope.sub_(self.mean_slope)

        # Only two combinations of the block's output rows matter: the CLS row and the mean of all rows.
        rows = torch.stack([residual[0], residual.mean(dim=0)])
        rows = rows + F.linear(torch.stack([active[0], active.mean(dim=0)]), *block.fc2)  # (2, C)
        standard, sigma = block.final_norm.standardise(rows)
        projected = (standard * block.final_norm.weight + block.final_norm.bias) @ block.projection.T  # (2, E)
        self.image_embedding = projected[0]  # (E,), not normalised

        length = torch.linalg.vector_norm(projected[1])
        feature = projected[1] / length
        jacobian = block.projection * block.final_norm.weight
        jacobian = (jacobian - torch.outer(feature, feature @ jacobian)) / length
        jacobian = (
            jacobian - jacobian.mean(dim=1, keepdim=True) - torch.outer(jacobian @ standard[1] / width, standard[1])
        )
        self.similarity_jacobian = jacobian / (sigma[1] * num_tokens)  # (E, C): at each row of the block's output

    def attention_output_gradients(self, directions: Tensor) -> Tensor:
        """Gradient of the similarity at the attention's output, heads concatenated.

        Args:
            directions: (n, E) unit vectors, at most `workspace.chunk_size`.

        Returns:
            (n, T, C), a view of `workspace.tokens`.
        """
        block, workspace, count = self.block, self.workspace, len(directions)
        tokens, wide = workspace.tokens[:count], workspace.wide[:count]
        at_output = directions @ self.similarity_jacobian  # (n, C)
        at_activation = at_output @ block.fc2.weight  # (n, M)
        for group in workspace.groups(count):
            exact = self._exact(wide[group])
            torch.mul(self.slope, at_activation[group, None], out=exact)
            if exact.dtype != wide.dtype:
                wide[group] = exact
        rounded = workspace.rounded_tokens[:count]
        torch.mm(wide.flatten(0, 1), block.mlp_to_attention_product, out=rounded.flatten(0, 1))
        if rounded.dtype != tokens.dtype:
            tokens.copy_(rounded)
        constant = at_output @ block.output.weight  # (n, C), the same at each token
        if self.mean_slope is not None:
            constant += (self.mean_slope * at_activation) @ block.mlp_to_attention
        through_norm = at_activation @ self.slope_times_input.T  # (n, T)
        tokens += constant[:, None]
        return tokens.addcmul_(through_norm[..., None], self.normed_to_attention, value=-1)

    def relevance(self, output_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """LeGrad relevance of each patch, and where the gradient at the attention weights was positive.

        Args:
            output_gradients: (n, T, C) of at most `workspace.group_size` directions.

        Returns:
            (n, K) relevance: gradient at the attention weights clamped at 0, mean over heads and all T queries;
            (n, H, T, K) 1 or 0 in the dtype of the large products, a view of `workspace.positive`, valid until the
            next call.
        """
        by_head = output_gradients.unflatten(-1, (self.block.num_heads, -1)).transpose(1, 2)  # (n, H, T, d)
        attention, positive = (buffer[: len(by_head)] for buffer in (self.workspace.attention, self.workspace.positive))
        # In float32 always: in bfloat16 gradients near zero would change their signs
        torch.matmul(by_head, self.value.transpose(1, 2), out=attention)
        relevance = attention.clamp_(min=0).sum(dim=(1, 2)) / (self.block.num_heads * self.num_tokens)
        attention.sign_()
        return relevance, attention if positive.dtype == attention.dtype else positive.copy_(attention)

    def output_gradient_cotangents(self, positive: Tensor, relevance_gradients: Tensor, out: Tensor) -> None:
        """Transpose of `relevance`: (1 or n, H, T, K) and (n, K) -> `out` (n, T, C)."""
        weighted = self.value * relevance_gradients[:, None, :, None]  # (n, H, K, d)
        # What follows from it is rounded for a large product anyway
        weighted = weighted.div_(self.block.num_heads * self.num_tokens).to(positive.dtype)
        by_head = out.unflatten(-1, (self.block.num_heads, -1)).transpose(1, 2)  # (n, H, T, d)
        if len(positive) == len(out):
            by_head.copy_(torch.matmul(positive, weighted))
        else:  # side by side, as `matmul` would copy `positive` for each mask
            beside = weighted.permute(1, 2, 0, 3).flatten(2)  # (H, K, n * d)
            by_head.copy_(torch.matmul(positive[0], beside).unflatten(-1, (len(out), -1)).permute(2, 0, 1, 3))

    def direction_gradients(self, cotangents: Tensor) -> Tensor:
        """Transpose of `attention_output_gradients`: (n, T, C), a view of `workspace.tokens`, -> (n, E)."""
        block, workspace, (count, _, width) = self.block, self.workspace, cotangents.shape
        wide, rounded = workspace.wide[:count], workspace.rounded_tokens[:count]
        total = cotangents.sum(dim=1)  # (n, C)
        through_norm = cotangents.new_empty(count, self.num_tokens)
        for group in workspace.groups(count):
            product = workspace.scratch[: group.stop - group.start, :, :width]
            through_norm[group] = torch.mul(cotangents[group], self.normed_to_attention, out=product).sum(dim=-1)
        if rounded.dtype != cotangents.dtype:
            rounded.copy_(cotangents)
        torch.mm(rounded.flatten(0, 1), block.mlp_to_attention_product.T, out=wide.flatten(0, 1))
        at_activation = cotangents.new_empty(count, wide.shape[-1])  # (n, M)
        for group in workspace.groups(count):
            exact = self._exact(wide[group])
            if exact.dtype != wide.dtype:
                exact.copy_(wide[group])
            at_activation[group] = exact.mul_(self.slope).sum(dim=1)
        if self.mean_slope is not None:
            at_activation += self.mean_slope * (total @ block.mlp_to_attention.T)
        at_activation -= through_norm @ self.slope_times_input
        at_output = total @ block.output.weight.T + at_activation @ block.fc2.weight.T  # (n, C)
        return at_output @ self.similarity_jacobian.T

    def _exact(self, wide: Tensor) -> Tensor:
        """Float32 room for a group's `wide` (n, T, M): itself, or scratch where it is rounded."""
        if wide.dtype == torch.float32:
            return wide
        return self.workspace.scratch[: len(wide), :, : wide.shape[-1]]
