"""What a run will cost on this device, measured before it starts."""

import sys
import time
from dataclasses import dataclass
from math import ceil, prod

import torch

from invdiff.driver import Cost, Sampler
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.priors import NetworkPrior

LONG = 600.0
"""Seconds from which a run asks to be confirmed."""
_PIXELS = {"cpu": 2**15, "cuda": 2**22}  # in one pass through the network; more brings no speed and costs memory


@dataclass(frozen=True)
class Estimate:
    """Cost of a run.

    Parameters
    ----------
    cost
        Network evaluations a draw.
    seconds
        Wall time of the whole run.
    memory
        Bytes at the peak, or None where they cannot be measured.
    """

    cost: Cost
    seconds: float
    memory: float | None

    def __str__(self) -> str:
        backward = f" and {self.cost.backward} backward" if self.cost.backward else ""
        memory = "" if self.memory is None else f", {_bytes(self.memory)} of memory"
        return f"{self.cost.forward} network evaluations{backward} a draw, about {words(self.seconds)}{memory}"


def micro_batch(shape: tuple[int, ...], draws: int, device: torch.device) -> int:
    """Draws in one pass through the network: as many as a device has use for."""
    pixels = _PIXELS.get(device.type, _PIXELS["cpu"])
    return max(1, min(draws, pixels // max(1, prod(shape[-2:]))))


def least_seconds(prior: NetworkPrior, shape: tuple[int, ...], cost: Cost, draws: int, device: torch.device) -> float:
    """Bound a run's wall time from below, from one evaluation at the prior's own size: cheap for any shape."""
    prior.to(device)
    z = torch.zeros(1, *prior.shape, device=device)
    with torch.no_grad():
        prior.denoise(z, prior.sigma_max)
        began = _now(device)
        prior.denoise(z, prior.sigma_max)
        once = _now(device) - began
    if device.type != "cpu":
        return 0.0  # a single small picture leaves most of an accelerator idle: no bound follows from it
    return once * prod(shape) / prod(prior.shape) * cost.forward * draws * 0.5


def measure(posterior: Posterior, sampler: Sampler, draws: int) -> Estimate:
    """Estimate a run from its first step, made on a few draws: network, operator and sampler together."""
    device = posterior.device
    few = draws if device.type == "cuda" else max(1, min(draws, 2**13 // prod(posterior.event[0].shape[-2:])))
    few = min(few, posterior.micro_batch or few)
    before = _peak(device)
    noise = Noise([0], few, device=device, dtype=posterior.dtype)
    with torch.no_grad():
        state = sampler.init(
            posterior, 1, few, noise=noise.at(0)
        )  # the prior's mean at sigma_max: the network warms up
        began = _now(device)
        state, _ = sampler.step(posterior, state, noise=noise.at(1))
        seconds = _now(device) - began
    share = max(sampler.progress(state), 1e-9)
    memory = None
    if before is not None:
        each = max(0.0, (_peak(device) or 0.0) - before) / few
        together = min(draws, posterior.micro_batch or draws)
        states = 8.0 * 4.0 * prod(posterior.shape) * draws
        memory = before + each * together + states
    return Estimate(sampler.cost_on(posterior), seconds / share * draws / few, memory)


def words(seconds: float) -> str:
    """Wall time for people."""
    if seconds < 100:
        return f"{max(1, ceil(seconds))} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: torch.device) -> float | None:
    """Bytes at the peak so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
