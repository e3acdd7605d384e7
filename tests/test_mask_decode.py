import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.library import opcheck

from segvit.ops import mask_decode, reference

SIZES = [
    ((2, 5, 4, 6), 3, (37, 50)),
    ((1, 1, 1, 1), 1, (3, 2)),
    ((2, 7, 9, 5), 7, (4, 3)),
    ((1, 150, 8, 8), 150, (128, 96)),
]


def inputs(shape, K, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype) * 5, torch.randn(*shape[:2], K + 1, dtype=dtype).softmax(-1)[..., :-1]


def naive(logits, probs, size):
    masks = F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bnk,bnhw->bkhw", probs, masks)


@pytest.mark.parametrize(("shape", "K", "size"), SIZES)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_scores_and_labels_match_the_naive_form(shape, K, size, backend, poisoned):
    logits, probs = inputs(shape, K)
    want = naive(logits, probs, size)
    torch.testing.assert_close(mask_decode(logits, probs, size, "scores", backend=backend), want)
    labels, best = mask_decode(logits, probs, size, confidence=True, backend=backend)
    torch.testing.assert_close(best, want.amax(1))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), want.argmax(1))
    assert torch.equal(mask_decode(logits, probs, size, backend=backend), labels)


@pytest.mark.parametrize(("dtype", "margin"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_labels_equal_float64_wherever_the_margin_is_clear(dtype, margin):
    logits, probs = inputs((2, 19, 16, 16), 19, torch.float32)
    logits, probs = logits.to(dtype), probs.to(dtype)
    top = naive(logits.double(), probs.double(), (128, 128)).topk(2, 1)
    clear = top.values[:, 0] - top.values[:, 1] > margin
    assert clear.double().mean() > 0.9
    labels = mask_decode(logits, probs, (128, 128)).long()
    assert torch.equal(labels[clear], top.indices[:, 0][clear])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_extent_equals_interpolating_the_whole_grid_and_cropping(backend):
    logits, probs = inputs((2, 4, 5, 7), 4)
    whole = naive(logits, probs, (80, 112))  # a 75×107 image padded to 80×112, patch 16
    got = mask_decode(logits, probs, (75, 107), "scores", extent=(75 / 16, 107 / 16), backend=backend)
    torch.testing.assert_close(got, whole[:, :, :75, :107])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_pruning_stays_within_its_bound(backend):
    logits, probs = inputs((2, 30, 6, 6), 30)
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


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_pruning_every_query_gives_zero_scores(backend):
    logits, probs = inputs((1, 3, 2, 2), 3)
    assert mask_decode(logits, probs, (5, 4), "scores", prune=1.1, backend=backend).abs().max() == 0


@pytest.mark.parametrize("backend", ["tiled", "reference"])
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


def test_label_dtypes():
    logits, probs = inputs((1, 2, 2, 2), 300, torch.float32)
    assert mask_decode(logits, probs, (4, 4)).dtype == torch.int16
    assert mask_decode(logits, probs, (4, 4), dtype=torch.int64).dtype == torch.int64
    with pytest.raises(ValueError, match="dtype must be an integer type that holds 300 classes"):
        mask_decode(logits, probs, (4, 4), dtype=torch.uint8)


def test_opcheck_and_compile():
    logits, probs = inputs((2, 4, 5, 7), 3, torch.float32)
    tail = (0.0, 5.0, 7.0, "tiled")
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
