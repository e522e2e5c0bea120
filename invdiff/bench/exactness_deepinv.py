r"""deepinv's samplers on our problems with known posteriors, given the exact denoiser: all error is the sampler's own.

deepinv works on pictures (n, c, h, w) in [0, 1], and the priors here live there too, so nothing is rescaled. The
measured values and the operators are ours, through `invdiff.operators.adapters.to_deepinv`; inpainting alone is
deepinv's own `Inpainting` with the same mask and the same measured values put back into a picture, since its samplers
expect measurements in the picture's shape.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff.diagnostics.exactness import ExactProblem
from invdiff.errors import CapabilityError
from invdiff.operators import Inpainting
from invdiff.operators.adapters import to_deepinv

Settings = Mapping[str, float | int | str | bool]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Draws of a deepinv sampler (n, *event), and its network passes a draw, forward and backward."""

    draws: Tensor
    evaluations: float
    backward: float


def exact_denoiser(case: ExactProblem, passes: dict[str, int]) -> Any:
    """Make the problem's exact denoiser a deepinv `Denoiser`; ``passes`` counts its pictures, forward and backward.

    A Gaussian's denoiser is affine in the noisy picture and its Jacobian symmetric: the backward pass is exact, too.
    """
    from deepinv.models import Denoiser

    prior, mean = case.prior, case.prior.mean

    class Affine(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, sigma: Tensor) -> Tensor:
            passes["forward"] += len(x)
            return prior.denoise(x, sigma)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004 torch's
            ctx.save_for_backward(inputs[1])

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
            passes["backward"] += len(v)
            m = mean.to(v)
            return prior.denoise(m + v, ctx.saved_tensors[0]) - m, None

    class Exact(Denoiser):  # type: ignore[misc]
        def forward(self, x: Tensor, sigma: float | Tensor, **_: Any) -> Tensor:
            level = self._handle_sigma(sigma, batch_size=len(x), dtype=x.dtype, device=x.device)
            return Affine.apply(x, level)  # type: ignore[no-any-return]

    return Exact()


def physics_of(case: ExactProblem) -> tuple[Any, Tensor]:
    """Deepinv physics with the problem's noise level, and the measurement (1, ...) as its samplers take it, float32."""
    import deepinv

    likelihood: Any = case.problem.likelihood
    operator, y = likelihood.operator, likelihood.measurement[:1].float()
    if isinstance(operator, Inpainting):
        physics = deepinv.physics.Inpainting(img_size=operator.in_shape, mask=operator.mask.float())
        y = operator.fill(y)
    else:
        physics = to_deepinv(operator.float())
    physics.noise_model = deepinv.physics.GaussianNoise(sigma=float(likelihood.noise_std))
    return physics, y


def _dps(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], settings: Settings) -> Tensor:
    import deepinv

    solver = deepinv.sampling.DPS(denoiser, rng=torch.Generator(), **settings)
    draws: Tensor = solver(y, physics, x_init=shape, seed=0)
    return draws


def _ddrm(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], settings: Settings) -> Tensor:  # noqa: ARG001
    import deepinv

    draws: Tensor = deepinv.sampling.DDRM(denoiser, **settings)(y, physics)
    return draws


def _diffpir(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], settings: Settings) -> Tensor:  # noqa: ARG001
    import deepinv

    draws: Tensor = deepinv.sampling.DiffPIR(denoiser, deepinv.optim.data_fidelity.L2(), **settings)(y, physics)
    return draws


def _posterior(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], settings: Settings) -> Tensor:
    from deepinv import sampling

    s = dict(settings)
    fidelity = getattr(sampling, f"{s['fidelity']}DataFidelity")(denoiser=denoiser, cg_max_iter=s["cg_max_iter"])
    t = torch.linspace(1.0, 1e-3**0.5 if s["times"] == "quadratic" else 1e-3, int(s["num_steps"]), dtype=torch.float64)
    solver = sampling.AncestralSolver(timesteps=t**2 if s["times"] == "quadratic" else t, rng=torch.Generator())
    sde = sampling.VariancePreservingDiffusion(alpha=1.0)
    model = sampling.PosteriorDiffusion(data_fidelity=fidelity, denoiser=denoiser, sde=sde, solver=solver)
    draws: Tensor = model(y, physics, x_init=shape, seed=0, denoise_output=s["denoise_output"])
    return draws


_SAMPLERS: dict[str, Callable[[Any, Any, Tensor, tuple[int, ...], Settings], Tensor]] = {
    "DPS": _dps,
    "DDRM": _ddrm,
    "DiffPIR": _diffpir,
    "PosteriorDiffusion": _posterior,
}


def why_not(sampler: str, case: ExactProblem) -> str:
    """Why a sampler cannot run on a problem, or nothing."""
    if sampler == "DDRM" and not isinstance(case.problem.likelihood.operator, Inpainting):
        return "needs a physics with an SVD in deepinv's own classes, which has none for this boundary or filter"
    return ""


def run(sampler: str, settings: Settings, case: ExactProblem, draws: int, seed: int) -> Run:
    """Draw from a problem's posterior with one of deepinv's samplers; the global random generator is left as it was.

    Parameters
    ----------
    sampler
        "DPS", "DDRM", "DiffPIR" or "PosteriorDiffusion" (variance-preserving, ancestral).
    settings
        Arguments of deepinv's class; empty for its defaults. PosteriorDiffusion's are ``fidelity``, ``num_steps``,
        ``times`` ("linear" or "quadratic"), ``cg_max_iter`` and ``denoise_output``.
    case, draws, seed
        Problem, number of draws, seed.

    Raises
    ------
    CapabilityError
        If the sampler cannot run on the problem.
    """
    if reason := why_not(sampler, case):
        raise CapabilityError(f"{sampler} {reason}.")
    passes = {"forward": 0, "backward": 0}
    physics, y = physics_of(case)
    shape = (draws, *case.prior.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = y.expand(draws, *y.shape[1:]).clone()
        found = _SAMPLERS[sampler](exact_denoiser(case, passes), physics, rows, shape, settings)
    return Run(draws=found.detach(), evaluations=passes["forward"] / draws, backward=passes["backward"] / draws)
