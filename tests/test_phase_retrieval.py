"""Phase retrieval against its definition, closed forms, the ambiguities that it must have, and its place in solve."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from invdiff import Problem, solve
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.operators.phase_retrieval import PhaseRetrieval
from invdiff.priors import FieldPrior
from invdiff.testing import check_operator

F64 = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 7, 10), (1, 10, 7), (1, 9, 9), (1, 1, 1)])
@pytest.mark.parametrize("oversampling", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("pixel_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_published_definition_and_the_contract(shape, oversampling, pixel_range):
    A = PhaseRetrieval(shape, oversampling, pixel_range=pixel_range)
    low, high = pixel_range
    x = rand(2, *shape)
    p, q = int(oversampling / 8.0 * shape[1]), int(oversampling / 8.0 * shape[2])
    mapped = pad(low + (high - low) * x, (q, q, p, p))
    expected = torch.fft.fftshift(torch.fft.fft2(mapped, norm="ortho"), dim=(-2, -1)).abs()
    assert A.out_shape == tuple(expected.shape[1:])
    torch.testing.assert_close(A(x), expected, rtol=1e-12, atol=1e-12)
    if min(shape[1:]) > 1:  # the magnitude of one pixel is its modulus, of slope 1: nothing to find out
        check_operator(A)


def test_the_published_size():
    assert PhaseRetrieval((3, 256, 256)).out_shape == (3, 384, 384)
    assert PhaseRetrieval((3, 64, 64)).out_shape == (3, 96, 96)


def test_a_point_has_constant_magnitudes_and_a_constant_has_one():
    A = PhaseRetrieval((1, 8, 12))
    x = torch.zeros(1, 1, 8, 12, dtype=F64)
    x[0, 0, 3, 5] = 0.7
    torch.testing.assert_close(A(x), torch.full((1, 1, 12, 18), 0.7 / math.sqrt(12 * 18), dtype=F64))
    y = PhaseRetrieval((1, 8, 12), 0.0)(torch.full((1, 1, 8, 12), 0.7, dtype=F64))
    assert float(y[0, 0, 4, 6]) == pytest.approx(0.7 * math.sqrt(8 * 12), rel=1e-12)  # zero frequency in the centre
    assert float(y.sum()) == pytest.approx(float(y[0, 0, 4, 6]), rel=1e-12)


@pytest.mark.parametrize("pixel_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_parseval(pixel_range):
    low, high = pixel_range
    x = rand(3, 2, 9, 10)
    y = PhaseRetrieval((2, 9, 10), pixel_range=pixel_range)(x)
    torch.testing.assert_close((y**2).sum((-2, -1)), ((low + (high - low) * x) ** 2).sum((-2, -1)))


def test_power_of_a_one_over_f_field_is_its_spectrum():
    prior, n = FieldPrior.power_law((1, 16, 16), 1.0), 2000
    y = PhaseRetrieval((1, 16, 16), 0.0)(prior.sample(n, seed=0).double())
    ratio = torch.fft.ifftshift((y**2).mean(0), dim=(-2, -1)) / prior.spectrum
    # |F|^2 / S is chi-square of one degree at four real frequencies (variance 2), half that of two elsewhere (1).
    assert float((ratio - 1.0).abs().max()) < 6.0 * math.sqrt(2.0 / n)
    assert float((ratio.mean() - 1.0).abs()) < 5.0 * math.sqrt(2.0 / (n * 256))


def test_every_frequency_is_measured_twice():
    for shape in ((1, 8, 8), (1, 7, 9)):
        y = torch.fft.ifftshift(PhaseRetrieval(shape)(rand(1, *shape)), dim=(-2, -1))
        assert torch.allclose(y, y.flip(-2, -1).roll((1, 1), (-2, -1)), rtol=0, atol=1e-14)


def test_ambiguities_that_are_left():
    A, x = PhaseRetrieval((2, 12, 12)), torch.zeros(1, 2, 12, 12, dtype=F64)
    x[..., 3:9, 2:10] = rand(1, 2, 6, 8)  # a dark border of at least two pixels
    y = A(x)
    one_rotated = torch.cat([x[:, :1].flip(-2, -1), x[:, 1:]], dim=1)
    for other in (-x, x.flip(-2, -1), one_rotated, x.roll((2, -2), (-2, -1))):
        torch.testing.assert_close(A(other), y, rtol=1e-12, atol=1e-13)
    for other in (x.flip(-1), x.mT):
        assert float((A(other) - y).abs().max()) > 1e-2
    bright = rand(1, 2, 12, 12)
    assert float((A(bright.roll(1, -1)) - A(bright)).abs().max()) > 1e-2  # the margin fixes the place
    assert torch.allclose(
        PhaseRetrieval((2, 12, 12), 0.0)(bright.roll(1, -1)), PhaseRetrieval((2, 12, 12), 0.0)(bright)
    )
    signed = PhaseRetrieval((2, 12, 12), pixel_range=(-1, 1))
    torch.testing.assert_close(signed(1.0 - bright), signed(bright), rtol=1e-12, atol=1e-12)
    assert float((A(1.0 - bright) - A(bright)).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("pixel_range", "dark"), [((0.0, 1.0), 0.0), ((-1.0, 1.0), 0.5)])
def test_the_gradient_is_zero_where_all_magnitudes_are(pixel_range, dark, dtype):
    A = PhaseRetrieval((1, 6, 7), pixel_range=pixel_range)
    x = torch.full((1, 1, 6, 7), dark, dtype=dtype, requires_grad=True)
    y = A(x)
    assert y.dtype == dtype
    assert torch.equal(y, torch.zeros_like(y))
    (gradient,) = torch.autograd.grad((y * rand(*y.shape, dtype=dtype)).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_gradient_survives_a_few_zero_magnitudes():
    x = rand(1, 1, 8, 8).requires_grad_()
    A = PhaseRetrieval((1, 8, 8), 0.0)
    (gradient,) = torch.autograd.grad(A(x - x.mean()).sum(), x)  # the zero frequency vanishes but for rounding
    assert bool(torch.isfinite(gradient).all())


def test_float32_follows_float64():
    A, x = PhaseRetrieval((3, 32, 32)), rand(2, 3, 32, 32)
    y = A(x.float())
    assert y.dtype == torch.float32
    assert float((y - A(x)).abs().max()) < 1e-5


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_refuses_a_wrong_oversampling(value):
    with pytest.raises(InputError, match="oversampling must be finite"):
        PhaseRetrieval((1, 8, 8), value)


@pytest.mark.parametrize("value", [(1.0, 0.0), (0.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_refuses_a_wrong_range(value):
    with pytest.raises(InputError, match="low < high"):
        PhaseRetrieval((1, 8, 8), pixel_range=value)


def test_refuses_wrong_shapes(unchecked):
    with pytest.raises(ShapeError):
        PhaseRetrieval((8, 8))
    with pytest.raises(ShapeError, match="takes inputs of shape"):
        PhaseRetrieval((1, 8, 8))(rand(1, 1, 8, 9))


def small() -> tuple[Problem, FieldPrior]:
    A, prior = PhaseRetrieval((1, 8, 8)), FieldPrior(torch.full((1, 8, 8), 0.04), 0.5)
    return Problem.simulate(A, rand(1, 8, 8, dtype=torch.float32), noise_std=0.05, seed=0), prior


@pytest.mark.parametrize("sampler", ["pigdm", "PiGDM"])
def test_a_linear_sampler_refuses_and_names_others(sampler):
    problem, prior = small()
    with pytest.raises(CapabilityError, match=r"PiGDM needs .*linear.*Samplers that can: .*\bDPS\b") as caught:
        solve(problem, prior, sampler=sampler)
    able = str(caught.value).split("Samplers that can:")[1]
    assert "PiGDM" not in able


def test_solve_chooses_gradient_guidance_and_runs():
    problem, prior = small()
    solution = solve(problem, prior, draws=2)
    assert solution.draws.shape == (2, 1, 8, 8)
    assert bool(torch.isfinite(solution.draws).all())
    assert "gradient guidance" in solution.data.attrs["sampler_reason"]
