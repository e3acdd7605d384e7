"""Draws the pictures of these pages: python docs/make_pictures.py (two small trainings, a minute each on two cores)."""

from pathlib import Path

import torch
from PIL import Image

import segvit
from segvit.curves import curves
from segvit.data import Shapes
from segvit.demo import SIZE, small_model, train_small
from segvit.explanation import Explanation

IMAGES = Path(__file__).parent / "images"
STEPS, SEED = 220, 0
COLOURS = 256  # of a picture's file


def trained(**options) -> tuple[segvit.SegViT, list[dict]]:
    torch.manual_seed(SEED)
    model = small_model(**options)
    return model, train_small(model, STEPS, SEED)


def worst(model: segvit.SegViT, data: Shapes) -> tuple[Explanation, tuple[int, int]]:
    """The image with the largest patch of wrong pixels, and a pixel in the middle of it."""
    found = (-1, None, None)
    for image, labels in (data[i] for i in range(40)):
        explanation = segvit.explain(model, image, top=4)
        wrong = (explanation.labels != labels) & (labels != Shapes.ignore_index)
        around = torch.nn.functional.avg_pool2d(wrong[None].float(), 9, 1, 4, count_include_pad=False)[0]
        size, place = around.flatten().max(0)
        if size > found[0]:
            found = (size, explanation, divmod(int(place), labels.shape[1]))
    return found[1:]


def save(picture: Image.Image, name: str) -> None:
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    print(IMAGES / name)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    unseen = Shapes(40, SIZE, seed=SEED + 2)
    model, records = trained()
    explanation, pixel = worst(model, unseen)
    save(explanation.picture(side=2 * SIZE, point=pixel), "explain.png")
    save(curves({"demo": records}), "curves.png")
    model, _ = trained(shrink="edge")
    save(segvit.explain(model, unseen[0][0], top=1).picture(side=2 * SIZE), "edge.png")


if __name__ == "__main__":
    main()
