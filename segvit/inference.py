"""Prediction of whole images and of sliding windows, with several scales and flips; and evaluation on a data set."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from segvit.data.images import read_image, to_tensor
from segvit.models.segvit import as_pair
from segvit.ops import mask_decode
from segvit.ops.reference.mask_decode import label_dtype

OUTPUTS = ("labels", "scores", "probabilities")
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
    window_batch: int = 4,
) -> Tensor | list[Tensor]:
    """Segment images.

    Args:
        model: a SegViT; its train or eval mode is left as it was found.
        images: a float tensor [B, C, H, W] is used as it is (normalised, on the model's device). Everything else is
            scaled to 0…1 and normalised with the model's mean and std: uint8 tensors [B, C, H, W] or [C, H, W], arrays
            [H, W, C] or [H, W], PIL images, paths, or a sequence of these.
        size: (height, width), or one int, of the result; None: each image's own.
        mode: "whole", or "slide": windows of crop_size every stride pixels, averaged where they overlap.
        crop_size, stride: int or (height, width); None: the model's image_size, and two thirds of the crop.
        output: "labels", "scores" (a sum over class tokens, may exceed 1) or "probabilities" (softmax of the scores: a
            ranking, no confidence).
        protocol: "fused" decodes labels straight at `size`; "paper" decodes scores at the image's size, resizes them
            (bilinear) and takes the argmax. Scores, probabilities, windows and several scales follow the paper.
        scales, flip: resize the image by each factor, also mirror it, and average the probabilities (scores for
            output="scores").
        window_batch: windows that go through the model at once.

    Returns:
        labels [B, H, W] (uint8 up to 256 classes, else int16), or float32 [B, K, H, W]. A sequence of images of
        different sizes, with size=None, gives a list, one [H, W] or [K, H, W] each.

    Raises:
        ValueError: an argument that does not fit, named.
        FileNotFoundError: a path that is not there.
    """
    size, crop, stride = _check(model, size, mode, crop_size, stride, output, protocol, scales, window_batch)
    batches, single = _prepare(model, images)
    arguments = (model, size, crop, stride, output, protocol, tuple(scales), flip, window_batch)
    with torch.no_grad(), evaluating(model):
        results = [_predict_batch(batch, *arguments) for batch in batches]
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


def _check(model, size, mode, crop_size, stride, output, protocol, scales, window_batch):
    """Refuse what does not fit; return size, crop and stride as pairs, or None."""
    for name, value, allowed in (
        ("mode", mode, ("whole", "slide")),
        ("output", output, OUTPUTS),
        ("protocol", protocol, ("fused", "paper")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not isinstance(scales, Sequence) or not scales or not all(s > 0 for s in scales):
        raise ValueError(f"scales must be factors above 0, got {scales!r}")
    if not isinstance(window_batch, int) or window_batch < 1:
        raise ValueError(f"window_batch must be an integer of at least 1, got {window_batch!r}")
    size = as_pair("size", size)
    if mode == "whole":
        return size, None, None
    crop = as_pair("crop_size", crop_size) or model.image_size
    stride = as_pair("stride", stride) or tuple(max(c * 2 // 3, 1) for c in crop)
    if stride[0] > crop[0] or stride[1] > crop[1]:
        raise ValueError(f"stride must not exceed crop_size, or pixels are skipped; got {stride} and {crop}")
    return size, crop, stride


def _prepare(model: nn.Module, images) -> tuple[Iterable[Tensor], bool]:
    """Normalised batches [B, C, H, W] on the model's device, and whether it is one batch to return as it is."""
    mean, std = model.mean.float()[:, None, None], model.std.float()[:, None, None]
    channels, dtype = len(mean), next(model.parameters()).dtype

    def normalised(raw: Tensor) -> Tensor:
        if raw.shape[-3] != channels:
            raise ValueError(f"images: the model takes {channels} channels, got {raw.shape[-3]}")
        return ((raw.to(mean.device).float() / 255 - mean) / std).to(dtype)

    if isinstance(images, Tensor):
        if images.is_floating_point():
            if images.dim() != 4:
                raise ValueError(f"images: a float tensor must be [B, C, H, W], got {tuple(images.shape)}")
            if images.device != mean.device:
                raise ValueError(f"images are on {images.device}, but the model is on {mean.device}")
            return [images], True
        if images.dtype != torch.uint8 or images.dim() not in (3, 4):
            raise ValueError(f"images: an integer tensor must be uint8 [B, C, H, W], got {images.dtype}")
        return [normalised(images if images.dim() == 4 else images[None])], True
    if isinstance(images, (str, Path, Image.Image, np.ndarray)):
        return [normalised(_raw(images, channels))[None]], True
    if not isinstance(images, Sequence) or not images:
        raise ValueError(f"images must be a tensor, an array, a picture, a path or a sequence of these, got {images!r}")
    return (normalised(_raw(image, channels))[None] for image in images), False


def _raw(image, channels: int) -> Tensor:
    """uint8 [C, H, W] of one picture."""
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3:
            raise ValueError(
                f"images: tensors in a sequence must be uint8 [C, H, W], got {image.dtype} {image.dim()}-d"
            )
        return image
    return to_tensor(read_image(image, channels) if isinstance(image, str | Path) else image, channels)


def _predict_batch(images, model, size, crop, stride, output, protocol, scales, flip, window_batch) -> Tensor:
    target = size or tuple(images.shape[2:])
    if output == "labels" and protocol == "fused" and crop is None and len(scales) == 1 and not flip and scales[0] == 1:
        masks, probs, extent = _masks(model, images)
        return mask_decode(masks, probs, target, extent=extent)
    total, variants = 0, [(s, f) for s in scales for f in ((False, True) if flip else (False,))]
    for scale, mirrored in variants:
        x = images if scale == 1 else _resize(images, tuple(max(round(n * scale), 1) for n in images.shape[2:]))
        scores = _scores(model, x.flip(-1) if mirrored else x, crop, stride, window_batch)
        scores = _resize(scores.flip(-1) if mirrored else scores, target)
        # One variant needs no softmax to find its argmax.
        total = total + (
            scores if output == "scores" or (output == "labels" and len(variants) == 1) else scores.softmax(1)
        )
    if output != "labels":
        return total / len(variants)
    return total.argmax(1).to(label_dtype(total.shape[1]))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _masks(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Mask logits [B, N, h, w] and class probabilities [B, N, K] of the last stage, and the extent of the images."""
    out = model(images)
    return out.mask_logits[-1], out.class_logits[-1].softmax(-1)[..., :-1], out.extent


def _scores(model, images, crop, stride, window_batch) -> Tensor:  # [B, K, H, W]
    """Scores at the images' size, whole or averaged over windows."""
    if crop is None:
        masks, probs, extent = _masks(model, images)
        return mask_decode(masks, probs, tuple(images.shape[2:]), "scores", extent=extent)
    B, _, H, W = images.shape
    height, width = min(crop[0], H), min(crop[1], W)
    corners = [(top, left) for top in _starts(H, height, stride[0]) for left in _starts(W, width, stride[1])]
    out, counts = None, torch.zeros(H, W, device=images.device)
    step = max(1, window_batch // B)
    for i in range(0, len(corners), step):
        some = corners[i : i + step]
        windows = torch.cat([images[:, :, top : top + height, left : left + width] for top, left in some])
        masks, probs, extent = _masks(model, windows)
        if out is None:
            out = masks.new_zeros(B, probs.shape[2], H, W)
        for j, corner in enumerate(some):
            rows = slice(j * B, (j + 1) * B)
            canvas = {"out": out, "counts": counts, "window": corner}
            mask_decode(masks[rows], probs[rows], (height, width), "scores", extent=extent, **canvas)
    return out.div_(counts)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin on one axis; the last is shifted back to the edge."""
    count = max(math.ceil((length - window) / stride), 0) + 1
    return [min(i * stride, length - window) for i in range(count)]
