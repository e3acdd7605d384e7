"""Predicting one 6000x4000 photo with 150 classes, as `segvit predict` does: time, and peak memory beyond the model.

python bench/large_photo.py            # writes bench/results/large_photo_<device>.json
python bench/large_photo.py --quick    # 1500x1000 pixels
"""

import tempfile
import time
from pathlib import Path

import harness
import numpy as np
from PIL import Image

import segvit
from segvit.data import read_image
from segvit.visualize import label_image, overlay

CLASSES, CROP = 150, 512


def picture(width: int, height: int) -> Image.Image:
    """A smooth random photo."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 100, width // 100, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    width, height = (1500, 1000) if arguments.quick else (6000, 4000)
    model = segvit.SegViT("vit_tiny_patch16_224", CLASSES, CROP).eval().to(harness.device())
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "photo.jpg")
        picture(width, height).save(photo, quality=90)
        segvit.predict(model, picture(CROP, CROP), mode="slide")  # what the first call allocates for good
        seconds = {}

        def predict_one() -> None:
            start = time.perf_counter()
            image = read_image(photo)
            labels = segvit.predict(model, image, mode="auto")[0].cpu().numpy()
            seconds["predict_s"] = time.perf_counter() - start
            label_image(labels, CLASSES).save(Path(folder, "photo.png"))
            overlay(image, labels, model.class_names).save(Path(folder, "photo_overlay.png"))
            seconds["with_files_s"] = time.perf_counter() - start

        peak = harness.peak_mib(predict_one)
    row = {"photo": f"{width}x{height}", "classes": CLASSES, "crop": CROP, "stride": CROP * 2 // 3}
    row |= seconds | {"peak_beyond_model_gb": peak and peak * 2**20 / 1e9}
    row["scores_of_whole_photo_gb"] = width * height * CLASSES * 4 / 1e9
    print(harness.table([row], list(row)))
    print(harness.write("large_photo", arguments.out, rows=[row]))


if __name__ == "__main__":
    main()
