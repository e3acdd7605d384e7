"""Prediction of whole images and of sliding windows, with several scales and flips; and evaluation on a data set."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from segvit.data.images import read_image, to_tensor
from segvit.models.segvit import SegViTOutput, as_pair
from segvit.ops import mask_decode
from segvit.ops.reference._sampling import sample_positions
from segvit.ops.reference.mask_decode import label_dtype

OUTPUTS = ("labels", "scores", "probabilities")
MODES = ("whole", "slide", "auto")
PROTOCOLS = ("fused", "paper")
LARGE = 4  # times the pixels of a crop: from there on "auto" slides
STRIP_BYTES = 32 << 20  # of scores that are resized and compared at once
Picture = Tensor | np.ndarray | Image.Image | str | Path


def predict(
    model: nn.Module,
    images: Picture | Sequence[Picture],
    size: int | tuple[int, int] | None = None,
    mode: str = "whole",
    crop_size: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    output: str = "labels",
    protocol: str = "fused",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    short_side: int | None = None,
    window_batch: int = 4,
    prune: float = 0.0,
) -> Tensor | list[Tensor]:
    """Segment images.

    Args:
        model: a SegViT; its train or eval mode is left as it was found.
        images: a float tensor [B, C, H, W] is used as it is (normalised, on the model's device). Everything else is
            normalised with the model's mean and std, uint8 after / 255, 16-bit integers after / 65535, floats as they
            are: uint8 tensors [B, C, H, W] or [C, H, W], arrays [H, W, C] or [H, W], PIL images, paths (of .npy and
            multi-band TIFF files, too), or a sequence of these.
        size: (height, width), or one int, of the result; None: each image's own.
        mode: "whole"; or "slide": windows of crop_size every stride pixels, averaged where they overlap; or "auto":
            "slide" where an image has more than four times the pixels of a crop, as attention's cost grows with their
            square. Labels of one scale, without flip, need memory for the rows of open windows alone.
        crop_size, stride: int or (height, width); None: the model's image_size, and two thirds of the crop.
        output: "labels", "scores" (a sum over class tokens, may exceed 1) or "probabilities" (softmax of the scores: a
            ranking, no confidence).
        protocol: "fused" decodes labels straight at `size`; "paper" decodes scores at the image's size, resizes them
            (bilinear) and takes the argmax. Scores, probabilities, windows and several scales follow the paper.
        scales, flip: resize the image by each factor, also mirror it, and average the probabilities (scores for
            output="scores").
        short_side: resize each image to this short side first; the result still has `size`.
        window_batch: windows that go through the model at once.
        prune: leave out class tokens none of whose class probabilities reaches this ε (0.01 say): faster, and no score
            changes by more than ε times the number of those left out.

    A model in bfloat16 or float16 computes in it; images are cast after they are resized, and scores are float32.

    Returns:
        labels [B, H, W] (uint8 up to 256 classes, else int16), or float32 [B, K, H, W]. A sequence of images of
        different sizes, with size=None, gives a list, one [H, W] or [K, H, W] each.

    Raises:
        ValueError: an argument that does not fit, named.
        FileNotFoundError: a path that is not there.
    """
    plan = plan_prediction(
        model, size, mode, crop_size, stride, output, protocol, scales, flip, short_side, window_batch, prune
    )
    batches, single = _prepare(model, images)
    with torch.no_grad(), evaluating(model):
        results = [_predict_batch(model, batch, plan) for batch in batches]
    if single:
        return results[0]
    results = [result[0] for result in results]
    same = all(result.shape == results[0].shape for result in results)
    return torch.stack(results) if same else results


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode back outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Plan(NamedTuple):
    """Checked arguments of predict."""

    size: tuple[int, int] | None
    mode: str
    crop: tuple[int, int]
    stride: tuple[int, int]
    output: str
    protocol: str
    variants: list[tuple[float, bool]]  # scale and flip
    short_side: int | None
    window_batch: int
    prune: float

    @property
    def largest(self) -> int:
        """Pixels of the largest image that "auto" takes whole."""
        return LARGE * self.crop[0] * self.crop[1]

    def slides(self, size: Sequence[int]) -> bool:
        """Whether images that have this (height, width) once they are resized are predicted in windows."""
        return self.mode == "slide" or (self.mode == "auto" and size[0] * size[1] > self.largest)

    def in_windows(self, size: tuple[int, int]) -> bool:
        """Whether an image of this (height, width) is predicted in windows."""
        return self.slides(rescaled_size(size, self.short_side))


def plan_prediction(
    model: nn.Module,
    size=None,
    mode="whole",
    crop_size=None,
    stride=None,
    output="labels",
    protocol="fused",
    scales=(1.0,),
    flip=False,
    short_side=None,
    window_batch=4,
    prune=0.0,
) -> _Plan:
    """The arguments of predict, checked: refuses what does not fit before anything runs."""
    for name, value, allowed in (("mode", mode, MODES), ("output", output, OUTPUTS), ("protocol", protocol, PROTOCOLS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not isinstance(scales, Sequence) or not scales or not all(s > 0 for s in scales):
        raise ValueError(f"scales must be factors above 0, got {scales!r}")
    for name, value in (("window_batch", window_batch), ("short_side", short_side)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if isinstance(prune, bool) or not isinstance(prune, int | float) or not 0 <= prune < 1:
        raise ValueError(f"prune must be a probability in [0, 1), got {prune!r}")
    size, crop, stride = as_pair("size", size), as_pair("crop_size", crop_size), as_pair("stride", stride)
    if mode == "whole" and (crop or stride):
        raise ValueError('crop_size and stride go with mode "slide" or "auto"')
    crop = crop or model.image_size
    stride = stride or tuple(max(c * 2 // 3, 1) for c in crop)
    if stride[0] > crop[0] or stride[1] > crop[1]:
        raise ValueError(f"stride must not exceed crop_size, or pixels are skipped; got {stride} and {crop}")
    variants = [(s, f) for s in scales for f in ((False, True) if flip else (False,))]
    return _Plan(size, mode, crop, stride, output, protocol, variants, short_side, window_batch, prune)


def _prepare(model: nn.Module, images) -> tuple[Iterable[Tensor], bool]:
    """Normalised batches [B, C, H, W] on the model's device, and whether it is one batch to return as it is.

    They are float32 or float64: what is resized is rounded to the model's dtype once, afterwards.
    """
    channels, device = len(model.mean), model.mean.device
    if isinstance(images, Tensor):
        if images.is_floating_point():
            if images.dim() != 4:
                raise ValueError(f"images: a float tensor must be [B, C, H, W], got {tuple(images.shape)}")
            if images.device != device:
                raise ValueError(f"images are on {images.device}, but the model is on {device}")
            return [images if images.dtype == torch.float64 else images.float()], True
        if images.dtype != torch.uint8 or images.dim() not in (3, 4):
            raise ValueError(f"images: an integer tensor must be uint8 [B, C, H, W], got {images.dtype}")
        return [normalise(model, images if images.dim() == 4 else images[None])], True
    if isinstance(images, (str, Path, Image.Image, np.ndarray)):
        return [normalise(model, raw_image(images, channels))[None]], True
    if not isinstance(images, Sequence) or not images:
        raise ValueError(f"images must be a tensor, an array, a picture, a path or a sequence of these, got {images!r}")
    return (normalise(model, raw_image(image, channels))[None] for image in images), False


def normalise(model: nn.Module, raw: Tensor) -> Tensor:
    """Images [..., C, H, W] of a data set or a file as the model takes them, float32 on its device.

    uint8 is divided by 255; floats are on the scale of the model's mean and std already. Raises ValueError for another
    number of channels.
    """
    mean, std = model.mean.float()[:, None, None], model.std.float()[:, None, None]
    if raw.shape[-3] != len(mean):
        raise ValueError(f"images: the model takes {len(mean)} channels, got {raw.shape[-3]}")
    full = 255 if raw.dtype == torch.uint8 else 1
    return (raw.to(mean.device).float() / full - mean) / std


def raw_image(image: Picture, channels: int) -> Tensor:
    """[C, H, W] of one picture, uint8 or scaled float32; see to_tensor."""
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3:
            raise ValueError(
                f"images: tensors in a sequence must be uint8 [C, H, W], got {image.dtype} {image.dim()}-d"
            )
        return image
    return to_tensor(read_image(image, channels) if isinstance(image, str | Path) else image, channels)


def _predict_batch(model: nn.Module, images: Tensor, plan: _Plan) -> Tensor:
    target, labels = plan.size or tuple(images.shape[2:]), plan.output == "labels"
    if labels and len(plan.variants) == 1:
        x = rescaled(images, plan.short_side, plan.variants[0][0])
        if plan.protocol == "fused" and not plan.slides(x.shape[2:]):
            masks, probs, extent = _masks(model, x)
            return mask_decode(masks, probs, target, extent=extent, prune=plan.prune)
        return _labels(_score_rows(model, x, plan), tuple(x.shape[2:]), target)
    total = 0
    for scale, mirrored in plan.variants:
        x = rescaled(images, plan.short_side, scale)
        scores = _scores(model, x.flip(-1) if mirrored else x, plan)
        scores = _resize(scores.flip(-1) if mirrored else scores, target)
        total = total + (scores if plan.output == "scores" else scores.softmax(1))
    return total.argmax(1).to(label_dtype(total.shape[1])) if labels else total / len(plan.variants)


def rescaled(images: Tensor, short_side: int | None, scale: float = 1) -> Tensor:
    """Images [B, C, H, W] as predict resizes them before the model sees them (bilinear)."""
    return _resize(images, rescaled_size(images.shape[2:], short_side, scale))


def rescaled_size(size: Sequence[int], short_side: int | None, scale: float = 1) -> tuple[int, int]:
    """(height, width) that predict resizes an image to: its short side first, then times the scale."""
    scale *= short_side / min(size) if short_side else 1
    return tuple(max(round(side * scale), 1) for side in size)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _masks(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Mask logits [B, N, h, w] and class probabilities [B, N, K] of the last stage, and the extent of the images."""
    return last_stage(model, in_own_dtype(model, images))


def in_own_dtype(model: nn.Module, images: Tensor) -> SegViTOutput:
    """The model's output for normalised images of any float type, which are cast to its own."""
    return model(images.to(next(model.parameters()).dtype))


def last_stage(model: nn.Module, out: SegViTOutput) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """What predict decodes of a model's output: masks, probabilities and extent, see mask_decode."""
    probs = out.class_logits[-1].softmax(-1)[..., :-1]
    device, dtype = out.mask_logits.device.type, next(model.parameters()).dtype
    half = dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device)
    if device == "cuda" and half:
        probs = probs.half()  # a model that computes in half precision is decoded in it
    return out.mask_logits[-1], probs, out.extent


def _scores(model: nn.Module, images: Tensor, plan: _Plan) -> Tensor:  # [B, K, H, W]
    """Scores at the images' size, whole or averaged over windows."""
    out = None
    for top, rows in _score_rows(model, images, plan):
        if top == 0 and rows.shape[2] == images.shape[2]:
            return rows
        out = rows.new_empty(*rows.shape[:2], *images.shape[2:]) if out is None else out
        out[:, :, top : top + rows.shape[2]] = rows
    return out


def _score_rows(model: nn.Module, images: Tensor, plan: _Plan) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores [B, K, rows, W]) from top to bottom, whole or averaged over windows.

    Of sliding windows only the rows that open windows cover are kept: crop × W × K numbers whatever the height. What
    is yielded is overwritten afterwards.
    """
    B, _, H, W = images.shape
    if not plan.slides((H, W)):
        masks, probs, extent = _masks(model, images)
        yield 0, mask_decode(masks, probs, (H, W), "scores", extent=extent, prune=plan.prune)
        return
    height, width = min(plan.crop[0], H), min(plan.crop[1], W)
    tops, lefts = _starts(H, height, plan.stride[0]), _starts(W, width, plan.stride[1])
    band, counts = None, torch.zeros(height, W, device=images.device)
    step = max(1, plan.window_batch // B)
    for top, after in zip(tops, [*tops[1:], H]):
        for i in range(0, len(lefts), step):
            some = lefts[i : i + step]
            windows = torch.cat([images[:, :, top : top + height, left : left + width] for left in some])
            masks, probs, extent = _masks(model, windows)
            if band is None:
                band = masks.new_zeros(B, probs.shape[2], height, W)
            for j, left in enumerate(some):
                rows = slice(j * B, (j + 1) * B)
                canvas = {"out": band, "counts": counts, "window": (0, left), "prune": plan.prune}
                mask_decode(masks[rows], probs[rows], (height, width), "scores", extent=extent, **canvas)
        done = after - top  # no later window reaches these rows
        yield top, band[:, :, :done].div_(counts[:done])
        for first in range(done, height, done):  # move up what is still open, in pieces that do not overlap
            piece = slice(first, min(first + done, height))
            band[:, :, first - done : piece.stop - done] = band[:, :, piece]
            counts[first - done : piece.stop - done] = counts[piece]
        band[:, :, height - done :], counts[height - done :] = 0, 0


def _labels(parts: Iterator[tuple[int, Tensor]], size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Argmax [B, *target] of scores of an image of `size` that arrive in rows, resized (bilinear) on the way."""
    labels, written, before = None, 0, None
    y = sample_positions(size[0], target[0], size[0])
    for top, rows in parts:
        B, K, height, width = rows.shape
        if labels is None:
            labels = torch.empty(B, *target, dtype=label_dtype(K), device=rows.device)
            strip = max(STRIP_BYTES // (4 * B * K * max(width, target[1])), 1)
        ready = int((y.ceil() < top + height).sum())  # rows whose neighbours are all there
        for first in range(written, ready, strip):
            here = slice(first, min(first + strip, ready))
            scores = _between(rows, before, y[here] - top)
            if width != target[1]:
                scores = F.interpolate(scores, (scores.shape[2], target[1]), mode="bilinear", align_corners=False)
            labels[:, here] = scores.argmax(1)
        written, before = ready, rows[:, :, -1:].clone()
    return labels


def _between(rows: Tensor, before: Tensor | None, y: Tensor) -> Tensor:
    """Scores [B, K, len(y), W] at heights y, linear between rows; row −1 is `before`, the last of the part above."""
    low = y.floor().long()
    index, last = low.to(rows.device), rows.shape[2] - 1
    if torch.equal(y, low.to(y.dtype)):
        consecutive = int(low[-1] - low[0]) + 1 == len(low)
        return rows[:, :, int(low[0]) : int(low[-1]) + 1] if consecutive else rows.index_select(2, index)
    weight = (y - low)[:, None].to(rows)
    upper, lower = rows.index_select(2, index.clamp(min=0)), rows.index_select(2, (index + 1).clamp(max=last))
    if before is not None and low[0] < 0:
        upper = torch.where((index < 0)[:, None], before, upper)
    return torch.lerp(upper, lower, weight)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin on one axis; the last is shifted back to the edge."""
    count = max(math.ceil((length - window) / stride), 0) + 1
    return [min(i * stride, length - window) for i in range(count)]
