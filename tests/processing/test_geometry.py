import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mask_llava_hf.processing.geometry import SquareFrame, upright_rgb


PAD = {"do_pad": True, "size": {"height": 42, "width": 42}, "do_center_crop": False}
PAD_AND_CROP = {"do_pad": True, "size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
CROP = {"do_pad": False, "size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
CROP_INSIDE = {"do_pad": False, "size": {"shortest_edge": 57}, "crop_size": {"height": 42, "width": 42}}
CROP_ADDS = {"do_pad": False, "size": {"shortest_edge": 31}, "crop_size": {"height": 42, "width": 42}}
STRETCH = {"do_pad": False, "size": {"height": 42, "width": 42}, "do_center_crop": False}
SETTINGS = [PAD, PAD_AND_CROP, CROP, CROP_INSIDE, CROP_ADDS, STRETCH]
SIZES = [(42, 42), (97, 61), (61, 97), (33, 20), (1, 1), (1, 5), (200, 3), (301, 300), (40, 1000)]


def image_processor(settings, cls=LlavaImageProcessor):
    # image_mean 0 pads with black, so that what is drawn in white is the mask and nothing else.
    return cls(resample=2, do_rescale=False, do_normalize=False, image_mean=[0, 0, 0], **settings)


def drawn(processor, mask):
    """What the image processor makes of a mask drawn in white: (S, S) in [0, 1]."""
    rgb = Image.fromarray(np.repeat(mask.numpy()[..., None], 3, axis=-1).astype(np.uint8) * 255)
    return processor(rgb, return_tensors="pt")["pixel_values"][0, 0].float() / 255


def some_masks(height, width):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    masks[0] = True
    masks[1, height // 3 : height // 3 + max(1, height // 2), width // 4 : width // 4 + max(1, width // 2)] = True
    coarse = (torch.rand(1, 1, 5, 5, generator=generator) > 0.5).float()
    masks[2] = torch.nn.functional.interpolate(coarse, (height, width))[0, 0].bool()
    masks[3, : (height + 1) // 2] = True
    return masks


@pytest.mark.parametrize("cls", [LlavaImageProcessor, LlavaImageProcessorPil])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("image_hw", SIZES)
def test_masks_go_where_the_image_processor_takes_the_pixels(image_hw, settings, cls):
    processor = image_processor(settings, cls)
    masks = some_masks(*image_hw)
    frame = SquareFrame.from_image_processor(processor, image_hw)
    for mask, square in zip(masks, frame.transform_masks(masks), strict=True):
        pixels = drawn(processor, mask)
        # The image processor rounds to 8 bit between the two directions: near one half it may differ.
        clear = (pixels - 0.5).abs() > 2.5 / 255
        if (pixels >= 0.5).any():
            assert torch.equal(square[clear], pixels[clear] >= 0.5)
        else:
            assert square.sum() <= 1


def test_bicubic_pixels_and_bilinear_masks_agree_about_the_place():
    processor = LlavaImageProcessor(do_rescale=False, do_normalize=False, image_mean=[0, 0, 0], **PAD)
    masks = some_masks(333, 517)[1:]
    squares = SquareFrame.from_image_processor(processor, (333, 517)).transform_masks(masks)
    for mask, square in zip(masks, squares, strict=True):
        assert ((drawn(processor, mask) >= 0.5) != square).float().mean() < 0.01


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("image_hw", [(97, 61), (61, 97), (120, 121)])
def test_boxes_enclose_their_masks(image_hw, settings):
    frame = SquareFrame.from_image_processor(image_processor(settings), image_hw)
    box = torch.tensor([[10.0, 20.0, 45.0, 55.0]])
    mask = torch.zeros(1, *image_hw, dtype=torch.bool)
    mask[0, 20:55, 10:45] = True
    rows, columns = frame.transform_masks(mask)[0].nonzero().unbind(1)
    found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    torch.testing.assert_close(frame.transform_boxes(box)[0], found, rtol=0, atol=0.51)


def test_boxes_by_hand():
    padded = SquareFrame.from_image_processor(image_processor(PAD), (84, 42))  # 21 columns before, then halved
    boxes = torch.tensor([[0.0, 0.0, 42.0, 84.0], [-9.0, 10.0, 99.0, 20.0]])
    expected = torch.tensor([[10.5, 0.0, 31.5, 42.0], [6.0, 5.0, 42.0, 10.0]])
    torch.testing.assert_close(padded.transform_boxes(boxes), expected)
    cropped = SquareFrame.from_image_processor(image_processor(CROP), (84, 42))  # 21 rows cut above and below
    expected = torch.tensor([[0.0, 0.0, 42.0, 42.0], [0.0, 0.0, 42.0, 0.0]])
    torch.testing.assert_close(cropped.transform_boxes(boxes), expected)
    assert cropped.transform_boxes(torch.zeros(0, 4)).shape == (0, 4)


def test_a_mask_too_small_to_survive_becomes_the_pixel_at_its_centroid():
    frame = SquareFrame.from_image_processor(image_processor(PAD), (840, 840))
    masks = torch.zeros(2, 840, 840, dtype=torch.bool)
    masks[0, 407, 815] = True
    masks[1, 100:120:19, 100] = True
    squares = frame.transform_masks(masks)
    assert squares[0].nonzero().tolist() == [[20, 40]]
    assert squares[1].nonzero().tolist() == [[5, 5]]


def test_a_mask_outside_the_crop_becomes_empty_and_an_empty_one_stays_so():
    frame = SquareFrame.from_image_processor(image_processor(CROP), (420, 84))  # rows 168 to 251 are kept
    masks = torch.zeros(4, 420, 84, dtype=torch.bool)
    masks[0, :168] = True
    masks[1, 160:169, 40] = True
    masks[2, 251] = True
    squares = frame.transform_masks(masks)
    assert squares.flatten(1).sum(1).tolist() == [0, 1, 1, 0]
    assert squares[1].nonzero().tolist() == [[0, 20]]
    assert squares[2].nonzero().tolist() == [[41, 21]]


def test_call_arguments_override_the_saved_settings():
    frame = SquareFrame.from_image_processor(
        image_processor(CROP), (20, 30), do_pad=True, size=56, crop_size=56, do_normalize=True, do_resize=None
    )
    assert (frame.padded_hw, frame.resized_hw, frame.size) == ((30, 30), (56, 56), 56)


def test_clip_image_processors_are_read_too():
    frame = SquareFrame.from_image_processor(CLIPImageProcessor(size=42, crop_size=42), (84, 126))
    assert (frame.resized_hw, frame.crop_top_left, frame.size) == ((42, 63), (0, 10), 42)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_pad": False, "do_center_crop": False, "size": {"shortest_edge": 42}}, "comes out .* as 42 x 63"),
        ({"do_pad": True, "size": {"longest_edge": 42}}, "longest_edge"),
    ],
)
def test_frames_that_cannot_be_followed_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SquareFrame.from_image_processor(image_processor(settings), (40, 60))


def test_wrong_shapes_are_refused():
    frame = SquareFrame.from_image_processor(image_processor(PAD), (40, 60))
    with pytest.raises(ValueError, match=r"shape \(2, 60, 40\), expected \(N, 40, 60\)"):
        frame.transform_masks(torch.zeros(2, 60, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
        frame.transform_boxes(torch.zeros(4))
    with pytest.raises(ValueError, match="at least 1 pixel"):
        SquareFrame.from_image_processor(image_processor(PAD), (0, 60))


def test_pil_images_of_every_mode_become_upright_rgb():
    gray = Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8))
    for mode in ("L", "RGB", "RGBA", "LA", "P", "CMYK", "YCbCr"):
        result = upright_rgb(gray.convert(mode))
        assert result.mode == "RGB"
        np.testing.assert_allclose(np.asarray(result)[..., 0], np.asarray(gray), atol=2)
    assert np.asarray(upright_rgb(gray.convert("1", dither=0)))[..., 0].tolist() == [[0, 0], [255, 255]]


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert upright_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([10, 20, 30] * 256)
    assert upright_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 3
    assert upright_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert upright_rgb(Image.open(tmp_path / "turned.jpg")).size == (2, 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "array", "F"])
def test_16_bit_and_float_pixels_are_scaled_not_clipped(mode):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    image = {
        "I;16": lambda: Image.fromarray(values),
        "I;16B": lambda: Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(values.astype(np.int32)),
        "array": lambda: values,
        "F": lambda: Image.fromarray((values / 65535).astype(np.float32)),
    }[mode]()
    assert np.asarray(upright_rgb(image))[..., 1].tolist() == [[0, 100], [200, 255]]


def test_arrays_and_tensors_of_every_shape():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for image in (
        pixels,
        pixels.astype(np.int64),
        pixels / 255,
        pixels.transpose(2, 0, 1),
        torch.tensor(pixels).permute(2, 0, 1),
        torch.tensor(pixels).permute(2, 0, 1) / 255,
        torch.tensor(pixels),
    ):
        assert np.array_equal(np.asarray(upright_rgb(image)), pixels)
    assert upright_rgb(pixels[..., :1]).size == upright_rgb(pixels[..., 0]).size == (7, 5)
    assert np.asarray(upright_rgb(pixels[..., 0] > 127)).max() == 255
    opaque = np.concatenate([pixels, np.full((5, 7, 1), 255, np.uint8)], axis=-1)
    assert np.array_equal(np.asarray(upright_rgb(opaque)), pixels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (0, 4)), "4 x 0 pixels"),
        (np.full((4, 4, 3), np.nan), "48 pixel values that are NaN"),
        (np.full((4, 4, 3), 2.0), "Divide by 255"),
        (np.full((4, 4, 3), 300), "Cast 16-bit"),
        (np.zeros((2, 4, 4, 3), np.uint8), "Pass a batch as a list"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \(5, 5, 2\)"),
        (np.zeros((4, 4, 3), complex), "complex128"),
        ("cat.jpg", "PIL.Image.open"),
    ],
)
def test_bad_images_are_refused_with_the_reason(image, message):
    with pytest.raises(ValueError, match=message):
        upright_rgb(image)
