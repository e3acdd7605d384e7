import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.library import opcheck

from segvit.ops import query_attention, token_downsample, token_upsample
from segvit.ops._dispatch import NATIVE_MISSING
from segvit.ops.reference.token_resample import stride_index

BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(bool(NATIVE_MISSING), reason=str(NATIVE_MISSING))),
    "reference",
]


def inputs(B=2, P=1, grid=(5, 7), C=12, dtype=torch.float64):
    x = torch.randn(B, P + grid[0] * grid[1], C, dtype=dtype)
    return [t.requires_grad_() for t in (x, torch.randn(C, dtype=dtype), torch.randn(C, dtype=dtype))]


def naive(x, weight, bias, eps, grid, keep):
    P = x.shape[1] - grid[0] * grid[1]
    cells = x[:, P:].unflatten(1, grid)
    if isinstance(keep, int):
        kept = cells[:, ::keep, ::keep].flatten(1, 2)
    else:
        kept = torch.stack([row[index] for row, index in zip(cells.flatten(1, 2), keep)])
    x_q = torch.cat([x[:, :P], kept], 1)
    norm = lambda t: F.layer_norm(t, t.shape[-1:], weight, bias, eps)  # noqa: E731
    return norm(x), norm(x_q), x_q


KEEPS = {
    "stride 1": 1,
    "stride 2": 2,
    "stride 3": 3,
    "beyond the grid": 9,
    "index": torch.tensor([[0, 34, 7, 8], [5, 4, 3, 33]]),
    "repeated": torch.tensor([[3, 3, 3], [0, 1, 0]]),
    "none": torch.zeros(2, 0, dtype=torch.long),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS.keys())
@pytest.mark.parametrize("P", [0, 1, 5])
def test_values_and_gradients_match_the_naive_form(backend, keep, P):
    arguments = inputs(P=P)
    got = token_downsample(*arguments, 1e-6, (5, 7), keep, backend=backend)
    want = naive(*arguments, 1e-6, (5, 7), keep)
    upstream = [torch.randn_like(t) for t in want]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(out, arguments, upstream) for out in (got, want))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_plain_pytorch_in_the_same_dtype(backend, dtype):
    exact = inputs(C=48, dtype=torch.float64)
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in low]
    results = []
    upstream = None
    for arguments, call in ((exact, naive), (low, naive), (low, token_downsample)):
        extra = {"backend": backend} if call is token_downsample else {}
        out = call(*arguments, 1e-6, (5, 7), 2, **extra)
        upstream = upstream or [torch.randn(t.shape).to(dtype) for t in out]
        results.append((*out, *torch.autograd.grad(out, arguments, [g.to(out[0].dtype) for g in upstream])))
    for want, plain, got in zip(*results):
        assert got.dtype == dtype
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (got, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_one_keeps_everything_and_a_permutation_permutes(backend):
    arguments = inputs(P=2)
    y, y_q, x_q = token_downsample(*arguments, 1e-6, (5, 7), 1, backend=backend)
    assert torch.equal(y, y_q)
    assert torch.equal(arguments[0], x_q)
    order = torch.stack([torch.randperm(35), torch.randperm(35)])
    _, shuffled, _ = token_downsample(*arguments, 1e-6, (5, 7), order, backend=backend)
    assert torch.equal(shuffled[:, 2:], y[:, 2:].gather(1, order[..., None].expand(-1, -1, 12)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [2, torch.tensor([[0, 3, 3], [1, 2, 5]])], ids=["stride", "index"])
def test_gradcheck(backend, keep):
    arguments = inputs(2, 1, (2, 3), 4)
    assert torch.autograd.gradcheck(lambda *a: token_downsample(*a, 1e-6, (2, 3), keep, backend=backend), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight, bias = inputs(dtype=dtype)
    for index, stride in ((None, 2), (KEEPS["repeated"], 1)):
        opcheck(torch.ops.segvit.token_downsample.default, (x, weight, bias, index, 5, 7, stride, 1e-6))
    for extra in (None, KEEPS["repeated"]):
        low, skip = upsample_inputs(extra=extra, dtype=dtype)
        opcheck(torch.ops.segvit.token_upsample.default, (low, skip, extra, 5, 7, 2))
        opcheck(torch.ops.segvit.token_upsample_backward.default, (skip.detach(), extra, 5, 7, 2))


@pytest.mark.parametrize("keep", [2, KEEPS["repeated"]], ids=["stride", "repeated"])
def test_the_operator_without_native_code_is_the_same(keep):
    """The Python body that serves devices without a kernel of their own, against the naive form."""
    from segvit.ops.token_resample import _downsample, _downsample_backward

    arguments = inputs(P=1)
    x, weight, bias = (t.detach() for t in arguments)
    index, stride = (None, keep) if isinstance(keep, int) else (keep, 1)
    y, y_q, x_q, mean, rstd = _downsample(x, weight, bias, index, 5, 7, stride, 1e-6)
    want = naive(*arguments, 1e-6, (5, 7), keep)
    upstream = [torch.randn_like(t) for t in want]
    for a, b in zip((y, y_q, x_q), want):
        torch.testing.assert_close(a, b)
    got = _downsample_backward(*upstream, x, weight, index, mean, rstd, 5, 7, stride)
    for a, b in zip(got, torch.autograd.grad(want, arguments, upstream)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("extra", [None, KEEPS["repeated"]], ids=["even", "extra"])
def test_upsampling_backward_without_native_code_is_the_same(extra):
    from segvit.ops.token_resample import _upsample_backward

    x, skip = upsample_inputs(extra=extra)
    upstream = torch.randn_like(skip)
    (want,) = torch.autograd.grad(naive_upsample(x, skip, (5, 7), 2, extra), x, upstream)
    torch.testing.assert_close(_upsample_backward(upstream, extra, 5, 7, 2), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_expanded_gradient_and_poisoned_memory(backend, poisoned):
    x, weight, bias = inputs()
    x = torch.randn(2, 12, 36, dtype=torch.float64).mT.requires_grad_()
    got = token_downsample(x, weight, bias, 1e-6, (5, 7), 2, backend=backend)
    want = naive(x, weight, bias, 1e-6, (5, 7), 2)
    for out in (got, want):
        assert all(t.isfinite().all() for t in out)
    a = torch.autograd.grad(sum(t.sum() for t in got), [x, weight, bias])  # gradients of stride 0
    b = torch.autograd.grad(sum(t.sum() for t in want), [x, weight, bias])
    for g, w in zip(a, b):
        torch.testing.assert_close(g, w)


@pytest.mark.skipif(bool(NATIVE_MISSING), reason=str(NATIVE_MISSING))
def test_native_backward_is_bitwise_the_same_with_any_number_of_threads():
    arguments = inputs(4, 1, (16, 16), 64, torch.float32)
    before = torch.get_num_threads()
    grads = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = token_downsample(*arguments, 1e-6, (16, 16), 2, backend="native")
            grads.append(torch.autograd.grad(sum((t * t).sum() for t in out), arguments))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_at_most_two_graphs_over_batch_sizes(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def there_and_back(x, weight, bias, extra):
        y, _, kept = token_downsample(x, weight, bias, 1e-6, (5, 7), 2, backend=backend)
        kept = torch.cat([kept, kept[:, : extra.shape[1]]], 1)
        return token_upsample(kept, y, (5, 7), 2, extra, backend=backend)

    step = torch.compile(there_and_back, fullgraph=True, backend=counter)
    for B in (1, 2, 3, 8):
        arguments = inputs(B, dtype=torch.float32)
        extra = torch.randint(0, 35, (B, 4))
        got = step(*arguments, extra)
        torch.testing.assert_close(got, there_and_back(*arguments, extra))
        got.sum().backward()
    assert counter.frame_count <= 2


def upsample_inputs(B=2, P=1, grid=(5, 7), C=12, stride=2, extra=None, dtype=torch.float64):
    kept = -(-grid[0] // stride) * -(-grid[1] // stride) + (0 if extra is None else extra.shape[1])
    return [torch.randn(B, P + n, C, dtype=dtype, requires_grad=True) for n in (kept, grid[0] * grid[1])]


def naive_upsample(x, skip, grid, stride, extra=None):
    """By F.interpolate with aligned corners on the part between kept cells, the last row and column repeated."""
    P = skip.shape[1] - grid[0] * grid[1]
    low = [-(-side // stride) for side in grid]
    cells = x[:, P : P + low[0] * low[1]].unflatten(1, low).permute(0, 3, 1, 2)
    inner = [(n - 1) * stride + 1 for n in low]
    full = F.interpolate(cells, inner, mode="bilinear", align_corners=True)
    rows, columns = (torch.arange(side).clamp(max=n - 1) for side, n in zip(grid, inner))
    full = full[:, :, rows][:, :, :, columns].permute(0, 2, 3, 1).flatten(1, 2)
    images = []
    for b in range(len(x)):
        tokens = list(full[b])
        for e, cell in enumerate([] if extra is None else extra[b].tolist()):
            tokens[cell] = x[b, P + low[0] * low[1] + e]
        images.append(torch.stack(tokens))
    return torch.cat([x[:, :P], torch.stack(images)], 1) + skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2, 3, 9])
@pytest.mark.parametrize("extra", [None, KEEPS["none"], KEEPS["index"], KEEPS["repeated"]], ids=["even", *"0uR"])
@pytest.mark.parametrize("P", [0, 3])
def test_upsample_values_and_gradients_match_the_naive_form(backend, stride, extra, P):
    x, skip = upsample_inputs(P=P, stride=stride, extra=extra)
    got = token_upsample(x, skip, (5, 7), stride, extra, backend=backend)
    want = naive_upsample(x, skip, (5, 7), stride, extra)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(out, (x, skip), upstream) for out in (got, want))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upsample_error_is_at_most_twice_plain_pytorch_in_the_same_dtype(backend, dtype):
    extra = KEEPS["index"]
    exact = upsample_inputs(C=48, extra=extra)
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in low]
    upstream = torch.randn_like(low[1])
    results = []
    for arguments, call in ((exact, naive_upsample), (low, naive_upsample), (low, token_upsample)):
        named = {"backend": backend} if call is token_upsample else {}
        out = call(*arguments, (5, 7), 2, extra, **named)
        results.append((out, *torch.autograd.grad(out, arguments, upstream.to(out.dtype))))
    for want, plain, got in zip(*results):
        assert got.dtype == dtype
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (got, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_upsample_takes_strided_input_expanded_gradients_and_poisoned_memory(backend, poisoned):
    extra = torch.cat([KEEPS["index"], KEEPS["index"] + 1], 1)[:, ::2]
    x = torch.randn(2, 12, 1 + 12 + 4, dtype=torch.float64).mT.requires_grad_()
    skip = torch.randn(2, 12, 36, dtype=torch.float64).mT.requires_grad_()
    results = [
        token_upsample(x, skip, (5, 7), 2, extra, backend=backend),
        naive_upsample(x, skip, (5, 7), 2, extra),
    ]
    torch.testing.assert_close(*results)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (x, skip)) for out in results)):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(bool(NATIVE_MISSING), reason=str(NATIVE_MISSING))
@pytest.mark.parametrize("bits", ["128", "256"])
def test_narrower_vectors_give_the_same(bits):
    """The variants for processors without this one's widest vectors, in a process of their own."""
    code = (
        "import torch; from segvit.ops import token_downsample as down, token_upsample as up; torch.manual_seed(0);"
        "x = torch.randn(2, 36, 44, requires_grad=True); w = torch.randn(44, requires_grad=True);"
        "outs = [down(x, w, w, 1e-6, (5, 7), 2, backend=b) for b in ('native', 'reference')];"
        "outs = [[*o, up(o[2], o[0], (5, 7), 2, backend=b)] for o, b in zip(outs, ('native', 'reference'))];"
        "grads = [torch.autograd.grad(sum((t * t).sum() for t in o), (x, w)) for o in outs];"
        "pairs = zip(*(o + list(g) for o, g in zip(outs, grads)));"
        "[torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3) for a, b in pairs]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"SEGVIT_VECTORS": bits})


@pytest.mark.parametrize(("grid", "stride"), [((5, 7), 2), ((4, 4), 2), ((1, 1), 2), ((3, 5), 4), ((6, 5), 1)])
@pytest.mark.parametrize("P", [0, 2])
def test_upsample_gives_kept_cells_back_and_interpolates_between(grid, stride, P):
    full = torch.randn(2, P + grid[0] * grid[1], 3, dtype=torch.float64)
    _, _, kept = token_downsample(full, torch.ones(3).double(), torch.zeros(3).double(), 1e-6, grid, stride)
    up = token_upsample(kept, torch.zeros_like(full), grid, stride)
    index = stride_index(grid, stride)[0] + P
    torch.testing.assert_close(up[:, index], full[:, index])
    torch.testing.assert_close(up[:, :P], full[:, :P])
    ramp = torch.arange(grid[0], dtype=torch.float64)[:, None, None].expand(*grid, 3).reshape(1, -1, 3)
    kept = ramp[:, stride_index(grid, stride)[0]]
    between = token_upsample(kept, torch.zeros_like(ramp), grid, stride)
    last = (grid[0] - 1) // stride * stride
    torch.testing.assert_close(between, ramp.clamp(max=last))  # linear between kept rows, constant past the last
    skip = torch.randn_like(full)
    torch.testing.assert_close(token_upsample(kept_like(full, grid, stride, P), skip, grid, stride) - skip, up)


def kept_like(full, grid, stride, P):
    return torch.cat([full[:, :P], full[:, stride_index(grid, stride)[0] + P]], 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upsample_gradcheck(backend):
    for extra in (None, torch.tensor([[1, 7, 7], [14, 3, 0]])):
        leaves = upsample_inputs(grid=(3, 5), C=3, extra=extra)
        assert torch.autograd.gradcheck(lambda *a, e=extra: token_upsample(*a, (3, 5), 2, e, backend=backend), leaves)


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_query_attention_matches_the_formula(backend):
    q, k, v = (torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (5, 9, 9))
    got = query_attention(q, k, v, 3, backend=backend)
    heads = []
    for a, b, c in zip(q.chunk(3, -1), k.chunk(3, -1), v.chunk(3, -1)):
        heads.append((a @ b.mT / 2).softmax(-1) @ c)
    torch.testing.assert_close(got, torch.cat(heads, -1))
    assert torch.autograd.gradcheck(lambda *t: query_attention(*t, 3, backend=backend), (q, k, v))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(grid=(5, 8)), ValueError, r"x must be \[B, P \+ h\*w, C\] with grid"),
        (dict(x=torch.zeros(2, 36)), ValueError, "x must be"),
        (dict(x=torch.zeros(0, 36, 12)), ValueError, "B, C > 0"),
        (dict(norm_weight=torch.zeros(11)), ValueError, r"norm_weight must be \[C\] = \[12\]"),
        (dict(keep=0), ValueError, "keep must be a stride"),
        (dict(keep=torch.zeros(2, 3)), ValueError, "keep must have one of the dtypes int64"),
        (dict(keep=torch.zeros(3, 3, dtype=torch.long)), ValueError, r"keep must be \[B, M\] with B = 2"),
        (dict(backend="triton"), RuntimeError, "no 'triton' backend"),
        (dict(backend="native", x=torch.zeros(2, 36, 12, device="meta")), ValueError, "norm_weight is on cpu"),
    ],
)
def test_bad_input_gets_one_clear_error(call, error, message):
    arguments = dict(
        x=torch.zeros(2, 36, 12), norm_weight=torch.ones(12), norm_bias=torch.zeros(12), eps=1e-6, grid=(5, 7), keep=2
    )
    with pytest.raises(error, match=message):
        token_downsample(**(arguments | call))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(x=torch.zeros(2, 13, 12)), ValueError, r"grid \(5, 7\) and stride 2 ask for x \[B, P \+ 14, C\]"),
        (dict(skip=torch.zeros(2, 36, 11)), ValueError, "ask for x"),
        (dict(skip=torch.zeros(2, 36, 12).half()), ValueError, "skip must have one of the dtypes float32"),
        (dict(skip=torch.zeros(2, 34, 12)), ValueError, "ask for x"),
        (dict(x=torch.zeros(0, 15, 12), skip=torch.zeros(0, 36, 12), extra=None), ValueError, "B, C > 0"),
        (dict(stride=0), ValueError, "stride must be an integer of at least 1"),
        (dict(extra=torch.zeros(3, 2, dtype=torch.long)), ValueError, r"extra must be \[B, E\] with B = 2"),
        (dict(extra=torch.zeros(2, 2)), ValueError, "extra must have one of the dtypes int64"),
        (dict(extra=torch.full((2, 2), 35)), RuntimeError, r"has the cell 35, but the grid has 35|out of bounds"),
        (dict(extra=torch.full((2, 2), -1)), RuntimeError, r"has the cell -1|out of bounds"),
        (dict(backend="tiled"), RuntimeError, "no 'tiled' backend"),
    ],
)
def test_bad_input_of_upsample_gets_one_clear_error(call, error, message):
    arguments = dict(x=torch.zeros(2, 15, 12), skip=torch.zeros(2, 36, 12), grid=(5, 7), stride=2)
    arguments["extra"] = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(error, match=message):
        token_upsample(**(arguments | call))


def test_operands_of_the_operators_that_do_not_fit_are_refused():
    """What the public functions check beforehand, asked of the operators themselves: never memory of others."""
    if NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    x, w = torch.zeros(1, 35, 64), torch.zeros(64)
    down, back = torch.ops.segvit.token_downsample, torch.ops.segvit.token_downsample_backward
    y, y_q, x_q, mean, rstd = down(x, w, w, None, 5, 7, 2, 1e-6)
    for call in (
        lambda: down(x, w, w[:1], None, 5, 7, 2, 1e-6),
        lambda: down(x[:0], w, w, None, 5, 7, 2, 1e-6),
        lambda: back(y[:, :3], y_q, x_q, x, w, None, mean, rstd, 5, 7, 2),
        lambda: back(y, y_q[:, :1], x_q, x, w, None, mean, rstd, 5, 7, 2),
        lambda: back(y, y_q, x_q, x, w, None, mean.double(), rstd, 5, 7, 2),
        lambda: torch.ops.segvit.token_upsample(x[:, :3], x, None, 5, 7, 2),
        lambda: torch.ops.segvit.token_upsample_backward(x, torch.zeros(2, 1, dtype=torch.long), 5, 7, 2),
    ):
        with pytest.raises(RuntimeError, match=r"token_(resample|upsample)"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [35, 2**31, 2**32, 2**63 - 1])
def test_strides_beyond_the_grid_are_all_the_same(backend, stride):
    x, weight, bias = inputs()
    want = token_downsample(x, weight, bias, 1e-6, (5, 7), 7, backend=backend)
    for a, b in zip(token_downsample(x, weight, bias, 1e-6, (5, 7), stride, backend=backend), want):
        assert torch.equal(a, b)
    low, skip = upsample_inputs(stride=7)
    up = token_upsample(low, skip, (5, 7), stride, backend=backend)
    assert torch.equal(up, token_upsample(low, skip, (5, 7), 7, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_is_not_finite_spoils_its_neighbours_alone(backend):
    x, skip = upsample_inputs(P=0)
    with torch.no_grad():
        x[0, 5] = torch.inf  # row 1, column 1 of the low grid: row 2, column 2 of the full one
        out = token_upsample(x, skip, (5, 7), 2, backend=backend).unflatten(1, (5, 7))
    bad = ~out[0, :, :, 0].isfinite()
    want = torch.zeros(5, 7, dtype=torch.bool)
    want[1:4, 1:4] = True
    assert torch.equal(bad, want)
    assert out[1].isfinite().all()


@pytest.mark.skipif(bool(NATIVE_MISSING), reason=str(NATIVE_MISSING))
def test_forward_mode_is_refused_and_not_zero():
    with torch.autograd.forward_ad.dual_level():
        x, weight, bias = (t.detach() for t in inputs())
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            token_downsample(dual, weight, bias, 1e-6, (5, 7), 2, backend="native")


def test_poisoned_memory_reaches_what_is_allocated_in_cpp(poisoned):
    if NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(3).new_empty((4,)).isnan().all()
    assert torch.ops.aten.new_empty(torch.zeros(3), [4]).isnan().all()


def test_a_missing_library_says_so(monkeypatch):
    from segvit.ops import token_resample

    monkeypatch.setattr(token_resample, "NATIVE_MISSING", "segvit._C was not built")
    with pytest.raises(RuntimeError, match=r"the 'native' backend cannot run: segvit\._C was not built"):
        token_downsample(*inputs(), 1e-6, (5, 7), 2, backend="native")
    x, skip = upsample_inputs()
    with pytest.raises(RuntimeError, match=r"segvit\._C was not built"):
        token_upsample(x, skip, (5, 7), 2, backend="native")
    token_upsample(x, skip, (5, 7), 2)  # the reference serves


@pytest.mark.parametrize("cell", [-1, 35])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell_outside_the_grid_is_refused(backend, cell):
    keep = torch.tensor([[0, cell], [0, 1]])
    with pytest.raises(RuntimeError, match=r"keep has the cell|out of bounds"):
        token_downsample(*inputs(P=0), 1e-6, (5, 7), keep, backend=backend)


def test_native_on_another_device_says_why():
    meta = [t.to("meta") for t in inputs(dtype=torch.float32)]
    with pytest.raises(RuntimeError, match="x is on meta"):
        token_downsample(*meta, 1e-6, (5, 7), 2, backend="native")
