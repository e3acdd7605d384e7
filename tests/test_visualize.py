import numpy as np
import pytest
from PIL import Image, ImageFont

from segvit import visualize
from segvit.visualize import WRONG, colourise, comparison, label_image, mistakes, overlay, palette, picture


def test_colours_differ():
    for K in (2, 19, 60):
        assert len({tuple(c) for c in palette(K)}) == K
    near = np.abs(palette(19)[:, None].astype(int) - palette(19)[None]).sum(-1) + 999 * np.eye(19, dtype=int)
    assert near.min() > 24


def test_colourise_and_label_images(tmp_path):
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    colours = colourise(labels, 3)
    assert (colours[0, 1] == palette(3)[1]).all()
    assert (colours[1, 1] == 0).all()
    label_image(labels, 3).save(tmp_path / "a.png")
    stored = Image.open(tmp_path / "a.png")
    assert (np.asarray(stored) == labels).all()
    assert (np.asarray(stored.convert("RGB"))[:1] == colours[:1]).all()
    assert label_image(labels, 256).getpalette()[:3] == palette(256)[0].tolist()
    many = np.array([[300, 2]], np.int16)
    label_image(many, 400).save(tmp_path / "b.png")
    assert np.asarray(Image.open(tmp_path / "b.png")).tolist() == [[300, 2]]


def test_overlay_has_the_image_and_a_legend_beside_it():
    labels = np.zeros((100, 60), np.uint8)
    labels[50:] = 2
    picture = overlay(Image.new("RGB", (60, 100), "white"), labels, ["sky", "road", "tree"])
    assert picture.height == 100
    assert picture.width > 60
    array = np.asarray(picture)
    for n, present in ((0, True), (1, False), (2, True)):
        assert bool((array[:, 60:] == palette(3)[n]).all(-1).any()) == present


def test_comparison_has_a_row_a_sample():
    rows = [(Image.new("RGB", (20, 10)), np.zeros((10, 20), int), np.full((10, 20), 255))] * 3
    picture = comparison(rows, ["a"], side=60)
    assert picture.width > 3 * 60
    assert 3 * 30 < picture.height < 3 * 60
    tall = (Image.new("RGB", (10, 30)), np.zeros((30, 10), int), np.zeros((30, 10), int))
    assert comparison([*rows, tall], ["a"], side=60).height == picture.height + 60 + 8
    assert comparison([row[:2] for row in rows], ["a"], side=60).width < picture.width


def test_a_legend_of_many_classes_fits_beside_a_small_picture():
    labels = np.arange(150).reshape(10, 15).astype(np.uint8)
    picture = overlay(Image.new("RGB", (15, 10)), labels, [f"class {i}" for i in range(150)])
    colours = np.asarray(picture)[:, 15:].reshape(-1, 3)
    shown = {tuple(c) for c in colours}
    assert {tuple(c) for c in palette(150)} <= shown
    assert picture.width < 6 * picture.height


def test_a_legend_grows_with_the_picture():
    names, labels = ["sky"], np.zeros((2400, 2400), np.uint8)
    large = overlay(Image.new("RGB", (2400, 2400)), labels, names)
    small = overlay(Image.new("RGB", (800, 800)), labels[:800, :800], names)
    assert large.width - 2400 > 2.5 * (small.width - 800)


def test_a_picture_of_any_channels_and_numbers():
    ramp = np.linspace(-2.0, 6.0, 9, dtype=np.float32).reshape(1, 3, 3)
    ramp[0, 0, 1] = np.nan
    grey = np.asarray(picture(ramp))
    assert (grey[..., 0] == grey[..., 2]).all()
    assert grey[..., 0].ravel().tolist() == [0, 0, *(round(255 * i / 8) for i in range(2, 9))]
    many = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    assert (np.asarray(picture(many)) == many[:3].transpose(1, 2, 0)).all()  # bytes stay as they are
    assert (np.asarray(picture(many[:2])) == many[0][..., None]).all()
    wide = np.array([[[-30000, 30000]]], np.int16)
    assert np.asarray(picture(wide))[0, :, 0].tolist() == [0, 255]


def test_mistakes_are_red_over_grey_and_thin_ones_stay_visible():
    wrong = np.zeros((80, 40), bool)
    wrong[:40] = True
    wrong[60] = True  # one row of the four that a pixel shows
    shown = np.asarray(mistakes(Image.new("RGB", (10, 20), (0, 90, 0)), wrong)).astype(int)
    assert (shown[:10] == WRONG).all()
    assert np.ptp(shown[19], axis=-1).max() == 0
    assert 40 < shown[15, 0, 0] - shown[15, 0, 1] < WRONG[0]


def test_without_a_font_of_the_system_pillows_own_serves(monkeypatch):
    monkeypatch.setattr(visualize, "FONTS", ("no_such_font.ttf",))
    visualize.text_font.cache_clear()
    assert visualize.text_font(13).getname() == ImageFont.load_default(13).getname()
    visualize.text_font.cache_clear()


def test_letters_beyond_ascii_are_no_boxes():
    font = visualize.text_font(13)
    if font.getname() == ImageFont.load_default(13).getname():
        pytest.skip("this system has none of the fonts")
    masks = {bytes(font.getmask(letter)) for letter in "ä\u0416é\uffff"}
    assert len(masks) == 4
