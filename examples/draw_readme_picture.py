"""Draws the README's picture: objects of a photograph in keep order, and what an image costs in tokens.

The masks are drawn by hand, as ellipses and polygons; the order is computed.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from mask_llava_hf import ImageObjects
from mask_llava_hf.modeling.token_layout import TokenLayout
from mask_llava_hf.plotting import draw_objects
from mask_llava_hf.processing.objects.nested_order import keep_order


# Pixels of the photograph: ellipses as (left, top, right, bottom), polygons as corners; and a detector's would-be score
SHAPES = {
    "saucer": (0.93, [("ellipse", (78, 62, 480, 390))]),
    "cup": (
        0.97,
        [
            ("ellipse", (173, 18, 409, 210)),
            ("polygon", (173, 115, 178, 170, 200, 225, 240, 270, 285, 284, 330, 265, 370, 220, 400, 160, 409, 115)),
        ],
    ),
    "cup, seen twice": (0.41, [("ellipse", (173, 18, 409, 275))]),
    "coffee": (0.62, [("ellipse", (205, 95, 370, 193))]),
    "spoon": (
        0.88,
        [
            ("ellipse", (327, 247, 406, 326)),
            ("polygon", (372, 250, 386, 244, 425, 85, 420, 68, 400, 68, 398, 80, 411, 100, 385, 205)),
        ],
    ),
    "handle": (0.35, [("ellipse", (196, 228, 262, 308))]),
}
INK, PALE, CLS, PATCH, OBJECT = "#282828", "#C9C9C9", "#CC79A7", "#56B4E9", "#E69F00"
LAYOUTS = (("max_visual_tokens=57 (all)", 57), ("max_visual_tokens=42", 42), ("max_visual_tokens=29", 29))


def hand_drawn_objects(size: tuple[int, int]) -> ImageObjects:
    masks = []
    for _, shapes in SHAPES.values():
        canvas = Image.new("1", size)
        for kind, corners in shapes:
            getattr(ImageDraw.Draw(canvas), kind)(corners, fill=1)
        masks.append(np.asarray(canvas))
    scores = [score for score, _ in SHAPES.values()]
    objects = ImageObjects.from_masks(np.stack(masks), (size[1], size[0]), scores)
    return objects[keep_order(objects, "mask_iou")]


def draw_tokens(draw: ImageDraw.ImageDraw, left: int, top: int, cell: int, colours: list[str], columns: int) -> None:
    for index, colour in enumerate(colours):
        x, y = left + index % columns * cell, top + index // columns * cell
        draw.rectangle((x, y, x + cell - 3, y + cell - 3), fill=colour)


def compose(photo: Image.Image, objects: ImageObjects, keep: int) -> Image.Image:
    picture = draw_objects(photo, objects, keep=keep, min_side=1200)
    sheet = Image.new("RGB", (picture.width + 860, picture.height), "white")
    sheet.paste(picture)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    left = picture.width + 40
    draw.text((left, 20), "LLaVA-1.5: 576 tokens", INK, font)
    draw_tokens(draw, left, 64, 14, [PALE] * 576, 24)
    full = TokenLayout(use_cls_token=True, patch_grid_size=6, max_object_tokens=20)
    x, y = left + 400, 20
    for title, budget in LAYOUTS:
        layout = full.reduced(max_visual_tokens=budget)
        draw.text((x, y), title, INK, font)
        draw_tokens(draw, x, y + 44, 24, [CLS], 1)
        draw_tokens(draw, x + 34, y + 44, 24, [PATCH] * layout.num_patch_tokens, layout.patch_grid_size)
        draw_tokens(draw, x + 194, y + 44, 24, [OBJECT] * layout.max_object_tokens, 5)
        y += 220
    for row, (colour, text) in enumerate(
        [(CLS, "global: 1 CLS token"), (PATCH, "local: pooled patches"), (OBJECT, "one token per object")]
    ):
        draw.rectangle((left, 460 + 44 * row, left + 21, 481 + 44 * row), fill=colour)
        draw.text((left + 36, 454 + 44 * row), text, INK, font)
    note = f"Tags: keep order. Coloured: kept by\nmax_object_tokens={keep}; grey: dropped."
    draw.multiline_text((left, 640), note, INK, font, spacing=10)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/objects_and_tokens.jpg"))
    arguments = parser.parse_args()
    photograph = Image.fromarray(data.coffee())
    sheet = compose(photograph, hand_drawn_objects(photograph.size), keep=4)
    sheet.resize((sheet.width * 2 // 3, sheet.height * 2 // 3)).save(arguments.output, quality=88)
