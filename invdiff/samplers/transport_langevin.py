r"""Transport along the probability flow with weights, and preconditioned Langevin refreshes: this library's own.

Particles walk down levels sigma_0 > ... > sigma_{K-1} > 0 through the laws pi_sigma ~ p_sigma(z) exp(f_sigma(z)), with
p_sigma the noised prior and f_sigma a path from little to f_0 = log p(y | z); for linear-Gaussian problems the noised
likelihood f_sigma = log N(y; A z, R + sigma^2 A A^T). At each level

    1. ``refreshes`` times:  z <- z + e P (s + grad f_sigma) + sqrt(2 e P) (xi_j + xi_{j+1}) / 2,
       with the score s = (D(z, sigma) - z) / sigma^2
    2. transport to the next level along dz / dsigma = -sigma s:  z' = z - t (z - D(z, sigma)),
       log w <- log w + f_{sigma'}(z') - f_sigma(z)
    3. with `resampling`: where the effective sample size is below `threshold`, ancestors are drawn by w.

2 is exact for any f: the flow carries p_sigma to p_sigma', so the weight that carries pi_sigma to pi_sigma' is exp(f' -
f), without a derivative. 1 steps along a diffusion that leaves pi_sigma as it is, by the scheme of Leimkuhler &
Matthews 2013, whose noise xi is carried from step to step, from level to level, and with the ancestors: on a Gaussian
its stationary law is exact for every stable step, and elsewhere its bias is of second order in e, where that of plain
Langevin is of first. P and e come from the curvatures of prior and path (`invdiff.samplers.preconditioner`).

t is diagonal in the basis of the prior's curvature h: t = (1 - r^2) / (1 + sqrt(1 - (sigma^2 - sigma'^2) h)) with r =
sigma' / sigma, which follows the flow exactly if the prior is Gaussian, and without curvature Euler's t = 1 - r. The
last step is a transport from sigma_{K-1} to 0. The start is an exact draw of N(m, sigma_0^2) exp(f) on the noised path;
there log p(y) begins with that Gaussian's own evidence, and is not given where its determinant would be too large.

Sequential Monte Carlo along an annealed path with moves is Del Moral, Doucet & Jasra 2006; weighted reverse diffusions
are Wu et al. 2023 (arXiv 2306.17775) and Skreta et al. 2025 (arXiv 2503.02819), which move by the reverse SDE.

With `resampling` it is exact as particles and levels grow and, where the posterior is not Gaussian, as e falls; draws
are weighted, and the evidence is estimated. Without (the default: a few draws of a picture cannot carry weights, whose
logarithms spread as the measured values grow) draws have equal weight, and the refresh alone makes their law: right on
one mode, but modes that have parted keep the weight that the transport gave them, wrong by 0.2 in total variation
below, and the evidence, a sum over levels of log mean exp(f' - f), is then wrong by nats. Few particles bias it
downwards at any rate; see `Info.ess` for how few they are.

Measured on the three Gaussian fields of `invdiff.diagnostics.exactness` (inpainting, blur, down-sampling; noise 0.05;
400 draws; 1 and 1 are exact, a mean error of 1 floor is what 400 exact draws have), by levels x refreshes:

    weights     evaluations    mean error, floors   variance / posterior's   whitened norm         log evidence off
    none         6 x 4 =  30    3.3   1.0   1.0     1.02   1.00   1.01       1.02   1.00   1.01    -70    -25    -12
    none        20 x 4 = 100    0.9   0.9   0.9     1.00   0.99   1.00       1.01   0.99   1.00    -1.8   -1.3   -0.4
    none        60 x 4 = 300    1.0   1.1   1.0     1.00   0.99   1.00       1.00   0.99   1.00    -0.4   -0.6   -0.0
    Systematic  20 x 4 = 100    0.9   0.9   0.9     1.01   0.99   1.00       1.01   0.99   1.00    -0.4   -1.3   -0.4
    Systematic  60 x 4 = 300    1.0   1.1   1.0     1.00   0.99   1.01       1.00   0.99   1.01    +0.0   -0.6   -0.0

Where half of many more values are measured sharply, soft directions between them lag behind the falling levels, and
``momentum=0.6, refreshes=2, step_size=0.5``, with levels of rho = -10 from five times the widest direction's deviation,
is at the floor with fewer evaluations and nearer to the evidence (`invdiff.bench.fields`).

On the mixtures of `invdiff.diagnostics.mixtures` in 2, 4 and 8 dimensions (1, 2 and 4 measured values, noise 0.3; 16
ensembles of 4096 particles; docs/mixtures.json): sliced W2 (4096 exact draws: 0.014, 0.016, 0.019), mean error of the
log evidence, and total variation of the modes' weights, by levels x refreshes and transport:

    weights     evaluations         sliced W2              log evidence            modes
    none        20 x 4, Heun, 119   1.34   1.53   0.46     -1.59   -1.37   -1.85   0.21    0.27    0.19
    Systematic  20 x 4, Heun, 119   0.016  0.022  0.030    -0.04   -0.02   -0.05   0.002   0.000   0.001
    Systematic  24 x 4, 120         0.015  0.019  0.030    +0.08   +0.06   +0.25   0.002   0.000   0.001

So few levels bias the evidence by Euler's error, which `Heun` mends at the same cost. The distance falls as N^-1/2 up
to 4096 particles. Four live modes in 64 dimensions: 0.43 without weights, with them 0.05 at 119 evaluations and 0.02
at 60 x 4 = 300 (2048 particles, 16 measurements, rms).

Many measured values spread the log-weights, so that levels too far apart leave few ancestors: `conditional_ess` puts
levels between where the weights need them, at no evaluation but those levels' own.

With the prior photos-64 the defaults were stable, unweighted; neither weights nor momentum were tried on pictures.

Cost: 1 + ``refreshes`` forward passes a level, none backward (one more a level but the last with `Heun`); and operator
applications.
"""

from dataclasses import dataclass, field, replace
from math import nan, sqrt
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import InputError
from invdiff.integrators import Integrator
from invdiff.linear_gaussian import LinearGaussian
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.samplers.annealing import Levels, check_steps
from invdiff.samplers.inner import check_slope, smoothing
from invdiff.samplers.particles import Resampling, Weighted, alive, check_threshold
from invdiff.samplers.preconditioner import STABLE, Information, precondition

_FINE = 20
"""Fine levels for each of ``steps``, among which `conditional_ess` chooses."""


@dataclass(frozen=True, kw_only=True)
class TransportState(Weighted):
    """Weighted particles at a noise level.

    Parameters
    ----------
    carried
        Noise of the last refresh, which the next one takes up, or momentum, of z's shape.
    position
        Index of the level among the fine ones, int64, shape (ensemble, particle), where they are chosen on the way;
        else None.
    direction
        The preconditioner's, flat; None before the first level, or where there is none.
    """

    carried: Tensor
    position: Tensor | None = None
    direction: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True)
class TransportLangevin(Sampler):
    """Transport along the probability flow, weights, and preconditioned Langevin refreshes.

    Parameters
    ----------
    steps
        Noise levels; with `conditional_ess`, the fewest.
    refreshes
        Langevin steps at each level.
    step_size
        e, in (0, 1.6], in units of the inverse of the modelled curvature; made smaller where e times the largest
        curvature would exceed 1.6.
    momentum
        c in [0, 1), the share of the momentum that a refresh keeps; with 0.6, e is best between 0.3 and 0.5. If None,
        there is no momentum.
    resampling
        Systematic(), Stratified() or Residual() for weighted particles; None for draws of equal weight.
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample; in [0, 1].
    conditional_ess
        In (0, 1): put up to 19 more levels between two, where the particles would not stand for the next law with this
        conditional effective sample size (Zhou, Johansen & Aston 2016): 0.9, say. The ensemble where it is smallest
        decides for all, so that problems solved together share their levels. Needs `resampling`. If None, there are
        ``steps``, whatever the weights.
    path
        How the likelihood is tempered: Noised() for linear-Gaussian problems, also if None, or Tempered(scale=...).
    integrator
        One-step transport from level to level; if None, the exponential one where the prior has a curvature, else
        Euler. The memory of multistep methods does not outlive a refresh: they fall back to their first order.
    floor
        c in [0, 1]: the prior's curvature is taken as at least c / sigma^2. If None, 0 where it is exact and 0.5 else.
    slope
        Bound on the norm of the operator's derivative dA/dz, latent units, for problems that are not linear.
    levels
        Noise levels. If their sigma_min is None, a thirtieth of noise_std / ||A||, kept within the prior's sigma_min
        and a thousandth of its sigma_max.
    """

    steps: int = 60
    refreshes: int = 4
    step_size: float = 0.8
    momentum: float | None = None
    resampling: Resampling | None = None
    threshold: float = 0.5
    conditional_ess: float | None = None
    path: Path | None = None
    integrator: Integrator | None = None
    floor: float | None = None
    slope: float | None = None
    levels: Levels = field(default_factory=lambda: Levels(rho=-4.0))

    citation: ClassVar[str] = (
        "@article{leimkuhler2013, title={Rational Construction of Stochastic Numerical Methods for Molecular "
        "Sampling}, author={Leimkuhler, Benedict and Matthews, Charles}, "
        "journal={Applied Mathematics Research eXpress}, volume={2013}, number={1}, pages={34--56}, year={2013}}\n"
        "@article{delmoral2006, title={Sequential {Monte Carlo} Samplers}, "
        "author={Del Moral, Pierre and Doucet, Arnaud and Jasra, Ajay}, "
        "journal={Journal of the Royal Statistical Society B}, volume={68}, number={3}, pages={411--436}, year={2006}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_slope(self.slope)
        check_threshold(self.threshold)
        if self.refreshes < 1:
            raise InputError(f"TransportLangevin needs at least one refresh a level, got {self.refreshes}.")
        if not 0.0 < self.step_size <= STABLE:
            raise InputError(
                f"step_size lies in (0, {STABLE}] in units of the inverse curvature, since larger steps diverge; got "
                f"{self.step_size}."
            )
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise InputError(f"momentum is the share that a refresh keeps, in [0, 1); got {self.momentum}.")
        if self.conditional_ess is not None:
            if not 0.0 < self.conditional_ess < 1.0:
                raise InputError(f"conditional_ess is a share, in (0, 1); got {self.conditional_ess}.")
            if self.resampling is None or self.integrator is not None:
                raise InputError(
                    "Levels chosen by conditional_ess need weights, e.g. resampling=Systematic(), and the default "
                    "integrator, which costs no evaluation a candidate."
                )
        if self.floor is not None and not 0.0 <= self.floor <= 1.0:
            raise InputError(f"floor is a share of 1 / sigma^2, in [0, 1]; got {self.floor}.")

    @property
    def exact(self) -> bool:
        """With weights, as particles and levels grow; without them modes keep the weight that the transport gave."""
        return self.resampling is not None

    def requires(self) -> frozenset[str]:
        """Return a denoiser and a gradient; and a linear problem, unless a tempering and a slope are given."""
        known = isinstance(self.path, Tempered) and self.slope is not None
        return frozenset({"denoiser", "likelihood_gradient"} | (set() if known else {"linear"}))

    def cost(self) -> Cost:
        """One evaluation a refresh, and those of the transport; the fewest, if levels are chosen on the way."""
        transport = 1 if self.integrator is None else self.integrator.evaluations
        return Cost(self.steps * (transport + self.refreshes) - (transport - 1))

    def ladder(self, posterior: Posterior) -> tuple[float, ...]:
        """Return ``steps`` falling noise levels, latent units, then 0; with `conditional_ess`, all the fine ones.

        Raises
        ------
        InputError
            If they do not lie within the prior's.
        """
        low = smoothing(posterior, self.slope, 1.0 / 30.0) if self.levels.sigma_min is None else self.levels.sigma_min
        fine = 1 if self.conditional_ess is None else _FINE
        return replace(self.levels, sigma_min=low).of(posterior, fine * self.steps)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> TransportState:
        """Draw from N(mean, sigma_max^2) exp(f): exactly on the noised path, by weights log f on others."""
        sigma, path, center = self.ladder(posterior)[0], self._path, posterior.noised_mean()
        z = center.expand(ensembles, n, *posterior.shape)
        z = z + sigma * noise.like(z)
        linear, log_weights, evidence = posterior.linear, None, None
        if isinstance(path, Noised) and linear is not None:
            z = tilted(linear, linear.rows(posterior.rows(z)), z, sigma, path.kappa * sigma**2, noise)
            evidence = linear.log_evidence(center, sigma**2, path.kappa * sigma**2)
        else:
            log_weights = posterior.potential(sigma, path)(z)[0]
        position = None if self.conditional_ess is None else torch.zeros_like(posterior.rows(z)).reshape(z.shape[:2])
        state = TransportState.begin(z, log_weights, shard=noise.shard, carried=noise.like(z), position=position)
        if evidence is not None:
            state = replace(state, log_evidence=evidence.repeat_interleave(ensembles // len(evidence)))
        elif log_weights is None:
            state = replace(state, log_evidence=torch.full_like(state.log_evidence, nan))  # a determinant is missing
        return self._gathered(state, noise)

    def done(self, state: TransportState) -> bool:
        """All levels walked."""
        return self.progress(state) >= 1.0

    def progress(self, state: TransportState) -> float:
        """Share of the levels walked."""
        if state.position is None:
            return state.step / self.steps
        return int(state.position[0, 0]) / (_FINE * self.steps)

    def step(self, posterior: Posterior, state: TransportState, *, noise: Noise) -> tuple[TransportState, Info]:
        """Refresh the particles at their level, carry them to the next, weight them, and resample."""
        levels = self.ladder(posterior)
        k = state.step if state.position is None else int(state.position[0, 0])
        sigma = levels[k]
        potential = posterior.potential(sigma, self._path)
        information = Information.along(posterior, self._path, sigma, self.slope)
        preconditioner = precondition(posterior, information, sigma, self.step_size, self.floor, state.direction)
        z, carried = state.z, state.carried
        for refresh in range(self.refreshes):
            grad = (posterior.denoise(z, sigma) - z) / sigma**2 + potential(z)[1]
            fresh = noise.like(z)
            if self.momentum is None:
                shared = 0.5 * (carried + fresh)
                z = preconditioner.refresh(z.flatten(0, 1), grad.flatten(0, 1), shared.flatten(0, 1)).reshape(z.shape)
                carried = fresh
            else:
                kicked = carried + (0.5 if refresh == 0 else 1.0) * preconditioner.root(grad)
                carried = self.momentum * kicked + sqrt(1.0 - self.momentum**2) * fresh
                z = z + preconditioner.root(0.5 * (kicked + carried))
        value, slope = potential(z)
        if state.position is None:
            after, position = levels[k + 1], None
            moved, denoised = self._transported(posterior, z, sigma, after, noise)
        else:
            denoised = posterior.denoise(z, sigma)
            k = self._next(posterior, replace(state, z=z), denoised, value, levels, k)
            after, position = levels[k], torch.full_like(state.position, k)
            moved = self._flowed(posterior, z, denoised, sigma, after)
        if self.momentum is not None:
            carried = carried + 0.5 * preconditioner.root((denoised - z) / sigma**2 + slope)
        increment = posterior.potential(after, self._path)(moved)[0] - value
        new = replace(
            state,
            z=moved,
            carried=carried,
            position=position,
            direction=preconditioner.direction,
            step=state.step + 1,
        )
        new = new.reweighted(increment, f" at step {new.step}, sigma {after:.4g}")
        info = Info(sigma=after, misfit=posterior.misfit(denoised), ess=new.ess)
        # The last weights stay with the draws.
        return new if after == 0.0 and self.resampling is not None else self._gathered(new, noise), info

    def finish(self, posterior: Posterior, state: TransportState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0, with their weights and the evidence where they are known."""
        evidence = state.evidence
        return Draws(
            z=state.z,
            log_weights=None if self.resampling is None else state.log_weights,
            log_evidence=None if bool(evidence.isnan().any()) else evidence,
        )

    # Within.

    @property
    def _path(self) -> Path:
        return Noised() if self.path is None else self.path

    def _gathered(self, state: TransportState, noise: Noise) -> TransportState:
        """Resample where it is due; without resampling, drop the weights but for their mean."""
        if self.resampling is not None:
            return state.resampled(self.resampling, noise, self.threshold)
        return replace(state, log_weights=torch.zeros_like(state.log_weights), log_evidence=state.evidence)

    def _transported(
        self, posterior: Posterior, z: Tensor, sigma: float, after: float, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """States at the next level, and D(z, sigma)."""
        seen: list[Tensor] = []

        def denoise(z: Tensor, sigma: float) -> Tensor:
            seen.append(posterior.denoise(z, sigma))
            return seen[-1]

        if self.integrator is not None:
            moved, _ = self.integrator.step(
                denoise, z, sigma, after, memory=None, sigma_previous=None, normal=noise.like
            )
            return moved, seen[0]
        denoised = denoise(z, sigma)
        return self._flowed(posterior, z, denoised, sigma, after), denoised

    def _flowed(self, posterior: Posterior, z: Tensor, denoised: Tensor, sigma: float, after: float) -> Tensor:
        """States at another level by one step of the default transport."""
        curvature, residual = posterior.curvature, z - denoised
        if curvature is None:
            return z - (1.0 - after / sigma) * residual
        h = curvature.precision(sigma).to(residual)
        shrunk = torch.sqrt((1.0 - (sigma**2 - after**2) * h).clamp_min(0.0))
        share = (1.0 - (after / sigma) ** 2) / (1.0 + shrunk)
        return z - curvature.from_basis(share * curvature.to_basis(residual.flatten(0, 1))).reshape(z.shape)

    def _next(
        self,
        posterior: Posterior,
        state: TransportState,
        denoised: Tensor,
        value: Tensor,
        levels: tuple[float, ...],
        k: int,
    ) -> int:
        """Index of the level to go to from level k: the furthest that keeps the conditional effective sample size."""

        def keeps(index: int) -> bool:
            moved = self._flowed(posterior, state.z, denoised, levels[k], levels[index])
            increment = alive(state, posterior.potential(levels[index], self._path)(moved)[0] - value)
            return float(state.conditional_ess(increment).min()) >= cast(float, self.conditional_ess)

        near, far = k + 1, min(k + _FINE, len(levels) - 1)
        if keeps(far):
            return far
        while far - near > 1:  # near is taken if all else fails
            middle = (near + far) // 2
            near, far = (middle, far) if keeps(middle) else (near, middle)
        return near


def tilted(linear: LinearGaussian, rows: LinearGaussian, z: Tensor, sigma: float, extra: float, noise: Noise) -> Tensor:
    """Draw of N(m, sigma^2) N(y; A z, R + extra A A^T) from z ~ N(m, sigma^2), by perturbation and solution."""
    x, A = z.flatten(0, 1), linear.operator
    eps = noise.normal(noise.slots, A.out_shape).to(x.dtype)
    if linear.has_svd:
        other = sqrt(extra) * noise.like(z).flatten(0, 1)
        r = rows.residual(x) - rows.noise_std.to(x.dtype) * eps - A(other)
        return (x + sigma**2 * A.adjoint(rows.solve(r, sigma**2 + extra))).reshape(z.shape)
    noised = replace(rows, noise_std=torch.sqrt(rows.noise_std**2 + extra * linear.norm() ** 2), tables={})
    r = noised.residual(x) - noised.noise_std.to(x.dtype) * eps
    return (x + noised.gain(r, sigma**2)).reshape(z.shape)
