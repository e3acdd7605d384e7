"""The library paths on CUDA tensors against the same on the CPU. (Kernels have their own tests, per operator.)"""

import pytest
import torch
from test_training import Cropped, model

import segvit
from segvit.metrics import BoundaryIoU, ConfusionMatrix
from segvit.ops import mask_decode, mask_loss, token_downsample
from segvit.precision import in_precision
from segvit.training import fit

pytestmark = pytest.mark.gpu


def both(call, *tensors):
    """The call's results and gradients on the CPU in float64, and on the GPU in float32."""
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        moved = [
            t.detach().to(device, dtype).requires_grad_() if t.is_floating_point() and t.dim() else t.to(device)
            for t in tensors
        ]
        out = call(*moved)
        leaves = [t for t in moved if t.requires_grad]
        grads = torch.autograd.grad(sum(t.square().sum() for t in out), leaves)
        results.append([t.double().cpu() for t in (*out, *grads)])
    return zip(*results)


@pytest.mark.parametrize("ignored", ["masked", "negative"])
def test_mask_loss(ignored):
    logits, labels = torch.randn(2, 3, 5, 9, 7) * 5, torch.randint(0, 4, (3, 100, 90))
    labels[0, :30] = 255
    present = torch.stack([(labels == n).flatten(1).any(1) for n in range(5)], 1)
    call = lambda x, *rest: mask_loss(x, *rest, ignored=ignored)  # noqa: E731
    for want, got in both(call, logits, labels, present, present.sum()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_mask_decode():
    logits, probs = torch.randn(2, 19, 16, 16) * 5, torch.randn(2, 19, 20).softmax(-1)[..., :-1]
    exact = mask_decode(logits.double(), probs.double(), (200, 170), "scores")
    scores = mask_decode(logits.cuda(), probs.cuda(), (200, 170), "scores").cpu()
    torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=1e-4)
    top = exact.topk(2, 1)
    clear = top.values[:, 0] - top.values[:, 1] > 1e-3
    labels = mask_decode(logits.cuda(), probs.cuda(), (200, 170)).cpu().long()
    assert torch.equal(labels[clear], top.indices[:, 0][clear])


@pytest.mark.parametrize("keep", [2, torch.tensor([[0, 3, 3], [1, 2, 34]])], ids=["stride", "index"])
def test_token_downsample(keep):
    kept = lambda x: keep if isinstance(keep, int) else keep.to(x.device)  # noqa: E731
    call = lambda x, w, b: token_downsample(x, w, b, 1e-6, (5, 7), kept(x))  # noqa: E731
    for want, got in both(call, torch.randn(2, 36, 24), torch.randn(24), torch.randn(24)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shrink", [None, "v1", "light", "edge"])
@pytest.mark.parametrize("compiled", [False, True])
def test_model_loss_and_prediction(shrink, compiled):
    kwargs = {"depth": 6, "embed_dim": 64, "num_heads": 2}
    model = segvit.SegViT("vit_tiny_patch16_224", 5, 64, shrink=shrink, dropout=0, drop_path=0, backbone_kwargs=kwargs)
    images, labels = torch.randn(2, 3, 60, 50), torch.randint(0, 5, (2, 60, 50))
    loss = segvit.ATMLoss(5)
    want = loss(model(images), labels).total.item()
    scores = segvit.predict(model, images, output="scores")
    model, loss = model.cuda(), loss.cuda()
    step = lambda x, y: loss(model(x), y).total  # noqa: E731
    step = torch.compile(step, fullgraph=True) if compiled else step
    total = step(images.cuda(), labels.cuda())
    assert total.item() == pytest.approx(want, rel=1e-3)
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(
        segvit.predict(model, images.cuda(), output="scores").cpu(), scores, rtol=1e-2, atol=1e-3
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert loss(model(images.cuda()), labels.cuda()).total.item() == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("half", [False, True])
def test_prediction_never_waits_and_can_be_captured(half):
    kwargs = {"depth": 3, "embed_dim": 64, "num_heads": 2}
    model = segvit.SegViT("vit_tiny_patch16_224", 70, 64, backbone_kwargs=kwargs).eval().cuda()
    images = torch.randn(2, 3, 64, 96, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
        call = lambda: segvit.predict(model, images, prune=1e-6)  # noqa: E731
        want = call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
    graph.replay()
    assert torch.equal(again, want)
    assert torch.equal(captured, want)


def test_scores_of_a_data_set_stay_on_the_device():
    truth = torch.randint(0, 5, (2, 60, 50), device="cuda")
    predicted = truth.roll(3, 1).to(torch.uint8)
    predicted[0, :5] = 255  # no class: an error
    matrix, edges = ConfusionMatrix(5, device="cuda"), BoundaryIoU(5, device="cuda")
    for counter in (matrix, edges):
        counter.update(predicted, truth)  # warm
    torch.cuda.set_sync_debug_mode("error")
    try:
        for counter in (matrix, edges):
            counter.update(predicted, truth)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert matrix.counts.sum() == 2 * truth.numel()
    assert matrix.compute().aacc == pytest.approx((predicted == truth).double().mean().item())
    cpu = BoundaryIoU(5)
    cpu.update(predicted.cpu(), truth.cpu())
    assert edges.compute() == pytest.approx(cpu.compute())


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16"},
        {"precision": "bf16", "compile": "step"},
        {"precision": "bf16", "compile": "model", "micro_batch": 2, "ema": 0.9},
    ],
    ids=["fp16 with a scaler", "captured step", "compiled model"],
)
def test_a_training_goes_on_where_it_was(options):
    """Losses fall, and six steps are three and three more, as closely as the GPU's own sums repeat."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    runs = []
    for stops in ((6,), (3, 6)):
        torch.manual_seed(0)
        m, state, losses = model(), None, []
        for steps in stops:
            AcceleratorState._reset_state()
            accelerator, saved = Accelerator(mixed_precision=options["precision"]), []
            recipe = {"steps": 6, "batch_size": 4, "lr": 1e-3, "validate_every": 1, "accelerator": accelerator}
            recipe |= {name: value for name, value in options.items() if name != "precision"}
            asked = iter([False] * (steps - len(losses) - 1) + [steps < 6])
            try:
                losses += [
                    r["loss"]
                    for r in fit(
                        m,
                        segvit.ATMLoss(6),
                        Cropped(24, 32),
                        **recipe,
                        state=state,
                        checkpoint=lambda training, weights, kept=saved: kept.append(training),
                        stopped=lambda left=asked: next(left),
                    )
                ]
            except KeyboardInterrupt:
                state = saved[-1]
        runs.append(losses)
    assert runs[0][-1] < runs[0][0]
    torch.testing.assert_close(runs[1][-3:], runs[0][-3:], rtol=0.02, atol=0.02)


def test_added_classes_leave_old_ones_as_they_are():
    old = model().cuda().eval()
    new = segvit.add_classes(old, ["cup"]).cuda()
    images, labels = torch.randn(2, 3, 96, 96, device="cuda"), torch.full((2, 96, 96), new.num_classes - 1).cuda()
    loss = segvit.ATMLoss(new.num_classes, learned=new.learned_classes).cuda()
    step = segvit.compiled_step(new, loss, torch.optim.AdamW(new.parameter_groups(lr=0.01, weight_decay=0.5)))
    for _ in range(4):
        step(images, labels)
    K = old.num_classes
    with torch.no_grad():
        before, after = old(images), new.eval()(images)
    assert torch.equal(before.mask_logits, after.mask_logits[:, :, :K])
    assert torch.equal(before.class_logits[..., :K], after.class_logits[:, :, :K, :K])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_explanations(precision):
    network = in_precision(model().cuda().eval(), precision)
    image = torch.randint(0, 256, (3, 80, 90), dtype=torch.uint8)
    explanation = segvit.explain(network, image)
    assert torch.equal(explanation.labels, segvit.predict(network, image)[0].cpu())
    scores = segvit.predict(network, image, output="scores")[0].float().cpu()
    assert torch.allclose(explanation.scores((80, 90)), scores, atol=1e-2 if precision != "no" else 1e-4)
    assert explanation.picture(point=(3, 4)).size[0] > 0
