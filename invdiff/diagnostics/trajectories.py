r"""Trajectories of heat and of advection as Gaussian laws, sampled in the wavelet domain: posteriors known exactly.

On a periodic interval of length L the state u(x, t) follows

    u_t + c u_x = kappa u_xx + f,   u(., 0) ~ N(m, field with spectrum S),

with f a Gaussian field with spectrum Q in space and white in time, or none. Every Fourier mode, of wavenumber
k = 2 pi m / L, is an Ornstein-Uhlenbeck process of rate kappa k^2 + i c k (Gardiner 2009, section 4.4), so that the
trajectory is Gaussian, its mean is the solution from m, and for n points and s, t >= 0

    Cov[u(x, s), u(y, t)] = 1/n sum_k P_k(min(s, t)) exp(-kappa k^2 |t - s|) cos(k (y - x - c (t - s))),
    P_k(s) = exp(-2 kappa k^2 s) S_k + Q_k int_0^s exp(-2 kappa k^2 r) dr.

Nothing is discretised: the points sample the solution of a field in continuous space whose wavenumbers end at the
grid's. (Of an even number of points the last wavenumber has two phases in continuous space, of which one point in time
shows one.) Without f the evolution is deterministic, and the covariance of t times n values has rank n, or n + 1 where
that last mode moves: most directions of an event have no variance at all.
"""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor

from invdiff.diagnostics.exactness import ExactProblem
from invdiff.errors import InputError, ShapeError
from invdiff.event import Variable
from invdiff.operators import Inpainting, WaveletDecoder, WaveletTransform
from invdiff.priors.field import FieldPrior
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.wavelet import gaussian_wavelet_prior
from invdiff.problem import Problem

_LARGEST_DENSE = 4096
DIFFUSIVITY, SPEED = 0.02, 0.6
"""kappa and c of `trajectory_problems`, interval squared and interval a unit of time."""


def advection_diffusion_law(
    initial: FieldPrior,
    times: Sequence[float],
    *,
    diffusivity: float = 0.0,
    speed: float = 0.0,
    length: float = 1.0,
    forcing: FieldPrior | None = None,
) -> GaussianPrior:
    """Law of the trajectory of a linear advection-diffusion equation on a periodic interval; see the module's text.

    Parameters
    ----------
    initial
        Law of the state at time 0, one channel: shape (1, points).
    times
        Times to observe, not negative, rising; any unit of time.
    diffusivity, speed
        kappa, not negative, length squared a unit of time, and c, length a unit of time.
    length
        Length of the interval, positive; point j lies at j length / points.
    forcing
        Field white in time, of `initial`'s shape and mean zero: its integral over a unit of time has this law. None for
        a deterministic evolution.

    Returns
    -------
    GaussianPrior
        Of events (1, times, points): one variable "u" with its coordinates, in the initial state's units, float64.

    Raises
    ------
    ShapeError
        If the laws are not of (1, points), or there are more than 4096 values.
    InputError
        If times, diffusivity or length are out of range, a decoder is not the identity, or the forcing has a mean.
    """
    laws = [initial] if forcing is None else [initial, forcing]
    if any(law.shape != (1, law.size) or law.shape != initial.shape for law in laws):
        raise ShapeError(f"States and forcing have one shape (1, points), got {[law.shape for law in laws]}.")
    n, t = initial.size, torch.tensor(list(times), dtype=torch.float64)
    if not len(t) or not bool(torch.isfinite(t).all()) or bool((t < 0).any()) or bool((t.diff() <= 0).any()):
        raise InputError(f"Times must be finite, not negative and rising, at least one; got {list(times)}.")
    if not (0.0 <= diffusivity < float("inf") and 0.0 < length < float("inf") and abs(speed) < float("inf")):
        raise InputError(
            f"Diffusivity must not be negative, the length positive, and both and the speed finite; got {diffusivity}, "
            f"{length} and {speed}."
        )
    if len(t) * n > _LARGEST_DENSE:
        raise ShapeError(f"{len(t)} times {n} values are more than {_LARGEST_DENSE}; take fewer times or points.")
    probe = torch.ones(1, 1, n, dtype=torch.float64)
    if any(not torch.equal(law.decode(probe), probe) for law in laws):
        raise InputError("States and forcing are given in physical units: their decoders must be the identity.")
    if forcing is not None and bool(forcing.mean.any()):
        raise InputError("White noise has no mean; put a steady forcing into the measurement, or leave it out.")
    k = 2.0 * pi / length * torch.fft.fftfreq(n, 1.0 / n, dtype=torch.float64)
    decay, S = diffusivity * k**2, initial.spectrum[0].cpu()
    Q = torch.zeros_like(S) if forcing is None else forcing.spectrum[0].cpu()
    s = t[:, None]
    # The integral of exp(-2 decay r) to s; s itself where nothing decays.
    elapsed = torch.where(decay > 0, -torch.expm1(-2.0 * decay * s) / (2.0 * decay).clamp_min(1e-300), s)
    P = torch.exp(-2.0 * decay * s) * S + Q * elapsed  # (times, k)
    i = torch.arange(len(t))
    lag = t - s  # t' - t for row t, column t'
    power = P[torch.minimum(i[:, None], i)] * torch.exp(-decay * lag.abs()[..., None])
    shift = torch.arange(n, dtype=torch.float64) * (length / n)
    phase = k * (shift[:, None] - speed * lag[..., None, None])  # (times, times, points, k)
    by_lag = (power[:, :, None] * phase.cos()).mean(-1)
    j = torch.arange(n)
    C = by_lag[:, :, (j - j[:, None]) % n].permute(0, 2, 1, 3).reshape(len(t) * n, -1)
    moved = torch.fft.fft(initial.mean[0].cpu()) * torch.exp(-(decay + 1j * speed * k) * s)
    event = Variable(
        name="u",
        dims=("component", "t", "x"),
        shape=(1, len(t), n),
        coords={"t": tuple(t.tolist()), "x": tuple(shift.tolist())},
    )
    return GaussianPrior(torch.fft.ifft(moved).real[None], 0.5 * (C + C.mT), event.shape, event=(event,))


def exact_wavelet_problem(
    name: str, law: GaussianPrior, sensors: Sequence[int], noise_std: float, *, wavelet: str = "bior2.4", seed: int = 0
) -> ExactProblem:
    """Observe a trajectory at some points at all times; the prior is of its wavelet coefficients, the posterior of it.

    The coefficients are those of the whole trajectory, one level over time and space with "periodization", as in WDNO
    (Hu et al. 2025, ICLR), each band scaled to a mean square of 1 about the mean. There are as many as values, and the
    transform has an inverse, so that the whitened norm of `measure` is the same in both.

    Parameters
    ----------
    name
        Name in reports.
    law
        Law of trajectories (1, times, points); times and points even.
    sensors
        Numbers of the observed points, in [0, points).
    noise_std
        Noise of the sensors, the state's units, positive.
    wavelet
        PyWavelets' name of the basis.
    seed
        Seed of the truth and of the noise.

    Raises
    ------
    ShapeError
        If the law is not one of trajectories with even sides.
    InputError
        If a sensor is not a point, or there is none.
    """
    if len(law.shape) != 3 or law.shape[0] != 1 or any(side % 2 for side in law.shape[1:]):
        raise ShapeError(f"The law must be one of (1, times, points), both even, got {law.shape}.")
    points = law.shape[2]
    if not sensors or not all(0 <= place < points for place in sensors):
        raise InputError(f"Sensors are numbers of points, from 0 to {points - 1}, and one at least; got {sensors}.")
    mask = torch.zeros(law.shape[1:], dtype=torch.bool)
    mask[:, list(sensors)] = True
    A = Inpainting(mask, law.shape)
    W = WaveletTransform(law.shape, wavelet, 1, "periodization")
    truth = law.sample(1, seed=seed + 1)
    problem = Problem.simulate(A, truth, noise_std=noise_std, seed=seed, name=name, event=law.event)
    exact = law.posterior(A, problem.likelihood.measurement[0], noise_std)  # type: ignore[index]
    decoder = WaveletDecoder(W, scales=_band_stds(law, W), offsets=W(law.mean[None])[0])
    return ExactProblem(name=name, prior=gaussian_wavelet_prior(law, decoder, law.event), problem=problem, exact=exact)


def _band_stds(law: GaussianPrior, W: WaveletTransform) -> Tensor:
    """Root mean square over each band of the coefficients' standard deviations, of the coefficients' shape."""
    basis = torch.eye(law.size, dtype=torch.float64).reshape(-1, *law.shape)
    E = W(basis).flatten(1)  # row i: coefficients of the i-th value
    variance = ((law.covariance @ E) * E).sum(0).reshape(W.out_shape)
    rms = [float(variance[place].mean().sqrt()) for place in W.places.values()]
    return W.by_band(torch.tensor(rms, dtype=torch.float64))


def _settings(points: int) -> tuple[FieldPrior, FieldPrior]:
    """Return the laws of the problems' initial state and forcing."""
    shape, length = (1, points), points / 8.0
    return FieldPrior.matern(shape, length, std=1.0), FieldPrior.matern(shape, length, std=0.2)


def trajectory_problems(times: int = 8, points: int = 16) -> list[ExactProblem]:
    """Make problems of heat and advection, each deterministic and with weak forcing.

    Three sensors see the trajectory with noise 0.1. The initial state varies with standard deviation 1 and correlations
    over an eighth of the interval. A unit of time passes; heat takes the longest wave to 0.45 of itself, advection
    carries it over 0.6 of the interval. The forcing adds a variance of 0.04 a unit of time where nothing decays, as
    rough as the initial state. Without forcing the covariance has 16 or 17 directions of 128: both are here, because
    the law of a network's trajectories is thin in most directions and singular in none.

    Parameters
    ----------
    times, points
        Sides of the trajectory, even; points at least 8.

    Returns
    -------
        heat-wavelets, forced-heat-wavelets, advection-wavelets and forced-advection-wavelets.
    """
    initial, forcing = _settings(points)
    t = torch.linspace(0.0, 1.0, times, dtype=torch.float64).tolist()
    sensors = sorted({points // 16, points * 6 // 16, points * 12 // 16})
    found = []
    for equation, settings in (("heat", {"diffusivity": DIFFUSIVITY}), ("advection", {"speed": SPEED})):
        for prefix, force in (("", None), ("forced-", forcing)):
            law = advection_diffusion_law(initial, t, forcing=force, **settings)
            found.append(exact_wavelet_problem(f"{prefix}{equation}-wavelets", law, sensors, 0.1))
    return found


def weak_trajectory_problem() -> ExactProblem:
    """Make a problem that tells little: forced heat on 4 times and 8 points, seen by one sensor with noise 1.

    For samplers of which particles must grow exponentially with what the measurement tells: their weights collapse on
    the others.
    """
    initial, forcing = _settings(8)
    law = advection_diffusion_law(initial, (0.0, 0.3, 0.6, 0.9), diffusivity=DIFFUSIVITY, forcing=forcing)
    return exact_wavelet_problem("weak-heat-wavelets", law, (3,), 1.0)
