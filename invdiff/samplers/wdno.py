r"""Guidance of the denoised state, as wavelet diffusion neural operators do (WDNO; Hu et al. 2025, ICLR).

At each level sigma of a falling ladder, with D = D(z, sigma) and the likelihood p(y | x), of an objective J at a
temperature T or any other:

    1. x = argmin_x -log p(y | x) + lambda |x - D|^2 / (2 sigma^2), from D on, by conjugate gradients
    2. e = (z - x) / sigma, the noise that x leaves in z
    3. z' = x + sigma' (sqrt(1 - zeta) e + sqrt(zeta) eps)

The gradients of log p are taken at the denoised state, through the prior's decoder (for wavelets the inverse transform)
and, where the likelihood holds a solver, through that, never through the network. So guided, a prior that was told the
initial state finds a forcing and the trajectory that it leads to at once; ``control__solver=True`` in a problem's card
asks the solver in place of the drawn states.

Departures: WDNO adds a multiple of grad J to the noise estimate in each of 50 DDIM steps with eta = 1, the multiple
falling along a cosine and tuned by task. Here its first-order step is carried on to the proximal point of the
likelihood, whose strength follows from T and the level, with no multiple to tune; ``inner=1`` is a single step, of the
length that is best along the gradient. eta = 1 is zeta = 1 - (sigma' / sigma)^2; here z is forgotten (zeta = 1), which
lets a forcing move further in few levels. The ladder ends at ``levels.sigma_min``, where the network still averages
over what it cannot tell, with the proximal point of the last level; the last decade of noise adds detail and its own
errors, and J grows.

Conjugate gradients take each product with the Hessian from a difference of gradients, one gradient an iteration: exact
where log p is quadratic, as J without a solver is; elsewhere a Newton step whose curvature is kept positive.

Biased: as in DiffPIR the identity stands for the covariance of z_0 given z. The temperature is a strength; draws are
good controls, and their spread is not the posterior's. DMCMC, TDS or TransportLangevin draw from that.

Cost: one forward pass a level, none backward; ``inner + 1`` gradients of the likelihood a level.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps, noised_again


@final
@dataclass(frozen=True, kw_only=True)
class WDNO(Annealed):
    """Denoising, a proximal step of the objective by its gradients, and noise again.

    Parameters
    ----------
    steps
        Noise levels.
    lam
        lambda, the weight of the denoised state against the likelihood, positive.
    zeta
        Share of fresh noise in a step's noise, in [0, 1].
    inner
        Iterations of conjugate gradients a level, at least 1.
    levels
        Noise levels; they end at 0.3 in latent units.

    Raises
    ------
    InputError
        If steps, lam or inner are not positive, or zeta is not in [0, 1].
    """

    steps: int = 25
    lam: float = 1.0
    zeta: float = 1.0
    inner: int = 8
    levels: Levels = field(default_factory=lambda: Levels(sigma_min=0.3))

    citation: ClassVar[str] = (
        "@inproceedings{hu2025wdno, title={Wavelet Diffusion Neural Operator}, "
        "author={Hu, Peiyan and Wang, Rui and Zheng, Xiang and Zhang, Tao and Feng, Haodong and Feng, Ruiqi and "
        "Wei, Long and Wang, Yue and Ma, Zhi-Ming and Wu, Tailin}, booktitle={ICLR}, year={2025}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0.0 < self.lam < float("inf"):
            raise InputError(f"WDNO's lam is a positive weight, got {self.lam}.")
        if not 0.0 <= self.zeta <= 1.0:
            raise InputError(f"WDNO's zeta is a share of noise in [0, 1], got {self.zeta}.")
        if self.inner < 1:
            raise InputError(f"WDNO takes at least one inner iteration, got {self.inner}.")

    @property
    def exact(self) -> bool:
        """No."""
        return False

    def requires(self) -> frozenset[str]:
        """Denoiser, and a likelihood with gradient."""
        return frozenset({"denoiser", "likelihood_gradient"})

    def cost(self) -> Cost:
        """One forward pass a level."""
        return Cost(self.steps)

    def step(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> tuple[AnnealedState, Info]:
        """One level: denoise, descend, noise again."""
        levels = self.levels.of(posterior, self.steps)
        sigma, sigma_next = levels[state.step], levels[state.step + 1]
        x = self._proximal(posterior, posterior.denoise(state.z, sigma), sigma)
        misfit = posterior.misfit(x)
        if sigma_next == 0.0:
            return AnnealedState(z=x, step=state.step + 1), Info(sigma=0.0, misfit=misfit)
        z = noised_again(state.z, x, sigma, sigma_next, self.zeta, noise)
        return AnnealedState(z=z, step=state.step + 1), Info(sigma=sigma_next, misfit=misfit)

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the last level's proximal point."""
        return Draws(z=state.z)

    def _proximal(self, posterior: Posterior, d: Tensor, sigma: float) -> Tensor:
        """Minimise -log p(y | x) + lam |x - d|^2 / (2 sigma^2) by conjugate gradients from d on."""

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).flatten(2).sum(2).reshape(*a.shape[:2], *[1] * (a.ndim - 2))

        weight = self.lam / sigma**2
        _, slope = posterior.log_likelihood_and_grad(d)
        change, rest = d.new_zeros(d.shape), slope
        p, size = rest, dot(rest, rest)
        tiny = torch.finfo(d.dtype).tiny
        # A change of the size of the level's noise, or of the latents where that is smaller, is neither lost in
        # rounding nor far from where the gradient was taken.
        far = 0.1 * min(sigma, 1.0) * sqrt(d[0, 0].numel())
        for _ in range(self.inner):
            norm = dot(p, p).sqrt()
            _, moved = posterior.log_likelihood_and_grad(d + far * (p / norm.clamp_min(tiny)))
            product = (slope - moved) * (norm / far) + weight * p
            curvature = dot(p, product).maximum(weight * dot(p, p)).clamp_min(tiny)
            length = size / curvature
            change, rest = change + length * p, rest - length * product
            after = dot(rest, rest)
            p, size = rest + after / size.clamp_min(tiny) * p, after
        return d + change
