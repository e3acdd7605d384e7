"""Pictures of logs, by themselves, at the shell and beside a run."""

import builtins
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from test_runs import log, shapes_folder, train  # noqa: F401

from segvit.cli import main
from segvit.curves import curves, read_log
from segvit.visualize import palette


def records(count=20, start=0.0, **more):
    made = [{"step": 10 * i, "loss": start + 10 / i, "lr": 1e-4, "waiting": 0.1, **more} for i in range(1, count + 1)]
    made[-1]["miou"] = 0.5
    return made


def has(page, colour):
    return bool((np.asarray(page) == colour).all(-1).any())


def test_a_line_a_run_and_a_panel_a_quantity(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it, with its global state, is an error
    two = {"runs/a": records(), "$runs_b$": records(500, 2.0, edge=0.3)}
    page = curves(two)
    assert page.mode == "RGB"
    lines = page.crop((0, 70, page.width, page.height))  # below the runs' names, which have their colours, too
    assert has(lines, palette(2)[0])
    assert has(lines, palette(2)[1])
    one = curves({"runs/a": records()})
    higher = curves({"runs/a": [r | {"miou": 0.9} if r.get("miou") else r for r in records()]})
    assert np.asarray(one).shape == np.asarray(higher).shape
    assert not np.array_equal(np.asarray(one)[60:], np.asarray(higher)[60:])
    assert one.height < page.height  # without the panel of edges, and with one name
    assert not has(one, palette(2)[1])
    curves({"x" * 500: [{"step": 1, "loss": 0.0, "miou": None, "ce": float("nan")}]})
    with pytest.raises(ValueError, match="no run has a record with values to draw"):
        curves({"a": [{"step": 1}]})


def test_a_log_that_is_being_written(tmp_path):
    lines = [json.dumps(r) for r in records(3)]
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join([*lines, '{"step": 40, "lo']))
    assert read_log(tmp_path) == read_log(file) == records(3)
    for bad in ("{", "[1]", '{"loss": 1}', '{"step": 1, "loss": "x"}', "null"):
        file.write_text("\n".join([lines[0], bad, lines[1], ""]))
        with pytest.raises(ValueError, match=r"log.jsonl: line 2 is no record of a training: "):
            read_log(tmp_path)
    file.write_text("")
    with pytest.raises(ValueError, match="no records yet"):
        read_log(tmp_path)
    with pytest.raises(FileNotFoundError, match="there: no such folder"):
        read_log(tmp_path / "there")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no log.jsonl in this folder"):
        read_log(tmp_path / "empty")


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    out = tmp_path / "new" / "c.png"
    assert main(["curves", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).width > 1000
    before = out.read_bytes()
    (tmp_path / "b" / "log.jsonl").write_text("no json\n")
    assert main(["curves", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 1
    assert "line 1 is no record of a training: 'no json'" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_run_draws_after_every_validation_and_overwrite_removes_it(shapes_folder, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("matplotlib")
    drawn = []

    def watched(logs):
        drawn.append([r["step"] for r in logs["run"]])
        return curves(logs)

    monkeypatch.setattr("segvit.curves.curves", watched)
    run = tmp_path / "run"
    train(shapes_folder, run, steps=4, validate_every=2)
    assert drawn == [[2], [2, 4]]
    assert Image.open(run / "curves.png").width > 1000
    for folder in ("best", "step_00000002", "step_00000004"):
        shutil.rmtree(run / folder)
    (run / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="holds a run already"):  # a picture is no file to write over unasked
        train(shapes_folder, run)
    (run / ".curves.png.new").write_bytes(b"half")
    monkeypatch.setattr("segvit.curves.curves", lambda logs: 1 / 0)
    train(shapes_folder, run, steps=2, overwrite=True)
    assert not (run / "curves.png").exists()
    assert not (run / ".curves.png.new").exists()


def test_no_picture_stops_no_training_and_is_said_once(shapes_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    run = tmp_path / "run"
    train(shapes_folder, run, steps=4, validate_every=1)
    assert [r["step"] for r in log(run) if "miou" in r] == [1, 2, 3, 4]
    said = [line for line in capsys.readouterr().err.splitlines() if "curves.png" in line]
    assert len(said) == 1
    assert said[0].endswith(f"{run}/curves.png is not drawn: curves need Matplotlib: pip install matplotlib")
    assert not (run / "curves.png").exists()
