import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from transformers import (
    CLIPConfig,
    EdgeTamConfig,
    EdgeTamModel,
    EdgeTamVisionConfig,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from mask_llava_hf.conversion.sam_keys import sam_state_dict_to_transformers
from mask_llava_hf.processing.objects.segmenters import (
    SegmentAnythingSegmenter,
    build_segment_anything,
    default_batch_sizes,
    load_segmenter,
)


SIDE, PATCH, WIDTH, PROMPT_WIDTH = 64, 8, 24, 32


def tiny_sam(width=WIDTH, heads=3, global_blocks=(1,), window=3, depth=3, mlp_width=100, qkv_bias=True):
    """A model of the segment-anything package with random weights."""
    torch.manual_seed(0)
    grid = SIDE // PATCH
    sam = Sam(
        ImageEncoderViT(
            img_size=SIDE, patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads,
            mlp_ratio=(mlp_width + 0.5) / width, out_chans=PROMPT_WIDTH, qkv_bias=qkv_bias,
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6), use_rel_pos=True, window_size=window,
            global_attn_indexes=global_blocks,
        ),
        PromptEncoder(
            embed_dim=PROMPT_WIDTH, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE), mask_in_chans=8
        ),
        MaskDecoder(
            transformer_dim=PROMPT_WIDTH,
            transformer=TwoWayTransformer(depth=2, embedding_dim=PROMPT_WIDTH, num_heads=8, mlp_dim=20),
            iou_head_depth=3, iou_head_hidden_dim=16,
        ),
    )  # fmt: skip
    for parameter in sam.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return sam.eval()


def saved_sam(folder, sam):
    """The same weights as a Transformers checkpoint."""
    config = SamConfig(
        vision_config={
            "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": SIDE,
            "patch_size": PATCH, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 100,
            "output_channels": PROMPT_WIDTH, "num_pos_feats": PROMPT_WIDTH // 2,
        },
        prompt_encoder_config={
            "hidden_size": PROMPT_WIDTH, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": PROMPT_WIDTH, "mlp_dim": 20, "iou_head_hidden_dim": 16, "layer_norm_eps": 1e-5,
        },
    )  # fmt: skip
    model = SamModel(config)
    model.load_state_dict(sam_state_dict_to_transformers(sam.state_dict()))
    model.save_pretrained(folder)
    SamProcessor(
        SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    ).save_pretrained(folder)
    return folder


SAM2_PARTS = {
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 20, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}
PYRAMID = {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "fpn_hidden_size": 32}
SAM2_VISION = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64],
        "patch_kernel_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 24, 32], "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    },
    "backbone_channel_list": [32, 24, 16, 8],
    **PYRAMID,
}  # fmt: skip


def saved_sam2(folder):
    Sam2Model(Sam2Config(vision_config=SAM2_VISION, **SAM2_PARTS)).save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64})).save_pretrained(folder)
    return folder


def saved_sam2_video(folder):
    config = Sam2VideoConfig(
        vision_config=SAM2_VISION, **SAM2_PARTS, image_size=64, memory_attention_num_layers=1,
        memory_attention_hidden_size=32, memory_attention_feed_forward_hidden_size=16,
        memory_encoder_hidden_size=32, memory_encoder_output_channels=16, mask_downsampler_embed_dim=32,
        memory_fuser_embed_dim=32, memory_fuser_intermediate_dim=16, memory_attention_rope_feat_sizes=[8, 8],
    )  # fmt: skip
    Sam2VideoModel(config).save_pretrained(folder)
    Sam2VideoProcessor(
        Sam2ImageProcessor(size={"height": 64, "width": 64}), Sam2VideoVideoProcessor(size={"height": 64, "width": 64})
    ).save_pretrained(folder)
    return folder


def saved_edgetam(folder):
    pytest.importorskip("timm")
    backbone = {
        "model_type": "timm_wrapper",
        "architecture": "resnet18",
        "num_classes": 2,
        "do_pooling": False,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
    }
    vision = EdgeTamVisionConfig(
        backbone_config=backbone, backbone_channel_list=[512, 256, 128, 64],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32,
    )  # fmt: skip
    prompts = {**SAM2_PARTS["prompt_encoder_config"], "patch_size": 16}
    config = EdgeTamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=SAM2_PARTS["mask_decoder_config"]
    )
    EdgeTamModel(config).save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64})).save_pretrained(folder)
    return folder


def saved_pth(folder):
    torch.save(tiny_sam().state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


KINDS = {
    "sam": lambda folder: saved_sam(folder, tiny_sam()),
    "sam2": saved_sam2,
    "sam2_video": saved_sam2_video,
    "edgetam": saved_edgetam,
    "pth": saved_pth,
}


@pytest.fixture(scope="module", params=list(KINDS))
def source(request, tmp_path_factory):
    torch.manual_seed(0)
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


def picture(height, width, seed=0):
    """Smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def some_boxes(image, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor([image.width, image.height])
    corners = torch.rand(number, 2, 2, generator=generator).sort(1).values * sides
    return corners.reshape(number, 4)


PICTURES = [picture(90, 60), picture(47, 101, 1), picture(64, 64, 2)]
BOXES = [some_boxes(PICTURES[0], 5), torch.zeros(0, 4), some_boxes(PICTURES[2], 2)]


def encoder_calls(segmenter, monkeypatch):
    """Numbers of images in each pass of the image encoder from now on."""
    module = (
        segmenter.model.image_encoder if hasattr(segmenter.model, "image_encoder") else segmenter.model.vision_encoder
    )
    calls = []
    forward = module.forward

    def counted(pixel_values, *args, **kwargs):
        calls.append(len(pixel_values))
        return forward(pixel_values, *args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return calls


def test_one_mask_per_box_at_the_size_of_the_image(source):
    masks = load_segmenter(source).segment(PICTURES, BOXES)
    assert [tuple(mask.shape) for mask in masks] == [(5, 90, 60), (0, 47, 101), (2, 64, 64)]
    assert all(mask.dtype == torch.bool and not mask.is_inference() for mask in masks)
    assert 0 < masks[0].float().mean() < 1


def test_chunks_and_batches_do_not_change_masks(source):
    segmenter = load_segmenter(source)
    images, boxes = [*PICTURES, PICTURES[0]], [*BOXES, BOXES[0].flip(0)]
    masks = segmenter.segment(images, boxes)
    segmenter.box_chunk_size, segmenter.image_batch_size = 2, 3
    for first, second in zip(masks, segmenter.segment(images, boxes), strict=True):
        assert (first != second).float().mean() < 1e-3 if len(first) else len(second) == 0
    assert (masks[0] != masks[3].flip(0)).float().mean() < 1e-3


def test_each_image_with_boxes_is_encoded_once(source, monkeypatch):
    segmenter = load_segmenter(source)
    calls = encoder_calls(segmenter, monkeypatch)
    segmenter.box_chunk_size, segmenter.image_batch_size = 2, 1
    segmenter.segment(PICTURES, BOXES)
    assert calls == [1, 1]
    segmenter.image_batch_size = 8
    segmenter.segment(PICTURES, BOXES)
    assert calls == [1, 1, 2]
    segmenter.segment([PICTURES[1]], [BOXES[1]])
    assert segmenter.segment([], []) == [] and calls == [1, 1, 2]


def logits_by_image(segmenter, embeddings, boxes):
    """The mask logits of each image's boxes, decoded without those of other images."""
    model, logits = segmenter.model, []
    for row, image_boxes in enumerate(boxes):
        if isinstance(segmenter, SegmentAnythingSegmenter):
            sparse, dense = model.prompt_encoder(points=None, boxes=image_boxes, masks=None)
            places = model.prompt_encoder.get_dense_pe()
            logits.append(model.mask_decoder(embeddings[row : row + 1], places, sparse, dense, False)[0])
        else:
            levels = [level[row : row + 1] for level in embeddings]
            given = levels[0] if model.config.model_type == "sam" else levels
            outputs = model(image_embeddings=given, input_boxes=image_boxes[None], multimask_output=False)
            logits.append(outputs.pred_masks[0])
    return torch.cat(logits)


def test_boxes_of_several_images_are_decoded_together_as_alone(source, monkeypatch):
    segmenter = load_segmenter(source)
    boxes = [some_boxes(image, 2 * number + 1, number) * SIDE / 101 for number, image in enumerate(PICTURES)]
    rows = torch.tensor([0] + [1] * 3 + [2] * 5)
    with torch.inference_mode():
        _, embeddings = segmenter._encode(PICTURES)
        expected = logits_by_image(segmenter, embeddings, boxes)
        together = segmenter._decode(rows, embeddings, torch.cat(boxes))
    assert together.shape[:2] == (9, 1)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())

    segmenter.box_chunk_size, segmenter.image_batch_size = 4, 3
    chunks, decode = [], segmenter._decode
    monkeypatch.setattr(segmenter, "_decode", lambda rows, *rest: chunks.append(rows.tolist()) or decode(rows, *rest))
    masks = segmenter.segment(PICTURES, [some_boxes(image, 3) for image in PICTURES])
    assert chunks == [[0, 0, 0, 1], [1, 1, 2, 2], [2]]
    for image, image_masks in zip(PICTURES, masks, strict=True):
        alone = segmenter.segment([image], [some_boxes(image, 3)])[0]
        assert (image_masks != alone).float().mean() < 1e-3


@pytest.mark.parametrize(("side", "expected"), [(96, (4, 16)), (256, (1, 16)), (512, (1, 8)), (1024, (1, 2))])
def test_passes_on_a_cpu_are_small_for_large_inputs(side, expected):
    assert default_batch_sizes(torch.device("cpu"), side) == expected
    assert default_batch_sizes(torch.device("cuda"), side) == (4, 16)


def test_half_precision_runs(source):
    segmenter = load_segmenter(source, dtype=torch.bfloat16)
    assert torch.bfloat16 in {parameter.dtype for parameter in segmenter.model.parameters()}
    assert segmenter.segment(PICTURES[:1], BOXES[:1])[0].shape == (5, 90, 60)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_are_those_of_the_processor_and_model_used_plainly(kind, tmp_path):
    torch.manual_seed(0)
    source = KINDS[kind](tmp_path)
    processor, model = {"sam": (SamProcessor, SamModel), "sam2": (Sam2Processor, Sam2Model)}[kind]
    processor, model = processor.from_pretrained(source), model.from_pretrained(source)
    inputs = processor(images=PICTURES[0], input_boxes=[BOXES[0].tolist()], return_tensors="pt")
    with torch.no_grad():
        logits = model(
            inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        ).pred_masks
    sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
    expected = processor.post_process_masks(logits, *sizes)[0][:, 0]
    found = load_segmenter(source).segment(PICTURES[:1], BOXES[:1])[0]
    assert (found != expected).float().mean() < 1e-3


def test_both_sam_stacks_give_the_same_masks_for_the_same_weights(tmp_path):
    sam = tiny_sam()
    torch.save(sam.state_dict(), tmp_path / "anything.pth")
    first = load_segmenter(tmp_path / "anything.pth")
    second = load_segmenter(saved_sam(tmp_path / "transformers", sam))
    assert isinstance(first, SegmentAnythingSegmenter) and not isinstance(second, SegmentAnythingSegmenter)
    images = [picture(90, 60), picture(47, 101, 1), picture(64, 64, 2), picture(300, 211, 3), picture(5, 40, 4)]
    boxes = [some_boxes(image, 7, seed) for seed, image in enumerate(images)]
    expected = first.segment(images, boxes)
    # The default image processor resizes with torchvision, the package with Pillow; they differ by one of 255 levels
    # in about one pixel of a thousand, enough to move the border of a mask.
    for one, other in zip(expected, second.segment(images, boxes), strict=True):
        assert (one != other).float().mean() < 0.01
    second.image_processor = SamImageProcessorPil.from_pretrained(tmp_path / "transformers")
    for one, other in zip(expected, second.segment(images, boxes), strict=True):
        assert 0 < one.float().mean() < 1
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "architecture",
    [
        {"width": 32, "heads": 4, "depth": 4, "global_blocks": (1, 3), "window": 2, "mlp_width": 128},
        {"width": 24, "heads": 2, "depth": 2, "global_blocks": (0, 1), "window": 5, "mlp_width": 96},
        {"width": 24, "heads": 6, "depth": 1, "global_blocks": (), "window": 3, "qkv_bias": False},
    ],
)
def test_the_architecture_is_read_from_the_shapes_of_the_weights(architecture):
    sam = tiny_sam(**architecture)
    rebuilt = build_segment_anything(sam.state_dict())
    assert not any(tensor.is_meta for tensor in [*rebuilt.parameters(), *rebuilt.buffers()])
    pixels = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.image_encoder(pixels), sam.image_encoder(pixels))
    torch.testing.assert_close(rebuilt.preprocess(pixels * 255), sam.preprocess(pixels * 255))


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_are_recognised(size):
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        published = sam_model_registry[size]()
        state_dict = published.state_dict()
    rebuilt = build_segment_anything(state_dict)
    encoder = rebuilt.image_encoder
    assert encoder.img_size == 1024
    for ours, theirs in zip(encoder.blocks, published.image_encoder.blocks, strict=True):
        assert (ours.window_size, ours.attn.num_heads) == (theirs.window_size, theirs.attn.num_heads)
    assert rebuilt.mask_decoder.transformer.num_heads == 8


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save(tiny_sam(), tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="(?s)holds more than tensors.*Nothing was loaded.*state_dict"):
        load_segmenter(tmp_path / "pickled.pth")


def test_other_files_are_refused_with_what_was_found(tmp_path):
    torch.save({"model": tiny_sam().state_dict(), "epoch": 3}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match=r"found \['epoch', 'model'\]"):
        load_segmenter(tmp_path / "nested.pth")
    state_dict = tiny_sam().state_dict()
    torch.save({**state_dict, "mask_decoder.hf_token.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="hf_token"):
        load_segmenter(tmp_path / "more.pth")
    del state_dict["image_encoder.pos_embed"]
    torch.save(state_dict, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="lacks 'image_encoder.pos_embed'"):
        load_segmenter(tmp_path / "less.pth")
    with pytest.raises(FileNotFoundError, match="sam_vit_h.pth"):
        load_segmenter("sam_vit_h.pth")


def test_other_models_are_refused(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'clip', expected one of edgetam, .*sam2"):
        load_segmenter(tmp_path)


def test_boxes_of_another_number_or_shape_and_nan_are_refused(tmp_path):
    segmenter = load_segmenter(saved_pth(tmp_path))
    with pytest.raises(ValueError, match="3 images and 2 lists"):
        segmenter.segment(PICTURES, BOXES[:2])
    with pytest.raises(ValueError, match=r"`boxes\[0\]` has shape \(4,\)"):
        segmenter.segment(PICTURES[:1], [torch.zeros(4)])
    segmenter.model.mask_decoder.mask_tokens.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite mask logits for 5 of 5 boxes"):
        segmenter.segment(PICTURES[:1], BOXES[:1])
