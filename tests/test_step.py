import copy

import pytest
import torch
from torch import nn

import segvit
from segvit import step as step_module


def tiny(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    kwargs = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    return segvit.SegViT(
        "vit_tiny_patch16_224", 3, 32, dropout=dropout, drop_path=dropout, decoder_layers=1, backbone_kwargs=kwargs
    )


def batch(size=32, device="cpu"):
    labels = torch.randint(0, 3, (2, size, size), device=device)
    labels[:, :4] = 255
    return torch.randn(2, 3, size, size, device=device), labels


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(model.parameter_groups(lr=lr))


def eager_step(model, loss, optimizer, images, labels, clip=35.0):
    terms = loss(model(images), labels)
    terms.total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return terms


def same(a, b, tolerance=1e-5):
    for one, other in zip(a, b):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def check_equal_to_eager(make, device, change=None):
    """Several steps of two sizes and of changing learning rates, beside the same steps in plain PyTorch."""
    ours, plain = tiny().to(device), tiny().to(device)
    optimizers, loss = (adamw(ours), adamw(plain)), segvit.ATMLoss(3).to(device)
    step = make(ours, loss, optimizers[0])
    if change:
        change(optimizers[0])
    for i, size in enumerate([32, 32, 32, 32, 48, 48, 48, 48, 32, 48]):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (i + 1)
        images, labels = batch(size, device)
        want = eager_step(plain, loss, optimizers[1], images, labels)
        same(step(images, labels), want, 1e-4)
    images = batch(32, device)[0]  # and not weights: Adam makes whole steps of rounding where a gradient is zero
    same(ours(images)[:2], plain(images)[:2], 1e-3)
    return step


@pytest.fixture
def replays(monkeypatch):
    """CUDA graphs on a CPU: what is captured runs when it is replayed. Counts captures and replays."""
    counts = {"captured": 0, "replayed": 0}

    def capture(call, pool, device):
        counts["captured"] += 1
        packed = torch.zeros(1 + 3 * 3 + 1)

        def replay():
            counts["replayed"] += 1
            packed.copy_(call())

        return replay, packed, pool

    monkeypatch.setattr(step_module, "_capture", capture)
    monkeypatch.setattr(step_module, "_side_stream", lambda device: None)
    monkeypatch.setattr(step_module, "_check_graph", lambda device, optimizer: None)
    return counts


def not_capturable(optimizer):
    for group in optimizer.param_groups:  # which AdamW refuses on a CPU
        group["capturable"] = False


def test_without_a_graph_equals_the_eager_step():
    torch._dynamo.reset()
    check_equal_to_eager(lambda *parts: segvit.compiled_step(*parts, backend="aot_eager"), "cpu")


def test_every_shape_is_captured_once_and_equals_the_eager_step(replays):
    step = check_equal_to_eager(
        lambda *parts: segvit.compiled_step(*parts, graph=True, compiled=False), "cpu", not_capturable
    )
    assert replays == {"captured": 2, "replayed": 6}  # of ten steps, two of each size ran as they are
    state = copy.deepcopy(step.optimizer.state_dict())
    changes = (
        lambda: step.model.backbone.eval(),
        lambda: step.optimizer.param_groups[0].update(weight_decay=0.5),
        lambda: step.model.backbone.requires_grad_(False),
        lambda: setattr(step.loss, "focal_weight", 1.0),
        lambda: (step.optimizer.load_state_dict(state), not_capturable(step.optimizer)),
    )
    for i, change in enumerate(changes, 3):
        change()
        for _ in range(4):
            step(*batch())
        assert replays["captured"] == i


def test_what_always_changes_is_never_captured_and_says_so(replays):
    model = tiny()
    optimizer = adamw(model)
    step = segvit.compiled_step(model, segvit.ATMLoss(3), optimizer, graph=True, compiled=False)
    not_capturable(optimizer)
    images = batch(16)

    def another_step(i):
        optimizer.param_groups[0]["betas"] = (0.9 - i / 1000, 0.999)
        step(*images)

    for i in range(step_module.KEPT):
        another_step(i)
    with pytest.warns(UserWarning, match="does a scheduler change more than the learning rate"):
        another_step(step_module.KEPT)
    assert replays["captured"] == 0
    assert len(step.graphs) == step_module.KEPT


def test_more_shapes_than_dynamo_recompiles_for():
    torch._dynamo.reset()
    model = tiny()
    step = segvit.compiled_step(model, segvit.ATMLoss(3), adamw(model), backend="eager")
    for size in range(16, 16 * 11, 16):
        assert step(*batch(size)).total.isfinite()


def test_results_are_not_overwritten_by_the_next_step(replays):
    model = tiny()
    optimizer = adamw(model)
    step = segvit.compiled_step(model, segvit.ATMLoss(3), optimizer, graph=True, compiled=False)
    not_capturable(optimizer)
    results = [step(*batch()).total for _ in range(5)]
    assert len({value.item() for value in results}) == 5


def test_training_may_go_on_from_eager_steps():
    torch._dynamo.reset()
    model, images = tiny(), batch()
    optimizer, loss = adamw(model), segvit.ATMLoss(3)
    eager_step(model, loss, optimizer, *images)
    other = copy.deepcopy(model)
    others = adamw(other)
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step = segvit.compiled_step(model, loss, optimizer, backend="aot_eager", clip=0.1)
    same(step(*images), eager_step(other, loss, others, *images, clip=0.1))
    same(model(images[0])[:2], other(images[0])[:2])


def test_what_cannot_be_captured_is_refused_with_its_reason():
    model, loss = tiny(), segvit.ATMLoss(3)
    with pytest.raises(RuntimeError, match=r"no CUDA graph can be captured: the model is on cpu.*graph=False compiles"):
        segvit.compiled_step(model, loss, adamw(model), graph=True)
    with pytest.raises(ValueError, match="neither graph nor compiled"):
        segvit.compiled_step(model, loss, adamw(model), graph=False, compiled=False)
    with pytest.raises(ValueError, match="a loss with debug=True looks at labels on the host"):
        segvit.compiled_step(model, segvit.ATMLoss(3, debug=True), adamw(model))
    with pytest.raises(ValueError, match=r"autocast must be torch\.bfloat16 or None, got torch\.float16"):
        segvit.compiled_step(model, loss, adamw(model), autocast=torch.float16)


def test_a_capture_that_fails_says_why(replays, monkeypatch):
    def fails(call, pool, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(step_module, "_capture", fails)
    model = tiny()
    optimizer = adamw(model)
    step = segvit.compiled_step(model, segvit.ATMLoss(3), optimizer, graph=True, compiled=False)
    not_capturable(optimizer)
    step(*batch())
    step(*batch())
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph: operation not permitted when stream"):
        step(*batch())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_equals_the_eager_step(compiled):
    torch._dynamo.reset()
    step = check_equal_to_eager(lambda *parts: segvit.compiled_step(*parts, compiled=compiled), "cuda")
    assert sum(not isinstance(found, int) for found in step.graphs.values()) == 2


@pytest.mark.gpu
def test_replays_draw_fresh_numbers():
    model = tiny(dropout=0.5).cuda().train()
    step = segvit.compiled_step(model, segvit.ATMLoss(3), adamw(model, lr=0.0), compiled=False)
    images, labels = batch(device="cuda")
    totals = [step(images, labels).total.item() for _ in range(8)]
    assert len(set(totals)) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_step_never_waits_for_the_device(graph):
    torch._dynamo.reset()
    model = tiny(dropout=0.1).cuda().train()
    options = dict(graph=graph, compiled=True, autocast=torch.bfloat16)
    step = segvit.compiled_step(model, segvit.ATMLoss(3), adamw(model), **options)
    images, labels = batch(device="cuda")
    for _ in range(4):
        step(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(images, labels)
        eager_step(model, step.loss, step.optimizer, images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_optimizer_without_capturable_is_refused():
    model = tiny().cuda()
    with pytest.raises(RuntimeError, match="SGD has no option `capturable`"):
        segvit.compiled_step(model, segvit.ATMLoss(3), torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_step_returns_the_edge_term_of_an_edge_aware_model():
    kwargs = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    model = segvit.SegViT("vit_tiny_patch16_224", 3, 64, shrink="edge", decoder_layers=1, backbone_kwargs=kwargs)
    model, loss = model.eval(), segvit.ATMLoss(3)  # without dropout
    images, labels = batch(64)
    want = loss(model(images), labels)
    got = segvit.compiled_step(model, loss, adamw(model), backend="eager")(images, labels)
    assert len(got.ce) == len(got.focal) == len(got.dice) == 2
    same(got, want)
    assert got.edge > 0
