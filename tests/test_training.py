import copy

import pytest
import torch
from PIL import Image

import segvit
from segvit.data import Shapes
from segvit.data.stream import Stream
from segvit.demo import run_demo, small_model
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
