import os
import re
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import ROOT, kernel
from torch.library import opcheck

from segvit.ops import mask_decode, reference
from segvit.ops._dispatch import NATIVE_MISSING

SIZES = [
    ((2, 5, 4, 6), 3, (37, 50)),
    ((1, 1, 1, 1), 1, (3, 2)),
    ((2, 7, 9, 5), 7, (4, 3)),
    ((1, 150, 8, 8), 150, (128, 96)),
    ((1, 20, 3, 40), 31, (17, 600)),
]
BACKENDS = {"native": torch.float32, "tiled": torch.float64, "reference": torch.float64}  # and their exactest dtype
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def built(request):
    """Skip tests of the C++ kernel where it was not built."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("backend") == "native" and NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)


def inputs(shape, K, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype) * 5, torch.randn(*shape[:2], K + 1, dtype=dtype).softmax(-1)[..., :-1]


def naive(logits, probs, size):
    masks = F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bnk,bnhw->bkhw", probs, masks)


def same_labels(labels, scores, margin=1e-5):
    """The argmax of scores [B, K, H, W], wherever two classes are not as good as equal."""
    top = scores.topk(min(2, scores.shape[1]), 1)
    clear = top.values[:, 0] - top.values[:, -1] > margin if scores.shape[1] > 1 else labels == 0
    assert clear.float().mean() > 0.5
    return torch.equal(labels.long()[clear], top.indices[:, 0][clear])


@pytest.mark.parametrize(("shape", "K", "size"), SIZES)
@backends
def test_scores_and_labels_match_the_naive_form(shape, K, size, backend, poisoned):
    logits, probs = inputs(shape, K, BACKENDS[backend])
    want = naive(logits.double(), probs.double(), size)
    scores = mask_decode(logits, probs, size, "scores", backend=backend)
    torch.testing.assert_close(scores.double(), want, rtol=1e-5, atol=1e-6)
    labels, best = mask_decode(logits, probs, size, confidence=True, backend=backend)
    torch.testing.assert_close(best.double(), want.amax(1), rtol=1e-5, atol=1e-6)
    assert labels.dtype == torch.uint8
    assert same_labels(labels, want)
    assert torch.equal(mask_decode(logits, probs, size, backend=backend), labels)


def trained(shape, K, classes):
    """As after training: of K classes a few are in the image, and smooth masks that say where."""
    B, N, h, w = shape
    logits = F.interpolate(torch.randn(B, N, 3, 3) * 8, (h, w), mode="bicubic") - 3
    probs = torch.randn(B, N, K + 1) / 2
    probs[..., -1] += 9
    for n, c in enumerate(classes):
        probs[:, n, c] += 14
    return logits, probs.softmax(-1)[..., :-1]


@pytest.mark.parametrize("backend", ["native"])
def test_classes_that_cannot_win_are_left_out_and_nothing_changes(backend):
    logits, probs = trained((2, 40, 12, 10), 90, [3, 40, 41, 89, 7])
    scores = mask_decode(logits, probs, (100, 300), "scores", backend=backend)
    labels, best = mask_decode(logits, probs, (100, 300), confidence=True, backend=backend)
    assert torch.equal(best, scores.amax(1))
    assert torch.equal(labels.long(), scores.argmax(1))
    assert len(labels.unique()) > 3


def late_winner(corner, grid=(9, 9), K=70):
    """Class 0 has nearly all; at a corner it is at 0.15, and wins over all but the last class, which is at 0.2 there.

    60 classes between are bound to 0.3, which they reach in the opposite corner alone, so the last is looked at last.
    """
    y, x = corner
    logits, probs = torch.full((1, 3, *grid), -9.0), torch.zeros(1, 3, K)
    logits[0, 0], logits[0, 0, y, x], logits[0, 2, y, x] = 9, -1.73, 9
    logits[0, 1, -1 - y, -1 - x] = 9
    probs[0, 0, 0], probs[0, 1, 1:61], probs[0, 2, K - 1] = 1, 0.3, 0.2
    return logits, probs


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
@pytest.mark.parametrize("backend", ["native"])
def test_one_pixel_alone_keeps_its_tile_open(backend, corner):
    logits, probs = late_winner(corner)
    scores = naive(logits.double(), probs.double(), (80, 80))
    assert 0 < (scores.argmax(1) == 69).sum() < 200
    assert same_labels(mask_decode(logits, probs, (80, 80), backend=backend), scores)


@pytest.mark.parametrize("width", ["128", "256"])
def test_narrower_vectors_give_the_same(width):
    """The variants of the C++ kernels that processors without AVX-512 run."""
    if NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    files = [str(ROOT / "tests" / name) for name in ("test_mask_decode.py", "test_mask_loss.py")]
    chosen = "native and not width or float32_backend"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"SEGVIT_VECTORS": width}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 30


@pytest.mark.parametrize("backend", ["native", "tiled", "reference"])
def test_ties_go_to_the_lower_class(backend):
    logits, probs = torch.randn(1, 3, 2, 2), torch.rand(1, 3, 40)
    probs[..., 13] = probs[..., 37] = probs[..., 30] = 1
    labels = mask_decode(logits, probs, (40, 40), backend=backend)
    assert (labels == 13).all()
    assert (mask_decode(logits, torch.zeros(1, 3, 40), (5, 5), backend=backend) == 0).all()
    many = torch.rand(1, 3, 40).sort(-1).values  # bounds rise with the class: the first tile is the last one by number
    many[..., 5] = many[..., 39]
    assert (mask_decode(logits, many, (40, 40), backend=backend) == 5).all()
    nowhere = torch.full((1, 3, 2, 2), -500.0)
    assert (mask_decode(nowhere, probs.flip(2), (5, 5), backend=backend) == 0).all()


@pytest.mark.parametrize(("dtype", "margin"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_labels_equal_float64_wherever_the_margin_is_clear(dtype, margin):
    logits, probs = inputs((2, 19, 16, 16), 19, torch.float32)
    logits, probs = logits.to(dtype), probs.to(dtype)
    top = naive(logits.double(), probs.double(), (128, 128)).topk(2, 1)
    clear = top.values[:, 0] - top.values[:, 1] > margin
    assert clear.double().mean() > 0.9
    labels = mask_decode(logits, probs, (128, 128)).long()
    assert torch.equal(labels[clear], top.indices[:, 0][clear])


@backends
def test_extent_equals_interpolating_the_whole_grid_and_cropping(backend):
    logits, probs = inputs((2, 4, 5, 7), 4, BACKENDS[backend])
    whole = naive(logits, probs, (80, 112))  # a 75×107 image padded to 80×112, patch 16
    got = mask_decode(logits, probs, (75, 107), "scores", extent=(75 / 16, 107 / 16), backend=backend)
    torch.testing.assert_close(got, whole[:, :, :75, :107])


@backends
def test_pruning_stays_within_its_bound(backend):
    logits, probs = inputs((2, 30, 6, 6), 30, BACKENDS[backend])
    epsilon = probs.amax(-1).median().item()
    dropped = (probs.amax(-1) < epsilon).sum(1)
    exact = mask_decode(logits, probs, (24, 24), "scores")
    pruned = mask_decode(logits, probs, (24, 24), "scores", prune=epsilon, backend=backend)
    difference = (exact - pruned).abs().amax((1, 2, 3))
    assert (dropped > 0).all()
    assert (difference > 0).all()
    assert (difference < dropped * epsilon).all()
    keep = probs * (probs.amax(-1, keepdim=True) >= epsilon)
    torch.testing.assert_close(pruned, mask_decode(logits, keep, (24, 24), "scores"))
    assert same_labels(mask_decode(logits, probs, (24, 24), prune=epsilon, backend=backend), pruned)


@backends
def test_pruning_every_query_gives_zero_scores(backend):
    logits, probs = inputs((1, 3, 2, 2), 3, BACKENDS[backend])
    assert mask_decode(logits, probs, (5, 4), prune=1.1, backend=backend).max() == 0
    assert mask_decode(logits, probs, (5, 4), "scores", prune=1.1, backend=backend).abs().max() == 0


@backends
def test_accumulates_windows_in_place(backend):
    logits, probs = inputs((2, 4, 5, 5), 3, torch.float32)
    out, counts = torch.ones(2, 3, 30, 40), torch.zeros(30, 40, dtype=torch.int32)
    result = mask_decode(logits, probs, (20, 25), "scores", out=out, counts=counts, window=(10, 15), backend=backend)
    assert result is out
    want = torch.ones(2, 3, 30, 40)
    want[:, :, 10:, 15:] += naive(logits, probs, (20, 25))
    torch.testing.assert_close(out, want)
    assert counts[10:, 15:].eq(1).all()
    assert counts.sum() == 20 * 25


@backends
def test_accumulates_into_a_canvas_of_any_strides(backend):
    logits, probs = inputs((2, 4, 5, 5), 3, torch.float32)
    out, counts = torch.ones(2, 40, 30, 3).permute(0, 3, 2, 1), torch.zeros(30, 40)
    mask_decode(logits, probs, (20, 25), "scores", out=out, counts=counts, window=(10, 15), backend=backend)
    want = torch.ones(2, 3, 30, 40)
    want[:, :, 10:, 15:] += naive(logits, probs, (20, 25))
    torch.testing.assert_close(out, want)


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_labels_of_every_integer_dtype(backend, dtype):
    logits, probs = inputs((2, 5, 4, 6), 9, torch.float32)
    labels = mask_decode(logits, probs, (37, 50), dtype=dtype, backend=backend)
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), naive(logits, probs, (37, 50)).argmax(1))


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mask_logits", "class_probs"])
def test_nan_and_infinity_raise_on_the_cpu_and_nothing_is_written(backend, value, name):
    logits, probs = inputs((2, 4, 5, 5), 3, torch.float32)
    (logits if name == "mask_logits" else probs)[1, 2, 1] = value
    out, counts = torch.ones(2, 3, 8, 8), torch.zeros(8, 8)
    for arguments in ({}, {"output": "scores"}, dict(output="scores", out=out, counts=counts, window=(0, 0))):
        with pytest.raises(ValueError, match=f"{name} contain NaN or infinity"):
            mask_decode(logits, probs, (8, 8), backend=backend, **arguments)
    assert (out == 1).all()
    assert (counts == 0).all()


def where():
    return "cuda" if torch.cuda.is_available() else "cpu"


KERNEL_CASES = {  # shape, K, size: a scale above 3.5 is a product with 16 cells, others gather four
    "odd": ((2, 5, 4, 6), 3, (37, 50)),
    "one": ((1, 1, 1, 1), 1, (3, 2)),
    "down": ((2, 7, 9, 5), 7, (4, 3)),
    "mixed": ((1, 18, 9, 3), 20, (20, 30)),
    "borders": ((1, 17, 5, 4), 33, (18, 14)),
    "two passes": ((1, 33, 2, 3), 200, (11, 13)),
    "round 2": ((1, 37, 3, 3), 70, (20, 17)),
    "ADE": ((1, 18, 2, 2), 150, (9, 8)),
    "COCO-Stuff": ((1, 18, 2, 2), 171, (8, 9)),
}


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel_against_float64(case, dtype):
    shape, K, size = KERNEL_CASES[case]
    logits, probs = (t.to(where(), dtype) for t in inputs(shape, K, torch.float32))
    want = naive(logits.double(), probs.double(), size)
    atol = 1e-5 if dtype == torch.float32 else 2e-3
    scores = mask_decode(logits, probs, size, "scores", backend="triton")
    torch.testing.assert_close(scores.double(), want, rtol=0, atol=atol)
    labels, best = mask_decode(logits, probs, size, confidence=True, backend="triton")
    torch.testing.assert_close(best.double(), want.amax(1), rtol=0, atol=atol)
    assert same_labels(labels, want, 2 * atol)
    assert torch.equal(mask_decode(logits, probs, size, backend="triton"), labels)


@kernel
def test_kernel_leaves_out_classes_that_cannot_win():
    logits, probs = (t.to(where()) for t in trained((2, 20, 4, 4), 90, [3, 40, 41, 89, 7]))
    bounds = torch.einsum("bnk,bn->bk", probs, logits.amax((2, 3)).sigmoid()).sort(descending=True).values
    assert (2 * bounds[:, 32] < bounds[:, 0]).all()  # so the small tile goes first
    want = naive(logits.double(), probs.double(), (30, 30))
    labels, best = mask_decode(logits, probs, (30, 30), confidence=True, backend="triton")
    torch.testing.assert_close(best.double(), want.amax(1), rtol=0, atol=1e-5)
    assert same_labels(labels, want)


@kernel
@pytest.mark.parametrize("corner", [(0, 0), (-1, -1)])
def test_kernel_keeps_a_tile_open_for_one_pixel_alone(corner):
    logits, probs = (t.to(where()) for t in late_winner(corner, (4, 3)))
    scores = naive(logits.double(), probs.double(), (30, 20))
    assert 0 < (scores.argmax(1) == 69).sum() < 40
    assert same_labels(mask_decode(logits, probs, (30, 20), backend="triton"), scores)


@kernel
@pytest.mark.parametrize("K", [150, 171, 300])
def test_kernel_finds_a_winner_among_the_last_classes(K):
    logits, probs = torch.full((1, 2, 2, 3), -9.0), torch.zeros(1, 2, K)
    logits[0, 0, :, 0], logits[0, 1, :, 2] = 9, 9
    probs[0, 0, : K - 1], probs[0, 1, K - 1] = 0.3, 0.2  # every other class has a larger bound
    logits, probs = logits.to(where()), probs.half().to(where())
    labels = mask_decode(logits, probs, (9, 24), backend="triton")
    assert (labels[..., -8:] == K - 1).all()
    assert (labels[..., :8] < K - 1).all()
    assert (labels >= 0).all()


@kernel
def test_kernel_prunes_accumulates_and_knows_the_extent():
    logits, probs = (t.to(where()) for t in inputs((2, 20, 5, 7), 20, torch.float32))
    epsilon = probs.amax(-1).median().item()
    keep = probs * (probs.amax(-1, keepdim=True) >= epsilon)
    want = naive(logits, keep, (80, 112))[:, :, :13, :11]
    options = dict(prune=epsilon, extent=(13 / 16, 11 / 16), backend="triton")
    assert same_labels(mask_decode(logits, probs, (13, 11), **options), want)
    canvas, counts = torch.ones(2, 20, 20, 30, device=where()), torch.zeros(20, 30, device=where())
    mask_decode(logits, probs, (13, 11), "scores", out=canvas, counts=counts, window=(7, 3), **options)
    torch.testing.assert_close(canvas[:, :, 7:, 3:14], want + 1, rtol=0, atol=1e-5)
    assert canvas[:, :, :7].eq(1).all()
    assert counts.sum() == 13 * 11
    assert mask_decode(logits, probs, (5, 4), "scores", prune=1.1, backend="triton").abs().max() == 0
    assert mask_decode(logits, probs, (5, 4), prune=1.1, backend="triton").max() == 0


@kernel
def test_kernel_compiles_to_at_most_two_graphs_over_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    decode = torch.compile(lambda m, p: mask_decode(m, p, (9, 8), backend="triton"), fullgraph=True, backend=counter)
    for B in (1, 2, 3):
        logits, probs = (t.to(where()) for t in inputs((B, 3, 2, 2), 4, torch.float32))
        assert torch.equal(decode(logits, probs), mask_decode(logits, probs, (9, 8), backend="triton"))
    assert counter.frame_count <= 2


@kernel
@pytest.mark.parametrize("K", [3, 70])
def test_kernel_gives_no_class_where_logits_are_nan(K, monkeypatch):
    monkeypatch.setattr(sys.modules["segvit.ops.mask_decode"], "_finite", lambda *args: None)  # a GPU does not wait
    logits, probs = (t.to(where()) for t in inputs((2, 4, 6, 6), K, torch.float32))
    logits[1, 2, 0, 0] = float("nan")
    labels, best = mask_decode(logits, probs, (48, 48), confidence=True, backend="triton")
    assert (labels[1, :4, :4] == 255).all()
    assert best[1, :4, :4].isnan().all()
    assert (mask_decode(logits, probs, (48, 48), dtype=torch.int16, backend="triton")[1, :4, :4] == -1).all()
    want = naive(logits, probs, (48, 48))
    clean = torch.ones_like(best, dtype=torch.bool)
    clean[1, :16, :16] = False  # the tiles of pixels that look at the cell
    assert torch.equal(labels[clean].long(), want.argmax(1)[clean])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_no_class_where_scores_are_nan(backend, monkeypatch):
    monkeypatch.setattr(sys.modules["segvit.ops.mask_decode"], "_finite", lambda *args: None)
    logits, probs = inputs((1, 4, 6, 6), 3, torch.float32)
    labels, best = mask_decode(logits.fill_(float("nan")), probs, (9, 9), confidence=True, backend=backend)
    assert (labels == 255).all()
    assert best.isnan().all()


@kernel
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_kernel_writes_labels_of_every_integer_dtype(dtype, poisoned):
    logits, probs = (t.to(where()) for t in inputs((2, 5, 2, 3), 9, torch.float32))
    labels = mask_decode(logits, probs, (9, 11), dtype=dtype, backend="triton")
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), naive(logits, probs, (9, 11)).argmax(1))


@kernel
def test_kernel_gathers_as_exactly_as_float32_on_large_grids():
    logits, probs = inputs((1, 2, 2000, 2), 3, torch.float32)
    want = naive(logits.double(), probs.double(), (700, 3))
    scores = mask_decode(logits.to(where()), probs.to(where()), (700, 3), "scores", backend="triton")
    torch.testing.assert_close(scores.double().cpu(), want, rtol=0, atol=2e-6)


@kernel
def test_kernel_without_pruning_keeps_queries_of_any_sign():
    logits, probs = (t.to(where()) for t in inputs((1, 3, 2, 2), 16, torch.float32))
    probs[0, 0] *= -1
    scores = mask_decode(logits, probs, (4, 4), "scores", backend="triton")
    torch.testing.assert_close(scores, naive(logits, probs, (4, 4)), rtol=0, atol=1e-5)


@backends
def test_finite_logits_of_any_size(backend):
    logits = torch.tensor([[[[3e38, -3e38]], [[1.0, 2.0]]]])
    probs = torch.tensor([[[0.9, 0.1], [0.2, 0.7]]])
    want = reference.mask_decode(logits.double(), probs.double(), (1, 4), "scores")
    torch.testing.assert_close(mask_decode(logits, probs, (1, 4), "scores", backend=backend).double(), want)


def test_label_dtypes():
    logits, probs = inputs((1, 2, 2, 2), 300, torch.float32)
    assert mask_decode(logits, probs, (4, 4)).dtype == torch.int16
    assert mask_decode(logits, probs, (4, 4), dtype=torch.int64).dtype == torch.int64
    with pytest.raises(ValueError, match="dtype must be an integer type that holds 300 classes"):
        mask_decode(logits, probs, (4, 4), dtype=torch.uint8)


def test_opcheck_and_compile():
    logits, probs = inputs((2, 4, 5, 7), 3, torch.float32)
    tail = (0.0, 5.0, 7.0, "native" if NATIVE_MISSING is None else "tiled")
    opcheck(torch.ops.segvit.mask_decode.default, (logits, probs, 9, 8, torch.uint8, True, *tail))
    opcheck(torch.ops.segvit.mask_decode_scores.default, (logits, probs, 9, 8, *tail))
    canvas = (torch.zeros(2, 3, 12, 12), torch.zeros(12, 12), 3, 4)
    opcheck(torch.ops.segvit.mask_decode_accumulate.default, (logits, probs, 9, 8, *canvas, *tail))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    decode = torch.compile(lambda m, p: mask_decode(m, p, (33, 21)), fullgraph=True, backend=counter)
    for B in (1, 2, 3, 8):
        logits, probs = inputs((B, 4, 5, 7), 3, torch.float32)
        assert torch.equal(decode(logits, probs), mask_decode(logits, probs, (33, 21)))
    assert counter.frame_count <= 2


def test_autocast_does_not_lower_the_precision():
    logits, probs = inputs((2, 4, 5, 7), 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mask_decode(logits, probs, (33, 21), "scores")
    assert torch.equal(got, mask_decode(logits, probs, (33, 21), "scores"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask_logits=torch.zeros(2, 3, 4)), r"mask_logits must be \[B, N, h, w\]"),
        (dict(class_probs=torch.zeros(2, 4, 3)), "must agree in B and N"),
        (dict(class_probs=torch.zeros(2, 3, 5, dtype=torch.float64)), "float64 goes with float64"),
        (dict(class_probs=torch.zeros(2, 3, 0)), "no dimension may be zero"),
        (dict(size=(0, 4)), r"size must be \(height, width\)"),
        (dict(size=4.5), "size must be"),
        (dict(output="logits"), 'output must be "labels" or "scores"'),
        (dict(output="scores", confidence=True), "dtype and confidence go with"),
        (dict(prune=-0.1), "prune must be a number of at least 0"),
        (dict(prune=float("nan")), "prune must be a number of at least 0, got nan"),
        (dict(prune=True), "prune must be"),
        (
            dict(
                output="scores",
                out=torch.zeros(1, 5, 8, 8).expand(2, -1, -1, -1),
                counts=torch.zeros(8, 8),
                window=(0, 0),
            ),
            "out is expanded",
        ),
        (
            dict(
                output="scores",
                out=torch.zeros(2, 5, 8, 8, requires_grad=True),
                counts=torch.zeros(8, 8),
                window=(0, 0),
            ),
            "out requires a gradient",
        ),
        (dict(extent=(5, 2)), "extent must be"),
        (dict(class_probs=torch.zeros(2, 3, 5, requires_grad=True)), "has no gradient"),
        (dict(mask_logits=torch.full((2, 3, 4, 4), float("nan"))), "mask_logits contain NaN"),
        (dict(out=torch.zeros(2, 5, 8, 8)), "out, counts and window go together"),
        (
            dict(output="scores", out=torch.zeros(2, 5, 8, 8), counts=torch.zeros(8, 8), window=(1, 0)),
            r"the window at \(1, 0\) of size \(8, 8\) leaves the canvas",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(change, message):
    arguments = dict(mask_logits=torch.zeros(2, 3, 4, 4), class_probs=torch.zeros(2, 3, 5), size=(8, 8)) | change
    with pytest.raises(ValueError, match=message):
        mask_decode(**arguments)


def test_the_reference_is_the_formula():
    logits, probs = inputs((1, 3, 2, 2), 2)
    torch.testing.assert_close(reference.mask_decode(logits, probs, (5, 6), "scores"), naive(logits, probs, (5, 6)))
