"""Runs that are killed, and disks and processes that fail: what was good stays, and one line says so."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_cli import TINY as TINY_OPTIONS
from test_runs import log, shapes_folder, train  # noqa: F401

from segvit.checkpoints import load_state, step_folders

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def equal(ours, theirs):
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(value, theirs[name]) for name, value in ours.items())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(equal(a, b) for a, b in zip(ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def trace(run):
    """What must be the same of two runs, bit for bit."""
    last = step_folders(run)[-1]
    state = load_state(last)
    records = [{k: v for k, v in r.items() if k not in ("seconds", "waiting")} for r in log(run)]
    return {
        "records": records,
        "weights": load_file(last / "model.safetensors"),
        "best": load_file(run / "best" / "model.safetensors"),
        "optimizer": state["optimizer"],
        "ema": state["ema"],
    }


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_random_moments_is_the_run_that_was_not(shapes_folder, tmp_path):  # noqa: F811
    """kill -9, the same command again; half of the moments lie between two operations on the run's files."""
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), str(shapes_folder), str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 20
    want = trace(tmp_path / "whole")
    assert [r["step"] for r in want["records"]] == list(range(1, 41))
    for run in map(Path, result["runs"]):
        assert {name: equal(value, want[name]) for name, value in trace(run).items()} == dict.fromkeys(want, True)
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")]  # nothing half-written is left


def shell(*arguments, limit=None, **options):
    """A training at the shell, whose files may grow to `limit` bytes."""
    capped = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    command = [sys.executable, "-m", "segvit", "train", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ONE_THREAD, preexec_fn=capped, timeout=300, **options
    )


def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(shapes_folder, tmp_path):  # noqa: F811
    """The limit lies between the size of the weights, which still fit, and of what training needs to go on."""
    run = tmp_path / "run"
    train(shapes_folder, run, steps=4, validate_every=2)
    before = trace(run)
    size = (step_folders(run)[-1] / "model.safetensors").stat().st_size
    options = [shapes_folder, *TINY_OPTIONS, "--steps", "8", "--validate_every", "2", "--resume", "--out", run]
    failed = shell(*options, limit=size + 4096)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert re.search(
        r"step_00000006: cannot write this checkpoint \(.+\); the last checkpoint is .*step_00000004$", last
    )
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    after = trace(run)
    assert {name: equal(after[name], before[name]) for name in ("weights", "best", "optimizer")} == dict.fromkeys(
        ("weights", "best", "optimizer"), True
    )
    assert shell(*options).returncode == 0
    assert log(run)[-1]["step"] == 8


def test_a_log_that_cannot_be_written_is_said(shapes_folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").symlink_to("/dev/full")
    expected = r"^\S+/log\.jsonl: cannot be written \(No space left.*\); the last checkpoint is .*step_00000002$"
    with pytest.raises(OSError, match=expected):
        train(shapes_folder, run, steps=4, validate_every=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_lost_ends_the_others_with_one_line(shapes_folder, tmp_path, rank):  # noqa: F811
    run = tmp_path / "run"
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "segvit"]
    options = ["--steps", "100000", "--validate_every", "5", "--keep", "1", "--out", str(run)]
    command = [sys.executable, "-m", *launch, "train", str(shapes_folder), *TINY_OPTIONS, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD) as job:
        try:
            wait_for(lambda: step_folders(run), job)
            os.kill(child_of(job.pid, f"LOCAL_RANK={rank}"), signal.SIGKILL)
            said = job.communicate(timeout=120)[0]
        finally:
            job.kill()
    assert job.returncode != 0
    lines = [line for line in said.splitlines() if "segvit: error:" in line]
    assert len(lines) == 1, said[-3000:]
    assert re.search(
        r"another process of this training is gone, and may say why; the same command with --resume goes on", lines[0]
    )
    assert re.search(r"the last checkpoint is .*step_\d+$", lines[0])
    assert load_state(step_folders(run)[-1])["step"] % 5 == 0


def wait_for(condition, job, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        assert job.poll() is None, job.communicate()[0][-3000:]
        time.sleep(0.05)


def child_of(parent, variable):
    """The process below `parent` whose environment has a variable."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            own = variable.encode() in (path / "environ").read_bytes().split(b"\0")
            if own and int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no child of {parent} has {variable}")


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_break_in_the_middle_of_a_run_are_left_out_and_counted(shapes_folder, tmp_path, capfd, workers):  # noqa: F811
    """Found good by the check, damaged when they are drawn; in the training part and in the validation part."""
    data = copy_of(shapes_folder, tmp_path)
    run = tmp_path / "run"
    train(data, run, steps=6, validate_every=6, workers=workers)
    for part, name in (("train", "3.jpg"), ("train", "7.jpg"), ("val", "1.jpg")):
        path = data / part / "images" / name
        path.write_bytes(path.read_bytes()[:300])
    train(data, run, steps=18, validate_every=6, resume=True, workers=workers)
    said = capfd.readouterr().err
    assert re.search(r"left out at step \d+ \(1 so far\): .*/train/images/[37]\.jpg: not a readable image", said)
    assert re.search(r"left out: .*/val/images/1\.jpg: not a readable image", said)
    counts = [r.get("skipped", 0) for r in log(run)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    drawn = 2 * 12 // 6  # two epochs of twelve, two of them damaged
    assert counts[-1] == drawn
    with pytest.raises(ValueError, match=r"[37]\.jpg: not a readable image .*; the last checkpoint is .*step_00000018"):
        train(data, run, steps=30, validate_every=6, resume=True, strict=True, workers=workers)


def copy_of(folder, where):
    shutil.copytree(folder, where / "data")
    return where / "data"
