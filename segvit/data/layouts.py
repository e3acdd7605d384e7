"""Where data sets keep their files: a plain folder, a CSV table, and well-known data sets as they are downloaded."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from segvit.data.dataset import SegmentationDataset, read_classes
from segvit.data.images import EXTENSIONS, LABEL_EXTENSIONS

Pairs = list[tuple[Path, Path]]
CLASSES = Path(__file__).parent / "classes"
_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_IGNORE = "ignore"  # stands for the ignore_index in label maps


def _shift(last: int) -> dict[int, int | str]:
    """0 is ignored, and k becomes k−1."""
    return {0: _IGNORE} | {k: k - 1 for k in range(1, last + 1)}


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its files; {part} in folders is train, val or test, under any of its names in `parts`."""

    images: tuple[str, ...] = ("{part}/images", "images/{part}")
    labels: tuple[str, ...] = tuple(
        place.format(labels=name, part="{part}")
        for name in ("labels", "masks", "annotations")
        for place in ("{part}/{labels}", "{labels}/{part}")
    )
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _PARTS)
    listed: tuple[str, ...] = ()  # a file that lists the stems of a part: the first of these that is there
    image_ending: str = ""  # what follows the common part of the names
    label_ending: str = ""
    classes: str | None = None  # file of class names; None: the user's
    label_map: Mapping[int, int | str] = field(default_factory=dict)


_COCO_ABSENT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # COCO's ids of things that have no pixels
_COCO = [i for i in range(1, 183) if i not in _COCO_ABSENT]
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # ids that are evaluated
_CONTEXT = {
    "images": ("JPEGImages",),
    "labels": ("SegmentationClassContext",),
    "listed": ("ImageSets/SegmentationContext/{part}.txt",),
}
_VOC_LIST = "ImageSets/Segmentation/{part}.txt"
_VOC = {"images": ("JPEGImages",), "classes": "pascal_voc", "label_map": {255: _IGNORE}}
LAYOUTS = {
    "folder": Layout(),
    "ade20k": Layout(classes="ade20k", label_map=_shift(150)),
    "cocostuff10k": Layout(
        ("images",),
        ("annotations",),
        {"train": ("train",), "val": ("test",), "test": ("test",)},
        ("imageLists/{part}.txt",),
        classes="cocostuff",
        label_map={0: _IGNORE} | {label: k for k, label in enumerate(_COCO)},
    ),
    "cocostuff164k": Layout(
        ("images/{part}",),
        ("stuffthingmaps/{part}", "annotations/{part}"),
        {"train": ("train2017",), "val": ("val2017",)},
        classes="cocostuff",
        label_map=dict.fromkeys([*range(182), 255], _IGNORE) | {label - 1: k for k, label in enumerate(_COCO)},
    ),
    "pascal_voc": Layout(**_VOC, labels=("SegmentationClass",), listed=(_VOC_LIST,)),
    "pascal_voc_aug": Layout(
        **_VOC,
        labels=("SegmentationClassAug",),
        parts={"train": ("train_aug",), "val": ("val",)},
        listed=("ImageSets/SegmentationAug/{part}.txt", _VOC_LIST),
    ),
    "pascal_context_59": Layout(**_CONTEXT, classes="pascal_context_59", label_map=_shift(59)),
    "pascal_context_60": Layout(**_CONTEXT, classes="pascal_context_60"),
    "cityscapes": Layout(
        ("leftImg8bit/{part}",),
        ("gtFine/{part}",),
        image_ending="_leftImg8bit",
        label_ending="_gtFine_labelIds",
        classes="cityscapes",
        label_map=dict.fromkeys(range(34), _IGNORE) | {label: k for k, label in enumerate(_CITYSCAPES)},
    ),
    "camvid": Layout(("{part}",), ("{part}annot",), classes="camvid", label_map={11: _IGNORE}),
}


def open_data(
    root: str | Path,
    part: str | None = None,
    layout: str = "folder",
    classes: str | Path | list[str] | None = None,
    ignore_index: int = 255,
    label_map: Mapping[int | str, int] | None = None,
    reduce_zero_label: bool = False,
    transform: Callable | None = None,
    channels: int = 3,
) -> SegmentationDataset:
    """A data set from files.

    Args:
        root: a folder, or a CSV file with the columns image, label and, if it has several parts, part; its paths are
            relative to the file.
        part: "train", "val" or "test"; None: `root` itself has images/ and labels/; of a CSV, the rows without a part.
        layout: "folder": ROOT/train/images/a.jpg with ROOT/train/labels/a.png (or ROOT/images/train, ROOT/labels/train;
            masks and annotations are names for labels too); or a data set as it is downloaded: "ade20k",
            "cocostuff10k", "cocostuff164k", "pascal_voc", "pascal_voc_aug", "pascal_context_59", "pascal_context_60",
            "cityscapes", "camvid".
        classes: names, or a file of them; None: the layout's, or ROOT/classes.txt, or ROOT/../classes.txt.
        ignore_index, label_map, transform, channels: see SegmentationDataset; label_map is applied after the layout's
            own.
        reduce_zero_label: 0 is no class but ignored, and k becomes k−1, before label_map.

    Raises:
        FileNotFoundError: a folder, a label map or a list that is not there.
        ValueError: no images, an unknown layout, or what SegmentationDataset refuses.
    """
    pairs = find_pairs(root, part, layout)
    names = find_classes(root, layout, classes)
    mapping = _label_map(layout, label_map, reduce_zero_label, ignore_index, len(names))
    return SegmentationDataset(pairs, names, ignore_index, mapping, transform, channels)


def find_classes(root: str | Path, layout: str = "folder", classes: str | Path | list[str] | None = None) -> list[str]:
    """Class names: given, of a file, of the layout, or of classes.txt in the folder or the one above it."""
    if isinstance(classes, list | tuple):
        return list(classes)
    if classes is not None:
        return read_classes(classes)
    if _layout(layout).classes is not None:
        return read_classes(CLASSES / f"{_layout(layout).classes}.txt")
    folder = Path(root).parent if is_table(root) else Path(root)
    near = next((p for p in (folder, folder.resolve().parent) if (p / "classes.txt").is_file()), folder)
    return read_classes(near / "classes.txt")


def find_pairs(root: str | Path, part: str | None = None, layout: str = "folder") -> Pairs:
    """(image, label) files of a part of a data set, sorted; see open_data.

    Raises:
        FileNotFoundError: no such part (what was looked for is named), or an image without label map.
        ValueError: no images, or two of the same name.
    """
    root, places = Path(root), _layout(layout)
    if is_table(root):
        return _read_table(root, part)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    folders, looked = _folders(root, part, places)
    if folders is None:
        if not looked:
            raise FileNotFoundError(f"{root}: the {layout} layout has parts; name one of {', '.join(places.parts)}")
        raise FileNotFoundError(f"{root}: no folder {' or '.join(looked)} ({layout} layout)")
    images, labels, name = folders
    listed = _list(root, places, name)
    return _match(images, labels, places, None if listed is None else _stems(listed))


def has_part(root: str | Path, part: str | None, layout: str = "folder") -> bool:
    """Whether a data set has files of this part; part None: whether it has images that belong to no part."""
    if is_table(root):
        parts = {row.get("part") or None for row in _rows(Path(root))}
        return part in parts
    return _folders(Path(root), part, _layout(layout))[0] is not None


def split_pairs(pairs: Pairs, fraction: float) -> tuple[Pairs, Pairs]:
    """(training, validation): a random `fraction` is held out, the same every time."""
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {fraction}")
    if len(pairs) < 2:
        raise ValueError(f"one image cannot be split into training and validation: {pairs[0][0]}")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    held = set(order[: min(max(round(len(pairs) * fraction), 1), len(pairs) - 1)])
    return [p for i, p in enumerate(pairs) if i not in held], [p for i, p in enumerate(pairs) if i in held]


def write_table(path: str | Path, pairs: Pairs) -> None:
    """A CSV file of these pairs, with absolute paths, for open_data."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label"))
        writer.writerows((image.resolve(), label.resolve()) for image, label in pairs)


def is_table(root: str | Path) -> bool:
    return Path(root).suffix.lower() == ".csv"


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def _label_map(layout: str, given, reduce_zero_label: bool, ignore_index: int, num_classes: int) -> dict:
    """The layout's numbering, then reduce_zero_label, then the user's map."""
    own = {n: ignore_index if t == _IGNORE else t for n, t in _layout(layout).label_map.items()}
    if own and reduce_zero_label:
        raise ValueError(f"the layout {layout} numbers its classes already; leave reduce_zero_label out")
    if reduce_zero_label:
        own = {n: ignore_index if t == _IGNORE else t for n, t in _shift(num_classes).items()}
    given = dict(given or {})
    if not own:
        return given
    if any(isinstance(n, str) and n.startswith("#") for n in given):
        raise ValueError("label_map: colours do not go with reduce_zero_label or a layout that numbers its classes")
    given = {int(n): t for n, t in given.items()}
    return {n: given.get(t, t) for n, t in own.items()} | {n: t for n, t in given.items() if n not in own}


def _folders(root: Path, part: str | None, places: Layout) -> tuple[tuple[Path, Path, str | None] | None, list[str]]:
    """Folder of images, of labels and the part's name in this data set, if they are there; and what was looked for."""
    looked = []
    for name in (None,) if part is None else places.parts.get(part, (part,)):
        if places.listed and name is not None and _list(root, places, name) is None:
            looked += _inside(places.listed, name)
            continue
        for images in _inside(places.images, name):
            if not (root / images).is_dir():
                looked.append(images)
                continue
            if name is None and not any(p.suffix.lower() in EXTENSIONS for p in (root / images).iterdir()):
                looked.append(f"{images} with files")
                continue
            labels = _inside(places.labels, name)
            found = next((folder for folder in labels if (root / folder).is_dir()), None)
            if found is not None:
                return (root / images, root / found, name), looked
            looked += labels
    return None, looked


def _list(root: Path, places: Layout, name: str | None) -> Path | None:
    """The file that lists a part."""
    files = [] if name is None else [root / place for place in _inside(places.listed, name)]
    return next((path for path in files if path.is_file()), None)


def _stems(listed: Path) -> list[str]:
    """One a line: 2007_000032, or as the lists of the augmented Pascal VOC, /JPEGImages/2007_000032.jpg /Segm….png."""
    return [Path(line.split()[0]).stem for line in listed.read_text().splitlines() if line.strip()]


def _inside(folders: tuple[str, ...], name: str | None) -> list[str]:
    """Folders of a part; without a part, those that are left when its folder is taken away."""
    if name is not None:
        return [folder.format(part=name) for folder in folders]
    return list(dict.fromkeys(f.replace("{part}/", "").replace("/{part}", "") for f in folders if f != "{part}"))


def _match(images: Path, labels: Path, places: Layout, stems: list[str] | None) -> Pairs:
    """Images with the label map of the same name, in the same sub-folder."""
    found = _by_name(images, EXTENSIONS, places.image_ending)
    if stems is not None:
        absent = [stem for stem in stems if stem not in found]
        if absent:
            raise FileNotFoundError(f"{images}: {len(absent)} of {len(stems)} listed images are absent: {absent[0]}")
        found = {stem: found[stem] for stem in stems}
    if not found:
        raise ValueError(f"{images}: no images ({', '.join(EXTENSIONS)})")
    targets = _by_name(labels, LABEL_EXTENSIONS, places.label_ending)
    missing = [name for name in found if name not in targets]
    if missing:
        kinds = f"{len(missing)} of {len(found)} images have no label map ({', '.join(LABEL_EXTENSIONS)})"
        lossy = _by_name(labels, (".jpg", ".jpeg"), places.label_ending)
        hint = "; JPEG is no format for labels, it changes numbers" if missing[0] in lossy else ""
        raise FileNotFoundError(f"{labels}: {kinds}, first {found[missing[0]].name}{hint}")
    return [(path, targets[name]) for name, path in found.items()]


def _by_name(folder: Path, extensions: tuple[str, ...], ending: str) -> dict[str, Path]:
    """Files by their path in the folder, without extension and ending."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in extensions):
        inside = path.relative_to(folder)
        name = inside.with_suffix("").as_posix()
        if not name.endswith(ending) or any(part.startswith(".") for part in inside.parts):
            continue
        name = name.removesuffix(ending)
        if name in found:
            raise ValueError(f"{folder}: {found[name].name} and {path.name} have the same name; which one is meant?")
        found[name] = path
    return found


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise FileNotFoundError(f"{table}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8 ({error})") from None
    if not rows:
        raise ValueError(f"{table}: no rows; the first line names the columns image,label (and part)")
    if not {"image", "label"} <= set(rows[0]):
        got = ", ".join(name for name in rows[0] if name)
        raise ValueError(f"{table}: the first line must name the columns image and label, got {got}")
    return rows


def _read_table(table: Path, part: str | None) -> Pairs:
    rows = [row for row in _rows(table) if (row.get("part") or None) == part]
    if not rows:
        raise FileNotFoundError(f"{table}: no row has {f'the part {part}' if part else 'no part'}")
    pairs = []
    for number, row in enumerate(rows, 2):
        if not row["image"] or not row["label"]:
            raise ValueError(f"{table}: a row without image or label (number {number})")
        pairs.append((table.parent / row["image"], table.parent / row["label"]))
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, named in {table}")
    return pairs
