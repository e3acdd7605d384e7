"""Triton kernels of mask_decode; the formula is in segvit/ops/reference/mask_decode.py.

Four launches. `mask_decode_table` turns the logits to [cells, queries] and notes every query's largest one.
`mask_decode_order` lists the queries that are kept and, for labels, orders the classes by a bound of their score.
`mask_decode_pack` sorts class_probs accordingly. `mask_decode_pixels` then owns a tile of pixels: interpolation is a
product of [pixels, 16 cells around the tile] with [16 cells, queries], whose sigmoid feeds the product with class_probs
from registers; a running argmax goes over tiles of classes. Where few classes have a chance they come first, in a small
tile, and the rest is left out once every pixel's best score is above what any other class can reach.

float16 and bfloat16 class_probs run in float16 products; float32 ones in three TF32 products, as exact as float32.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import halves, on_device

TILE = (8, 8)  # rows and columns of pixels a program owns
CELLS = tl.constexpr(4)  # rows and columns of cells that the product interpolates from
LOWEST = tl.constexpr(-1e38)  # below every score
LIMIT = 1024  # queries and classes
FEW = 32  # classes of the first, small tile
PACKED = 32  # rows and columns of class_probs that a program packs; every width above is a multiple


@triton.jit(do_not_specialize=["N", "cells"])
def mask_decode_table(
    logits_ptr,  # [B, N, h·w]
    table_ptr,  # [B, h·w, row]: scale · logits, zeros from N on
    most_ptr,  # [B, tiles, N] float32: largest logit of a tile of cells
    N,
    cells,
    row,  # a multiple of BLOCK_N
    scale,
    limit,  # what the table's dtype can hold, and differences of it
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b, tile = tl.program_id(2).to(tl.int64), tl.program_id(0)
    o_n, o_l = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tile * BLOCK_L + tl.arange(0, BLOCK_L)
    there = (o_n < N)[:, None] & (o_l < cells)[None, :]
    x = tl.load(logits_ptr + (b * N + o_n[:, None]) * cells + o_l[None, :], mask=there, other=0.0).to(tl.float32)
    most = tl.max(tl.where(there, x, float("-inf")), 1)
    tl.store(most_ptr + (b * tl.num_programs(0) + tile) * N + o_n, most, mask=o_n < N)
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x)) * scale  # NaN stays
    p_out = table_ptr + (b * cells + o_l[:, None]) * row + o_n[None, :]
    tl.store(p_out, tl.trans(x).to(table_ptr.dtype.element_ty), mask=(o_l < cells)[:, None])


@triton.jit(do_not_specialize=["N", "K", "tiles"])
def mask_decode_order(
    probs_ptr,  # [B, N, K]
    most_ptr,  # [B, tiles, N] float32
    queries_ptr,  # [B, N] int32: the queries that are kept
    kept_ptr,  # [B] int32: how many
    classes_ptr,  # [B, K] int32: classes, the one with the largest bound first
    bounds_ptr,  # [B, K] float32: no pixel's score of that class is larger
    N,
    K,
    tiles,
    prune,
    ORDER: tl.constexpr,
    PRUNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of two of at least K
    BLOCK_T: tl.constexpr,
):
    """One program an image."""
    b = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    bounds = tl.zeros([BLOCK_K], tl.float32)
    kept = 0
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        there = (o_n < N)[:, None] & (o_k < K)[None, :]
        p = tl.load(probs_ptr + (b * N + o_n[:, None]) * K + o_k[None, :], mask=there, other=0.0).to(tl.float32)
        keep = (o_n < N).to(tl.int32)
        if PRUNED:
            largest = tl.max(tl.where(p == p, p, float("inf")), 1)  # NaN is kept, and shows
            keep = keep & (largest >= prune).to(tl.int32)
        place = kept + tl.cumsum(keep, 0) - 1
        tl.store(queries_ptr + b * N + place, o_n, mask=keep > 0)
        kept += tl.sum(keep, 0)
        if ORDER:
            most = tl.full([BLOCK_N], float("-inf"), tl.float32)
            for tile in range(0, tiles, BLOCK_T):
                o_t = tile + tl.arange(0, BLOCK_T)
                part = most_ptr + (b * tiles + o_t[:, None]) * N + o_n[None, :]
                known = (o_t < tiles)[:, None] & (o_n < N)[None, :]
                most = tl.maximum(most, tl.max(tl.load(part, mask=known, other=float("-inf")), 0))
            share = tl.where(keep > 0, tl.sigmoid(most), 0.0)
            bounds += tl.sum(tl.maximum(p, 0.0) * share[:, None], 0)
    tl.store(kept_ptr + b, kept)
    classes = o_k
    if ORDER:
        bits = tl.where(o_k < K, bounds, 0.0).to(tl.int32, bitcast=True)  # not negative: ordered as integers
        key = ((0x7FFFFFFF - bits).to(tl.int64) << 32) | o_k.to(tl.int64)
        key = tl.sort(key)
        classes = (key & 0x7FFFFFFF).to(tl.int32)
        bounds = (0x7FFFFFFF - (key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        tl.store(bounds_ptr + b * K + o_k, bounds, mask=o_k < K)
    tl.store(classes_ptr + b * K + o_k, classes, mask=o_k < K)


@triton.jit(do_not_specialize=["N", "K"])
def mask_decode_pack(
    probs_ptr,  # [B, N, K]
    queries_ptr,  # [B, N] int32
    kept_ptr,  # [B] int32
    classes_ptr,  # [B, K] int32
    packed_ptr,  # [B, N, width]: class_probs of kept queries, classes in order, zeros from K on
    N,
    K,
    width,  # a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    kept = tl.load(kept_ptr + b)
    o_n, o_k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.load(queries_ptr + b * N + o_n, mask=o_n < kept, other=0)
    c = tl.load(classes_ptr + b * K + o_k, mask=o_k < K, other=0)
    there = (o_n < kept)[:, None] & (o_k < K)[None, :]
    p = tl.load(probs_ptr + (b * N + n[:, None]) * K + c[None, :], mask=there, other=0.0)
    p_out = packed_ptr + (b * N + o_n[:, None]) * width + o_k[None, :]
    tl.store(p_out, p.to(packed_ptr.dtype.element_ty), mask=(o_n < kept)[:, None])


@triton.jit
def _positions(o, step_high, step_low, cells):
    """Where output pixels look along one axis, in cells, float64."""
    middle = o.to(tl.float64) + 0.5
    at = middle * step_high + middle * step_low - 0.5
    return tl.minimum(tl.maximum(at, 0.0), cells - 1)


@triton.jit
def _masks(
    table,  # of this image
    queries,  # of this image
    y,
    x,
    weights,
    cell,
    w,
    row,
    start,
    kept,
    PRUNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sigmoid(bilinear(logits)) of a tile of queries at the pixels: [pixels, queries]."""
    o_n = start + tl.arange(0, BLOCK_N)
    if PRUNED:
        o_n = tl.load(queries + o_n, mask=o_n < kept, other=0)
    if PRODUCT:
        corners = tl.load(table + cell[:, None] * row + o_n[None, :])
        logits = tl.dot(weights, corners, input_precision=PRECISION)
    else:
        low_y, low_x = y.to(tl.int32), x.to(tl.int32)
        down, right = (y - low_y).to(tl.float32), (x - low_x).to(tl.float32)
        p_low = table + (low_y * w + low_x)[:, None] * row + o_n[None, :]
        # past the last row or column the weight is 0, and the address stays
        below, beside = tl.where(down > 0, w * row, 0)[:, None], tl.where(right > 0, row, 0)[:, None]
        upper = tl.load(p_low).to(tl.float32)
        upper += right[:, None] * (tl.load(p_low + beside).to(tl.float32) - upper)
        lower = tl.load(p_low + below).to(tl.float32)
        lower += right[:, None] * (tl.load(p_low + below + beside).to(tl.float32) - lower)
        logits = upper + down[:, None] * (lower - upper)
    if FAST:  # the table holds half the logits
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [logits], tl.float32, True, 1)
        masks = 0.5 * tanh + 0.5
    else:
        masks = tl.sigmoid(logits)
    if PRUNED:  # behind the last query that is kept stands another, whose NaN must not show
        masks = tl.where((start + tl.arange(0, BLOCK_N) < kept)[None, :], masks, 0.0)
    return masks.to(table.dtype.element_ty)


@triton.jit
def _contract(scores, masks, packed, first, start, kept, width, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """What a tile of queries adds to the scores [pixels, classes] from class `first` on."""
    o_n, o_k = start + tl.arange(0, BLOCK_N), first + tl.arange(0, scores.shape[1])
    probs = tl.load(packed + o_n[:, None] * width + o_k[None, :], mask=(o_n < kept)[:, None], other=0.0)
    return tl.dot(masks, probs, scores, input_precision=PRECISION)


@triton.jit
def _take(best, winner, scores, first, K, BLOCK_K: tl.constexpr):
    """The better of what pixels have and the best class of this tile; `winner` counts in the order of classes."""
    o_k = first + tl.arange(0, BLOCK_K)
    scores = tl.where((o_k < K)[None, :], tl.maximum(scores, LOWEST), LOWEST)  # of NaN too, which never wins
    value, index = tl.max(scores, 1, return_indices=True)
    better = value > best
    return tl.where(better, value, best), tl.where(better, first + index, winner)


@triton.jit
def _write(
    scores, scores_ptr, classes, first, K, place, row_ok, class_stride, ADD: tl.constexpr, BLOCK_K: tl.constexpr
):
    o_k = first + tl.arange(0, BLOCK_K)
    ok = row_ok[:, None] & (o_k < K)[None, :]
    c = tl.load(classes + o_k, mask=o_k < K, other=0).to(tl.int64)
    p_out = scores_ptr + place[:, None] + c[None, :] * class_stride
    if ADD:
        scores += tl.load(p_out, mask=ok, other=0.0)
    tl.store(p_out, scores, mask=ok)


@triton.jit(do_not_specialize=["N", "K", "h", "w", "H", "W"])
def mask_decode_pixels(
    table_ptr,  # [B, h·w, row]
    queries_ptr,  # [B, N] int32
    kept_ptr,  # [B] int32
    classes_ptr,  # [B, K] int32
    bounds_ptr,  # [B, K] float32
    packed_ptr,  # [B, N, width]
    open_ptr,  # [B, tiles] int32: 1 where a tile of pixels still wants its labels
    labels_ptr,  # [B, H, W]
    best_ptr,  # [B, H, W] float32
    scores_ptr,  # [B, K, H, W] float32
    N,
    K,
    h,
    w,
    row,
    width,
    H,
    W,
    step_y,
    step_y_low,
    step_x,
    step_x_low,
    image_stride,
    class_stride,
    row_stride,
    ROUND: tl.constexpr,  # 0: the only one; 1: the likeliest classes alone; 2: the tiles that round 1 left open
    LABELS: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    ADD: tl.constexpr,
    PRUNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    FAST: tl.constexpr,
    MANY: tl.constexpr,  # classes of a pass: MANY + REST
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SLACK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    bounds = bounds_ptr + b * K
    still_open = open_ptr + b * tl.num_programs(0) + tl.program_id(0)
    if ROUND == 1:  # noqa: SIM102 (the outer conditions of such pairs are decided when the kernel is compiled)
        if 2 * tl.load(bounds + MANY) >= tl.load(bounds):  # too many classes have a chance
            tl.store(still_open, 1)
            return
    if ROUND == 2:  # noqa: SIM102
        if tl.load(still_open) == 0:
            return
    tiles_x = tl.cdiv(W, COLUMNS)
    top, left = tl.program_id(0) // tiles_x * ROWS, tl.program_id(0) % tiles_x * COLUMNS
    o_p = tl.arange(0, ROWS * COLUMNS)
    o_y, o_x = top + o_p // COLUMNS, left + o_p % COLUMNS
    inside = (o_y < H) & (o_x < W)
    # pixels outside repeat the last one inside
    y = _positions(tl.minimum(o_y, H - 1), step_y, step_y_low, h)
    x = _positions(tl.minimum(o_x, W - 1), step_x, step_x_low, w)
    table, packed = table_ptr + b * h * w * row, packed_ptr + b * N * width
    queries, classes = queries_ptr + b * N, classes_ptr + b * K
    kept = tl.load(kept_ptr + b)
    first_y, first_x = tl.min(y, 0).to(tl.int32), tl.min(x, 0).to(tl.int32)
    o_c = tl.arange(0, CELLS * CELLS)
    cell = tl.minimum(first_y + o_c // CELLS, h - 1) * w + tl.minimum(first_x + o_c % CELLS, w - 1)
    weights = o_p  # used in the product alone
    if PRODUCT:
        down = tl.abs((y - first_y).to(tl.float32)[:, None] - (o_c // CELLS).to(tl.float32)[None, :])
        right = tl.abs((x - first_x).to(tl.float32)[:, None] - (o_c % CELLS).to(tl.float32)[None, :])
        weights = tl.maximum(1 - down, 0.0) * tl.maximum(1 - right, 0.0)
        weights = weights.to(table_ptr.dtype.element_ty)
    best = tl.full([ROWS * COLUMNS], LOWEST, tl.float32)
    winner = tl.full([ROWS * COLUMNS], -1, tl.int32)
    place = b * image_stride + o_y.to(tl.int64) * row_stride + o_x
    done = 0  # classes, in sixteens: a multiple that the compiler sees, for wide loads
    while done * 16 < K:
        first = done * 16
        scores = tl.zeros([ROWS * COLUMNS, MANY], tl.float32)
        rest = tl.zeros([ROWS * COLUMNS, REST if REST > 0 else 1], tl.float32)
        for start in range(0, kept, BLOCK_N):
            masks = _masks(
                table, queries, y, x, weights, cell, w, row, start, kept, PRUNED, PRODUCT, FAST, BLOCK_N, PRECISION
            )
            scores = _contract(scores, masks, packed, first, start, kept, width, BLOCK_N, PRECISION)
            if REST > 0:
                rest = _contract(rest, masks, packed, first + MANY, start, kept, width, BLOCK_N, PRECISION)
        if LABELS:
            best, winner = _take(best, winner, scores, first, K, MANY)
            if REST > 0:
                best, winner = _take(best, winner, rest, first + MANY, K, REST)
        else:
            _write(scores, scores_ptr, classes, first, K, place, inside, class_stride, ADD, MANY)
            if REST > 0:
                _write(rest, scores_ptr, classes, first + MANY, K, place, inside, class_stride, ADD, REST)
        done += (MANY + REST) // 16
        if LABELS:  # noqa: SIM102
            if done * 16 < K:
                settled = tl.min(best, 0) > tl.load(bounds + done * 16) * SLACK
                if ROUND == 1:
                    tl.store(still_open, 1 - settled.to(tl.int32))
                    done = K
                else:
                    done = tl.where(settled, K, done)
    if LABELS:
        label = tl.load(classes + winner, mask=winner >= 0, other=-1)
        place = (b * H + o_y) * W + o_x
        tl.store(labels_ptr + place, label.to(labels_ptr.dtype.element_ty), mask=inside)
        if CONFIDENCE:
            tl.store(best_ptr + place, tl.where(winner >= 0, best, float("nan")), mask=inside)


def rounds(num_queries: int, num_classes: int, exact: bool, labels: bool) -> list[tuple[dict, dict]]:
    """Launches of mask_decode_pixels: tiles of classes and queries as compile-time arguments, and launch options.

    With many classes a first, light round goes over the likeliest alone: in most images they are all there is. Up to
    192 classes go in one pass then, split so that little is padding; beyond, in passes of 128.
    """
    padded = max(triton.next_power_of_2(num_classes), 16)
    many, rest = min(padded, 128), 0
    if 128 < num_classes <= 192:
        rest = 32 if num_classes <= 160 else 64
    if exact or not labels:  # three products of float32 operands take more registers; scores are bound by their bytes
        many, rest = min(padded, 64), 0
    block_n = 16 if num_queries <= 16 else 32
    options = {"num_warps": 4, "num_stages": 2 if exact and labels else 3, "enable_fp_fusion": True}  # three spill
    last = {"MANY": many, "REST": rest, "BLOCK_N": 16 if rest else block_n}  # two accumulators leave few registers
    if not labels or num_classes <= 2 * FEW:
        return [({"ROUND": 0} | last, options)]
    return [({"ROUND": 1, "MANY": FEW, "REST": 0, "BLOCK_N": block_n}, options), ({"ROUND": 2} | last, options)]


def preparations(num_classes: int, order: bool, pruned: bool) -> list[tuple[triton.JITFunction, dict]]:
    """The three kernels that run before mask_decode_pixels, with their compile-time arguments."""
    classes, known = max(triton.next_power_of_2(num_classes), 16), {"ORDER": order, "PRUNED": pruned}
    return [
        (mask_decode_table, {"BLOCK_N": 64, "BLOCK_L": 64}),
        (mask_decode_order, known | {"BLOCK_N": 16, "BLOCK_K": classes, "BLOCK_T": 64, "num_warps": 8}),
        (mask_decode_pack, {"BLOCK_N": PACKED, "BLOCK_K": PACKED}),
    ]


def unsupported(mask_logits: Tensor, class_probs: Tensor) -> str | None:
    """Why these kernels cannot take the call; None where they can."""
    (B, N, K), cells = class_probs.shape, mask_logits.shape[2] * mask_logits.shape[3]
    if B > 65535 or cells * (N + 64) >= 1 << 31:
        return "the masks are too large for 32-bit numbers"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if mask_logits.is_cuda and version < (3, 9) and torch.cuda.get_device_capability(mask_logits.device)[0] >= 10:
        return f"Triton {triton.__version__} does not compile it for this GPU; 3.9 does"
    if max(N, K) > LIMIT:
        return f"there are {N} queries and {K} classes; the kernels take up to {LIMIT}"
    if torch.float64 in (mask_logits.dtype, class_probs.dtype):
        return "the kernels take float32, bfloat16 and float16, not float64"
    return None


def is_exact(class_probs: Tensor) -> bool:
    """Whether products are as exact as float32: for float32 class_probs, unless torch allows less for such products."""
    return class_probs.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def constants(exact: bool, interpreted: bool) -> dict:
    """Compile-time arguments that depend on the precision."""
    return {
        "FAST": not exact and not interpreted,  # tanh.approx: one instruction, within 2.5e-4 of the sigmoid
        "PRECISION": "tf32x3" if exact else "tf32",
        "SLACK": 1.001 if exact else 1.01,  # of a bound: rounding of up to 1024 terms
        "ROWS": TILE[0],
        "COLUMNS": TILE[1],
    }


def decode(
    mask_logits: Tensor,  # [B, N, h, w] float32, bfloat16 or float16
    class_probs: Tensor,  # [B, N, K], the same
    extent: tuple[float, float],
    prune: float,
    labels: Tensor | None = None,  # [B, H, W], contiguous: written
    best: Tensor | None = None,  # [B, H, W] float32, contiguous: written, beside labels
    scores: Tensor | None = None,  # [B, K, H, W] float32, contiguous rows: written or added to
    add: bool = False,
) -> None:
    mask_logits, class_probs = mask_logits.contiguous(), class_probs.contiguous()
    (B, N, h, w), K = mask_logits.shape, class_probs.shape[2]
    H, W = (labels if scores is None else scores).shape[-2:]
    exact = is_exact(class_probs)
    known = constants(exact, os.environ.get("TRITON_INTERPRET") == "1")
    launches, block = rounds(N, K, exact, labels is not None), 64
    width = max(triton.cdiv(K, sum(passes)) * sum(passes) for passes in ((t["MANY"], t["REST"]) for t, _ in launches))
    width = max(width, PACKED)
    row = triton.cdiv(N, block) * block
    dtype = torch.float32 if exact else torch.float16
    table = mask_logits.new_empty((B, h * w, row), dtype=dtype)
    parts = triton.cdiv(h * w, block)
    most = mask_logits.new_empty((B, parts, N), dtype=torch.float32)
    queries, kept, classes = (mask_logits.new_empty(s, dtype=torch.int32) for s in ((B, N), (B,), (B, K)))
    bounds = mask_logits.new_empty((B, K), dtype=torch.float32)
    packed = mask_logits.new_empty((B, N, width), dtype=dtype)
    pixels = triton.cdiv(H, TILE[0]) * triton.cdiv(W, TILE[1])
    still_open = mask_logits.new_empty((B, pixels), dtype=torch.int32) if len(launches) > 1 else kept
    steps = extent[0] / H, extent[1] / W
    known |= {
        "LABELS": labels is not None,
        "CONFIDENCE": best is not None,
        "ADD": add,
        "PRUNED": prune > 0,
        "PRODUCT": all((side - 1) * step <= CELLS.value - 2 for side, step in zip(TILE, steps)),
    }
    out = labels if scores is None else scores
    strides = scores.stride()[:3] if scores is not None else (0, 0, 0)
    with on_device(mask_logits):
        for (kernel, tiles), grid, arguments in zip(
            preparations(K, labels is not None, prune > 0),
            ((parts, row // block, B), (B,), (triton.cdiv(width, PACKED), triton.cdiv(N, PACKED), B)),
            (
                (mask_logits, table, most, N, h * w, row, 0.5 if known["FAST"] else 1.0, 1e30 if exact else 3e4),
                (class_probs, most, queries, kept, classes, bounds, N, K, parts, prune),
                (class_probs, queries, kept, classes, packed, N, K, width),
            ),
        ):
            kernel[grid](*arguments, **tiles)
        for tiles, options in launches:
            mask_decode_pixels[(pixels, B)](
                table, queries, kept, classes, bounds, packed, still_open, out, bounds if best is None else best, out,
                N, K, h, w, row, width, H, W, *halves(steps[0]), *halves(steps[1]), *strides,
                **known, **tiles, **options,
            )  # fmt: skip
