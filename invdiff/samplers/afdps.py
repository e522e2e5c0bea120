r"""AFDPS: weighted particles by the exact equation of the tilted prior (Chen et al. 2025, arXiv 2506.03979).

Particles walk down the noise levels through Q_sigma ~ p_sigma(z) exp(f_sigma(z)), with p_sigma the noised prior, s its
score and f_sigma a path that ends at f_0 = log p(y | z). As sigma falls the prior's reverse SDE has the drift
(1 + lam) sigma s and the variance 2 lam sigma, for any stochasticity lam >= 0, and Q_sigma obeys the Feynman-Kac
equations of particles that drift and gather log-weight, per unit of falling sigma, by

    half        (1 + lam) sigma s +   lam sigma grad f    sigma s.grad f - df/dsigma
    laplacian   (1 + lam) sigma s + 2 lam sigma grad f    the same + lam sigma (|grad f|^2 + s.grad f + Laplacian f)
    ode         sigma s, with lam = 0                     sigma s.grad f - df/dsigma

"laplacian" is the paper's. "half" moves half of its pull from the weights to the motion: the flow carries the weights,
the rest is Langevin motion, which leaves Q_sigma as it is; it needs no second derivative. What the three share, the
rate sigma s.grad f - df/dsigma, is that of f along the flow, so that a step from sigma to sigma' is

    z- = D + (sigma' / sigma) (z - D),        log w <- log w + f'(z-) - f(z)              (ode: Heun's or Euler's z-)
    half        z' = z- + e (s +   g) + sqrt(2 e) eps
    laplacian   z' = z- + e (s + 2 g) + sqrt(2 e) eps,       log w <- log w + e (|g|^2 + s.g + Laplacian f'(z-))

    s = (D - z-) / sigma'^2,   g = grad f' at z-,   e = (sigma'^2 / 2) (1 - (sigma' / sigma)^(2 lam)) = lam sigma h + ..

and the last step, where e = 0, the flow's alone. Ensembles resample where their effective sample size is low. For
linear-Gaussian problems f = log N(y; A z, R + sigma^2 A A^T), the start is an exact draw of N(mean, sigma_max^2) exp(f)
and the evidence begins with that Gaussian's own; other paths start from N(mean, sigma_max^2) with the weights exp(f).

The Laplacian is minus a trace that all particles share where the problem is linear: exact with an SVD or at most 1024
values, else from fixed random signs, whose error enters the evidence alone. Elsewhere it is estimated by random signs
and central differences of the gradient (Hutchinson 1990).

Departures: the paper's path is f = log p(y | z) at all levels, `Noised(kappa=0.0)`, and it is stiff. A step with
k e ||A||^2 / R > 2 (k = 1 for "half", 2 for "laplacian") diverges: linear problems are refused, others end by an error
once they leave the finite numbers. `Levels(rho=0.5)`, even in sigma^2, needs the fewest steps, S k / 4 with S = lam
(sigma_max ||A|| / noise_std)^2, for stability, and some ten times as many before the evidence is right: thousands, or
millions for pictures. With "ode" that path is stable, and its weights too wide: shares of modes wrong by 0.1 to 0.4.
On `Noised()` every step is stable for any lam and levels, as on `Tempered(scale)` if scale <= noise_std / ||dA/dz||.
Euler-Maruyama from sigma, in place of the flow and then a motion at sigma', has the same limit and cost, but not the
same error: with "half" that of the evidence of one Gaussian value is -0.80, -0.31 and -0.14 nats at 30, 60 and 120
steps, here 0.01, 0.003 and 0.001. "half" and "ode" are the device of Skreta et al. 2025 (arXiv 2503.02819).

Exact as particles and steps grow, sigma_min -> 0 and sigma_max -> infinity. Measured on the mixtures of
`invdiff.diagnostics.mixtures`, of which 1, 2 and 4 combinations are measured with noise 0.3 (4096 particles, 16
ensembles at 120 steps of "half", else 4; docs/mixtures.json):

                                       sliced distance W2          rms error of log evidence, nats
    dimensions                         2       4       8           2       4       8
    half, 120 steps                    0.023   0.024   0.066       0.02    0.04    0.09
      lam = 2                          0.018   0.027   0.052       0.04    0.08    0.16
      30 steps                         0.034   0.045   0.117       0.02    0.06    0.18
    laplacian, 120 steps               0.058   0.037   0.136       0.35    0.36    1.29
      lam = 0.3                        0.030   0.057   0.258       0.04    0.15    0.12
    ode, 60 steps of Heun              0.034   0.096   0.593       0.02    0.06    0.28
    exact draws                        0.014   0.016   0.019

The weights of "laplacian" have long tails, exp(e |g|^2), and its evidence is high by nats at few steps unless lam is
small; they are the price of the second pull, for which "half" has no need.

"half" is of first order: its evidence in four dimensions is off by -0.072, -0.038, -0.017 and -0.006 nats, each within
0.004, at 30, 60, 120 and 240 steps (16384 particles), and it leaves a Gaussian in two dimensions with 0.94, 0.97 and
0.99 of the posterior's variance at 60, 120 and 240 steps. The flow alone ("ode") moves no particle apart from another,
and they thin out as dimensions grow. Any weights need particles that grow exponentially with what the measurement
tells: on the three fields of `invdiff.diagnostics.exactness` (400 draws, 120 steps) the mean is off by 23, 9 and 8
times what exact draws leave and the evidence by -20, -3 and -2 nats; ``ess`` in the trace shows how few particles are
left.

Cost: one forward pass a step, none backward ("ode" with Heun: two, but for the last step).
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf, nan
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import InputError
from invdiff.integrators import Euler, Heun, Integrator
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.samplers.annealing import Levels, check_steps
from invdiff.samplers.particles import Resampling, Systematic, Weighted, check_threshold
from invdiff.samplers.preconditioner import Information
from invdiff.samplers.tds import twisting_path
from invdiff.samplers.transport_langevin import tilted

PULLS = {"half": 1.0, "laplacian": 2.0, "ode": 0.0}
"""Gradients of f in the drift, in units of lam sigma, by form."""
_DENSE = 1024
"""Values of an event up to which a trace without an SVD is exact."""
_SIGNS = 64
"""Random signs for a trace beyond."""


@final
@dataclass(frozen=True, kw_only=True)
class AFDPS(Sampler):
    """Weighted particles carried by the prior's reverse SDE or flow and pulled by the likelihood.

    Parameters
    ----------
    steps
        Noise levels.
    form
        "half", "laplacian" or "ode".
    stochasticity
        lam >= 0: 0 is the flow, 1 the reverse SDE. "ode" does not use it.
    path
        How the likelihood is tempered: Noised(), Noised(kappa=0.0) for the constant path of the paper, or
        Tempered(scale=...). If None, Noised() for linear-Gaussian problems, else Tempered(scale=noise_std), and
        constant where the likelihood has no noise_std.
    probes
        Random signs a step for the Laplacian of likelihoods that are not linear-Gaussian.
    integrator
        Transport of "ode": Heun() or Euler().
    resampling
        Systematic(), Stratified(), Residual() or BirthDeath().
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample; in [0, 1].
    levels
        Noise levels.

    Raises
    ------
    InputError
        If a setting lies out of its range; and before the first step if the path makes one diverge.
    """

    steps: int = 120
    form: str = "half"
    stochasticity: float = 1.0
    path: Path | None = None
    probes: int = 4
    integrator: Integrator = field(default_factory=Heun)
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 0.5
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@article{chen2025afdps, title={Solving Inverse Problems via Diffusion-Based Priors: An Approximation-Free "
        "Ensemble Sampling Approach}, author={Chen, Haoxuan and Ren, Yinuo and Min, Martin Renqiang and Ying, Lexing "
        "and Izzo, Zachary}, journal={arXiv:2506.03979}, year={2025}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_threshold(self.threshold)
        if self.form not in PULLS:
            raise InputError(f"form is one of {', '.join(PULLS)}; got {self.form!r}.")
        if not 0.0 <= self.stochasticity < inf:
            raise InputError(f"stochasticity is 0 for the flow, 1 for the reverse SDE; got {self.stochasticity}.")
        if self.probes < 1:
            raise InputError(f"The Laplacian needs at least one probe, got {self.probes}.")
        if not isinstance(self.integrator, (Euler, Heun)):
            raise InputError(
                f"The flow is followed by Heun() or Euler(), without memory or noise; got {self.integrator}."
            )

    @property
    def exact(self) -> bool:
        """As particles and steps grow."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a denoiser, a gradient but for "ode", and a linear problem for Noised() if it is asked for."""
        linear = isinstance(self.path, Noised) and self.path.kappa > 0.0
        gradient = set() if self.form == "ode" else {"likelihood_gradient"}
        return frozenset({"denoiser"} | gradient | ({"linear"} if linear else set()))

    def cost(self) -> Cost:
        """One evaluation a step, or those of the flow's integrator."""
        per_step = self.integrator.evaluations if self.form == "ode" else 1
        return Cost(self.steps * per_step - (per_step - 1))

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> Weighted:
        """Draw from N(mean, sigma_max^2) exp(f): exactly on the noised path, by weights exp(f) on others."""
        levels, path = self.levels.of(posterior, self.steps), twisting_path(posterior, self.path)
        self._check_stable(posterior, path, levels)
        sigma, linear = levels[0], posterior.linear
        z = posterior.start(ensembles, n, noise, sigma)
        if linear is None or not isinstance(path, Noised):
            state = Weighted.begin(z, self._value(posterior, path, z, sigma), shard=noise.shard)
            return state.resampled(self.resampling, noise, self.threshold)
        extra = path.kappa * sigma**2
        z = tilted(linear, linear.rows(posterior.rows(z)), z, sigma, extra, noise)
        state = Weighted.begin(z, shard=noise.shard)
        evidence = linear.log_evidence(posterior.noised_mean(), sigma**2, extra)
        if evidence is None:  # its determinant is too large
            return replace(state, log_evidence=torch.full_like(state.log_evidence, nan))
        return replace(state, log_evidence=evidence.repeat_interleave(ensembles // len(evidence)))

    def done(self, state: Weighted) -> bool:
        """All levels walked."""
        return state.step >= self.steps

    def progress(self, state: Weighted) -> float:
        """Share of the levels walked."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: Weighted, *, noise: Noise) -> tuple[Weighted, Info]:
        """Follow the flow to the next level, weight, move by Langevin's equation there, and resample."""
        levels, k, path = self.levels.of(posterior, self.steps), state.step, twisting_path(posterior, self.path)
        sigma, after = levels[k], levels[k + 1]
        z, denoised = self._transported(posterior, state.z, sigma, after, noise)
        before, e = self._value(posterior, path, state.z, sigma), self._motion(sigma, after)
        if e > 0.0:
            value, grad = posterior.potential(after, path)(z)
            # Where there is no likelihood there is no gradient to follow.
            dead = torch.isneginf(value).reshape(*value.shape, *[1] * len(posterior.shape))
            grad = torch.where(dead, 0.0, grad)
            score = (denoised - z) / after**2
            increment = value.double() - before
            if self.form == "laplacian":
                second = laplacian(posterior, path, z, after, noise, self.probes)
                increment = increment + e * ((grad.double() * (grad + score)).flatten(2).sum(2) + second)
            z = z + e * (score + PULLS[self.form] * grad) + (2.0 * e) ** 0.5 * noise.like(z)
        else:
            value = self._value(posterior, path, z, after)
            increment = value - before
        # A particle that left the likelihood's support weighs nothing, though the difference may not say so.
        increment = torch.where(torch.isneginf(value) | torch.isneginf(before), -inf, increment)
        new = replace(state, z=z, step=k + 1)
        new = new.reweighted(increment, f" at step {k + 1}, sigma {after:.4g}")
        info = Info(sigma=after, misfit=posterior.misfit(denoised), ess=new.ess)
        # The last weights stay with the draws.
        return new if after == 0.0 else new.resampled(self.resampling, noise, self.threshold), info

    def finish(self, posterior: Posterior, state: Weighted, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0, their weights, and the evidence where it is known."""
        evidence = state.evidence
        known = not bool(evidence.isnan().any())
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=evidence if known else None)

    # Within.

    def _motion(self, sigma: float, after: float) -> float:
        """e: time of the Langevin motion at ``after``, latent units squared."""
        lam = 0.0 if self.form == "ode" else self.stochasticity
        share: float = (after / sigma) ** (2.0 * lam)
        return 0.5 * after**2 * (1.0 - share)

    def _transported(
        self, posterior: Posterior, z: Tensor, sigma: float, after: float, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """States at the next level along the flow, and D(z, sigma)."""
        seen: list[Tensor] = []

        def denoise(z: Tensor, sigma: float) -> Tensor:
            seen.append(posterior.denoise(z, sigma))
            return seen[-1]

        stepper = self.integrator if self.form == "ode" else Euler()
        moved, _ = stepper.step(denoise, z, sigma, after, memory=None, sigma_previous=None, normal=noise.like)
        return moved, seen[0]

    def _value(self, posterior: Posterior, path: Path, z: Tensor, sigma: float) -> Tensor:
        """f_sigma, float64; where "ode" can, without asking the likelihood for a gradient."""
        if self.form != "ode" or not (isinstance(path, Tempered) or path == Noised(kappa=0.0)):
            return posterior.potential(sigma, path)(z)[0].double()

        def without_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            return posterior.log_likelihood(x), torch.zeros_like(x)

        return path.potential(sigma, None, without_gradient)(z)[0].double()

    def _check_stable(self, posterior: Posterior, path: Path, levels: tuple[float, ...]) -> None:
        """Raise InputError if a step of a linear problem diverges; on the noised path none does."""
        if posterior.linear is None or not isinstance(path, (Noised, Tempered)):
            return
        for sigma, after in pairwise(levels[:-1]):
            largest = Information.along(posterior, path, after).largest
            factor = PULLS[self.form] * self._motion(sigma, after) * largest
            if factor > 2.0:
                least = 0.25 * PULLS[self.form] * self.stochasticity * levels[0] ** 2 * largest
                raise InputError(
                    f"The step from sigma {sigma:.4g} to {after:.4g} would multiply errors by {factor - 1.0:.3g}: "
                    f"along {path} the likelihood is too stiff for {self.steps} steps. Use path=Noised(), or "
                    f"levels=Levels(rho=0.5) and more than {least:.3g} steps, better ten times as many."
                )


def laplacian(posterior: Posterior, path: Path, z: Tensor, sigma: float, noise: Noise, probes: int) -> Tensor:
    """Laplacian of f_sigma, float64: one number for linear-Gaussian problems, else estimates (ensemble, particle).

    Parameters
    ----------
    posterior, path, sigma
        What is tempered, how, and where.
    z
        States (ensemble, particle, *shape).
    noise, probes
        Streams and number of the random signs with which the Laplacian is estimated where it is not known.
    """
    linear = posterior.linear
    if linear is None or not isinstance(path, (Noised, Tempered)):
        gradient, total = (
            posterior.potential(sigma, path),
            torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device),
        )
        scale = (z.flatten(2).square().mean(2) + sigma**2).sqrt().reshape(*z.shape[:2], *[1] * len(posterior.shape))
        delta = torch.finfo(z.dtype).eps ** (1.0 / 3.0) * scale
        for _ in range(probes):
            v = torch.where(noise.like(z) < 0.0, -1.0, 1.0).to(z)
            bend = gradient(z + delta * v)[1] - gradient(z - delta * v)[1]
            total = total + (v * bend / (2.0 * delta)).double().flatten(2).sum(2)
        return total / probes
    beta, extra = 1.0, 0.0
    if isinstance(path, Noised):
        extra = path.kappa * sigma**2
    else:
        beta = 1.0 / (1.0 + (sigma / path.scale) ** 2)
    A = linear.operator
    if linear.has_svd and A.svd is not None:
        s2 = A.svd.singular_values.double().to(z.device) ** 2
        return -beta * (s2 / (linear.noise_std.to(s2) ** 2 + extra * s2)).sum()
    size = z[0, 0].numel()
    if size <= _DENSE:
        signs, share = torch.eye(size, device=z.device), 1.0
    else:
        signs = torch.randint(0, 2, (_SIGNS, size), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
        share = 1.0 / _SIGNS
    v = signs.to(z).reshape(-1, *posterior.shape)
    return -beta * share * (v * linear.information(v, extra)).double().sum()
