"""Triton kernels of segvit.ops.atm. The formula is in segvit/ops/reference/atm.py.

Forward is one launch of two roles: programs for (image, head, query tile) run the softmax attention, further programs
compute a tile of the mask, which is one GEMM over the full width. Backward is two launches, one that owns keys and one
that owns queries, and two library GEMMs for the mask's share. Nothing of size heads × queries × features exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device

LOG2_E = 1.4426950408889634


def config(kernel: str, dtype: torch.dtype, width: int, num_queries: int, dropout: bool) -> tuple[dict, dict]:
    """Tiles of queries, features and reduced width, as compile-time arguments of a kernel, and its launch options.

    A warp group takes 64 rows at once; float32 runs without tensor cores. Heads of 16, 32, 64 and 128 spill nowhere
    (sm_80, sm_90, sm_100), and on sm_80 shared memory stays below the 99 KiB of smaller GPUs (bench/static.py). The
    backward over keys takes all queries at once where registers allow.
    """
    exact, wide = dtype == torch.float32, width > 64
    if kernel == "atm_forward":
        block_n, block_l, warps = 64, 64, 8 if wide else 4
        if exact:
            block_n, block_l, warps = (32, 32, 4) if width <= 32 else (16, 16, 8)
        return {"BLOCK_N": block_n, "BLOCK_L": block_l, "BLOCK_C": 32 if exact else 64}, _launch(warps)
    if kernel == "atm_backward_queries":
        block_n, block_l = (32, 16 if wide else 32) if exact else (64, 32 if wide else 64)
        return {"BLOCK_N": block_n, "BLOCK_L": block_l}, _launch(8 if exact else 4)
    block_n, block_l, rest = 64 if width <= 32 else 32, 64, 0
    if exact:
        block_n, block_l = 16 if wide else 32, 32
    elif not dropout and width in (16, 32) and 128 < num_queries <= 192:
        block_n, rest = 128, 32 if num_queries <= 160 else 64
    tiles = {"BLOCK_N": block_n, "REST_N": rest, "BLOCK_L": block_l}
    return tiles, _launch(8 if exact or wide else 4, 2 if width > 32 else 3)


def _launch(warps: int, stages: int = 3) -> dict:
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@triton.jit
def _mix(x):  # uint32: the hash of reference.atm.dropout_mask
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout_key(seed_ptr, bh):  # one key for each (image, head)
    seed = tl.load(seed_ptr)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(low ^ _mix(bh.to(tl.uint32) + high))


@triton.jit
def _kept(key, counter, threshold):  # counter: n·L + l
    return _mix(counter.to(tl.uint32) * 0x9E3779B9 + key) >= threshold


@triton.jit
def _rows(ptr, stride, o_row, o_col, num_rows, num_cols, EVEN_COLS: tl.constexpr):
    """[rows, columns] of a matrix with contiguous columns; zeros outside."""
    mask = o_row[:, None] < num_rows
    if not EVEN_COLS:
        mask = mask & (o_col[None, :] < num_cols)
    return tl.load(ptr + o_row[:, None].to(tl.int64) * stride + o_col[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(
    q,
    acc,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    start,
    L,
    width,
    o_n,
    scale,
    key,
    threshold,
    TAIL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of features joins the running softmax of a query tile."""
    o_l, o_d = start + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    k = _rows(k_ptr, k_stride, o_l, o_d, L, width, EVEN_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if TAIL:
        s = tl.where(o_l[None, :] < L, s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1))
    p = tl.exp2(s - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(_kept(key, o_n[:, None] * L + o_l[None, :], threshold), p, 0.0)
    v = _rows(v_ptr, v_stride, o_l, o_d, L, width, EVEN_D)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def atm_forward(
    q_ptr,  # [B, N, C]
    k_ptr,  # [B, L, C]
    v_ptr,  # [B, L, C]
    carry_ptr,  # [B, N, L] float32, contiguous
    seed_ptr,  # [1] int64
    out_ptr,  # [B, N, C], contiguous
    mask_ptr,  # [B, N, L] float32, contiguous
    lse_ptr,  # [B, H, N] float32, base 2
    q_batch,
    q_stride,
    k_batch,
    k_stride,
    v_batch,
    v_stride,
    H,
    N,
    L,
    width,  # of a head
    scale_log2,  # scale · log2(e)
    mask_scale,  # scale / H
    keep_scale,  # 1 / (1 − dropout_p)
    threshold,  # dropout_p · 2³²
    attention_programs,
    HAS_CARRY: tl.constexpr,
    SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    C = H * width
    if pid < attention_programs:
        bh, tile = pid // tiles_n, pid % tiles_n
        b, h = (bh // H).to(tl.int64), bh % H
        o_n, o_d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        q = _rows(q_ptr + b * q_batch + h * width, q_stride, o_n, o_d, N, width, EVEN_D)
        p_k, p_v = k_ptr + b * k_batch + h * width, v_ptr + b * v_batch + h * width
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_N], tl.float32)
        key = tl.zeros([], tl.uint32)
        if DROPOUT:
            key = _dropout_key(seed_ptr, bh)
        whole = L // BLOCK_L * BLOCK_L
        for start in range(0, whole, BLOCK_L):
            acc, row_max, row_sum = _attend(
                q, acc, row_max, row_sum, p_k, p_v, k_stride, v_stride, start, L, width, o_n, scale_log2, key,
                threshold, False, DROPOUT, EVEN_D, BLOCK_L, BLOCK_D, PRECISION,
            )  # fmt: skip
        if whole < L:
            acc, row_max, row_sum = _attend(
                q, acc, row_max, row_sum, p_k, p_v, k_stride, v_stride, whole, L, width, o_n, scale_log2, key,
                threshold, True, DROPOUT, EVEN_D, BLOCK_L, BLOCK_D, PRECISION,
            )  # fmt: skip
        acc = acc * (keep_scale / row_sum)[:, None]
        m_out = (o_n[:, None] < N) & (o_d[None, :] < width)
        p_out = out_ptr + b * N * C + o_n[:, None].to(tl.int64) * C + h * width + o_d[None, :]
        tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)
        tl.store(lse_ptr + bh.to(tl.int64) * N + o_n, row_max + tl.log2(row_sum), mask=o_n < N)
    else:
        pid -= attention_programs
        tiles_l = tl.cdiv(L, BLOCK_L)
        b = (pid // (tiles_n * tiles_l)).to(tl.int64)
        o_n = pid // tiles_l % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        o_l = pid % tiles_l * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            q = _rows(q_ptr + b * q_batch, q_stride, o_n, o_c, N, C, False)
            k = _rows(k_ptr + b * k_batch, k_stride, o_l, o_c, L, C, False)
            mask += tl.dot(q, tl.trans(k), input_precision=PRECISION)
        mask = mask * mask_scale
        p_mask = (b * N + o_n[:, None]) * L + o_l[None, :]
        m_mask = (o_n[:, None] < N) & (o_l[None, :] < L)
        if HAS_CARRY:
            mask += tl.load(carry_ptr + p_mask, mask=m_mask, other=0.0)
        if SIGMOID:
            mask = tl.sigmoid(mask)
        tl.store(mask_ptr + p_mask, mask, mask=m_mask)


@triton.jit
def _meet(
    dk,
    dv,
    k,
    v,
    q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_stride,
    grad_stride,
    start,
    N,
    L,
    width,
    o_l,
    scale_log2,
    keep_scale,
    key,
    threshold,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries adds its share to the gradients of a tile of features."""
    o_n, o_d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q = _rows(q_ptr, q_stride, o_n, o_d, N, width, EVEN_D)
    grad = _rows(grad_ptr, grad_stride, o_n, o_d, N, width, EVEN_D)
    lse = tl.load(lse_ptr + o_n, mask=o_n < N, other=float("inf"))
    delta = tl.load(delta_ptr + o_n, mask=o_n < N, other=0.0)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])  # [L, N]
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    kept = p
    if DROPOUT:
        z = tl.where(_kept(key, o_n[None, :] * L + o_l[:, None], threshold), keep_scale, 0.0)
        dp, kept = dp * z, p * z
    dv += tl.dot(kept.to(grad.dtype), grad, input_precision=PRECISION)
    dk += tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, input_precision=PRECISION)
    return dk, dv


@triton.jit
def atm_backward_keys(
    q_ptr,  # [B, N, C]
    k_ptr,  # [B, L, C]
    v_ptr,  # [B, L, C]
    grad_ptr,  # [B, N, C], contiguous: gradient of out
    seed_ptr,  # [1] int64
    lse_ptr,  # [B, H, N]
    delta_ptr,  # [B, H, N]: rowsum(dO∘O)
    dk_ptr,  # [B, L, C], contiguous
    dv_ptr,  # [B, L, C], contiguous
    q_batch,
    q_stride,
    k_batch,
    k_stride,
    v_batch,
    v_stride,
    H,
    N,
    L,
    width,
    scale,
    scale_log2,
    keep_scale,
    threshold,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of one tile of features of one head; the queries pass by."""
    tiles_l = tl.cdiv(L, BLOCK_L)
    bh, tile = tl.program_id(0) // tiles_l, tl.program_id(0) % tiles_l
    b, h = (bh // H).to(tl.int64), bh % H
    C = H * width
    o_l, o_d = tile * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    k = _rows(k_ptr + b * k_batch + h * width, k_stride, o_l, o_d, L, width, EVEN_D)
    v = _rows(v_ptr + b * v_batch + h * width, v_stride, o_l, o_d, L, width, EVEN_D)
    dk = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    key = tl.zeros([], tl.uint32)
    if DROPOUT:
        key = _dropout_key(seed_ptr, bh)
    p_q, p_grad = q_ptr + b * q_batch + h * width, grad_ptr + b * N * C + h * width
    p_lse, p_delta = lse_ptr + bh.to(tl.int64) * N, delta_ptr + bh.to(tl.int64) * N
    if REST_N > 0:  # straight on, without a loop: N <= BLOCK_N + REST_N
        dk, dv = _meet(
            dk, dv, k, v, p_q, p_grad, p_lse, p_delta, q_stride, C, 0, N, L, width, o_l, scale_log2, keep_scale, key,
            threshold, DROPOUT, EVEN_D, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        dk, dv = _meet(
            dk, dv, k, v, p_q, p_grad, p_lse, p_delta, q_stride, C, BLOCK_N, N, L, width, o_l, scale_log2, keep_scale,
            key, threshold, DROPOUT, EVEN_D, REST_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        for start in range(0, N, BLOCK_N):
            dk, dv = _meet(
                dk, dv, k, v, p_q, p_grad, p_lse, p_delta, q_stride, C, start, N, L, width, o_l, scale_log2, keep_scale,
                key, threshold, DROPOUT, EVEN_D, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    m_out = (o_l[:, None] < L) & (o_d[None, :] < width)
    p_out = b * L * C + o_l[:, None].to(tl.int64) * C + h * width + o_d[None, :]
    tl.store(dk_ptr + p_out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=m_out)
    tl.store(dv_ptr + p_out, dv.to(dv_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def atm_backward_queries(
    q_ptr,  # [B, N, C]
    k_ptr,  # [B, L, C]
    v_ptr,  # [B, L, C]
    grad_ptr,  # [B, N, C], contiguous: gradient of out
    seed_ptr,  # [1] int64
    lse_ptr,  # [B, H, N]
    delta_ptr,  # [B, H, N]
    dq_ptr,  # [B, N, C], contiguous
    q_batch,
    q_stride,
    k_batch,
    k_stride,
    v_batch,
    v_stride,
    H,
    N,
    L,
    width,
    scale,
    scale_log2,
    keep_scale,
    threshold,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of one tile of queries of one head; the features pass by."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    bh, tile = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    b, h = (bh // H).to(tl.int64), bh % H
    C = H * width
    o_n, o_d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q = _rows(q_ptr + b * q_batch + h * width, q_stride, o_n, o_d, N, width, EVEN_D)
    grad = _rows(grad_ptr + b * N * C + h * width, C, o_n, o_d, N, width, EVEN_D)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * N + o_n, mask=o_n < N, other=float("inf"))
    delta = tl.load(delta_ptr + bh.to(tl.int64) * N + o_n, mask=o_n < N, other=0.0)
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    key = tl.zeros([], tl.uint32)
    if DROPOUT:
        key = _dropout_key(seed_ptr, bh)
    for start in range(0, L, BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        k = _rows(k_ptr + b * k_batch + h * width, k_stride, o_l, o_d, L, width, EVEN_D)
        v = _rows(v_ptr + b * v_batch + h * width, v_stride, o_l, o_d, L, width, EVEN_D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        p = tl.where(o_l[None, :] < L, p, 0.0)  # past the end the similarity is 0, which may overflow beside this lse
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(_kept(key, o_n[:, None] * L + o_l[None, :], threshold), dp * keep_scale, 0.0)
        dq += tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, input_precision=PRECISION)
    m_out = (o_n[:, None] < N) & (o_d[None, :] < width)
    p_out = b * N * C + o_n[:, None].to(tl.int64) * C + h * width + o_d[None, :]
    tl.store(dq_ptr + p_out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=m_out)


def unsupported(q: Tensor, num_heads: int) -> str | None:
    """Why these kernels cannot take the call; None where they can."""
    width = q.shape[-1] // num_heads
    if not 16 <= width <= 128:
        return f"heads are {width} wide; the kernels take 16 to 128"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take float32, bfloat16 and float16, not {q.dtype}"
    return None


def constants(dtype: torch.dtype, width: int, dropout_p: float) -> dict:
    """Compile-time arguments that all kernels share, for heads of this width."""
    block = max(triton.next_power_of_2(width), 16)
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return {"DROPOUT": dropout_p > 0, "EVEN_D": block == width, "BLOCK_D": block, "PRECISION": precision}


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def forward(
    q: Tensor,  # [B, N, C]
    k: Tensor,  # [B, L, C]
    v: Tensor,  # [B, L, C]
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
    mask_carry: Tensor | None,  # [B, N, L] float32
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, N, C], mask logits (or their sigmoid) [B, N, L], lse [B, H, N] base 2
    q, k, v = _dense(q, k, v)
    B, N, C = q.shape
    L = k.shape[1]
    carry = None if mask_carry is None else mask_carry.contiguous()
    out = q.new_empty(q.shape)
    mask = q.new_empty((B, N, L), dtype=torch.float32)
    lse = q.new_empty((B, num_heads, N), dtype=torch.float32)
    tiles, options = config("atm_forward", q.dtype, C // num_heads, N, dropout_p > 0)
    tiles_n, tiles_l = triton.cdiv(N, tiles["BLOCK_N"]), triton.cdiv(L, tiles["BLOCK_L"])
    attention = B * num_heads * tiles_n
    with on_device(q):
        atm_forward[(attention + B * tiles_n * tiles_l,)](
            q, k, v, mask if carry is None else carry, q if seed is None else seed, out, mask, lse,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            num_heads, N, L, C // num_heads, scale * LOG2_E, scale / num_heads,
            1 / (1 - dropout_p), int(dropout_p * 2**32), attention,
            HAS_CARRY=carry is not None, SIGMOID=sigmoid,
            **constants(q.dtype, C // num_heads, dropout_p), **tiles, **options,
        )  # fmt: skip
    return out, mask, lse


def backward(
    grad_out: Tensor,  # [B, N, C]
    grad_mask: Tensor,  # [B, N, L] float32, gradient of the mask logits
    q: Tensor,  # [B, N, C]
    k: Tensor,  # [B, L, C]
    v: Tensor,  # [B, L, C]
    out: Tensor,  # [B, N, C]
    lse: Tensor,  # [B, H, N]
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor]:  # dq [B, N, C], dk [B, L, C], dv [B, L, C]
    q, k, v = _dense(q, k, v)
    grad_out = grad_out.contiguous()
    B, N, C = q.shape
    L = k.shape[1]
    delta = (grad_out.float() * out.float()).unflatten(-1, (num_heads, -1)).sum(-1).mT.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    inputs = (q, k, v, grad_out, q if seed is None else seed, lse, delta)
    numbers = (
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        num_heads, N, L, C // num_heads, scale, scale * LOG2_E, 1 / (1 - dropout_p), int(dropout_p * 2**32),
    )  # fmt: skip
    known = constants(q.dtype, C // num_heads, dropout_p)
    for kernel, outputs, tokens, owned in (
        (atm_backward_keys, (dk, dv), L, "BLOCK_L"),
        (atm_backward_queries, (dq,), N, "BLOCK_N"),
    ):
        tiles, options = config(kernel.__name__, q.dtype, C // num_heads, N, dropout_p > 0)
        programs = B * num_heads * triton.cdiv(tokens, tiles[owned])
        with on_device(q):
            kernel[(programs,)](*inputs, *outputs, *numbers, **known, **tiles, **options)
    share, alpha = (
        grad_mask.to(q.dtype),
        scale / num_heads,
    )  # alpha after the products: half precision must not round it
    return dq.baddbmm_(share, k, alpha=alpha), dk.baddbmm_(share.mT, q, alpha=alpha), dv
