"""The CUDA kernels of token_resample without a GPU: their arithmetic on CPU threads, their machine code, their library.

With a GPU the tests at the end run the real thing.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_token_resample import KEEPS as CELLS
from test_token_resample import inputs, naive, naive_upsample, upsample_inputs

from segvit.ops import token_downsample, token_upsample

LAYOUTS = {  # channels: (channels of a pack, packs of a thread, warps of a row) in float32, in bfloat16
    7: ((1, 16, 1), (1, 16, 1)),
    12: ((4, 1, 1), (1, 16, 1)),
    16: ((4, 1, 1), (8, 1, 1)),
    200: ((4, 2, 1), (8, 1, 1)),
    517: ((1, 16, 2), (1, 16, 2)),
    768: ((4, 3, 2), (8, 3, 1)),
    1024: ((4, 4, 2), (8, 4, 1)),
    1152: ((4, 3, 4), (8, 3, 2)),
    2040: ((4, 4, 4), (8, 4, 2)),
    4088: ((4, 8, 4), (8, 4, 4)),
}
KEEPS = {
    "stride 2": 2,
    "stride 4": 4,
    "index": torch.tensor([[0, 14, 7, 8], [5, 4, 3, 13]]),
    "repeated": torch.tensor([[3, 3, 3, 1], [0, 1, 0, 1]]),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels compiled for CPU threads."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("cuda") / "kernels.so"
    from torch.utils.cpp_extension import include_paths

    folders = [f"-I{folder}" for folder in include_paths()]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, *folders, str(ROOT / "tests" / "cuda_on_cpu.cpp"), "-o", str(out)]
    probe = "#include <atomic>\n#include <barrier>\nint a; std::atomic_ref<int> b(a); std::barrier<> c(1);"
    probing = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(probing, input=probe, text=True, capture_output=True).returncode:
        pytest.skip(f"{compiler} has no <barrier> and atomic_ref of C++20")
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(out))


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def ints(*values):
    return (ctypes.c_int * len(values))(*values)


def linked(kernels, index, prefix, tokens):
    """head and last [B, tokens] and next [B, prefix + M] of an index, or None."""
    if index is None:
        return None
    lists = torch.zeros(len(index) * (2 * tokens + prefix + index.shape[1]), dtype=torch.int32)
    kernels.link_places(pointer(index), len(index), prefix, index.shape[1], tokens, pointer(lists))
    return lists


def close(got, want, dtype):
    """Equal to the float32 reference of the same numbers, but for one rounding to the kernel's dtype."""
    torch.testing.assert_close(got.float(), want.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("C", LAYOUTS)
def test_rows_lie_in_registers_as_meant(kernels, C):
    for element_bytes, want in zip((4, 2), LAYOUTS[C]):
        found = ints(0, 0, 0)
        kernels.layout_of(C, element_bytes, found)
        assert tuple(found) == want
        vec, packs, warps = found
        assert 32 * vec * packs * warps >= C
        assert C % vec == 0


@pytest.mark.parametrize(("C", "element_bytes"), [(2049, 4), (2049, 2), (4100, 4), (4104, 2)])
def test_rows_too_long_have_no_layout(kernels, C, element_bytes):
    found = ints(0, 0, 0)
    kernels.layout_of(C, element_bytes, found)
    assert found[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("C", "keep", "prefix", "B"),
    [(C, "stride 2", 1, 2) for C in LAYOUTS]
    + [(16, "stride 4", 0, 2), (16, "index", 2, 2), (16, "repeated", 1, 2), (517, "repeated", 0, 2)]
    + [(517, "stride 2", 0, 1), (1152, "stride 2", 0, 1)],  # rows that leave a slot of the last block empty
)
def test_downsample_kernels_on_cpu_threads(kernels, dtype, C, keep, prefix, B):
    grid, keep, blocks = (3, 5), KEEPS[keep], 2
    T = prefix + 15
    leaves = [torch.randn(shape).to(dtype) for shape in ((B, T, C), (C,), (C,))]
    exact = [t.float().requires_grad_() for t in leaves]
    want = token_downsample(*exact, 1e-6, grid, keep, backend="reference")
    upstream = [torch.randn(t.shape).to(dtype) for t in want]
    want_grads = torch.autograd.grad(want, exact, [t.float() for t in upstream])
    even = isinstance(keep, int)
    stride, low_width = (keep, -(-5 // keep)) if even else (1, 5)
    kept = want[1].shape[1] - prefix
    out, grads = ([torch.full_like(t, torch.nan, dtype=dtype) for t in group] for group in (want, leaves))
    mean, rstd = torch.empty(B, T), torch.empty(B, T)
    lists = linked(kernels, None if even else keep, prefix, T)
    partial = torch.full((blocks, 2, C), torch.nan)
    name = "downsample_f32" if dtype == torch.float32 else "downsample_bf16"
    getattr(kernels, name)(
        *(pointer(t) for t in leaves),
        pointers(*upstream),
        ints(prefix, 5, stride, low_width, kept, T),
        pointer(lists),
        B,
        C,
        ctypes.c_float(1e-6),
        blocks,
        pointers(*out),
        pointer(mean),
        pointer(rstd),
        pointer(partial),
        pointers(*grads),
    )
    for got, expected in zip((*out, *grads), (*want, *want_grads)):
        close(got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [7, 12, 264])
@pytest.mark.parametrize("stride", [1, 2, 3, 9])
@pytest.mark.parametrize("extra", [None, [[1, 7, 7], [14, 3, 0]]], ids=["even", "extra"])
def test_upsample_kernels_on_cpu_threads(kernels, dtype, C, stride, extra):
    B, P, h, w = 2, 1, 3, 5
    extra = None if extra is None else torch.tensor(extra)
    low = -(-h // stride), -(-w // stride)
    E = 0 if extra is None else extra.shape[1]
    x, skip = (torch.randn(B, P + n, C).to(dtype) for n in (low[0] * low[1] + E, h * w))
    exact = x.float().requires_grad_()
    want = token_upsample(exact, skip.float(), (h, w), stride, extra, backend="reference")
    upstream = torch.randn_like(want).to(dtype)
    (want_grad,) = torch.autograd.grad(want, exact, upstream.float())
    out, grad = torch.full_like(skip, torch.nan), torch.full_like(x, torch.nan)
    lists = linked(kernels, extra, 0, h * w)
    getattr(kernels, "upsample_f32" if dtype == torch.float32 else "upsample_bf16")(
        *(pointer(t) for t in (x, skip, upstream)),
        ints(P, h, w, stride, *low, E),
        pointer(None if lists is None else lists[B * h * w :]),
        pointer(extra),
        B,
        C,
        3,
        pointer(out),
        pointer(grad),
    )
    close(out, want, dtype)
    close(grad, want_grad, dtype)


@pytest.fixture(scope="module")
def library():
    found = list((ROOT / "segvit").glob("_C_cuda*.so"))
    if not found:
        pytest.skip("segvit._C_cuda was not built: no CUDA toolkit that fits PyTorch")
    return found[0]


def test_no_kernel_spills_on_any_architecture(library):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    usage = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    assert len({name for name, *_ in functions}) > 40
    assert not [f for f in functions if int(f[2])]
    code = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True).stdout
    assert "LDG.E.128" in code
    assert not re.search(r"\b(LDL|STL)\b", code)


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_libraries_ask_for_the_stable_abi_alone(name):
    """Nothing of LibTorch's C++ is in what the dynamic linker must find, so any torch from 2.10 on will do."""
    found = list((ROOT / "segvit").glob(f"{name}.*.so"))
    if not found or not shutil.which("nm"):
        pytest.skip(f"segvit.{name} was not built here, or there is no nm")
    command = ["nm", "-D", "--undefined-only", "-C", found[0]]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.strip().split(" ", 1)[-1] for line in listing]
    strange = [name for name in names if re.match(r"(c10|at|torch)::", name)]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not strange


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [12, 44, 257, 768, 1024, 4096])
@pytest.mark.parametrize("keep", [2, CELLS["repeated"]], ids=["stride", "repeated"])
def test_cuda_kernels_on_a_gpu(dtype, C, keep):
    """Values and gradients against float64, the same bits twice, for both operators."""
    exact = [t.detach().to(dtype).double().requires_grad_() for t in inputs(C=C)]
    want = naive(*exact, 1e-6, (5, 7), keep)
    upstream = [torch.randn(t.shape).to(dtype) for t in want]
    want = (*want, *torch.autograd.grad(want, exact, [t.double() for t in upstream]))
    runs = []
    for _ in range(2):
        given = [t.detach().to("cuda", dtype).requires_grad_() for t in exact]
        index = keep if isinstance(keep, int) else keep.cuda()
        out = token_downsample(*given, 1e-6, (5, 7), index, backend="native")
        runs.append((*out, *torch.autograd.grad(out, given, [t.cuda() for t in upstream])))
    for a, b, expected in zip(*runs, want):
        assert torch.equal(a, b)
        error = (a.double().cpu() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(dtype).eps
    extra = None if isinstance(keep, int) else keep
    exact = [t.detach().to(dtype).double().requires_grad_() for t in upsample_inputs(C=C, extra=extra)]
    want = naive_upsample(*exact, (5, 7), 2, extra)
    upstream = torch.randn(want.shape).to(dtype)
    given = [t.detach().to("cuda", dtype).requires_grad_() for t in exact]
    got = token_upsample(*given, (5, 7), 2, None if extra is None else extra.cuda(), backend="native")
    results = zip(
        (got, *torch.autograd.grad(got, given, upstream.cuda())),
        (want, *torch.autograd.grad(want, exact, upstream.double())),
    )
    for a, expected in results:
        assert (a.double().cpu() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "P", "grid", "C"),
    [(8, 1, (64, 64), 768), (1, 0, (5, 7), 1024), (1, 0, (5, 7), 517), (3, 2, (1, 1), 64), (2, 0, (33, 1), 2048)],
)
def test_cuda_kernels_at_many_rows_and_few(B, P, grid, C):
    """More rows than are resident at once, a slot of the last block without a row, an unaligned view."""
    buffer = torch.randn(B * (P + grid[0] * grid[1]) * C + 1, device="cuda")
    x = buffer[1:].view(B, -1, C).requires_grad_()
    weight, bias = (torch.randn(C, device="cuda", requires_grad=True) for _ in range(2))
    for keep in (2, torch.randint(0, grid[0] * grid[1], (B, 3)).cuda(), torch.zeros(B, 0, dtype=torch.long).cuda()):
        runs = []
        for backend in ("native", "reference"):
            out = token_downsample(x, weight, bias, 1e-6, grid, keep, backend=backend)
            loss = sum((t * t).sum() for t in out)
            runs.append((*out, *torch.autograd.grad(loss, (x, weight, bias))))
        for a, b in zip(*runs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_kernels_are_captured_in_a_graph():
    """Forward and backward, replayed on a stream of their own."""
    leaves = [t.detach().float().cuda().requires_grad_() for t in inputs()]
    extra = CELLS["index"].cuda()

    def there_and_back():
        y, _, kept = token_downsample(*leaves, 1e-6, (5, 7), 2, backend="native")
        kept = torch.cat([kept, kept[:, :4]], 1)
        up = token_upsample(kept, y, (5, 7), 2, extra, backend="native")
        return (up, *torch.autograd.grad((up * up).sum(), leaves))

    want = [t.detach().clone() for t in there_and_back()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = there_and_back()
    for t in got:
        t.detach().zero_()
    graph.replay()
    for a, b in zip(got, want):
        assert torch.equal(a, b)
