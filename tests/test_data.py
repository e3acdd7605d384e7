import struct

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from torchvision.transforms import v2

from segvit.data import Shapes, open_data, read_classes, read_image, read_labels
from segvit.data.layouts import has_part, split_pairs, write_table
from segvit.data.transforms import RandomScaleCrop, TrainTransform


@pytest.fixture
def folder(tmp_path):
    """Three 20×30 images with label maps of two classes and ignored pixels."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
        labels = rng.integers(0, 2, (20, 30)).astype(np.uint8)
        labels[:2] = 255
        Image.fromarray(labels).save(tmp_path / "labels" / f"{i}.png")
    return tmp_path


def test_shapes_depend_on_seed_and_number_alone():
    data = Shapes(5, 64, seed=3)
    image, labels = data[4]
    assert (image.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert (image.shape, labels.shape) == ((3, 64, 64), (64, 64))
    again = Shapes(100, 64, seed=3)[4]
    assert torch.equal(image, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(image, Shapes(5, 64, seed=4)[4][0])
    assert not torch.equal(image, data[3][0])
    with pytest.raises(IndexError):
        data[5]


def test_shapes_have_every_class_background_and_ignored_pixels():
    found = set().union(*(Shapes(20)[i][1].unique().tolist() for i in range(20)))
    assert found == {0, 1, 2, 3, 4, 5, 255}
    assert len(Shapes.classes) == 6


def test_folder_reads_pairs(folder):
    data = open_data(folder, classes=["a", "b"])
    assert len(data) == 3
    image, labels = data[1]
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(Image.open(folder / "images" / "1.png"))))
    assert torch.equal(labels, torch.from_numpy(np.array(Image.open(folder / "labels" / "1.png"))).long())


def test_a_label_that_is_no_class_is_named_with_its_file(folder):
    with pytest.raises(
        ValueError, match=r"labels/0\.png: label 1 is no class: there are 1 classes \(0 to 0\), and 255"
    ):
        open_data(folder, classes=["a"])[0]


def test_indexed_label_maps_are_read_by_index(folder):
    image = Image.fromarray(np.eye(20, 30, dtype=np.uint8), "P")
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(folder / "labels" / "0.png")
    assert open_data(folder, classes=["a", "b"])[0][1].unique().tolist() == [0, 1]


def test_what_is_missing_or_does_not_fit_is_named(folder):
    classes = ["a", "b"]

    def opened(**options):
        return open_data(folder, classes=classes, **options)

    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        open_data(folder / "nowhere", classes=classes)
    with pytest.raises(FileNotFoundError, match="no folder train/images or images/train or training/images"):
        opened(part="train")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: the label map is 9x9, its image 30x20"):
        opened()[0]
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(ValueError, match=r"one channel of class numbers, this one has mode RGB; if its colours mean"):
        opened()[0]
    with pytest.raises(ValueError, match=r"2\.png: a picture of 3 channels \(RGB\), 7 are wanted; see --channels"):
        opened(channels=7)[2]
    with pytest.raises(ValueError, match="ignore_index 1 is the number of the class 'b'"):
        opened(ignore_index=1)
    with pytest.raises(ValueError, match="layout must be one of folder, ade20k"):
        opened(layout="coco")
    Image.new("RGB", (30, 20)).save(folder / "images" / "1.jpg")
    with pytest.raises(ValueError, match=r"1\.jpg and 1\.png have the same name"):
        opened()
    (folder / "images" / "1.jpg").unlink()
    (folder / "images" / "1.png").write_bytes((folder / "images" / "1.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        opened()[1]
    (folder / "labels" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images have no label map .*, first 2\.png$"):
        opened()
    Image.new("L", (30, 20)).save(folder / "labels" / "2.jpg")
    with pytest.raises(FileNotFoundError, match=r"first 2\.png; JPEG is no format for labels"):
        opened()
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no folder images with files"):
        opened()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_8_bit_image_is_read_as_rgb_or_grey(mode, tmp_path):
    name = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (1, 1), (200, 200, 200)).convert(mode).save(name)
    assert read_image(name).mode == "RGB"
    assert read_image(name).size == (1, 1)
    assert read_image(name, channels=1).mode == "L"


def test_a_truncated_jpeg_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(ValueError, match=r"a\.jpg: not a readable image \(image file is truncated"):
        read_image(path)
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"a\.jpg: not a readable image \(no image, or a damaged one\)"):
        read_image(path)


def test_labels_are_renumbered(folder):
    def labels(**options):
        return open_data(folder, classes=["a", "b"], **options)[0][1]

    raw = labels()
    assert torch.equal(labels(label_map={0: 1, 1: 0}), torch.where(raw == 255, 255, 1 - raw))
    assert torch.equal(labels(label_map={255: 0}), raw % 255)
    shifted = torch.where(raw == 0, 255, torch.where(raw == 1, 0, raw))
    assert torch.equal(labels(reduce_zero_label=True), shifted)
    assert torch.equal(labels(reduce_zero_label=True, label_map={0: 1}), torch.where(shifted == 0, 1, shifted))


def test_colours_become_classes(folder):
    colours = np.array([[64, 0, 128], [0, 0, 0], [255, 255, 255]], np.uint8)
    index = np.random.default_rng(1).integers(0, 3, (20, 30))
    Image.fromarray(colours[index]).save(folder / "labels" / "0.png")
    named = {"#400080": 1, "#000000": 0, "#FFFFFF": 255}
    data = open_data(folder, classes=["a", "b"], label_map=named)
    assert torch.equal(data[0][1], torch.tensor([1, 0, 255])[torch.from_numpy(index)])
    named.pop("#FFFFFF")
    for ignored in (255, -1):
        with pytest.raises(ValueError, match="label #ffffff is no class: label_map names 2 colours"):
            open_data(folder, classes=["a", "b"], ignore_index=ignored, label_map=named)[0]


def test_hidden_files_and_folders_are_passed_over(folder):
    (folder / "labels" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0.png", ".0.png"):
        Image.new("L", (3, 3)).save(folder / "labels" / name)
    assert len(open_data(folder, classes=["a", "b"])) == 3


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_labels_of_16_bits_in_either_byte_order(order, tmp_path):
    labels = np.array([[0, 300], [65535, 7]])
    head = b"II*\0" if order == "<u2" else b"MM\0*"
    end = order[0]
    tags = [(256, 4, 2), (257, 4, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 2), (279, 4, 8)]
    table = struct.pack(f"{end}H", len(tags))
    for tag, kind, value in tags:
        table += struct.pack(
            f"{end}HHI" + ("I" if kind == 4 else "HH"), tag, kind, 1, *([value] if kind == 4 else [value, 0])
        )
    data = head + struct.pack(f"{end}I", 16) + labels.astype(order).tobytes() + table + bytes(4)
    (tmp_path / "a.tif").write_bytes(data)
    assert read_labels(tmp_path / "a.tif").tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({0: 2}, "0 goes to 2, which is neither a class"),
        ({0: "a"}, "0 goes to 'a'"),
        ({"zero": 1}, "'zero' is neither a number from 0 to 65535 nor #rrggbb"),
        ({-1: 1}, "-1 is neither a number"),
        ({"#12": 1}, "'#12' is no colour"),
        ({"#000000": 1, 3: 0}, "either numbers or colours"),
    ],
)
def test_maps_that_mean_nothing_are_refused(folder, label_map, message):
    with pytest.raises(ValueError, match=message):
        open_data(folder, classes=["a", "b"], label_map=label_map)


def test_tables(folder):
    table = folder / "data.csv"
    table.write_text("image,label,part\nimages/0.png,labels/0.png,train\nimages/2.png,labels/2.png,val\n")
    data = open_data(table, "val", classes=["a", "b"])
    assert data.pairs == [(folder / "images/2.png", folder / "labels/2.png")]
    assert has_part(table, "train")
    assert not has_part(table, "test")
    assert not has_part(table, None)
    with pytest.raises(FileNotFoundError, match=r"no row has no part"):
        open_data(table, classes=["a", "b"])
    write_table(folder / "other.csv", data.pairs)
    assert has_part(folder / "other.csv", None)
    again = open_data(folder / "other.csv", classes=["a", "b"])
    assert torch.equal(again[0][1], data[0][1])
    (folder / "classes.txt").write_text("a\nb\n")
    assert open_data(table, "train").classes == ["a", "b"]
    for text, message in (
        ("image,label\nimages/0.png,\n", r"a row without image or label \(number 2\)"),
        ("picture,mask\na,b,c\n", "the first line must name the columns image and label, got picture, mask"),
        ("image,label\n", "no rows"),
        ("image,label\nimages/9.png,labels/0.png\n", r"images/9\.png: no such file, named in .*data\.csv"),
    ):
        table.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_data(table, classes=["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        open_data(folder / "none.csv", classes=["a", "b"])


def test_a_held_out_part_is_the_same_every_time(folder):
    pairs = open_data(folder, classes=["a", "b"]).pairs
    train, val = split_pairs(pairs, 0.1)
    assert (len(train), len(val)) == (2, 1)
    assert sorted(train + val) == sorted(pairs)
    assert split_pairs(pairs, 0.1) == (train, val)
    with pytest.raises(ValueError, match="val_fraction must be between 0 and 1"):
        split_pairs(pairs, 1.5)
    with pytest.raises(ValueError, match="one image cannot be split"):
        split_pairs(pairs[:1], 0.5)


def save(path, values):
    """One row of pixels: an image where the folder is named so, else a label map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array([values])
    if path.suffix == ".mat":
        savemat = pytest.importorskip("scipy.io").savemat
        savemat(path, {"S": array.astype(np.uint8)})
    elif path.suffix == ".jpg" or "leftImg8bit" in path.name:
        Image.new("RGB", (len(values), 1)).save(path)
    else:
        Image.fromarray(array.astype(np.uint8)).save(path)


LAYOUT_CASES = {  # layout: (files of one pair, labels in the file, class numbers, K, a name and its number)
    "ade20k": (
        ["images/{training}/a.jpg", "annotations/{training}/a.png"],
        ([0, 1, 150], [255, 0, 149], 150, ("flag", 149)),
    ),
    "cocostuff10k": (
        ["images/{}COCO_1.jpg", "annotations/{}COCO_1.mat"],
        ([0, 1, 13, 182], [255, 0, 11, 170], 171, ("stop sign", 11)),
    ),
    "cocostuff164k": (
        ["images/{train2017}/000000000009.jpg", "annotations/{train2017}/000000000009.png"],
        ([255, 0, 12, 181, 11, 90], [255, 0, 11, 170, 255, 255], 171, ("stop sign", 11)),
    ),
    "pascal_voc": (
        ["JPEGImages/{}2007_000032.jpg", "SegmentationClass/{}2007_000032.png"],
        ([0, 1, 20, 255], [0, 1, 20, 255], 21, ("tvmonitor", 20)),
    ),
    "pascal_voc_aug": (
        ["JPEGImages/{}2007_000032.jpg", "SegmentationClassAug/{}2007_000032.png"],
        ([0, 1, 20, 255], [0, 1, 20, 255], 21, ("background", 0)),
    ),
    "pascal_context_59": (
        ["JPEGImages/{}2008_1.jpg", "SegmentationClassContext/{}2008_1.png"],
        ([0, 1, 59], [255, 0, 58], 59, ("wood", 58)),
    ),
    "pascal_context_60": (
        ["JPEGImages/{}2008_1.jpg", "SegmentationClassContext/{}2008_1.png"],
        ([0, 1, 59], [0, 1, 59], 60, ("background", 0)),
    ),
    "cityscapes": (
        ["leftImg8bit/{train}/ulm/ulm_1_leftImg8bit.png", "gtFine/{train}/ulm/ulm_1_gtFine_labelIds.png"],
        ([0, 7, 11, 6, 33, 255], [255, 0, 2, 255, 18, 255], 19, ("bicycle", 18)),
    ),
    "camvid": (["{train}/0001TP.png", "{train}annot/0001TP.png"], ([0, 10, 11], [0, 10, 255], 11, ("sky", 0))),
}
LISTS = {  # layout: (file, its names of train and val, stem)
    "cocostuff10k": ("imageLists/{}.txt", ("train", "test"), "COCO_1"),
    "pascal_voc": ("ImageSets/Segmentation/{}.txt", ("train", "val"), "2007_000032"),
    "pascal_voc_aug": ("ImageSets/Segmentation/{}.txt", ("train_aug", "val"), "2007_000032"),
    "pascal_context_59": ("ImageSets/SegmentationContext/{}.txt", ("train", "val"), "2008_1"),
    "pascal_context_60": ("ImageSets/SegmentationContext/{}.txt", ("train", "val"), "2008_1"),
}


@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_well_known_data_sets_are_read_as_they_are_downloaded(layout, tmp_path):
    files, (raw, wanted, K, (name, number)) = LAYOUT_CASES[layout]
    val = {"training": "validation", "train": "val", "train2017": "val2017"}
    for part in ("train", "val"):
        for file in files:
            for own, other in val.items():
                file = file.replace(f"{{{own}}}", own if part == "train" else other)
            save(tmp_path / file.format(""), raw)
    if layout == "cityscapes":
        save(tmp_path / "gtFine/val/ulm/ulm_1_gtFine_color.png", raw)
    if layout == "camvid":  # the images of that set are PNG too
        for part in ("train", "val"):
            Image.new("RGB", (len(raw), 1)).save(tmp_path / part / "0001TP.png")
    if layout in LISTS:
        place, names, stem = LISTS[layout]
        for part in names:
            (tmp_path / place.format(part)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place.format(part)).write_text(f"{stem}\n")
    for part in ("train", "val"):
        assert has_part(tmp_path, part, layout)
        data = open_data(tmp_path, part, layout)
        assert (len(data), len(data.classes)) == (1, K)
        assert data.classes[number] == name
        assert data[0][1].tolist() == [wanted]
    if layout in LISTS:
        (tmp_path / place.format(names[0])).write_text("other\n")
        with pytest.raises(FileNotFoundError, match="1 of 1 listed images are absent: other"):
            open_data(tmp_path, "train", layout)


def test_cocostuff164k_as_its_archive_unpacks_and_beside_converted_maps(tmp_path):
    for part in ("train2017", "val2017"):
        save(tmp_path / "images" / part / "1.jpg", [0, 12])
        save(tmp_path / "stuffthingmaps" / part / "1.png", [0, 12])
        save(tmp_path / "stuffthingmaps" / part / "1_labelTrainIds.png", [0, 11])  # of mmsegmentation's script
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    data = open_data(tmp_path, "train", "cocostuff164k", ignore_index=-1)
    assert [path.name for _, path in data.pairs] == ["1.png"]
    assert data[0][1].tolist() == [[0, 11]]
    save(tmp_path / "stuffthingmaps/train2017/1.png", [255, 182])
    with pytest.raises(ValueError, match="label 182 is no class"):
        data[0]
    save(tmp_path / "stuffthingmaps/train2017/1.png", [255, 25])  # 25 + 1 is one of the ids without pixels
    assert data[0][1].tolist() == [[-1, -1]]
    (tmp_path / "stuffthingmaps/val2017/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images have no label map .*, first 1\.jpg"):
        open_data(tmp_path, "val", "cocostuff164k")


def test_pascal_voc_masks_are_read_by_index_and_its_augmented_lists_name_paths(tmp_path):
    save(tmp_path / "JPEGImages/2007_1.jpg", [0, 20, 255])
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        (tmp_path / folder).mkdir()
        mask = Image.fromarray(np.array([[0, 20, 255]], np.uint8), "P")
        mask.putpalette([*range(256)] * 3)
        mask.save(tmp_path / folder / "2007_1.png")
    for name, line in (
        ("Segmentation/val.txt", "2007_1"),
        ("Segmentation/train_aug.txt", "none"),
        ("SegmentationAug/train_aug.txt", "/JPEGImages/2007_1.jpg /SegmentationClassAug/2007_1.png"),
    ):
        (tmp_path / "ImageSets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ImageSets" / name).write_text(f"{line}\n")
    assert open_data(tmp_path, "val", "pascal_voc", ignore_index=-1)[0][1].tolist() == [[0, 20, -1]]
    assert open_data(tmp_path, "train", "pascal_voc_aug")[0][1].tolist() == [[0, 20, 255]]
    with pytest.raises(FileNotFoundError, match=r"no folder ImageSets/Segmentation/train\.txt"):
        open_data(tmp_path, "train", "pascal_voc")


def test_a_layout_of_parts_wants_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="the camvid layout has parts; name one of train, val, test"):
        open_data(tmp_path, layout="camvid")


def test_real_ade20k_samples():
    root = shared("ade20k_samples") / "sampleData"
    data = open_data(root, layout="ade20k")
    assert len(data) == 3
    found = {data.classes[i] for _, labels in data for i in labels.unique().tolist() if i != 255}
    assert {"sky", "building", "tree", "wall"} <= found
    raw = np.array(Image.open(root / "annotations" / "ADE_val_00000001.png")).astype(int)
    assert torch.equal(data[0][1], torch.from_numpy(np.where(raw == 0, 255, raw - 1)))


def test_classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffsky\nroad\n tree \n\n".encode())  # as Windows' editor writes it
    assert read_classes(path) == ["sky", "road", "tree"]
    path.write_text("sky\nroad\nsky\n")
    with pytest.raises(ValueError, match="names that occur twice: sky"):
        read_classes(path)
    path.write_text("sky\n\nroad\n")
    with pytest.raises(ValueError, match="line 2 is empty; line i names class i"):
        read_classes(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no class names"):
        read_classes(path)
    with pytest.raises(FileNotFoundError, match="it should name one class a line"):
        read_classes(tmp_path / "other.txt")


@pytest.mark.parametrize("size", [(16, 24), (64, 64), (50, 20)])
def test_augmentation_moves_image_and_labels_together(size):
    """The image carries its own labels as brightness, so that any misalignment shows."""
    labels = torch.zeros(40, 60, dtype=torch.long)
    labels[10:30, 20:45] = 1
    labels[:, 50:] = 2
    image = (labels * 100).to(torch.uint8).expand(3, -1, -1).clone()
    crop = RandomScaleCrop(size, (1.0, 1.0))
    for _ in range(20):
        x, y = crop(*_tv(image, labels))
        assert x.shape[1:] == y.shape == size
        inside = y != 255
        assert torch.equal(x[0][inside].long(), y[inside] * 100)
        assert (x[:, ~inside] == 0).all()


def _tv(image, labels):
    from torchvision import tv_tensors

    return tv_tensors.Image(image), tv_tensors.Mask(labels)


def test_scaling_keeps_labels_whole_and_the_transform_normalises():
    labels = torch.randint(0, 2, (40, 60)) * 7  # a blend of 0 and 7 would show
    transform = TrainTransform((32, 32), [0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    means = []
    for _ in range(20):
        x, y = transform(torch.full((3, 40, 60), 255, dtype=torch.uint8), labels)
        assert x.shape == (3, 32, 32)
        assert x.dtype == torch.float32
        assert type(x) is type(y) is torch.Tensor
        assert set(y.unique().tolist()) <= {0, 7, 255}
        means.append(x[:, y != 255].mean())
    assert max(means) <= 2.0001
    assert max(means) > 1


def test_crops_avoid_one_class_covering_nearly_everything():
    torch.manual_seed(0)
    labels = torch.zeros(100, 100, dtype=torch.long)
    labels[:30, :30] = 1
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)

    def mixed(crop):
        shares = (crop(*_tv(image, labels))[1].eq(1).float().mean() for _ in range(200))
        return sum(0.25 < share < 0.75 for share in shares)

    once = mixed(v2.RandomCrop(30))
    assert once > 0
    assert mixed(RandomScaleCrop((30, 30), (1.0, 1.0))) > 4 * once


def test_camvid_reads():
    root = shared("camvid")
    classes = read_classes(root / "classes.txt")
    data = open_data(root, "val")
    image, labels = data[0]
    assert image.shape[1:] == labels.shape == (360, 480)
    assert labels[labels != 255].max() < len(classes) == 11


def test_files_whose_parsers_break_are_named(tmp_path):
    """Pillow and NumPy raise whatever their parsers meet; a run that leaves such a file out must know it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    good = (tmp_path / "a.webp").read_bytes()
    assert read_image(tmp_path / "a.webp").size == (8, 8)
    place = max(good.find(b"MM\0*"), good.find(b"II*\0"))
    assert place > 0
    (tmp_path / "a.webp").write_bytes(good[:place] + b"XX" + good[place + 2 :])
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 3), np.uint8))
    header = (tmp_path / "b.npy").read_bytes().replace(b"'shape': (8", b"'shape': ((")
    (tmp_path / "b.npy").write_bytes(header)
    for name, message in (("a.webp", "not a readable image"), ("b.npy", r"not a readable \.npy file")):
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            read_image(tmp_path / name)
