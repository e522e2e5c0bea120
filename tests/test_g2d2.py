"""G2D2: one step against plain sums, how its steps and weights fall, and what a fit hands to the next."""

import math

import pytest
import torch
from test_aps import F64, C, L, V, chain, dense
from torch import Tensor

from invdiff.likelihoods import Gaussian
from invdiff.noise import Noise
from invdiff.operators import Dense
from invdiff.posterior import Posterior
from invdiff.priors import MarkovChainPrior
from invdiff.problem import Problem
from invdiff.samplers import G2D2

N = 12


def plain_fit(phi: Tensor, log_c: Tensor, noise: Noise, *, lr: float, kl: float, steps: int, tau: float) -> Tensor:
    """Gumbel-softmax and torch's RAdam, autograd through everything, for sequences with no impossible token."""
    E, A = chain().codebook, dense().likelihood.operator.matrix
    y, std = dense().likelihood.measurement[0], 0.8
    leaf = phi.clone().requires_grad_()
    optimiser = torch.optim.RAdam([leaf], lr=lr)
    for _ in range(steps):
        u = noise.uniform(noise.slots, (L, V)).to(F64).clamp(1e-12, 1.0 - 1e-7)
        w = ((leaf - torch.log(-torch.log(u))) / tau).softmax(-1)
        # The softmax's own Jacobian, w (delta - w) / tau, is the one that G2D2 writes out.
        r = y - (w @ E).reshape(N, L * C) @ A.mT
        q = leaf.softmax(-1)
        loss = 0.5 * r.square().sum() / std**2 + kl * (q * (leaf.log_softmax(-1) - log_c)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return leaf.detach().log_softmax(-1)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_steps_are_those_of_plain_sums(tau):
    p, noise = Posterior(dense(), chain(), dtype=F64), Noise([4], N, dtype=F64)
    sampler = G2D2(steps=3, inner_steps=8, lr=0.3, lr_decades=1.0, kl=0.6, kl_decades=0.5, forget=0.4, temperature=tau)
    state = sampler.init(p, 1, N, noise=noise)
    # s = 1/2, 0, -1/2: half of the decades above the middle, none, half below.
    for k, s in enumerate((0.5, 0.0, -0.5)):
        new, info = sampler.step(p, state, noise=noise.at(k + 1))
        masked = (state.z == V)[..., None]
        log_c = torch.where(masked, p.log_probs(state.z), state.log_c)
        torch.testing.assert_close(new.log_c, log_c)
        start = log_c if k == 0 else (0.4 * log_c + 0.6 * state.logits).log_softmax(-1)
        same = noise.at(k + 1)
        lr, kl = 0.3 * 10.0 ** (1.0 * s), 0.6 * 10.0 ** (0.5 * s)
        fitted = plain_fit(start[0], log_c[0], same, lr=lr, kl=kl, steps=8, tau=tau)
        torch.testing.assert_close(new.logits[0], fitted, rtol=1e-6, atol=1e-6)
        u = same.uniform(same.slots, (2, L))
        drawn = (fitted.exp().cumsum(-1) <= u[:, 0, :, None]).sum(-1).clamp_max(V - 1)
        number = math.ceil(L * (k + 1) / 3)
        keep = torch.zeros(N, L, dtype=torch.bool).scatter(1, u[:, 1].argsort(1)[:, :number], True)
        assert torch.equal(new.z[0], torch.where(keep, drawn, V))
        assert info.sigma == pytest.approx(1.0 - (k + 1) / 3)
        state = new


@pytest.mark.parametrize("forget", [0.0, 0.3, 1.0])
def test_an_impossible_token_leaves_the_others_numbers(forget):
    # The last of three tokens never comes. The sum says that all tokens are ones, which the first index is not.
    row = torch.tensor([0.5, 0.5, 0.0], dtype=F64)
    prior = MarkovChainPrior(row, row.expand(3, 3), 3, codebook=torch.arange(3.0, dtype=F64)[:, None])
    problem = Problem(Gaussian(Dense(torch.ones(1, 3, dtype=F64), (3, 1)), torch.tensor([3.0], dtype=F64), 0.1))
    sampler, noise = G2D2(steps=3, inner_steps=8, forget=forget), Noise([5], 50, dtype=F64)
    p = Posterior(problem, prior, dtype=F64)
    state = sampler.init(p, 1, 50, noise=noise)
    for k in range(3):
        state, _ = sampler.step(p, state, noise=noise.at(k + 1))
        assert not bool(state.logits.isnan().any())
        assert bool(state.logits[..., 2].isneginf().all())
    assert bool((state.z == 1).all())
