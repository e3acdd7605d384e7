import os

import pytest
import torch
import torch._dynamo.testing
from conftest import kernel
from torch.library import opcheck

from segvit.ops import atm, reference
from segvit.ops.reference.atm import dropout_mask

SIZES = [(2, 3, 7, 33, 8), (1, 1, 1, 1, 16), (3, 2, 63, 60, 4), (2, 4, 17, 5, 2)]  # B, H, N, L, d


def inputs(B, H, N, L, d, dtype=torch.float64, carry=True, grad=True):
    q, k, v = (torch.randn(B, n, H * d, dtype=dtype) for n in (N, L, L))
    mask = torch.randn(B, N, L, dtype=torch.float64 if dtype == torch.float64 else torch.float32) if carry else None
    return [t.requires_grad_(grad) if t is not None else None for t in (q, k, v, mask)]


def naive(q, k, v, carry, H):
    """Eager and explicit, written apart from the reference: one head at a time."""
    outs, mask = [], 0
    for qh, kh, vh in zip(q.chunk(H, -1), k.chunk(H, -1), v.chunk(H, -1)):
        s = torch.einsum("bnd,bld->bnl", qh, kh) / qh.shape[-1] ** 0.5
        outs.append(torch.einsum("bnl,bld->bnd", s.softmax(-1), vh))
        mask = mask + s / H
    return torch.cat(outs, -1), mask if carry is None else mask + carry


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["library", "reference"])
@pytest.mark.parametrize("carry", [True, False])
def test_forward_and_gradients_match_the_naive_form(size, backend, carry):
    q, k, v, mask = inputs(*size, carry=carry)
    leaves = [t for t in (q, k, v, mask) if t is not None]
    got = atm(q, k, v, size[1], mask_carry=mask, backend=backend)
    want = naive(q, k, v, mask, size[1])
    upstream = [torch.randn_like(t) for t in want]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradcheck(dropout_p):
    q, k, v, mask = inputs(2, 2, 3, 5, 2)
    seed = torch.tensor([1234567890123])
    assert torch.autograd.gradcheck(
        lambda *a: reference.atm(*a[:3], 2, dropout_p=dropout_p, mask_carry=a[3], seed=seed), (q, k, v, mask)
    )


@pytest.mark.parametrize(("dropout_p", "sigmoid"), [(0.0, False), (0.3, False), (0.3, True)])
def test_operator_gradcheck_and_opcheck(dropout_p, sigmoid):
    q, k, v, mask = inputs(2, 2, 3, 5, 2)
    seed = torch.tensor([42]) if dropout_p else None
    op = torch.ops.segvit.atm.default
    assert torch.autograd.gradcheck(
        lambda *a: op(*a[:3], 2, 0.7, dropout_p, seed, a[3], sigmoid, "reference")[:2], (q, k, v, mask)
    )
    opcheck(op, (q, k, v, 2, 0.7, dropout_p, seed, mask, sigmoid, "reference"))
    opcheck(op, (*inputs(2, 2, 3, 5, 2, torch.bfloat16)[:3], 2, 0.7, dropout_p, seed, None, sigmoid, "reference"))


def test_gradient_flows_through_each_output_alone():
    q, k, v, _ = inputs(1, 2, 3, 4, 2, carry=False)
    out, mask = atm(q, k, v, 2)
    through_mask = torch.autograd.grad(mask.sum(), [q, k], retain_graph=True)
    through_out = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(g.abs().sum() > 0 for g in (*through_mask, *through_out))


@pytest.mark.parametrize("backend", ["library", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_plain_pytorch_in_the_same_dtype(backend, dtype):
    exact = inputs(2, 4, 19, 51, 16, grad=False)
    low = [t.to(dtype) for t in exact[:3]]
    carry = exact[3].float()
    want = naive(*(t.double() for t in low), carry.double(), 4)
    plain = naive(*low, carry, 4)
    got = atm(*low, 4, mask_carry=carry, backend=backend)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for g, p, w in zip(got, plain, want):
        error, allowed = (g.double() - w).abs().max(), (p.double() - w).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps


def test_strided_inputs_and_large_logits():
    kv = torch.randn(2, 33, 3 * 16)
    q = torch.randn(2, 16, 5).mT * 30
    k, v = kv[..., 16:32], kv[..., 32:]
    out, mask = atm(q, k, v, 2)
    want = naive(q.double(), k.double(), v.double(), None, 2)
    assert mask.abs().max() > 50
    torch.testing.assert_close(out.double(), want[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mask.double(), want[1], atol=1e-4, rtol=1e-4)


def test_sigmoid_returns_the_masks_and_their_gradient():
    q, k, v, mask = inputs(2, 2, 3, 5, 4)
    for backend in ("library", "reference"):
        assert torch.autograd.gradcheck(
            lambda *a, name=backend: atm(*a[:3], 2, mask_carry=a[3], sigmoid=True, backend=name), (q, k, v, mask)
        )
    torch.testing.assert_close(atm(q, k, v, 2, sigmoid=True)[1], atm(q, k, v, 2)[1].sigmoid())


def test_dropout_keeps_at_the_stated_rate_and_replays_from_its_seed():
    first = dropout_mask(torch.tensor([5]), (4, 8, 60, 64), 0.3, torch.float64)
    assert torch.equal(first, dropout_mask(torch.tensor([5]), (4, 8, 60, 64), 0.3, torch.float64))
    assert not torch.equal(first, dropout_mask(torch.tensor([6]), (4, 8, 60, 64), 0.3, torch.float64))
    kept = (first > 0).double()
    sigma = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.mean() - 0.7) < 5 * sigma
    assert set(first.unique().tolist()) == {0.0, 1 / 0.7}
    for dim in range(4):  # no head, query or token is favoured
        others = [d for d in range(4) if d != dim]
        per_slice = kept.mean(others)
        assert (per_slice - 0.7).abs().max() < 5 * sigma * kept.shape[dim] ** 0.5
    flat = kept.flatten() - 0.7
    assert abs((flat[1:] * flat[:-1]).mean()) < 5 * 0.21 / kept.numel() ** 0.5  # neighbours are uncorrelated


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_dropout_is_fresh_at_every_call_and_unbiased(backend):
    q, k, v, _ = inputs(1, 1, 8, 64, 8, grad=False)
    draws = [atm(q, k, v, 1, dropout_p=0.5, backend=backend) for _ in range(200)]
    assert not torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])  # the mask is not dropped
    mean = torch.stack([d[0] for d in draws]).mean(0)
    assert (mean - atm(q, k, v, 1)[0]).abs().mean() < 0.05


def test_autocast_casts_the_inputs_and_keeps_the_carry_in_float32():
    q, k, v, carry = inputs(2, 2, 3, 5, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, mask = atm(q, k, v, 2, mask_carry=carry)
    assert (out.dtype, mask.dtype) == (torch.bfloat16, torch.float32)
    (out.float().sum() + mask.sum()).backward()
    assert carry.grad.dtype == torch.float32
    assert torch.equal(carry.grad, torch.ones_like(carry))


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_compiles_to_at_most_two_graphs_over_batch_sizes(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q, k, v: atm(q, k, v, 2, backend=backend), fullgraph=True, backend=counter)
    for B in (1, 2, 3, 8):
        q, k, v, _ = inputs(B, 2, 5, 9, 4, torch.float32, carry=False)
        out, mask = step(q, k, v)
        (out.sum() + mask.sum()).backward()
        torch.testing.assert_close(out, atm(q, k, v, 2)[0])
    assert counter.frame_count <= 2


def test_reference_output_is_fully_written(poisoned):
    q, k, v, carry = inputs(2, 2, 3, 5, 4, torch.float32, grad=False)
    for backend in ("library", "reference"):
        assert all(t.isfinite().all() for t in atm(q, k, v, 2, mask_carry=carry, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 3)), r"q must be \[B, N, C\], got shape \(2, 3\)"),
        (dict(k=torch.zeros(2, 5, 6)), r"q must be \[B, N, C\] and k, v \[B, L, C\]"),
        (dict(v=torch.zeros(2, 4, 8)), "q must be"),
        (dict(v=torch.zeros(2, 5, 8, dtype=torch.float64)), "v has dtype torch.float64, but q has torch.float32"),
        (dict(k=torch.zeros(2, 5, 8, device="meta")), "k is on meta, but q is on cpu"),
        (dict(q=torch.zeros(2, 0, 8)), "no dimension may be zero"),
        (dict(q=torch.zeros(2, 3, 8, dtype=torch.int32)), "q must have one of the dtypes"),
        (dict(q=[1.0]), "q must be a tensor"),
        (dict(num_heads=3), "num_heads must divide the width C = 8, got 3"),
        (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\)"),
        (dict(mask_carry=torch.zeros(2, 3, 4)), r"mask_carry must be \[B, N, L\] = \(2, 3, 5\)"),
        (dict(mask_carry=torch.zeros(2, 3, 5, dtype=torch.bfloat16)), "mask_carry must have one of the dtypes float32"),
        (dict(backend="cuda"), "backend='cuda' is no backend"),
    ],
)
def test_bad_input_gets_one_clear_error(change, message):
    arguments = dict(q=torch.zeros(2, 3, 8), k=torch.zeros(2, 5, 8), v=torch.zeros(2, 5, 8), num_heads=2) | change
    with pytest.raises(ValueError, match=message):
        atm(**arguments)


def test_a_forced_backend_that_cannot_run_says_why():
    q, k, v, _ = inputs(1, 1, 2, 3, 4, torch.float32, carry=False)
    with pytest.raises(RuntimeError, match="atm: there is no 'native' backend"):
        atm(q, k, v, 1, backend="native")


def test_a_reason_is_asked_for_only_when_it_matters():
    from segvit.ops._dispatch import choose

    def never():
        raise AssertionError("asked")

    assert choose("op", None, [("library", None), ("triton", never)]) == "library"
    assert choose("op", None, [("triton", lambda: "no GPU"), ("library", None)]) == "library"
    with pytest.raises(RuntimeError, match="op: the 'triton' backend cannot run: no GPU"):
        choose("op", "triton", [("library", None), ("triton", lambda: "no GPU")])


def test_a_second_derivative_is_refused_and_not_wrong():
    q, k, v, _ = inputs(1, 1, 2, 3, 4)
    out, _ = torch.ops.segvit.atm(q, k, v, 1, 0.5, 0.0, None, None, False, "reference")[:2]
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_environment_variable_binds_only_operators_that_have_the_backend(monkeypatch):
    q, k, v, _ = inputs(1, 1, 2, 3, 4, torch.float32, carry=False)
    monkeypatch.setenv("SEGVIT_KERNELS", "native")
    atm(q, k, v, 1)
    monkeypatch.setenv("SEGVIT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SEGVIT_KERNELS='cuda' is no backend"):
        atm(q, k, v, 1)


# The Triton kernels: `-m gpu` runs these on a GPU, tests/test_interpreter.py under Triton's interpreter on the CPU.
# Sizes are odd on purpose; heads of 24 are no power of two.
KERNEL_CASES = [  # B, H, N, L, d, dropout, carry, sigmoid
    (2, 2, 37, 53, 32, 0.0, True, False),
    (1, 2, 70, 130, 16, 0.3, False, False),
    (2, 1, 1, 64, 24, 0.0, True, True),
    (1, 3, 65, 1, 16, 0.5, True, False),
    (1, 2, 33, 70, 64, 0.3, True, False),
    (1, 1, 40, 35, 96, 0.0, False, True),
    (1, 1, 20, 66, 128, 0.1, True, False),
    (2, 2, 150, 70, 32, 0.0, False, False),  # all queries at once: 128 + 32
    (1, 1, 160, 40, 16, 0.0, False, True),
    (1, 2, 192, 70, 32, 0.0, True, False),  # 128 + 64
    (1, 1, 193, 33, 16, 0.0, False, False),  # too many: a loop
    (1, 1, 128, 33, 32, 0.0, False, False),  # a loop that ends even
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LANE = "cpu" if INTERPRETED else "cuda"


@kernel
@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_is_as_exact_as_plain_pytorch_in_the_same_dtype(case, dtype, poisoned):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bf16")
    B, H, N, L, d, dropout_p, carried, sigmoid = case
    q, k, v = (torch.randn(B, n, H * d, device=LANE).to(dtype) for n in (N, L, L))
    carry = torch.randn(B, N, L, device=LANE) if carried else None
    seed = torch.tensor([2**61 + 12345], device=LANE)
    upstream = torch.randn(B, N, H * d, device=LANE).to(dtype), torch.randn(B, N, L, device=LANE)

    def run(call, cast):
        leaves = [None if t is None else cast(t).requires_grad_() for t in (q, k, v, carry)]
        out, mask = call(*leaves)
        given = [t for t in leaves if t is not None]
        grads = torch.autograd.grad([out, mask], given, [upstream[0].to(out.dtype), upstream[1].to(mask.dtype)])
        return [out.detach(), mask.detach(), *grads]

    scale = d**-0.5
    plain = lambda q, k, v, c: reference.atm(q, k, v, H, None, dropout_p, c, sigmoid, seed)  # noqa: E731
    fused = lambda q, k, v, c: torch.ops.segvit.atm(q, k, v, H, scale, dropout_p, seed, c, sigmoid, "triton")[:2]  # noqa: E731
    want, allowed = run(plain, lambda t: t.double()), run(plain, lambda t: t.clone())
    got, again = run(fused, lambda t: t.clone()), run(fused, lambda t: t.clone())
    for g, a, p, w in zip(got, again, allowed, want):
        assert torch.equal(g, a)  # bitwise the same from run to run
        error, bound = (g.double() - w).norm(), 2 * (p.double() - w).norm()
        assert error <= bound + d * torch.finfo(torch.float32).eps * w.norm()  # a float32 sum of d products rounds so
        assert torch.nn.functional.cosine_similarity(g.double().flatten(), w.flatten(), 0) > 0.999


@kernel
def test_kernel_behind_the_public_function():
    q, k, v, carry = (t.to(LANE) for t in inputs(2, 2, 5, 9, 16, torch.float32, grad=False))
    kv = torch.cat([k, v], -1)
    k, v = kv.chunk(2, -1)  # strided views, as the decoder's one projection gives them
    for sigmoid in (False, True):
        got = atm(q.mT.contiguous().mT, k, v, 2, mask_carry=carry, sigmoid=sigmoid, backend="triton")
        want = atm(q, k, v, 2, mask_carry=carry, sigmoid=sigmoid, backend="reference")
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
    first, second = (atm(q, k, v, 2, dropout_p=0.5, backend="triton")[0] for _ in range(2))
    assert not torch.equal(first, second)
    arguments = (q.requires_grad_(), k.contiguous(), v.contiguous(), 2, 0.25, 0.0, None, carry, False, "triton")
    opcheck(torch.ops.segvit.atm.default, arguments)


@kernel
@pytest.mark.parametrize("scale", [1e-4, 3e-6])
def test_small_gradients_of_the_mask_survive_half_precision(scale):
    """A gradient that is a mean over many pixels: were scale / H applied before rounding, float16 would lose it."""
    q, k, v, _ = (None if t is None else t.half().to(LANE) for t in inputs(1, 4, 9, 40, 32, carry=False, grad=False))
    upstream = torch.randn(1, 9, 40, device=LANE) * scale

    def grads(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k)]
        _, mask = atm(*leaves, v.to(dtype), 4, backend=backend)
        return torch.autograd.grad(mask, leaves, upstream.to(mask.dtype))

    want, plain = grads(torch.float64, "reference"), grads(torch.float16, "reference")
    for g, p, w in zip(grads(torch.float16, "triton"), plain, want):
        assert (g.double() - w).norm() <= 2 * (p.double() - w).norm()


@kernel
def test_kernel_compiles_to_at_most_two_graphs_over_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q, k, v: atm(q, k, v, 1, backend="triton"), fullgraph=True, backend=counter)
    for B in (1, 2, 3, 8):
        leaves = [t.to(LANE).requires_grad_() for t in inputs(B, 1, 5, 9, 16, torch.float32, carry=False)[:3]]
        out, mask = step(*leaves)
        (out.sum() + mask.sum()).backward()
        torch.testing.assert_close(out, atm(*leaves, 1, backend="reference")[0])
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["library", "triton"])
def test_a_replayed_graph_draws_fresh_dropout(backend):
    q, k, v = (t.cuda() for t in inputs(2, 2, 40, 70, 32, torch.float16, carry=False, grad=False)[:3])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates before the capture
        atm(q, k, v, 2, dropout_p=0.5, backend=backend)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, mask = atm(q, k, v, 2, dropout_p=0.5, backend=backend)
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append((out.clone(), mask.clone()))
    assert not torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[1][0], draws[2][0])
    assert torch.equal(draws[0][1], draws[2][1])


@kernel
@pytest.mark.parametrize(("dtype", "shift"), [(torch.float16, 30.0), (torch.float32, 150.0)])
def test_kernel_survives_queries_unlike_every_feature(dtype, shift):
    """Tokens of absent classes: all similarities far below zero, and a feature tile that is not full."""
    q, k, v, _ = (
        t if t is None else t.to(LANE) for t in inputs(1, 1, 3, 37, 16, torch.float32, carry=False, grad=False)
    )
    q[..., 0], k[..., 0] = shift, -4.0
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out, mask = atm(*leaves, 1, backend="triton")
    assert mask.max() < -shift / 2
    grads = torch.autograd.grad(out.sum() + mask.sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad([t.sum() for t in atm(*exact, 1, backend="reference")], exact)
    for g, w in zip(grads, want):
        torch.testing.assert_close(g.double(), w, rtol=2e-2, atol=2e-2 * w.abs().max().item())


@kernel
def test_kernel_refuses_what_it_cannot_take_with_the_reason():
    q, k, v = (t.to(LANE) for t in inputs(1, 1, 2, 3, 8, torch.float32, carry=False)[:3])
    with pytest.raises(RuntimeError, match="heads are 8 wide; the kernels take 16 to 128"):
        atm(q, k, v, 1, backend="triton")
    q, k, v = (t.to(LANE) for t in inputs(1, 1, 2, 3, 16, torch.float64, carry=False)[:3])
    with pytest.raises(RuntimeError, match="the kernels take float32, bfloat16 and float16"):
        atm(q, k, v, 1, backend="triton")


def test_kernel_without_a_gpu_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v, _ = inputs(1, 1, 2, 3, 16, torch.float32, carry=False)
    with pytest.raises(RuntimeError, match="the 'triton' backend cannot run: the tensors are on cpu, not on a GPU"):
        atm(q, k, v, 1, backend="triton")


@pytest.mark.parametrize("name", ["E_attention", "E2_attention_large_logits"])
@pytest.mark.parametrize("backend", ["library", "reference"])
def test_golden_cross_attention(golden, name, backend):
    """The authors' cross-attention module: projections around atm, forward and gradients."""
    case = golden(name)
    heads = case.info["constructor"]["num_heads"]
    xq, kv = case["input/xq"].requires_grad_(), case["input/kv"].requires_grad_()
    linear = lambda x, part: torch.nn.functional.linear(x, case[f"state/{part}.weight"], case[f"state/{part}.bias"])  # noqa: E731
    out, mask = atm(linear(xq, "q"), linear(kv, "k"), linear(kv, "v"), heads, backend=backend)
    x = linear(out, "proj").transpose(0, 1)
    case.check("out/x", x)
    case.check("out/attn_save", mask)
    torch.autograd.backward([x, mask], [case["upstream/grad_x"], case["upstream/grad_attn"]])
    case.check("grad/xq", xq.grad)
    case.check("grad/kv", kv.grad)
