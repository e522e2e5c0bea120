r"""Importance sampling from the prior: draws of the prior, weighted by the likelihood.

    z_i ~ p(z) by reverse diffusion,  log w_i = log p(y | z_i),  log p(y) ~ log mean_i w_i

Exact as the number of draws grows, and unbiased for the evidence, in the limit of many steps. It is the reference that
needs nothing of the problem but its likelihood, no gradient either; the number of draws that it needs grows
exponentially with the information in the measurement, so it serves low-dimensional problems and weak measurements.

Cost: one forward pass a step (two with Heun).
"""

from dataclasses import dataclass, field
from typing import ClassVar, final

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.integrators import DPMSolver2M, Integrator
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps
from invdiff.samplers.particles import log_mean_exp


@final
@dataclass(frozen=True, kw_only=True)
class ImportanceSampling(Annealed):
    """Draws of the prior, weighted by the likelihood.

    Parameters
    ----------
    steps
        Noise levels.
    integrator
        Reverse-time stepper.
    levels
        Noise levels.
    """

    steps: int = 50
    integrator: Integrator = field(default_factory=DPMSolver2M)
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@book{robert2004, title={Monte Carlo Statistical Methods}, author={Robert, Christian P. and Casella, George}, "
        "publisher={Springer}, year={2004}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @property
    def exact(self) -> bool:
        """As the number of draws grows."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a denoiser."""
        return frozenset({"denoiser"})

    def cost(self) -> Cost:
        """As the integrator has it."""
        return Cost(self.integrator.evaluations * self.steps - (self.integrator.evaluations - 1))

    def step(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> tuple[AnnealedState, Info]:
        """One step of the prior's reverse diffusion."""
        levels, k = self.levels.of(posterior, self.steps), state.step
        z, memory = self.integrator.step(
            posterior.denoise,
            state.z,
            levels[k],
            levels[k + 1],
            memory=state.memory,
            sigma_previous=levels[k - 1] if k else None,
            normal=noise.like,
        )
        return AnnealedState(z=z, step=k + 1, memory=memory), Info(sigma=levels[k + 1])

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:
        """Return the draws of the prior with their weights, and the evidence."""
        log_weights = posterior.log_likelihood(state.z).double()
        evidence = log_mean_exp(noise.shard.gather(log_weights))
        return Draws(z=state.z, log_weights=log_weights, log_evidence=evidence)
