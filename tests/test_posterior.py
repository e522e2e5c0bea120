"""The posterior: micro-batches, counts, derivatives, the linear problem in latent units, paths and company."""

import math
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import pytest
import torch
from torch import Tensor

from invdiff import likelihoods, operators, samplers
from invdiff.errors import CapabilityError, CatalogueError, InputError, ShapeError
from invdiff.event import Variable
from invdiff.linear_gaussian import LinearGaussian
from invdiff.networks import UNet
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator, Operator
from invdiff.posterior import Posterior, _on
from invdiff.potential import Noised, Tempered
from invdiff.priors import FieldPrior, GaussianPrior, MarkovChainPrior, MixturePrior, NetworkPrior
from invdiff.problem import Problem
from invdiff.solve import solve

F64 = torch.float64
SHAPE = (1, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Dense(LinearOperator):
    def __init__(self, matrix: Tensor, in_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, (len(matrix),))
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y.dtype)).reshape(-1, *self.in_shape)


class Bend(Operator):
    """A nonlinear pixelwise response."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def covariance(d: int, seed: int = 0) -> Tensor:
    b = normal(d, d, seed=seed)
    return b @ b.mT / d + 0.2 * torch.eye(d, dtype=F64)


def gaussian_prior(decoder: Operator | None = None) -> GaussianPrior:
    return GaussianPrior(0.3 * normal(*SHAPE, seed=5), covariance(16), decoder=decoder, sigma_min=1e-2, sigma_max=30.0)


def mixture_prior() -> MixturePrior:
    means = torch.stack([normal(*SHAPE, seed=s) for s in (1, 2)])
    return MixturePrior(
        torch.tensor([0.4, 0.6]),
        means,
        torch.stack([covariance(16, s) for s in (3, 4)]),
        sigma_min=1e-2,
        sigma_max=60.0,
    )


def field_prior() -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 0.7, 0.1, sigma_min=1e-2, sigma_max=40.0)


MASK = operators.Inpainting((torch.arange(16).reshape(4, 4) % 3 > 0), SHAPE)
DENSE = Dense(normal(6, 16, seed=7), SHAPE)


def problem(operator: Operator = MASK, seed: int = 0, noise_std: float | Tensor = 0.4) -> Problem:
    y = operator(normal(1, *SHAPE, seed=100 + seed))[0] + 0.4 * normal(*operator.out_shape, seed=200 + seed)
    return Problem(likelihoods.Gaussian(operator, y, noise_std))


def posterior(*args, **settings) -> Posterior:
    return Posterior(*args, dtype=F64, **settings)


# Micro-batches and counts.


@pytest.mark.parametrize("size", [1, 3, 7])
def test_micro_batches_do_not_change_results(size):
    whole = posterior([problem(seed=1), problem(seed=2)], mixture_prior())
    parts = posterior([problem(seed=1), problem(seed=2)], mixture_prior(), micro_batch=size)
    z = normal(2, 5, *SHAPE, seed=3)

    def all_of(p: Posterior) -> list[Tensor]:
        sigma = torch.linspace(0.1, 2.0, 10, dtype=F64).reshape(2, 5)
        vjp = p.denoise_vjp(z, sigma, lambda block: block.log_likelihood_and_grad(block.denoised)[1])
        value, grad = p.potential(0.7, Noised())(z)
        residual = p.linear_rows(z, lambda linear, rows: linear.operator.adjoint(linear.residual(rows)))
        pairs = [*vjp, value, grad, *p.log_likelihood_and_grad(z)]
        return [p.denoise(z, sigma), p.log_likelihood(z), p.deviance(z), residual, p.decode(z), *pairs]

    for a, b in zip(all_of(whole), all_of(parts), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert whole.evaluations == parts.evaluations


def test_evaluations_count_particles():
    p = posterior(problem(), gaussian_prior(), micro_batch=4)
    z = normal(2, 3, *SHAPE)
    p.denoise(z, 1.0)
    assert p.evaluations.denoiser == 6
    p.denoise_vjp(z, 1.0, lambda block: block.vjp(block.denoised))
    assert (p.evaluations.denoiser, p.evaluations.denoiser_vjp) == (12, 12)
    p.log_likelihood(z)
    p.deviance(z)
    assert (p.evaluations.likelihood, p.evaluations.likelihood_grad) == (12, 0)
    p.log_likelihood_and_grad(z)
    assert (p.evaluations.likelihood, p.evaluations.likelihood_grad) == (18, 6)
    p.potential(1.0, Noised())(z)
    assert (p.evaluations.likelihood, p.evaluations.likelihood_grad) == (24, 12)
    p.linear_rows(z, lambda linear, rows: rows)
    assert p.evaluations.likelihood_grad == 18


def test_a_run_costs_what_the_sampler_says():
    p = posterior(problem(DENSE), gaussian_prior())
    for sampler in (samplers.DPS(steps=7), samplers.DAPS(steps=4, ode_steps=3), samplers.ImportanceSampling(steps=5)):
        for _ in range(2):
            about = p.sample(sampler, 3).about
            assert about["evaluations_per_draw"] == sampler.cost().forward
            assert about["backward_evaluations_per_draw"] == sampler.cost().backward


def test_levels_of_noise_are_a_number_or_one_a_particle():
    p = posterior(problem(), mixture_prior())
    z, sigma = normal(2, 3, *SHAPE), torch.tensor([[0.1, 0.5, 1.0], [2.0, 3.0, 4.0]], dtype=F64)
    expected = torch.stack(
        [torch.stack([p.denoise(z[i, j][None], float(sigma[i, j]))[0] for j in range(3)]) for i in range(2)]
    )
    torch.testing.assert_close(p.denoise(z, sigma), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.denoise(z[0], sigma[0]), expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.denoise(z, torch.tensor(0.5)), p.denoise(z, 0.5))


# Derivatives.


def test_denoise_vjp_is_the_transposed_jacobian():
    p, prior = posterior(problem(), mixture_prior(), micro_batch=2), mixture_prior()
    z, v = normal(3, *SHAPE, seed=1), normal(3, *SHAPE, seed=2)
    rows = iter(v.split(2))
    denoised, product = p.denoise_vjp(z, 0.8, lambda block: next(rows))
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda x: prior.denoise(x[None], 0.8)[0], z[i]).reshape(16, 16)
        torch.testing.assert_close(product[i].flatten(), jacobian.mT @ v[i].flatten(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(denoised, prior.denoise(z, 0.8))
    assert not denoised.requires_grad
    assert not product.requires_grad


@pytest.mark.parametrize(
    "decoder", [None, operators.Affine(SHAPE, 0.5, 0.5), operators.Scale(SHAPE, 3.0), Bend(SHAPE, SHAPE)]
)
@pytest.mark.parametrize("operator", [DENSE, Bend(SHAPE, SHAPE)], ids=["linear", "nonlinear"])
def test_the_gradient_goes_through_the_decoder(operator, decoder):
    p = posterior(problem(operator), gaussian_prior(decoder))
    z = normal(2, 3, *SHAPE)
    value, grad = p.log_likelihood_and_grad(z)
    leaf = z.clone().requires_grad_()
    expected = torch.autograd.grad(p.log_likelihood(leaf).sum(), leaf)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(value, p.log_likelihood(z))
    assert value.shape == (2, 3)
    x = decoder(z.flatten(0, 1)) if decoder else z.flatten(0, 1)
    torch.testing.assert_close(value.flatten(), problem(operator).likelihood.log_prob(x))


def test_blocks_hold_their_own_rows():
    p = posterior([problem(DENSE, 1), problem(DENSE, 2)], gaussian_prior(), micro_batch=3)
    z, found = normal(2, 4, *SHAPE), []

    def look(block):
        found.append((block.deviance(block.denoised), block.linear.residual(block.denoised).square().sum(1) / 0.4**2))
        return block.denoised

    p.denoise_vjp(z, 0.5, look)
    expected = p.deviance(p.denoise(z, 0.5)).flatten()
    for column in zip(*found, strict=True):
        torch.testing.assert_close(torch.cat(column), expected)


def test_a_problem_stays_where_it_is_when_it_is_solved_elsewhere():
    likelihood = problem().likelihood
    there = _on(likelihood, torch.device("meta"))
    assert {t.device.type for t in there.buffers()} == {"meta"}
    assert {t.device.type for t in likelihood.buffers()} == {"cpu"}
    assert _on(likelihood, torch.device("cpu")) is likelihood


# The linear problem in latent units.


def matrix(linear: LinearGaussian) -> Tensor:
    return linear.operator(torch.eye(16, dtype=F64).reshape(16, *SHAPE)).flatten(1).mT


@pytest.mark.parametrize(
    "decoder", [None, operators.Affine(SHAPE, 0.5, 0.5), operators.Affine(SHAPE, -2.0), operators.Scale(SHAPE, 3.0)]
)
def test_the_linear_problem_is_the_composition_less_its_offset(decoder):
    p = posterior(problem(DENSE), gaussian_prior(decoder))
    z = normal(3, *SHAPE)
    x = decoder(z) if decoder else z
    y = problem(DENSE).likelihood.measurement
    torch.testing.assert_close(p.linear.residual(z), y - DENSE(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        matrix(p.linear) @ z.flatten(1).mT, (y - p.linear.residual(z) - (y - p.linear.measurement)).mT
    )


def test_solve_inverts_the_dense_matrix():
    p = posterior(problem(DENSE, noise_std=torch.linspace(0.2, 0.5, 6, dtype=F64)), gaussian_prior())
    a, r, c = matrix(p.linear), normal(3, 6, seed=1), covariance(16, 9)
    noise = torch.diag(torch.linspace(0.2, 0.5, 6, dtype=F64) ** 2)
    isotropic = torch.linalg.solve(noise + 0.7 * a @ a.mT, r.mT).mT
    torch.testing.assert_close(p.linear.solve(r, 0.7), isotropic, rtol=1e-9, atol=1e-9)
    general = torch.linalg.solve(noise + a @ c @ a.mT, r.mT).mT
    apply = lambda v: (v.flatten(1) @ c).reshape(v.shape)  # noqa: E731
    torch.testing.assert_close(p.linear.solve(r, apply), general, rtol=1e-9, atol=1e-9)
    through_svd = posterior(problem(MASK), gaussian_prior()).linear
    r = normal(2, *MASK.out_shape)
    torch.testing.assert_close(through_svd.solve(r, 0.7), r / (0.4**2 + 0.7))


@pytest.mark.parametrize("noise_std", [0.3, torch.linspace(0.2, 0.5, 6, dtype=F64)])
def test_gain_is_the_gaussian_posterior_of_a_white_prior(noise_std):
    p = posterior(problem(DENSE, noise_std=noise_std), gaussian_prior(operators.Scale(SHAPE, 2.0)))
    a, r = matrix(p.linear), normal(3, 6, seed=1)
    noise = torch.diag(torch.as_tensor(noise_std, dtype=F64).expand(6) ** 2)
    expected = (0.7 * a.mT @ torch.linalg.solve(noise + 0.7 * a @ a.mT, r.mT)).mT
    torch.testing.assert_close(p.linear.gain(r, 0.7).flatten(1), expected, rtol=1e-10, atol=1e-10)
    masked = posterior(problem(MASK), gaussian_prior()).linear  # in closed form
    r = normal(2, *MASK.out_shape)
    torch.testing.assert_close(masked.gain(r, 0.7), MASK.adjoint(0.7 * r / (0.4**2 + 0.7)))


def test_conjugate_gradients_stop_a_row_whose_matrix_is_not_positive():
    from invdiff.operators.solvers import conjugate_gradient

    diagonal = torch.tensor([[1.0, 2.0, 3.0], [1.0, -5.0, 1.0]], dtype=F64)
    x = conjugate_gradient(lambda v: diagonal * v, torch.ones(2, 3, dtype=F64))
    torch.testing.assert_close(x[0], 1.0 / diagonal[0])
    assert bool(torch.isfinite(x[1]).all())


# Capabilities and errors.


def test_capabilities():
    def of(operator, prior, noise_std=0.4):
        return posterior(problem(operator, noise_std=noise_std), prior).capabilities

    base = {"denoiser", "denoiser_vjp", "likelihood_gradient", "gaussian"}
    assert of(MASK, gaussian_prior()) == base | {"linear", "svd", "curvature"}
    assert of(MASK, mixture_prior()) == base | {"linear", "svd"}
    assert of(DENSE, mixture_prior()) == base | {"linear"}
    assert of(MASK, mixture_prior(), torch.full(MASK.out_shape, 0.4)) == base | {"linear"}
    assert of(Bend(SHAPE, SHAPE), mixture_prior()) == base
    assert of(MASK, gaussian_prior(Bend(SHAPE, SHAPE))) == base | {"curvature"}
    objective = Problem(likelihoods.Objective(lambda x: x.flatten(1).square().sum(1), 1.0, SHAPE))
    assert posterior(objective, mixture_prior()).capabilities == {"denoiser", "denoiser_vjp", "likelihood_gradient"}


class Least:
    """The least that a user writes."""

    shape, sigma_min, sigma_max = SHAPE, 0.01, 20.0

    def denoise(self, z, sigma):
        s = torch.as_tensor(sigma, dtype=z.dtype).reshape(-1, 1, 1, 1)
        return z / (1.0 + s**2)


def test_a_prior_needs_four_members_only():
    solution = posterior(problem(MASK), Least()).sample(samplers.PiGDM(steps=5), 3)
    assert solution.draws.shape == (3, *SHAPE)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"problem has .*\(1, 4, 4\).*prior .*\(1, 5, 5\).*prior\.at"):
        Posterior(problem(), FieldPrior.power_law((1, 5, 5), 2.0))
    own = Variable(name="T", dims=("channel", "y", "x"), shape=SHAPE, units="K")
    with pytest.raises(ShapeError, match="'K'"):
        Posterior(Problem(problem().likelihood, event=(own,)), gaussian_prior())
    p = posterior([problem(seed=1), problem(seed=2)], gaussian_prior())
    for wrong in (normal(3, 1, 4, 5), normal(*SHAPE), normal(4, 4)):
        with pytest.raises(ShapeError, match=r"\(\.\.\., 1, 4, 4\), got"):
            p.denoise(wrong, 1.0)
    with pytest.raises(ShapeError, match="3 particles cannot be shared by 2 problems"):
        p.log_likelihood(normal(3, *SHAPE))
    for settings, message in [({"precision": "int8"}, "bfloat16"), ({"micro_batch": 0}, "at least 1")]:
        with pytest.raises(InputError, match=message):
            Posterior(problem(), gaussian_prior(), **settings)
    with pytest.raises(InputError, match="no problem"):
        Posterior([], gaussian_prior())
    with pytest.raises(InputError, match="draws=0"):
        p.sample(samplers.DPS(), 0)
    with pytest.raises(InputError, match="one kind of likelihood"):
        Posterior([problem(), Problem(likelihoods.Product([problem().likelihood]))], gaussian_prior())
    with pytest.raises(CapabilityError, match="no condition"):
        Posterior(Problem(problem().likelihood, given={"u": torch.ones(1)}), mixture_prior())
    with pytest.raises(CapabilityError, match="not a masked prior"):
        p.log_probs(torch.zeros(2, *SHAPE))
    with pytest.raises(CapabilityError, match="PiGDM needs linear"):
        posterior(problem(Bend(SHAPE, SHAPE)), gaussian_prior()).sample(samplers.PiGDM())


# The reference stays with the problem.


def reachable(root: object) -> list[object]:
    """Everything that attributes, containers, closures and defaults lead to from an object."""
    seen: dict[int, object] = {}
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, BuiltinFunctionType, str, bytes, int, float)):
            continue
        seen[id(item)] = item
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += list(item)
        elif isinstance(item, MethodType):
            stack += [item.__self__, item.__func__]
        elif isinstance(item, FunctionType):
            stack += [c.cell_contents for c in item.__closure__ or ()] + list(item.__defaults__ or ())
        else:
            stack += list(getattr(item, "__dict__", {}).values())
            stack += [getattr(item, n) for n in getattr(type(item), "__slots__", ()) if hasattr(item, n)]
    return list(seen.values())


def test_the_reference_cannot_be_reached_from_a_posterior():
    truth = normal(*SHAPE, seed=1)
    own = Problem.simulate(operators.Scale(SHAPE), truth, noise_std=0.3, card={"name": "x"})
    p = posterior(own, gaussian_prior())
    held = reachable(p)
    assert any(t is p.linear.measurement for t in held), "the walk sees what is there"
    assert any(t is truth for t in reachable(own)), "and what it looks for"
    assert not any(isinstance(t, Problem) for t in held)
    for t in held:
        if isinstance(t, Tensor):
            assert t.data_ptr() != truth.data_ptr()
            assert t.numel() != truth.numel() or not torch.equal(t.flatten().to(F64), truth.flatten())


# Paths.


def dense_noised(p: Posterior, z: Tensor, sigma: float, kappa: float) -> tuple[Tensor, Tensor]:
    a, linear = matrix(p.linear), p.linear
    variance = torch.broadcast_to(linear.noise_std**2, linear.operator.out_shape).flatten()
    law = torch.distributions.MultivariateNormal(
        torch.zeros(len(a), dtype=F64), torch.diag(variance) + kappa * sigma**2 * a @ a.mT
    )
    leaf = z.clone().requires_grad_()
    value = law.log_prob(linear.measurement.flatten(1) - leaf.flatten(1) @ a.mT)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


WITH_SVD = {
    "inpainting": MASK,
    "identity": operators.Scale(SHAPE, -1.5),
    "blur": operators.Blur(operators.gaussian_kernel(3, 0.8), SHAPE, boundary="circular"),
    "reflect": operators.Blur(operators.gaussian_kernel(3, 0.8), SHAPE, boundary="reflect"),
    "downsampling": operators.Downsampling(SHAPE, factor=2),
}


@pytest.mark.parametrize("kappa", [0.5, 1.0])
@pytest.mark.parametrize("decoder", [None, operators.Affine(SHAPE, 0.5, 0.2)], ids=["latent", "affine"])
@pytest.mark.parametrize("operator", WITH_SVD.values(), ids=WITH_SVD.keys())
def test_the_noised_path_is_the_dense_gaussian(operator, decoder, kappa):
    p = posterior(problem(operator), gaussian_prior(decoder))
    if "svd" not in p.capabilities:
        pytest.fail(f"{type(operator).__name__} has no SVD here; take one that has")
    z = normal(3, *SHAPE, seed=4)
    value, grad = p.potential(0.9, Noised(kappa=kappa))(z)
    expected = dense_noised(p, z, 0.9, kappa)
    torch.testing.assert_close(value, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected[1], rtol=1e-9, atol=1e-9)


def test_paths_begin_at_the_likelihood():
    p = posterior(problem(), gaussian_prior())
    z = normal(2, *SHAPE)
    for path in (Noised(), Noised(kappa=0.0), Tempered(scale=0.5)):
        for a, b in zip(p.potential(0.0, path)(z), p.log_likelihood_and_grad(z), strict=True):
            torch.testing.assert_close(a, b)
    value, _ = p.potential(1e-6, Noised())(z)
    torch.testing.assert_close(value, p.log_likelihood(z), rtol=1e-8, atol=1e-8)
    assert torch.equal(p.potential(7.0, Noised(kappa=0.0))(z)[0], p.log_likelihood(z))


@pytest.mark.parametrize("std", [0.4, torch.linspace(0.2, 0.6, 6, dtype=F64)], ids=["scalar", "diagonal"])
def test_without_an_svd_the_noise_is_bounded_from_above(std):
    p = posterior(problem(DENSE, noise_std=std), gaussian_prior())
    z, sigma = normal(4, *SHAPE, seed=4), 0.9
    a = matrix(p.linear)
    bound = torch.as_tensor(std, dtype=F64) ** 2 + sigma**2 * p.linear.operator.norm() ** 2
    law = torch.distributions.Normal(torch.zeros(6, dtype=F64), torch.broadcast_to(bound, (6,)).sqrt())
    leaf = z.clone().requires_grad_()
    expected = law.log_prob(p.linear.measurement - leaf.flatten(1) @ a.mT).sum(1)
    value, grad = p.potential(sigma, Noised())(z)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-9, atol=1e-9)
    exact = torch.diag(torch.broadcast_to(torch.as_tensor(std, dtype=F64) ** 2, (6,))) + sigma**2 * a @ a.mT
    gap = torch.linalg.eigvalsh(torch.diag(torch.broadcast_to(bound, (6,))) - exact)
    assert float(gap.min()) > -1e-5 * float(bound.max())  # power iteration stops a little below the norm


def test_the_tempered_path_scales_any_likelihood():
    p = posterior(problem(Bend(SHAPE, SHAPE)), gaussian_prior())
    z = normal(2, 3, *SHAPE)
    value, grad = p.log_likelihood_and_grad(z)
    tempered = p.potential(1.5, Tempered(scale=0.5))(z)
    torch.testing.assert_close(tempered[0], value / 10.0)
    torch.testing.assert_close(tempered[1], grad / 10.0)
    with pytest.raises(CapabilityError, match="Tempered"):
        p.potential(1.0, Noised())(z)


# Runs: company, micro-batches and seeds.


def token_prior() -> MarkovChainPrior:
    """Eight tokens of three, whose vectors decode to the shape of the pictures here."""
    law = torch.softmax(normal(3, 3, seed=8), 1)
    return MarkovChainPrior(law[0], law, 8, codebook=normal(3, 2, seed=9), detokeniser=operators.Reshape((8, 2), SHAPE))


RUNS = {
    "pigdm-jacobian": (samplers.PiGDM(steps=6), mixture_prior),
    "pigdm-isotropic": (samplers.PiGDM(steps=6, covariance=samplers.Isotropic()), mixture_prior),
    "pigdm-spectral": (samplers.PiGDM(steps=6, covariance=samplers.Spectral()), field_prior),
    "dps": (samplers.DPS(steps=6, scale=0.01), mixture_prior),
    "daps": (samplers.DAPS(steps=5, inner=samplers.Langevin(steps=5)), mixture_prior),
    "daps-exact": (samplers.DAPS(steps=5, inner=samplers.ExactInner()), mixture_prior),
    "afdps": (samplers.AFDPS(steps=6), mixture_prior),
    "afdps-laplacian": (samplers.AFDPS(steps=6, form="laplacian"), mixture_prior),
    "afdps-ode": (samplers.AFDPS(steps=4, form="ode"), mixture_prior),
    "pcn": (samplers.PCN(steps=3, moves=2, prior_steps=3), mixture_prior),
    "mcgdiff": (samplers.MCGDiff(steps=6), mixture_prior),
    "fps": (samplers.FPS(steps=6), mixture_prior),
    "fps-drawn": (samplers.FPS(steps=6, trajectory="drawn"), mixture_prior),
    "tds": (samplers.TDS(steps=6), mixture_prior),
    "fk-steering": (samplers.FKSteering(steps=6), mixture_prior),
    "transport-langevin": (samplers.TransportLangevin(steps=3, refreshes=2), field_prior),
    "transport-langevin-weighted": (
        samplers.TransportLangevin(steps=3, refreshes=1, resampling=samplers.Systematic()),
        mixture_prior,
    ),
    # A ladder so narrow that walkers make their round trips in a run this short.
    "dmcmc": (
        samplers.DMCMC(
            steps=30,
            rungs=2,
            burn_in=20,
            keep=3,
            path=Noised(kappa=0.0),
            levels=samplers.Levels(sigma_min=0.05, sigma_max=0.1),
        ),
        mixture_prior,
    ),
    "split-gibbs": (samplers.SplitGibbs(steps=5, prior_steps=2), mixture_prior),
    "ula": (samplers.ULA(steps=6), mixture_prior),
    "ddrm": (samplers.DDRM(steps=6), mixture_prior),
    "ddnm": (samplers.DDNM(steps=6), mixture_prior),
    "diffpir": (samplers.DiffPIR(steps=6), mixture_prior),
    "wdno": (samplers.WDNO(steps=6, inner=3, levels=samplers.Levels()), mixture_prior),
    "red-diff": (samplers.REDDiff(steps=6), mixture_prior),
    "importance": (samplers.ImportanceSampling(steps=6), mixture_prior),
    "twisted-smc": (samplers.TwistedSMC(threshold=1.0), token_prior),
    "twisted-smc-before": (samplers.TwistedSMC(lookahead=False, order="entropy"), token_prior),
    "masked-gibbs": (samplers.MaskedGibbs(steps=6), token_prior),
    "anchored-smc": (samplers.AnchoredSMC(inner_steps=3, threshold=1.0), token_prior),
    "amortised-smc": (samplers.AmortisedSMC(threshold=1.0), token_prior),
    "aps": (samplers.APS(steps=6, inner_steps=3), token_prior),
    "aps-competing": (samplers.APS(steps=6, inner_steps=3, sticky=False, estimator="entropy"), token_prior),
    "g2d2": (samplers.G2D2(steps=6, inner_steps=7), token_prior),
    "sgdd": (samplers.SGDD(steps=3, mh_steps=4), token_prior),
    "svdd": (samplers.SVDD(candidates=3), token_prior),
}


def test_every_sampler_has_a_run_here():
    from invdiff.solve import sampler_classes

    assert {type(s) for s, _ in RUNS.values()} == set(sampler_classes().values())


@pytest.mark.parametrize(("sampler", "prior"), RUNS.values(), ids=RUNS.keys())
def test_company_and_micro_batches_do_not_change_draws(sampler, prior):
    operator = MASK if "svd" in sampler.requires() else DENSE
    problems = [problem(operator, seed) for seed in (1, 2, 3)]
    together = posterior(problems, prior()).sample(sampler, 3, seed=4, chains=2)
    backwards = posterior(problems[::-1], prior(), micro_batch=4).sample(sampler, 3, seed=4, chains=2)[::-1]
    for one, a, b in zip(problems, together, backwards, strict=True):
        alone = posterior(one, prior(), micro_batch=1).sample(sampler, 3, seed=4, chains=2)
        assert alone.draws.shape == (6, *SHAPE)
        for other in (a, b):
            torch.testing.assert_close(other.draws, alone.draws, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(other.deviance, alone.deviance, rtol=1e-10, atol=1e-10)
            assert torch.equal(other.measurement, one.likelihood.measurement[0])
            if alone.log_evidence is not None:
                assert math.isclose(other.log_evidence, alone.log_evidence, rel_tol=1e-10)
            if alone.log_weights is not None:
                torch.testing.assert_close(other.log_weights, alone.log_weights, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together[0].draws, together[1].draws)
    chains = together[0].by_chain["image"]
    assert not torch.allclose(chains[0], chains[1])


def test_seeds_make_the_draws():
    p = posterior(problem(), gaussian_prior())
    sampler = samplers.PiGDM(steps=4)
    a, b, c = (p.sample(sampler, 3, seed=s).draws for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    # More draws leave the first ones as they are.
    torch.testing.assert_close(p.sample(sampler, 5).draws[:3], a, rtol=1e-10, atol=1e-10)


def test_the_first_state_is_centred_on_the_prior_with_the_largest_noise():
    p = posterior(problem(), gaussian_prior())
    z = p.start(1, 4000, Noise([0], 4000, dtype=F64))
    error = (z.mean((0, 1)) - p.noised_mean()).abs().max()
    assert float(error) < 4.5 * p.sigma_max / math.sqrt(4000)
    assert abs(float((z - p.noised_mean()).std()) / p.sigma_max - 1.0) < 4.5 / math.sqrt(2 * z.numel())
    expected = gaussian_prior().denoise(torch.zeros(1, *SHAPE, dtype=F64), p.sigma_max)[0]
    torch.testing.assert_close(p.noised_mean(), expected)


def test_checkpoints_belong_to_one_run(tmp_path):
    path = tmp_path / "c"

    def stop(state, info):
        if state.step == 2:
            raise KeyboardInterrupt

    p = posterior(problem(), gaussian_prior())
    sampler = samplers.PiGDM(steps=5)
    with pytest.raises(KeyboardInterrupt):
        p.sample(sampler, 3, seed=1, checkpoint=path, callback=stop)
    for other, settings in [
        (posterior(problem(seed=9), gaussian_prior()), {}),
        (posterior(problem(), mixture_prior()), {}),
        (p, {"seed": 2}),
        (p, {"draws": 4}),
        (p, {"sampler": samplers.PiGDM(steps=6)}),
    ]:
        settings = {"sampler": sampler, "draws": 3, "seed": 1, **settings}
        with pytest.raises(InputError, match="another run"):
            other.sample(**settings, checkpoint=path)
    assert torch.equal(p.sample(sampler, 3, seed=1, checkpoint=path).draws, p.sample(sampler, 3, seed=1).draws)


class Matrix(LinearOperator):
    """A dense matrix."""

    def __init__(self, matrix):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)

    def forward(self, x):
        return x @ self.matrix.mT.to(x)

    def adjoint(self, y):
        return y @ self.matrix.to(y)


def test_given_variables_are_conditioned_on():
    g = torch.Generator().manual_seed(5)
    root, A = torch.randn(5, 5, generator=g, dtype=torch.float64), torch.randn(2, 5, generator=g, dtype=torch.float64)
    event = (Variable(name="u", dims=("i",), shape=(2,)), Variable(name="v", dims=("j",), shape=(3,)))
    joint = GaussianPrior(torch.arange(5, dtype=torch.float64), root @ root.T, event=event)
    u = torch.tensor([0.3, -1.2], dtype=torch.float64)
    y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    case = Problem(likelihoods.Gaussian(Matrix(A), y, 0.5), event=event, given={"u": u})
    solution = solve(case, joint, samplers.PiGDM(steps=60), draws=400, dtype=torch.float64)
    # The same by measuring u without noise.
    both = torch.cat((A, torch.eye(5, dtype=torch.float64)[:2]))
    std = torch.tensor([0.5, 0.5, 1e-6, 1e-6], dtype=torch.float64)
    exact = joint.posterior(Matrix(both), torch.cat((y, u)), std)
    assert torch.allclose(solution.draws["u"], u.expand(400, 2), atol=1e-6)
    v, sd = solution.draws["v"], exact.std[2:]
    assert ((v.mean(0) - exact.mean[2:]).abs() < 4 * sd / 20).all()
    assert ((v.std(0) / sd - 1).abs() < 4 / 800**0.5 + 0.02).all()
    with pytest.raises(ShapeError, match="the variable"):
        joint.condition({"u": torch.zeros(3)})
    with pytest.raises(CatalogueError, match="did you mean"):
        joint.condition({"uu": u})


def tiny_network_prior():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = UNet(channels=(16, 32), blocks=1, attention=(False, False), embedding=16, groups=4)
        for p in network.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return NetworkPrior(network, (3, 8, 8), name="tiny").eval_only()


def test_precision_is_the_networks_alone_and_is_written_down():
    prior = tiny_network_prior()
    case = Problem(likelihoods.Gaussian(operators.Scale((3, 8, 8)), torch.full((3, 8, 8), 0.4), 0.1))
    exact, rough = (
        solve(case, prior, samplers.PiGDM(steps=4, covariance=samplers.Isotropic()), draws=2, precision=p)
        for p in ("float32", "bfloat16")
    )
    assert (exact.about["precision"], rough.about["precision"]) == ("float32", "bfloat16")
    assert rough.draws.dtype == torch.float32
    difference = float((exact.draws - rough.draws).abs().max())
    assert 0.0 < difference < 0.1  # bfloat16 has 8 bits; a network in it is rounded, but is the same network


def test_a_compiled_network_sees_one_shape_only(monkeypatch):
    seen = set()

    def compiled(function, *, dynamic):
        assert dynamic is False

        def recorded(z, sigma):
            seen.add((z.shape, sigma.shape))
            return function(z, sigma)

        return recorded

    monkeypatch.setattr(torch, "compile", compiled)
    prior = tiny_network_prior()
    case = Problem(likelihoods.Gaussian(operators.Scale((3, 8, 8)), torch.full((3, 8, 8), 0.4), 0.1))
    for sampler in (samplers.DPS(steps=2), samplers.DAPS(steps=2, inner=samplers.ExactInner())):
        plain = solve(case, prior, sampler, draws=7)
        chunks = solve(case, prior, sampler, draws=7, compile=True, micro_batch=3)
        torch.testing.assert_close(chunks.draws, plain.draws, rtol=1e-4, atol=1e-5)
        assert chunks.about["evaluations_per_draw"] == plain.about["evaluations_per_draw"]
    assert seen == {((3, 3, 8, 8), (3,))}


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_draws():
    prior = tiny_network_prior()
    case = Problem(likelihoods.Gaussian(operators.Scale((3, 8, 8)), torch.full((3, 8, 8), 0.4), 0.1))
    sampler = samplers.DAPS(steps=3, inner=samplers.ExactInner())
    plain, compiled = (solve(case, prior, sampler, draws=2, compile=c) for c in (False, True))
    assert compiled.about["compiled"]
    torch.testing.assert_close(compiled.draws, plain.draws, rtol=1e-3, atol=1e-4)
