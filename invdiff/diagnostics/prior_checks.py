"""Checks that a prior is what `DiffusionPrior` promises, and figures on how well it keeps its promises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import CapabilityError
from invdiff.noise import Noise, stream_key
from invdiff.priors.base import Curvature, DiffusionPrior, Sigma

_STANDARD_ERRORS = 5.0  # a correct prior fails a statistical check about once in 10^6


@dataclass(frozen=True, kw_only=True)
class LevelReport:
    """Figures at one noise level, on n clean points with noise added.

    Parameters
    ----------
    sigma
        Noise level, latent units.
    error
        Mean squared error of the denoiser, summed over the event, latent units squared.
    tweedie
        ``sigma^2 E[tr dD/dz]``, which equals the error for the exact denoiser of the points' law (Efron 2011).
    tweedie_z
        Their difference in standard errors.
    curvature_z
        Difference of the error and the trace of the prior's `curvature` in standard errors, or None without one.
    asymmetry
        |J - J^T| / |J + J^T| (Frobenius, by probes) for J = dD/dz; a gradient field has 0.
    smallest_eigenvalue, largest_eigenvalue
        Of J, worst over the points, by power iteration: the smallest from above, the largest from below. J is a
        covariance over sigma^2 and has none below 0.
    score_error
        Largest departure of ``sigma^2 grad log p_sigma`` from ``D - z`` over their scale, or None without `log_prob`.
    """

    sigma: float
    error: float
    tweedie: float
    tweedie_z: float
    curvature_z: float | None
    asymmetry: float
    smallest_eigenvalue: float
    largest_eigenvalue: float
    score_error: float | None


@dataclass(frozen=True, kw_only=True)
class PriorReport:
    """What `check_prior` measured.

    Parameters
    ----------
    analytic
        Whether the prior has a `log_prob`, so that everything was asserted; else the levels are for reading only.
    spread_at_sigma_max
        RMS of D about its mean at sigma_max over that of the clean points; near 0 where sigma_max is large enough.
    residual_at_sigma_min
        RMS of D - z at sigma_min over sigma_min; at most about 1.
    round_trip
        Largest error of encode(decode(z)) over the scale of z, or None without both.
    levels
        Figures by noise level.
    """

    analytic: bool
    spread_at_sigma_max: float
    residual_at_sigma_min: float
    round_trip: float | None
    levels: tuple[LevelReport, ...]


def check_prior(
    prior: Any,
    *,
    n: int = 128,
    seed: int = 0,
    levels: int = 4,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> PriorReport:
    """Check a prior against the contract of `DiffusionPrior`.

    Asserted for every prior: its members; shapes and dtypes; sigma as a float and as a tensor agree; rows do not depend
    on their neighbours; D nears z at sigma_min and loses it at sigma_max; encode inverts decode. For priors with a
    `log_prob` also: the score is the gradient of log_prob, the Jacobian is symmetric and positive semi-definite, and
    the error is what Tweedie's second-order formula and `curvature` say, within 5 standard errors.

    Parameters
    ----------
    prior
        The prior.
    n
        Clean points: draws of `sample` if the prior has it, else of 32 steps of its probability flow.
    seed
        Seed of all noise.
    levels
        Noise levels at which figures are taken, log-uniform between sigma_min and sigma_max, at least 1.
    dtype
        Dtype of the points; the prior's `dtype`, else that of its first parameter or buffer, else float64.
    tolerance
        Relative tolerance of deterministic checks; 1e-8 in float64, 1e-3 in other dtypes.

    Raises
    ------
    CapabilityError
        If a member is missing; the message names it.
    AssertionError
        If a check fails; the message says which, by how much, and what is needed.
    """
    _check_members(prior)
    kind = dtype or getattr(prior, "dtype", None) or _first_dtype(prior)
    tol = tolerance or (1e-8 if kind == torch.float64 else 1e-3)
    noise = Noise([stream_key(seed, "check prior")], n, device=_device(prior), dtype=kind)
    normal: Callable[[], Tensor] = lambda: noise.normal(noise.slots, prior.shape)  # noqa: E731
    z0 = _clean_points(prior, n, seed, normal()).to(kind)
    analytic = hasattr(prior, "log_prob")
    grid = (
        torch.logspace(0, 1, levels + 2, base=prior.sigma_max / prior.sigma_min, dtype=torch.float64)[1:-1]
        * prior.sigma_min
    )

    with torch.no_grad():
        for sigma in grid.tolist():
            _check_rows(prior, z0 + sigma * normal(), sigma, tol)
        spread, residual = _check_ends(prior, z0, normal)
        trip = _check_round_trip(prior, z0, tol)
    reports = tuple(_level(prior, z0, sigma, normal) for sigma in grid.tolist())
    if analytic:
        for r in reports:
            _assert_exact(r, tol)
    return PriorReport(
        analytic=analytic, spread_at_sigma_max=spread, residual_at_sigma_min=residual, round_trip=trip, levels=reports
    )


def _check_members(prior: Any) -> None:
    missing = [m for m in ("shape", "sigma_min", "sigma_max", "denoise") if not hasattr(prior, m)]
    if missing or not isinstance(prior, DiffusionPrior):
        raise CapabilityError(
            f"{type(prior).__name__} is not a DiffusionPrior: it lacks {', '.join(missing)}. Needed: shape (tuple), "
            "sigma_min and sigma_max (floats, latent units) and denoise(z, sigma) -> E[z_0 | z_sigma = z]."
        )
    shape = prior.shape
    assert isinstance(shape, tuple) and all(isinstance(s, int) and s > 0 for s in shape), (
        f"shape must be a tuple of positive integers: {shape!r}."
    )
    assert 0 < prior.sigma_min < prior.sigma_max < float("inf"), (
        f"Noise levels must satisfy 0 < sigma_min < sigma_max, got {prior.sigma_min} and {prior.sigma_max}."
    )


def _tensors(prior: Any) -> list[Tensor]:
    return (
        [t for t in (*prior.parameters(), *prior.buffers()) if t.is_floating_point()]
        if isinstance(prior, torch.nn.Module)
        else []
    )


def _first_dtype(prior: Any) -> torch.dtype:
    return next((t.dtype for t in _tensors(prior)), torch.float64)


def _device(prior: Any) -> torch.device:
    return next((t.device for t in _tensors(prior)), torch.device("cpu"))


@torch.no_grad()
def _clean_points(prior: Any, n: int, seed: int, start: Tensor) -> Tensor:
    if hasattr(prior, "sample"):
        z0: Tensor = prior.sample(n, seed=seed)
        assert tuple(z0.shape) == (n, *prior.shape), (
            f"sample({n}) must have shape {(n, *prior.shape)}, got {tuple(z0.shape)}."
        )
        return z0
    z: Tensor = prior.sigma_max * start
    steps = 32
    ratio = (prior.sigma_min / prior.sigma_max) ** (1.0 / steps)
    for step in range(steps):
        D: Tensor = prior.denoise(z, prior.sigma_max * ratio**step)
        z = D + ratio * (z - D)
    return z


def _scale(t: Tensor) -> float:
    return max(float(t.double().square().mean().sqrt()), torch.finfo(torch.float64).tiny)


def _check_rows(prior: Any, z: Tensor, sigma: float, tol: float) -> None:
    D = prior.denoise(z, sigma)
    assert D.shape == z.shape, f"denoise must keep the shape {tuple(z.shape)}, got {tuple(D.shape)}."
    assert D.dtype == z.dtype, f"denoise must keep the dtype {z.dtype}, got {D.dtype}."
    assert bool(torch.isfinite(D).all()), f"denoise gives values that are not finite at sigma = {sigma:.3g}."
    atol = tol * (_scale(z) + 1e-300)

    def same(other: Tensor, own: Tensor, what: str) -> None:
        gap = float((other - own).abs().max())
        assert gap <= atol, f"{what} at sigma = {sigma:.3g}: denoise differs by {gap:.2e}, allowed {atol:.2e}."

    same(
        prior.denoise(z, torch.full((len(z),), sigma, dtype=z.dtype, device=z.device)),
        D,
        "sigma as a float and as a tensor (n,) disagree",
    )
    same(prior.denoise(z[:1], sigma), D[:1], "a row alone and in a batch disagree")
    # Neighbours with other values and other noise levels: row 0 must not notice.
    other = torch.cat([z[:1], -2.0 * z[1:]])
    mixed = sigma * torch.linspace(0.5, 2.0, len(z), dtype=z.dtype, device=z.device)
    mixed[0] = sigma
    same(prior.denoise(other, mixed)[:1], D[:1], "a row depends on its neighbours in the batch or on their sigma")


def _check_ends(prior: Any, z0: Tensor, normal: Callable[[], Tensor]) -> tuple[float, float]:
    top = prior.denoise(z0 + prior.sigma_max * normal(), prior.sigma_max)
    spread = _scale(top - top.mean(0)) / _scale(z0 - z0.mean(0))
    assert spread < 0.5, (
        f"At sigma_max = {prior.sigma_max:.3g} the denoised points still have {spread:.2f} of the prior's spread; they "
        "should sit at its mean. Raise sigma_max, or check the denoiser there."
    )
    z = z0 + prior.sigma_min * normal()
    residual = _scale(prior.denoise(z, prior.sigma_min) - z) / prior.sigma_min
    assert residual < 1.5, (
        f"At sigma_min = {prior.sigma_min:.3g} the denoiser moves points by {residual:.2f} sigma_min; E|D - z|^2 is at "
        "most sigma^2 a value for a posterior mean. Raise sigma_min, or check the denoiser there."
    )
    return spread, residual


def _check_round_trip(prior: Any, z0: Tensor, tol: float) -> float | None:
    if not (hasattr(prior, "decode") and hasattr(prior, "encode")):
        return None
    x = prior.decode(z0)
    back = prior.encode(x)
    error = float((back - z0).abs().max()) / _scale(z0)
    again = float((prior.decode(back) - x).abs().max()) / _scale(x)
    assert max(error, again) <= tol * 10, (
        f"encode and decode do not invert each other: relative errors {error:.2e} and {again:.2e}."
    )
    return error


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def _jacobian(prior: Any, z: Tensor, sigma: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """D at z, and u -> J^T u by reverse mode, which every network supports."""
    z = z.detach().requires_grad_()
    D = prior.denoise(z, sigma)
    return D.detach(), lambda u: torch.autograd.grad(D, z, u, retain_graph=True)[0]


def _extreme(apply: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 12) -> Tensor:
    """Rayleigh quotient of each row after power iteration on a symmetric map."""
    u = start
    for _ in range(iterations):
        u = u / _dot(u, u).sqrt().clamp_min(1e-30).to(u).reshape(-1, *[1] * (u.ndim - 1))
        u = apply(u)
    return _dot(u, apply(u)) / _dot(u, u).clamp_min(1e-300)


def _level(prior: Any, z0: Tensor, sigma: float, normal: Callable[[], Tensor]) -> LevelReport:
    z = z0 + sigma * normal()
    D, transpose = _jacobian(prior, z, sigma)
    squared_error = _dot(D - z0, D - z0)
    u, v = normal(), normal()
    rademacher = torch.where(normal() > 0, 1.0, -1.0).to(z)  # the trace estimate of least variance
    tweedie = sigma**2 * _dot(transpose(rademacher), rademacher)
    forward, backward = _dot(transpose(u), v), _dot(transpose(v), u)
    probes = slice(0, min(16, len(z)))

    few, few_transpose = z[probes], _jacobian(prior, z[probes], sigma)[1]
    largest = _extreme(few_transpose, few.new_tensor(1.0) * u[probes])
    shift = (largest.abs() * 1.05).to(z).reshape(-1, *[1] * (z.ndim - 1))
    smallest = largest.abs() * 1.05 - _extreme(lambda w: shift * w - few_transpose(w), v[probes])

    curvature = getattr(prior, "curvature", None)
    trace_z = None
    if isinstance(curvature, Curvature):
        trace_z = _standard_errors(squared_error - _dot(curvature.covariance(rademacher, sigma), rademacher))
    return LevelReport(
        sigma=sigma,
        error=float(squared_error.mean()),
        tweedie=float(tweedie.mean()),
        tweedie_z=_standard_errors(squared_error - tweedie),
        curvature_z=trace_z,
        asymmetry=_scale(forward - backward) / _scale(forward + backward),
        smallest_eigenvalue=float(smallest.min()),
        largest_eigenvalue=float(largest.max()),
        score_error=_score_error(prior, z, D, sigma) if hasattr(prior, "log_prob") else None,
    )


def _standard_errors(difference: Tensor) -> float:
    return float(difference.mean() / (difference.std() / len(difference) ** 0.5).clamp_min(1e-300))


def _score_error(prior: Any, z: Tensor, D: Tensor, sigma: Sigma) -> float:
    z = z.detach().requires_grad_()
    score = torch.autograd.grad(prior.log_prob(z, sigma).sum(), z)[0]
    return float((sigma**2 * score - (D - z.detach())).abs().max()) / _scale(z.detach())


def _assert_exact(r: LevelReport, tol: float) -> None:
    at = f"at sigma = {r.sigma:.3g}"
    assert r.score_error is not None and r.score_error <= tol, (
        f"(D - z) / sigma^2 is not the gradient of log_prob(z, sigma) {at}: relative error {r.score_error:.2e}, "
        f"allowed {tol:.0e}."
    )
    assert r.asymmetry <= tol * 100, (
        f"The denoiser's Jacobian is not symmetric {at}: {r.asymmetry:.2e}; it is not the gradient of anything."
    )
    assert r.smallest_eigenvalue >= -tol * 100 * max(1.0, r.largest_eigenvalue), (
        f"The denoiser's Jacobian has the eigenvalue {r.smallest_eigenvalue:.2e} {at}; sigma^2 times it is a "
        "covariance and cannot be negative."
    )
    for z, what in ((r.tweedie_z, "sigma^2 tr(dD/dz)"), (r.curvature_z, "the trace of curvature.covariance")):
        assert z is None or abs(z) <= _STANDARD_ERRORS, (
            f"The denoiser's mean squared error on the prior's own draws, {r.error:.4g}, departs from {what} by "
            f"{z:.1f} standard errors {at}."
        )
