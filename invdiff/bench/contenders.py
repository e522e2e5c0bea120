"""Who takes part in the benchmark on photographs: samplers, ours and deepinv's, and the ranges they are tuned over.

All are held to the same number of network evaluations a draw: of forward passes, or, where the caller counts them, of
forward and backward passes together. The first trial of every contender is its default settings; the others are drawn
from its ranges by a seed, so that a rerun tries the same.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from invdiff.bench import deepinv_samplers
from invdiff.bench.tasks import NOISE_STD, Group
from invdiff.integrators import Ancestral, DPMSolver2M
from invdiff.likelihoods import Gaussian
from invdiff.noise import stream_key
from invdiff.posterior import PRECISIONS
from invdiff.priors.adapters import to_deepinv
from invdiff.priors.base import DiffusionPrior, Sigma
from invdiff.samplers import (
    DAPS,
    DDNM,
    DDRM,
    DPS,
    ULA,
    DiffPIR,
    ExactInner,
    Isotropic,
    Jacobian,
    Langevin,
    Levels,
    PiGDM,
    REDDiff,
    Sampler,
    Spectral,
    SplitGibbs,
    TransportLangevin,
)
from invdiff.solve import solve

EVALUATIONS = 50
"""Network evaluations a draw unless told otherwise, forward; backward ones are reported."""
MICRO_BATCH = {64: 52, 256: 16}
"""Pictures in one differentiated pass through the network, by their side; other passes hold all rows of a run."""

Range = tuple[float, float] | tuple[str, ...] | list[Any]
"""(low, high) for a logarithmically uniform number, or a list to choose from."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A sampler with the settings to tune.

    Parameters
    ----------
    name
        In tables.
    library
        "invdiff" or "deepinv".
    ranges
        Settings by name; a pair (low, high) is logarithmically uniform, a list is chosen from.
    make
        Our sampler of a number of evaluations and some settings.
    backward
        Most backward passes that it makes for each forward one. A run that has any takes three times as long.
    peer, fixed
        Name of deepinv's sampler in `invdiff.bench.deepinv_samplers`, and settings where a trial has no other.
    steps
        deepinv's setting that says how many steps to take, and by how many that number exceeds the evaluations.
    """

    name: str
    library: str = "invdiff"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    backward: int = 0
    make: Callable[..., Sampler] | None = None
    peer: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[str, int] = ("", 0)

    @property
    def gradient(self) -> bool:
        """Whether it differentiates the network."""
        return self.backward > 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """Draws (pictures, draws, c, h, w) in [0, 1] units, passes a draw, and wall seconds."""

    draws: Tensor
    evaluations: float
    backward: float
    seconds: float


def _pigdm(
    evaluations: int, integrator: str = "DPMSolver2M", sigma_min: float | None = None, rho: float = 7.0
) -> Sampler:
    return PiGDM(
        steps=evaluations,
        covariance=Spectral(),
        integrator=_INTEGRATORS[integrator](),
        levels=Levels(sigma_min=sigma_min, rho=rho),
    )


def _pigdm_isotropic(
    evaluations: int, prior_std: float = 1.0, integrator: str = "DPMSolver2M", rho: float = 7.0
) -> Sampler:
    return PiGDM(
        steps=evaluations,
        covariance=Isotropic(prior_std=prior_std),
        integrator=_INTEGRATORS[integrator](),
        levels=Levels(rho=rho),
    )


def _pigdm_jacobian(
    evaluations: int, max_iterations: int = 3, integrator: str = "Ancestral", rho: float = 7.0
) -> Sampler:
    return PiGDM(
        steps=evaluations,
        covariance=Jacobian(max_iterations=max_iterations),
        integrator=_INTEGRATORS[integrator](),
        levels=Levels(rho=rho),
    )


def _dps(evaluations: int, scale: float = 1.0, sigma_min: float | None = None) -> Sampler:
    return DPS(steps=evaluations, scale=scale, levels=Levels(sigma_min=sigma_min))


def _daps(
    evaluations: int, ode_steps: int = 2, inner: str = "Langevin", sigma_min: float | None = None, rho: float = 7.0
) -> Sampler:
    return DAPS(
        steps=evaluations // ode_steps,
        ode_steps=ode_steps,
        inner=Langevin() if inner == "Langevin" else ExactInner(),
        levels=Levels(sigma_min=sigma_min, rho=rho),
    )


def _ddrm(evaluations: int, eta: float = 0.85, eta_b: float = 1.0, rho: float = 7.0) -> Sampler:
    return DDRM(steps=evaluations, eta=eta, eta_b=eta_b, levels=Levels(rho=rho))


def _ddnm(evaluations: int, eta: float = 0.85, sigma_min: float | None = None, rho: float = 7.0) -> Sampler:
    return DDNM(steps=evaluations, eta=eta, levels=Levels(sigma_min=sigma_min, rho=rho))


def _diffpir(evaluations: int, lam: float = 1.0, zeta: float = 0.8, rho: float = 7.0) -> Sampler:
    return DiffPIR(steps=evaluations, lam=lam, zeta=zeta, levels=Levels(rho=rho))


def _red_diff(evaluations: int, lam: float = 0.25, lr: float | None = None, rho: float = 7.0) -> Sampler:
    return REDDiff(steps=evaluations, lam=lam, lr=lr, levels=Levels(rho=rho))


def _split_gibbs(evaluations: int, prior_steps: int = 1, **levels: float) -> Sampler:
    default = SplitGibbs().levels
    return SplitGibbs(steps=evaluations // prior_steps, prior_steps=prior_steps, levels=replace(default, **levels))


def _transport(
    evaluations: int, refreshes: int = 4, step_size: float = 0.8, floor: float | None = None, rho: float = -4.0
) -> Sampler:
    return TransportLangevin(
        steps=evaluations // (1 + refreshes),
        refreshes=refreshes,
        step_size=step_size,
        floor=floor,
        levels=Levels(rho=rho),
    )


def _transport_momentum(evaluations: int, refreshes: int = 2, step_size: float = 0.5, **settings: Any) -> Sampler:
    made: Any = _transport(evaluations, refreshes, step_size, **settings)
    return cast(Sampler, replace(made, momentum=0.6))


def _ula(evaluations: int, rate: float = 1.0, sigma: float | None = None) -> Sampler:
    return ULA(steps=evaluations, rate=rate, sigma=sigma)


_INTEGRATORS = {"DPMSolver2M": DPMSolver2M, "Ancestral": Ancestral}
_LOW = (0.005, 0.1)
_RHO = [3.0, 5.0, 7.0]
_SHARE = [0.1, 0.3, 0.5, 0.7, 0.85, 1.0]

CONTENDERS: tuple[Contender, ...] = (
    Contender(
        name="PiGDM, Spectral",
        make=_pigdm,
        ranges={"integrator": list(_INTEGRATORS), "sigma_min": _LOW, "rho": _RHO},
    ),
    Contender(
        name="PiGDM, Jacobian",
        backward=4,  # its iterations, and the gradient's own
        make=_pigdm_jacobian,
        ranges={"max_iterations": [1, 2, 3], "integrator": list(_INTEGRATORS), "rho": _RHO},
    ),
    Contender(
        name="PiGDM, Isotropic",
        backward=1,
        make=_pigdm_isotropic,
        ranges={"prior_std": (0.1, 2.0), "integrator": list(_INTEGRATORS), "rho": _RHO},
    ),
    Contender(name="DPS", backward=1, make=_dps, ranges={"scale": (0.05, 20.0), "sigma_min": _LOW}),
    Contender(
        name="DAPS",
        make=_daps,
        ranges={"ode_steps": [1, 2, 5], "inner": ["Langevin", "ExactInner"], "sigma_min": _LOW, "rho": _RHO},
    ),
    Contender(name="DDRM", make=_ddrm, ranges={"eta": _SHARE, "eta_b": [0.6, 0.8, 1.0], "rho": _RHO}),
    Contender(name="DDNM", make=_ddnm, ranges={"eta": [0.0, *_SHARE], "sigma_min": _LOW, "rho": _RHO}),
    Contender(name="DiffPIR", make=_diffpir, ranges={"lam": (0.1, 30.0), "zeta": _SHARE, "rho": _RHO}),
    Contender(name="RED-diff", make=_red_diff, ranges={"lam": (0.01, 2.0), "lr": (0.005, 0.3), "rho": _RHO}),
    Contender(
        name="TransportLangevin",
        make=_transport,
        ranges={
            "refreshes": [1, 2, 4],
            "step_size": [0.4, 0.6, 0.8, 1.0],
            "floor": [0.3, 0.5, 1.0],
            "rho": [-4.0, 7.0],
        },
    ),
    Contender(
        name="TransportLangevin, momentum",
        make=_transport_momentum,
        ranges={
            "refreshes": [1, 2, 4],
            "step_size": [0.3, 0.4, 0.5],
            "floor": [0.3, 0.5, 1.0],
            "rho": [-10.0, -4.0, 7.0],
        },
    ),
    Contender(
        name="SplitGibbs",
        make=_split_gibbs,
        ranges={
            "prior_steps": [1, 2, 5],
            "sigma_min": (0.005, 0.2),
            "sigma_max": (1.0, 80.0),
            "rho": [-4.0, -1.0, 3.0],
        },
    ),
    Contender(name="ULA", make=_ula, ranges={"rate": (0.1, 1.9), "sigma": (0.01, 0.5)}),
    Contender(
        name="deepinv DPS",
        backward=1,
        library="deepinv",
        peer="DPS",
        fixed={"dtype": "float32"},
        steps=("num_steps", 1),
        ranges={"weight": (0.1, 1000.0), "guidance": ["norm", "annealed"]},
    ),
    Contender(
        name="deepinv DDRM",
        library="deepinv",
        peer="DDRM",
        steps=("num_steps", 0),
        ranges={"eta": _SHARE, "etab": [0.6, 0.8, 1.0], "sigma_max": (0.3, 40.0)},
    ),
    Contender(
        name="deepinv DiffPIR",
        library="deepinv",
        peer="DiffPIR",
        fixed={"sigma": NOISE_STD},
        steps=("max_iter", 0),
        ranges={"lambda_": (0.1, 30.0), "zeta": _SHARE},
    ),
    Contender(
        name="deepinv PiGDM",
        backward=1,
        library="deepinv",
        peer="PosteriorDiffusion",
        fixed={
            "fidelity": "PiGDM",
            "dtype": "float32",
            "times": "quadratic",
            "denoise_output": False,
            "cg_max_iter": 3,
        },
        steps=("num_steps", 1),
        ranges={"weight": (0.1, 3.0), "times": ["quadratic", "linear"], "cg_max_iter": [3, 10]},
    ),
)


def trial(contender: Contender, k: int) -> dict[str, Any]:
    """Return the settings of a contender's k-th trial; its defaults for k = 0."""
    if k == 0:
        return {}
    generator = np.random.default_rng(stream_key(0, "trial", contender.name, k))
    found: dict[str, Any] = {}
    for name, among in contender.ranges.items():
        if isinstance(among, list):
            found[name] = among[int(generator.integers(len(among)))]
        else:
            low, high = (log(float(v)) for v in among)
            found[name] = float(f"{exp(low + (high - low) * generator.random()):.3g}")
    return found


def run(
    contender: Contender,
    settings: Mapping[str, Any],
    batch: Group,
    prior: DiffusionPrior,
    *,
    draws: int,
    device: str,
    precision: str,
    compiled: bool,
    evaluations: int = EVALUATIONS,
    count_backward: bool = False,
) -> Result:
    """Draw for every problem of a group, with at most so many network evaluations a draw.

    Forward passes alone are counted; with ``count_backward``, backward ones too.

    Raises
    ------
    CapabilityError
        If the contender cannot do the task.
    """
    if count_backward:
        evaluations //= 1 + contender.backward
    size = len(batch.problems) * draws
    if contender.gradient:
        size = min(size, MICRO_BATCH[batch.truths.shape[-1]])
    began = time.perf_counter()
    if contender.make is not None:
        solutions = solve(
            list(batch.problems),
            prior,
            contender.make(evaluations, **settings),
            draws=draws,
            seed=0,
            device=device,
            micro_batch=size,
            precision=precision,
            compile=compiled,
        )
        about = solutions[0].about
        return Result(
            draws=torch.stack([s.draws for s in solutions]),
            evaluations=about["evaluations_per_draw"],
            backward=about["backward_evaluations_per_draw"],
            seconds=time.perf_counter() - began,
        )
    likelihood = Gaussian.stack([p.likelihood for p in batch.problems]).to(device)  # type: ignore[misc]
    found = deepinv_samplers.draw(
        contender.peer,
        {**contender.fixed, contender.steps[0]: evaluations + contender.steps[1], **settings},
        likelihood,
        lambda passes: to_deepinv(_Shared(prior, passes, precision, size, compiled=compiled)),
        tuple(prior.shape),
        draws,
        seed=0,
    )
    z = found.draws.reshape(len(batch.problems), draws, *prior.shape)
    if z.is_cuda:
        torch.cuda.synchronize()
    return Result(draws=z, evaluations=found.evaluations, backward=found.backward, seconds=time.perf_counter() - began)


class _Shared:
    """A prior whose network runs as `Posterior` runs it: compiled, in a lower precision, by micro-batches."""

    def __init__(
        self, prior: DiffusionPrior, passes: deepinv_samplers.Passes, precision: str, size: int, *, compiled: bool
    ) -> None:
        self.shape, self.sigma_min, self.sigma_max = prior.shape, prior.sigma_min, prior.sigma_max
        self.decoder: Any = getattr(prior, "decoder", None)
        self._passes, self._level, self._size = passes, PRECISIONS[precision], size
        self._denoise = torch.compile(prior.denoise, dynamic=False) if compiled else prior.denoise

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """Run the network and count its pictures."""
        self._passes.forward += len(z)
        levels = sigma if isinstance(sigma, Tensor) else torch.full((len(z),), sigma, device=z.device)
        parts = []
        with torch.autocast(z.device.type, dtype=self._level) if self._level is not None else nullcontext():
            for x, level in zip(torch.split(z, self._size), torch.split(levels, self._size), strict=True):
                if x.requires_grad:
                    x.register_hook(self._count)  # type: ignore[no-untyped-call]
                parts.append(self._denoise(x.to(torch.float32), level.to(torch.float32)))
        return torch.cat(parts).to(z.dtype)

    def _count(self, gradient: Tensor) -> None:
        self._passes.backward += len(gradient)
