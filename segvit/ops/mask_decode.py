"""mask_decode: from mask logits and class probabilities to labels or scores, without the N×H×W tensors in between."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _checks
from ._dispatch import NATIVE_MISSING, choose, triton_missing, without_autocast
from ._library import LIBRARY, register
from .reference import mask_decode as reference_decode
from .reference._sampling import bilinear_matrix
from .reference.mask_decode import label_dtype, no_class

TILE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of pixels × classes: a core's cache; on a GPU, few launches


def mask_decode(
    mask_logits: Tensor,  # [B, N, h, w]
    class_probs: Tensor,  # [B, N, K]
    size: tuple[int, int],
    output: str = "labels",
    dtype: torch.dtype | None = None,
    confidence: bool = False,
    prune: float = 0.0,
    extent: tuple[float, float] | None = None,
    out: Tensor | None = None,  # [B, K, Hc, Wc]
    counts: Tensor | None = None,  # [Hc, Wc]
    window: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label map or scores of a mask classifier at any output size.

    score[b, c, p] = Σ_n class_probs[b, n, c]·sigmoid(bilinear(mask_logits[b, n], p)), align_corners=False. It is a sum
    over queries and may exceed 1. (SegViT, arXiv 2210.05844, section 3.3.)

    Args:
        mask_logits: [B, N, h, w], float; sums are in float32 (float64 for float64).
        class_probs: [B, N, K], softmax over K+1 without the no-object column; same device. Its dtype says how exact the
            "triton" backend is: float16 and bfloat16 mean float16 products, with errors of a score up to 1e-3; float32
            is as exact as float32, unless torch.set_float32_matmul_precision allows less.
        size: (H, W) of the output.
        output: "labels" (argmax over classes; of equals the lower one, but any of them from "triton") or "scores".
        dtype: of the labels; uint8 up to 256 classes, else int16, by default.
        confidence: with "labels", also return the winning score [B, H, W], float32 (float64 for float64 inputs).
        prune: drop queries whose largest class probability is below this ε; changes a score by less than N_dropped·ε.
        extent: (rows, columns), in cells, of the upper left part of the mask grid that the output covers; default all.
            For an image padded right and bottom to the patch size: (H / patch, W / patch).
        out, counts, window: with "scores", add the scores to out [B, K, Hc, Wc] and one to counts [Hc, Wc] in place, at
            window = (top, left); returns `out`. For sliding windows.
        backend: "triton" (CUDA), "native" (C++, CPU), "tiled" (PyTorch, a few rows at a time; keeps N·h·W numbers),
            "reference", or None for the best that can run. The first three make no tensor of the size N·H·W nor, for
            labels, of K·H·W.

    Returns:
        labels [B, H, W]; or (labels, confidence); or scores [B, K, H, W] float32 (float64 for float64 inputs).

    Raises:
        ValueError: arguments that do not fit each other, a gradient that would be lost (there is none), or, on the CPU,
            numbers that are NaN or infinite. A GPU does not wait to find out: pixels (and from "triton" their
            neighbours) of NaN masks get the label -1, which is 255 in uint8, and the confidence NaN.
        RuntimeError: a backend that was asked for and cannot run.
    """
    size, (rows, columns) = _check(mask_logits, class_probs, size, output, extent, prune, dtype, confidence)
    backend = _choose(backend, mask_logits, class_probs)
    arguments = (mask_logits.detach(), class_probs.detach(), *size)
    tail = (float(prune), rows, columns, backend)
    with without_autocast(mask_logits.device):
        if out is not None or counts is not None or window is not None:
            top, left = _check_window(mask_logits, class_probs, size, output, out, counts, window)
            torch.ops.segvit.mask_decode_accumulate(*arguments, out, counts, top, left, *tail)
            return out
        if output == "scores":
            return torch.ops.segvit.mask_decode_scores(*arguments, *tail)
        dtype = _check_label_dtype(dtype, class_probs.shape[2])
        labels, best = torch.ops.segvit.mask_decode(*arguments, dtype, confidence, *tail)
        return (labels, best) if confidence else labels


def _choose(backend: str | None, mask_logits: Tensor, class_probs: Tensor) -> str:
    native = ("native", lambda: _native_reason(mask_logits))
    triton = ("triton", lambda: _triton_reason(mask_logits, class_probs))
    candidates = [native, ("tiled", None), ("reference", None)]  # an interpreted kernel is for those who ask for it
    candidates.insert(0 if mask_logits.is_cuda else 3, triton)
    return choose("mask_decode", backend, candidates)


def _native_reason(mask_logits: Tensor) -> str | None:
    if mask_logits.device.type != "cpu" or mask_logits.dtype == torch.float64:
        return (
            f"it takes float32, bfloat16 and float16 on the CPU; got {mask_logits.dtype} on {mask_logits.device.type}"
        )
    return NATIVE_MISSING


def _triton_reason(mask_logits: Tensor, class_probs: Tensor) -> str | None:
    reason = triton_missing(mask_logits.device)
    if reason is None:
        from segvit.kernels.mask_decode import unsupported

        reason = unsupported(mask_logits, class_probs)
    return reason


def _check(mask_logits, class_probs, size, output, extent, prune, dtype, confidence):
    """Refuse what does not fit; return size and extent as numbers."""
    op = "mask_decode"
    _checks.tensor(op, "mask_logits", mask_logits, "[B, N, h, w]")
    _checks.tensor(op, "class_probs", class_probs, "[B, N, K]")
    if mask_logits.shape[:2] != class_probs.shape[:2]:
        shapes = f"{tuple(mask_logits.shape)} and {tuple(class_probs.shape)}"
        raise ValueError(
            f"{op}: mask_logits [B, N, h, w] and class_probs [B, N, K] must agree in B and N, got {shapes}"
        )
    if (mask_logits.dtype == torch.float64) != (class_probs.dtype == torch.float64):
        raise ValueError(f"{op}: float64 goes with float64, got {mask_logits.dtype} and {class_probs.dtype}")
    if 0 in mask_logits.shape or 0 in class_probs.shape:
        raise ValueError(f"{op}: no dimension may be zero, got {tuple(mask_logits.shape)}, {tuple(class_probs.shape)}")
    _checks.same_device(op, mask_logits=mask_logits, class_probs=class_probs)
    if output not in ("labels", "scores"):
        raise ValueError(f'{op}: output must be "labels" or "scores", got {output!r}')
    if output == "scores" and (dtype is not None or confidence):
        raise ValueError(f'{op}: dtype and confidence go with output="labels"')
    if isinstance(prune, bool) or not isinstance(prune, int | float) or not prune >= 0:
        raise ValueError(f"{op}: prune must be a number of at least 0, got {prune!r}")
    if torch.is_grad_enabled() and (mask_logits.requires_grad or class_probs.requires_grad):
        raise ValueError(f"{op}: has no gradient; detach the inputs or call it under torch.no_grad()")
    return _checks.pair(op, "size", size), _checks.extent(op, extent, tuple(mask_logits.shape[2:]))


def _check_label_dtype(dtype: torch.dtype | None, num_classes: int) -> torch.dtype:
    if dtype is None and num_classes > 1 << 15:
        raise ValueError(f"mask_decode: {num_classes} classes do not fit int16; say dtype=torch.int32")
    dtype = dtype or label_dtype(num_classes)
    if dtype not in _checks.INTEGERS or torch.iinfo(dtype).max < num_classes - 1:
        raise ValueError(f"mask_decode: dtype must be an integer type that holds {num_classes} classes, got {dtype}")
    return dtype


def _check_window(mask_logits, class_probs, size, output, out, counts, window) -> tuple[int, int]:
    op = "mask_decode"
    if output != "scores" or out is None or counts is None or window is None:
        raise ValueError(f'{op}: out, counts and window go together, and with output="scores"')
    wanted = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
    _checks.tensor(op, "out", out, "[B, K, Hc, Wc]", (wanted,))
    _checks.tensor(op, "counts", counts, "[Hc, Wc]", (*_checks.FLOATS, *_checks.INTEGERS))
    _checks.same_device(op, mask_logits=mask_logits, out=out, counts=counts)
    if out.requires_grad:
        raise ValueError(f"{op}: out requires a gradient, which adding in place would lose")
    if any(stride == 0 and side > 1 for stride, side in zip(out.stride(), out.shape)):
        raise ValueError(f"{op}: out is expanded, several of its elements are one")
    top, left = _checks.pair(op, "window", window, low=0)
    B, K = mask_logits.shape[0], class_probs.shape[2]
    if out.shape[:2] != (B, K) or counts.shape != out.shape[2:]:
        shapes = f"{tuple(out.shape)} and {tuple(counts.shape)}"
        raise ValueError(f"{op}: out must be [B, K, Hc, Wc] with B, K = {B}, {K} and counts [Hc, Wc], got {shapes}")
    if top + size[0] > out.shape[2] or left + size[1] > out.shape[3]:
        canvas = tuple(out.shape[2:])
        raise ValueError(f"{op}: the window at {(top, left)} of size {size} leaves the canvas out [.., {canvas}]")
    return top, left


def _float(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _finite(mask_logits: Tensor, class_probs: Tensor) -> None:
    """Refuse NaN and infinity where looking costs nothing; a GPU would have to be waited for."""
    for name, t in (("mask_logits", mask_logits), ("class_probs", class_probs)):
        if t.device.type == "cpu" and not t.isfinite().all():
            raise ValueError(
                f"mask_decode: {name} contain NaN or infinity; look for the layer or the learning rate that made them"
            )


def _score_tiles(
    mask_logits, class_probs, height, width, prune, rows, columns
) -> Iterator[tuple[int, slice, Tensor]]:  # image, its rows, scores [rows, width, K]
    """Scores a few rows at a time: widen to [h, W·N] once, then per tile a small GEMM for rows, one for classes."""
    h, w = mask_logits.shape[2:]
    down = bilinear_matrix(h, height, rows, _float(mask_logits))  # [H, h]
    across = bilinear_matrix(w, width, columns, _float(mask_logits))  # [W, w]
    for b, (logits, probs) in enumerate(zip(_float(mask_logits), _float(class_probs).to(down.dtype))):
        if prune > 0:
            keep = ~(probs.amax(-1) < prune)
            if keep.device.type == "cpu" and keep.any():
                logits, probs = logits[keep], probs[keep]
            else:  # a compaction by shape would wait for the device
                probs = probs * keep[:, None]
        wide = (across @ logits.permute(1, 2, 0)).flatten(1)  # [h, W·N]
        tile_bytes = TILE_BYTES.get(wide.device.type, TILE_BYTES["cuda"])
        step = max(1, tile_bytes // (width * max(*probs.shape, 1) * wide.element_size()))
        for top in range(0, height, step):
            tile = slice(top, min(top + step, height))
            used = _used_cells(tile, height, rows, h)
            masks = (down[tile, used] @ wide[used]).sigmoid_().view(-1, probs.shape[0])
            yield b, tile, (masks @ probs).view(-1, width, probs.shape[1])


def _used_cells(tile: slice, size: int, extent: float, cells: int) -> slice:
    """The grid cells that these output rows read."""
    low, high = (min(max((i + 0.5) * extent / size - 0.5, 0), cells - 1) for i in (tile.start, tile.stop - 1))
    return slice(max(int(low) - 1, 0), min(int(high) + 3, cells))


def _native_inputs(mask_logits, class_probs) -> tuple[Tensor, Tensor]:
    """What the C++ kernel reads; differences of logits must not overflow."""
    return mask_logits.float().clamp(-1e30, 1e30).contiguous(), class_probs.float().contiguous()


def _labels(mask_logits, class_probs, height, width, dtype, confidence, prune, rows, columns, backend):
    _finite(mask_logits, class_probs)
    B = mask_logits.shape[0]
    best = _float(mask_logits).new_empty((B, height, width) if confidence else (0,))
    if backend == "reference":
        logits, probs = _float(mask_logits), _float(class_probs)
        result = reference_decode(logits, probs, (height, width), "labels", dtype, True, prune, (rows, columns))
        return result[0], result[1] if confidence else best
    labels = torch.empty((B, height, width), dtype=dtype, device=mask_logits.device)
    if backend == "triton":
        from segvit.kernels.mask_decode import decode

        decode(mask_logits, class_probs, (rows, columns), prune, labels, best if confidence else None)
    elif backend == "native":
        inputs = _native_inputs(mask_logits, class_probs)
        torch.ops.segvit.mask_decode_labels_native(*inputs, labels, best, prune, rows, columns)
    else:
        for b, tile, scores in _score_tiles(mask_logits, class_probs, height, width, prune, rows, columns):
            value, winner = scores.max(-1)
            labels[b, tile] = no_class(value, winner).to(dtype)
            if confidence:
                best[b, tile] = value
    return labels, best


def _labels_fake(mask_logits, class_probs, height, width, dtype, confidence, prune, rows, columns, backend):
    shape = (mask_logits.shape[0], height, width)
    best = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
    return mask_logits.new_empty(shape, dtype=dtype), mask_logits.new_empty(shape if confidence else (0,), dtype=best)


def _scores(mask_logits, class_probs, height, width, prune, rows, columns, backend):
    _finite(mask_logits, class_probs)
    if backend == "reference":
        logits, probs = _float(mask_logits), _float(class_probs)
        return reference_decode(logits, probs, (height, width), "scores", prune=prune, extent=(rows, columns))
    out = _float(mask_logits).new_empty((mask_logits.shape[0], class_probs.shape[2], height, width))
    _write_scores(mask_logits, class_probs, out, False, prune, rows, columns, backend)
    return out


def _write_scores(mask_logits, class_probs, out, add, prune, rows, columns, backend) -> None:
    """Scores into out [B, K, H, W], or added to it."""
    if backend == "triton":
        from segvit.kernels.mask_decode import decode

        decode(mask_logits, class_probs, (rows, columns), prune, scores=out, add=add)
    elif backend == "native":
        inputs = _native_inputs(mask_logits, class_probs)
        torch.ops.segvit.mask_decode_scores_native(*inputs, out, add, prune, rows, columns)
    else:
        for b, tile, scores in _score_tiles(mask_logits, class_probs, *out.shape[2:], prune, rows, columns):
            scores = scores.permute(2, 0, 1)
            out[b, :, tile] = out[b, :, tile] + scores if add else scores


def _scores_fake(mask_logits, class_probs, height, width, prune, rows, columns, backend):
    dtype = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
    return mask_logits.new_empty((mask_logits.shape[0], class_probs.shape[2], height, width), dtype=dtype)


def _accumulate(mask_logits, class_probs, height, width, out, counts, top, left, prune, rows, columns, backend) -> None:
    _finite(mask_logits, class_probs)  # before anything is written
    canvas = out[:, :, top : top + height, left : left + width]
    if backend == "reference":
        canvas += _scores(mask_logits, class_probs, height, width, prune, rows, columns, backend)
    else:
        strided = canvas.stride(3) != 1 and backend != "tiled"  # kernels write contiguous rows
        whole = canvas.contiguous() if strided else canvas
        _write_scores(mask_logits, class_probs, whole, True, prune, rows, columns, backend)
        if strided:
            canvas.copy_(whole)
    counts[top : top + height, left : left + width] += 1


_INPUTS = "Tensor mask_logits, Tensor class_probs, SymInt height, SymInt width"
_TAIL = "float prune, float rows, float columns, str backend"
register(
    f"mask_decode({_INPUTS}, ScalarType dtype, bool confidence, {_TAIL}) -> (Tensor, Tensor)", _labels, _labels_fake
)
register(f"mask_decode_scores({_INPUTS}, {_TAIL}) -> Tensor", _scores, _scores_fake)
register(
    f"mask_decode_accumulate({_INPUTS}, Tensor(a!) out, Tensor(b!) counts, SymInt top, SymInt left, {_TAIL}) -> ()",
    _accumulate,
    lambda *args: None,
)
_NATIVE = "Tensor mask_logits, Tensor class_probs"
LIBRARY.define(
    f"mask_decode_labels_native({_NATIVE}, Tensor(a!) labels, Tensor(b!) best, float prune, float rows, float columns)"
    " -> ()"
)
LIBRARY.define(
    f"mask_decode_scores_native({_NATIVE}, Tensor(a!) scores, bool add, float prune, float rows, float columns) -> ()"
)
