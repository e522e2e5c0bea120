"""APS, G2D2 and the fit that they share: gradients, fixed points, what is kept, and their bias beside exact draws."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from invdiff.diagnostics.discrete import measure_tokens, named
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.likelihoods import Gaussian
from invdiff.noise import Noise
from invdiff.operators import Dense
from invdiff.operators.base import Operator
from invdiff.posterior import Posterior
from invdiff.priors import MarkovChainPrior
from invdiff.problem import Problem
from invdiff.samplers import APS, G2D2
from invdiff.samplers.variational import Fit, estimate, gumbel, kept, nearest

F64 = torch.float64
V, L, C = 3, 4, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Bent(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * x**2


def chain(detokeniser: Operator | None = None) -> MarkovChainPrior:
    P = torch.softmax(normal(V, V, seed=1), 1)
    return MarkovChainPrior(P[0], P, L, codebook=normal(V, C, seed=2), detokeniser=detokeniser)


def dense(noise_std: float = 0.8) -> Problem:
    return Problem(Gaussian(Dense(normal(2, C * L, seed=3), (L, C)), normal(2, seed=4), noise_std))


def tokens(n: int = 5) -> Tensor:
    z = torch.randint(V + 1, (1, n, L), generator=torch.Generator().manual_seed(5))
    z[:, 0] = V
    return z


# The gradient with respect to vectors.


@pytest.mark.parametrize("detokeniser", [None, Bent((L, C), (L, C))], ids=["linear", "not linear"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_gradient_of_the_likelihood_with_respect_to_vectors(detokeniser, micro_batch):
    prior, problem = chain(detokeniser), dense()
    p = Posterior([problem, Problem(problem.likelihood)], prior, dtype=F64, micro_batch=micro_batch)
    e = normal(2, 3, L, C, seed=6)
    value, grad = p.embedding_log_likelihood_and_grad(e)
    leaf = e.flatten(0, 1).requires_grad_()
    plain = problem.likelihood.log_prob(prior.decode_embedding(leaf))
    torch.testing.assert_close(value, plain.detach().reshape(2, 3))
    torch.testing.assert_close(grad, torch.autograd.grad(plain.sum(), leaf)[0].reshape(e.shape))
    assert (p.evaluations.likelihood, p.evaluations.likelihood_grad) == (6, 6)
    with pytest.raises(ShapeError, match=r"\(\.\.\., 4, 2\)"):
        p.embedding_log_likelihood_and_grad(e[..., :1])


# The fit.


def test_one_step_goes_down_the_gradient_of_the_objective():
    prior, problem = chain(), dense()
    p, z = Posterior(problem, prior, dtype=F64), tokens()
    log_c = p.log_probs(z)
    free = z == V
    start = (log_c + 0.3 * normal(*log_c.shape, seed=7)).log_softmax(-1)
    leaf = start.clone().requires_grad_()
    q = leaf.softmax(-1)
    e = torch.where(free[..., None], q @ prior.codebook, prior.codebook[z.clamp_max(V - 1)])
    fitted = problem.likelihood.log_prob(prior.decode_embedding(e[0]))
    possible = ~torch.isneginf(log_c)
    divergence = torch.where(possible & free[..., None], q * (leaf.log_softmax(-1) - log_c), 0.0).sum()
    loss = -fitted.sum() + 0.7 * divergence
    grad = torch.autograd.grad(loss, leaf)[0]
    # Adam's first step is lr times the sign of the gradient, but for epsilon.
    moved = Fit(steps=1, lr=1e-6, kl=0.7).run(p, start, log_c, z, free, estimate(prior.codebook, "soft"))
    step = (moved - start) / 1e-6
    expected = -grad / (grad.abs() + 1e-8)
    expected = expected - (q.detach() * expected).sum(-1, keepdim=True)  # log-probabilities are normalised
    inside = free[..., None] & possible & (grad.abs() > 1e-5)
    torch.testing.assert_close(step[inside], expected[inside], atol=1e-3, rtol=0.0)
    torch.testing.assert_close(moved[~free], start[~free])


def test_the_fixed_point_is_the_linearised_mean_field():
    prior, problem = chain(), dense(1.5)
    p = Posterior(problem, prior, dtype=F64)
    z = torch.full((1, 1, L), V)
    log_c = p.log_probs(z)
    log_q = log_c
    for lr, steps in ((0.1, 300), (0.01, 600), (0.001, 1500)):
        fit = Fit(steps=steps, lr=lr, kl=1.0)
        log_q = fit.run(p, log_q, log_c, z, z == V, estimate(prior.codebook, "soft"))
    mean = log_q.exp() @ prior.codebook
    A = problem.likelihood.operator.matrix
    r = problem.likelihood.measurement[0] - A @ mean.flatten()
    g = (A.mT @ r / 1.5**2).reshape(L, C)
    torch.testing.assert_close(log_q[0, 0], (log_c[0, 0] + g @ prior.codebook.mT).log_softmax(-1), atol=2e-3, rtol=0)


def test_points_between_the_mean_and_the_nearest_code():
    E = normal(V, C, seed=8)
    logits = 2.0 * normal(1, 4, L, V, seed=9)
    q = logits.softmax(-1)
    soft, hard, between = (estimate(E, kind)(logits)[1] for kind in ("soft", "hard", "entropy"))
    torch.testing.assert_close(soft, q @ E)
    by_hand = E[torch.cdist(soft.reshape(-1, C), E).argmin(1)].reshape(soft.shape)
    torch.testing.assert_close(hard, by_hand)
    torch.testing.assert_close(nearest(E, E), E)
    w = torch.special.entr(q).sum(-1, keepdim=True) / torch.tensor(float(V), dtype=F64).log()
    torch.testing.assert_close(between, soft + w * (hard - soft))


def test_gumbel_weights_draw_tokens_at_low_temperatures():
    E, n = torch.eye(V, dtype=F64), 4000
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log().expand(1, n, 1, V)
    w, _ = gumbel(E, 0.01, Noise([1], n, dtype=F64))(logits)
    share = w.round().mean((0, 1, 2))
    assert float((share - logits[0, 0, 0].exp()).abs().max()) < 4 * 0.5 / n**0.5


def test_a_token_of_probability_zero_stays_so():
    prior = MarkovChainPrior(torch.tensor([1.0, 0.0]), torch.eye(2), 3, codebook=torch.tensor([[0.0], [1.0]]))
    problem = Problem(Gaussian(Dense(torch.ones(1, 3, dtype=F64), (3, 1)), torch.tensor([3.0], dtype=F64), 0.1))
    for sampler in (APS(steps=2, inner_steps=5), G2D2(steps=2, inner_steps=5)):
        solution = Posterior(problem, prior, dtype=F64).sample(sampler, 20)
        assert int(solution.tokens.sum()) == 0  # the measurement asks for ones, of which the prior has none


def test_an_early_step_of_a_rectified_fit_is_plain():
    first, second = torch.full((1,), 0.2, dtype=F64), torch.full((1,), 0.05, dtype=F64)
    fit = Fit(steps=1, lr=0.5, kl=0.0, rectified=True)
    torch.testing.assert_close(fit._move(first, second, 1), 0.5 * first / 0.1)
    late = fit._move(first, second, 100_000)  # Adam's own by then
    torch.testing.assert_close(late, Fit(steps=1, lr=0.5, kl=0.0)._move(first, second, 100_000), rtol=1e-3, atol=0)
    parameter = torch.zeros(1, dtype=F64, requires_grad=True)
    theirs = torch.optim.RAdam([parameter], lr=0.5)
    m = v = torch.zeros(1, dtype=F64)
    ours = torch.zeros(1, dtype=F64)
    for t in range(1, 12):
        g = torch.tensor([1.0 / t], dtype=F64)
        parameter.grad = g.clone()
        theirs.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        ours = ours - fit._move(m, v, t)
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "length"), [(1, 5), (7, 49), (15, 256), (20, 8)])
def test_ever_more_tokens_are_kept_and_all_in_the_end(schedule, steps, length):
    numbers = [kept(schedule, k, steps, length) for k in range(steps)]
    assert numbers == sorted(numbers)
    assert numbers[-1] == length
    assert numbers[0] >= 1
    if schedule == "linear" and length % steps == 0:
        assert numbers == [length * (k + 1) // steps for k in range(steps)]


# The samplers.


def anchors(sampler: APS, n: int = 40) -> list[Tensor]:
    p, noise = Posterior(dense(), chain(), dtype=F64), Noise([2], n, dtype=F64)
    state = sampler.init(p, 1, n, noise=noise)
    seen = []
    for k in range(sampler.steps):
        state, _ = sampler.step(p, state, noise=noise.at(k + 1))
        seen.append(state.z[0])
    return seen


def test_anchors_stay_where_they_are_sticky_and_compete_where_not():
    seen = anchors(APS(steps=4, inner_steps=3, schedule="linear"))
    assert [int((z != V).sum(1).max()) for z in seen] == [1, 2, 3, 4]
    assert [int((z != V).sum(1).min()) for z in seen] == [1, 2, 3, 4]
    for before, after in pairwise(seen):
        assert bool(((before == V) | (before == after)).all())
    seen = anchors(APS(steps=4, inner_steps=3, schedule="linear", sticky=False))
    assert not all(bool(((a == V) | (a == b)).all()) for a, b in pairwise(seen))


def test_the_most_confident_tokens_are_kept():
    p, n = Posterior(dense(), chain(), dtype=F64), 30
    sampler, noise = APS(steps=4, inner_steps=2, schedule="linear"), Noise([2], 30, dtype=F64)
    state, _ = sampler.step(p, sampler.init(p, 1, n, noise=noise), noise=noise.at(1))
    same = noise.at(1)
    u = same.uniform(same.slots, (2, L))
    cumulated = state.logits[0].exp().cumsum(-1)
    drawn = (cumulated <= u[:, 0, :, None]).sum(-1).clamp_max(V - 1)
    confidence = state.logits[0].gather(2, drawn[..., None])[..., 0]
    best = confidence.argmax(1)
    assert torch.equal((state.z[0] != V).int().argmax(1), best)
    assert torch.equal(state.z[0].gather(1, best[:, None]), drawn.gather(1, best[:, None]))


def test_weight_of_the_divergence_and_its_absence():
    case = named("chain-8")
    p = Posterior(case.problem, case.prior, dtype=F64)
    tv = {k: float(measure_tokens(p.sample(APS(kl=k), 400, seed=1), case).marginal_tv[0]) for k in (0.0, 1.0)}
    # 400 exact draws have 0.03; without the divergence q forgets the prior.
    assert 0.05 < tv[1.0] < 0.25
    assert tv[0.0] > tv[1.0] + 0.05


@pytest.mark.parametrize("sampler", [APS(steps=6), G2D2(steps=6)])
def test_parity_checks_pull_draws_towards_what_was_measured(sampler):
    case = named("parity-8")
    solution = Posterior(case.problem, case.prior, dtype=F64).sample(sampler, 300, seed=1)
    prior = case.problem.likelihood.log_prob(case.prior.decode(case.prior.sample(300, seed=2))).mean()
    drawn = case.problem.likelihood.log_prob(case.prior.decode(solution.tokens.reshape(-1, 12))).mean()
    assert float(drawn) > float(prior) + 1.0


@pytest.mark.parametrize("sampler", [APS(steps=3, inner_steps=4), G2D2(steps=3, inner_steps=4)])
def test_cost_is_what_is_counted(sampler):
    p = Posterior(dense(), chain(), dtype=F64)
    solution = p.sample(sampler, 6)
    assert solution.about["evaluations_per_draw"] == sampler.cost().forward == 3
    assert p.evaluations.likelihood_grad == 6 * 3 * 4
    assert p.evaluations.likelihood == 6 * (3 * 4 + 1)
    assert not sampler.exact


def test_settings_out_of_range_and_problems_that_cannot_be_done():
    for cls, wrong in (
        (APS, {"inner_steps": 0}), (APS, {"lr": 0.0}), (APS, {"kl": -1.0}),
        (APS, {"temperature": -1.0}), (APS, {"steps": 0}), (G2D2, {"forget": 1.1}),
        (G2D2, {"temperature": 0.0}), (G2D2, {"lr_decades": -1.0}), (G2D2, {"steps": 0}),
    ):  # fmt: skip
        with pytest.raises(InputError):
            cls(**wrong)
    blind = chain(Bent((L, C), (L, C)))
    blind.detokeniser.differentiable = False

    class Step(Bent):
        differentiable = False

    problem = Problem(Gaussian(Step((L, C), (L, C)), normal(L, C), 0.5))
    for sampler in (APS(), G2D2()):
        with pytest.raises(CapabilityError, match="embedding_gradient"):
            Posterior(problem, chain(), dtype=F64).sample(sampler, 2)


def test_a_fit_of_g2d2_starts_between_the_prior_and_the_fit_before_and_masks_at_random():
    p, n = Posterior(dense(), chain(), dtype=F64), 200
    sampler, noise = G2D2(steps=4, inner_steps=1, lr=1e-9, lr_decades=0.0, forget=0.4), Noise([2], n, dtype=F64)
    first, _ = sampler.step(p, sampler.init(p, 1, n, noise=noise), noise=noise.at(1))
    torch.testing.assert_close(first.logits, p.log_probs(torch.full((1, n, L), V)), atol=1e-6, rtol=0.0)
    known = first.z[0] != V
    assert bool((known.sum(1) == 1).all())
    assert float((known.double().mean(0) - 1 / L).abs().max()) < 4 * (3 / 16 / n) ** 0.5  # any place as likely
    second, _ = sampler.step(p, first, noise=noise.at(2))
    c = p.log_probs(first.z)
    start = (0.4 * c + 0.6 * first.logits).log_softmax(-1)
    masked = first.z == V
    torch.testing.assert_close(second.logits[masked], start[masked], atol=1e-6, rtol=0.0)
    # A known token is held to the conditionals that it was drawn from, and may be drawn anew.
    torch.testing.assert_close(second.logits[~masked], first.logits[~masked], atol=1e-6, rtol=0.0)
