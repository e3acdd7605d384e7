"""Classes that are added to a trained model: what it knew stays bit for bit, and what is new learns."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_models import FAMILIES, tiny

import segvit
from segvit.checkpoints import load_model
from segvit.cli import main
from segvit.data import Shapes
from segvit.demo import small_model
from segvit.training import fit

KINDS = {"full": {}, "light": {"shrink": "light"}, "edge": {"shrink": "edge"}, "v1": {"shrink": "v1"}}
KINDS |= {family: {"backbone": FAMILIES[family][0]} for family in ("DINOv3", "EVA02", "SigLIP", "BEiT v2")}


def old_and_new(out, before):
    """Logits of the old classes, and their no object, in an output with more classes."""
    n = before.class_logits.shape[2]
    logits = torch.cat([out.class_logits[:, :, :n, :n], out.class_logits[:, :, :n, -1:]], -1)
    return logits, out.mask_logits[:, :, :n]


def unchanged(model, before, images) -> bool:
    with torch.no_grad():
        logits, masks = old_and_new(model(images), before)
    return torch.equal(logits, before.class_logits) and torch.equal(masks, before.mask_logits)


def learn(model, steps=3, labels=None):
    """AdamW steps with weight decay and a large learning rate: whatever can move, moves."""
    loss = segvit.ATMLoss(model.num_classes, learned=model.learned_classes)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.01, weight_decay=0.5))
    model.train()
    for _ in range(steps):
        images = torch.randn(2, 3, 64, 64)
        target = torch.randint(0, model.num_classes, (2, 64, 64)) if labels is None else labels
        loss(model(images), target).total.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, f"no gradient, so distributed training would wait: {without}"
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_old_classes_stay_bit_for_bit_whatever_the_new_ones_learn(kind):
    old = tiny(3, dropout=0.1, drop_path=0.1, **KINDS[kind]).eval()
    images = torch.randn(2, 3, 60, 60 if kind == "BEiT v2" else 75)
    with torch.no_grad():
        before = old(images)
    with_gradients = old(images)  # frozen weights and others must not take different products
    assert torch.equal(with_gradients.mask_logits, before.mask_logits)
    assert torch.equal(with_gradients.class_logits, before.class_logits)
    once = segvit.add_classes(old, ["cup", "pen"]).eval()
    assert once.class_names == ["class 0", "class 1", "class 2", "cup", "pen"]
    assert unchanged(once, before, images)
    start = copy.deepcopy(once.added[0].state_dict())
    learn(once)
    assert unchanged(once, before, images), "in training mode, old classes have no dropout"
    once.eval()
    assert unchanged(once, before, images)
    assert all(not torch.equal(start[name], value) for name, value in once.added[0].state_dict().items())
    with torch.no_grad():
        middle = once(images)
    twice = segvit.add_classes(once, ["key"]).eval()
    assert twice.learned_classes == range(5, 6)
    learn(twice).eval()
    assert unchanged(twice, before, images)
    assert unchanged(twice, middle, images)


def test_new_classes_begin_with_the_decoder_that_reads_these_features():
    old = tiny(3)
    new = segvit.add_classes(old, ["cup", "pen"])
    for name, value in new.added[0].state_dict().items():
        same = old.decoder.state_dict()[name]
        if name == "class_embed.weight":
            assert torch.equal(value[-1], same[-1])
        assert (value.shape == same.shape and torch.equal(value, same)) == (
            name.split(".")[0] not in ("queries", "class_embed")
        )


def test_a_token_knows_the_classes_of_its_own_decoder_alone():
    model = segvit.add_classes(tiny(3).eval(), ["cup", "pen"]).eval()
    logits = model(torch.randn(1, 3, 64, 64)).class_logits[:, 0]  # [S, 5, 6]
    own = torch.zeros(5, 6, dtype=torch.bool)
    own[:3, :3] = own[3:, 3:5] = own[:, 5] = True
    assert logits[:, own].isfinite().all()
    assert (logits[:, ~own] == -torch.inf).all()
    assert torch.equal(logits[:, 3:, 3:].softmax(-1), logits[:, 3:].softmax(-1)[..., 3:])


def test_the_loss_of_new_classes_is_that_of_their_tokens():
    """As if their decoder were a model of its own, for which pixels of old classes are background."""
    model = segvit.add_classes(tiny(3), ["cup", "pen"])
    out = model(torch.randn(2, 3, 64, 64))
    labels = torch.randint(0, 5, (2, 64, 64))
    labels[:, :10] = 255
    labels[1][labels[1] == 4] = 0  # one class is in one image alone
    got = segvit.ATMLoss(5, learned=model.learned_classes)(out, labels)
    alone = out._replace(class_logits=out.class_logits[:, :, 3:, 3:], mask_logits=out.mask_logits[:, :, 3:])
    ce = segvit.ATMLoss(2)(alone, torch.where((labels >= 3) & (labels != 255), labels - 3, 255)).ce
    assert torch.allclose(got.ce, ce)
    for b, n in ((0, 3), (0, 4), (1, 3)):  # the mask terms, one mask at a time
        assert (labels[b] == n).any()
    masks = out.mask_logits[:, :, 3:]
    other = torch.where(labels == 255, 255, torch.where(labels >= 3, labels - 3, 2))  # class 2: all that is old
    present = torch.stack([(labels == n).flatten(1).any(1) for n in (3, 4)], 1)
    padded = torch.cat([masks, masks[:, :, :1]], 2)
    none = torch.zeros(2, 1, dtype=torch.bool)
    focal, dice = segvit.ops.reference.mask_loss(padded, other, torch.cat([present, none], 1), present.sum())
    assert torch.allclose(got.focal, 20 * focal)
    assert torch.allclose(got.dice, dice)


def test_labels_without_any_new_class_still_train_their_tokens_and_nothing_is_nan():
    model = segvit.add_classes(tiny(3), ["cup"])
    learn(model, 2, torch.zeros(2, 64, 64, dtype=torch.long))
    learn(model, 2, torch.full((2, 64, 64), 255))
    assert all(p.isfinite().all() for p in model.parameters())


def test_saved_and_loaded_it_is_the_same_and_still_frozen(tmp_path):
    model = learn(segvit.add_classes(tiny(3), ["cup"])).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = segvit.SegViT.from_pretrained(tmp_path / "m")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images).mask_logits, model(images).mask_logits)
    trained = {name.split(".")[0] for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {"added"}
    assert not loaded.train().decoder.training
    assert loaded.added[0].training


@pytest.mark.parametrize("kind", ["full", "v1"])
def test_queries_and_tokens_are_contiguous(kind):
    """Else torch multiplies them in another way once the weights are frozen, whose last bits may differ."""
    model, seen = tiny(3, **KINDS[kind]).eval(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(("decoder.", "upsample.")):
            module.register_forward_pre_hook(lambda module, inputs, name=name: seen.append((name, inputs[0])))
    model(torch.randn(2, 3, 64, 64))
    assert len(seen) > 10
    strided = [name for name, x in seen if not x.is_contiguous()]
    assert not strided


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_stays_one(dtype):
    old = tiny(3).to(dtype).eval()
    new = segvit.add_classes(old, ["cup"]).eval()
    images = torch.randn(1, 3, 64, 64, dtype=dtype)
    assert {p.dtype for p in new.parameters()} == {dtype}
    with torch.no_grad():
        assert unchanged(new, old(images), images)


def test_what_cannot_be_added_is_refused():
    model = tiny(3)
    with pytest.raises(ValueError, match="class_names must be a list of names, got 'car'"):
        segvit.add_classes(model, "car")
    with pytest.raises(ValueError, match="keeps its image_size, shrink, too"):
        segvit.add_classes(model, ["car"], shrink="light", image_size=96)
    for names, said in (([], "none"), (["class 1"], "'class 1'"), (["cup", "cup"], "'cup'")):
        with pytest.raises(ValueError, match=f"class_names must be new to the model, got {said}"):
            segvit.add_classes(model, names)
    with pytest.raises(ValueError, match="added must be numbers of classes, fewer than num_classes = 3"):
        tiny(3, added=[3])
    with pytest.raises(ValueError, match=r"added must be numbers of classes, .* got 1"):
        tiny(3, added=1)
    with pytest.raises(ValueError, match="learned must be class numbers from 0 to 2"):
        segvit.ATMLoss(3, learned=[3])
    with pytest.raises(ValueError, match="learned must be class numbers"):
        segvit.ATMLoss(3, learned=[])


def test_new_shapes_are_learnt_beside_old_ones():
    """From images where nothing else has a label; the demo's model is small enough to learn in seconds."""
    torch.manual_seed(0)
    old = small_model()
    new = segvit.add_classes(old, ["blue"])
    mean, std = old.mean[:, None, None], old.std[:, None, None]

    class Blue(torch.utils.data.Dataset):
        """Images whose blue half is the new class; nothing else has a label."""

        def __len__(self):
            return 64

        def __getitem__(self, i):
            image, labels = Shapes(64, 96)[i]
            image = image.float() / 255
            image[2, :, 48:] = 1.0
            labels = torch.full_like(labels, 255)
            labels[:, 48:] = 6
            return (image - mean) / std, labels

    loss = segvit.ATMLoss(7, ignored="negative", learned=new.learned_classes)
    fit(new, loss, Blue(), steps=16, batch_size=4, lr=1e-3, decoder_lr=1.0)
    with torch.no_grad():
        out = new.eval()(torch.stack([Blue()[i][0] for i in range(4)]))
    mask = out.mask_logits[-1, :, 6].sigmoid()
    assert mask[..., 7:].mean() > 0.6
    assert mask[..., :5].mean() < 0.4
    assert out.class_logits[-1, :, 6].softmax(-1)[:, 6].min() > 0.8


def folder(root, classes, top, first=0):
    """Six images of shapes whose labels from `first` to below `top` are kept."""
    data = Shapes(6, 64)
    for part in ("train", "val"):
        for i in range(6):
            image, labels = data[i]
            for kind, array in (
                ("images", image.permute(1, 2, 0)),
                ("labels", torch.where((labels >= first) & (labels < top), labels, 255)),
            ):
                (root / part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.numpy().astype(np.uint8)).save(root / part / kind / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return str(root)


def test_from_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = list(Shapes.classes)
    four, six = folder(tmp_path / "four", names[:4], 4), folder(tmp_path / "six", names, 6)
    fast = ["--crop", "32", "--steps", "2", "--batch_size", "2", "--workers", "0"]
    model = ["--backbone", "test_vit", "--pretrained", "false"]
    assert main(["train", four, "--out", "old", *model, *fast]) == 0
    assert main(["train", six, "--out", "new", "--model", "old", "--add_classes", *fast]) == 0
    assert "4 classes stay as they are; new: ring, cross" in capsys.readouterr().err
    old, new = load_model("old"), load_model("new")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert unchanged(new, old(images), images)
    more = ["--resume", "--steps", "3"]
    assert main(["train", six, "--out", "new", "--model", "old", "--add_classes", *fast, *more]) == 0
    resumed = load_model(sorted((tmp_path / "new").glob("step_*"))[-1])
    with torch.no_grad():
        assert unchanged(resumed, old(images), images)
    assert any(not torch.equal(a, b) for a, b in zip(new.added.parameters(), resumed.added.parameters()))
    capsys.readouterr()
    assert main(["evaluate", "new", six, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["iou"]) == names
    assert main(["train", six, "--out", "x", "--model", "new", *fast]) == 0, "goes on with the classes it has"
    assert "all classes are kept; ring, cross learn, the rest is frozen" in capsys.readouterr().err
    assert main(["train", six, "--out", "whole", "--model", "old", *fast]) == 0
    assert main(["train", six, "--out", "whole", "--model", "old", "--add_classes", *fast, "--resume"]) == 1
    assert "began without add_classes; a run that adds classes needs another --out" in capsys.readouterr().err
    wrong = {
        "new": ("class 0 is 'background' to the model, but 'cross'", folder(tmp_path / "w", names[::-1], 6)),
        "old": ("the data has 4 classes, and the model knows 4 already", four),
    }
    for name, (said, data) in wrong.items():
        capsys.readouterr()
        assert main(["train", data, "--out", "x2", "--model", name, "--add_classes", *fast]) == 1
        assert said in capsys.readouterr().err
    assert main(["train", six, "--out", "x2", "--add_classes", *model, *fast]) == 1
    assert "name the trained model" in capsys.readouterr().err
    assert main(["train", four, "--out", "x2", "--model", "new", *fast]) == 1
    assert "goes on with its own 6 classes" in capsys.readouterr().err


def test_labels_of_new_classes_alone_need_the_rest_as_background(tmp_path, monkeypatch, capsys):
    """Or the new masks would learn to be everywhere."""
    monkeypatch.chdir(tmp_path)
    names = list(Shapes.classes)
    tiny(4, class_names=names[:4]).save_pretrained("old")
    data, one = folder(tmp_path / "new", names, 6, 4), folder(tmp_path / "one", names[:5], 5, 4)
    options = ["--model", "old", "--add_classes", "--crop", "32", "--steps", "1", "--batch_size", "2", "--workers", "0"]
    assert main(["train", data, "--out", "a", *options]) == 1
    assert "only new classes are labelled" in capsys.readouterr().err
    assert not (tmp_path / "a" / "best").exists()
    assert main(["train", data, "--out", "b", *options, "--ignored", "negative"]) == 0
    assert main(["train", one, "--out", "c", *options, "--ignored", "negative"]) == 0, "one class is enough"


def test_exported_and_compiled_it_is_the_same(tmp_path):
    from segvit.export import export_onnx, verify

    pytest.importorskip("onnxruntime")
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    old = tiny(3, backbone_kwargs=small, out_indices=[0, 1], decoder_layers=1)
    model = segvit.add_classes(old, ["cup", "pen"]).eval()
    export_onnx(model, tmp_path / "m.onnx", labels=True)
    assert verify(model, tmp_path / "m.onnx").equal > 0.999
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled, plain = torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images)
    assert torch.allclose(compiled.mask_logits, plain.mask_logits, atol=1e-5)
    assert torch.allclose(compiled.class_logits.exp(), plain.class_logits.exp(), rtol=1e-4)
