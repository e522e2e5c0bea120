"""The separable stencil and block-wise Fourier blur against dense matrices in float64; and which version is chosen."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import InputError, ShapeError
from invdiff.kernels import separable_stencil as room
from invdiff.kernels.separable_stencil import Tables, bands, cpu, reference, separable_stencil, tables
from invdiff.kernels.separable_stencil.bands import periodic_run
from invdiff.kernels.separable_stencil.cost import cheaper_on_cpu
from invdiff.operators import Blur, Downsampling, convolution, gaussian_kernel, motion_kernel
from invdiff.operators.boundary import Axis
from invdiff.operators.downsampling import resize_matrix

HERE = Path(__file__).parent
BOUNDARIES = ["circular", "reflect", "zero", "valid"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Left and right matrices: every boundary, odd and even stencils, strides, transposes, wide and empty bands."""
    cases = {}
    for i, boundary in enumerate(BOUNDARIES):
        L = Axis(17 + i, 5 + i, boundary).matrix(rand(1, 5 + i, seed=i))
        R = Axis(22 - i, 4 + i, boundary).matrix(rand(3, 4 + i, seed=9 + i))
        cases[boundary] = (L, R)
        cases[f"{boundary}, transposed"] = (L.mT, R.mT)
    for factor in (2, 3, 4):
        D = resize_matrix(12 * factor, factor, "bicubic", "truncate")[None]
        cases[f"down {factor}"] = (D, resize_matrix(8 * factor, factor, "bilinear", "symmetric")[None])
        cases[f"up {factor}"] = (D.mT, D.mT)
    cases["dense"] = (rand(1, 6, 7), rand(1, 5, 9, seed=1))
    cases["rows of zeros"] = (torch.eye(6, dtype=torch.float64)[None] * (torch.arange(6) % 2), rand(1, 1, 4))
    cases["one by one"] = (rand(1, 1, 1), rand(1, 1, 1, seed=1))
    return cases


PAIRS = pairs()


def windows(L: torch.Tensor, R: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The compiled sweep's tables, whatever the cost model thinks of the size."""
    (lf, lw), (rf, rw) = bands(L), bands(R)
    run = periodic_run(rf, rw[:, :, 0])
    return [lf, lw[:, :, 0].to(dtype).contiguous(), rf, rw[:, :, 0].to(dtype).contiguous(), torch.tensor(run)]


def exact(x: torch.Tensor, L: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    return torch.einsum("cph,nchw,cqw->ncpq", L.expand(3, -1, -1), x.double(), R.expand(3, -1, -1))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp_min(1e-30) if expected.numel() else 1.0
    assert bool(torch.isfinite(got).all())
    assert got.shape == expected.shape
    assert not expected.numel() or float((got.double() - expected).abs().max() / scale) < tolerance


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, so that what a kernel does not write shows."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: t.fill_(torch.nan) if (t := empty(*a, **k)).is_floating_point() else t
    )


def forced(L: torch.Tensor, R: torch.Tensor, dtype: torch.dtype = torch.float64) -> Tables:
    return Tables(L.to(dtype), R.to(dtype), windows(L, R, dtype), windows(L.mT, R.mT, dtype))


@pytest.mark.parametrize("name", PAIRS)
def test_compiled_sweep(name, monkeypatch):
    L, R = PAIRS[name]
    poison(monkeypatch)
    for batch in (0, 1, 2):
        x = rand(batch, 3, L.shape[2], R.shape[2])
        for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            got = cpu.separable_stencil(x.to(dtype), windows(L, R, dtype), L.shape[1], R.shape[1])
            assert got.dtype == dtype
            close(got, exact(x, L, R), tolerance)


@pytest.mark.parametrize("threads", [1, 2])
def test_strides_and_threads(threads):
    L, R = PAIRS["reflect"]
    x = rand(3, 40, 2 * L.shape[2], R.shape[2]).transpose(0, 1)[:, :, ::2]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = cpu.separable_stencil(x, windows(L, R, torch.float64), L.shape[1], R.shape[1])
    finally:
        torch.set_num_threads(before)
    close(got, exact(x, L, R), 1e-14)


@pytest.mark.parametrize("name", ["reflect", "circular, transposed", "down 4", "up 3"])
def test_adjoint_and_gradients(name):
    T = forced(*PAIRS[name])
    x = rand(2, 3, T.left.shape[2], T.right.shape[2])
    y = rand(2, 3, T.left.shape[1], T.right.shape[1], seed=1)
    forward, backward = separable_stencil(x, T), separable_stencil(y, T.mT)
    assert float((forward * y).sum()) == pytest.approx(float((x * backward).sum()), rel=1e-12)
    leaf = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: separable_stencil(t, T), (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda t: separable_stencil(t, T) ** 2, (leaf,), (y[:1].clone().requires_grad_(),), fast_mode=True
    )
    mapped = torch.func.vmap(lambda t: separable_stencil(t, T), in_dims=1)(torch.stack((x, 2 * x), dim=1))
    torch.testing.assert_close(mapped, torch.stack((forward, 2 * forward)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_operation_is_well_formed():
    T = forced(*PAIRS["down 2"])
    x = rand(2, 3, T.left.shape[2], T.right.shape[2]).requires_grad_()
    torch.library.opcheck(room._stencil, (x, T.left, T.right, T.forward, T.transposed))
    A = Blur(motion_kernel(5), (3, 9, 8), method="fft")
    sizes = [9, 5, 8, 5]
    for transpose in (False, True):
        arguments = (rand(6, 3, 9, 8).requires_grad_(), list(A._spectra(torch.float64)), sizes, "reflect", transpose)
        torch.library.opcheck(convolution._operation, arguments)


def test_windows_are_the_matrix():
    for L, R in PAIRS.values():
        for matrix in (L, R):
            for block, align in ((1, 1), (4, 8)):
                first, values = bands(matrix, block, align)
                c, outputs, inputs = matrix.shape
                again = torch.zeros(c, len(first) * block, inputs, dtype=torch.float64)
                for b, start in enumerate(first.tolist()):
                    for k in range(values.shape[-1]):
                        again[:, b * block : (b + 1) * block, (start + k) % inputs] += values[:, b, :, k]
                assert torch.equal(again[:, :outputs], matrix)
                assert values.shape[-1] % align == 0
                assert int(first.min()) >= 0 and int(first.max()) < inputs
    first, values = bands(Axis(40, 5, "circular").matrix(rand(1, 5)))
    assert values.shape[-1] == 5, "windows wrap around"
    assert periodic_run(first, values[:, :, 0])[2] == 1
    first, values = bands(resize_matrix(64, 4, "bicubic", "truncate")[None].mT)
    begin, end, period = periodic_run(first, values[:, :, 0])
    assert period == 4
    assert end - begin > 30


def test_bad_input_is_told(unchecked):
    T = tables(*PAIRS["reflect"], torch.float32, torch.device("cpu"))
    h, w = T.left.shape[2], T.right.shape[2]
    with pytest.raises(ShapeError, match="Pictures must be"):
        separable_stencil(torch.zeros(1, 3, h, w + 1), T)
    with pytest.raises(ShapeError, match="3 channels do not fit pictures of 2"):
        separable_stencil(torch.zeros(1, 2, h, w), T)
    with pytest.raises(InputError, match=r"tables are torch\.float32 on cpu, the pictures torch\.float64"):
        separable_stencil(torch.zeros(1, 3, h, w, dtype=torch.float64), T)
    with pytest.raises(InputError, match=r"floating-point pictures, got torch\.int64"):
        tables(*PAIRS["reflect"], torch.int64, torch.device("cpu"))


def test_use_chooses_the_version():
    assert kernels.chosen() == "auto"
    x = torch.zeros(1)
    with kernels.use("reference"):
        assert kernels.version("separable_stencil", x) == "reference"
        with kernels.use("auto"):
            assert kernels.version("separable_stencil", x) == "cpu"
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(kernels.version("separable_stencil", x)))
        thread.start()
        thread.join()
        assert seen == ["reference"], "one choice for all threads"
    assert kernels.chosen() == "auto"
    try:
        kernels.use("reference")
        assert kernels.chosen() == "reference"
    finally:
        kernels.use("auto")


def test_use_refuses_other_names(unchecked):
    with pytest.raises(InputError, match="takes 'auto' or 'reference', got 'fast'"):
        kernels.use("fast")


def test_operators_take_the_sweep_where_it_is_cheaper(monkeypatch):
    called: list[torch.Size] = []
    sweep = cpu.separable_stencil
    monkeypatch.setattr(cpu, "separable_stencil", lambda x, *rest: called.append(x.shape) or sweep(x, *rest))
    A, D = Blur(gaussian_kernel(5, 1.0), (1, 256, 256)), Downsampling((1, 256, 256), 2)
    x = rand(1, 1, 256, 256).float()
    for operator in (A, D):
        with kernels.use("reference"):
            y = operator(x)
            back = operator.adjoint(y)
        assert called == []
        close(operator(x), y.double(), 1e-6)
        close(operator.adjoint(y), back.double(), 1e-6)
        assert len(called) == 2
        called.clear()
    Blur(gaussian_kernel(5, 1.0), (1, 32, 32), method="separable")(rand(1, 1, 32, 32))
    assert called == [], "small pictures go through dense products"
    assert not cheaper_on_cpu(rand(1, 512, 512), rand(1, 512, 512), 512, 512, (0, 0, 1)), "dense matrices stay dense"


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_fourier_blur_in_blocks(boundary, monkeypatch):
    monkeypatch.setattr(convolution, "_block", lambda rows, columns: 2)
    for kernel in (rand(6, 5), rand(3, 6, 5)):
        A = Blur(kernel, (3, 14, 11), boundary, "fft")
        direct = Blur(kernel, (3, 14, 11), boundary, "direct")
        x = rand(5, 3, 14, 11)
        y = rand(5, *A.out_shape, seed=1)
        torch.testing.assert_close(A(x), direct(x))
        torch.testing.assert_close(A.adjoint(y), direct.adjoint(y))
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((A(leaf) * y).sum(), leaf)
        torch.testing.assert_close(gradient, A.adjoint(y))
        torch.testing.assert_close(torch.func.vmap(A)(x[:, None].expand(-1, 3, -1, -1, -1))[:, 1], A(x))


def test_the_transpose_counts_in_the_choice():
    # 16 outputs but a transpose of 64 x 64 values from 61 x 61 taps: a direct blur would take a thousand times as long.
    rows = Axis(64, 61, "valid")
    for device in ("cpu", "cuda"):
        assert convolution.choose(rows, rows, False, device) == "fft"


def check_tiles(device: str) -> None:
    """The Triton kernel against float64, with poisoned outputs."""
    from invdiff.kernels.separable_stencil import gpu

    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(torch.nan)
    try:
        for name in ("circular", "reflect, transposed", "zero", "valid", "down 4", "up 2", "rows of zeros"):
            L, R = PAIRS[name]
            for block, batch in ((16, 1), (32, 2), (16, 0)):
                made = [t.to(device) for side in (L, R) for t in room._tiles(side, block)]
                x = rand(batch, 3, 2 * L.shape[2], R.shape[2]).to(device)[:, :, ::2]
                for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
                    got = gpu.separable_stencil(x.to(dtype), made, L.shape[1], R.shape[1])
                    assert got.dtype == dtype
                    close(got.cpu(), exact(x.to(dtype).cpu(), L, R), tolerance)
    finally:
        torch.empty = empty


def check_operators() -> None:
    """Operators on the GPU in single precision against double."""
    for A in (Blur(gaussian_kernel(23, 3.0), (3, 256, 250)), *(Downsampling((3, 256, 320), f) for f in (2, 4, 8))):
        A.to("cuda")
        x = rand(5, *A.in_shape).cuda()
        assert A(x.float()).dtype == torch.float32
        close(A(x.float()).cpu(), A(x).cpu(), 1e-6)
        y = A(x)
        close(A.adjoint(y.float()).cpu(), A.adjoint(y).cpu(), 1e-6)
        compiled = torch.compile(A, fullgraph=True)
        close(compiled(x.float()).cpu(), A(x).cpu(), 1e-6)


@has_triton
def test_triton_in_the_interpreter():
    check_alone("from test_kernel_stencil import check_tiles\ncheck_tiles('cpu')", interpret=True)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    script = "from test_kernel_stencil import check_operators, check_tiles\ncheck_tiles('cuda')\ncheck_operators()"
    check_alone(script, interpret=False)


def test_reference_takes_the_cheaper_order():
    for p, h, q, w in ((3, 20, 20, 4), (20, 3, 4, 20)):
        L, R, x = rand(1, p, h), rand(1, q, w, seed=1), rand(2, 3, h, w, seed=2)
        close(reference.separable_stencil(x, L, R), exact(x, L, R), 1e-14)


def test_operators_compile_whole_once_their_tables_are_made():
    # In a process of its own: the checker of shapes, which the tests switch on, cannot be traced.
    source = """
import torch
from invdiff.operators import Blur, Downsampling, gaussian_kernel
x = torch.rand(2, 3, 64, 64)
for A in (Downsampling((3, 64, 64), 4), Blur(gaussian_kernel(15, 1.5), (3, 64, 64))):
    y = A(x)
    assert torch.equal(torch.compile(A, fullgraph=True, backend="aot_eager")(x), y)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
