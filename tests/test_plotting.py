import numpy as np
import pytest
import torch
from PIL import Image

from mask_llava_hf import ImageObjects
from mask_llava_hf.plotting import draw_objects


GREY_IMAGE = (128, 128, 128)


def squares(image_hw=(600, 800), number=3) -> ImageObjects:
    """Squares of 100 pixels beside each other, at the height of 200."""
    masks = torch.zeros(number, *image_hw, dtype=torch.bool)
    for i in range(number):
        masks[i, 200:300, 50 + 150 * i : 150 + 150 * i] = True
    return ImageObjects.from_masks(masks, image_hw)


def image(image_hw=(600, 800)) -> Image.Image:
    return Image.new("RGB", (image_hw[1], image_hw[0]), GREY_IMAGE)


def centre(i):
    return (100 + 150 * i, 250)


def saturation(colour):
    return max(colour) - min(colour)


def test_kept_objects_are_coloured_and_dropped_ones_are_not():
    picture = draw_objects(image(), squares(), keep=2)
    assert (picture.size, picture.mode) == ((800, 600), "RGB")
    first, second, third = (picture.getpixel(centre(i)) for i in range(3))
    assert saturation(first) > 30 and saturation(second) > 30 and first != second
    assert third == GREY_IMAGE
    outline = picture.getpixel((350 + 40, 200))
    assert saturation(outline) == 0 or outline == GREY_IMAGE  # a dash or a gap
    assert len({picture.getpixel((x, 200)) for x in range(380, 448)}) > 1  # dashes


def test_pixels_away_from_objects_stay_as_they_are():
    pixels = np.asarray(draw_objects(image(), squares()))
    assert (pixels[400:] == 128).all() and (pixels[:150] == 128).all()


@pytest.mark.parametrize("keep", [0, 1, 3, 99, None])
def test_any_keep(keep):
    picture = draw_objects(image(), squares(), keep=keep)
    coloured = [saturation(picture.getpixel(centre(i))) > 30 for i in range(3)]
    assert coloured == [i < (3 if keep is None else keep) for i in range(3)]


def test_small_masks_lie_on_large_ones_whatever_their_order():
    masks = torch.zeros(2, 600, 800, dtype=torch.bool)
    masks[0, 250:350, 350:450] = True
    masks[1, 50:550, 50:750] = True
    objects = ImageObjects.from_masks(masks, (600, 800))
    one, other = draw_objects(image(), objects), draw_objects(image(), objects[[1, 0]])
    for picture in (one, other):
        assert picture.getpixel((400, 300)) != picture.getpixel((200, 400))
    # One layer of colour, never two: the inner mask looks as it does alone
    assert one.getpixel((400, 300)) == draw_objects(image(), objects[:1]).getpixel((400, 300))


def test_many_masks_do_not_hide_the_image():
    masks = torch.ones(30, 600, 800, dtype=torch.bool)
    picture = np.asarray(Image.fromarray(np.indices((600, 800)).sum(0).astype(np.uint8)).convert("RGB"))
    drawn = np.asarray(draw_objects(picture, ImageObjects.from_masks(masks, (600, 800))))
    original, shown = picture[300:500, 200:500, 0].ravel(), drawn[300:500, 200:500, 0].ravel()
    assert np.corrcoef(original, shown)[0, 1] > 0.99


def test_boxes_without_masks():
    objects = squares()
    objects = ImageObjects(objects.boxes_xyxy, objects.scores, objects.image_hw)
    picture = draw_objects(image(), objects, keep=1)
    assert picture.getpixel(centre(0)) == GREY_IMAGE
    assert saturation(picture.getpixel((100, 200))) > 30
    assert picture.getpixel((100, 299)) == picture.getpixel((100, 200))  # the last row of the box, not beyond
    assert picture.getpixel((100, 300)) == GREY_IMAGE


def test_no_objects_give_a_copy_of_the_image():
    given = image()
    picture = draw_objects(given, ImageObjects.empty((600, 800)))
    assert picture is not given and np.array_equal(np.asarray(picture), np.asarray(given))


def test_the_given_image_and_objects_are_not_painted_on():
    given, objects = image(), squares()
    masks = objects.masks.clone()
    draw_objects(given, objects)
    assert given.getcolors() == [(600 * 800, GREY_IMAGE)] and torch.equal(objects.masks, masks)


def test_small_images_are_enlarged_unless_told_otherwise(photo):
    objects = ImageObjects.from_boxes([[10, 5, 50, 45], [60, 20, 97, 61]], (61, 97))
    assert draw_objects(photo, objects).size == (512, 322)
    assert draw_objects(photo, objects, min_side=0).size == (97, 61)
    assert draw_objects(photo, objects, min_side=1000).size == (1000, 629)


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 900), (700, 2), (3, 3)])
@pytest.mark.parametrize("min_side", [0, 64])
def test_extreme_sizes(image_hw, min_side):
    masks = torch.ones(2, *image_hw, dtype=torch.bool)
    picture = draw_objects(image(image_hw), ImageObjects.from_masks(masks, image_hw), keep=1, min_side=min_side)
    assert max(picture.size) == max(min_side, *image_hw)


def test_lines_grow_with_the_image():
    def line_width(factor):
        image_hw = (600 * factor, 800 * factor)
        boxes = [[100 * factor, 100 * factor, 700 * factor, 500 * factor]]
        column = np.asarray(draw_objects(image(image_hw), ImageObjects.from_boxes(boxes, image_hw)))[:, 400 * factor]
        return int((column != 128).any(-1).sum()) / 2

    assert line_width(4) == pytest.approx(4 * line_width(1), rel=0.2)


def test_arrays_and_rotated_pictures_are_taken_as_the_processor_takes_them():
    array = np.full((600, 800), 128, dtype=np.uint8)
    assert np.array_equal(np.asarray(draw_objects(array, squares())), np.asarray(draw_objects(image(), squares())))
    lying = Image.new("RGB", (600, 800), GREY_IMAGE)
    lying.getexif()[0x0112] = 6  # a camera held upright
    assert draw_objects(lying, squares()).size == (800, 600)


def test_objects_of_another_image_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"600 x 800 .* 800 x 600"):
        draw_objects(image((800, 600)), squares())


@pytest.mark.parametrize("keep", [-1, 1.5, True])
def test_keep_is_checked(keep):
    with pytest.raises(ValueError, match="`keep`"):
        draw_objects(image(), squares(), keep=keep)
