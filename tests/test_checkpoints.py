import json

import pytest
import torch
from test_training import model

import segvit
from segvit.checkpoints import keep_newest, load_model, load_state, save_checkpoint, step_folders
from segvit.classes import with_classes


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


def test_files_can_be_read_by_others(tmp_path):
    save_checkpoint(model(), tmp_path / "a", {"step": 1})
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_the_newest_are_kept_and_a_half_written_one_does_not_count(tmp_path):
    whole = {"seconds": 1.0, "options": {}, "optimizer": {}, "ema": None, "skipped": 0}
    for step in (5, 100, 20):
        save_checkpoint(model(), tmp_path / f"step_{step:08d}", whole | {"step": step})
    (tmp_path / "step_00000999").mkdir()
    assert load_state(step_folders(tmp_path)[-1]) == whole | {"step": 100}
    keep_newest(tmp_path, 2)
    assert [path.name for path in step_folders(tmp_path)] == ["step_00000020", "step_00000100"]
    (tmp_path / "step_00000100" / "training.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"training\.pt: cannot be read; --model .*00000100 starts from its weights"):
        load_state(step_folders(tmp_path)[-1])
    torch.save({"model": {}}, tmp_path / "step_00000100" / "training.pt")
    with pytest.raises(ValueError, match=r"training\.pt: not written by this version of segvit; --model .*00000100"):
        load_state(step_folders(tmp_path)[-1])


def test_models_are_loaded_from_folders_and_runs(tmp_path):
    save_checkpoint(model(), tmp_path / "run" / "best")
    assert load_model(tmp_path / "run").num_classes == load_model(tmp_path / "run" / "best").num_classes == 6
    assert segvit.SegViT.from_pretrained(tmp_path / "run").num_classes == 6
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint there"):
        load_model("nowhere")
    for name in ("nowhere", "/no/where/at/all", tmp_path):
        with pytest.raises(FileNotFoundError, match="no saved model there"):
            segvit.SegViT.from_pretrained(name)
    (tmp_path / "run" / "best" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot load this model"):
        load_model(tmp_path / "run")
    config = tmp_path / "run" / "best" / "config.json"
    config.write_text(json.dumps({"architectures": ["Bert"]}))
    with pytest.raises(ValueError, match="cannot load this model"):
        load_model(tmp_path / "run")


def test_rows_of_known_classes_are_kept():
    old = model(class_names=["sky", "road", "car", "tree", "person", "sign"]).eval()
    new, said = with_classes(old, ["tree", "bus", "sky"], drop_path=0.3)
    assert said == "2 of 3 classes are kept; new: bus; dropped: road, car, person, sign"
    assert new.class_names == ["tree", "bus", "sky"]
    assert new._hub_mixin_config["drop_path"] == 0.3
    images = torch.randn(2, 3, 32, 32)
    for a, b in ((0, 3), (2, 0)):
        assert torch.equal(new.decoder.queries[a], old.decoder.queries[b])
        assert torch.equal(new.decoder.class_embed.weight[a], old.decoder.class_embed.weight[b])
    assert torch.equal(new.decoder.class_embed.bias[-1], old.decoder.class_embed.bias[-1])
    assert torch.equal(new.features(images).tokens[0], old.features(images).tokens[0])
    same, said = with_classes(old, old.class_names)
    assert said == "all classes are kept"
    assert torch.equal(same.eval()(images).mask_logits, old(images).mask_logits)
    none, said = with_classes(old, ["cup"])
    assert said.startswith("0 of 1 classes are kept; new: cup; dropped: sky")
    assert none(images).class_logits.shape[-1] == 2


def test_pushing_to_the_hub_uploads_weights_configuration_and_card(monkeypatch):
    uploads = {}

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        uploads[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return "https://hub"

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: type("R", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    model().push_to_hub("me/roads")
    files = uploads["me/roads"]
    assert {"model.safetensors", "config.json", "README.md"} <= set(files)
    assert json.loads(files["config.json"])["num_classes"] == 6
    card = files["README.md"].decode()
    assert "segvit.SegViT.from_pretrained" in card
    assert "More Information Needed" not in card
