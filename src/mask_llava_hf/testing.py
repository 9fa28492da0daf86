"""Small models with random weights, for tests, the demo and users' own continuous integration. Nothing is downloaded.

Every part is real (the same classes, the same file formats), only tiny and untrained: a whole chain from photograph to
answer takes well under a second on a CPU, and its answer is noise. Weights depend on `seed` alone, not on the default
device or dtype nor on the state of the global random generators, which are left as they were.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    LlamaConfig,
    LlavaImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)
from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

from .modeling.configuration_mask_llava import MaskLlavaConfig
from .modeling.modeling_mask_llava import MaskLlavaForConditionalGeneration


# Vicuna v1 as LLaVA-1.5 uses it: a turn's images come before its text. The blank before an answer belongs to it, since
# tokenizers join it to the first word and the generation prompt ends before it; so does the end token, so that a model
# finetuned on the `generation` spans learns to stop.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if content is string %}{% set text = content %}"
    "{% else %}{% set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{% if message['role'] == 'system' %}{{ text + ' ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if content is not string %}"
    "{% for block in content | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% endif %}"
    "{{ text + ' ' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_TOKENIZER_TEXT = (
    "USER: What is in this picture? ASSISTANT: A woman in an orange suit stands before a flag.",
    "USER: How many cups are on the table? ASSISTANT: There are two cups, and a spoon lies beside one of them.",
    "USER: Describe the image in one sentence. ASSISTANT: The small dog is sitting on a red chair near the window.",
    "USER: Which object is left of the tree? ASSISTANT: To the left of the tree there is a yellow bicycle.",
    "USER: Is anybody wearing a hat? ASSISTANT: No, nobody in the photograph is wearing a hat.",
    "zero one two three four five six seven eight nine ten, 0 1 2 3 4 5 6 7 8 9",
)
_VOCABULARY_SIZE = 400
_IMAGE_SIZE, _PATCH_SIZE, _WIDTH = 168, 14, 64
_DETECTOR_INPUT = 128
_SEGMENTER_INPUT = {"sam": 128, "sam2": 256}
_TINY_MASK_DECODER = {
    "hidden_size": 32,
    "mlp_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "iou_head_hidden_dim": 32,
}

DetectorKind = Literal["rt_detr", "deformable_detr"]
SegmenterKind = Literal["sam", "sam2"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens, trained in memory on a few sentences of our own.

    Special tokens are `<unk> <s> </s> <pad> <image>` with ids 0 to 4. Every text starts with `<s>`, shorter texts are
    padded on the left, `model_max_length` is 2048, and the chat template is `CHAT_TEMPLATE`.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer.to_str()


def tiny_config(tokenizer: Any = None, **overrides: Any) -> MaskLlavaConfig:
    """The config of a Mask-LLaVA with 0.3 million parameters.

    Its CLIP tower sees 168 x 168 pixels as 12 x 12 patches, in 3 layers of width 64; its Llama has 2 layers of width
    64. An image has 1 CLS + 6 x 6 patches + at most 20 objects.

    Args:
        tokenizer: decides vocabulary size and special token ids; default: `tiny_tokenizer()`.
        overrides: fields of `MaskLlavaConfig` to set otherwise; `vision_config` and `text_config`, as dicts, change
            single fields of the tiny ones.
    """
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    vision = {
        "image_size": _IMAGE_SIZE,
        "patch_size": _PATCH_SIZE,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "projection_dim": _WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": _WIDTH**-0.5,  # with the usual 0.02, so narrow a model hardly looks at its input
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values: dict[str, Any] = {
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "patch_grid_size": 6,
        "max_object_tokens": 20,
        "use_cls_token": True,
    }
    return MaskLlavaConfig(
        vision_config=CLIPVisionConfig(**{**vision, **overrides.pop("vision_config", {})}),
        text_config=LlamaConfig(**{**text, **overrides.pop("text_config", {})}),
        **{**values, **overrides},
    )


def tiny_model(config: MaskLlavaConfig | None = None, *, seed: int = 0) -> MaskLlavaForConditionalGeneration:
    """A Mask-LLaVA in evaluation mode, float32, on the CPU; default config: `tiny_config()`."""
    config = config if config is not None else tiny_config()
    with _reproducible(seed):
        return MaskLlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


def tiny_image_processor(image_size: int = _IMAGE_SIZE) -> LlavaImageProcessor:
    """LLaVA-1.5's image processor (pads to a square, resizes, crops, normalises) for `image_size` x `image_size`."""
    side = {"height": image_size, "width": image_size}
    return LlavaImageProcessor(do_pad=True, size=dict(side), crop_size=dict(side))


def tiny_detector(
    kind: DetectorKind = "rt_detr", *, num_queries: int = 30, seed: int = 0
) -> tuple[PreTrainedModel, Any]:
    """An object detector and its image processor.

    Its boxes lie in diverse places and have diverse sizes, its scores lie between about 0.05 and 0.95, and both depend
    on the image: the chain behind it has something to do. It finds nothing in particular; its one class is "thing".

    Args:
        kind: "rt_detr" (has anchors) or "deformable_detr" (learned queries; the paper's detector).
        num_queries: boxes per image, before any threshold.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("rt_detr", "deformable_detr"):
        raise ValueError(f'`kind` must be "rt_detr" or "deformable_detr", got {kind!r}.')
    with _reproducible(seed):
        model, image_processor = (_rt_detr if kind == "rt_detr" else _deformable_detr)(num_queries)
        _spread_signals(model)
        # RT-DETR's three box heads add to small anchors, which have to grow; the one of Deformable DETR has no anchor
        _spread_detections(model, *((0.4, 0.3) if kind == "rt_detr" else (-1.2, 0.7)))
    return model.eval(), image_processor


def _rt_detr(num_queries: int) -> tuple[PreTrainedModel, Any]:
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        hidden_expansion=0.5,
        num_queries=num_queries,
        num_denoising=0,
        id2label={0: "thing"},
        label2id={"thing": 0},
    )
    model = RTDetrForObjectDetection._from_config(config, dtype=torch.float32)
    return model, RTDetrImageProcessor(size={"height": _DETECTOR_INPUT, "width": _DETECTOR_INPUT})


def _deformable_detr(num_queries: int) -> tuple[PreTrainedModel, Any]:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,  # a multiple of the 32 groups of its input normalisation
        encoder_layers=1,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=2,
        num_feature_levels=3,
        num_queries=num_queries,
        disable_custom_kernels=True,
        id2label={0: "thing"},
        label2id={"thing": 0},
    )
    model = DeformableDetrForObjectDetection._from_config(config, dtype=torch.float32)
    size = {"shortest_edge": _DETECTOR_INPUT, "longest_edge": 2 * _DETECTOR_INPUT}
    return model, DeformableDetrImageProcessor(size=size)


def tiny_segmenter(kind: SegmenterKind = "sam", *, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """A segmenter and its processor. The mask of a box is about the box, with an outline that wavers with the image.

    The image encoder is random; the mask decoder is set by hand.

    Args:
        kind: "sam" or "sam2".

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("sam", "sam2"):
        raise ValueError(f'`kind` must be "sam" or "sam2", got {kind!r}.')
    with _reproducible(seed):
        model, processor = (_sam if kind == "sam" else _sam2)()
        _spread_signals(model)
        _segment_boxes(model)
    return model.eval(), processor


def _sam() -> tuple[PreTrainedModel, Any]:
    side, patch = _SEGMENTER_INPUT["sam"], 4
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": patch,
            "mlp_dim": 64,
            "window_size": 8,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": side, "patch_size": patch},
        mask_decoder_config=_TINY_MASK_DECODER,
    )
    image_processor = SamImageProcessor(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": side},
        mask_pad_size={"height": side, "width": side},
    )
    return SamModel._from_config(config, dtype=torch.float32), SamProcessor(image_processor)


def _sam2() -> tuple[PreTrainedModel, Any]:
    side = _SEGMENTER_INPUT["sam2"]
    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [side, side],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [3],  # not the first of a stage, which pools its queries
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[side // stride, side // stride] for stride in (4, 8, 16)],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": side, "patch_size": 16},
        mask_decoder_config=_TINY_MASK_DECODER,
    )
    image_processor = Sam2ImageProcessor(
        size={"height": side, "width": side}, mask_size={"height": side // 4, "width": side // 4}
    )
    return Sam2Model._from_config(config, dtype=torch.float32), Sam2Processor(image_processor)


def build_tiny_checkpoint(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    detector: DetectorKind | None = "rt_detr",
    segmenter: SegmenterKind | None = "sam",
    **object_settings: Any,
) -> Path:
    """Writes a whole Mask-LLaVA checkpoint that `AutoProcessor` and `AutoModelForImageTextToText` load.

    The folder holds the model, the processor, and the parts `./detector` and `./segmenter`. The model's config has
    `untrained = True`, so that a program can say that its answers are noise.

    Args:
        folder: is created where it is missing; files of an earlier checkpoint in it are replaced.
        detector: kind of `tiny_detector`; None: the checkpoint has none.
        segmenter: kind of `tiny_segmenter`; None: none, and boxes serve as masks.
        object_settings: of the processor, see `ObjectSettings`; those that the model's config has too
            (`max_object_tokens`, `patch_grid_size`, `use_cls_token`, `image_size`) are set there as well.

    Returns:
        `folder`.
    """
    from .processing.processing_mask_llava import MaskLlavaProcessor

    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    shared = ("max_object_tokens", "patch_grid_size", "use_cls_token")
    overrides: dict[str, Any] = {name: object_settings[name] for name in shared if name in object_settings}
    image_size = object_settings.get("image_size", _IMAGE_SIZE)
    config = tiny_config(tokenizer, vision_config={"image_size": image_size}, untrained=True, **overrides)
    settings: dict[str, Any] = {
        **{name: getattr(config, name) for name in shared},
        "image_size": image_size,
        "embed_size": config.vision_config.hidden_size,
        "score_threshold": 0.05,
    }
    tiny_model(config, seed=seed).save_pretrained(folder)
    parts = {
        "detector": tiny_detector(detector, seed=seed) if detector is not None else None,
        "segmenter": tiny_segmenter(segmenter, seed=seed) if segmenter is not None else None,
    }
    for name, part in parts.items():
        if part is not None:
            for half in part:
                half.save_pretrained(folder / name)
            settings[name] = f"./{name}"
    if segmenter is None:
        settings["mask_source"] = "boxes"
    MaskLlavaProcessor(
        image_processor=tiny_image_processor(image_size),
        tokenizer=tokenizer,
        object_settings={**settings, **object_settings},
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    # The CPU's generator alone: torch.manual_seed would reseed the accelerators as well
    state, dtype = torch.default_generator.get_state(), torch.get_default_dtype()
    try:
        with torch.device("cpu"):
            torch.set_default_dtype(torch.float32)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.default_generator.set_state(state)


@torch.no_grad()
def _spread_signals(model: nn.Module) -> None:
    """Gives weights the size at which signals neither vanish nor grow from layer to layer.

    Transformers' initial values (0.02, 0.01 and even 1e-10) are meant for wide models or for weights to be loaded; in
    these narrow ones they leave every output the same whatever the image.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else module.in_channels
            nn.init.normal_(module.weight, std=fan_in**-0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


@torch.no_grad()
def _spread_detections(model: PreTrainedModel, size_mean: float, size_std: float) -> None:
    """Steers a detector's heads to boxes of many places and sizes and to scores that vary.

    Each head, in the order in which they run, gets the outputs on images of noise shifted and scaled to a chosen mean
    and standard deviation over all queries, before the sigmoid.

    Args:
        size_mean, size_std: mean and standard deviation that each box head gives to width and height.
    """

    def steer(mean: Tensor, std: Tensor) -> Callable[[nn.Linear, Any, Tensor], Tensor]:
        def hook(head: nn.Linear, _: Any, output: Tensor) -> Tensor:
            found = output.flatten(0, -2)
            scale = std / found.std(0).clamp(min=1e-3)
            head.weight.mul_(scale[:, None])
            head.bias.copy_((head.bias - found.mean(0)) * scale + mean)
            return (output - found.mean(0)) * scale + mean

        return hook

    score = steer(torch.tensor([-0.5]), torch.tensor([1.3]))
    box = steer(torch.tensor([0.0, 0.0, size_mean, size_mean]), torch.tensor([0.3, 0.3, size_std, size_std]))
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == 1:  # one class
            hooks.append(module.register_forward_hook(score))
        elif isinstance(module, nn.Linear) and module.out_features == 4 and "bbox" in name:
            hooks.append(module.register_forward_hook(box))
    blobs = torch.rand(16, 3, 1, 1) + torch.rand(16, 3, 8, 8) - 0.5  # of different colours and brightness
    noise = nn.functional.interpolate(blobs, size=_DETECTOR_INPUT, mode="bilinear")
    model.eval()(pixel_values=noise)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def _segment_boxes(model: PreTrainedModel) -> None:
    """Sets a segmenter's mask decoder by hand, so that the mask of a box is about the box.

    A random decoder paints the same specks over the whole image for every box, and nothing behind it could be told
    right from wrong. The image encoder stays random; its faint signal makes the outlines waver.

    A place is encoded as sine and cosine of its x and of its y, slow enough to be one-to-one. Four attention heads let
    a pixel look at a corner of the box: is it right of the upper left corner, below it, left of the lower right corner,
    above it? As sin(a - b) = sin a cos b - cos a sin b, that is a product of query and key. Where all four agree, there
    is the mask.
    """
    is_sam = model.config.model_type == "sam"
    decoder, prompts = model.mask_decoder, model.prompt_encoder
    # Channels: of the sixteen sines and cosines only the first two move; the other sines are free to mark tokens
    sine, cosine, always_one = (0, 1), (16, 17), 31
    upper_left, lower_right, no_corner, inside, outside = 2, 3, 4, 8, 9
    marker, steepness = 6.0, 400.0

    for places in (model.shared_image_embedding, prompts.shared_embedding):
        places.positional_embedding.zero_()
        places.positional_embedding.fill_diagonal_(1 / 16)
    for name, parameter in decoder.named_parameters():
        if name in ("iou_token.weight", "mask_tokens.weight", "obj_score_token.weight"):
            parameter.zero_()
            parameter[:, no_corner] = marker
        elif "norm" not in name:
            parameter.zero_()
    corners = [row.weight[0] for row in prompts.point_embed] if is_sam else prompts.point_embed.weight
    tokens = {upper_left: corners[2], lower_right: corners[3], no_corner: prompts.not_a_point_embed.weight[0]}
    for channel, token in tokens.items():
        token.zero_()
        token[channel] = marker
    prompts.no_mask_embed.weight.zero_()

    # First the tokens attend to their own kind, and keep its mark alone
    layer = decoder.transformer.layers[0]
    attend, kinds = layer.self_attn, list(tokens)
    attend.q_proj.weight[kinds, kinds] = attend.k_proj.weight[kinds, kinds] = 2.0
    attend.v_proj.weight[kinds, kinds] = (attend.out_proj if is_sam else attend.o_proj).weight[kinds, kinds] = 1.0
    layer.layer_norm3.weight.zero_()
    layer.layer_norm3.weight[kinds] = 1.0

    # Then every pixel asks its four questions, and counts the votes
    attend = layer.cross_attn_image_to_token
    vote = attend.out_proj if is_sam else attend.o_proj
    head_width = attend.q_proj.out_features // 4
    for head in range(4):
        axis, row = head % 2, head * head_width
        corner, other, sign = (upper_left, lower_right, 1) if head < 2 else (lower_right, upper_left, -1)
        attend.q_proj.weight[[row, row + 1, row + 2], [sine[axis], cosine[axis], always_one]] = 1.0
        attend.k_proj.weight[row, cosine[axis]] = sign * steepness
        attend.k_proj.weight[row + 1, sine[axis]] = -sign * steepness
        attend.k_proj.weight[row + 2, other] = -steepness
        attend.k_proj.weight[row + 2, corner] = 0.3  # makes up for there being about six tokens that are no corner
        attend.v_proj.weight[row, corner] = 1 / marker
        vote.weight[[inside, outside], row] = torch.tensor([4.0, -4.0])
    vote.bias[[inside, outside]] = 3.2 * torch.tensor([-4.0, 4.0])  # of at most 4 votes

    # The rest of the decoder passes on whether a pixel is inside
    decoder.upscale_conv1.weight[[inside, outside], [0, 1]] = 1.0
    decoder.upscale_conv2.weight[[0, 1], [0, 1]] = 1.0
    for head_of_mask in decoder.output_hypernetworks_mlps:
        head_of_mask.proj_out.bias[:2] = torch.tensor([1.0, -1.0])
    for name, parameter in model.vision_encoder.named_parameters():
        if name.startswith(("neck.layer_norm2.", "neck.convs.")):  # the last of SAM's and of SAM 2's
            parameter.mul_(0.005)
