"""Residuals of circular convolutions in the Fourier domain against those of pixels, and blurs that use them."""

from math import nan

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import InputError, ShapeError
from invdiff.kernels import spectral_misfit as room
from invdiff.kernels.spectral_misfit import cpu, reference
from invdiff.likelihoods import Gaussian
from invdiff.operators import Blur, gaussian_kernel, motion_kernel

SIZES = [(2, 3, 6, 8), (1, 1, 1, 1), (2, 1, 7, 9), (1, 2, 5, 4), (1, 1, 34, 33), (3, 2, 1, 5)]
"""Pictures, channels, height, width: even, odd and mixed, single lines, several blocks of the Triton kernel."""


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert bool(torch.isfinite(got).all())
    assert float(((got.cpu().double() - expected).abs() / expected.abs().max()).max()) < tolerance


def check(version, device: str) -> None:
    """Against convolutions by full transforms and autograd in float64, with poisoned outputs."""
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(nan)
    try:
        for n, c, h, w in SIZES:
            for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
                for channels, problems in ((1, 1), (c, n)):
                    x, y, f = rand(n, c, h, w), rand(problems, c, h, w, seed=1), rand(channels, h, w, seed=2)
                    std = torch.tensor(0.7, dtype=dtype)
                    leaf = x.to(dtype).double().clone().requires_grad_()
                    p = torch.fft.ifft2(torch.fft.fft2(leaf) * torch.fft.fft2(f.to(dtype).double())).real
                    chi2 = (((y.to(dtype).double() - p) / std.double()) ** 2).flatten(1).sum(1)
                    (grad,) = torch.autograd.grad(-0.5 * chi2.sum(), leaf)
                    spectra = [torch.fft.rfft2(t.to(dtype)).to(device) for t in (x, y, f)]
                    got, spectrum = version.misfit(*spectra, std.to(device), w)
                    assert got.dtype == dtype
                    close(got, chi2.detach(), tolerance)
                    close(torch.fft.irfft2(spectrum.cpu(), s=(h, w), norm="forward"), grad, tolerance)
        half, std = torch.zeros(0, 2, 4, 3, dtype=torch.complex64, device=device), torch.ones((), device=device)
        one = torch.zeros(1, 2, 4, 3, dtype=torch.complex64, device=device)
        chi2, spectrum = version.misfit(half, one, one[0], std, 5)
        assert (chi2.shape, spectrum.shape) == ((0,), half.shape)
    finally:
        torch.empty = empty


@pytest.mark.parametrize("version", [reference, cpu])
def test_parseval(version):
    check(version, "cpu")


def test_what_is_not_a_number_stays_so():
    half = torch.zeros(2, 1, 4, 3, dtype=torch.complex64)
    half[1, 0, 2, 1] = complex(nan, 0.0)
    for version in (reference, cpu):
        one = torch.ones(1, 1, 4, 3, dtype=torch.complex64)
        chi2, _ = version.misfit(half.clone(), one, one[0], torch.ones(()), 4)
        assert chi2.isnan().tolist() == [False, True]


@pytest.mark.parametrize("noise", ["scalar", "one value", "diagonal"])
@pytest.mark.parametrize("boundary", ["circular", "reflect", "valid"])
@pytest.mark.parametrize("method", ["fft", "direct"])
def test_blurs_agree_with_autograd(method, boundary, noise, monkeypatch):
    A = Blur(rand(2, 5, 4), (2, 9, 8), boundary, method=method)
    x, y = rand(4, 2, 9, 8), rand(4, *A.out_shape, seed=1)
    std = {"scalar": 0.3, "one value": torch.tensor([0.3]), "diagonal": rand(*A.out_shape, seed=2).abs() + 0.2}[noise]
    called = []
    run = cpu.misfit
    monkeypatch.setattr(cpu, "misfit", lambda *a: called.append(1) or run(*a))
    monkeypatch.setattr(room, "_LEAST", 1)
    for measurement in (y[0], y):
        likelihood = Gaussian(A, measurement, std)
        leaf = x.clone().requires_grad_()
        value = likelihood.log_prob(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        called.clear()
        got, grad = likelihood.log_prob_and_grad(x)
        assert len(called) == (method == "fft" and boundary == "circular" and noise != "diagonal")
        torch.testing.assert_close(got, value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, slope, rtol=1e-11, atol=1e-11)
        got, grad = likelihood.log_prob_and_grad(leaf)  # both can be differentiated once more
        v = rand(*x.shape, seed=5)
        (hessian,) = torch.autograd.grad((grad * v).sum(), leaf, retain_graph=True)
        s = torch.as_tensor(std, dtype=torch.float64)
        torch.testing.assert_close(hessian, -A.adjoint(A(v) / s / s), rtol=1e-11, atol=1e-11)
        (slope_of_value,) = torch.autograd.grad(got.sum(), leaf)
        torch.testing.assert_close(slope_of_value, slope, rtol=1e-11, atol=1e-11)
        mapped = torch.func.vmap(lambda t, f=likelihood: f.log_prob_and_grad(t)[1])(x[None])[0]
        torch.testing.assert_close(mapped, slope, rtol=1e-11, atol=1e-11)
        with kernels.use("reference"):
            torch.testing.assert_close(likelihood.log_prob_and_grad(x)[1], slope, rtol=1e-11, atol=1e-11)


def test_single_precision_of_a_good_fit():
    # Pictures as bright as 1 and residuals of a hundredth: differences of transforms lose no more than those of pixels.
    A = Blur(motion_kernel(15), (3, 64, 64), "circular", method="fft")
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (A(x) + 0.01 * rand(4, 3, 64, 64)).float()
    likelihood = Gaussian(A, y, 0.01)
    value, grad = likelihood.log_prob_and_grad(x.float())
    exact, slope = likelihood.log_prob_and_grad(x.float().double())
    assert room.fused(x.float())
    assert float((value - exact).abs().max() / likelihood.deviance(x).max()) < 2e-5
    assert float((grad - slope).abs().max() / slope.abs().max()) < 2e-5


def test_bad_input_is_told(unchecked):
    half, std = torch.fft.rfft2(torch.zeros(2, 3, 4, 5)), torch.ones(())
    with pytest.raises(ShapeError, match=r"width 7 are \(n, c, h, 4\), got \(2, 3, 4, 3\)"):
        room.misfit(half, half[:1], half[0], std, 7)
    with pytest.raises(ShapeError, match=r"responses \(1 or 3, h, k\), got \(2, 3, 4, 3\) and \(2, 4, 3\)"):
        room.misfit(half, half, half[0, :2], std, 5)
    with pytest.raises(InputError, match="one precision"):
        room.misfit(half, half[:1], half[0].to(torch.complex128), std, 5)


SCRIPT = """
from test_kernel_spectral import check
from invdiff.kernels.spectral_misfit import gpu
check(gpu, {device!r})
"""


@has_triton
def test_triton_in_the_interpreter():
    check_alone(SCRIPT.format(device="cpu"), interpret=True)


def check_operator() -> None:
    """A blur on the GPU with the kernel against that without, and without a wait for the device."""
    kernels.ON_GPU |= {"spectral_misfit"}
    A, x = Blur(gaussian_kernel(9, 2.0), (3, 50, 64), "circular", method="fft").cuda(), rand(4, 3, 50, 64).cuda()
    likelihood = Gaussian(A, rand(3, 50, 64, seed=1).cuda(), 0.2).cuda()
    likelihood.log_prob_and_grad(x)
    torch.cuda.set_sync_debug_mode("error")
    got = likelihood.log_prob_and_grad(x)
    torch.cuda.set_sync_debug_mode("default")
    with kernels.use("reference"):
        expected = likelihood.log_prob_and_grad(x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    script = SCRIPT.format(device="cuda") + "from test_kernel_spectral import check_operator\ncheck_operator()"
    check_alone(script, interpret=False)
