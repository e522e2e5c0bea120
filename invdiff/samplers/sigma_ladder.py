r"""A ladder of noise levels that walkers climb: the likelihood at each walker's own rung, and the flow between rungs.

Rung k of a ladder sigma_0 < ... < sigma_{K-1} has the density p_{sigma_k}(z) psi_k(z), with p_sigma the noised prior
and log psi_k a path from little at the top to log p(y | z), exactly, at the bottom:

    log psi_k(z) = f at the level tau_k = sqrt(sigma_k^2 - sigma_0^2),   f a `potential.Path`

so that what the bottom rung lacks of sigma = 0 is the prior's noise alone, not the measurement's.

The probability flow dz / dsigma = (z - D(z, sigma)) / sigma carries p_sigma to p_sigma'. A state and its image z' under
the flow therefore have the same prior probability, p_sigma'(z') |dz' / dz| = p_sigma(z), and their ratio under the
ladder is psi_k'(z') / psi_k(z): no density of the prior, divergence of its score or classifier of noise enters. Here
the flow goes from rung to rung by the explicit midpoint rule, two evaluations, of second order.
"""

from dataclasses import dataclass, replace
from math import inf, log, pi, prod
from typing import Self

import torch
from torch import Tensor

from invdiff.driver import State
from invdiff.errors import CapabilityError
from invdiff.linear_gaussian import LinearGaussian
from invdiff.parallel import ALONE, Shard
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered


@dataclass(frozen=True, kw_only=True)
class LadderState(State):
    """Walkers on a ladder, its weights, and the draws kept so far, which are z (ensemble, draw, *shape).

    Where several processes share the walkers, the ladder's weights are everyone's, and each process keeps as many of
    its own visits as there are draws in the end: any of them may be one.

    Parameters
    ----------
    walker
        (ensemble, walker, *shape), those of this process.
    level, direction
        Rung of each walker, and where it goes: 1 up, -1 down; int64, (ensemble, walker).
    sigma, rate
        Noise level and Langevin step e_k of each rung, float64, (ensemble, rung).
    log_h
        Log-weights of the rungs, float64, (ensemble, rung).
    lot, when
        Of each draw its random number, the smallest of which are kept, and its time; inf for none yet; float64,
        (ensemble, draw).
    outward, trips
        Whether a walker was last at the top, and its round trips after the burn-in, (ensemble, walker).
    shard
        Part of the walkers that this process holds.
    """

    walker: Tensor
    level: Tensor
    direction: Tensor
    sigma: Tensor
    rate: Tensor
    log_h: Tensor
    lot: Tensor
    when: Tensor
    outward: Tensor
    trips: Tensor
    shard: Shard = ALONE

    @property
    def walkers(self) -> int:
        """Walkers of all processes in an ensemble."""
        return self.level.shape[1] * self.shard.world

    def visits(self) -> Tensor:
        """Count the draws of all processes, (ensemble,); a call that every process makes, as `in_time`."""
        return torch.isfinite(self.shard.gather(self.when)).sum(1).clamp_max(self.z.shape[1])

    def kept(self, x: Tensor, level: Tensor, lot: Tensor) -> Self:
        """Keep the visits with the smallest lots, each visit alike, and count round trips.

        Parameters
        ----------
        x, level
            Images of the walkers at sigma = 0, and the rungs that they were at, of which 0 makes a visit.
        lot
            A uniform for each walker.
        """
        w = level.shape[1]
        visit = level == 0
        walker = self.shard.rank * w + torch.arange(w, device=level.device)
        time = self.step * self.walkers + walker.expand_as(level)
        lots = torch.cat((self.lot, torch.where(visit, lot, inf)), 1)
        times = torch.cat((self.when, torch.where(visit, time.double(), inf)), 1)
        lots, index = lots.topk(self.z.shape[1], dim=1, largest=False)
        ensembles = torch.arange(len(index), device=index.device)[:, None]
        return replace(
            self,
            z=torch.cat((self.z, x), 1)[ensembles, index],
            lot=lots,
            when=times.gather(1, index),
            outward=(level == self.sigma.shape[1] - 1) | (self.outward & ~visit),
            trips=self.trips + (visit & self.outward),
        )

    def in_time(self) -> Tensor:
        """Return the draws in the order of time, the first ones again for want of more; needs one an ensemble.

        Of several processes each returns its even part of them.
        """
        e, n = self.when.shape
        shard, m = self.shard, self.shard.share(n)
        index = shard.gather(self.lot).topk(n, dim=1, largest=False).indices
        times = shard.gather(self.when).gather(1, index)
        turn = torch.arange(n, device=times.device) % torch.isfinite(times).sum(1)[:, None]
        draws = index.gather(1, times.argsort(1).gather(1, turn))
        # The first places of each process take the draws, and what is in the others is of no more use.
        places = torch.arange(shard.world * n, device=times.device).reshape(shard.world, n).repeat(e, 1, 1)
        places[:, :, :m] = draws.reshape(e, shard.world, m)
        return shard.exchange([self.z], shard.first(places.flatten(1)))[0][:, :m]


def along(rows: Tensor, z: Tensor) -> Tensor:
    """Values of the leading axes, shaped to broadcast against z."""
    return rows.to(z.dtype).reshape(*rows.shape, *[1] * (z.ndim - rows.ndim))


def tilt(posterior: Posterior, path: Path, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """f_tau and its gradient where every state has its own level: `Posterior.potential` for many levels at once.

    Parameters
    ----------
    posterior, path
        What is tempered, and how.
    z
        States (ensemble, walker, *shape).
    tau
        Level of each, >= 0, latent units, (ensemble, walker).

    Returns
    -------
        Values, float64, (ensemble, walker), and gradients of z's shape.

    Raises
    ------
    CapabilityError
        If the path is neither Noised for a linear-Gaussian problem nor Tempered.
    """
    if isinstance(path, Tempered):
        value, grad = posterior.log_likelihood_and_grad(z)
        beta = 1.0 / (1.0 + (tau / path.scale) ** 2)
        return beta.double() * value.double(), along(beta, z) * grad
    if not isinstance(path, Noised) or posterior.linear is None:
        raise CapabilityError(
            f"The path {type(path).__name__} has no form for many levels at once here; use Noised() for "
            "linear-Gaussian problems, Tempered(scale=...) for others."
        )
    values: list[Tensor] = []

    def gradient(linear: LinearGaussian, x: Tensor, level: Tensor) -> Tensor:
        value, grad = _noised(linear, x, path.kappa * level.flatten(1)[:, 0].double() ** 2)
        values.append(value)
        return grad

    grad = posterior.linear_rows(z, gradient, along(tau, z).expand_as(z))
    return torch.cat(values).reshape(tau.shape), grad


def _noised(linear: LinearGaussian, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Log N(y; A x, R + extra A A^T), with an extra of each row's own, and its gradient."""
    A, r = linear.operator, linear.residual(x)
    svd, size = A.svd, prod(A.out_shape)

    def rows(t: Tensor, ndim: int) -> Tensor:
        return t.reshape(-1, *[1] * ndim)

    if linear.has_svd and svd is not None:
        R = linear.noise_std.double() ** 2
        s2 = svd.singular_values.double().to(R.device).flatten() ** 2
        log_det = size * R.log() + torch.log1p(rows(extra / R, 1) * s2).sum(1)
        w = svd.outer(lambda t: 1.0 / (R.to(t) + rows(extra, t.ndim).to(t) * t), r)
    else:
        variance = linear.noise_std.double() ** 2 + rows(extra, r.ndim - 1) * linear.norm() ** 2
        log_det = torch.broadcast_to(variance, r.shape).log().flatten(1).sum(1)
        w = r / variance.to(r.dtype)
    value = -0.5 * ((r * w).flatten(1).double().sum(1) + log_det + size * log(2.0 * pi))
    return value, A.adjoint(w)


def flow(posterior: Posterior, z: Tensor, denoised: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    """Carry states along the probability flow by one midpoint step: one evaluation besides the one that is given.

    Parameters
    ----------
    posterior
        Whose prior's flow it is.
    z, denoised
        States (ensemble, walker, *shape), and D(z, sigma).
    sigma, after
        Level of each state now and then, latent units, (ensemble, walker).
    """
    middle = 0.5 * (sigma + after)
    halfway = z + along((middle - sigma) / sigma, z) * (z - denoised)
    slope = (halfway - posterior.denoise(halfway, middle.to(z.dtype))) / along(middle, z)
    return z + along(after - sigma, z) * slope


def to_data(z: Tensor, denoised: Tensor) -> Tensor:
    """Carry states at the bottom rung to sigma = 0, where the flow's slope vanishes: trapezium rule, (z + D) / 2."""
    return 0.5 * (z + denoised)


def levelled(
    log_h: Tensor, target: Tensor, level: Tensor, proposed: Tensor, accept: Tensor, gain: float
) -> tuple[Tensor, Tensor]:
    """Adapt the rungs' weights so that they are visited as often as wanted (Wang & Landau 2001; Tan 2017).

    Parameters
    ----------
    log_h
        Log-weights (ensemble, rung), float64.
    target
        Share of the visits that each rung is to have, (rung,), float64.
    level, proposed, accept
        Rung of each walker, the one it may go to, and with what probability, (ensemble, walker).
    gain
        By how much a rung's log-weight falls if it has as many visits as wanted.

    Returns
    -------
        The new log-weights, and the expected shares of the rungs after the move, (ensemble, rung).
    """
    share = torch.zeros_like(log_h).scatter_add(1, level, 1.0 - accept).scatter_add(1, proposed, accept)
    share = share / level.shape[1]
    log_h = log_h - gain * share / target
    return log_h - log_h.mean(1, keepdim=True), share
