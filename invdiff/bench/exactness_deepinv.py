"""deepinv's samplers on our problems with known posteriors, given the exact denoiser: all error is the sampler's own.

The priors live in deepinv's units, pictures about grey in [0, 1], so nothing is rescaled.
"""

from typing import Any

import torch
from torch import Tensor

from invdiff.bench.deepinv_samplers import Passes, Run, Settings, draw
from invdiff.diagnostics.exactness import ExactProblem
from invdiff.errors import CapabilityError
from invdiff.priors.field import FieldPrior
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.wavelet import WaveletPrior


def exact_denoiser(prior: FieldPrior | GaussianPrior, passes: Passes) -> Any:
    """Make a prior's exact denoiser a deepinv `Denoiser`; ``passes`` counts its pictures, forward and backward.

    A Gaussian's denoiser is affine in the noisy picture and its Jacobian symmetric: the backward pass is exact, too.
    """
    from deepinv.models import Denoiser

    mean = prior.mean

    class Affine(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, sigma: Tensor) -> Tensor:
            passes.forward += len(x)
            return prior.denoise(x, sigma)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004 torch's
            ctx.save_for_backward(inputs[1])

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
            passes.backward += len(v)
            m = mean.to(v)
            return prior.denoise(m + v, ctx.saved_tensors[0]) - m, None

    class Exact(Denoiser):  # type: ignore[misc]
        def forward(self, x: Tensor, sigma: float | Tensor, **_: Any) -> Tensor:
            level = self._handle_sigma(sigma, batch_size=len(x), dtype=x.dtype, device=x.device)
            return Affine.apply(x, level)  # type: ignore[no-any-return]

    return Exact()


def run(sampler: str, settings: Settings, case: ExactProblem, draws: int, seed: int) -> Run:
    """Draw from a problem's posterior with one of deepinv's samplers; see `invdiff.bench.deepinv_samplers.draw`."""
    prior = case.prior
    if isinstance(prior, WaveletPrior):
        raise CapabilityError("deepinv's samplers work on pictures in their own values, not on wavelet coefficients.")
    return draw(
        sampler,
        settings,
        case.problem.likelihood,
        lambda passes: exact_denoiser(prior, passes),
        tuple(prior.shape),
        draws,
        seed,
    )
