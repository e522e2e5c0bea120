r"""deepinv's samplers as the benchmarks call them: its own classes and defaults, our operators and measurements.

deepinv works on pictures (n, c, h, w) in [0, 1]. Inpainting is deepinv's own `Inpainting` with the same mask and the
same measured values put back into a picture, since its samplers expect measurements in the picture's shape. Operators
with a real diagonalisation go in as a `DecomposablePhysics` made of it, so that its DDRM and closed forms run on more
than its own classes; every other operator by `invdiff.operators.adapters.to_deepinv`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import CapabilityError
from invdiff.likelihoods import Gaussian, Likelihood
from invdiff.operators import Inpainting
from invdiff.operators.adapters import to_deepinv
from invdiff.operators.base import SVD, LinearOperator

Settings = Mapping[str, float | int | str | bool]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Draws of a deepinv sampler (n, *event), and its network passes a draw, forward and backward."""

    draws: Tensor
    evaluations: float
    backward: float


@dataclass
class Passes:
    """Pictures that went through the network, forward and backward."""

    forward: int = 0
    backward: int = 0


def _decomposable(operator: LinearOperator, svd: SVD) -> Any:
    import deepinv

    return deepinv.physics.DecomposablePhysics(
        U=svd.u,
        U_adjoint=svd.u_adjoint,
        V=svd.v,
        V_adjoint=svd.v_adjoint,
        mask=svd.singular_values.expand(operator.in_shape)[None].float(),
        img_size=operator.in_shape,
    )


def physics_of(likelihood: Likelihood) -> tuple[Any, Tensor]:
    """Deepinv physics with a Gaussian likelihood's noise, and its measurements (problems, ...) as its samplers take it.

    In float32, on the likelihood's device.
    """
    import deepinv

    assert isinstance(likelihood, Gaussian)
    assert isinstance(likelihood.operator, LinearOperator)
    operator, y = likelihood.operator, likelihood.measurement.float()
    if isinstance(operator, Inpainting):
        physics = deepinv.physics.Inpainting(
            img_size=operator.in_shape, mask=operator.mask.float(), device=operator.mask.device
        )
        y = operator.fill(y)
    else:
        operator = operator.float()
        svd = operator.svd
        real = svd is not None and not svd.v_adjoint(torch.zeros(1, *operator.in_shape, device=y.device)).is_complex()
        physics = _decomposable(operator, svd) if svd is not None and real else to_deepinv(operator)
    physics.noise_model = deepinv.physics.GaussianNoise(sigma=float(likelihood.noise_std))
    return physics.to(y.device), y


def _generator(y: Tensor) -> torch.Generator:
    return torch.Generator(device=y.device)


def _dps(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], seed: int, settings: Settings) -> Tensor:
    import deepinv

    s: dict[str, Any] = dict(settings)
    if "dtype" in s:
        s["dtype"] = getattr(torch, s["dtype"])
    solver = deepinv.sampling.DPS(denoiser, rng=_generator(y), device=y.device, **s)
    draws: Tensor = solver(y, physics, x_init=shape, seed=seed)
    return draws


def _ddrm(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], seed: int, settings: Settings) -> Tensor:  # noqa: ARG001
    import deepinv
    import numpy as np

    s = dict(settings)
    if "num_steps" in s:  # evenly spaced from 1 to 0, as its default of 100
        s["sigmas"] = np.linspace(float(s.pop("sigma_max", 1.0)), 0, int(s.pop("num_steps")))  # type: ignore[assignment]
    draws: Tensor = deepinv.sampling.DDRM(denoiser, **s)(y, physics)
    return draws


def _diffpir(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], seed: int, settings: Settings) -> Tensor:  # noqa: ARG001
    import deepinv

    fidelity = deepinv.optim.data_fidelity.L2()
    draws: Tensor = deepinv.sampling.DiffPIR(denoiser, fidelity, device=y.device, **settings)(y, physics)
    return draws


def _posterior(denoiser: Any, physics: Any, y: Tensor, shape: tuple[int, ...], seed: int, settings: Settings) -> Tensor:
    from deepinv import sampling

    s = dict(settings)
    dtype = getattr(torch, str(s.pop("dtype", "float64")))
    name, count, times = s.pop("fidelity"), int(s.pop("num_steps")), s.pop("times")
    output = s.pop("denoise_output")
    fidelity = getattr(sampling, f"{name}DataFidelity")(denoiser=denoiser, **s)
    t = torch.linspace(1.0, 1e-3**0.5 if times == "quadratic" else 1e-3, count, dtype=torch.float64)
    solver = sampling.AncestralSolver(timesteps=t**2 if times == "quadratic" else t, rng=_generator(y))
    sde = sampling.VariancePreservingDiffusion(alpha=1.0, dtype=dtype, device=y.device)
    model = sampling.PosteriorDiffusion(
        data_fidelity=fidelity, denoiser=denoiser, sde=sde, solver=solver, dtype=dtype, device=y.device
    )
    draws: Tensor = model(y, physics, x_init=shape, seed=seed, denoise_output=output)
    return draws


_SAMPLERS: dict[str, Callable[[Any, Any, Tensor, tuple[int, ...], int, Settings], Tensor]] = {
    "DPS": _dps,
    "DDRM": _ddrm,
    "DiffPIR": _diffpir,
    "PosteriorDiffusion": _posterior,
}


def why_not(sampler: str, operator: LinearOperator) -> str:
    """Why a sampler cannot run on an operator, or nothing."""
    svd = operator.svd
    if sampler == "DDRM" and svd is None:
        return "needs an SVD, which this operator does not have"
    return ""


def draw(
    sampler: str,
    settings: Settings,
    likelihood: Likelihood,
    make_denoiser: Callable[[Passes], Any],
    shape: tuple[int, ...],
    draws: int,
    seed: int,
) -> Run:
    """Draw from the posterior of each measurement; the global random generators are left as they were.

    Parameters
    ----------
    sampler
        "DPS", "DDRM", "DiffPIR" or "PosteriorDiffusion" (variance-preserving, ancestral).
    settings
        Arguments of deepinv's class; empty for its defaults. PosteriorDiffusion's are ``fidelity``, ``num_steps``,
        ``times`` ("linear" or "quadratic"), ``denoise_output``, and those of the fidelity; ``dtype`` by its name.
    likelihood
        Gaussian, with one measurement or several.
    make_denoiser
        Gives a deepinv `Denoiser` that counts its pictures.
    shape, draws, seed
        Shape of one event, draws a measurement, seed.

    Returns
    -------
    Run
        With draws (measurements * draws, *shape), measurement by measurement.

    Raises
    ------
    CapabilityError
        If the sampler cannot run on the operator.
    """
    operator: Any = likelihood.operator
    if reason := why_not(sampler, operator):
        raise CapabilityError(f"{sampler} {reason}.")
    passes = Passes()
    physics, y = physics_of(likelihood)
    rows = y.repeat_interleave(draws, 0)
    devices = [y.device] if y.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        found = _SAMPLERS[sampler](make_denoiser(passes), physics, rows, (len(rows), *shape), seed, settings)
    return Run(draws=found.detach(), evaluations=passes.forward / len(rows), backward=passes.backward / len(rows))
