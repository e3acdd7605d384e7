"""Exported files: from one file for all sizes, ONNX Runtime and torch.export give what segvit.predict gives."""

import json
import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from test_models import FAMILIES, SMALL, tiny

import segvit
from segvit.cli import main
from segvit.data import Shapes
from segvit.export import Agreement, _program, export_onnx, export_program, verify
from segvit.ops._dispatch import choose, is_plain, plain_torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SLOW = pytest.mark.slow
SIZES = [(1, 75, 111), (2, 96, 96), (3, 33, 130), (1, 200, 17), (1, 1, 1)]  # 16 divides one of them


def small(family="AugReg", **kwargs):
    """A tiny model whose images have several labels: clear classes, and masks that differ from place to place."""
    name, size = FAMILIES[family][0], 112 if "14" in FAMILIES[family][0] else 96
    depth = {"depth": 3 if kwargs.get("shrink") else 2}
    layout = {"out_indices": [0, 2], "shrink_at": 1} if kwargs.get("shrink") else {"out_indices": [0, 1]}
    options = {"backbone_kwargs": SMALL | depth, "decoder_layers": 1, "image_size": size} | layout | kwargs
    model = tiny(backbone=name, **options).eval()
    with torch.no_grad():
        model.decoder.class_embed.weight.mul_(8)
        for stage in model.decoder.stages:
            stage.layers[-1].q.weight.mul_(8)
    return model


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(file, images):
    return torch.from_numpy(file.run(None, {"images": images.numpy()})[0])


def foreign(path) -> set[str]:
    """Domains of a file's operators other than ONNX's own."""
    model = onnx.load(path)
    functions = [node for function in model.functions for node in function.node]
    return {node.domain for node in [*model.graph.node, *functions]} - {""}


def check_scores(got, model, images) -> int:
    """Scores are predict's within 1e-4 of the largest, labels but where two scores are that near. Counts labels."""
    want = segvit.predict(model, images, output="scores")
    tolerance = 1e-4 * want.abs().max()
    assert got.shape == want.shape
    assert (got - want).abs().max() < tolerance
    first, second = want.topk(2, 1).values.unbind(1)
    differ = got.argmax(1) != segvit.predict(model, images)
    assert not (differ & (first - second > tolerance)).any()
    return want.argmax(1).unique().numel()


CASES = [
    ("AugReg", {}),
    ("DINOv3", {}),
    pytest.param("SigLIP", {}, marks=SLOW),
    pytest.param("AugReg", {"shrink": "edge"}, marks=SLOW),
    pytest.param("AugReg", {"shrink": "v1"}, marks=SLOW),
    pytest.param("EVA02", {}, marks=SLOW),
    pytest.param("EVA02", {"shrink": "light"}, marks=SLOW),
]


@pytest.mark.parametrize(("family", "kwargs"), CASES)
def test_one_onnx_file_gives_predicts_scores_at_any_batch_and_size(family, kwargs, tmp_path):
    model = small(family, **kwargs)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, normalise=False)
    assert foreign(path) == set()
    file = session(path)
    assert [(i.name, i.shape) for i in file.get_inputs()] == [("images", ["batch", 3, "height", "width"])]
    assert [(o.name, o.shape) for o in file.get_outputs()] == [("scores", ["batch", 5, "height", "width"])]
    several = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Shrunk v1 says that it interpolates its queries
        for batch, height, width in SIZES:
            images = torch.randn(batch, 3, height, width)
            several = max(several, check_scores(run(file, images), model, images))
    assert several > 1, "one label everywhere would show nothing"


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory):
    torch.manual_seed(1)
    model = small(
        "SigLIP", num_classes=7, class_names=list("abcdefg"), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1]
    ).train()
    path = tmp_path_factory.mktemp("labels") / "new" / "labels.onnx"
    metadata = export_onnx(model, path, labels=True)
    assert model.training  # the model is left as it was
    assert all(p.requires_grad for p in model.parameters())
    return model, path, metadata


def test_labels_of_raw_pixels_are_predicts(labels_file):
    model, path, _ = labels_file
    file = session(path)
    seen = set()
    for i, (height, width) in enumerate([(96, 96), (61, 83), (90, 47)]):
        images = torch.stack([Shapes(8)[2 * i][0], Shapes(8)[2 * i + 1][0]])[:, :, :height, :width].contiguous()
        got = run(file, images)
        want = segvit.predict(model, images)
        assert got.dtype == want.dtype == torch.uint8
        assert torch.equal(got, want)
        seen |= set(want.unique().tolist())
    assert len(seen) > 2


def test_labels_of_photos_are_predicts(labels_file):
    model, path, _ = labels_file
    photos = sorted(shared("ade20k_samples").rglob("*.jpg"))
    assert photos
    file = session(path)
    for photo in photos[:3]:
        image = Image.open(photo).convert("RGB")
        image.thumbnail((300, 300))
        pixels = np.asarray(image).transpose(2, 0, 1)[None]
        (got,) = file.run(None, {"images": pixels})
        assert (torch.from_numpy(got) == segvit.predict(model, image)).float().mean() > 0.9999


def test_the_file_says_what_it_takes_and_gives(labels_file):
    _, path, metadata = labels_file
    said = session(path).get_modelmeta().custom_metadata_map
    assert said == metadata
    assert json.loads(said["class_names"]) == list("abcdefg")
    np.testing.assert_allclose(json.loads(said["mean"]), [0.4, 0.5, 0.6], rtol=1e-6)
    np.testing.assert_allclose(json.loads(said["std"]), [0.2, 0.3, 0.1], rtol=1e-6)
    assert said["input"] == "images uint8 [B, 3, H, W]"
    assert said["output"] == "labels uint8 [B, H, W]"
    assert said["segvit"] == segvit.__version__


def test_verify_finds_another_model(labels_file, tmp_path):
    model, path, _ = labels_file
    assert verify(model, path) == Agreement(3, 1.0, None)
    photo = tmp_path / "photo.png"
    Image.fromarray(Shapes(1)[0][0].permute(1, 2, 0).numpy()[:50]).save(photo)
    assert verify(model, path, [photo]) == Agreement(1, 1.0, None)
    torch.manual_seed(2)
    assert verify(small("SigLIP", num_classes=7), path).equal < 0.999


def test_more_than_256_classes_have_labels_of_two_bytes(tmp_path):
    model = small(num_classes=300, image_size=32)
    program = _program(model, True, True).module()
    images = Shapes(2, 40)[1][0][None]
    got = program(images)
    assert got.dtype == torch.int16
    assert torch.equal(got, segvit.predict(model, images))


@pytest.mark.parametrize("family", ["AugReg", pytest.param("DINOv3", marks=SLOW)])
def test_a_program_runs_without_segvits_operators(family, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_KERNELS", "reference")  # which elsewhere is segvit::atm
    model = small(family, in_chans=4)
    path = tmp_path / "model.pt2"
    metadata = export_program(model, path, normalise=False)
    files = {"segvit.json": ""}
    program = torch.export.load(path, extra_files=files)
    assert json.loads(files["segvit.json"]) == metadata
    assert not [node for node in program.graph.nodes if "segvit" in str(node.target)]
    monkeypatch.delenv("SEGVIT_KERNELS")
    for batch, height, width in SIZES[:4]:
        images = torch.randn(batch, 4, height, width)
        check_scores(program.module()(images), model, images)
    agreement = verify(model, path)
    assert agreement.equal == 1
    assert agreement.difference < 1e-4


@SLOW
@pytest.mark.parametrize("budget", [0.001, 0.125])
def test_edge_tokens_are_as_many_at_every_size(budget):
    """The program's token counts at other sizes than the traced one, a half and none at all among them."""
    model = small(shrink="edge", edge_budget=budget)
    program = _program(model, False, False).module()
    for height, width in ((49, 64), (80, 64), (75, 145)):  # an eighth of 20 cells are 2.5
        images = torch.randn(1, 3, height, width)
        check_scores(program(images), model, images)


def test_beit_is_exported_at_its_one_size(tmp_path):
    model = small("BEiT v2")
    path = tmp_path / "beit.onnx"
    metadata = export_onnx(model, path, normalise=False)
    assert metadata["input"] == "images normalised float32 [B, 3, 96, 96]"
    file = session(path)
    images = torch.randn(3, 3, 96, 96)
    check_scores(run(file, images), model, images)
    assert verify(model, path).equal > 0.999
    photo = tmp_path / "photo.png"
    Image.new("RGB", (96, 80)).save(photo)
    with pytest.raises(RuntimeError, match=r"does not run on .*photo.png, \(3, 80, 96\).*Got: 80 Expected: 96"):
        verify(model, path, [photo])


def test_plain_torch_counts_for_its_own_thread_alone(monkeypatch):
    monkeypatch.setenv("SEGVIT_KERNELS", "library")
    offered = [("library", None), ("reference", None)]
    seen = []
    with plain_torch():
        assert choose("atm", "library", offered) == "reference"
        thread = threading.Thread(target=lambda: seen.append((is_plain(), choose("atm", None, offered))))
        thread.start()
        thread.join()
    assert seen == [(False, "library")]
    with pytest.raises(ZeroDivisionError), plain_torch():
        raise ZeroDivisionError
    assert choose("atm", None, offered) == "library"


def test_the_command(tmp_path, capsys):
    torch.manual_seed(3)
    model = small(class_names=["sky", "road", "tree", "car", "sign"])
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "model"), str(file), "--json", "--verify"]) == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert value["output"] == "scores float32 [B, 5, H, W]"
    assert value["verified"]["equal"] == 1
    assert value["verified"]["difference"] < 1e-4
    assert captured.err.strip().startswith(
        "100.0000% of the labels of 3 images are those of segvit.predict for whole images, scores within"
    )


@SLOW
def test_the_command_writes_programs_and_verifies_with_given_images(tmp_path, capsys):
    small().save_pretrained(tmp_path / "model")
    program = tmp_path / "model.pt2"
    photo = tmp_path / "photo.png"
    Image.fromarray(Shapes(1)[0][0].permute(1, 2, 0).numpy()[:50]).save(photo)
    assert main(["export", str(tmp_path / "model"), str(program), "--labels", "--verify", str(photo)]) == 0
    said, agreed = capsys.readouterr().out.splitlines()
    assert said == f"{program}: images uint8 [B, 3, H, W] -> labels uint8 [B, H, W]"
    assert agreed == "100.0000% of the labels of 1 images are those of segvit.predict for whole images"


def test_a_file_that_disagrees_fails(tmp_path, capsys, monkeypatch):
    small().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("segvit.export.export_program", lambda *a: {"input": "i", "output": "o"})
    monkeypatch.setattr("segvit.export.verify", lambda *a: Agreement(2, 0.9984, 0.25))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model.pt2"), "--verify"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "only 99.8400% of the labels of 2 images are those of segvit.predict for whole images, scores within 2.5e-01"
        in error
    )


def test_mistakes_end_in_one_line(labels_file, tmp_path, capsys, monkeypatch):
    model, path, _ = labels_file
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    deep = tmp_path / "deep.npy"
    np.save(deep, np.zeros((20, 30, 3), np.uint16))
    for name, message in (
        ("model.pth", "name a file that ends in .onnx or .pt2"),
        ("folder.onnx", "name a file that ends in .onnx"),
        ("/proc/x/model.onnx", "/proc/x/model.onnx: cannot write there"),
    ):
        assert main(["export", str(tmp_path / "model"), str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
    assert main(["export", "nowhere", str(tmp_path / "a.onnx")]) == 1
    assert "nowhere: no checkpoint there" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a readable ONNX file"):
        verify(model, tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=r"more than 8 bits, but .* takes uint8; export with normalise=False"):
        verify(model, path, [deep])
    with pytest.raises(FileNotFoundError, match="no such file"):
        verify(model, tmp_path / "nothing.pt2")
    with pytest.raises(ValueError, match="model must be a SegViT, got Linear"):
        export_program(torch.nn.Linear(2, 2), tmp_path / "a.pt2")
    model.backbone.model.rope = None  # what some other backbone may do: a size that Python must know
    monkeypatch.setattr(type(model.backbone), "_pad", lambda self, x: x[:, :, : int(x.shape[2]) // 16 * 16, :64])
    with pytest.raises(RuntimeError, match="this model cannot be exported for images of any size: "):
        export_program(model, tmp_path / "a.pt2")
    assert not (tmp_path / "a.pt2").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="not installed: pip install onnx onnxscript"):
        export_onnx(model, tmp_path / "a.onnx")
