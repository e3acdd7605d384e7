"""Triton kernels of mask_loss for gamma = 2; the formula is in segvit/ops/reference/mask_loss.py.

Between four centres of mask cells lies a block of pixels; blocks are numbered (i, j) from (0, 0), left of and above the
first centre, to (h, w). All pixels of a block have the same four corners, so interpolation costs one multiply-add a
pixel, and the gradient of a corner is a sum over four blocks.

Forward: `mask_loss_plan` lists the (image, class) pairs that are present and where blocks begin; `mask_loss_labels`
sorts the labels by block and counts them; `mask_loss_sums` goes over pairs, stages and rows of blocks;
`mask_loss_finish` adds up. Backward: `mask_loss_gradient` leaves what a row of blocks gives to the row of cells below
it and to the one above; `mask_loss_join` adds the two. Nothing waits for the host: programs loop up to a number of
pairs that only the device knows. No atomics but for counts of pixels: every run gives the same bits.

With u = x for a negative pixel and −x for a target: s = σ(u), softplus(u) = u + log(1 + exp(−u)), and the focal loss is
α_t·s²·softplus(u), the dice loss's probability s or 1 − s. Where u is far below 0 this softplus cancels: it is within
2e-6 of the true value, not within a share of it, and s² leaves nothing of that (1e-9 at u = −8).
"""

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import halves, on_device

LARGEST = 1024  # pixels of a block
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _axis(starts_ptr, weights_ptr, cells, size, step_high, step_low, BLOCK: tl.constexpr):
    """Blocks along one axis: their first pixels [cells + 2], and the second cell's weight there [cells + 1]."""
    for start in range(0, cells + 2, BLOCK):
        i = start + tl.arange(0, BLOCK)
        step = tl.zeros([BLOCK], tl.float64) + step_high + step_low
        # the next pixel whose position reaches centre i − 1
        first = tl.ceil((i - 0.5) / step - 0.5).to(tl.int32)
        first = tl.minimum(tl.maximum(first, 0), size)
        first = tl.where(i > cells, size, tl.where(i > 0, first, 0))
        tl.store(starts_ptr + i, first, mask=i < cells + 2)
        weight = ((first + 0.5) * step - 0.5 - (i - 1)).to(tl.float32)
        # before the first centre all is the first cell's, the second one there; behind the last all is the first one's
        weight = tl.where(i == 0, 1.0, tl.where(i >= cells, 0.0, weight))
        tl.store(weights_ptr + i, weight, mask=i < cells + 1)


@triton.jit(do_not_specialize=["total", "h", "w", "H", "W"])
def mask_loss_plan(
    present_ptr,  # [B·N] uint8
    pairs_ptr,  # [B·N] int32: b·N + n of those present, in order
    count_ptr,  # [1] int32: how many
    starts_ptr,  # [h + 2 + w + 2] int32: first row of every row of blocks, first column of every column of blocks
    weights_ptr,  # [h + 1 + w + 1] float32: weights of the second cell there
    total,  # B·N
    h,
    w,
    H,
    W,
    step_y,
    step_y_low,
    step_x,
    step_x_low,
    BLOCK: tl.constexpr,
):
    """One program."""
    count = 0
    for start in range(0, total, BLOCK):
        o = start + tl.arange(0, BLOCK)
        there = tl.load(present_ptr + o, mask=o < total, other=0).to(tl.int32)
        tl.store(pairs_ptr + count + tl.cumsum(there, 0) - 1, o, mask=there > 0)
        count += tl.sum(there, 0)
    tl.store(count_ptr, count)
    _axis(starts_ptr, weights_ptr, h, H, step_y, step_y_low, BLOCK)
    _axis(starts_ptr + h + 2, weights_ptr + h + 1, w, W, step_x, step_x_low, BLOCK)


@triton.jit
def _weights(o, weights_ptr, i, cells, step):
    """Of the second cell, at the o-th pixels of block i."""
    slope = tl.where((i > 0) & (i < cells), step, 0.0)
    return tl.load(weights_ptr + i) + o.to(tl.float32) * slope


@triton.jit(do_not_specialize=["N", "h", "w", "H", "W", "ignore_index"])
def mask_loss_labels(
    labels_ptr,  # [B, H, W], any integers
    codes_ptr,  # [B, (h + 1)·(w + 1), ROWS·COLUMNS] int16: class, N (another pixel that counts), -1 (none that counts)
    counts_ptr,  # [B, N] int32, zeros before: pixels of a class
    starts_ptr,  # [h + 2 + w + 2] int32
    N,
    h,
    w,
    H,
    W,
    ignore_index,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program a row of blocks of an image."""
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_p = tl.arange(0, ROWS * COLUMNS)
    y, y_end = tl.load(starts_ptr + i) + o_p // COLUMNS, tl.load(starts_ptr + i + 1)
    starts_x = starts_ptr + h + 2
    counts = tl.zeros([BINS], tl.int32)
    for j in range(0, w + 1):
        x = tl.load(starts_x + j) + o_p % COLUMNS
        inside = (y < y_end) & (x < tl.load(starts_x + j + 1))
        label = tl.load(labels_ptr + (b * H + y) * W + x, mask=inside, other=0).to(tl.int64)
        known = inside & (label >= 0) & (label < N) & (label != ignore_index)
        counts += tl.histogram(tl.where(known, label, BINS - 1).to(tl.int32), BINS)
        code = tl.where(known, label, -1)
        if not MASKED:
            code = tl.where(inside & (known == 0), N, code)
        tl.store(codes_ptr + ((b * (h + 1) + i) * (w + 1) + j) * (ROWS * COLUMNS) + o_p, code.to(tl.int16))
    o_n = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + b * N + o_n, counts, mask=o_n < N)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def _evaluate(upper, lower, right, code, n, left_upper, left_lower, down, FAST: tl.constexpr):
    """s, softplus(u) and t (0 or 1) of a block's pixels; s = 0 where a pixel does not count."""
    top = left_upper + right * (upper - left_upper)
    x = top + down * (left_lower + right * (lower - left_lower) - top)
    t = (code == n).to(tl.float32)
    u = tl.where(code < 0, -1e4, x - 2 * t * x)
    e = tl.exp2(tl.minimum(-u * LOG2_E, 126.0))
    return _reciprocal(1 + e, FAST), u + LN_2 * _log2(1 + e, FAST), t


@triton.jit
def _row_of_blocks(item, S, h):
    """(place in the list of pairs, stage, row of blocks) of a work item."""
    i = item % (h + 1)
    rest = item // (h + 1)
    return rest // S, rest % S, i


@triton.jit(do_not_specialize=["S", "B", "N", "h", "w"])
def mask_loss_sums(
    logits_ptr,  # [S, B·N, h·w] float32
    codes_ptr,  # [B, (h + 1)·(w + 1), ROWS·COLUMNS] int16
    pairs_ptr,  # [B·N] int32
    count_ptr,  # [1] int32
    weights_ptr,  # [h + 1 + w + 1] float32
    parts_ptr,  # [4, S, B·N, h + 1] float32: Σ s²·softplus, the same of targets, Σ s, the same of targets
    S,
    B,
    N,
    h,
    w,
    step_y,
    step_x,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    items = tl.load(count_ptr) * S * (h + 1)
    o_p = tl.arange(0, ROWS * COLUMNS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        place, stage, i = _row_of_blocks(item, S, h)
        pair = tl.load(pairs_ptr + place)
        b, n = pair // N, pair % N
        down = _weights(o_p // COLUMNS, weights_ptr, i, h, step_y)
        logits = logits_ptr + (stage.to(tl.int64) * B * N + pair) * h * w
        above, below = logits + tl.maximum(i - 1, 0) * w, logits + tl.minimum(i, h - 1) * w
        codes = codes_ptr + (b.to(tl.int64) * (h + 1) + i) * (w + 1) * (ROWS * COLUMNS)
        focal = tl.zeros([ROWS * COLUMNS], tl.float32)
        focal_t, sigma, sigma_t = focal, focal, focal
        left_upper, left_lower = tl.load(above), tl.load(below)
        for j in range(0, w + 1):
            column = tl.minimum(j, w - 1)
            upper, lower = tl.load(above + column), tl.load(below + column)
            right = _weights(o_p % COLUMNS, weights_ptr + h + 1, j, w, step_x)
            code = tl.load(codes + j * (ROWS * COLUMNS) + o_p).to(tl.int32)
            s, softplus, t = _evaluate(upper, lower, right, code, n, left_upper, left_lower, down, FAST)
            left_upper, left_lower = upper, lower
            value = s * s * softplus
            focal += value
            focal_t += t * value
            sigma += s
            sigma_t += t * s
        size = S * B * N * (h + 1)
        parts = parts_ptr + (stage * B * N + pair) * (h + 1) + i
        tl.store(parts, tl.sum(focal, 0))
        tl.store(parts + size, tl.sum(focal_t, 0))
        tl.store(parts + 2 * size, tl.sum(sigma, 0))
        tl.store(parts + 3 * size, tl.sum(sigma_t, 0))


@triton.jit(do_not_specialize=["S", "B", "N", "h", "pixels"])
def mask_loss_finish(
    parts_ptr,  # [4, S, B·N, h + 1] float32
    pairs_ptr,  # [B·N] int32
    count_ptr,  # [1] int32
    counts_ptr,  # [B, N] int32
    num_masks_ptr,  # [1] float32
    focal_ptr,  # [S] float32
    dice_ptr,  # [S] float32
    sums_ptr,  # [3, S, B·N] float32: Σσt, Σσ + Σt, pixels of the mean
    S,
    B,
    N,
    h,
    pixels,  # of an image
    alpha,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a stage."""
    stage = tl.program_id(0)
    count = tl.load(count_ptr)
    size = S * B * N * (h + 1)
    focal_sum, dice_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        o = start + tl.arange(0, BLOCK)
        there = o < count
        pair = tl.load(pairs_ptr + o, mask=there, other=0)
        focal, focal_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        sigma, sigma_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for row in range(0, h + 1, BLOCK_H):
            o_h = row + tl.arange(0, BLOCK_H)
            ok = there[:, None] & (o_h <= h)[None, :]
            parts = parts_ptr + ((stage * B * N + pair) * (h + 1))[:, None] + o_h[None, :]
            focal += tl.sum(tl.load(parts, mask=ok, other=0.0), 1)
            focal_t += tl.sum(tl.load(parts + size, mask=ok, other=0.0), 1)
            sigma += tl.sum(tl.load(parts + 2 * size, mask=ok, other=0.0), 1)
            sigma_t += tl.sum(tl.load(parts + 3 * size, mask=ok, other=0.0), 1)
        target = tl.load(counts_ptr + pair, mask=there, other=0).to(tl.float32)
        mean = tl.zeros([BLOCK], tl.float32) + pixels
        if MASKED:
            mean = tl.zeros([BLOCK], tl.float32)
            for first in range(0, N, BLOCK_N):
                o_n = first + tl.arange(0, BLOCK_N)
                ok = there[:, None] & (o_n < N)[None, :]
                found = tl.load(counts_ptr + (pair // N * N)[:, None] + o_n[None, :], mask=ok, other=0)
                mean += tl.sum(found, 1).to(tl.float32)
        mean = tl.maximum(mean, 1.0)
        overlap, total = target - sigma_t, sigma - 2 * sigma_t + 2 * target  # Σσt and Σσ + Σt
        focal_sum += tl.where(there, ((1 - alpha) * focal + (2 * alpha - 1) * focal_t) / mean, 0.0)
        dice_sum += tl.where(there, 1 - (2 * overlap + 1) / (total + 1), 0.0)
        sums = sums_ptr + stage * B * N + pair
        tl.store(sums, overlap, mask=there)
        tl.store(sums + S * B * N, total, mask=there)
        tl.store(sums + 2 * S * B * N, mean, mask=there)
    num_masks = tl.load(num_masks_ptr)
    tl.store(focal_ptr + stage, tl.sum(focal_sum, 0) / num_masks)
    tl.store(dice_ptr + stage, tl.sum(dice_sum, 0) / num_masks)


@triton.jit(do_not_specialize=["S", "B", "N", "h", "w"])
def mask_loss_gradient(
    logits_ptr,  # [S, B·N, h·w] float32
    codes_ptr,  # [B, (h + 1)·(w + 1), ROWS·COLUMNS] int16
    pairs_ptr,  # [B·N] int32
    count_ptr,  # [1] int32
    sums_ptr,  # [3, S, B·N] float32
    num_masks_ptr,  # [1] float32
    grad_focal_ptr,  # [S] float32
    grad_dice_ptr,  # [S] float32
    weights_ptr,  # [h + 1 + w + 1] float32
    below_ptr,  # [S, B·N, h·w] float32: from the blocks above a row of cells
    above_ptr,  # [S, B·N, h·w] float32: from the blocks below it
    S,
    B,
    N,
    h,
    w,
    alpha,
    step_y,
    step_x,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    items = tl.load(count_ptr) * S * (h + 1)
    num_masks = tl.load(num_masks_ptr)
    o_p = tl.arange(0, ROWS * COLUMNS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        place, stage, i = _row_of_blocks(item, S, h)
        pair = tl.load(pairs_ptr + place)
        b, n = pair // N, pair % N
        down = _weights(o_p // COLUMNS, weights_ptr, i, h, step_y)
        offset = (stage.to(tl.int64) * B * N + pair) * h * w
        logits = logits_ptr + offset
        above, below = logits + tl.maximum(i - 1, 0) * w, logits + tl.minimum(i, h - 1) * w
        codes = codes_ptr + (b.to(tl.int64) * (h + 1) + i) * (w + 1) * (ROWS * COLUMNS)
        sums = sums_ptr + stage * B * N + pair
        overlap, total = tl.load(sums), tl.load(sums + S * B * N)
        mean = tl.load(sums + 2 * S * B * N)
        at_focal = tl.load(grad_focal_ptr + stage) / (num_masks * mean)
        at_dice = tl.load(grad_dice_ptr + stage) / (num_masks * (total + 1))
        # focal: (1 − α) for negatives, −α for targets; dice: the quotient's derivative
        focal_0, focal_t = at_focal * (1 - alpha), -at_focal
        dice_0, dice_t = at_dice * (2 * overlap + 1) / (total + 1), -2 * at_dice
        left_upper, left_lower = tl.load(above), tl.load(below)
        carry_upper, carry_lower = 0.0, 0.0
        for j in range(0, w + 1):
            column = tl.minimum(j, w - 1)
            upper, lower = tl.load(above + column), tl.load(below + column)
            right = _weights(o_p % COLUMNS, weights_ptr + h + 1, j, w, step_x)
            code = tl.load(codes + j * (ROWS * COLUMNS) + o_p).to(tl.int32)
            s, softplus, t = _evaluate(upper, lower, right, code, n, left_upper, left_lower, down, FAST)
            left_upper, left_lower = upper, lower
            focal = (focal_0 + t * focal_t) * s * (2 * (1 - s) * softplus + s)
            g = s * ((dice_0 + t * dice_t) * (1 - s) + focal)
            g_down, g_right = g * down, g * right
            all_, at_down, at_right = tl.sum(g, 0), tl.sum(g_down, 0), tl.sum(g_right, 0)
            at_both = tl.sum(g_down * right, 0)
            # to the cells left of this block, which are complete now, and right of it
            if j > 0:
                if i > 0:
                    left = all_ - at_down - at_right + at_both
                    tl.store(above_ptr + offset + (i - 1) * w + j - 1, carry_upper + left)
                if i < h:
                    tl.store(below_ptr + offset + i * w + j - 1, carry_lower + at_down - at_both)
            carry_upper, carry_lower = at_right - at_both, at_both


@triton.jit(do_not_specialize=["total", "cells"])
def mask_loss_join(
    below_ptr,  # [S, B·N, h·w] float32, becomes the gradient
    above_ptr,  # [S, B·N, h·w] float32
    present_ptr,  # [B·N] uint8
    total,  # B·N
    cells,  # h·w
    BLOCK: tl.constexpr,
):
    mask = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = o < tl.where(tl.load(present_ptr + mask % total) > 0, cells, 0)
    grad = tl.load(below_ptr + mask * cells + o, mask=ok, other=0.0)
    grad += tl.load(above_ptr + mask * cells + o, mask=ok, other=0.0)
    tl.store(below_ptr + mask * cells + o, grad, mask=o < cells)


def blocks(grid: tuple[int, int], size: tuple[int, int], extent: tuple[float, float]) -> dict:
    """Compile-time rows and columns of a block of pixels, powers of two; 32 pixels at least."""
    rows, columns = (triton.next_power_of_2(max(math.ceil(s / e), 1)) for s, e in zip(size, extent))
    return {"ROWS": rows, "COLUMNS": max(columns, 32 // rows)}


def unsupported(mask_logits: Tensor, labels: Tensor, gamma: float, extent: tuple[float, float]) -> str | None:
    """Why these kernels cannot take the call; None where they can."""
    if mask_logits.dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    if gamma != 2:
        return f"the kernels know the focal loss with gamma = 2, not {gamma}"
    if mask_logits.shape[2] > 1024:
        return f"there are {mask_logits.shape[2]} classes; the kernels take up to 1024"
    tiles = blocks(mask_logits.shape[3:], labels.shape[1:], extent)
    if tiles["ROWS"] * tiles["COLUMNS"] > LARGEST:
        return f"a cell has more than {LARGEST} pixels of the labels"
    return None


def options(kernel: str, tiles: dict, num_classes: int) -> tuple[dict, dict]:
    """Compile-time arguments of a kernel beside those of the call, and launch options."""
    warps = 1 if tiles["ROWS"] * tiles["COLUMNS"] <= 256 else 4
    launch = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    if kernel == "mask_loss_labels":
        return tiles | {"BINS": triton.next_power_of_2(num_classes + 1)}, launch | {"num_warps": 4}
    if kernel == "mask_loss_plan":
        return {"BLOCK": 1024}, {"num_warps": 4}
    if kernel == "mask_loss_finish":
        return {"BLOCK": 16, "BLOCK_H": 32, "BLOCK_N": 64}, {"num_warps": 4}
    if kernel == "mask_loss_join":
        return {"BLOCK": 512}, {"num_warps": 4}
    return tiles, launch


class _Call:
    """What forward and backward share: the pairs and labels by block, and the arguments of every kernel."""

    def __init__(self, mask_logits, labels, present, ignore_index, masked, rows, columns):
        self.S, self.B, self.N, self.h, self.w = mask_logits.shape
        self.H, self.W = labels.shape[1:]
        self.device, pairs = mask_logits.device, self.B * self.N
        self.tiles = blocks((self.h, self.w), (self.H, self.W), (rows, columns))
        self.steps = rows / self.H, columns / self.W
        self.fast = {"FAST": os.environ.get("TRITON_INTERPRET") != "1"}
        self.masked = {"MASKED": masked}
        self.logits, self.labels = mask_logits.contiguous(), labels.contiguous()
        self.present = present.contiguous().view(torch.uint8)
        block = self.tiles["ROWS"] * self.tiles["COLUMNS"]
        self.codes = self.new((self.B, (self.h + 1) * (self.w + 1), block), torch.int16)
        self.counts = torch.zeros(self.B, self.N, dtype=torch.int32, device=self.device)
        self.pairs, self.count = self.new((pairs,), torch.int32), self.new((1,), torch.int32)
        self.starts = self.new((self.h + self.w + 4,), torch.int32)
        self.weights = self.new((self.h + self.w + 2,))
        size = (self.h, self.w, self.H, self.W)
        plan = (self.present, self.pairs, self.count, self.starts, self.weights, pairs, *size)
        self.launch(mask_loss_plan, (1,), (*plan, *halves(self.steps[0]), *halves(self.steps[1])))
        row = (self.labels, self.codes, self.counts, self.starts, self.N, *size, ignore_index)
        self.launch(mask_loss_labels, (self.h + 1, self.B), row, **self.masked)

    def new(self, shape, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def launch(self, kernel, grid, arguments, **known) -> None:
        tiles, launch = options(kernel.__name__, self.tiles, self.N)
        with on_device(self.logits):
            kernel[grid](*arguments, **tiles, **launch, **known)

    def programs(self) -> tuple[int]:
        """Enough to fill the device; they loop over the work."""
        if self.device.type != "cuda":
            return (2,)
        return (16 * torch.cuda.get_device_properties(self.device).multi_processor_count,)


def forward(
    mask_logits: Tensor,  # [S, B, N, h, w] float32
    labels: Tensor,  # [B, H, W] integers
    present: Tensor,  # [B, N] bool
    num_masks: Tensor,  # 0-d
    ignore_index: int,
    masked: bool,
    alpha: float,
    rows: float,
    columns: float,
) -> tuple[Tensor, Tensor, Tensor]:  # focal [S], dice [S], sums [3, S, B, N]: Σσt, Σσ + Σt, pixels of the mean
    call = _Call(mask_logits, labels, present, ignore_index, masked, rows, columns)
    S, B, N, h, w, H, W = call.S, call.B, call.N, call.h, call.w, call.H, call.W
    parts = call.new((4, S, B * N, h + 1))
    arguments = (call.logits, call.codes, call.pairs, call.count, call.weights, parts, S, B, N, h, w, *call.steps)
    call.launch(mask_loss_sums, call.programs(), arguments, **call.fast)
    focal, dice = call.new((S,)), call.new((S,))
    sums = torch.zeros((3, S, B, N), device=call.device)
    num_masks = num_masks.float()
    arguments = (parts, call.pairs, call.count, call.counts, num_masks, focal, dice, sums, S, B, N, h, H * W, alpha)
    call.launch(mask_loss_finish, (S,), arguments, **call.masked)
    return focal, dice, sums


def backward(
    grad_focal: Tensor,  # [S]
    grad_dice: Tensor,  # [S]
    mask_logits: Tensor,  # [S, B, N, h, w] float32
    labels: Tensor,  # [B, H, W] integers
    present: Tensor,  # [B, N] bool
    num_masks: Tensor,  # 0-d
    sums: Tensor,  # [3, S, B, N]
    ignore_index: int,
    masked: bool,
    alpha: float,
    rows: float,
    columns: float,
) -> Tensor:  # [S, B, N, h, w]
    call = _Call(mask_logits, labels, present, ignore_index, masked, rows, columns)
    S, B, N, h, w = call.S, call.B, call.N, call.h, call.w
    grad, above = call.new(mask_logits.shape), call.new(mask_logits.shape)
    given = (num_masks.float(), grad_focal.contiguous(), grad_dice.contiguous())
    arguments = (call.logits, call.codes, call.pairs, call.count, sums, *given, call.weights, grad, above)
    numbers = (S, B, N, h, w, alpha, *call.steps)
    call.launch(mask_loss_gradient, call.programs(), (*arguments, *numbers), **call.fast)
    grid = (S * B * N, triton.cdiv(h * w, 512))
    call.launch(mask_loss_join, grid, (grad, above, call.present, B * N, h * w))
    return grad
