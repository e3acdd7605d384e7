"""The kernels' tests under Triton's interpreter: a process of its own, because Triton decides at import."""

import re
import sys

import pytest
from conftest import ROOT, Ahead

pytest.importorskip("triton")
FILES = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "\n@kernel" in path.read_text(encoding="utf-8"))
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpretable"]
AHEAD = Ahead([*PYTEST, *FILES], TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_kernels_interpreted_on_the_cpu():
    code, said = AHEAD.wait()
    assert code == 0, said[-8000:]
    assert int(re.search(r"(\d+) passed", said)[1]) >= 10
