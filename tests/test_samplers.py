"""Samplers: the contract that all share, and what tells one from the other on problems with known answers."""

import dataclasses
import inspect
import itertools
import math
import re

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators, samplers
from invdiff.diagnostics.discrete import measure_tokens, named
from invdiff.driver import Cost, Sampler
from invdiff.errors import CapabilityError, CatalogueError, InputError
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.problem import Problem
from invdiff.solve import choose_sampler, sampler_by_name, sampler_classes

F64 = torch.float64
SHAPE = (1, 4, 4)

# One entry a class: settings at which its draws of the analytic problem below are to be trusted, the largest error of
# their mean in posterior standard deviations, and the range of their standard deviation relative to the posterior's.
# Both hold the sampler's bias and the sampling error of 400 draws.
ENTRIES = {
    samplers.PiGDM: (samplers.PiGDM(steps=40), 0.25, (0.85, 1.15)),
    samplers.AFDPS: (samplers.AFDPS(steps=100), 0.35, (0.75, 1.2)),
    samplers.DAPS: (samplers.DAPS(steps=40, inner=samplers.ExactInner()), 0.35, (0.85, 1.25)),
    samplers.DPS: (samplers.DPS(steps=40, scale=0.005), 0.5, (0.6, 1.15)),
    samplers.MCGDiff: (samplers.MCGDiff(steps=100), 0.5, (0.7, 1.25)),
    samplers.FPS: (samplers.FPS(steps=100), 0.5, (0.7, 1.25)),
    samplers.DMCMC: (samplers.DMCMC(steps=30, rungs=8, keep=20), 0.25, (0.85, 1.15)),
    samplers.PCN: (samplers.PCN(prior_steps=20), 0.35, (0.8, 1.2)),
    samplers.TDS: (samplers.TDS(steps=100), 0.35, (0.8, 1.15)),
    samplers.FKSteering: (samplers.FKSteering(steps=100), 0.5, (0.7, 1.25)),
    samplers.TransportLangevin: (samplers.TransportLangevin(steps=20), 0.25, (0.85, 1.15)),
    samplers.SplitGibbs: (samplers.SplitGibbs(steps=100), 0.25, (0.85, 1.2)),
    samplers.ULA: (samplers.ULA(steps=200, sigma=0.3), 0.25, (0.85, 1.2)),
    samplers.DDRM: (samplers.DDRM(steps=40), 0.5, (0.35, 0.95)),
    samplers.DDNM: (samplers.DDNM(steps=40, eta=1.0), 0.35, (0.75, 1.05)),
    samplers.DiffPIR: (samplers.DiffPIR(steps=60), 0.35, (0.6, 1.0)),
    samplers.WDNO: (samplers.WDNO(steps=60, zeta=0.8, levels=samplers.Levels()), 0.35, (0.6, 1.0)),
    samplers.REDDiff: (samplers.REDDiff(steps=60, lam=4.0), 0.4, (0.25, 0.6)),
    samplers.ImportanceSampling: (samplers.ImportanceSampling(steps=40), 0.7, (0.8, 1.5)),
}

# Samplers of tokens: settings, and the largest marginal total variation of 400 draws of the enumerated chain, of which
# chance leaves 0.026.
MASKED_ENTRIES = {
    samplers.TwistedSMC: (samplers.TwistedSMC(), 0.06),
    samplers.MaskedGibbs: (samplers.MaskedGibbs(steps=150), 0.05),
    samplers.AnchoredSMC: (samplers.AnchoredSMC(), 0.07),
    samplers.AmortisedSMC: (samplers.AmortisedSMC(), 0.15),
    samplers.APS: (samplers.APS(), 0.25),
    samplers.G2D2: (samplers.G2D2(), 0.25),
    samplers.SGDD: (samplers.SGDD(steps=200), 0.06),
    samplers.SVDD: (samplers.SVDD(), 0.15),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def field() -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)


def mask() -> Operator:
    return operators.Inpainting(torch.arange(16).reshape(4, 4) % 4 > 0, SHAPE)


def problem(noise_std: float = 1.0) -> Problem:
    return Problem.simulate(mask(), field().sample(1, seed=3)[0], noise_std=noise_std, seed=1)


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def check_settings(sampler: Sampler) -> None:
    """What holds for the settings of samplers of every kind."""
    cls = type(sampler)
    # Settings: a final, frozen, keyword-only dataclass with defaults, whose repr rebuilds it.
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert all(f.kw_only for f in dataclasses.fields(cls))
    assert getattr(cls, "__final__", False)
    assert cls() == cls()
    assert (
        eval(repr(sampler), vars(samplers) | {"Levels": samplers.annealing.Levels} | vars(invdiff.integrators))
        == sampler
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.steps = 3
    assert isinstance(sampler.exact, bool)
    assert isinstance(sampler.anytime, bool)
    assert re.match(r"@\w+\{\w+, title=\{.+year=\{\d{4}\}\}", cls.citation, flags=re.DOTALL)
    assert sampler.requires() <= {
        "denoiser", "denoiser_vjp", "likelihood_gradient", "linear", "svd", "curvature", "gaussian", "masked",
        "embedding_gradient",
    }  # fmt: skip
    doc = inspect.getmodule(cls).__doc__
    assert "Cost:" in doc
    assert "iased" in doc or "xact" in doc


@pytest.mark.parametrize("name", sorted(sampler_classes()))
def test_every_sampler_has_an_entry(name):
    assert sampler_classes()[name] in ENTRIES | MASKED_ENTRIES, f"{name} has no entry in ENTRIES; give it one"


@pytest.mark.parametrize("cls", ENTRIES)
def test_every_sampler_keeps_the_contract(cls):
    sampler, mean_bound, (low, high) = ENTRIES[cls]
    check_settings(sampler)
    assert isinstance(sampler.cost(), Cost)
    # The run, through the common interface.
    posterior = Posterior(problem(), field(), dtype=F64)
    solution = posterior.sample(sampler, 400, seed=2)
    exact = field().posterior(problem().likelihood.operator, problem().likelihood.measurement[0], 1.0)
    error = (solution.mean() - exact.mean).abs() / exact.std
    assert float(error.max()) < mean_bound
    ratio = solution.std() / exact.std
    assert low < float(ratio.min()) <= float(ratio.max()) < high
    levels = [info.sigma for info in solution.trace]
    assert levels == sorted(levels, reverse=True)
    if not sampler.anytime:
        assert levels[-1] == 0.0
    assert sampler.cost().forward == solution.about["evaluations_per_draw"]
    assert sampler.cost().backward >= solution.about["backward_evaluations_per_draw"]


@pytest.mark.parametrize("cls", MASKED_ENTRIES)
def test_every_sampler_of_tokens_keeps_the_contract(cls):
    sampler, bound = MASKED_ENTRIES[cls]
    check_settings(sampler)
    assert "masked" in sampler.requires()
    case = named("chain-8")
    posterior = Posterior(case.problem, case.prior, dtype=F64)
    solution = posterior.sample(sampler, 400, seed=2)
    assert float(measure_tokens(solution, case).marginal_tv[0]) < bound
    levels = [info.sigma for info in solution.trace]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == 0.0
    assert solution.trace[-1].misfit is not None
    assert sampler.cost_on(posterior).forward == solution.about["evaluations_per_draw"]


def test_a_lower_first_level_is_where_the_run_starts():
    sampler = samplers.PiGDM(steps=3, levels=samplers.Levels(sigma_max=2.0))
    posterior = Posterior(problem(), field(), dtype=F64)
    z = sampler.init(posterior, 1, 500, noise=Noise([1], 500, dtype=F64)).z
    # 8000 independent values about the prior's mean: four standard errors of their deviation.
    assert float((z - posterior.noised_mean()).std()) == pytest.approx(2.0, rel=4.0 / math.sqrt(2 * 8000))


def test_the_list_of_samplers_is_what_the_package_exports():
    exported = {getattr(samplers, n) for n in samplers.__all__}
    found = {c for c in exported if inspect.isclass(c) and issubclass(c, Sampler) and c is not Sampler}
    assert set(sampler_classes().values()) == found == set(ENTRIES | MASKED_ENTRIES)


# PiGDM.


def pigdm(covariance, steps: int = 20, draws: int = 8) -> Tensor:
    return (
        Posterior(problem(0.3), field(), dtype=F64)
        .sample(samplers.PiGDM(steps=steps, covariance=covariance), draws)
        .draws
    )


def test_pigdm_jacobian_and_spectral_are_one_on_a_gaussian_field():
    jacobian = samplers.Jacobian(max_iterations=50, rtol=1e-12)
    spectral = samplers.Spectral(max_iterations=400, atol=1e-11)
    torch.testing.assert_close(pigdm(jacobian), pigdm(spectral), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(pigdm(samplers.Isotropic()), pigdm(spectral), atol=1e-2)


def test_the_guided_denoiser_is_that_of_the_posterior():
    """For a Gaussian prior D_y(z, sigma) = E[z_0 | z_sigma = z, y], which the exact posterior knows."""
    posterior = Posterior(problem(0.3), field(), dtype=F64)
    exact = field().posterior(problem().likelihood.operator, posterior.linear.measurement[0], 0.3)
    z = 2.0 * normal(3, *SHAPE)
    for sigma in (0.05, 1.0, 20.0):
        for covariance in (
            samplers.Jacobian(max_iterations=100, rtol=1e-12),
            samplers.Spectral(max_iterations=400, atol=1e-11),
        ):
            guided, denoised = covariance.guided(posterior, z, sigma)
            torch.testing.assert_close(guided, exact.denoise(z, sigma), rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(denoised, field().denoise(z, sigma))


def test_pigdm_error_falls_with_steps_to_its_floor():
    """The walk is an affine map of its first noise: its mean and covariance are exact, without any sampling error."""
    exact = field().posterior(problem().likelihood.operator, problem(0.3).likelihood.measurement[0], 0.3)
    truth = exact.covariance
    errors = []
    for steps in (10, 20, 40, 80):
        sampler = samplers.PiGDM(steps=steps, covariance=samplers.Spectral(max_iterations=400, atol=1e-11))
        posterior = Posterior(problem(0.3), field(), dtype=F64)
        start = torch.cat([torch.zeros(1, 16, dtype=F64), torch.eye(16, dtype=F64)]).reshape(1, 17, *SHAPE)
        state = samplers.pigdm.GuidedState(z=posterior.noised_mean() + posterior.sigma_max * start)
        while not sampler.done(state):
            state, _ = sampler.step(posterior, state, noise=invdiff.noise.Noise([0], 17))
        end = state.z[0].flatten(1)
        linear = end[1:] - end[:1]
        covariance = linear.mT @ linear
        mean_error = float(((end[0] - exact.mean.flatten()) / exact.std.flatten()).abs().max())
        errors.append((mean_error, float((covariance - truth).norm() / truth.norm())))
    means, covariances = zip(*errors, strict=True)
    for coarse, fine in itertools.pairwise(covariances):
        # Second order: a factor of four at each doubling, less before the limit.
        assert fine < coarse / 3.0, covariances
    assert covariances[-1] < 6e-3
    # The floor of the mean is the start's: centred on the prior's mean, which the flow shrinks by std / sigma_max.
    floor = float((posterior.noised_mean() - exact.mean).norm()) / posterior.sigma_max
    assert list(means) == sorted(means, reverse=True)
    assert means[-1] < 1.05 * floor


# DAPS, DPS, importance sampling.


def test_daps_exact_inner_draws_from_its_gaussian():
    posterior = Posterior(problem(0.3), field(), dtype=F64)
    center, r, n = normal(*SHAPE, seed=8), 0.7, 20_000
    noise = invdiff.noise.Noise([5], n, dtype=F64)
    x = samplers.ExactInner().draw(posterior, center.expand(1, n, *SHAPE), r, noise)[0]
    around = GaussianPrior(center, r**2 * torch.eye(16, dtype=F64))
    exact = around.posterior(posterior.linear.operator, posterior.linear.measurement[0], 0.3)
    assert float(((x.mean(0) - exact.mean) / exact.std).abs().max()) < 4.5 / math.sqrt(n)
    assert float((x.std(0) / exact.std - 1.0).abs().max()) < 4.5 / math.sqrt(2 * n)


def test_daps_langevin_tends_to_the_exact_inner_draw():
    posterior = Posterior(problem(0.3), field(), dtype=F64)
    center, r, n = normal(*SHAPE, seed=8), 0.7, 4000
    noise = invdiff.noise.Noise([5], n, dtype=F64)
    x = samplers.Langevin(steps=300, rate=0.1).draw(posterior, center.expand(1, n, *SHAPE), r, noise)[0]
    exact = GaussianPrior(center, r**2 * torch.eye(16, dtype=F64)).posterior(
        posterior.linear.operator, posterior.linear.measurement[0], 0.3
    )
    assert float(((x.mean(0) - exact.mean) / exact.std).abs().max()) < 4.5 / math.sqrt(n) + 1e-3
    # Unadjusted Langevin on a Gaussian of precision p has variance 1 / (p (1 - step p / 2)); step p <= rate.
    ratio = (x.std(0) / exact.std) ** 2
    assert float(ratio.max()) < 1.0 / (1.0 - 0.05) + 4.5 * math.sqrt(2 / n)
    assert float(ratio.min()) > 1.0 - 4.5 * math.sqrt(2 / n)


def test_dps_steps_down_the_norm_of_the_residual():
    posterior = Posterior(problem(0.3), field(), dtype=F64)
    sampler = samplers.DPS(steps=10, scale=0.02, integrator=invdiff.integrators.Euler())
    free = samplers.DPS(steps=10, scale=0.0, integrator=invdiff.integrators.Euler())
    noise = invdiff.noise.Noise([0], 3, dtype=F64)
    state = sampler.init(posterior, 1, 3, noise=noise)
    for _ in range(4):
        state, _ = sampler.step(posterior, state, noise=noise)
    z = state.z[0].clone().requires_grad_()
    levels = sampler.levels.of(posterior, 10)
    sigma, after = levels[4], levels[5]
    norm = (posterior.linear.measurement - posterior.linear.operator(field().denoise(z, sigma))).norm(dim=1)
    gradient = torch.autograd.grad(norm.sum(), z)[0]
    guided, unguided = (s.step(posterior, state, noise=noise)[0].z[0] for s in (sampler, free))
    a = math.sqrt((1 + sigma**2) * (1 + after**2)) * 1000 / 10
    torch.testing.assert_close(guided, unguided - 0.02 * a * gradient, rtol=1e-9, atol=1e-9)


def test_importance_sampling_finds_the_evidence():
    weak = problem(3.0)
    prior = field()
    exact = prior.posterior(weak.likelihood.operator, weak.likelihood.measurement[0], 3.0)
    sampler = samplers.ImportanceSampling(steps=60)
    solution = Posterior(weak, prior, dtype=F64).sample(sampler, 1000, chains=16, seed=5)
    assert abs(solution.log_evidence - exact.log_evidence) < 4.0 * solution.log_evidence_se + 0.01
    assert solution.log_evidence_se < 0.05
    assert solution.log_weights.shape == (16, 1000)


# Requirements and names.


def test_requirement_errors_name_samplers_that_can():
    bent = Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), normal(*SHAPE), 0.5))
    with pytest.raises(CapabilityError, match=r"PiGDM needs linear.*Samplers that can: .*DPS") as caught:
        invdiff.solve(bent, field(), samplers.PiGDM())
    named = re.search(r"Samplers that can: (.*)\.$", str(caught.value)).group(1).split(", ")
    assert "PiGDM" not in named
    for name in named:
        solution = invdiff.solve(bent, field(), name, draws=2)
        assert bool(torch.isfinite(solution.draws).all())


def test_daps_without_a_slope_is_refused_before_the_run():
    bent = Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), normal(*SHAPE), 0.5))
    seen = []
    with pytest.raises(CapabilityError, match="Samplers that can: AFDPS, DPS, FKSteering, ImportanceSampling"):
        invdiff.solve(bent, field(), samplers.DAPS(), callback=lambda *a: seen.append(a))
    assert not seen
    with_slope = samplers.DAPS(steps=5, inner=samplers.Langevin(steps=5, slope=1.3))
    assert bool(torch.isfinite(invdiff.solve(bent, field(), with_slope, draws=2).draws).all())


def test_names_and_settings_have_near_misses():
    assert sampler_by_name("pigdm", steps=7) == samplers.PiGDM(steps=7)
    with pytest.raises(CatalogueError, match="'daps'"):
        sampler_by_name("dasp")
    with pytest.raises(CatalogueError, match="did you mean 'steps'"):
        sampler_by_name("dps", stepz=7)
    with pytest.raises(CatalogueError, match="device"):
        invdiff.solve(problem(), field(), device="cuda:99")
    for together in (0, -2):
        with pytest.raises(InputError, match="together"):
            invdiff.solve([problem()], field(), together=together)


@pytest.mark.parametrize("cls", list(ENTRIES))
def test_impossible_settings_are_refused(cls):
    with pytest.raises(InputError, match="at least one step, got 0"):
        cls(steps=0)
    if "levels" not in {f.name for f in dataclasses.fields(cls)}:
        return
    beyond = cls(levels=samplers.annealing.Levels(sigma_max=1e4))
    with pytest.raises(InputError, match="do not lie within the prior's"):
        invdiff.solve(problem(), field(), beyond)


@pytest.mark.parametrize(
    ("operator", "prior", "chosen"),
    [
        (mask(), field(), "PiGDM"),
        (mask(), "least", "PiGDM"),
        (Bend(SHAPE, SHAPE), field(), "DPS"),
    ],
)
def test_solve_chooses_by_what_can_be_done(operator, prior, chosen):
    y = normal(*operator.out_shape)
    prior = Least() if prior == "least" else prior
    about = invdiff.solve(Problem(likelihoods.Gaussian(operator, y, 0.5)), prior, draws=2).about
    assert about["sampler"] == chosen
    assert ("Jacobian" in about["sampler_settings"]) == isinstance(prior, Least)
    assert about["sampler_reason"] != "given"
    assert about["sampler_exact"] == (chosen == "PiGDM")


class Blind(Bend):
    differentiable = False


@pytest.mark.parametrize(
    ("operator", "draws", "chosen"),
    [
        (mask(), 256, "TransportLangevin"),
        (mask(), 255, "PiGDM"),
        (Bend(SHAPE, SHAPE), 256, "TDS"),
        (Blind(SHAPE, SHAPE), 256, "PCN"),
        (Blind(SHAPE, SHAPE), 2, "PCN"),
    ],
)
def test_many_draws_of_few_measured_values_are_weighted(operator, draws, chosen):
    posterior = Posterior(Problem(likelihoods.Gaussian(operator, normal(*operator.out_shape), 0.5)), field())
    assert posterior.measurements == math.prod(operator.out_shape)
    sampler, reason = choose_sampler(posterior, draws)
    assert type(sampler).__name__ == chosen
    assert ("particles" in reason) == (chosen in ("TransportLangevin", "TDS"))
    if chosen == "TransportLangevin":
        assert sampler.exact


class Least:
    shape, sigma_min, sigma_max = SHAPE, 0.01, 20.0

    def denoise(self, z, sigma):
        s = torch.as_tensor(sigma, dtype=z.dtype).reshape(-1, 1, 1, 1)
        return z / (1.0 + s**2)


# Two ranks: each draws its own half of the particles, as if the other were elsewhere.


def test_noise_of_two_ranks_is_that_of_one():
    whole = invdiff.noise.Noise([3, 4], 6, dtype=F64)
    for step in (0, 3):
        everything = whole.at(step).normal(whole.slots, SHAPE), whole.uniform(whole.slots), whole.shared()
        for rank in (0, 1):
            own = invdiff.noise.Noise([3, 4], 6, dtype=F64).at(step)
            slots = own.slots.chunk(2)[rank]
            assert torch.equal(own.normal(slots, SHAPE), everything[0].chunk(2)[rank])
            assert torch.equal(own.uniform(slots), everything[1].chunk(2)[rank])
            # What all share needs no message between the ranks.
            assert torch.equal(own.shared(), everything[2])
