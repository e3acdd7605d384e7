"""Run by test_resume.py: trains a folder again and again, killed at random moments, until 20 kills have been survived.

python killed.py DATA OUT SEED    # prints one JSON value: kills, and the folders of the runs that got through
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import segvit.runs

KILLS = 20
OPTIONS = {
    "backbone": "test_vit",
    "pretrained": False,
    "crop": 32,
    "batch_size": 2,
    "steps": 40,
    "validate_every": 7,
    "checkpoint_every": 1,
    "lr": 1e-3,
    "ema": 0.9,
    "workers": 0,
    "resume": True,
}


def train(data: str, out: Path, files: int | None) -> None:
    """In a process of its own; with `files`, it is killed at that many events of its folder's files."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if arguments and isinstance(arguments[0], str | Path) and str(out) in str(arguments[0]):
            seen += 1
            if seen == files:
                os.kill(os.getpid(), signal.SIGKILL)

    if files is not None:
        sys.addaudithook(watch)
    segvit.runs.train_folder(data, str(out), **OPTIONS)


def start(data: str, out: Path, files: int | None = None) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        train(data, out, files)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> bool:
    """Whether it ended by itself within that time; killed else. Anything but success or a kill is an error."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.WEXITSTATUS(status):
        sys.exit(f"training failed with {os.WEXITSTATUS(status)}")
    return True


def main(data: str, out: Path, seed: int) -> None:
    random.seed(seed)
    before = time.monotonic()
    assert ended(start(data, out / "whole"), 600)
    whole = time.monotonic() - before
    kills, runs = 0, []
    while kills < KILLS:
        runs.append(out / f"run{len(runs)}")
        done = False
        while not done and kills < KILLS:
            by_file = random.random() < 0.5
            files = random.randint(1, 150) if by_file else None
            done = ended(start(data, runs[-1], files), 600 if by_file else random.uniform(0.0, 0.5 * whole))
            kills += not done
        if not done:
            assert ended(start(data, runs[-1]), 600)
    print(json.dumps({"kills": kills, "runs": [str(run) for run in runs]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
