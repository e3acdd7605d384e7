"""Machine code of the Triton kernels, compiled ahead of time: nothing spills, and matrix products use tensor cores."""

import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import static

        return static.static_table()
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_every_kernel_compiles_for_every_architecture(rows):
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {row["kernel"] for row in rows if row["op"] == "atm"} == {
        "atm_forward",
        "atm_backward_keys",
        "atm_backward_queries",
    }
    assert {row["kernel"] for row in rows if row["op"] == "mask_decode"} == {
        "mask_decode_table",
        "mask_decode_order",
        "mask_decode_pack",
        "mask_decode_pixels",
    }
    assert {row["kernel"] for row in rows if row["op"] == "mask_loss"} == {
        "mask_loss_plan",
        "mask_loss_labels",
        "mask_loss_sums",
        "mask_loss_finish",
        "mask_loss_gradient",
        "mask_loss_join",
    }


def test_nothing_spills(rows):
    assert not [row for row in rows if row["spill_bytes"]]


def test_shared_memory_fits(rows):
    assert not [row for row in rows if row["shared_bytes"] > 1024 * (99 if row["arch"] == "sm_80" else 227)]


def test_half_precision_products_use_tensor_cores(rows):
    atm = [row for row in rows if row["op"] == "atm"]
    assert not [row for row in atm if row["tensor_core"] == row["variant"].startswith("fp32")]
    pixels = [row for row in rows if row["kernel"] == "mask_decode_pixels"]  # float32 in three TF32 products
    assert pixels
    assert all(row["tensor_core"] for row in pixels)
