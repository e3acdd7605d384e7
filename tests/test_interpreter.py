"""The kernels' tests under Triton's interpreter: a process of its own, because Triton decides at import."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")


def test_kernels_interpreted_on_the_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpretable"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 10
