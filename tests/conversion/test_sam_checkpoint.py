import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from transformers import SamModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from mask_llava_hf.conversion import convert_checkpoint
from mask_llava_hf.processing.objects.segmenters import load_segmenter


SIDE, PATCH, PROMPT_WIDTH = 64, 8, 32


def tiny_sam(width=24, heads=3, global_blocks=(1,), window=3, depth=3, qkv_bias=True, mask_channels=8):
    """A model of the segment-anything package with random weights."""
    torch.manual_seed(0)
    grid = SIDE // PATCH
    sam = Sam(
        ImageEncoderViT(
            img_size=SIDE, patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=3.0,
            out_chans=PROMPT_WIDTH, qkv_bias=qkv_bias, norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
            use_rel_pos=True, window_size=window, global_attn_indexes=global_blocks,
        ),
        PromptEncoder(
            embed_dim=PROMPT_WIDTH, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE),
            mask_in_chans=mask_channels,
        ),
        MaskDecoder(
            transformer_dim=PROMPT_WIDTH,
            transformer=TwoWayTransformer(depth=2, embedding_dim=PROMPT_WIDTH, num_heads=8, mlp_dim=20),
            iou_head_depth=4, iou_head_hidden_dim=16,
        ),
    )  # fmt: skip
    for parameter in sam.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return sam.eval()


def save(sam, path):
    torch.save(sam.state_dict(), path)
    return path


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"global_blocks": (0, 2), "depth": 4, "window": 5},
        {"window": 0, "global_blocks": (0, 1, 2), "qkv_bias": False},
    ],
    ids=["windows", "more blocks", "no windows"],
)
def test_masks_are_equal_before_and_after(tmp_path, shape):
    source = save(tiny_sam(**shape), tmp_path / "weights.pth")
    report = convert_checkpoint(source, tmp_path / "target")
    assert report.layout.startswith("SAM") and ": 0 of 11834 pixels differ" in report.self_check
    before, after = load_segmenter(source), load_segmenter(tmp_path / "target")
    assert isinstance(after.image_processor, SamImageProcessorPil)
    generator = np.random.default_rng(0)
    for height, width in ((61, 97), (200, 133), (31, 300)):
        image = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
        boxes = torch.tensor([[1.0, 2, 20, 25], [5, 5, 30, 30], [0, 0, width, height]])
        [expected], [found] = before.segment([image], [boxes]), after.segment([image], [boxes])
        assert torch.equal(found, expected)
        assert 0 < found.sum() < found.numel()


def test_loading_and_saving_changes_no_name(tmp_path):
    convert_checkpoint(save(tiny_sam(), tmp_path / "weights.pth"), tmp_path / "target", self_check=False)
    SamModel.from_pretrained(tmp_path / "target").save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("target", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sixteen_bits_on_request(tmp_path):
    source = save(tiny_sam(), tmp_path / "weights.pth")
    report = convert_checkpoint(source, tmp_path / "target", dtype=torch.bfloat16, self_check=False)
    assert report.dtype == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "target/model.safetensors").values()} == {torch.bfloat16}


def test_other_files_are_refused(tmp_path):
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds 1 weights, but not image_encoder.patch_embed.proj.weight"):
        convert_checkpoint(tmp_path / "other.pth", tmp_path / "target")
    lacking = tiny_sam().state_dict()
    del lacking["mask_decoder.iou_token.weight"]
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match="mask_decoder.iou_token.weight"):
        convert_checkpoint(tmp_path / "lacking.pth", tmp_path / "target")
    source = save(tiny_sam(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="`composition` was given, which has no effect"):
        convert_checkpoint(source, tmp_path / "target", composition="llava")
    assert not (tmp_path / "target").exists()
