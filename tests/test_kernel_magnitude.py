"""Fourier magnitudes and their residuals against full transforms in float64, and phase retrieval that uses them."""

from math import nan

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import InputError, ShapeError
from invdiff.kernels import fourier_magnitude as room
from invdiff.kernels.fourier_magnitude import cpu, reference
from invdiff.likelihoods import Gaussian
from invdiff.operators import PhaseRetrieval, Pixelwise

SIZES = [
    (2, 3, 6, 8),
    (1, 1, 1, 1),
    (2, 1, 7, 9),
    (1, 2, 5, 4),
    (3, 2, 4, 5),
    (1, 2, 1, 6),
    (1, 1, 34, 33),
]
"""Pictures, channels, height, width: even, odd and mixed, single lines, several blocks of the Triton kernel."""
EXACT = ((torch.float64, 1e-13), (torch.float32, 1e-6))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x, y, std):
    """Magnitudes, chi-square and gradient from the full transform and autograd of the definition."""
    leaf = x.clone().requires_grad_()
    p = torch.fft.fftshift(torch.fft.fft2(leaf, norm="ortho"), dim=(-2, -1)).abs()
    chi2 = (((y - p) / std) ** 2).flatten(1).sum(1)
    (grad,) = torch.autograd.grad(-0.5 * chi2.sum(), leaf)
    return p.detach(), chi2.detach(), grad


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert bool(torch.isfinite(got).all())
    if expected.numel():
        assert float(((got.cpu().double() - expected).abs() / expected.abs().max()).max()) < tolerance


def check(version, device: str) -> None:
    """Both functions of a version, with poisoned outputs."""
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(nan)
    try:
        for n, c, h, w in SIZES[::2] if "gpu" in version.__name__ and device == "cpu" else SIZES:
            for dtype, tolerance in EXACT:
                x = rand(n, c, h, w).to(dtype)
                half = torch.fft.rfft2(x).to(device)
                one = rand(1, c, h, w, seed=1).to(dtype)
                for y in (one, rand(n, c, h, w, seed=2).to(dtype)):
                    for std in (torch.tensor(0.7, dtype=dtype), (rand(c, h, w, seed=3).abs() + 0.3).to(dtype)):
                        p, chi2, grad = by_hand(x.double(), y.double(), std.double())
                        close(version.magnitudes(half, w), p, tolerance)
                        got, spectrum = version.misfit(half.clone(), y.to(device), std.to(device))
                        assert got.dtype == dtype
                        close(got, chi2, tolerance)
                        close(torch.fft.irfft2(spectrum.cpu(), s=(h, w), norm="forward"), grad, 4 * tolerance)
                        whole = torch.fft.rfft2(grad, norm="forward")  # of a real picture, in every column
                        close(torch.view_as_real(spectrum.cpu()), torch.view_as_real(whole), 4 * tolerance)
        half = torch.zeros(0, 2, 4, 3, dtype=torch.complex64, device=device)  # which no transform makes on a CPU
        assert version.magnitudes(half, 5).shape == (0, 2, 4, 5)
        chi2, spectrum = version.misfit(half, torch.zeros(1, 2, 4, 5, device=device), torch.ones((), device=device))
        assert (chi2.shape, spectrum.shape) == ((0,), half.shape)
    finally:
        torch.empty = empty


def check_extremes(version, device: str) -> None:
    """No magnitude has no phase; squares that under- or overflow do no harm; what is not a number stays so."""
    y, std = torch.ones(1, 1, 4, 4, device=device), torch.ones((), device=device)
    for factor in (0.0, 1e-25, 1e25):
        half = factor * torch.fft.rfft2(rand(1, 1, 4, 4)).to(torch.complex64).to(device)
        expected = half.abs().cpu()
        torch.testing.assert_close(version.magnitudes(half, 4)[..., 2:, 2].cpu(), expected[..., :2, 0] / 4)
        _, spectrum = version.misfit(half.clone(), y, std)
        phase = half.sgn() if factor else torch.zeros_like(half)
        right = (1.0 - half.abs() / 4) / 4 * phase
        torch.testing.assert_close(spectrum, right, rtol=1e-5, atol=0)
    half = torch.full((1, 1, 4, 3), complex(nan, 1.0), dtype=torch.complex64, device=device)
    assert bool(version.magnitudes(half, 4).isnan().all())
    assert bool(version.misfit(half, y, std)[0].isnan().all())


@pytest.mark.parametrize("version", [reference, cpu])
def test_the_definition(version):
    check(version, "cpu")
    check_extremes(version, "cpu")


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("pixel_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize(("shape", "oversampling"), [((2, 6, 8), 2.0), ((1, 7, 9), 1.2), ((1, 5, 5), 0.0)])
def test_phase_retrieval_takes_one_pass_and_agrees_with_autograd(
    shape, oversampling, pixel_range, diagonal, monkeypatch
):
    A = PhaseRetrieval(shape, oversampling, pixel_range=pixel_range)
    assert isinstance(A, Pixelwise)
    x = rand(4, *shape)
    several = A(rand(4, *shape, seed=1)) + 0.1
    std = rand(*A.out_shape, seed=2).abs() + 0.2 if diagonal else 0.3
    expected = A(x)
    called = []
    run = cpu.misfit
    monkeypatch.setattr(cpu, "misfit", lambda *a: called.append(1) or run(*a))
    for measurement in (several[0], several):
        likelihood = Gaussian(A, measurement, std)
        leaf = x.clone().requires_grad_()
        value = likelihood.log_prob(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        for least, times in ((10**9, 0), (1, 1)):
            monkeypatch.setattr(room, "_LEAST", least)
            called.clear()
            got, grad = likelihood.log_prob_and_grad(x)
            assert len(called) == times
            assert grad.is_contiguous() or not times
            assert not grad.requires_grad
            torch.testing.assert_close(got, value.detach(), rtol=1e-13, atol=0)
            torch.testing.assert_close(grad, slope, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(A(x), expected, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(likelihood.log_prob(x), value.detach(), rtol=1e-13, atol=0)
        assert torch.autograd.gradcheck(A, (x[:1].clone().requires_grad_(),), fast_mode=True)
        mapped = torch.func.vmap(lambda t: A(t[None])[0])(x)
        torch.testing.assert_close(mapped, expected, rtol=1e-13, atol=1e-13)
        with kernels.use("reference"):
            torch.testing.assert_close(likelihood.log_prob_and_grad(x)[1], slope, rtol=1e-13, atol=1e-13)


def test_pictures_of_any_strides(monkeypatch):
    monkeypatch.setattr(room, "_LEAST", 1)
    A, x = PhaseRetrieval((2, 6, 8)), rand(3, 2, 8, 12).mT[:, :, ::2]
    likelihood = Gaussian(A, A(rand(1, 2, 6, 8, seed=1))[0], 0.2)
    torch.testing.assert_close(A(x), A(x.contiguous()))
    torch.testing.assert_close(likelihood.log_prob_and_grad(x), likelihood.log_prob_and_grad(x.contiguous()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # PyTorch's own, of tangents
def test_tangents_pass(monkeypatch):
    monkeypatch.setattr(room, "_LEAST", 1)
    A, x, v = PhaseRetrieval((1, 6, 8)), rand(2, 1, 6, 8), rand(2, 1, 6, 8, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(A(dual)).tangent
    step = 1e-6
    torch.testing.assert_close(tangent, (A(x + step * v) - A(x - step * v)) / (2 * step), rtol=1e-6, atol=1e-6)


def test_bad_input_is_told(unchecked):
    half, y, std = torch.fft.rfft2(torch.zeros(2, 3, 4, 5)), torch.zeros(1, 3, 4, 5), torch.ones(())
    with pytest.raises(ShapeError, match=r"width 7 are \(n, c, h, 4\), got \(2, 3, 4, 3\)"):
        room.magnitudes(half, 7)
    with pytest.raises(ShapeError, match=r"\(1 or 2, c, h, w\).* got \(3, 3, 4, 5\)"):
        room.misfit(half, y.expand(3, 3, 4, 5), std)
    with pytest.raises(ShapeError, match=r"got \(1, 3, 4, 5\) and \(5,\)"):
        room.misfit(half, y, torch.ones(5))
    with pytest.raises(InputError, match="bring them together"):
        room.misfit(half, y.double(), std)


SCRIPT = """
from test_kernel_magnitude import check, check_extremes
from invdiff.kernels.fourier_magnitude import gpu
check(gpu, {device!r})
check_extremes(gpu, {device!r})
"""


@has_triton
def test_triton_in_the_interpreter():
    check_alone(SCRIPT.format(device="cpu"), interpret=True)


def check_operator() -> None:
    """Phase retrieval on the GPU with the kernel against that without, and without a wait for the device."""
    kernels.ON_GPU |= {"fourier_magnitude"}
    for shape in ((3, 64, 64), (2, 31, 50)):
        A, x = PhaseRetrieval(shape).cuda(), rand(4, *shape).cuda()
        likelihood = Gaussian(A, A(rand(1, *shape, seed=1).cuda())[0], 0.2).cuda()
        likelihood.log_prob_and_grad(x)
        torch.cuda.set_sync_debug_mode("error")
        got = likelihood.log_prob_and_grad(x)
        torch.cuda.set_sync_debug_mode("default")
        single = likelihood.log_prob_and_grad(x.float())[1]
        with kernels.use("reference"):
            expected = likelihood.log_prob_and_grad(x)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        close(single, expected[1].cpu(), 1e-5)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    script = SCRIPT.format(device="cuda") + "from test_kernel_magnitude import check_operator\ncheck_operator()"
    check_alone(script, interpret=False)
