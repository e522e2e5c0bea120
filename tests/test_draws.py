"""Systematic resampling: the counts that define it, and its law over the uniform."""

import pytest
import torch

from invdiff.draws import systematic_resample
from invdiff.errors import InputError

F64 = torch.float64


def weights(e: int, n: int, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(e, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def counts(ancestors: torch.Tensor, n: int) -> torch.Tensor:
    return torch.stack([torch.bincount(row, minlength=n) for row in ancestors])


@pytest.mark.parametrize("draws", [None, 5, 64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_counts_are_within_one_of_their_expectation(spread, draws):
    logw = weights(50, 20, spread)
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=F64)
    a = systematic_resample(logw, uniform, draws)
    m = draws or 20
    assert a.shape == (50, m)
    expected = m * torch.softmax(logw, -1)
    assert float((counts(a, 20) - expected).abs().max()) < 1.0 + 1e-9
    assert bool((a.diff(dim=1) >= 0).all())


def test_every_particle_is_drawn_in_proportion_to_its_own_weight():
    # Over a fine grid of uniforms the mean count is the expectation to the grid's width: a permuted result would fail.
    logw = weights(1, 7, 1.5).expand(4096, -1)
    uniform = (torch.arange(4096, dtype=F64) + 0.5) / 4096
    mean = counts(systematic_resample(logw, uniform), 7).double().mean(0)
    expected = 7 * torch.softmax(logw[0], -1)
    assert float((mean - expected).abs().max()) < 2 / 4096 + 1e-12
    assert float(expected.max() - expected.min()) > 1.0


def test_equal_weights_keep_everyone():
    a = systematic_resample(torch.zeros(3, 8), torch.tensor([0.0, 0.5, 1.0 - 1e-12], dtype=F64))
    assert torch.equal(a, torch.arange(8).expand(3, -1))


def test_ensembles_do_not_mix():
    logw, uniform = weights(4, 9), torch.tensor([0.1, 0.9, 0.3, 0.6], dtype=F64)
    together = systematic_resample(logw, uniform)
    for i in range(4):
        assert torch.equal(systematic_resample(logw[i : i + 1], uniform[i : i + 1])[0], together[i])


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("winner", [0, 3, 5])
def test_a_particle_of_no_weight_is_never_taken(u, winner):
    logw = torch.full((1, 6), -torch.inf, dtype=F64)
    logw[0, winner] = -1e4
    assert torch.equal(systematic_resample(logw, torch.tensor([u], dtype=F64)), torch.full((1, 6), winner))


def test_huge_log_weights_do_not_overflow():
    logw = torch.tensor([[-1e6, -1e6 + 1.0], [1e6, 1e6 - 40.0]], dtype=torch.float32)
    a = systematic_resample(logw, torch.tensor([0.5, 0.5], dtype=F64), 1000)
    share = float((a[0] == 1).double().mean())
    assert abs(share - 1.0 / (1.0 + float(torch.exp(torch.tensor(-1.0))))) < 2e-3
    assert int(a[1].sum()) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_say_nothing_are_refused(bad):
    logw = torch.zeros(2, 3, dtype=F64)
    logw[1] = bad
    with pytest.raises(InputError, match="no particle explains"):
        systematic_resample(logw, torch.zeros(2, dtype=F64))
