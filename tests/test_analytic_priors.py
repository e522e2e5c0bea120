"""Analytic priors against autograd, brute-force quadrature, block formulas and the law of large numbers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from invdiff.diagnostics.prior_checks import check_prior
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.operators.base import LinearOperator, Operator
from invdiff.operators.composition import Affine, Scale
from invdiff.priors import DiffusionPrior, FieldPrior, GaussianPrior, MixturePrior

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spd(d: int, seed: int = 0, floor: float = 0.1) -> Tensor:
    b = normal(d, d, seed=seed)
    return b @ b.mT / d + floor * torch.eye(d, dtype=F64)


class Dense(LinearOperator):
    def __init__(self, matrix: Tensor, in_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, (len(matrix),))
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.mT

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).reshape(-1, *self.in_shape)


class Fourier(LinearOperator):
    """Complex outputs from a single-precision table, as a measured coil map would be."""

    def __init__(self, n: int) -> None:
        super().__init__((n,), (n,))
        self.register_buffer("weight", torch.linspace(1.0, 2.0, n))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.fft.fft(x)

    def adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError


def gaussian() -> GaussianPrior:
    return GaussianPrior(normal(2, 3, seed=1), spd(6, seed=2))


def mixture(shape: tuple[int, ...] = (2,), k: int = 3) -> MixturePrior:
    d = math.prod(shape)
    covariances = torch.stack([0.3 * spd(d, seed=10 + i) for i in range(k)])
    return MixturePrior(torch.arange(1.0, k + 1), 1.5 * normal(k, *shape, seed=5), covariances)


def narrow_posterior() -> MixturePrior:
    return mixture((5,)).posterior(Dense(normal(2, 5, seed=3), (5,)), normal(2, seed=4), 1e-3).law


PRIORS = {
    "gaussian": gaussian,
    "mixture": mixture,
    "mixture 5": lambda: mixture((1, 5), 4),
    "power law": lambda: FieldPrior.power_law((2, 6, 5), 2.0, torch.tensor([0.3, 1.0]), 0.5),
    "matern 1-D": lambda: FieldPrior.matern((1, 12), 2.0, mean=normal(1, 12)),
    "white 3-D": lambda: FieldPrior(0.7 * torch.ones(1, 2, 4, 3)),
    "narrow posterior": narrow_posterior,
}


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]()


def test_denoiser_is_the_score_of_log_prob(prior):
    assert isinstance(prior, DiffusionPrior)
    sigmas = torch.logspace(math.log10(prior.sigma_min), math.log10(prior.sigma_max), 9, dtype=F64)
    for sigma in [*sigmas.tolist(), sigmas]:
        column = sigma.reshape(-1, *[1] * len(prior.shape)) if isinstance(sigma, Tensor) else sigma
        z = (prior.sample(9, seed=1) + column * normal(9, *prior.shape)).requires_grad_()
        score = torch.autograd.grad(prior.log_prob(z, sigma).sum(), z)[0]
        error = (prior.denoise(z, sigma) - z - column**2 * score).detach().abs() / z.detach().abs().max().clamp_min(1.0)
        assert float(error.max()) < 1e-10


def test_check_prior_passes(prior):
    report = check_prior(prior, seed=3)
    assert report.analytic
    assert report.spread_at_sigma_max < 0.05
    single = check_prior(prior, n=32, levels=2, dtype=torch.float32, tolerance=3e-3)
    assert len(single.levels) == 2


def test_density_integrates_to_one():
    axis = torch.linspace(-12, 12, 601, dtype=F64)
    z = torch.cartesian_prod(axis, axis)
    for sigma in (0.0, 0.5, 1.0):
        assert float(mixture().log_prob(z, sigma).exp().sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(
            1.0, abs=1e-9
        )
    line = FieldPrior(torch.tensor([[2.0, 0.5]], dtype=F64), 0.3)
    assert float(line.log_prob(z[:, None]).exp().sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("decoder", [None, Affine((2,), 0.5, 0.25)])
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_posterior_against_quadrature(kind, decoder):
    """Evidence, moments, density and conditional denoiser in two dimensions, by the trapezoidal rule on a wide grid."""
    law = mixture()
    prior = (
        GaussianPrior(law.means[0], law.covariances[0], decoder=decoder)
        if kind == "gaussian"
        else MixturePrior(law.weights, law.means, law.covariances, decoder=decoder)
    )
    A = Dense(torch.tensor([[1.0, -0.5], [0.3, 2.0], [1.0, 1.0]], dtype=F64), (2,))
    y, std = torch.tensor([0.4, -0.7, 0.1], dtype=F64), torch.tensor([0.5, 0.8, 0.6], dtype=F64)
    posterior = prior.posterior(A, y, std)

    axis = torch.linspace(-10, 10, 501, dtype=F64)
    cell = float(axis[1] - axis[0]) ** 2
    z = torch.cartesian_prod(axis, axis)
    residual = (y - A(prior.decode(z))) / std
    log_likelihood = -0.5 * residual.square().sum(1) - std.log().sum() - 1.5 * math.log(2 * math.pi)
    joint = (prior.log_prob(z) + log_likelihood).exp() * cell
    assert posterior.log_evidence == pytest.approx(math.log(float(joint.sum())), abs=1e-9)
    w = joint / joint.sum()
    mean = w @ z
    covariance = (w[:, None] * (z - mean)).mT @ (z - mean)
    torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.covariance, covariance, rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.std, covariance.diagonal().sqrt(), rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.log_prob(z[::997]).exp() * cell, w[::997], rtol=1e-8, atol=1e-300)

    for sigma in (0.3, 1.0, 4.0):
        for point in normal(3, 2, seed=9):
            v = w * torch.exp(-0.5 * ((z - point) / sigma).square().sum(1))
            torch.testing.assert_close(posterior.denoise(point[None], sigma)[0], v @ z / v.sum(), rtol=0, atol=1e-8)


def test_gaussian_posterior_in_information_form():
    prior, matrix = gaussian(), normal(4, 6, seed=7)
    y, std = normal(4, seed=8), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    posterior = prior.posterior(Dense(matrix, (2, 3)), y[None], std)
    precision = torch.linalg.inv(prior.covariance) + matrix.mT @ (matrix / std[:, None] ** 2)
    covariance = torch.linalg.inv(precision)
    mean = prior.mean.flatten() + covariance @ (matrix.mT @ ((y - matrix @ prior.mean.flatten()) / std**2))
    torch.testing.assert_close(posterior.covariance, covariance, rtol=0, atol=1e-11)
    torch.testing.assert_close(posterior.mean.flatten(), mean, rtol=0, atol=1e-11)
    marginal = torch.distributions.MultivariateNormal(
        matrix @ prior.mean.flatten(), matrix @ prior.covariance @ matrix.mT + (std**2).diag()
    )
    assert posterior.log_evidence == pytest.approx(float(marginal.log_prob(y)), abs=1e-10)


def test_bayes_rule_pointwise():
    """log p(z|y) + log p(y) = log p(z) + log p(y|z) for every z; checks all four at once in higher dimension."""
    for prior in (
        gaussian(),
        mixture((5,), 4),
        FieldPrior.power_law((2, 4, 3), 2.0, 0.5, 0.2, decoder=Affine((2, 4, 3), 3.0, -1.0)),
    ):
        A = Dense(normal(4, prior.size, seed=2), prior.shape)
        y, z = normal(4, seed=3), normal(7, *prior.shape, seed=4)
        posterior = prior.posterior(A, y, 0.3)
        log_likelihood = -0.5 * ((y - A(prior.decode(z))) / 0.3).square().sum(1) - 4 * math.log(
            0.3 * math.sqrt(2 * math.pi)
        )
        left, right = posterior.log_prob(z) + posterior.log_evidence, prior.log_prob(z) + log_likelihood
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-8)


def test_tiny_noise_keeps_the_covariance_positive():
    prior = GaussianPrior(torch.zeros(6), spd(6, seed=2))
    posterior = prior.posterior(Dense(torch.eye(6, dtype=F64)[:4], (6,)), normal(4), 1e-9)
    # The eigenvalues themselves are rounded, by some eps of the largest.
    least, *_, largest = torch.linalg.eigvalsh(posterior.covariance).tolist()
    assert least > -8 * torch.finfo(F64).eps * largest
    torch.testing.assert_close(posterior.std[:4], torch.full((4,), 1e-9, dtype=F64), rtol=1e-6, atol=0)


def test_complex_measurements_count_twice():
    prior, y = GaussianPrior(torch.zeros(4), spd(4)), torch.complex(normal(4), normal(4, seed=1))
    posterior = prior.posterior(Fourier(4), y, 0.5)
    matrix = Fourier(4)(torch.eye(4, dtype=F64)).mT
    both = Dense(torch.cat([matrix.real, matrix.imag]), (4,))
    other = prior.posterior(both, torch.cat([y.real, y.imag]), 0.5)
    torch.testing.assert_close(posterior.mean, other.mean, rtol=0, atol=1e-12)
    assert posterior.log_evidence == pytest.approx(other.log_evidence, abs=1e-10)


def test_mixture_of_one_component_is_the_gaussian():
    g = gaussian()
    m = MixturePrior(torch.ones(1), g.mean[None], g.covariance[None])
    z = normal(5, 2, 3)
    A, y = Dense(normal(3, 6, seed=1), (2, 3)), normal(3, seed=2)
    for sigma in (0.01, 0.5, 20.0):
        torch.testing.assert_close(m.denoise(z, sigma), g.denoise(z, sigma), rtol=0, atol=1e-12)
        torch.testing.assert_close(m.log_prob(z, sigma), g.log_prob(z, sigma), rtol=1e-12, atol=1e-12)
    ours, theirs = m.posterior(A, y, 0.2), g.posterior(A, y, 0.2)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=0, atol=1e-12)
    assert ours.log_evidence == pytest.approx(theirs.log_evidence, abs=1e-12)


def test_mixture_posterior_survives_components_without_weight():
    far = MixturePrior(torch.ones(2), torch.tensor([[0.0], [1e4]]), torch.ones(2, 1, 1))
    posterior = far.posterior(Scale((1,)), torch.zeros(1), 0.1)
    assert posterior.law.weights.tolist() == [1.0]
    assert float(posterior.mean) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 7), (2, 6, 5), (1, 4, 4), (1, 3, 4, 2)])
def test_field_is_the_dense_gaussian(shape):
    field = FieldPrior.power_law(shape, 2.5, 0.4, mean=normal(*shape))
    dense = GaussianPrior(field.mean, field.covariance)
    z, A, y = normal(4, *shape, seed=1), Dense(normal(3, field.size, seed=2), shape), normal(3)
    sigma = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=F64)
    torch.testing.assert_close(field.denoise(z, sigma), dense.denoise(z, sigma), rtol=0, atol=1e-11)
    torch.testing.assert_close(field.log_prob(z, sigma), dense.log_prob(z, sigma), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(field.log_prob(z), dense.log_prob(z), rtol=1e-10, atol=1e-8)
    assert field.sigma_max == pytest.approx(dense.sigma_max)
    assert field.posterior(A, y, 0.1).log_evidence == pytest.approx(dense.posterior(A, y, 0.1).log_evidence, abs=1e-9)


def test_field_covariance_is_the_cosine_sum():
    """Cov(i, j) = mean over k of S(k) cos(2 pi k (i - j) / N), written without any Fourier library."""
    field = FieldPrior.power_law((1, 4, 6), 3.0, 1.3)
    i = torch.cartesian_prod(torch.arange(4.0, dtype=F64) / 4, torch.arange(6.0, dtype=F64) / 6)
    k = torch.cartesian_prod(torch.arange(4.0, dtype=F64), torch.arange(6.0, dtype=F64))
    phase = 2 * math.pi * ((i[:, None] - i[None]) @ k.mT)
    torch.testing.assert_close(field.covariance, (field.spectrum.flatten() * phase.cos()).mean(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(field.covariance.diagonal(), torch.full((24,), 1.3**2, dtype=F64), rtol=1e-12, atol=0)


def test_matern_and_power_law_have_their_form():
    """Matern 3/2 is (1 + a r) exp(-a r), a = sqrt(3) / length; the grid cuts its spectrum at order (a / pi)^3 / 3."""
    length = 12.0
    row = FieldPrior.matern((1, 256), length, 1.5, std=2.0).covariance[0, :40] / 4.0
    a = math.sqrt(3) / length
    r = torch.arange(40, dtype=F64)
    torch.testing.assert_close(row, (1 + a * r) * torch.exp(-a * r), rtol=0, atol=1e-3)
    s = FieldPrior.power_law((1, 64), 3.0, outer_scale=1e6).spectrum[0]
    torch.testing.assert_close((s[1:16] / s[2:32:2]).log2(), torch.full((15,), 3.0, dtype=F64), rtol=1e-6, atol=0)


def test_samples_have_the_moments(prior):
    """Each entry of the mean and of the covariance within 5 standard errors, from the draws' own fourth moments."""
    n = 4000
    draws = prior.sample(n, seed=11)
    assert draws.dtype == F64
    assert draws.shape == (n, *prior.shape)
    flat = (draws - prior.mean).flatten(1)
    error = flat.std(0) / n**0.5
    assert bool((flat.mean(0).abs() < 5 * error).all())
    products = flat[:, :, None] * flat[:, None]
    assert bool(((products.mean(0) - prior.covariance).abs() < 5 * products.std(0) / n**0.5).all())


def test_samples_are_of_the_mixture_not_only_of_its_moments():
    prior = mixture()
    component = prior.responsibilities(prior.sample(4000)).mean(0)
    spread = (prior.weights * (1 - prior.weights) / 4000).sqrt()
    assert bool(((component - prior.weights).abs() < 5 * spread).all())


def test_draws_depend_on_seed_and_index_alone(prior):
    before = torch.random.get_rng_state()
    torch.testing.assert_close(prior.sample(5, seed=2)[:3], prior.sample(3, seed=2), rtol=0, atol=1e-12)
    assert not torch.allclose(prior.sample(3, seed=2), prior.sample(3, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_posterior_draws_have_the_moments_and_a_stream_of_their_own():
    prior = GaussianPrior(torch.zeros(3), torch.eye(3))
    posterior = prior.posterior(Dense(torch.tensor([[1.0, 1.0, 0.0]], dtype=F64), (3,)), torch.ones(1), 0.5)
    draws, n = posterior.sample(4000, seed=1), 4000
    assert bool(((draws.mean(0) - posterior.mean).abs() < 5 * posterior.std / n**0.5).all())
    # Unit direction 2 is unobserved: the same stream would give the prior's own draws there.
    correlation = torch.corrcoef(torch.stack([draws[:, 2], prior.sample(n, seed=1)[:, 2]]))[0, 1]
    assert abs(float(correlation)) < 5 / n**0.5


def test_curvature_is_the_jacobian():
    for prior in (gaussian(), PRIORS["power law"](), PRIORS["white 3-D"]()):
        curvature, v, z = prior.curvature, normal(3, *prior.shape, seed=1), normal(3, *prior.shape, seed=2)
        torch.testing.assert_close(curvature.from_basis(curvature.to_basis(v)), v, rtol=0, atol=1e-13)
        torch.testing.assert_close(curvature.to_basis(v).abs().square().sum(), v.square().sum(), rtol=1e-12, atol=0)
        for sigma in (0.05, 1.0, 30.0):
            at = z.clone().requires_grad_()
            jacobian_v = torch.autograd.grad(prior.denoise(at, sigma), at, v)[0]  # symmetric, so J^T v = J v
            torch.testing.assert_close(curvature.covariance(v, sigma), sigma**2 * jacobian_v, rtol=1e-9, atol=1e-12)
            h = (1.0 - curvature.variance(sigma) / sigma**2) / sigma**2
            torch.testing.assert_close(curvature.precision(sigma), h, rtol=1e-9, atol=1e-12)
            assert float(curvature.precision(sigma, floor=0.5).min()) >= 0.5 / sigma**2
        assert curvature.covariance(v.float(), 0.5).dtype == torch.float32
    assert mixture().curvature is None


def test_keys_tell_priors_apart():
    def families(shift: float = 0.0, **options: object) -> list:
        return [
            GaussianPrior(torch.zeros(2) + shift, torch.eye(2), **options),
            MixturePrior(torch.ones(1), torch.zeros(1, 2) + shift, torch.eye(2)[None], **options),
            FieldPrior(torch.ones(1, 2), shift, **options),
        ]

    plain = [p.key for p in families()]
    assert plain == [p.key for p in families()]
    others = [*families(1e-3), *families(sigma_min=1e-4)]
    scaled = [
        GaussianPrior(torch.zeros(2), torch.eye(2), decoder=Affine((2,), 0.5)),
        GaussianPrior(torch.zeros(2), 2 * torch.eye(2)),
    ]
    keys = sorted([*plain, *(p.key for p in [*others, *scaled])])
    assert all(a != b for a, b in pairwise(keys))
    # The key is part of provenance: it must not change between releases without a reason.
    assert plain[0] == "01578251f21f02599f7859100eaa14d5d61a04f4f453728ebb61d4e8a6d522c3"


def test_way_out_and_back():
    prior = GaussianPrior(torch.zeros(3, 4, 4), torch.eye(48), decoder=Affine((3, 4, 4), 0.5, 0.5))
    z = normal(2, 3, 4, 4)
    torch.testing.assert_close(prior.encode(prior.decode(z)), z)
    assert prior.event[0].dims == ("channel", "y", "x")
    with pytest.raises(CapabilityError, match="no inverse"):
        GaussianPrior(torch.zeros(3), torch.eye(3), decoder=Dense(torch.eye(3), (3,))).encode(z)


def test_degenerate_covariances_project():
    flat = GaussianPrior(torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    for sigma in (0.0, 1e-8):
        torch.testing.assert_close(
            flat.denoise(torch.tensor([[2.0, 0.0]], dtype=F64), sigma), torch.ones(1, 2, dtype=F64)
        )
    assert bool(torch.isfinite(flat.log_prob(torch.zeros(1, 2), 0.1)).all())
    for prior in (
        flat,
        FieldPrior(torch.tensor([[1.0, 0.0]])),
        MixturePrior(torch.ones(1), torch.zeros(1, 2), flat.covariance[None]),
    ):
        with pytest.raises(InputError, match="no density at sigma = 0"):
            prior.log_prob(torch.zeros(1, *prior.shape))


class Square(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x**2


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: GaussianPrior(torch.zeros(2), torch.eye(3)), ShapeError, "needs 2 values"),
        (lambda: GaussianPrior(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), InputError, "symmetric"),
        (lambda: GaussianPrior(torch.zeros(2), torch.diag(torch.tensor([1.0, -0.1]))), InputError, "semi-definite"),
        (lambda: GaussianPrior(torch.zeros(2), torch.full((2, 2), torch.nan)), InputError, "finite"),
        (lambda: GaussianPrior(torch.zeros(2), torch.zeros(2, 2)), InputError, "no scale"),
        (lambda: GaussianPrior(torch.ones(1), torch.eye(1), sigma_min=1.0, sigma_max=0.5), InputError, "Noise levels"),
        (lambda: GaussianPrior(torch.zeros(2), torch.eye(2), decoder=Affine((3,))), ShapeError, "decoder"),
        (
            lambda: MixturePrior(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2, 1, 1)),
            InputError,
            "positive",
        ),
        (lambda: MixturePrior(torch.ones(3), torch.zeros(2, 1), torch.ones(2, 1, 1)), ShapeError, "2 means"),
        (lambda: FieldPrior(torch.tensor([[1.0, 2.0, 3.0]])), InputError, r"S\(k\) = S\(-k\)"),
        (lambda: FieldPrior(-torch.ones(1, 4)), InputError, "variances"),
        (lambda: FieldPrior(torch.ones(4)), ShapeError, "spectrum"),
        (lambda: FieldPrior(torch.ones(1, 4), torch.zeros(3)), ShapeError, "broadcast"),
        (lambda: FieldPrior.power_law((1, 4), 2.0, -1.0), InputError, "positive std"),
        (lambda: FieldPrior.power_law((1, 65, 64), 2.0).covariance, InputError, "too large"),
        (lambda: gaussian().denoise(torch.zeros(1, 3), 1.0), ShapeError, r"\(n, 2, 3\)"),
        (lambda: gaussian().denoise(torch.zeros(2, 2, 3), torch.ones(3)), ShapeError, "one value a particle"),
        (lambda: gaussian().posterior(Square((2, 3), (2, 3)), torch.zeros(2, 3), 1.0), CapabilityError, "affine"),
        (lambda: gaussian().posterior(Scale((2, 3)), torch.zeros(2, 3), 0.0), InputError, "noise_std"),
        (lambda: gaussian().posterior(Scale((2, 3)), torch.zeros(2, 3), torch.ones(4)), ShapeError, "broadcast"),
        (lambda: gaussian().posterior(Scale((2, 3)), torch.zeros(2, 2, 3), 1.0), ShapeError, "one measurement"),
        (lambda: gaussian().posterior(Scale((3, 2)), torch.zeros(3, 2), 1.0), ShapeError, "decodes to"),
        (lambda: gaussian().posterior(Scale((2, 3)), torch.full((2, 3), torch.nan), 1.0), InputError, "finite"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_is_wrong(make, error, match):
    with pytest.raises(error, match=match):
        make()


class Wrapped(nn.Module):
    """The exact Gaussian prior with one member replaced."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.exact = gaussian()
        self.changes = changes

    def __getattr__(self, name: str) -> object:
        changes = self.__dict__.get("changes", {})
        if name in changes:
            value = changes[name]
            return (lambda *a, **k: value(self._modules["exact"], *a, **k)) if callable(value) else value
        if name == "exact":
            return self._modules["exact"]
        return getattr(self._modules["exact"], name)


def skewed(p: GaussianPrior, z: Tensor, sigma: float) -> Tensor:
    D = p.denoise(z, sigma)
    return D + 0.01 * (D.flip(-1) - D.roll(1, -1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"denoise": lambda p, z, s: p.denoise(z, s).flatten(1)}, "shape"),
        ({"denoise": lambda p, z, s: p.denoise(z, s).float()}, "dtype"),
        ({"denoise": lambda p, z, s: p.denoise(z, s) / torch.zeros(())}, "finite"),
        ({"denoise": lambda p, z, s: p.denoise(z, float(torch.as_tensor(s, dtype=F64).max()))}, "neighbours"),
        ({"denoise": lambda p, z, s: p.denoise(z, s) + 1e-6 * z.mean(0)}, "a batch disagree"),
        ({"denoise": lambda p, z, s: p.denoise(z, s) + (1e-6 if isinstance(s, Tensor) else 0.0)}, "tensor"),
        ({"denoise": lambda p, z, s: p.denoise(z, s) + 0.01}, "sigma_min"),
        ({"sigma_max": 0.1}, "sigma_max"),
        ({"denoise": skewed, "log_prob": lambda p, z, s: p.log_prob(z, s), "sigma_min": 0.5}, "gradient"),
        ({"encode": lambda _, x: 1.01 * x}, "invert"),
        ({"curvature": GaussianPrior(torch.zeros(2, 3), 2 * spd(6, seed=2)).curvature}, "curvature.covariance"),
        ({"sample": lambda p, n, seed: 1.5 * p.sample(n, seed=seed)}, "standard errors"),
    ],
)
def test_check_prior_finds_what_is_wrong(changes, match):
    with pytest.raises(AssertionError, match=match):
        check_prior(Wrapped(**changes), n=400)


def test_check_prior_names_missing_members():
    with pytest.raises(CapabilityError, match="lacks sigma_max, denoise"):
        check_prior(type("Half", (), {"shape": (1,), "sigma_min": 0.1})())


def test_check_prior_of_a_bare_prior():
    """The least that a user writes: no density, no draws; figures are reported, not asserted."""
    exact = gaussian()

    class Bare:
        shape, sigma_min, sigma_max = exact.shape, exact.sigma_min, exact.sigma_max

        def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
            return exact.denoise(z, sigma)

    report = check_prior(Bare())
    assert not report.analytic
    assert report.round_trip is None
    # The flow's points are near draws of the prior: Tweedie holds to a few per cent where the noise is not small.
    assert report.levels[1].tweedie == pytest.approx(report.levels[1].error, rel=0.3)
    assert report.levels[1].score_error is None
