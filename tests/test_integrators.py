"""Steppers against the exact flow of a Gaussian: their order, their law, and what they cost."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from invdiff.errors import InputError
from invdiff.integrators import Ancestral, DPMSolver2M, Euler, Heun, karras_levels
from invdiff.integrators.base import Integrator
from invdiff.noise import Noise

F64 = torch.float64
S, M = 0.8, 0.3  # the prior is N(M, S^2)
HIGH, LOW = 10.0, 0.05


class Counting:
    """Exact denoiser of the prior, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, z: torch.Tensor, sigma: float) -> torch.Tensor:
        self.calls += 1
        return M + S**2 / (S**2 + sigma**2) * (z - M)


def walk(integrator: Integrator, z: torch.Tensor, levels, denoise=None) -> torch.Tensor:
    noise = Noise([0], 1, dtype=F64)
    memory, previous = None, None
    for k, (a, b) in enumerate(pairwise(levels)):
        stream = noise.at(k)
        z, memory = integrator.step(
            denoise or Counting(),
            z,
            a,
            b,
            memory=memory,
            sigma_previous=previous,
            normal=lambda t, stream=stream: stream.normal(stream.slots, t.shape)[0],
        )
        previous = a
    return z


def flow(z: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """Exact solution of dz/dsigma = (z - D) / sigma."""
    return M + (z - M) * math.sqrt((S**2 + b**2) / (S**2 + a**2))


@pytest.mark.parametrize(("integrator", "order"), [(Euler(), 1), (Heun(), 2), (DPMSolver2M(), 2)])
def test_order_of_convergence(integrator, order):
    z = torch.tensor([-7.0, 2.0, 12.0], dtype=F64)
    steps = np.array([64, 128, 256, 512])
    errors = []
    for n in steps:
        # The ladder without its last step to 0, which is first order for all.
        levels = karras_levels(int(n) + 1, LOW, HIGH)[:-1]
        errors.append(float((walk(integrator, z, levels) - flow(z, HIGH, LOW)).abs().max()))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.12, (slope, errors)
    assert errors[-1] < {1: 2e-2, 2: 2e-4}[order]


@pytest.mark.parametrize("integrator", [Euler(), Heun(), DPMSolver2M(), Ancestral(eta=0.0), Ancestral()])
def test_the_step_to_zero_returns_the_denoised_state(integrator):
    z = torch.tensor([1.0, -2.0], dtype=F64)
    end, _ = integrator.step(
        Counting(),
        z,
        0.5,
        0.0,
        memory=torch.zeros(2, dtype=F64),
        sigma_previous=0.7,
        normal=torch.ones_like,
    )
    torch.testing.assert_close(end, Counting()(z, 0.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("integrator", [Euler(), Heun(), DPMSolver2M(), Ancestral()])
def test_evaluations_a_step_are_those_declared(integrator):
    denoise, levels = Counting(), karras_levels(7, LOW, HIGH)
    walk(integrator, torch.zeros(1, dtype=F64), levels, denoise)
    assert denoise.calls == integrator.evaluations * 6 + 1


def test_ancestral_without_noise_is_euler():
    z, levels = torch.tensor([3.0, -1.0], dtype=F64), karras_levels(9, LOW, HIGH)
    torch.testing.assert_close(walk(Ancestral(eta=0.0), z, levels), walk(Euler(), z, levels), rtol=1e-13, atol=1e-13)


def test_ancestral_draws_from_the_gaussian_bridge():
    """Given z and z_0 = D, z' ~ N(D + (s'^2/s^2) (z - D), s'^2 (1 - s'^2/s^2)): DDPM's posterior in this notation."""
    a, b, m = 2.0, 1.3, 200_000
    z = torch.full((m,), 1.5, dtype=F64)
    d = Counting()(z[:1], a)[0]
    end = walk(Ancestral(), z, (a, b))
    variance = b**2 * (1 - b**2 / a**2)
    assert abs(float(end.mean() - (d + b**2 / a**2 * (1.5 - d)))) < 4.5 * math.sqrt(variance / m)
    assert abs(float(end.var()) / variance - 1.0) < 4.5 * math.sqrt(2.0 / m)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_ends_in_the_prior(eta):
    """First order: the variance's deficit is C / steps, which two walks are enough to take away."""
    m = 100_000
    start, variance = 50.0, {}
    noise = Noise([3], 1, dtype=F64)
    first = M + math.sqrt(start**2 + S**2) * noise.normal(noise.slots, (m,))[0]
    for steps in (200, 400):
        z = walk(Ancestral(eta=eta), first, karras_levels(steps, 1e-3, start))
        assert abs(float(z.mean()) - M) < 4.5 * S / math.sqrt(m) + 1e-3
        variance[steps] = float(z.var()) / S**2
    assert variance[200] < variance[400] < 1.0
    # Richardson's extrapolation has the sampling error of 2 v(400) - v(200), and second-order terms of (C / steps)^2.
    assert abs(2.0 * variance[400] - variance[200] - 1.0) < 4.5 * math.sqrt(5.0 * 2.0 / m) + 5e-3


def test_karras_levels():
    levels = karras_levels(5, 0.01, 100.0, rho=7.0)
    ramp = [(100.0 ** (1 / 7) + i / 4 * (0.01 ** (1 / 7) - 100.0 ** (1 / 7))) ** 7 for i in range(5)]
    np.testing.assert_allclose(levels, [*ramp, 0.0], rtol=1e-12)
    assert all(a > b for a, b in pairwise(levels))
    assert karras_levels(1, 0.1, 2.0) == (2.0, 0.0)
    linear = karras_levels(3, 1.0, 3.0, rho=1.0)
    np.testing.assert_allclose(linear, [3.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("arguments", [(0, 0.1, 1.0), (5, 0.0, 1.0), (5, 1.0, 1.0), (5, 2.0, 1.0), (5, math.nan, 1.0)])
def test_levels_that_do_not_fall_are_refused(arguments):
    with pytest.raises(InputError, match="sigma_min < sigma_max"):
        karras_levels(*arguments)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_ancestral_refuses_impossible_noise(eta):
    with pytest.raises(InputError, match="eta"):
        Ancestral(eta=eta)
