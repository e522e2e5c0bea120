"""Resampling, weights, evidence and genealogy of particles, against what they must be in expectation and by hand."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from invdiff.errors import InputError, SamplingError
from invdiff.noise import Noise
from invdiff.samplers import particles
from invdiff.samplers.particles import BirthDeath, Residual, Stratified, Systematic, Weighted

F64 = torch.float64
INF = float("inf")
STRATEGIES = (Systematic(), Stratified(), Residual(), BirthDeath())
WEIGHTS = torch.tensor([[0.05, 0.0, 0.31, 0.04, 0.35, 0.25], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1 / 6] * 6], dtype=F64)


def copies(strategy, log_weights: Tensor, step: int = 0) -> Tensor:
    e, n = log_weights.shape
    ancestors = strategy.ancestors(log_weights, Noise(list(range(7, 7 + e)), n).at(step))
    return torch.nn.functional.one_hot(ancestors, n).sum(1).double()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_copies_are_unbiased_and_none_of_a_dead_particle(strategy):
    n, runs = 6, 3000
    log_weights = WEIGHTS[:1].log().expand(runs, n)  # ensembles with their own noise
    found = copies(strategy, log_weights + 5.0)
    assert float(found[:, 1].max()) == 0.0
    assert bool((found.sum(1) == n).all())
    # The variance of a count is at most that of independent draws, n W (1 - W).
    bound = 4.5 * torch.sqrt(n * WEIGHTS[0] * (1 - WEIGHTS[0]) / runs)
    assert bool(((found.mean(0) - n * WEIGHTS[0]).abs() <= bound).all())
    if isinstance(strategy, Systematic | Residual):
        assert bool((found >= torch.floor(n * WEIGHTS[0] - 1e-9)).all())
    if isinstance(strategy, Systematic):
        assert bool((found <= torch.ceil(n * WEIGHTS[0] + 1e-9)).all())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_living_particle_takes_all_and_equal_ones_keep_one_each(strategy):
    found = copies(strategy, WEIGHTS.log())
    assert found[1].tolist() == [6, 0, 0, 0, 0, 0]
    assert found[2].tolist() == [1] * 6


def test_birth_and_death_leave_in_place_whom_they_can():
    log_weights = 0.1 * torch.randn(40, 200, generator=torch.Generator().manual_seed(1), dtype=F64)
    stay = torch.arange(200)
    moved = BirthDeath().ancestors(log_weights, Noise(list(range(40)), 200)) != stay
    # Deaths are independent, each with probability (1 - n W)^+.
    expected = (1.0 - 200 * torch.softmax(log_weights, -1)).clamp_min(0.0)
    spread = torch.sqrt((expected * (1 - expected)).sum())
    assert abs(float(moved.sum() - expected.sum())) < 4.5 * float(spread)
    assert not bool((moved & (expected == 0)).any())


def test_equal_weights_stay_whole_numbers_whatever_they_round_to():
    short = 0
    for n in range(2, 400):
        log_weights = torch.full((1, n), 1.3, dtype=F64)
        short += float((n * torch.softmax(log_weights, -1)).min()) < 1.0
        assert Residual().ancestors(log_weights, Noise([0], n)).tolist() == [list(range(n))]
    assert short > 0  # some did round below


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_ensemble_does_not_depend_on_its_company(strategy):
    log_weights = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=F64)
    together = strategy.ancestors(log_weights, Noise([1, 2, 3], 50).at(4))
    alone = strategy.ancestors(log_weights[1:2], Noise([2], 50).at(4))
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dead_ensembles_and_nan_are_errors(strategy):
    dead = torch.zeros(2, 4, dtype=F64)
    dead[1] = -INF
    with pytest.raises(SamplingError, match="All 4 particles of ensemble 1 are dead"):
        strategy.ancestors(dead, Noise([0, 1], 4))
    dead[1, 2] = float("nan")
    with pytest.raises(SamplingError, match="1 of 4 particles of ensemble 1 have a log-weight that is NaN"):
        strategy.ancestors(dead, Noise([0, 1], 4))


def test_effective_sample_sizes():
    log_weights = torch.tensor([[0.0, 0.0, -INF, -INF], [3.0, 3.0, 3.0, 3.0], [0.0, -INF, -INF, -INF]], dtype=F64)
    torch.testing.assert_close(
        particles.effective_sample_size(log_weights), torch.tensor([0.5, 1.0, 0.25], dtype=F64), rtol=1e-14, atol=0.0
    )
    g = torch.tensor([[1.0, 3.0, 7.0, 7.0]], dtype=F64)
    found = particles.conditional_ess(log_weights[:1] + 400.0, g.log() - 900.0)  # scales cancel, without underflow
    torch.testing.assert_close(found, torch.tensor([4.0 / 5.0], dtype=F64))  # (mean of 1, 3)^2 / mean of 1, 9
    nothing = torch.full((1, 4), -INF, dtype=F64)
    assert particles.conditional_ess(torch.zeros(1, 4, dtype=F64), nothing).tolist() == [0.0]


@dataclass(frozen=True, kw_only=True)
class WithMemory(Weighted):
    memory: Tensor | None = None
    other: Tensor | None = None


def test_bookkeeping_of_weights_evidence_and_genealogy():
    z = torch.arange(8.0, dtype=F64).reshape(2, 4, 1)
    state = WithMemory.begin(z, memory=10.0 * z, step=3)
    assert state.step == 3
    increment = torch.tensor([[0.0, -INF, -INF, -INF], [0.1, 0.0, 0.0, 0.0]], dtype=F64)
    weighted = state.reweighted(increment)
    assert weighted.ess == 0.25
    new = weighted.resampled(Systematic(), Noise([0, 1], 4).at(1))
    # The first ensemble has one particle left; the second keeps its particles and their weights.
    assert new.z[..., 0].tolist() == [[0.0] * 4, [4.0, 5.0, 6.0, 7.0]]
    assert torch.equal(new.memory, 10.0 * new.z)
    assert new.other is None
    assert new.step == 3
    assert new.first.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert particles.survivors(new.first).tolist() == [1, 4]
    assert new.log_weights.tolist() == [[0.0] * 4, increment[1].tolist()]
    expected = torch.tensor([0.25, (torch.tensor(0.1, dtype=F64).exp() + 3) / 4], dtype=F64).log()
    torch.testing.assert_close(new.log_evidence, torch.tensor([expected[0], 0.0], dtype=F64))
    # Resampling leaves the estimate of the evidence as it was.
    torch.testing.assert_close(new.evidence, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weighted.evidence, expected, rtol=1e-14, atol=1e-14)


def test_the_evidence_is_unbiased():
    """Particles uniform on {0, 1, 2}, weighted twice with resampling between: E[Z] is the mean product of weights."""
    runs, n = 4000, 6
    noise = Noise(list(range(runs)), n)
    z = torch.floor(3 * noise.at(0).uniform(noise.slots)).reshape(runs, n, 1)
    first, second = torch.tensor([1.0, 4.0, 0.5], dtype=F64), torch.tensor([2.0, 0.1, 9.0], dtype=F64)
    state = Weighted.begin(z).reweighted(first[z[..., 0].long()].log())
    state = state.resampled(Stratified(), noise.at(1), threshold=0.8)
    state = state.reweighted(second[state.z[..., 0].long()].log())
    Z = state.evidence.exp()
    assert abs(float(Z.mean() - (first * second).mean())) < 4.5 * float(Z.std()) / runs**0.5
    survived = particles.survivors(state.first)
    assert int(survived.min()) < n  # some were resampled
    assert int(survived.max()) == n  # and some not


def test_resampling_takes_its_noise_whether_or_not_it_is_needed():
    """Else what an ensemble draws next would depend on the ensembles beside it."""
    calls = set()
    for scale in (0.0, 50.0):
        noise = Noise([0, 1], 4).at(1)
        log_weights = scale * torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=F64)
        Weighted.begin(torch.zeros(2, 4, 1), log_weights).resampled(Systematic(), noise)
        calls.add(noise.call)
    assert len(calls) == 1


def test_dead_and_broken_states_are_errors():
    state = Weighted.begin(torch.zeros(1, 3, 1))
    with pytest.raises(SamplingError, match=r"All 3 particles of ensemble 0 are dead: .* at step 4"):
        state.reweighted(torch.full((1, 3), -INF), " at step 4")
    with pytest.raises(SamplingError, match="NaN or infinite"):
        state.reweighted(torch.tensor([[0.0, INF, 0.0]]))
    with pytest.raises(SamplingError, match="at the start"):
        Weighted.begin(torch.zeros(1, 3, 1), torch.full((1, 3), float("nan")))
    with pytest.raises(InputError, match=r"in \[0, 1\]; got 2"):
        state.resampled(Systematic(), Noise([0], 3), threshold=2.0)
