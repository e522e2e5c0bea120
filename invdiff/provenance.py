"""What is written down about a run, so that it can be run again."""

import platform
from typing import Any

import torch
from torch import nn

from invdiff.driver import Outcome, Sampler
from invdiff.operators.base import fingerprint


def prior_key(prior: object) -> str:
    """Return a hash of what defines a prior: its own key, that of its tensors, or the name of its class."""
    key = getattr(prior, "key", None)
    if key is None:
        key = fingerprint(prior) if isinstance(prior, nn.Module) else type(prior).__qualname__
    return str(key)


def provenance(
    posterior: Any,
    sampler: Sampler,
    outcome: Outcome,
    *,
    draws: int,
    chains: int,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    """Return the versions, settings, device and cost of a posterior's run; evaluations are a draw's."""
    import invdiff

    count, total = posterior.evaluations, posterior.problems * chains * draws
    device = posterior.device
    return {
        "invdiff_version": invdiff.__version__,
        "python_version": platform.python_version(),
        "torch_version": str(torch.__version__),
        "prior": str(getattr(posterior.prior, "name", type(posterior.prior).__name__)),
        "prior_key": prior_key(posterior.prior),
        "sampler": type(sampler).__name__,
        "sampler_settings": repr(sampler),
        "sampler_exact": sampler.exact,  # whether its law tends to the posterior, in the limit that its file names
        "citation": type(sampler).citation,
        "measurements": posterior.measurements,
        "draws": draws,
        "chains": chains,
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(posterior.dtype).removeprefix("torch."),
        "precision": posterior.precision,
        "compiled": posterior.compiled,
        "micro_batch": posterior.micro_batch or 0,
        "seconds": seconds,
        "problems_in_run": posterior.problems,
        "evaluations_per_draw": outcome.trace[-1].evaluations if outcome.trace else count.denoiser / total,
        "backward_evaluations_per_draw": count.denoiser_vjp / total,
        "likelihood_evaluations_per_draw": (count.likelihood + count.likelihood_grad) / total,
        "stopped": outcome.stopped or "",
    }
