import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from torchvision.transforms import v2

from segvit.data import SegmentationFolder, Shapes, read_classes
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
    data = SegmentationFolder(folder, ["a", "b"])
    assert len(data) == 3
    image, labels = data[1]
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(Image.open(folder / "images" / "1.png"))))
    assert torch.equal(labels, torch.from_numpy(np.array(Image.open(folder / "labels" / "1.png"))).long())


def test_a_label_that_is_no_class_is_named_with_its_file(folder):
    with pytest.raises(
        ValueError, match=r"labels/0\.png: label 1 is no class: there are 1 classes \(0 to 0\), and 255"
    ):
        SegmentationFolder(folder, ["a"])[0]


def test_indexed_label_maps_are_read_by_index(folder):
    image = Image.fromarray(np.eye(20, 30, dtype=np.uint8), "P")
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(folder / "labels" / "0.png")
    assert SegmentationFolder(folder, ["a", "b"])[0][1].unique().tolist() == [0, 1]


def test_what_is_missing_or_does_not_fit_is_named(folder):
    classes = ["a", "b"]
    with pytest.raises(FileNotFoundError, match="images: no such folder"):
        SegmentationFolder(folder / "nowhere", classes)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: the label map is \(9, 9\), its image \(20, 30\)"):
        SegmentationFolder(folder, classes)[0]
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(ValueError, match="a label image has one channel of class numbers, this one has mode RGB"):
        SegmentationFolder(folder, classes)[0]
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(folder / "images" / "2.png")
    with pytest.raises(ValueError, match=r"2\.png: the image has mode I;16, 16 or 32 bits a pixel"):
        SegmentationFolder(folder, classes)[2]
    with pytest.raises(ValueError, match="ignore_index 1 is the number of the class 'b'"):
        SegmentationFolder(folder, classes, ignore_index=1)
    Image.new("RGB", (30, 20)).save(folder / "images" / "1.jpg")
    with pytest.raises(ValueError, match="several images are called 1"):
        SegmentationFolder(folder, classes)
    (folder / "images" / "1.jpg").unlink()
    (folder / "images" / "1.png").write_bytes((folder / "images" / "1.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        SegmentationFolder(folder, classes)[1]
    (folder / "labels" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images have no label map .*, first 2\.png"):
        SegmentationFolder(folder, classes)
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no images"):
        SegmentationFolder(folder, classes)


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
    data = SegmentationFolder(root / "val", classes)
    image, labels = data[0]
    assert image.shape[1:] == labels.shape == (360, 480)
    assert labels[labels != 255].max() < len(classes) == 11
