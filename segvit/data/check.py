"""The data checker: what is in a data set, what would stop or silently ruin a training, and what to do about it."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from segvit.data.dataset import SegmentationDataset
from segvit.data.moments import THREADS, Moments, image_moments

SHOWN = 5  # problems of one kind that are named one by one
BINARY = 'labels are 0 and 255: a binary mask? Name two classes and use --label_map "{255: 1}"'


@dataclass
class Report:
    """What one part of a data set holds."""

    part: str
    classes: list[str]
    images: int = 0
    sizes: Counter = field(default_factory=Counter)  # "640x480": images
    modes: Counter = field(default_factory=Counter)  # channels as stored, "RGB", "L", "RGBA", "uint16 x 7" …: images
    mean: list[float] = field(default_factory=list)  # [C] of pixels: uint8 / 255, 16 bits / 65535, floats as they are
    std: list[float] = field(default_factory=list)  # [C]
    pixels: np.ndarray | None = None  # [K] labelled pixels
    images_with: np.ndarray | None = None  # [K] images in which the class occurs
    ignored: int = 0  # pixels
    problems: list[str] = field(default_factory=list)  # training refuses these
    hints: list[str] = field(default_factory=list)
    binary: bool = False  # labels are 0 and 255 alone
    digests: dict[str, str] = field(default_factory=dict)  # of image files: their path

    def to_dict(self) -> dict:
        """Everything but the digests, ready for JSON."""
        total = max(int(self.pixels.sum()) + self.ignored, 1)
        rows = zip(self.classes, self.pixels.tolist(), self.images_with.tolist())
        return {
            "part": self.part,
            "images": self.images,
            "sizes": dict(self.sizes.most_common()),
            "channels": dict(self.modes.most_common()),
            "mean": self.mean,
            "std": self.std,
            "classes": {name: {"share": n / total, "pixels": n, "images": images} for name, n, images in rows},
            "ignored_share": self.ignored / total,
            "problems": self.problems,
            "hints": self.hints,
        }

    def text(self) -> str:
        """A table for people."""
        total = max(int(self.pixels.sum()) + self.ignored, 1)
        sizes = ", ".join(f"{size} ({n})" for size, n in self.sizes.most_common(3))
        sizes += f" and {len(self.sizes) - 3} more sizes" if len(self.sizes) > 3 else ""
        modes = ", ".join(f"{mode} ({n})" for mode, n in self.modes.most_common())
        width = max(len(name) for name in (*self.classes, "ignored"))
        lines = [f"{self.part}: {self.images} images, {sizes}; channels {modes}"]
        for name, values in (("mean", self.mean), ("std", self.std)):
            lines += [f"  {name} of each channel  {_some([f'{value:.4g}' for value in values], 16)}"] if values else []
        lines.append(f"  {'class':<{width}}   share  images")
        for name, pixels, images in zip(self.classes, self.pixels, self.images_with):
            if not images:  # named in a hint
                continue
            lines.append(f"  {name:<{width}}  {100 * pixels / total:5.1f} %  {images:>6}")
        lines.append(f"  {'ignored':<{width}}  {100 * self.ignored / total:5.1f} %")
        lines += [f"  hint: {hint}" for hint in self.hints] + [f"  PROBLEM: {problem}" for problem in self.problems]
        return "\n".join(lines)


@dataclass
class _Sample:
    """What one pair of files holds, or what is wrong with it."""

    problem: str | None = None
    size: str = ""
    mode: str = ""
    digest: str = ""
    moments: Moments = field(default_factory=Moments)
    counts: np.ndarray | None = None  # [K]
    ignored: int = 0
    raw: tuple[int, ...] = ()  # labels as the file has them
    unknown: tuple[int, ...] = ()


def check_data(dataset: SegmentationDataset, part: str = "data", progress: bool = True) -> Report:
    """Read every file of a data set and report sizes, channels, their mean and std, classes, and what is wrong.

    Every image is decoded and every label compared, in as many threads as there are CPU cores, up to eight. What takes
    several parts to tell is left to judge().

    Args:
        dataset: of open_data.
        part: its name in the report.
        progress: show a progress bar.
    """
    K = len(dataset.classes)
    report = Report(part, dataset.classes, pixels=np.zeros(K, np.int64), images_with=np.zeros(K, np.int64))
    raw: Counter[int] = Counter()
    unknown: dict[int, list[str]] = {}
    broken: list[str] = []
    moments = Moments()
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS))
    try:
        samples = pool.map(lambda i: _inspect(dataset, i), range(len(dataset)))
        for i, sample in enumerate(
            tqdm(samples, total=len(dataset), desc=f"checking {part}", unit="image", disable=not progress, leave=False)
        ):
            report.images += 1
            if sample.problem:
                broken.append(sample.problem)
                continue
            report.sizes[sample.size] += 1
            report.modes[sample.mode] += 1
            report.digests[sample.digest] = str(dataset.pairs[i][0])
            moments += sample.moments
            report.pixels += sample.counts
            report.images_with += sample.counts > 0
            report.ignored += sample.ignored
            raw.update(sample.raw)
            for value in sample.unknown:
                unknown.setdefault(value, []).append(str(dataset.pairs[i][1]))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for all files
    if moments.count:
        report.mean, report.std = moments.lists(dataset.channels)
    report.problems += broken[:SHOWN] + ([f"and {len(broken) - SHOWN} more files"] if len(broken) > SHOWN else [])
    for value, files in sorted(unknown.items())[:SHOWN]:
        where = f"{files[0]}: " if len(files) == 1 else f"{len(files)} label maps, first {files[0]}: "
        report.problems.append(f"{where}label {dataset.describe(value)} is no class: {dataset.known()}")
    if len(unknown) > SHOWN:
        report.problems.append(f"and {len(unknown) - SHOWN} more unknown labels")
    _judge(report, dataset, set(raw), set(unknown))
    return report


def _inspect(dataset: SegmentationDataset, i: int) -> _Sample:
    try:
        image, raw, labels = dataset.load(i)
        digest = hashlib.blake2b(dataset.pairs[i][0].read_bytes(), digest_size=16).hexdigest()
    except (ValueError, OSError, RuntimeError) as error:
        return _Sample(problem=str(error))
    strange = dataset.unknown(labels)
    known = labels[~strange & (labels != dataset.ignore_index)]
    return _Sample(
        size=f"{image.size[0]}x{image.size[1]}",
        mode=image.kind,
        digest=digest,
        moments=image_moments(image.image),
        counts=np.bincount(known, minlength=len(dataset.classes)),
        ignored=int((labels == dataset.ignore_index).sum()),
        raw=tuple(np.unique(raw).tolist()),
        unknown=tuple(np.unique(raw[strange]).tolist()),
    )


def _judge(report: Report, dataset: SegmentationDataset, raw: set[int], unknown: set[int]) -> None:
    """What the labels of one part mean."""
    K, numbers = len(report.classes), not dataset.colours
    report.binary = raw == {0, 255} and K <= 2 and numbers
    if report.images and not report.images_with.any() and not report.problems and not report.binary:
        report.problems.append(f"every label is ignored ({dataset.ignore_index}); there is no truth to learn from")
    if report.binary and unknown:
        report.hints.append(BINARY)
    elif K in unknown and raw <= {*range(K + 1), dataset.ignore_index} and numbers:
        absent = "0 never occurs" if 0 not in raw else "is 0 no class"
        found_labels = f"labels go from {min(raw)} to {K}, one too many"
        report.hints.append(f"{found_labels}; {absent}? --reduce_zero_label makes 1 the first class")
    elif unknown and len(raw) > 2 * K + 20 and numbers:
        report.hints.append(f"{len(raw)} labels for {K} classes: were the masks blurred, resized or saved as JPEG?")
    if report.ignored > report.pixels.sum() > 0:
        report.hints.append("more pixels are ignored than labelled")
    kinds = {mode.removesuffix(" turned by EXIF") for mode in report.modes}
    if len(kinds) > 1 and any(" x " in kind for kind in kinds):
        report.hints.append("images are stored differently; 8 bits are divided by 255, 16 by 65535, floats by nothing")
    elif len(kinds) > 1:
        read_as = "RGB" if dataset.channels == 3 else "grey"
        report.hints.append(f"images have different channels; all are read as {read_as}")
    still = [str(i) for i, value in enumerate(report.std) if value == 0]
    if still:
        report.hints.append(f"channels that never change: {_some(still)}")
    small = [size for size in report.sizes if min(map(int, size.split("x"))) < 32]
    if small:
        report.hints.append(f"images under 32 pixels: {_some(small)}")


def judge(train: Report, val: Report | None = None, new: range | None = None, negative: bool = False) -> None:
    """What the parts mean together: what cannot be learnt from `train`, and what `val` cannot tell.

    A val part may well hold one class alone; a training part may not. But where some classes, `new`, are all that
    learns, it is enough that other pixels are their background: those of other classes, or ignored ones (`negative`).
    """
    found = train.images_with > 0
    if new is not None:
        if not found[new.start :].any():
            train.problems.append(f"no pixel has a label of a new class ({_some(train.classes[new.start :])})")
        elif not negative and not found[: new.start].any():
            what = "only new classes are labelled, so nothing would say where they are not"
            train.problems.append(f"{what}; with --ignored negative all other pixels are their background")
    elif train.binary and train.ignored:
        train.problems.append(f"{BINARY}; as it is, 255 is ignored and one class is all there is")
    elif len(found) > 1 and found.sum() == 1 and not train.problems:
        name = train.classes[int(found.argmax())]
        train.problems.append(f"{name!r} is the only class that occurs; there is nothing to tell apart")
    absent = [name for name, there in zip(train.classes, found) if not there]
    if absent and not train.problems and new is None:
        train.hints.append(f"classes that never occur: {_some(absent)}")
    if val is None:
        return
    untrained = [n for n, t, v in zip(train.classes, train.images_with, val.images_with) if v and not t]
    if untrained and found.any() and new is None:
        val.hints.append(f"classes that occur here but never in {train.part}: {_some(untrained)}")
    both = [path for digest, path in val.digests.items() if digest in train.digests]
    if both:
        val.hints.append(f"{len(both)} images are in {train.part} too, so mIoU will look too good; first {both[0]}")


def refusal(
    data: str, train: SegmentationDataset, val: SegmentationDataset, new: range | None = None, negative: bool = False
) -> str | None:
    """Read all files; hints are printed to stderr, and what would ruin a training is returned. See judge."""
    reports = [check_data(train, "train"), check_data(val, "val")]
    judge(*reports, new, negative)
    for report in reports:
        for hint in report.hints:
            print(f"{report.part}: {hint}", file=sys.stderr)
    problems = [f"{report.part}: {problem}" for report in reports for problem in report.problems]
    more = f" (and {len(problems) - 1} more: segvit check-data {data})" if len(problems) > 1 else ""
    return f"{problems[0]}{more}" if problems else None


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
