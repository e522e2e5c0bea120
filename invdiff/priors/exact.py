r"""Exact posteriors of analytic priors under linear-Gaussian measurements.

With ``y = M z + b + e``, ``e ~ N(0, R)`` and ``z ~ N(m, C)``:

    S = M C M^T + R,  G = C M^T S^{-1},  mean = m + G (y - b - M m),  covariance = (1 - G M) C (1 - G M)^T + G R G^T,

and ``p(y) = N(y; M m + b, S)``. The covariance is in Joseph's form, positive semi-definite however small the noise. A
mixture is conditioned component by component, its weights multiplied by the components' evidences.

Because z_sigma given z_0 does not depend on y, ``E[z_0 | z_sigma, y]`` is the denoiser of the posterior taken as a
prior.
"""

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import log, pi
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import Operator
from invdiff.priors.analytic import AnalyticPrior
from invdiff.priors.base import Sigma
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.mixture import MixturePrior

_CHUNK = 256  # basis vectors sent through the operator at a time


class ExactPosterior(ABC):
    """An exact posterior in latent units, float64.

    Attributes
    ----------
    log_evidence
        log p(y), nats.
    """

    log_evidence: float

    @property
    @abstractmethod
    def law(self) -> GaussianPrior | MixturePrior:
        """The posterior as a prior of its own, with the noise levels and decoder of the prior it came from."""

    @property
    @abstractmethod
    def mean(self) -> Float[Tensor, " *event"]:
        """Posterior mean."""

    @property
    @abstractmethod
    def covariance(self) -> Float[Tensor, "d d"]:
        """Posterior covariance of the flattened event."""

    @property
    def std(self) -> Float[Tensor, " *event"]:
        """Posterior standard deviation of each value."""
        return self.covariance.diagonal().clamp_min(0.0).sqrt().reshape(self.mean.shape)

    def sample(self, n: int, *, seed: int = 0) -> Float[Tensor, " n *event"]:
        """Independent exact draws, and independent of what the prior draws with the same seed, as a truth may be."""
        return self.law.sample(n, seed=stream_key(seed, "posterior"))

    def log_prob(self, z: Float[Tensor, " n *event"], sigma: Sigma = 0.0) -> Float[Tensor, " n"]:
        """Log p(z_sigma = z | y), nats; sigma = 0 is the posterior itself."""
        return self.law.log_prob(z, sigma)

    def denoise(self, z: Float[Tensor, " n *event"], sigma: Sigma) -> Float[Tensor, " n *event"]:
        """E[z_0 | z_sigma = z, y]: what an exactly guided denoiser would give."""
        return self.law.denoise(z, sigma)


@final
class GaussianPosterior(ExactPosterior):
    """A Gaussian posterior; its eigenbasis is computed when draws, densities or the denoiser are first asked for.

    Parameters
    ----------
    prior
        Prior it came from.
    mean, covariance
        Moments, shapes (*event) and (d, d).
    log_evidence
        log p(y), nats.
    """

    def __init__(self, prior: AnalyticPrior, mean: Tensor, covariance: Tensor, log_evidence: float) -> None:
        self._prior, self._mean, self._covariance, self.log_evidence = prior, mean, covariance, log_evidence

    @property
    def mean(self) -> Float[Tensor, " *event"]:
        """Posterior mean."""
        return self._mean

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Posterior covariance of the flattened event."""
        return self._covariance

    @cached_property
    def law(self) -> GaussianPrior:
        """The posterior as a prior of its own."""
        p = self._prior
        return GaussianPrior(
            self._mean, self._covariance, sigma_min=p.sigma_min, sigma_max=p.sigma_max, decoder=p.decoder
        )


@final
class MixturePosterior(ExactPosterior):
    """A Gaussian mixture posterior; ``law.weights``, ``law.means`` and ``law.covariances`` are its components.

    Parameters
    ----------
    law
        The mixture.
    log_evidence
        log p(y), nats.
    """

    def __init__(self, law: MixturePrior, log_evidence: float) -> None:
        self._law, self.log_evidence = law, log_evidence

    @property
    def law(self) -> MixturePrior:
        """The posterior as a prior of its own."""
        return self._law

    @property
    def mean(self) -> Float[Tensor, " *event"]:
        """Posterior mean."""
        return self._law.mean

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Posterior covariance of the flattened event."""
        return self._law.covariance


@dataclass(frozen=True)
class LinearMeasurement:
    """``value = matrix @ z + noise`` on flattened events; complex data as pairs of real ones.

    Parameters
    ----------
    matrix
        M, shape (m, d).
    value
        y - b, shape (m,).
    variance
        Diagonal of R, shape (m,).
    """

    matrix: Float[Tensor, "m d"]
    value: Float[Tensor, " m"]
    variance: Float[Tensor, " m"]

    def condition(self, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (d,), covariance (d, d) and log-evidence () of N(mean, covariance) given the measurement."""
        M, R = self.matrix, self.variance
        MC = M @ covariance
        L = torch.linalg.cholesky(MC @ M.mT + R.diag())
        r = self.value - M @ mean
        G = torch.cholesky_solve(MC, L).mT
        rest = torch.eye(len(mean), dtype=M.dtype, device=M.device) - G @ M
        new = rest @ covariance @ rest.mT + (G * R) @ G.mT
        whitened = torch.linalg.solve_triangular(L, r[:, None], upper=False)
        log_evidence = -0.5 * whitened.square().sum() - L.diagonal().log().sum() - 0.5 * len(r) * log(2.0 * pi)
        return mean + G @ r, 0.5 * (new + new.mT), log_evidence


def _real(t: Tensor) -> Tensor:
    """(n, ...) -> (n, m), complex values as pairs."""
    return (torch.view_as_real(t) if t.is_complex() else t).double().flatten(1)


def assemble(prior: AnalyticPrior, operator: Operator, y: Tensor, noise_std: float | Tensor) -> LinearMeasurement:
    """Write the measurement as a dense matrix on latent events: decoder and operator on zero and on basis vectors.

    Parameters are those of `AnalyticPrior.posterior`, as are the errors raised.
    """
    if operator.in_shape != prior.decoder.out_shape:
        raise ShapeError(
            f"The operator takes inputs of shape {operator.in_shape}, the prior decodes to {prior.decoder.out_shape}."
        )
    y = y if tuple(y.shape) != operator.out_shape else y[None]
    if tuple(y.shape) != (1, *operator.out_shape):
        raise ShapeError(
            f"The measurement must have shape {operator.out_shape} or (1, ...), one measurement; got {tuple(y.shape)}."
        )
    device = next(prior.buffers(recurse=False)).device
    # float64 throughout, also where the operator keeps its kernel in float32; the caller's own operator stays as it is.
    decoder, A = deepcopy(prior.decoder).double(), deepcopy(operator).double()

    def forward(z: Tensor) -> Tensor:
        return A(decoder(z.reshape(-1, *prior.shape)))

    raw = forward(torch.zeros(1, prior.size, dtype=torch.float64, device=device))
    if not bool(torch.isfinite(y).all()) or (y.is_complex() and not raw.is_complex()):
        raise InputError(
            f"The measurement must be finite and {'complex' if raw.is_complex() else 'real'}, as A's outputs are."
        )
    offset, basis = _real(raw), torch.eye(prior.size, dtype=torch.float64, device=device)
    columns = [_real(forward(rows)) - offset for rows in torch.split(basis, _CHUNK)]
    matrix = torch.cat(columns).mT
    probe = Noise([stream_key(0, "affine probe")], 2, device=device, dtype=torch.float64)
    z = probe.normal(probe.slots, (prior.size,))
    expected, got = z @ matrix.mT + offset, _real(forward(z))
    error = float((got - expected).norm() / got.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if not error < 1e-5:  # operators that compute in float32 inside pass
        raise CapabilityError(
            "An exact posterior needs an operator and a decoder that are linear or affine; "
            f"{type(operator).__name__} of the decoded event departs from that by a relative {error:.1e}. "
            "Linearise the operator, or use a sampler."
        )
    std = torch.as_tensor(noise_std, dtype=torch.float64, device=device)
    if not bool((std > 0).all()) or not bool(torch.isfinite(std).all()):
        raise InputError(
            f"noise_std must be positive and finite, got {noise_std}. For noiseless data give a small value, e.g. 1e-3."
        )
    try:
        std = torch.broadcast_to(std, operator.out_shape)
    except RuntimeError as error_:
        raise ShapeError(
            f"noise_std of shape {tuple(std.shape)} does not broadcast to the measurement {operator.out_shape}."
        ) from error_
    std = std.flatten().repeat_interleave(2) if raw.is_complex() else std.flatten()
    return LinearMeasurement(matrix, (_real(y.to(raw)) - offset)[0], std**2)


def gaussian_posterior(
    prior: AnalyticPrior, mean: Tensor, covariance: Tensor, operator: Operator, y: Tensor, noise_std: float | Tensor
) -> GaussianPosterior:
    """Posterior of a prior N(mean, covariance)."""
    measurement = assemble(prior, operator, y, noise_std)
    m, c, log_evidence = measurement.condition(mean.double().flatten(), covariance.double())
    return GaussianPosterior(prior, m.reshape(prior.shape), c, float(log_evidence))


def mixture_posterior(
    prior: MixturePrior, operator: Operator, y: Tensor, noise_std: float | Tensor
) -> MixturePosterior:
    """Posterior of a mixture; components whose weight underflows in float64 are left out."""
    measurement = assemble(prior, operator, y, noise_std)
    means, covariances, evidences = zip(
        *(
            measurement.condition(m, c)
            for m, c in zip(prior.means.double().flatten(1), prior.covariances.double(), strict=True)
        ),
        strict=True,
    )
    log_joint = prior.weights.double().log() + torch.stack(evidences)
    weights = torch.softmax(log_joint, dim=0)
    keep = weights > 0
    law = MixturePrior(
        weights[keep],
        torch.stack(means)[keep].reshape(-1, *prior.shape),
        torch.stack(covariances)[keep],
        sigma_min=prior.sigma_min,
        sigma_max=prior.sigma_max,
        decoder=prior.decoder,
    )
    return MixturePosterior(law, float(torch.logsumexp(log_joint, dim=0)))
