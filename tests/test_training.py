import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import segvit
from segvit.data import Shapes
from segvit.demo import run_demo, small_model
from segvit.training import evaluate, fit, polynomial, save_checkpoint, train_folder


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


def test_a_loss_that_is_not_finite_stops_the_run():
    m = model()
    m.decoder.class_embed.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan at step 10; lower the learning rate"):
        fit(m, segvit.ATMLoss(6), Cropped(16, 32), steps=20, batch_size=2)


def test_fewer_samples_than_a_batch_still_train():
    records = fit(model(), segvit.ATMLoss(6), Cropped(3, 32), steps=4, batch_size=8)
    assert records[-1]["step"] == 4


def test_a_data_set_without_a_whole_batch_for_every_process_says_so():
    from segvit.training import _endless

    with pytest.raises(ValueError, match="smaller than one batch for every process"):
        next(_endless([], 3))


def test_checkpoints_replace_each_other_whole(tmp_path):
    first, second = model(), model()
    save_checkpoint(first, tmp_path / "last")
    save_checkpoint(second, tmp_path / "last")
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    again = segvit.SegViT.from_pretrained(tmp_path / "last")
    assert torch.equal(again.decoder.queries, second.decoder.queries)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    first = model()
    save_checkpoint(first, tmp_path / "last")

    def full_disk(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    second = model()
    monkeypatch.setattr(second, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(second, tmp_path / "last")
    again = segvit.SegViT.from_pretrained(tmp_path / "last")
    assert torch.equal(again.decoder.queries, first.decoder.queries)


def test_evaluate_is_the_confusion_of_predictions():
    m, data = model().eval(), Shapes(4, 48)
    scores = evaluate(m, data, progress=False)
    right = total = 0
    for image, labels in (data[i] for i in range(4)):
        predicted = segvit.predict(m, image)[0].long()
        right += (predicted == labels).sum().item()
        total += (labels != 255).sum().item()
    assert scores.aacc == pytest.approx(right / total)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """The embedded data set as files: train (12) and val (4), 48×64."""
    root = tmp_path_factory.mktemp("shapes")
    for part, count, seed in (("train", 12, 1), ("val", 4, 2)):
        for name in ("images", "labels"):
            (root / part / name).mkdir(parents=True)
        data = Shapes(count, 64, seed=seed)
        for i in range(count):
            image, labels = data[i]
            Image.fromarray(image.permute(1, 2, 0).numpy()[:48]).save(root / part / "images" / f"{i}.jpg")
            Image.fromarray(labels.numpy()[:48].astype(np.uint8)).save(root / part / "labels" / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(Shapes.classes))
    return root


def test_training_on_a_folder_writes_checkpoints_and_a_log(shapes_folder, tmp_path):
    result = train_folder(
        str(shapes_folder),
        str(tmp_path / "run"),
        "vit_tiny_patch16_224",
        pretrained=False,
        crop=(32, 32),
        steps=12,
        batch_size=2,
        validate_every=6,
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records == json.loads(json.dumps(result["records"]))
    assert [r["step"] for r in records if "miou" in r] == [6, 12]
    assert result["miou"] == max(r["miou"] for r in records if "miou" in r)
    best = segvit.SegViT.from_pretrained(result["checkpoint"])
    assert best.class_names == list(Shapes.classes)
    assert best.image_size == (32, 32)
    assert (tmp_path / "run" / "last" / "config.json").is_file()


def test_binary_masks_of_0_and_255_and_sets_without_truth_are_refused(shapes_folder, tmp_path):
    root = tmp_path / "binary"
    shutil.copytree(shapes_folder, root)
    (root / "classes.txt").write_text("background\nobject\n")
    arguments = (str(root), str(tmp_path / "run"), "vit_tiny_patch16_224")
    for value, message in ((0, "labels are 0 and 255, a binary mask"), (255, "every label is 255, which is ignored")):
        for path in (root / "val" / "labels").iterdir():
            labels = np.full((48, 64), 255, np.uint8)
            labels[:20] = value
            Image.fromarray(labels).save(path)
        with pytest.raises(ValueError, match=message):
            train_folder(*arguments, pretrained=False, crop=32, steps=1)


def test_ctrl_c_keeps_the_last_weights(shapes_folder, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("segvit.training.fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_folder(str(shapes_folder), str(tmp_path / "run"), "vit_tiny_patch16_224", pretrained=False, crop=32)
    segvit.SegViT.from_pretrained(tmp_path / "run" / "last")


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
