r"""Twists: guesses psi(x) of ``p(y | x)`` for sequences x of which some tokens are masked.

The best is ``psi(x) = E[p(y | x_0) | x]``. From one evaluation of the conditionals ``c_i(v) = p(x_i = v | x)`` come
guesses under which masked tokens are independent. A sequential Monte Carlo sampler is exact for any positive psi that
is ``p(y | x)`` where no token is masked; the better the guess, the fewer particles it needs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log, pi, prod
from typing import final

import torch
from torch import Tensor

from invdiff.errors import CapabilityError, InputError
from invdiff.posterior import Posterior, TokenBlock

_MEASURED, _DIFFERENTIATED = 2048, 64


class Twist(ABC):
    """A guess of the likelihood of incomplete sequences; subclasses are final frozen dataclasses."""

    @abstractmethod
    def requires(self) -> frozenset[str]:
        """Capabilities of the posterior without which it cannot be worked out."""

    @abstractmethod
    def of(self, block: TokenBlock) -> Tensor:
        """Log psi of the rows, (n,)."""

    def log_twist(self, posterior: Posterior, log_probs: Tensor) -> Tensor:
        """Log psi, float64, from conditionals (..., length, V); of the leading axes' shape."""
        return posterior.token_rows(log_probs, self.of).double()


@final
@dataclass(frozen=True, kw_only=True)
class MomentMatched(Twist):
    r"""A Gaussian with the moments of the prediction, for Gaussian noise.

    With m and V_i the means and covariances of the tokens' vectors under c, and H the map from vectors to the
    noise-free measurement,

        psi = N(y; H m, R + k H blockdiag(V_i) H^T),   k = inflation.

    Where the map is not linear, H is its derivative at m and H m its value there: a backward pass through the decoder
    for every measured value of every row, counted as such.

    Parameters
    ----------
    inflation
        k > 0. Tokens are not independent given the known ones, and a sum of them spreads wider than V_i say where they
        tend to be alike. A twist that is too narrow makes a few particles' weights explode, one that is too wide
        costs little.
    """

    inflation: float = 2.0

    def __post_init__(self) -> None:
        if not self.inflation > 0.0:
            raise InputError(f"The inflation of a covariance is positive, got {self.inflation}.")

    def requires(self) -> frozenset[str]:
        """Return Gaussian noise and a gradient with respect to vectors."""
        return frozenset({"masked", "gaussian", "embedding_gradient"})

    def of(self, block: TokenBlock) -> Tensor:
        """Log psi of the rows, (n,)."""
        shape = block.gaussian.operator.out_shape
        size = prod(shape)
        if size > _MEASURED:
            raise CapabilityError(
                f"MomentMatched writes out the covariance of what was measured, at most {_MEASURED} values; there are "
                f"{size}. Take twist=PlugIn()."
            )
        p, E = block.probs, block.codebook.double()
        if block.linear is not None and block.responses is not None:
            y = block.linear.measurement.double().reshape(-1, size)
            h = block.responses
            squares = (h[..., :, None] * h[..., None, :]).reshape(-1, size * size)
            mean = p.flatten(1) @ h.flatten(0, 1)
            each = torch.einsum("nlv,lvm->nlm", p, h)
            spread = (p.flatten(1) @ squares).reshape(-1, size, size) - each.mT @ each
        else:
            y = block.gaussian.measurement.double().reshape(-1, size)
            m = p @ E
            mean, J = _linearised(block, m.to(block.codebook.dtype))
            V = torch.einsum("nlv,vc,vd->nlcd", p, E, E) - m[..., :, None] * m[..., None, :]
            spread = torch.einsum("nmlc,nlcd,nkld->nmk", J, V, J)
        R = torch.broadcast_to(block.gaussian.noise_std.double() ** 2, shape).flatten()
        L = torch.linalg.cholesky(0.5 * self.inflation * (spread + spread.mT) + R.diag())
        whitened: Tensor = torch.linalg.solve_triangular(L, (y - mean)[..., None], upper=False)[..., 0]
        log_det: Tensor = 2.0 * L.diagonal(dim1=-2, dim2=-1).log().sum(1)
        return -0.5 * (whitened.square().sum(1) + log_det + size * log(2.0 * pi))


def _linearised(block: TokenBlock, m: Tensor) -> tuple[Tensor, Tensor]:
    """Noise-free measurement at vectors m, (n, measured), and its derivative, (n, measured, length, c); float64."""
    with torch.enable_grad():
        leaf = m.detach().requires_grad_()
        out = block.gaussian.operator(block.decode(leaf)).flatten(1)
        rows = [torch.autograd.grad(out[:, a].sum(), leaf, retain_graph=True)[0] for a in range(out.shape[1])]
    block.evaluations.likelihood_grad += out.numel()
    return out.detach().double(), torch.stack(rows, 1).double()


@final
@dataclass(frozen=True)
class PlugIn(Twist):
    """The likelihood at the means of the tokens' vectors, ``psi = p(y | decode(m))``, for any likelihood.

    Where the likelihood is a product of factors each of which is linear in every token that it sees, as parity checks
    through a binary symmetric channel are, psi is the product of the factors' exact expectations, check by check. For
    Gaussian noise it is narrower than what is known: take `MomentMatched` there.
    """

    def requires(self) -> frozenset[str]:
        """Return a masked prior."""
        return frozenset({"masked"})

    def of(self, block: TokenBlock) -> Tensor:
        """Log psi of the rows, (n,)."""
        mean = (block.probs @ block.codebook.double()).to(block.codebook.dtype)
        return block.likelihood.log_prob(block.decode(mean))


def default_twist(posterior: Posterior) -> Twist:
    """MomentMatched() for Gaussian noise with a gradient, where its covariance is cheap, else PlugIn().

    Where the way from vectors to the measurement is not linear, it takes a derivative for each measured value.
    """
    can, measured = posterior.capabilities, posterior.measurements
    cheap = measured <= (_MEASURED if "embedding_linear" in can else _DIFFERENTIATED)
    return MomentMatched() if MomentMatched().requires() <= can and cheap else PlugIn()
