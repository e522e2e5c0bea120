"""High dynamic range and non-linear blur against closed forms; complex data; photon counts."""

import math

import pytest
import torch
from torch import Tensor

from invdiff import Problem, samplers, solve
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.likelihoods import Gaussian, Poisson
from invdiff.likelihoods.poisson import poisson_quantile
from invdiff.operators import Affine, Blur, Inpainting, Scale, gaussian_kernel, motion_kernel
from invdiff.operators.base import LinearOperator, Operator, fingerprint
from invdiff.operators.high_dynamic_range import HighDynamicRange
from invdiff.operators.nonlinear_blur import NonlinearBlur
from invdiff.operators.phase_retrieval import PhaseRetrieval
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior
from invdiff.testing import check_operator

F64 = torch.float64
SHAPE = (2, 12, 16)
DELTA = torch.ones(1, 1, dtype=F64)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def slopes(f, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf).sum(), leaf)[0]


# High dynamic range.


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0, 3.5])
def test_high_dynamic_range_is_the_published_clip_in_other_units(gain):
    A, x = HighDynamicRange(SHAPE, gain), 3.0 * rand(4, *SHAPE) - 1.0
    published = torch.clip(gain * (2.0 * x - 1.0), -1.0, 1.0)
    torch.testing.assert_close(A(x), (published + 1.0) / 2.0, rtol=0, atol=1e-14)
    check_operator(A)


def test_high_dynamic_range_of_gain_two():
    A = HighDynamicRange((1, 1, 7))
    x = torch.tensor([-1.0, 0.0, 0.2, 0.5, 0.7, 1.0, 4.0], dtype=F64).reshape(1, 1, 1, 7)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.9, 1.0, 1.0], dtype=F64).reshape(1, 1, 1, 7)
    torch.testing.assert_close(A(x), expected)
    assert slopes(A, x).flatten().tolist() == [0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0]
    assert A(x.float()).dtype == torch.float32


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, math.inf])
def test_high_dynamic_range_refuses_a_wrong_gain(gain):
    with pytest.raises(InputError, match="gain must be positive"):
        HighDynamicRange(SHAPE, gain)


# Non-linear blur.


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (SHAPE, {}),
        ((1, 9, 11), {"seed": 3, "size": 5, "boundary": "circular", "gamma": 1.0}),
        ((3, 10, 9), {"size": 4, "boundary": "zero", "gamma": 2.4, "exposure": 3.0, "knee": 0.02}),
        ((1, 9, 9), {"size": 3, "boundary": "valid", "exposure": 0.5}),
        ((1, 9, 9), {"kernel": gaussian_kernel(5, 1.0)}),
    ],
)
def test_nonlinear_blur_keeps_the_contract_and_the_range(shape, settings):
    A, x = NonlinearBlur(shape, **settings), rand(3, *shape)
    check_operator(A)
    y = A(x)
    assert float(y.min()) > -1e-12
    assert float(y.max()) < 1.0 + 1e-12
    low = A(x.float())
    assert low.dtype == torch.float32
    assert float((low - y).abs().max()) < 1e-5


def test_defaults_scale_with_the_picture():
    for side, taps in ((256, 61), (64, 15), (128, 31), (4, 3)):
        assert NonlinearBlur((3, side, side)).blur.kernel.shape[-1] == taps
    kernel = NonlinearBlur((1, 32, 64), 5, size=7, intensity=0.2).blur.kernel[0]
    torch.testing.assert_close(kernel, motion_kernel(7, 0.2, 5), rtol=0, atol=1e-15)


def test_the_kernel_never_changes():
    A, x = NonlinearBlur(SHAPE, 1), rand(2, *SHAPE)
    first, kept = A(x), fingerprint(A)
    for _ in range(3):
        assert torch.equal(A(x), first)
    assert fingerprint(A) == kept == fingerprint(NonlinearBlur(SHAPE, 1))
    assert torch.equal(NonlinearBlur(SHAPE, 1)(x), first)
    assert float((NonlinearBlur(SHAPE, 2)(x) - first).abs().max()) > 1e-2
    assert "blur.kernel" in A.state_dict()
    for other in ({"gamma": 2.0}, {"exposure": 1.4}, {"knee": 0.2}, {"boundary": "zero"}):
        assert fingerprint(NonlinearBlur(SHAPE, 1, **other)) != kept


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2, 2.4])
def test_the_camera_curve(gamma):
    A, x = NonlinearBlur(SHAPE, kernel=DELTA, gamma=gamma), torch.linspace(-2.0, 3.0, 5001, dtype=F64)
    light = A.linearise(x)
    torch.testing.assert_close(A.encode(light), x, rtol=0, atol=1e-12)
    assert bool((light.diff() > 0).all())
    ends = A.linearise(torch.tensor([0.0, 1.0], dtype=F64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=F64), rtol=0, atol=1e-15)
    # One slope on both sides of the toe's end, and nowhere 0 or infinite.
    toe = torch.tensor([0.04 - 1e-9, 0.04 + 1e-9], dtype=F64)
    for f, at in ((A.linearise, toe), (A.encode, A.linearise(toe))):
        below, above = slopes(f, at).tolist()
        assert below == pytest.approx(above, rel=1e-6)
    assert float((slopes(A.encode, light) * slopes(A.linearise, x) - 1.0).abs().max()) < 1e-12
    if gamma == 1.0:
        torch.testing.assert_close(light, x, rtol=1e-14, atol=1e-14)
    if gamma == 2.4:  # sRGB, IEC 61966-2-1; its offset 0.055 is ours to 0.001
        srgb = torch.where(x <= 0.04045, x / 12.92, ((x.clamp_min(0.04) + 0.055) / 1.055) ** 2.4)
        assert float((light - srgb)[(x >= 0) & (x <= 1)].abs().max()) < 5e-4


@pytest.mark.parametrize("knee", [0.5, 0.1, 0.02])
def test_saturation_and_its_limits(knee):
    A = NonlinearBlur(SHAPE, kernel=DELTA, knee=knee)
    e = torch.linspace(-1.0, 3.0, 4001, dtype=F64)
    s = A.saturate(e)
    softplus = torch.logaddexp(torch.zeros_like(e), (1.0 - e) / knee)
    torch.testing.assert_close(s, 1.0 - softplus / math.log1p(math.exp(1.0 / knee)), rtol=0, atol=1e-12)
    assert bool((s.diff() >= 0).all())
    assert float(A.saturate(torch.zeros((), dtype=F64)).abs()) < 1e-15
    assert float(A.saturate(torch.tensor(1e6, dtype=F64))) == 1.0
    # It is never farther from the hard clip than softplus is from the ramp: knee log 2 at the corner, in full light.
    hard = e[e >= 0].clamp(max=1.0)
    assert float((s[e >= 0] - hard).abs().max()) <= knee * math.log(2.0)


@pytest.mark.parametrize("level", [0.0, 0.02, 0.3, 0.8, 1.0])
def test_a_constant_picture_stays_constant(level):
    A = NonlinearBlur((1, 12, 12), size=5)
    light = ((level + 0.048) / 1.048) ** 2.2 if level > 0.04 else level / 0.04 * (0.088 / 1.048) ** 2.2
    e = 1.5 * light
    held = 1.0 - math.log1p(math.exp((1.0 - e) / 0.1)) / math.log1p(math.exp(10.0))
    edge = (0.088 / 1.048) ** 2.2
    expected = 1.048 * held ** (1.0 / 2.2) - 0.048 if held > edge else held / edge * 0.04
    y = A(torch.full((1, 1, 12, 12), level, dtype=F64))
    torch.testing.assert_close(y, torch.full_like(y, expected), rtol=0, atol=1e-12)


def test_limits_linear_blur_white_and_the_identity():
    x, kernel = rand(2, *SHAPE), motion_kernel(5)
    faint = NonlinearBlur(SHAPE, kernel=kernel, gamma=1.0, exposure=1e-3, knee=0.02)
    torch.testing.assert_close(faint(x) / 1e-3, Blur(kernel, SHAPE)(x), rtol=0, atol=1e-10)
    bright = NonlinearBlur(SHAPE, kernel=kernel, exposure=1e4)
    assert float((bright(x.clamp_min(0.1)) - 1.0).abs().max()) < 1e-12
    still = NonlinearBlur(SHAPE, kernel=DELTA, exposure=1.0, knee=0.01)
    torch.testing.assert_close(still(0.8 * x), 0.8 * x, rtol=0, atol=1e-8)


def test_light_adds_up_and_pixel_values_do_not():
    x = torch.zeros(1, 1, 15, 15, dtype=F64)
    x[0, 0, 7, 7] = 1.0
    kernel = gaussian_kernel(7, 1.0)
    y = NonlinearBlur((1, 15, 15), kernel=kernel, exposure=1.0)(x)
    # A lamp's trail is brighter than a blur of the picture makes it.
    assert bool((y >= Blur(kernel, (1, 15, 15))(x) - 1e-12).all())
    assert float(y[0, 0, 7, 7]) > 2.0 * float(kernel[3, 3])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gradients_are_finite_everywhere_and_alive_at_black(dtype):
    A = NonlinearBlur((1, 5, 5), kernel=DELTA)
    for level in (-1e4, -1.0, -1e-30, 0.0, 1e-30, 0.04, 1.0, 2.0, 1e4):
        x = torch.full((1, 1, 5, 5), level, dtype=dtype)
        y, slope = A(x), slopes(A, x)
        assert bool(torch.isfinite(y).all() & torch.isfinite(slope).all() & (slope >= 0).all())
        if -1.0 <= level <= 0.04:
            assert float(slope.min()) > 0.5  # 1.5, the exposure, and less as the highlights come near


def test_nonlinear_blur_refuses_wrong_settings(unchecked):
    for settings in ({"gamma": 0.9}, {"exposure": 0.0}, {"knee": 0.0}, {"gamma": math.nan}, {"exposure": math.inf}):
        with pytest.raises(InputError, match="gamma >= 1"):
            NonlinearBlur(SHAPE, **settings)
    for kernel in (-DELTA, torch.zeros(3, 3), torch.tensor([[1.0, -1e-3]])):
        with pytest.raises(InputError, match="times of exposure"):
            NonlinearBlur(SHAPE, kernel=kernel)
    for kernel in (torch.full((3, 3), math.nan), torch.complex(DELTA, DELTA), torch.tensor([[1.0, math.inf]])):
        with pytest.raises(InputError):
            NonlinearBlur(SHAPE, kernel=kernel)
    for kernel in (torch.ones(3), torch.ones(5, 3, 3), torch.ones(3, 40)):
        with pytest.raises(ShapeError):
            NonlinearBlur(SHAPE, kernel=kernel)
    with pytest.raises(InputError, match="boundary"):
        NonlinearBlur(SHAPE, boundary="wrap")
    with pytest.raises(InputError, match="motion_kernel needs"):
        NonlinearBlur(SHAPE, size=1)
    for kind in (NonlinearBlur, HighDynamicRange):
        with pytest.raises(ShapeError):
            kind((12, 16))
        with pytest.raises(ShapeError, match="takes inputs of shape"):
            kind(SHAPE)(rand(1, 2, 12, 15))


@pytest.mark.parametrize("kind", [HighDynamicRange, NonlinearBlur])
def test_a_linear_sampler_refuses_and_another_runs(kind):
    A, prior = kind((1, 8, 8)), FieldPrior(torch.full((1, 8, 8), 0.04), 0.5)
    problem = Problem.simulate(A, rand(1, 8, 8, dtype=torch.float32), noise_std=0.05)
    with pytest.raises(CapabilityError, match=r"Samplers that can: .*\bDPS\b"):
        solve(problem, prior, samplers.PiGDM())
    assert bool(torch.isfinite(solve(problem, prior, samplers.DPS(steps=10), draws=2).draws).all())


# Complex data.


class Fourier(LinearOperator):
    complex_output = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, shape)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, norm="ortho")

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.ifft(y, norm="ortho").real


class Magnitude(Operator):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def test_complex_data_need_a_complex_operator_and_the_reverse():
    real, shape = rand(4), (4,)
    y = torch.complex(real, real)
    assert Gaussian(Fourier(shape), y, 0.1).measurements == 8
    with pytest.raises(InputError, match="two real channels"):
        Gaussian(Scale(shape), y, 0.1)
    with pytest.raises(InputError, match=r"real \(torch.float64\).*Fourier is complex.*torch.complex"):
        Gaussian(Fourier(shape), real, 0.1)
    with pytest.raises(InputError, match="complex"):
        Poisson(Scale(shape), y, 1.0)
    with pytest.raises(InputError, match="counts are real"):
        Poisson(Fourier(shape), real, 1.0)
    with pytest.raises(InputError, match="counts are real"):
        Problem.simulate(Fourier(shape), real, gain=1.0)
    problem = Problem.simulate(Fourier(shape), real, noise_std=0.1)
    assert problem.likelihood.measurement.is_complex()


def test_compositions_know_whether_they_are_complex():
    F, shape = Fourier((4,)), (4,)
    for A in (F @ Scale(shape), Scale(shape) @ F, Affine(shape, 2.0, 1.0) @ F, F @ Affine(shape), F @ Magnitude(shape)):
        assert A.complex_output
        assert A(rand(2, 4)).is_complex()
    for A in (Magnitude(shape) @ F, Scale(shape) @ Scale(shape), Magnitude(shape) @ Scale(shape)):
        assert not A.complex_output
        assert not A(rand(2, 4)).is_complex()
    # Real operators hash as they did before there was the attribute: their problems keep their noise.
    assert "complex_output" not in vars(Scale(shape) @ Scale(shape))


def test_a_complex_truth_is_refused():
    x = torch.complex(rand(1, 4, 4), rand(1, 4, 4))
    with pytest.raises(InputError, match="real and imaginary parts as two channels"):
        Problem.simulate(Scale((1, 4, 4)), x, noise_std=0.1)


def test_complex_physics_of_deepinv_are_known():
    deepinv = pytest.importorskip("deepinv")
    from invdiff.operators.adapters import from_deepinv

    shape = (1, 4, 4)
    complex_physics = deepinv.physics.Physics(A=lambda x, **_: torch.fft.fft2(x))
    assert from_deepinv(complex_physics, shape).complex_output
    linear = deepinv.physics.LinearPhysics(A=lambda x, **_: torch.fft.fft2(x), A_adjoint=lambda y, **_: y.real)
    assert from_deepinv(linear, shape).complex_output
    assert not from_deepinv(deepinv.physics.Physics(A=lambda x, **_: x**2), shape).complex_output


@pytest.mark.parametrize("A", [Inpainting(torch.eye(4), (1, 4, 4)), Blur(rand(3, 3), (1, 4, 4), "zero")])
def test_prox_takes_numbers_and_tensors_alike(A):
    x, y = rand(2, 1, 4, 4), rand(2, *A.out_shape, seed=1)
    p = A.prox(x, y, 0.7)
    for weight in (torch.tensor(0.7, dtype=F64), torch.full((1,), 0.7, dtype=F64), torch.full((2,), 0.7, dtype=F64)):
        torch.testing.assert_close(A.prox(x, y, weight), p, rtol=1e-12, atol=1e-12)
    rows = A.prox(x, y, torch.tensor([0.7, 3.0], dtype=F64))
    torch.testing.assert_close(rows[:1], p[:1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[1:], A.prox(x[1:], y[1:], 3.0), rtol=1e-6, atol=1e-6)


# Photon counts.


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.7, 4.0, 30.0])
def test_counts_invert_the_cumulative_distribution(rate):
    k = torch.arange(150, dtype=F64)
    mass = torch.exp(torch.xlogy(k, torch.tensor(rate, dtype=F64)) - rate - torch.lgamma(k + 1.0))
    u = torch.linspace(0.0, 1.0, 1001, dtype=F64)[:-1] + 3e-7
    expected = torch.searchsorted(mass.cumsum(0), u, right=True).double()
    assert torch.equal(poisson_quantile(u, torch.full_like(u, rate)), expected)


def test_counts_reach_the_ends_of_the_stream():
    u = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=F64)
    for rate in (0.0, 1e-6, 1.0, 1e3, 1e7):
        low, high = poisson_quantile(u, torch.full_like(u, rate)).tolist()
        assert 0.0 <= low <= rate <= high < rate + 9.0 * rate**0.5 + 27.0


@pytest.mark.parametrize("rate", [0.01, 1.0, 30.0])
def test_counts_reach_far_into_the_tails(rate):
    k, small = torch.arange(200, dtype=F64), 2.0**-45
    mass = torch.exp(k * math.log(rate) - rate - torch.lgamma(k + 1.0))
    above = mass.flip(0).cumsum(0).flip(0) - mass  # P(X > k), without the cancellation of 1 - P(X <= k)
    u, rates = torch.tensor([small, 1.0 - small], dtype=F64), torch.full((2,), rate, dtype=F64)
    expected = [int((mass.cumsum(0) > small).nonzero()[0]), int((above < small).nonzero()[0])]
    assert poisson_quantile(u, rates).tolist() == expected


@pytest.mark.parametrize(("gain", "background"), [(0.5, 0.2), (20.0, None), (5e4, 3.0)])
def test_simulated_counts_have_the_poisson_moments(gain, background):
    shape, level = (1, 160, 125), 0.6
    n, rate = math.prod(shape), gain * level + (1e-3 if background is None else background)
    problem = Problem.simulate(
        Scale(shape), torch.full(shape, level, dtype=F64), gain=gain, background=background, seed=0
    )
    y = problem.likelihood.measurement
    assert torch.equal(y, y.round())
    assert float(y.min()) >= 0.0
    # Five standard errors; the variance of a sample variance is (rate + 2 rate^2) / n.
    assert abs(float(y.mean()) - rate) < 5.0 * math.sqrt(rate / n)
    assert abs(float(y.var()) - rate) < 5.0 * math.sqrt((rate + 2.0 * rate**2) / n)
    # The deviance at the truth is n times that of one count, about 1 at high rates.
    if rate > 100:
        assert float(problem.likelihood.deviance(problem.reference[None])) / n == pytest.approx(1.0, abs=0.06)


def test_counts_repeat_and_a_rounding_of_the_rate_moves_none():
    shape = (1, 32, 32)
    A, x = HighDynamicRange(shape), rand(*shape)
    y = Problem.simulate(A, x, gain=100.0, seed=3).likelihood.measurement
    assert y.dtype == F64
    assert torch.equal(y, Problem.simulate(A, x, gain=100.0, seed=3).likelihood.measurement)
    # Rates move by at most 2e-11, so each of the 1024 counts moves with a probability below that.
    assert torch.equal(y, Problem.simulate(A, x * (1.0 + 1e-13), gain=100.0, seed=3).likelihood.measurement)
    other = Problem.simulate(A, x, gain=100.0, seed=4).likelihood.measurement
    assert float((other != y).double().mean()) > 0.6  # a quarter of the picture is clipped to black
    # In float32 a rate up to 100 is off by about 1e-5, and a count moves with a probability below that.
    single = Problem.simulate(A, x.float(), gain=100.0, seed=3).likelihood.measurement
    assert single.dtype == torch.float32
    assert int((single != y).sum()) <= 1


def test_a_rate_below_zero_is_dark():
    x = torch.full((1, 8, 8), -5.0, dtype=F64)
    y = Problem.simulate(Scale((1, 8, 8)), x, gain=10.0, background=0.0).likelihood.measurement
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("A", [HighDynamicRange((1, 8, 8)), NonlinearBlur((1, 8, 8)), PhaseRetrieval((1, 8, 8))])
def test_counts_of_the_nonlinear_operators_can_be_solved(A):
    prior = FieldPrior(torch.full((1, 8, 8), 0.04), 0.5)
    problem = Problem.simulate(A, rand(1, 8, 8, dtype=torch.float32), gain=50.0)
    x = rand(2, 1, 8, 8)
    value, gradient = problem.likelihood.log_prob_and_grad(x)
    h, d = 1e-6, rand(1, 1, 8, 8, seed=5)
    slope = (problem.likelihood.log_prob(x + h * d) - problem.likelihood.log_prob(x - h * d)) / (2 * h)
    torch.testing.assert_close((gradient * d).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-4)
    law = torch.distributions.Poisson(50.0 * A(x) + 1e-3)
    torch.testing.assert_close(value, law.log_prob(problem.likelihood.measurement.double()).flatten(1).sum(1))
    assert bool(torch.isfinite(solve(problem, prior, samplers.DPS(steps=10), draws=2).draws).all())


def test_stacked_counts_pick_their_rows_unchecked():
    A = HighDynamicRange((1, 4, 4))
    f = Poisson.stack([Problem.simulate(A, rand(1, 4, 4), gain=9.0, seed=s).likelihood for s in (0, 1)])
    rows = f.rows(torch.tensor([1, 0, 1]))
    assert torch.equal(rows.measurement, f.measurement[[1, 0, 1]])
    assert (rows.gain, rows.background, rows.in_shape, rows.measurements) == (9.0, 1e-3, (1, 4, 4), 16)
    x = rand(3, 1, 4, 4)
    torch.testing.assert_close(rows.log_prob(x)[1:2], f.rows(torch.tensor([0])).log_prob(x[1:2]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give noise_std"),
        ({"noise_std": 0.1, "gain": 1.0}, "Give noise_std"),
        ({"noise_std": 0.1, "background": 1.0}, "Give noise_std"),
        ({"gain": 0.0}, "gain > 0"),
        ({"gain": math.inf}, "gain > 0"),
        ({"gain": 1.0, "background": -1.0}, "background >= 0"),
        ({"noise_std": 0.0}, "noise_std must be positive"),
    ],
)
def test_simulate_refuses_wrong_noise(settings, message):
    with pytest.raises(InputError, match=message):
        Problem.simulate(Scale((1, 4, 4)), rand(1, 4, 4), **settings)


def test_counts_have_the_noise_of_their_mean():
    """Bright counts are nearly Gaussian, so that the norm that DPS steps down has nearly the same gradient for both."""
    prior = FieldPrior.power_law((1, 8, 8), exponent=2.0, std=0.05, mean=0.5)
    truth, gain = prior.sample(1, seed=3)[0].float(), 1e6
    A = Scale((1, 8, 8))
    counts = Problem.simulate(A, truth, gain=gain, seed=1)
    gaussian = Problem(Gaussian(A, counts.likelihood.measurement[0] / gain, (0.5 / gain) ** 0.5))
    x = (truth + 0.01)[None]
    slopes = []
    for posterior in (Posterior(counts, prior), Posterior(gaussian, prior)):
        _, grad = posterior.log_likelihood_and_grad(x)
        slopes.append(posterior.noise_std * grad / posterior.deviance(x).sqrt())
    assert Posterior(counts, prior).noise_std == pytest.approx((0.5 / gain) ** 0.5, rel=0.1)
    # The counts' own variance is the pixel's, not the mean's: std 0.05 about 0.5 is a tenth.
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0.4, atol=0.0)
    assert float(slopes[0].norm() / slopes[1].norm()) == pytest.approx(1.0, abs=0.1)
