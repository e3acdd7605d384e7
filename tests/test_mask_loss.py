import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import kernel
from torch.library import opcheck

from segvit.ops import mask_loss, reference
from segvit.ops._dispatch import NATIVE_MISSING

BACKENDS = ["tiled", "reference"]  # of float64; the C++ and Triton kernels take float32


@pytest.fixture(params=["native", "tiled"])
def float32_backend(request):
    if request.param == "native" and NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    return request.param


def case(S=2, B=3, N=4, grid=(5, 7), size=(37, 50), dtype=torch.float64, scale=3.0):
    """Random masks and labels: image 0 with ignored pixels, the last image all ignored; class N−1 is absent."""
    logits = (torch.randn(S, B, N, *grid, dtype=dtype) * scale).requires_grad_()
    labels = torch.randint(0, max(N - 1, 1), (B, *size))
    labels[0, : size[0] // 2] = 255
    if B > 1:
        labels[-1] = 255
    present = torch.stack([(labels == n).flatten(1).any(1) for n in range(N)], 1)
    return logits, labels, present, present.sum().clamp(min=1).to(dtype)


def naive(logits, labels, present, num_masks, ignored="masked"):
    """One mask at a time, as the text says it; torch's own interpolation."""
    focal, dice = [], []
    for stage in logits:
        terms = [torch.zeros((), dtype=stage.dtype)] * 2
        x = F.interpolate(stage, labels.shape[1:], mode="bilinear", align_corners=False)
        for b, n in present.nonzero().tolist():
            use = (labels[b] != 255) if ignored == "masked" else torch.ones_like(labels[b], dtype=torch.bool)
            xp, tp = x[b, n][use], (labels[b] == n)[use].to(stage.dtype)
            p = xp.sigmoid()
            p_t = p * tp + (1 - p) * (1 - tp)
            alpha_t = 0.25 * tp + 0.75 * (1 - tp)
            bce = F.binary_cross_entropy_with_logits(xp, tp, reduction="none")
            terms[0] = terms[0] + (alpha_t * (1 - p_t) ** 2 * bce).mean()
            terms[1] = terms[1] + 1 - (2 * (p * tp).sum() + 1) / (p.sum() + tp.sum() + 1)
        focal.append(terms[0] / num_masks)
        dice.append(terms[1] / num_masks)
    return torch.stack(focal), torch.stack(dice)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", ["masked", "negative"])
@pytest.mark.parametrize(
    "sizes", [((5, 7), (37, 50)), ((8, 8), (64, 64)), ((9, 6), (4, 3)), ((1, 1), (5, 2)), ((6, 6), (6, 6))]
)
def test_values_and_gradients_match_the_naive_form(backend, ignored, sizes):
    logits, labels, present, num = case(grid=sizes[0], size=sizes[1])
    got = mask_loss(logits, labels, present, num, ignored=ignored, backend=backend)
    want = naive(logits, labels, present, num, ignored)
    upstream = [torch.rand_like(t) for t in want]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    a, b = (torch.autograd.grad(x, logits, upstream)[0] for x in (got, want))
    torch.testing.assert_close(a, b)
    assert b.abs().sum() > 0


@pytest.mark.parametrize("ignored", ["masked", "negative"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, ignored):
    logits, labels, present, num = case(1, 2, 3, (2, 3), (7, 5))
    options = dict(ignored=ignored, backend=backend)
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, labels, present, num, **options), (logits,))
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, labels, present, num, gamma=1.5, **options), (logits,))


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        logits, labels, present, num = case(2, 2, 3, (4, 4), (9, 11), dtype)
        backend = "native" if dtype == torch.float32 and NATIVE_MISSING is None else "tiled"
        options = (255, True, 0.25, 2.0, 4.0, 4.0, backend)
        opcheck(torch.ops.segvit.mask_loss.default, (logits, labels, present, num, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_any_integer_labels(backend, dtype):
    logits, labels, present, num = case()
    ignore = 100 if dtype == torch.int8 else 255
    labels = labels.where(labels != 255, ignore)
    want = mask_loss(logits, labels, present, num, ignore_index=ignore, backend="reference")
    got = mask_loss(logits, labels.to(dtype), present, num, ignore_index=ignore, backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_outside_the_classes_count_as_ignored(backend):
    logits, labels, present, num = case()
    strange = labels.where(labels != 255, -7)
    want = mask_loss(logits, labels, present, num, backend=backend)
    torch.testing.assert_close(mask_loss(logits, strange, present, num, backend=backend), want)
    strange = labels.where(labels != 255, 4)  # N = 4
    torch.testing.assert_close(mask_loss(logits, strange, present, num, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_may_be_a_class_number(backend):
    """reduce-zero data sets ignore label 0: it is neither target nor negative."""
    logits, labels, _, _ = case()
    present = torch.stack([(labels == n).flatten(1).any(1) for n in range(4)], 1)
    present[:, 0] = False
    num = present.sum().to(torch.float64)
    got = mask_loss(logits, labels.where(labels != 255, 0), present, num, ignore_index=0, backend=backend)
    want = naive(logits, labels.where(labels != 0, 255), present, num)
    torch.testing.assert_close(got, want)


def test_nothing_present_in_float32(float32_backend, poisoned):
    logits, labels, present, _ = case(dtype=torch.float32)
    nothing = torch.full_like(labels, 255), torch.zeros_like(present), torch.ones(())
    focal, dice = mask_loss(logits, *nothing, backend=float32_backend)
    assert torch.equal(focal + dice, torch.zeros(2))
    (focal.sum() + dice.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", ["masked", "negative"])
def test_nothing_present_gives_zero_losses_and_zero_finite_gradients(backend, ignored, poisoned):
    logits, labels, present, _ = case()
    labels.fill_(255)
    present.fill_(False)
    focal, dice = mask_loss(logits, labels, present, torch.ones(()), ignored=ignored, backend=backend)
    assert torch.equal(focal + dice, torch.zeros(2, dtype=torch.float64))
    (focal.sum() + dice.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


SIZES = [((5, 7), (37, 50)), ((8, 8), (64, 64)), ((9, 6), (4, 3)), ((1, 1), (5, 2)), ((3, 40), (40, 333))]


@pytest.mark.parametrize("ignored", ["masked", "negative"])
@pytest.mark.parametrize("sizes", SIZES)
def test_float32_against_float64(float32_backend, ignored, sizes):
    logits, labels, present, num = case(grid=sizes[0], size=sizes[1])
    low = logits.detach().float().requires_grad_()
    got = mask_loss(low, labels, present, num, ignored=ignored, backend=float32_backend)
    want = naive(logits, labels, present, num, ignored)
    upstream = [torch.rand_like(t) for t in want]
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    a = torch.autograd.grad(got, low, [u.float() for u in upstream])[0]
    b = torch.autograd.grad(want, logits, upstream)[0]
    assert (a.double() - b).norm() <= 1e-6 * b.norm()
    assert torch.equal(a[:, ~present], torch.zeros_like(a[:, ~present]))


@pytest.mark.parametrize("B", [1, 2])
def test_inputs_of_any_strides(float32_backend, B):
    logits, labels, present, num = case(2, B, 4, (5, 7), (64, 32), torch.float32)
    want = torch.autograd.grad(mask_loss(logits, labels, present, num, backend="reference")[0].sum(), logits)[0]
    strided = logits.detach().permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0).requires_grad_()
    turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
    got = mask_loss(strided, turned, present, num.long(), backend=float32_backend)
    grad = torch.autograd.grad(got[0].sum(), strided)[0]
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-8)
    huge = labels + (labels == 1) * 2**32  # 2³² + 1 is no class
    want = mask_loss(logits, labels.where(labels != 1, 255), present, num, backend="reference")
    torch.testing.assert_close(mask_loss(logits, huge, present, num, backend=float32_backend), want)


def test_gamma_of_other_values_takes_the_path_that_knows_it():
    logits, labels, present, num = case(dtype=torch.float32)
    want = mask_loss(logits, labels, present, num, gamma=1.5, backend="reference")
    torch.testing.assert_close(mask_loss(logits, labels, present, num, gamma=1.5), want)
    if NATIVE_MISSING is None:
        with pytest.raises(RuntimeError, match=r"gamma = 2; got torch\.float32 on cpu, gamma = 1\.5"):
            mask_loss(logits, labels, present, num, gamma=1.5, backend="native")


def where():
    return "cuda" if torch.cuda.is_available() else "cpu"


KERNEL_CASES = {  # N, grid, labels, extent
    "up": (4, (2, 3), (21, 50), None),
    "down": (3, (6, 3), (4, 2), None),
    "one": (2, (1, 1), (5, 3), None),
    "extent": (3, (3, 3), (20, 35), (20 / 8, 35 / 12)),
    "large blocks": (3, (2, 1), (50, 20), None),
}


@kernel
@pytest.mark.parametrize("ignored", ["masked", "negative"])
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernel_against_float64(name, ignored, poisoned):
    N, grid, size, extent = KERNEL_CASES[name]
    logits, labels, present, num = case(2, 2, N, grid, size)
    want = mask_loss(logits, labels, present, num, ignored=ignored, extent=extent, backend="reference")
    upstream = [torch.rand_like(t) for t in want]
    low, given = logits.detach().float().to(where()).requires_grad_(), (t.to(where()) for t in (labels, present, num))
    got = mask_loss(low, *given, ignored=ignored, extent=extent, backend="triton")
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-6)
    a = torch.autograd.grad(got, low, [u.float().to(where()) for u in upstream])[0].double().cpu()
    b = torch.autograd.grad(want, logits, upstream)[0]
    assert (a - b).norm() <= 2e-6 * b.norm()
    assert torch.equal(a[:, ~present], torch.zeros_like(a[:, ~present]))


@kernel
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_kernel_at_large_logits_with_strange_labels(dtype):
    logits, labels, present, num = case(2, 2, 3, (2, 2), (12, 9), scale=100.0)
    assert logits.abs().max() > 150
    labels[0, :2] = 7  # neither a class nor ignored
    want = mask_loss(logits, labels, present, num, backend="reference")
    low = logits.detach().float().to(where()).requires_grad_()
    got = mask_loss(low, labels.to(where(), dtype), present.to(where()), num.to(where()), backend="triton")
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)
    a = torch.autograd.grad(sum(t.sum() for t in got), low)[0].double().cpu()
    b = torch.autograd.grad(sum(t.sum() for t in want), logits)[0]
    assert a.isfinite().all()
    assert (a - b).norm() <= 1e-4 * b.norm()


@kernel
def test_kernel_compiles_to_at_most_two_graphs_over_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda *a: mask_loss(*a, backend="triton"), fullgraph=True, backend=counter)
    for B in (1, 2, 3):
        logits, *given = case(2, B, 3, (2, 2), (9, 8), torch.float32)
        arguments = [logits.detach().to(where()).requires_grad_(), *(t.to(where()) for t in given)]
        got = step(*arguments)
        torch.testing.assert_close(got, mask_loss(*arguments, backend="reference"), rtol=1e-4, atol=1e-6)
        got[0].sum().backward()
    assert counter.frame_count <= 2


@kernel
def test_kernel_with_nothing_present():
    logits, labels, present, _ = case(2, 2, 3, (2, 2), (12, 9), torch.float32)
    logits = logits.detach().to(where()).requires_grad_()
    labels, present = torch.full_like(labels, 255).to(where()), torch.zeros_like(present).to(where())
    focal, dice = mask_loss(logits, labels, present, torch.ones((), device=where()), backend="triton")
    assert torch.equal((focal + dice).cpu(), torch.zeros(2))
    (focal.sum() + dice.sum()).backward()
    assert torch.equal(logits.grad.cpu(), torch.zeros(logits.shape))


@pytest.mark.parametrize("backend", ["native", *BACKENDS])
def test_large_logits_stay_finite_and_exact(backend):
    if backend == "native" and NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    logits, labels, present, num = case(scale=100.0)
    assert logits.abs().max() > 200
    low = logits.detach().float().requires_grad_()
    got = mask_loss(low, labels, present, num.float(), backend=backend)
    want = naive(logits, labels, present, num)
    torch.autograd.backward([t.sum() for t in got])
    torch.autograd.backward([t.sum() for t in want])
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low.grad.double(), logits.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extent_equals_losses_on_the_cropped_upsampling(backend):
    logits, labels, present, num = case(grid=(5, 7), size=(75, 107))
    padded = F.interpolate(logits.flatten(0, 1), (80, 112), mode="bilinear").unflatten(0, logits.shape[:2])
    want = mask_loss(padded[..., :75, :107].contiguous(), labels, present, num, backend="reference")
    got = mask_loss(logits, labels, present, num, extent=(75 / 16, 107 / 16), backend=backend)
    torch.testing.assert_close(got, want)


def test_float32_gradients_are_as_exact_as_plain_pytorch_and_bitwise_repeatable():
    logits, labels, present, num = case(2, 3, 5, (16, 16), (128, 96))
    want = torch.autograd.grad(sum(t.sum() for t in naive(logits, labels, present, num)), logits)[0]
    low = logits.detach().float().requires_grad_()
    plain = torch.autograd.grad(sum(t.sum() for t in naive(low, labels, present, num.float())), low)[0]
    ours = [
        torch.autograd.grad(sum(t.sum() for t in mask_loss(low, labels, present, num.float())), low)[0]
        for _ in range(2)
    ]
    assert torch.equal(*ours)
    error, allowed = ((g.double() - want).norm() / want.norm() for g in (ours[0], plain))
    assert error <= 2 * allowed + 1e-7


def test_half_precision_logits_are_summed_in_float32():
    logits, labels, present, num = case(dtype=torch.float32)
    half = logits.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mask_loss(half, labels, present, num)
    torch.testing.assert_close(got, mask_loss(half.detach().float(), labels, present, num))
    got[0].sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_compiles_to_at_most_two_graphs_over_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda *a: mask_loss(*a), fullgraph=True, backend=counter)
    for B in (1, 2, 3, 8):
        arguments = case(B=B, dtype=torch.float32)
        got = step(*arguments)
        torch.testing.assert_close(got, mask_loss(*arguments))
        got[0].sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask_logits=torch.zeros(2, 3, 4, 4)), r"mask_logits must be \[S, B, N, h, w\]"),
        (dict(labels=torch.zeros(3, 8, 8)), "labels must have one of the dtypes"),
        (dict(labels=torch.zeros(2, 8, 8, dtype=torch.long)), r"labels must be \[B, H, W\] with B = 3"),
        (dict(labels=torch.zeros(3, 0, 8, dtype=torch.long)), "no dimension may be zero"),
        (dict(present=torch.ones(3, 5, dtype=torch.bool)), r"present must be \[B, N\] = \(3, 4\)"),
        (dict(present=torch.ones(3, 4)), "present must have one of the dtypes bool"),
        (dict(num_masks=3), "num_masks must be a 0-d tensor"),
        (dict(ignored="zero"), 'ignored must be "masked" or "negative"'),
        (dict(extent=(0, 2)), "extent must be"),
    ],
)
def test_bad_input_gets_one_clear_error(change, message):
    arguments = dict(
        mask_logits=torch.zeros(2, 3, 4, 5, 5),
        labels=torch.zeros(3, 8, 8, dtype=torch.long),
        present=torch.ones(3, 4, dtype=torch.bool),
        num_masks=torch.ones(()),
    )
    with pytest.raises(ValueError, match=message):
        mask_loss(**(arguments | change))


def test_golden_last_mask_at_full_size_with_an_image_all_ignore(golden):
    """F2: stages of different mask sizes, so one call of the operator per stage."""
    data = golden("F2_loss_final_fullsize_allignore_image")
    labels = data["input/label"]
    present = torch.stack([(labels == n).flatten(1).any(1) for n in range(5)], 1)
    for stage, suffix in ((0, "_0"), (1, "_1"), (2, "")):
        masks = data[f"input/masks{stage}"].requires_grad_()
        for backend in BACKENDS:
            focal, dice = mask_loss(
                masks[None], labels, present, present.sum().float(), ignored="negative", backend=backend
            )
            data.check(f"loss/loss_mask{suffix}", 20 * focal[0])
            data.check(f"loss/loss_dice{suffix}", dice[0])
            (grad,) = torch.autograd.grad((20 * focal + dice).sum(), masks)
            data.check(f"grad/masks{stage}", grad)


def test_the_reference_is_the_formula():
    logits, labels, present, num = case()
    torch.testing.assert_close(reference.mask_loss(logits, labels, present, num), naive(logits, labels, present, num))
