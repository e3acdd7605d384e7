import copy
import time

import pytest
import torch
from PIL import Image

import segvit
from segvit.data import Shapes
from segvit.data.stream import Stream
from segvit.demo import run_demo, small_model
from segvit.metrics import Scores
from segvit.training import fit, polynomial


class Cropped(Shapes):
    """Shapes as a model takes them."""

    def __getitem__(self, i):
        image, labels = super().__getitem__(i)
        return image.float() / 127.5 - 1, labels


def model(**kwargs):
    kwargs = {
        "dropout": 0.0,
        "drop_path": 0.0,
        "backbone_kwargs": {"depth": 3, "embed_dim": 32, "num_heads": 2},
    } | kwargs
    return segvit.SegViT("vit_tiny_patch16_224", 6, 32, decoder_layers=1, **kwargs)


def test_schedule_warms_up_and_decays():
    factor = polynomial(100, warmup=10)
    assert factor(0) == pytest.approx(1 / 11)
    assert factor(9) == pytest.approx(10 / 11)
    assert factor(10) == 1
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == 0
    assert polynomial(100, power=2.0)(50) == pytest.approx(0.25)


def test_loss_falls_and_the_run_repeats_bit_for_bit():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        m = model()
        runs.append(fit(m, segvit.ATMLoss(6), Cropped(64, 32), steps=30, batch_size=8, lr=1e-3, decoder_lr=1.0))
    first, again = ([r["loss"] for r in records] for records in runs)
    assert first == again
    assert [r["step"] for r in runs[0]] == [10, 20, 30]
    assert first[-1] < 0.9 * first[0]


@pytest.mark.parametrize("bad_step", [3, 10])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_what_it_saw(bad_step):
    class Poisoned(Cropped):
        pairs = [(f"image_{i}.png", f"label_{i}.png") for i in range(64)]  # noqa: RUF012

        def __getitem__(self, i):
            image, labels = super().__getitem__(i)
            return (image * float("nan") if i == bad else image), labels

    data = Poisoned(64, 32)
    order = Stream(data, 2, 0, 0, 1)
    seen = [order.index(position) for position in order.positions(bad_step)]
    bad = seen[1]
    names = ", ".join(f"image_{i}.png" for i in sorted(seen))
    with pytest.raises(
        FloatingPointError, match=f"is nan since step {bad_step}; lower the learning rate, .*: {names}$"
    ):
        fit(model(), segvit.ATMLoss(6), data, steps=20, batch_size=2)


def test_gradients_that_are_not_finite_stop_the_run_too():
    m = model()
    m.decoder.class_embed.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"the (gradients are not finite|loss is nan) since step 1; .*: sample"
    ):
        fit(m, segvit.ATMLoss(6), Cropped(16, 32), steps=20, batch_size=2)


def test_weights_that_are_not_finite_are_not_kept():
    class Ruining(segvit.ATMLoss):
        def forward(self, out, labels):
            m.decoder.class_embed.bias.data[0] = float("inf")  # after the forward pass, so that this loss is still good
            return super().forward(out, labels)

    saved, m = [], model()
    with pytest.raises(FloatingPointError, match="the weights are no longer finite at step 1; lower the learning rate"):
        fit(
            m, Ruining(6), Cropped(16, 32), steps=1, batch_size=2, checkpoint=lambda state, weights: saved.append(state)
        )
    assert not saved


def test_fewer_samples_than_a_batch_still_train():
    records = fit(model(), segvit.ATMLoss(6), Cropped(3, 32), steps=4, batch_size=8)
    assert records[-1]["step"] == 4


def test_training_that_goes_on_repeats_the_run_that_never_stopped(tmp_path):
    """Bit for bit, with dropout, drop path and augmentation."""
    saved = {}

    def keep(state, weights):
        saved[state["step"]] = copy.deepcopy((weights, state))

    def train(**kwargs):
        return fit(m, segvit.ATMLoss(6), data, steps=12, batch_size=4, lr=1e-3, validate_every=6, **kwargs)

    data = Cropped(20, 32)
    torch.manual_seed(0)
    m = model(dropout=0.1, drop_path=0.2)
    records = train(checkpoint=keep)
    want = m.state_dict()
    assert set(saved) == {6, 12}
    m = model(dropout=0.1, drop_path=0.2)
    weights, state = saved[6]
    m.load_state_dict(weights)
    again = train(state=state)
    assert [r["loss"] for r in again] == [r["loss"] for r in records]  # the record at the checkpoint is repeated
    assert all(torch.equal(value, want[name]) for name, value in m.state_dict().items())


def test_stopping_keeps_a_checkpoint(tmp_path):
    saved, asked = [], iter([False, False, True])
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        fit(
            model(),
            segvit.ATMLoss(6),
            Cropped(16, 32),
            steps=12,
            batch_size=2,
            checkpoint=lambda state, weights: saved.append(state),
            stopped=lambda: next(asked),
        )
    assert [state["step"] for state in saved] == [3]


def test_the_demo_writes_its_picture_and_model(tmp_path):
    scores, picture = run_demo(tmp_path / "demo", steps=2)
    assert 0 <= scores.miou <= 1
    assert Image.open(picture).width > 3 * 96
    assert segvit.SegViT.from_pretrained(tmp_path / "demo" / "model").class_names == list(Shapes.classes)
    assert sum(p.numel() for p in small_model().parameters()) < 1.1e6


def test_edge_logits_of_parts_add_up():
    """Parts with different numbers of patches that count; one without any label, one with half of them."""

    class Uneven(Cropped):
        def __getitem__(self, i):
            image, labels = super().__getitem__(i)
            labels[: (0, 32, 16)[i % 3]] = 255
            return image.double(), labels

    runs = []
    for micro_batch in (None, 1, 4):
        torch.manual_seed(0)
        m = model(shrink="edge").double()
        loss = segvit.ATMLoss(6).double()
        records = fit(m, loss, Uneven(18, 32), steps=3, batch_size=6, micro_batch=micro_batch, validate_every=1)
        runs.append(([(r["loss"], r["edge"], r["ce"]) for r in records], m.state_dict()))
    for records, weights in runs[1:]:
        torch.testing.assert_close(torch.tensor(records), torch.tensor(runs[0][0]))
        for name, value in weights.items():
            torch.testing.assert_close(value, runs[0][1][name], rtol=1e-9, atol=1e-9)


def test_the_average_of_the_weights_is_what_is_validated():
    m, raw, seen, saved = model(), [], [], []
    start = {name: p.detach().clone() for name, p in m.named_parameters()}

    def validate(step, evaluated):
        assert evaluated is not m
        raw.append({name: p.detach().clone() for name, p in m.named_parameters()})
        seen.append({name: p.detach().clone() for name, p in evaluated.named_parameters()})
        return Scores(*(0.5, 0.5, 0.5, [], [], []))

    keep = {"checkpoint": lambda state, weights: saved.append(copy.deepcopy((state["ema"], weights)))}
    recipe = {"steps": 20, "batch_size": 2, "lr": 1e-3, "ema": 0.6, "validate_every": 1}
    fit(m, segvit.ATMLoss(6), Cropped(8, 32), **recipe, validate=validate, **keep)
    for step, (now, average) in enumerate(zip(raw, seen), 1):
        decay = min(0.6, (1 + step) / (10 + step))
        for name in start:
            start[name] = decay * start[name] + (1 - decay) * now[name]
            torch.testing.assert_close(average[name], start[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, seen[-1][name]) for name, value in saved[-1][0].items())
    assert all(torch.equal(value, saved[-1][1][name]) for name, value in raw[-1].items())


def test_a_scale_of_fp16_that_vanishes_stops_the_run(monkeypatch):
    """A scaler skips steps whose gradients are infinite, so nothing else would say that nothing is learnt."""

    class Scaler:
        def get_scale(self):
            return 0.5

        def state_dict(self):
            return {}

    monkeypatch.setattr("segvit.training._Optimization.scaler", Scaler())
    with pytest.raises(FloatingPointError, match="no scale of fp16 is small enough for finite gradients"):
        fit(model(), segvit.ATMLoss(6), Cropped(16, 32), steps=10, batch_size=2)


@pytest.mark.parametrize("compile", ["model", "step"])
def test_compiled_training_is_the_same_training(compile):
    losses = []
    for how in ("no", compile):
        torch._dynamo.reset()
        torch.manual_seed(0)
        records = fit(model(), segvit.ATMLoss(6), Cropped(16, 32), steps=4, batch_size=4, compile=how, validate_every=1)
        losses.append([r["loss"] for r in records])
    assert len(losses[1]) == 4
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-4)


def test_a_compiled_step_is_what_runs_and_tells_of_infinite_gradients(monkeypatch):
    steps, call = [], segvit.step._Step.__call__
    monkeypatch.setattr(segvit.step._Step, "__call__", lambda self, *a: (steps.append(1), call(self, *a))[1])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    fit(model(), segvit.ATMLoss(6), Cropped(16, 32), steps=3, batch_size=2, compile="step")
    assert len(steps) == 3
    m = model()
    m.decoder.class_embed.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="since step 1"):
        fit(m, segvit.ATMLoss(6), Cropped(16, 32), steps=3, batch_size=2, compile="step")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "everything"}, "compile must be one of no, model, step, got 'everything'"),
        ({"compile": "step", "micro_batch": 1}, "compile=step does not go with micro batches; compile=model does"),
        ({"fsdp": True}, "fsdp spreads a model over processes, and there is one; start several with torchrun"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        fit(model(), segvit.ATMLoss(6), Cropped(16, 32), steps=1, batch_size=2, **options)


def test_time_that_is_spent_waiting_for_data_is_told():
    class Slow(Cropped):
        def __getitem__(self, i):
            time.sleep(0.1)
            return super().__getitem__(i)

    shares = []
    for data in (Slow(16, 32), Cropped(16, 32)):
        records = fit(model(), segvit.ATMLoss(6), data, steps=20, batch_size=2)
        assert all(0 <= r["waiting"] <= 1 for r in records)
        shares.append(records[-1]["waiting"])
    assert shares[0] > 0.5  # two tenths of a second a step
    assert shares[1] < shares[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_survives_masks_as_large_as_trained_ones(dtype, tolerance):
    """Mask logits of official checkpoints reach 164. A scaler halves its factor until all gradients are finite."""
    m, loss = model(), segvit.ATMLoss(6)
    with torch.no_grad():
        for stage in m.decoder.stages:
            stage.kv.weight *= 7
            stage.layers[-1].q.weight *= 7
    images, labels = (torch.stack(t) for t in zip(*(Cropped(4, 32)[i] for i in range(4))))

    def gradients(dtype, scale):
        m.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = m(images)
        terms = loss(out, labels)
        (terms.total * scale).backward()
        return terms.total.item(), out.mask_logits, torch.cat([p.grad.flatten() for p in m.parameters()]) / scale

    total, masks, _ = gradients(torch.float32, 1.0)
    assert masks.abs().max() > 164
    scale = 2.0**16  # where scalers begin
    while not (found := gradients(dtype, scale))[2].isfinite().all():
        scale /= 2
    assert scale >= 16
    assert found[0] == pytest.approx(total, rel=tolerance)


@pytest.mark.gpu
def test_a_training_step_on_a_gpu_never_waits_for_the_host():
    m, loss = model().cuda(), segvit.ATMLoss(6).cuda()
    optimizer = torch.optim.AdamW(m.parameters(), fused=True)
    images = torch.randn(2, 3, 32, 32, device="cuda")
    labels = torch.randint(0, 6, (2, 32, 32), device="cuda")
    for i in range(3):
        if i:  # the first step allocates and initialises
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss(m(images), labels).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
