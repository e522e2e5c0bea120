"""Measurements of single pixels against loops in float64, and the likelihoods that use them against autograd."""

from math import inf, nan
from pathlib import Path

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import InputError, ShapeError
from invdiff.kernels import pixelwise
from invdiff.kernels.pixelwise import Curve, cpu, reference
from invdiff.likelihoods import Gaussian
from invdiff.operators import HighDynamicRange, Inpainting, Pixelwise, random_mask

HERE = Path(__file__).parent
CURVES = {"identity": Curve(), "clipped": Curve(1.7, 0.35, 0.0, 1.0), "half open": Curve(-0.6, 0.1, -0.2, inf)}
SIZES = [(1, 1, 1), (3, 50, 17), (2, 1030, 1029), (0, 8, 3), (2, 9000, 4000)]
"""Rows, entries a row, how many are seen: one segment of the compiled version, several, ragged ones, none."""


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(d: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.randperm(d, generator=torch.Generator().manual_seed(d))[:m].sort().values
    place = torch.full((d,), -1, dtype=torch.int32)
    place[index] = torch.arange(m, dtype=torch.int32)
    return index, place


def by_hand(x, y, std, index, curve):
    """Chi-square and gradient as the definition says, entry by entry in float64."""
    x, y, std = x.double(), y.double(), std.double()
    index = torch.arange(x.shape[1]) if index is None else index
    u = curve.gain * x[:, index] - curve.offset
    w = (y - torch.where(u < curve.low, curve.low, torch.where(u > curve.high, curve.high, u))) / std
    slope = curve.gain * ((u >= curve.low) & (u <= curve.high)).double()
    return (w**2).sum(1), torch.zeros_like(x).index_add(1, index, w / std * slope)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert bool(torch.isfinite(got).all())
    if expected.numel():
        scale = expected.abs().max().clamp_min(1e-30)
        assert float((got.cpu().double() - expected).abs().max() / scale) < tolerance


def check(versions, device: str, kinds) -> None:
    """All three functions of a version, with poisoned outputs."""
    empty, like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **k: t.fill_(nan) if (t := empty(*a, **k)).is_floating_point() else t
    torch.empty_like = lambda *a, **k: like(*a, **k).fill_(nan)
    try:
        for n, d, m in SIZES[:4] if "gpu" in versions.__name__ and device == "cpu" else SIZES:
            index, place = seen(d, m)
            for dtype, tolerance in kinds:
                x = rand(n, 2 * d)[:, ::2].to(dtype)
                y, one = rand(n, m, seed=1).to(dtype), rand(1, m, seed=2).to(dtype)
                on = [t.to(device) for t in (index, place)]
                if n:
                    assert torch.equal(versions.gather(x.to(device), on[0]).cpu(), x[:, index])
                    filled = torch.zeros(n, d, dtype=dtype).index_copy(1, index, y)
                    assert torch.equal(versions.spread(y.to(device), *on).cpu(), filled)
                for curve in CURVES.values():
                    for std in (torch.tensor([0.7]), rand(m, seed=3).abs() + 0.3):
                        std = std.to(dtype)
                        for measured in (y, one):
                            arguments = [t.to(device) for t in (x.contiguous(), measured, std)]
                            chi2, grad = versions.misfit(*arguments, *on, curve)
                            expected = by_hand(x, measured, std, index, curve)
                            close(chi2, expected[0], tolerance)
                            close(grad, expected[1], tolerance)
                full = rand(n, d, seed=4).to(dtype)
                chi2, grad = versions.misfit(
                    x.contiguous().to(device),
                    full.to(device),
                    torch.ones(1).to(device, dtype),
                    None,
                    None,
                    CURVES["clipped"],
                )
                expected = by_hand(x, full, torch.ones(1), None, CURVES["clipped"])
                close(chi2, expected[0], tolerance)
                close(grad, expected[1], tolerance)
    finally:
        torch.empty, torch.empty_like = empty, like


EXACT = ((torch.float64, 1e-13), (torch.float32, 2e-6))
HALF = ((torch.bfloat16, 1e-2),)


def test_reference():
    check(reference, "cpu", EXACT)


def test_compiled():
    check(cpu, "cpu", EXACT)


def test_what_is_not_a_number_stays_so():
    x, y, std = torch.tensor([[0.5, nan, 0.2]]), torch.zeros(1, 3), torch.ones(1)
    for curve in CURVES.values():
        for version in (reference, cpu):
            chi2, _ = version.misfit(x, y, std, None, None, curve)
            assert bool(chi2.isnan().all())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", ["inpainting", "hdr"])
def test_likelihoods_take_one_pass_and_agree_with_autograd(name, diagonal, monkeypatch):
    monkeypatch.setattr(pixelwise, "_LEAST", 1)
    A = Inpainting(random_mask((3, 9, 8), 0.4), (3, 9, 8)) if name == "inpainting" else HighDynamicRange((3, 9, 8), 2.5)
    assert isinstance(A, Pixelwise)
    x = rand(4, 3, 9, 8).abs()
    y = A(rand(1, 3, 9, 8, seed=1).abs()) + 0.1
    std = rand(*A.out_shape, seed=2).abs() + 0.2 if diagonal else 0.3
    called = []
    misfit = cpu.misfit
    monkeypatch.setattr(cpu, "misfit", lambda *a: called.append(1) or misfit(*a))
    for measurement in (y[0], y.expand(4, *A.out_shape) * torch.arange(1.0, 5.0).reshape(-1, *[1] * (y.ndim - 1))):
        likelihood = Gaussian(A, measurement, std)
        value, grad = likelihood.log_prob_and_grad(x)
        leaf = x.clone().requires_grad_()
        expected = likelihood.log_prob(leaf)
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, slope, rtol=1e-13, atol=1e-13)
        if isinstance(A, Inpainting):  # a linear operator's are differentiable themselves
            value, grad = likelihood.log_prob_and_grad(leaf)
            assert value.requires_grad
            assert grad.requires_grad
    assert len(called) == 2, "once for each likelihood: what is differentiated takes the reference"
    with kernels.use("reference"):
        again, slope = likelihood.log_prob_and_grad(x)
    torch.testing.assert_close(likelihood.log_prob_and_grad(x), (again, slope), rtol=1e-13, atol=1e-13)
    if isinstance(A, Inpainting):
        mapped = torch.func.vmap(lambda t: likelihood.log_prob_and_grad(t)[1])(x[None])
        torch.testing.assert_close(mapped[0], slope, rtol=1e-13, atol=1e-13)


def test_inpainting_moves_entries_by_the_compiled_version(monkeypatch):
    monkeypatch.setattr(pixelwise, "_LEAST", 1)
    A = Inpainting(random_mask((3, 9, 8), 0.4), (3, 9, 8))
    x, y = rand(2, 3, 9, 8), rand(2, *A.out_shape, seed=1)
    assert float((A(x) * y).sum()) == pytest.approx(float((x * A.adjoint(y)).sum()), rel=1e-13)
    with kernels.use("reference"):
        expected = A(x), A.adjoint(y)
    assert torch.equal(A(x), expected[0])
    assert torch.equal(A.adjoint(y), expected[1])
    assert torch.autograd.gradcheck(A, (x.clone().requires_grad_(),), fast_mode=True)
    assert torch.autograd.gradcheck(A.adjoint, (y.clone().requires_grad_(),), fast_mode=True)


def test_the_normaliser_follows_the_noise():
    A = Inpainting(torch.ones(4, 4), (1, 4, 4))
    likelihood = Gaussian(A, torch.zeros(2, 16, dtype=torch.float64), 0.5)
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), 0.5)
    assert float(likelihood.log_prob(x)[0]) == pytest.approx(float(16 * normal.log_prob(torch.tensor(0.0))))
    picked = likelihood.rows(torch.tensor([1, 1, 0]))
    assert picked.log_normaliser() == likelihood.log_normaliser()
    likelihood.noise_std.mul_(2.0)
    assert likelihood.log_normaliser() == pytest.approx(picked.log_normaliser())
    assert float(likelihood.log_prob(x)[0]) == pytest.approx(-8 * torch.log(torch.tensor(2 * torch.pi)).item())


def test_bad_input_is_told(unchecked):
    index, place = seen(8, 3)
    x, y, std = torch.zeros(2, 8), torch.zeros(2, 3), torch.ones(1)
    with pytest.raises(ShapeError, match=r"must be \(n, 8\), got \(2, 7\)"):
        pixelwise.gather(x[:, :7], index, place)
    with pytest.raises(ShapeError, match=r"must be \(n, 3\), got \(2, 8\)"):
        pixelwise.spread(x, index, place)
    with pytest.raises(ShapeError, match=r"Measurements must be \(1 or 2, 3\)"):
        pixelwise.misfit(x, y[:, :2], std, index, place)
    with pytest.raises(ShapeError, match=r"got \(3, 3\)"):
        pixelwise.misfit(x, torch.zeros(3, 3), std, index, place)
    with pytest.raises(ShapeError, match=r"must be \(n, 8\), got \(2, 9\)"):
        pixelwise.misfit(torch.zeros(2, 9), y, std, index, place)
    with pytest.raises(InputError, match="bring them together"):
        pixelwise.misfit(x, y.double(), std, index, place)


SCRIPT = """
from test_kernel_pixelwise import check, EXACT, HALF
from invdiff.kernels.pixelwise import gpu
check(gpu, {device!r}, EXACT + HALF)
"""


@has_triton
def test_triton_in_the_interpreter():
    check_alone(SCRIPT.format(device="cpu"), interpret=True)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    check_alone(SCRIPT.format(device="cuda"), interpret=False)
