"""Images of many channels, of 16 bits and of floats: files, statistics, augmentation, and the whole command."""

import json
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision import tv_tensors

import segvit
from segvit.cli import main
from segvit.data import channel_statistics, check_data, open_data, read_image, to_picture
from segvit.data.images import to_tensor
from segvit.data.moments import Moments, image_moments, input_options
from segvit.data.transforms import RandomScaleCrop, TrainTransform
from segvit.evaluation import evaluate
from segvit.inference import normalise

CLASSES = ("field", "water")
TINY = ["--backbone", "test_vit", "--pretrained", "false", "--crop", "[32,32]", "--batch_size", "2"]


def pixels(dtype="uint16", channels=7, size=(40, 56), seed=0):
    """Random [H, W, C] whose channels lie apart."""
    rng = np.random.default_rng(seed)
    share = rng.random((*size, channels)) * np.linspace(0.2, 1, channels)
    full = {"uint8": 255, "uint16": 65535, "int16": 32767}.get(dtype)
    return (share * full).astype(dtype) if full else (share * 1000 - 300).astype(dtype)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        pixelwise = "contig" if array.ndim == 3 and len(array) != 7 else None  # else a page a band
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig=pixelwise, metadata=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train (6) and val (2) images of seven 16-bit channels, whose classes differ in the third."""
    root = tmp_path_factory.mktemp("bands")
    for part, count in (("train", 6), ("val", 2)):
        for i in range(count):
            image = pixels(seed=i + 10 * (part == "val"))
            labels = (np.add.outer(np.arange(40), np.arange(56)) % 40 > 20).astype(np.uint8)
            image[..., 2] = 20000 + 30000 * labels.astype(int)
            write(root / part / "images" / f"{i}.npy", image if i % 2 else np.moveaxis(image, 2, 0))
            (root / part / "labels").mkdir(exist_ok=True)
            Image.fromarray(labels).save(root / part / "labels" / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".TIFF"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32", "float64"])
@pytest.mark.parametrize("first", [False, True])
def test_files_come_back_as_they_were_written(suffix, dtype, first, tmp_path):
    array, path = pixels(dtype), tmp_path / f"a{suffix}"
    write(path, np.ascontiguousarray(np.moveaxis(array, 2, 0)) if first else array)
    got = read_image(path, 7)
    assert np.array_equal(got, array.astype({"int16": "uint16"}.get(dtype, got.dtype)))
    tensor = to_tensor(got, 7)
    assert tensor.shape == (7, 40, 56)
    assert tensor.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    want = array.astype(np.float64).transpose(2, 0, 1) / (65535 if "int16" in dtype else 1)
    np.testing.assert_array_equal(tensor.numpy(), want.astype(tensor.numpy().dtype))


def test_bytes_in_the_other_order_and_one_channel_for_three(tmp_path):
    array = pixels("uint16", 1)[..., 0]
    write(tmp_path / "a.npy", array.astype(">u2"))
    Image.fromarray(array).save(tmp_path / "a.png")
    write(tmp_path / "a.tif", array)
    for name in ("a.npy", "a.png", "a.tif"):
        assert np.array_equal(read_image(tmp_path / name, 1)[..., 0], array)
        assert torch.equal(to_tensor(read_image(tmp_path / name)), to_tensor(array))
    assert to_tensor(array).shape == (3, 40, 56)
    assert torch.equal(to_tensor(Image.fromarray(array)), to_tensor(array))


def test_pages_are_bands_and_16_bit_colours_keep_their_bits(tmp_path):
    array = pixels("uint8", 5)
    tifffile.imwrite(tmp_path / "pages.tif", np.moveaxis(array, 2, 0), photometric="minisblack", planarconfig=None)
    assert np.array_equal(read_image(tmp_path / "pages.tif", 5), array)
    colours = pixels("uint16", 3)
    tifffile.imwrite(tmp_path / "rgb.tif", colours, photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "rgb.tif"), colours)  # Pillow would drop eight bits in silence
    pages = pixels("uint8", 3)
    tifffile.imwrite(tmp_path / "grey.tif", np.moveaxis(pages, 2, 0), photometric="minisblack", metadata=None)
    assert np.array_equal(read_image(tmp_path / "grey.tif"), pages)  # Pillow would see the first page alone


def test_8_bit_tiff_files_need_no_tifffile_and_others_say_so(tmp_path, monkeypatch):
    write(tmp_path / "bands.tif", pixels())
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK"):
        Image.new("RGB", (5, 4), (200, 100, 0)).convert(mode).save(tmp_path / "a.tif")
        assert read_image(tmp_path / "a.tif").mode == "RGB"
        assert read_image(tmp_path / "a.tif", 1).mode == "L"
    with pytest.raises(RuntimeError, match=r"bands\.tif: TIFF files of other than 8-bit .*: pip install tifffile"):
        read_image(tmp_path / "bands.tif", 7)


def test_pictures_of_four_channels(tmp_path):
    array = pixels("uint8", 4)
    Image.fromarray(array, "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(to_tensor(read_image(tmp_path / "a.png", 4), 4), array.transpose(2, 0, 1))
    assert read_image(tmp_path / "a.png").mode == "RGB"


NAN = pixels("float32")
NAN[3, 4, 5] = np.nan


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("a.npy", np.zeros((40, 56, 5)), r"the shape \(40, 56, 5\) does not fit 7 channels, .* --channels"),
        ("a.tif", np.zeros((40, 56, 5)), r"the shape \(40, 56, 5\) does not fit 7 channels"),
        ("a.npy", np.zeros((40, 56)), r"the shape \(40, 56\) does not fit 7 channels"),
        ("a.npy", np.zeros((7, 40, 7)), r"the shape \(7, 40, 7\) may be \[H, W, C\] or \[C, H, W\]"),
        (
            "a.npy",
            np.zeros((2, 7, 40, 56)),
            r"an image is \[H, W\], .*, this array has the shape \(2, 7,",
        ),
        ("a.npy", np.zeros((0, 56, 7)), "an image is"),
        ("a.npy", np.zeros((4, 5, 7), np.int32), "values are int32; save them as uint8, uint16 or floats"),
        ("a.tif", np.zeros((40, 50, 7), np.uint32), "values are uint32"),
        ("a.npy", np.zeros((4, 5, 7), bool), "values are bool"),
        ("a.npy", np.zeros((4, 5, 7), np.complex64), "values are complex64"),
        ("a.npy", np.full((4, 5, 7), -3, np.int16), "int16 with values down to -3"),
        ("a.npy", NAN, "NaN or infinity among its values"),
        ("a.tif", NAN, "NaN or infinity among its values"),
        ("a.npy", np.full((4, 5, 7), np.inf), "NaN or infinity"),
        ("a.npy", np.full((4, 5, 7), 1e300), "NaN or infinity"),  # beyond float32
        ("a.npy", np.full((4, 5, 7), None), r"not a readable \.npy file"),  # an array of objects is a pickle
        ("a.npy", b"no array", r"not a readable \.npy file"),
        ("a.npy", b"", r"not a readable \.npy file"),
        ("a.tif", b"no image", "not a readable TIFF file"),
        ("a.npy", None, "no such file"),
        ("a.tif", None, "no such file"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line_that_names_the_file(name, array, message, tmp_path):
    path = tmp_path / name
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None and array.dtype == object:
        np.save(path, array, allow_pickle=True)
    elif array is not None:
        write(path, array)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}: {message}") as caught:
        read_image(path, 7)
    assert "\n" not in str(caught.value)


def test_an_archive_and_a_truncated_file_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", pixels())
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy: an archive of arrays"):
        read_image(tmp_path / "a.npy", 7)
    for name in ("b.npy", "b.tif"):
        write(tmp_path / name, pixels())
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:4000])
        with pytest.raises(ValueError, match=rf"{name}: not a readable"):
            read_image(tmp_path / name, 7)


@pytest.mark.parametrize("name", ["b.png", "b.npy", "b.tif"])
def test_8_bits_and_the_same_in_16_are_the_same_to_a_model(name, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    sixteen = array.astype(np.uint16) * 257
    model = segvit.SegViT("test_vit", 2, 32, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3]).eval()
    path = tmp_path / name
    if path.suffix == ".png":
        Image.fromarray(array).save(path)
    else:
        write(path, sixteen)
    want = ((torch.from_numpy(array).double() / 255 - model.mean.double()) / model.std.double()).permute(2, 0, 1)
    got = normalise(model, to_tensor(read_image(path)))
    assert (got - want).abs().max() < 2e-6  # values up to 6 in float32
    labels = segvit.predict(model, array, output="scores")
    for images in (sixteen, path, (array / 255).astype(np.float32), array / 255, [sixteen]):
        torch.testing.assert_close(segvit.predict(model, images, output="scores"), labels)
    assert not torch.allclose(segvit.predict(model, array.astype(np.float32), output="scores"), labels)  # as they are


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float64"])
def test_moments_of_parts_are_those_of_the_whole(dtype, monkeypatch):
    monkeypatch.setattr("segvit.data.moments.STRIP", 56 * 7 * 9)  # strips of nine rows, the last of four
    arrays = [pixels(dtype, seed=seed, size=size) for seed, size in enumerate([(40, 56), (9, 80), (30, 56)])]
    full = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    values = np.concatenate([array.reshape(-1, 7) for array in arrays]).astype(np.float64) / full
    read = [array.astype(np.float32) if full == 1 else array for array in arrays]
    moments = sum((image_moments(array) for array in read), Moments())
    mean, std = moments.lists(7)
    assert moments.count == len(values)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-6)
    picture = Image.fromarray(pixels("uint8", 3))
    for got, want in zip(image_moments(picture).lists(3), image_moments(np.asarray(picture)).lists(3)):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_large_mean_does_not_drown_the_spread():
    array = (1e4 + np.random.default_rng(0).normal(0, 0.5, (100, 100, 2))).astype(np.float32)
    total = sum((image_moments(array + np.float32(i)) for i in (0, 1)), Moments())
    want = np.stack([array, array + 1]).std((0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(total.lists(2)[1], want, rtol=1e-6)


def test_statistics_of_a_set(folder, monkeypatch):
    data = open_data(folder, "train", channels=7)
    values = np.stack([read_image(path, 7) for path, _ in data.pairs]) / 65535
    mean, std = channel_statistics(data)
    np.testing.assert_allclose(mean, values.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, values.std((0, 1, 2)), rtol=1e-6)
    mean, _ = channel_statistics(data, most=3)  # the first, the last and one between
    np.testing.assert_allclose(mean, values[[0, 2, 5]].mean((0, 1, 2)), rtol=1e-6)
    assert input_options(data)["in_chans"] == 7


def test_photos_keep_the_statistics_of_the_backbone(tmp_path):
    for name, array, own in (
        ("a.png", pixels("uint8", 3), False),
        ("a.npy", pixels("uint8", 3), False),
        ("a.npy", pixels("uint16", 3), True),
        ("a.tif", pixels("float32", 3), True),
        ("a.png", pixels("uint16", 1)[..., 0], True),
    ):
        path = tmp_path / name
        Image.fromarray(array).save(path) if name == "a.png" else write(path, array)
        Image.new("L", (56, 40)).save(tmp_path / "label.png")
        data = segvit.data.SegmentationDataset([(path, tmp_path / "label.png")], CLASSES)
        assert bool(input_options(data)) == own


def test_a_channel_that_never_changes_can_be_divided_by(tmp_path):
    """Its float64 sums do not cancel exactly: 0.1 has no exact mean."""
    pairs = []
    for i, size in enumerate([(40, 56), (33, 7), (5, 11)]):
        np.save(tmp_path / f"{i}.npy", np.full((*size, 7), [0, 0.1, 0.3, 1e4 / 3, -0.7, 1e-9, i], np.float32))
        pairs.append((tmp_path / f"{i}.npy", tmp_path))
    mean, std = channel_statistics(segvit.data.SegmentationDataset(pairs, CLASSES, channels=7))
    np.testing.assert_allclose(mean[:6], np.float32([0, 0.1, 0.3, 1e4 / 3, -0.7, 1e-9]), rtol=1e-12)
    assert std[:6] == [1.0] * 6
    assert 0.1 < std[6] < 0.9
    for grey in range(256):
        assert image_moments(Image.new("L", (7, 11), grey)).lists(1)[1] == [0]


@pytest.mark.parametrize("size", [(16, 24), (64, 64), (50, 20)])
def test_augmentation_moves_seven_channels_and_labels_together(size):
    """Every channel carries the labels, scaled by its number, so that any misalignment shows."""
    labels = torch.zeros(40, 60, dtype=torch.long)
    labels[10:30, 20:45] = 1
    labels[:, 50:] = 2
    weight = torch.arange(1.0, 8)[:, None, None]
    mean, std = [10.0 * i for i in range(7)], [2.0] * 7
    transform = TrainTransform(size, mean, std, scale=(1.0, 1.0))
    flipped = 0
    for _ in range(20):
        x, y = transform(labels * weight, labels)
        assert x.shape == (7, *size)
        inside = y != 255
        want = (y * weight - torch.tensor(mean)[:, None, None]) / 2
        torch.testing.assert_close(x[:, inside], want[:, inside])
        assert (x[:, ~inside] == 0).all()  # padding is the mean
        flipped += int(y[inside].tolist() != sorted(y[inside].tolist()))
    assert flipped


def test_scaling_blends_floats_and_not_labels():
    torch.manual_seed(1)
    image, labels = torch.zeros(7, 40, 60), torch.zeros(40, 60, dtype=torch.long)
    image[:, :, 30:], labels[:, 30:] = 1, 7
    x, y = RandomScaleCrop((60, 90), (1.5, 1.5))(tv_tensors.Image(image), tv_tensors.Mask(labels))
    assert set(y.unique().tolist()) == {0, 7}
    assert ((x > 0) & (x < 1)).any()
    assert ((x[0] > 0.5) == (y == 7)).float().mean() > 0.99


def test_colours_are_distorted_in_photos_alone():
    labels = torch.zeros(8, 8, dtype=torch.long)
    for image, changes in (
        (torch.full((3, 8, 8), 100, dtype=torch.uint8), True),
        (torch.full((3, 8, 8), 100 / 255), False),
        (torch.full((7, 8, 8), 100, dtype=torch.uint8), False),
    ):
        transform = TrainTransform((8, 8), [0.0] * len(image), [1.0] * len(image), scale=(1.0, 1.0))
        changed = [not torch.allclose(transform(image, labels)[0], torch.tensor(100 / 255)) for _ in range(10)]
        assert any(changed) == changes


def test_checking_reports_kinds_and_statistics(folder, tmp_path):
    data = open_data(folder, "train", channels=7)
    report = check_data(data, "train", progress=False)
    assert not report.problems
    assert report.modes == {"uint16 x 7": 6}
    assert report.sizes == {"56x40": 6}
    assert (report.mean, report.std) == channel_statistics(data)
    assert report.to_dict()["mean"] == report.mean
    assert f"std of each channel  {report.std[0]:.4g}, " in report.text()
    assert "channels uint16 x 7 (6)" in report.text()
    other = [(tmp_path / name, data.pairs[0][1]) for name in ("a.npy", "b.npy", "c.npy")]
    still = pixels("float32")
    still[..., 3] = 0
    write(tmp_path / "a.npy", still)
    write(tmp_path / "b.npy", np.zeros((40, 56, 7), np.uint8))
    write(tmp_path / "c.npy", NAN)
    mixed = check_data(data.subset(other), "train", progress=False)
    assert "channels that never change: 3" in mixed.hints
    assert any("images are stored differently" in hint for hint in mixed.hints)
    assert mixed.problems == [f"{tmp_path / 'c.npy'}: NaN or infinity among its values; replace them first"]


def test_a_picture_is_stretched_band_by_band():
    array = pixels("uint16")
    array[..., 1] = np.arange(40)[:, None] + 1000  # a narrow band far from zero
    array[..., 2] = 5
    picture = np.asarray(to_picture(array))
    assert picture.shape == (40, 56, 3)
    assert picture.dtype == np.uint8
    assert (picture[0, 0, 1], picture[-1, 0, 1]) == (0, 255)
    assert abs(int(picture[20, 0, 1]) - 131) < 5
    assert (picture[..., 2] == 0).all()
    grey = np.asarray(to_picture(array[..., :2]))
    assert np.array_equal(grey[..., 0], picture[..., 0])
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_evaluation_sees_what_prediction_sees(folder):
    data, seen = open_data(folder, "val", channels=7), []
    mean, std = channel_statistics(data)
    model = segvit.SegViT("test_vit", 2, 32, in_chans=7, mean=mean, std=std).eval()
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    segvit.predict(model, [path for path, _ in data.pairs])
    evaluate(model, data, progress=False)
    assert len(seen) == 4
    for predicted, evaluated in zip(seen[:2], seen[2:]):
        assert torch.equal(predicted, evaluated)
    assert torch.cat(seen).mean().abs() < 0.01
    assert 0.95 < torch.cat(seen).std() < 1.05


def test_seven_channels_from_check_to_pictures(folder, tmp_path, capsys):
    data, run, out = str(folder), tmp_path / "run", tmp_path / "out"
    assert main(["check-data", data, "--channels", "7", "--picture", str(tmp_path / "check.png"), "--json"]) == 0
    train, _ = json.loads(capsys.readouterr().out)["parts"]
    assert train["channels"] == {"uint16 x 7": 6}
    assert Image.open(tmp_path / "check.png").width > 360
    arguments = ["train", data, *TINY, "--channels", "7", "--out", str(run), "--steps"]
    assert main([*arguments, "2"]) == 0
    model = segvit.SegViT.from_pretrained(run)
    for values, name in ((model.mean, "mean"), (model.std, "std")):
        np.testing.assert_allclose(values.numpy(), train[name], rtol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(segvit.SegViT.from_pretrained(tmp_path / "again").std, model.std)
    assert main([*arguments, "3", "--resume"]) == 0
    assert torch.equal(segvit.SegViT.from_pretrained(run).mean, model.mean)
    capsys.readouterr()
    assert main(["evaluate", str(run), data, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    best = segvit.SegViT.from_pretrained(run)
    by_hand = [segvit.predict(best, folder / f"val/images/{i}.npy", mode="auto")[0] for i in (0, 1)]
    truth = [torch.from_numpy(np.array(Image.open(folder / f"val/labels/{i}.png"))) for i in (0, 1)]
    right = torch.stack([got == want for got, want in zip(by_hand, truth)]).float().mean().item()
    assert scores["aacc"] == pytest.approx(right, abs=1e-6)
    tiff = tmp_path / "photo.tif"
    write(tiff, np.moveaxis(read_image(folder / "val/images/0.npy", 7), 2, 0))
    assert main(["predict", str(run), str(folder / "val" / "images"), str(tiff), "--out", str(out)]) == 0
    for name in ("0", "photo"):
        assert torch.equal(torch.from_numpy(np.array(Image.open(out / f"{name}.png"))), by_hand[0])
    assert Image.open(out / "1_overlay.png").mode == "RGB"
    assert main(["train", data, *TINY, "--model", str(run), "--steps", "1", "--out", str(tmp_path / "next")]) == 0
    assert torch.equal(segvit.SegViT.from_pretrained(tmp_path / "next").mean, model.mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check-data", "DATA"], "the data has problems"),
        (["train", "DATA", *TINY, "--out", "OUT"], "0.npy: the shape (7, 40, 56) does not fit 3 channels"),
        (["train", "DATA", *TINY, "--out", "OUT", "--channels", "5"], "does not fit 5 channels"),
        (["train", "DATA", *TINY, "--out", "OUT", "--channels", "0"], "does not fit 0 channels"),
        (["train", "DATA", *TINY, "--out", "OUT", "--channels", "5", "--model", "RUN"], "RUN takes 7, not 5"),
        (["predict", "RUN", "DATA/train/labels/0.png", "--out", "OUT"], "a picture of 1 channels (L), 7 are wanted"),
    ],
)
def test_mistakes_with_channels_end_in_one_line(arguments, message, folder, tmp_path, capsys):
    run = tmp_path / "RUN"
    segvit.SegViT("test_vit", 2, 32, in_chans=7, class_names=CLASSES).save_pretrained(run)
    places = {"DATA": str(folder), "RUN": str(run), "OUT": str(tmp_path / "out")}
    for word, place in places.items():
        arguments = [place + a[len(word) :] if a == word or a.startswith(word + "/") else a for a in arguments]
    capsys.readouterr()
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert message in lines[-1]
    assert len(lines) <= 2  # a saved model says which classes it keeps
