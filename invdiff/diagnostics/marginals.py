r"""Draws against exact Gaussian posteriors of thousands of values, for several measurements by one operator.

`invdiff.diagnostics.exactness` holds dense covariances and compares draws with all of one; that ends at some hundreds
of values. Here, with ``y = M z + b + e``, ``e ~ N(0, R)``, ``z ~ N(m, C)`` and C diagonal in a fast basis, the dense
matrices are those of the measured values, and the posteriors of all measurements share them:

    S = M C M^T + R = L L^T,   G = C M^T S^{-1},   mean = m + G (y - b - M m),   variance = diag C - |L^{-1} M C|^2

down the columns, and ``log p(y) = log N(y; M m + b, S)``. Draws z + G (y - M z - e) from those of the prior are exact
(Hoffman & Ribak 1991). N draws of a measurement are summed up by four figures, which exact draws leave at 1, 1, 1 and
0.9 up to chance:

    mean error   |m^ - m| sqrt(N / tr V), V the posterior's covariance: in units of the floor that N exact draws leave
    variance     mean over values of the sample variance over the exact one
    whitened     mean over draws of (z - m)^T (C^{-1} + M^T R^{-1} M) (z - m) / d: sees errors that no value shows alone
    inside       share of the draws' values inside the exact central 90 % interval

Unlike `exactness.Exactness.mass`, which asks what the draws' own interval holds, the last is without bias for any N.
"""

from copy import deepcopy
from dataclasses import dataclass
from math import log, pi, sqrt
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import LinearOperator
from invdiff.priors.exact import assemble
from invdiff.priors.field import FieldPrior

LEVEL = 0.9
_CHUNK = 256  # rows in one Fourier transform


@dataclass(frozen=True, kw_only=True)
class Marginals:
    """Figures of the draws of each measurement; see the module's text. All of shape (problems,), float64.

    Parameters
    ----------
    mean_error
        In units of the floor.
    variance_ratio, whitened, inside
        1, 1 and 0.9 for exact draws.
    """

    mean_error: Tensor
    variance_ratio: Tensor
    whitened: Tensor
    inside: Tensor

    def summary(self) -> dict[str, float]:
        """Root-mean-square of the mean errors, and means of the others, over measurements."""
        return {
            "mean_error": float(self.mean_error.square().mean().sqrt()),
            "variance_ratio": float(self.variance_ratio.mean()),
            "whitened": float(self.whitened.mean()),
            "inside": float(self.inside.mean()),
        }


class MarginalPosterior:
    """Exact posteriors of a Gaussian field for several measurements by one operator, float64.

    Parameters
    ----------
    prior
        The field; a copy is kept.
    operator
        Linear operator on its events.
    y
        Measurements, shape (problems, *out_shape).
    noise_std
        Noise standard deviation in the units of y; a positive scalar.
    device
        Where the dense matrices are and draws are compared; the prior's own device if None. The prior and the operator
        stay where they are.

    Attributes
    ----------
    mean
        Posterior means, (problems, *event).
    std
        Posterior standard deviation of each value, the same for all measurements, (*event).
    log_evidence
        log p(y), nats, (problems,).

    Raises
    ------
    ShapeError
        If y is not a batch of measurements.
    InputError, CapabilityError
        As `FieldPrior.posterior`.
    """

    mean: Tensor
    std: Tensor
    log_evidence: Tensor

    @torch.no_grad()
    def __init__(
        self,
        prior: FieldPrior,
        operator: LinearOperator,
        y: Tensor,
        noise_std: float,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if tuple(y.shape[1:]) != operator.out_shape or len(y) == 0:
            raise ShapeError(f"Measurements have shape (problems, *{operator.out_shape}), got {tuple(y.shape)}.")
        place = prior.mean.device if device is None else torch.device(device)
        self.prior, y = deepcopy(prior).to(place), y.to(place).double()
        self._measurement = assemble(self.prior, deepcopy(operator).to(place), y[:1], noise_std)
        M, R, m = self._measurement.matrix, self._measurement.variance, self.prior.mean.flatten()
        self._values = self._measurement.value + (y - y[:1]).flatten(1)
        MC = torch.cat([self._smoothed(rows) for rows in torch.split(M, _CHUNK)])
        L = torch.linalg.cholesky(MC @ M.mT + R.diag())
        W = torch.linalg.solve_triangular(L, MC, upper=False)
        u = torch.linalg.solve_triangular(L, (self._values - M @ m).mT, upper=False)
        self._gain = torch.cholesky_solve(MC, L).mT
        self.mean = (m + u.mT @ W).reshape(-1, *self.prior.shape)
        channel = self.prior.spectrum.flatten(1).mean(1)
        prior_variance = channel.repeat_interleave(self.prior.size // len(channel))
        self.std = (prior_variance - W.square().sum(0)).clamp_min(0.0).sqrt().reshape(self.prior.shape)
        log_det = 2.0 * L.diagonal().log().sum()
        self.log_evidence = -0.5 * (u.square().sum(0) + log_det + len(R) * log(2.0 * pi))

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0) -> Float[Tensor, "problems n *event"]:
        """Independent exact draws of each measurement's posterior."""
        p, M = len(self.mean), self._measurement.matrix
        keys = [stream_key(seed, "marginal posterior", i) for i in range(p)]
        noise = Noise(keys, n, device=M.device, dtype=M.dtype)
        white = noise.normal(noise.slots, self.prior.shape)
        basis, m = self.prior.curvature, self.prior.mean.flatten()
        z = m + basis.from_basis(self.prior.spectrum.sqrt() * basis.to_basis(white)).flatten(1)
        e = self._measurement.variance.sqrt() * noise.normal(noise.slots, (len(M),))
        r = self._values.repeat_interleave(n, 0) - z @ M.mT - e
        return (z + r @ self._gain.mT).reshape(p, n, *self.prior.shape)

    @torch.no_grad()
    def compare(self, draws: Float[Tensor, "problems n *event"]) -> Marginals:
        """Figures of equal-weight draws of each measurement, on the CPU.

        Raises
        ------
        ShapeError
            If there are not as many sets of draws as measurements, or fewer than two draws.
        """
        p, event = len(self.mean), self.prior.shape
        if draws.shape[:1] + draws.shape[2:] != (p, *event) or draws.shape[1] < 2:
            raise ShapeError(f"Draws have shape {(p, 'n', *event)} with n of at least 2, got {tuple(draws.shape)}.")
        n, M, R = draws.shape[1], self._measurement.matrix, self._measurement.variance
        x = (draws.to(self.mean) - self.mean[:, None]).flatten(2)
        variance = self.std.flatten().square()
        half = NormalDist().inv_cdf(0.5 + 0.5 * LEVEL)
        basis = self.prior.curvature
        power = basis.to_basis(x.reshape(-1, *event)).abs().square() / self.prior.spectrum
        fit = torch.cat([(rows @ M.mT).square() @ (1.0 / R) for rows in torch.split(x.flatten(0, 1), _CHUNK)])
        lengths = (power.flatten(1).sum(1) + fit).reshape(p, n)
        return Marginals(
            mean_error=(x.mean(1).square().sum(1) / variance.sum()).sqrt().cpu() * sqrt(n),
            variance_ratio=(x.var(1) / variance).mean(1).cpu(),
            whitened=lengths.mean(1).cpu() / self.prior.size,
            inside=(x.abs() <= half * variance.sqrt()).double().mean((1, 2)).cpu(),
        )

    def _smoothed(self, rows: Tensor) -> Tensor:
        """C v for flattened rows v."""
        basis = self.prior.curvature
        v = basis.to_basis(rows.reshape(-1, *self.prior.shape))
        return basis.from_basis(self.prior.spectrum * v).flatten(1)
