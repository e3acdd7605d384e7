import time

import numpy as np
import pytest
from PIL import Image

from segvit.data import check_data, open_data
from segvit.data.check import judge


def make(root, maps, images=None, classes=("sky", "road"), suffix=".png"):
    """A folder of label maps and random images."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i, labels in enumerate(maps):
        image = Image.fromarray(rng.integers(0, 256, (*np.shape(labels), 3), np.uint8))
        image.save(root / "images" / f"{i}.png")
        Image.fromarray(np.asarray(labels, np.uint8)).save(root / "labels" / f"{i}{suffix}")
    (root / "classes.txt").write_text("\n".join(classes))
    return root


def report(root, alone=True, **options):
    found = check_data(open_data(root, **options), "train", progress=False)
    if alone:
        judge(found)
    return found


def full(*values):
    """40x40 pixels in equal stripes of these labels."""
    return np.repeat(values, -(-40 // len(values)))[:40].repeat(40).reshape(40, 40)


def test_what_is_there_is_counted(tmp_path):
    root = make(tmp_path, [full(0, 1), full(0, 255)])
    Image.new("L", (40, 40)).save(root / "images" / "0.png")
    found = report(root)
    assert found.images == 2
    assert found.sizes == {"40x40": 2}
    assert found.modes == {"RGB": 1, "L": 1}
    assert found.pixels.tolist() == [1600, 800]
    assert found.images_with.tolist() == [2, 1]
    assert found.ignored == 800
    assert not found.problems
    assert found.hints == ["images have different channels; all are read as RGB"]
    value = found.to_dict()
    assert value["classes"]["sky"] == {"share": 0.5, "pixels": 1600, "images": 2}
    assert value["ignored_share"] == 0.25
    text = found.text()
    assert "sky       50.0 %       2" in text
    assert "ignored   25.0 %" in text


@pytest.mark.parametrize(
    ("maps", "classes", "problem", "hint"),
    [
        ([full(0, 255)], ("sky", "road"), "labels are 0 and 255: a binary mask", None),
        ([full(0, 255)], ("road",), "labels are 0 and 255: a binary mask", None),
        ([full(255)], ("sky", "road"), "every label is ignored (255)", None),
        ([full(1), full(1)], ("sky", "road"), "'road' is the only class that occurs", None),
        ([full(1, 2), full(1, 2)], ("sky", "road"), "label 2 is no class", "0 never occurs? --reduce_zero_label"),
        ([full(0, 1, 2)], ("sky", "road"), "0.png: label 2 is no class", "is 0 no class? --reduce_zero_label"),
        ([np.arange(1600).reshape(40, 40) % 250], ("sky", "road"), "and 243 more unknown", "blurred, resized or saved"),
        ([full(0, 1)], ("sky", "road", "tree"), None, "classes that never occur: tree"),
        ([full(0, 1, 255, 255, 255)], ("sky", "road"), None, "more pixels are ignored than labelled"),
        ([np.array([[0, 1]])], ("sky", "road"), None, "images under 32 pixels: 2x1"),
    ],
)
def test_what_would_ruin_a_training_is_a_problem_and_what_looks_odd_a_hint(tmp_path, maps, classes, problem, hint):
    found = report(make(tmp_path, maps, classes=classes))
    for texts, wanted in ((found.problems, problem), (found.hints, hint)):
        assert any(wanted in text for text in texts) if wanted else not texts


def test_a_mapped_binary_mask_is_fine(tmp_path):
    root = make(tmp_path, [full(0, 255)])
    assert not report(root, label_map={255: 1}).problems


def test_files_that_cannot_be_used_are_named_all_together(tmp_path):
    root = make(tmp_path, [full(0, 1)] * 4)
    (root / "images" / "0.png").write_bytes((root / "images" / "0.png").read_bytes()[:700])
    Image.new("L", (9, 9)).save(root / "labels" / "1.png")
    Image.new("RGB", (40, 40)).save(root / "labels" / "2.png")
    found = report(root)
    assert len(found.problems) == 3
    assert "0.png: not a readable image" in found.problems[0]
    assert "1.png: the label map is 9x9, its image 40x40" in found.problems[1]
    assert "2.png: a label image has one channel" in found.problems[2]
    for i in range(4, 12):
        Image.new("L", (9, 9)).save(root / "labels" / f"{i}.png")
        Image.new("RGB", (40, 40)).save(root / "images" / f"{i}.png")
    assert report(root).problems[-1] == "and 6 more files"


def test_a_photo_that_was_labelled_without_its_rotation_says_so(tmp_path):
    root = make(tmp_path, [np.zeros((40, 60), int)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(root / "images" / "0.png", exif=exif)
    assert (
        report(root)
        .problems[0]
        .endswith("its image 40x60; it lacks the image's EXIF rotation: turn it, or strip the tag")
    )


def test_parts_are_compared(tmp_path):
    train, val = make(tmp_path / "a", [full(0)]), make(tmp_path / "b", [full(0), full(0, 1)])
    reports = report(train, alone=False), report(val, alone=False)
    judge(*reports)
    assert "classes that occur here but never in train: road" in reports[1].hints
    assert any("1 images are in train too, so mIoU will look too good; first" in hint for hint in reports[1].hints)


@pytest.mark.parametrize("labels", [full(0), full(0, 255)])
def test_a_val_part_of_one_class_is_no_problem(tmp_path, labels):
    train, val = make(tmp_path / "a", [full(0, 1)]), make(tmp_path / "b", [labels])
    reports = report(train, alone=False), report(val, alone=False)
    judge(*reports)
    assert not reports[0].problems + reports[1].problems


def test_new_classes_alone_need_a_background_and_are_still_compared_with_val(tmp_path):
    train, val = make(tmp_path / "a", [full(1, 255)]), make(tmp_path / "b", [full(1, 255), full(0, 1)])
    for negative, problems in ((False, 1), (True, 0)):
        reports = report(train, alone=False), report(val, alone=False)
        judge(*reports, new=range(1, 2), negative=negative)
        assert len(reports[0].problems) == problems
        assert not any("never" in hint for found in reports for hint in found.hints), "old classes have no labels there"
        assert any("1 images are in train too" in hint for hint in reports[1].hints)
    reports = report(make(tmp_path / "c", [full(0)]), alone=False), report(val, alone=False)
    judge(*reports, new=range(1, 2))
    assert "no pixel has a label of a new class (road)" in reports[0].problems


def test_ctrl_c_does_not_wait_for_all_files(tmp_path, monkeypatch):
    data = open_data(make(tmp_path, [full(0, 1)]))
    data.pairs *= 400
    seen = []

    def slow(dataset, i):
        seen.append(i)
        time.sleep(0.01)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("segvit.data.check._inspect", slow)
    monkeypatch.setattr("segvit.data.check.tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_data(data)
    assert len(seen) < 100
