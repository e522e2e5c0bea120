"""The masked transformer, the prior made of it, and its files: the contract, the bound, and what bad input says."""

import math

import pytest
import torch

import invdiff
from invdiff.errors import CapabilityError, ChecksumError, InputError, ShapeError
from invdiff.networks import MaskedTransformer, Tokenizer
from invdiff.noise import Noise, stream_key
from invdiff.posterior import Posterior
from invdiff.priors.loading import load_prior
from invdiff.priors.masked_loading import MaskedCard, make_masked_prior, read_masked_card, save_masked_prior
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.priors.unmasking import expected_evaluations, unmask
from invdiff.samplers import MomentMatched, PlugIn
from invdiff.samplers.twists import default_twist
from invdiff.solve import choose_sampler

NETWORK = {"axes": [4, 4], "vocabulary_size": 6, "width": 16, "depth": 2, "heads": 2}
TOKENIZER = {
    "shape": [1, 8, 8], "vocabulary_size": 6, "code": 3, "encoder_channels": [8], "encoder_blocks": [0],
    "decoder_channels": [8], "decoder_blocks": [0], "groups": 2,
}  # fmt: skip
CARD = MaskedCard(
    name="tiny", version="1", description="d", licence="l", network=NETWORK, tokenizer=TOKENIZER, training={"steps": 1}
)


@torch.no_grad()
def random_network(**changes) -> MaskedTransformer:
    """A network whose layers all count: those that start at zero are drawn too."""
    with torch.random.fork_rng():
        network = MaskedTransformer(**(NETWORK | changes))
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return network.eval().requires_grad_(requires_grad=False)


def pictures() -> MaskedNetworkPrior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskedNetworkPrior(random_network(), Tokenizer(**TOKENIZER), name="tiny").eval_only()


def symbols() -> MaskedNetworkPrior:
    network = random_network(axes=[5], vocabulary_size=4)
    return MaskedNetworkPrior(network, alphabet="ACGT", name="dna").eval_only()


@pytest.mark.parametrize("prior", [pictures(), symbols()], ids=["pictures", "symbols"])
def test_conditionals_are_laws_and_one_hot_where_a_token_is_known(prior):
    (length,), V = prior.shape, prior.vocabulary_size
    tokens = torch.randint(V, (3, length), generator=torch.Generator().manual_seed(1))
    tokens[:, ::2] = prior.mask_token
    p = prior.log_probs(tokens).exp()
    assert p.shape == (3, length, V)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, length))
    torch.testing.assert_close(p[:, 1::2], torch.nn.functional.one_hot(tokens[:, 1::2], V).float())
    assert float(p[:, ::2].max()) < 1.0


def test_a_position_sees_all_others_and_its_own_place():
    network = random_network()
    blank = torch.full((1, 16), 6)
    other = blank.clone()
    other[0, 15] = 2
    assert float((network(blank) - network(other))[0, 0].abs().max()) > 1e-3
    rows = network(blank)[0]
    assert float(torch.pdist(rows).min()) > 1e-3  # sums of a row's and a column's vector tell places apart


def test_positions_of_a_grid_are_row_by_row():
    network = random_network(axes=[2, 3], depth=1)
    with torch.no_grad():
        for layer in network.layers:
            layer.out.weight.zero_()
            layer.down.weight.zero_()
        network.positions[1].zero_()  # rows alone
    logits = network(torch.full((1, 6), 6))[0]
    torch.testing.assert_close(logits[0], logits[2])
    torch.testing.assert_close(logits[3], logits[5])
    assert float((logits[0] - logits[3]).abs().max()) > 1e-3


def test_the_way_out_is_the_tokenizer_s():
    prior = pictures()
    tokens = prior.sample(3, seed=2)
    torch.testing.assert_close(prior.decode(tokens), prior.tokenizer.decode(tokens))
    assert prior.event[0].shape == (1, 8, 8)
    assert prior.encode(torch.zeros(2, 1, 8, 8)).shape == (2, 16)
    one_hot = symbols()
    tokens = one_hot.sample(2, seed=0)
    torch.testing.assert_close(one_hot.decode(tokens), torch.nn.functional.one_hot(tokens, 4).float())
    with pytest.raises(CapabilityError, match="no tokenizer"):
        one_hot.encode(torch.zeros(2, 1, 8, 8))


def test_the_codebook_moves_with_the_prior():
    prior = pictures().double()
    assert prior.codebook.dtype == prior.decode(prior.sample(1)).dtype == torch.float64


def test_draw_i_depends_on_the_seed_and_i_alone():
    prior = pictures()
    assert torch.equal(prior.sample(5, seed=3)[:2], prior.sample(2, seed=3))
    assert not torch.equal(prior.sample(5, seed=3), prior.sample(5, seed=4))


def test_few_steps_evaluate_only_what_changed():
    prior, n, steps = pictures(), 400, 12
    noise = Noise([stream_key(0, "few")], n, dtype=torch.float64)
    counts = unmask(prior, noise, steps).evaluations.double()
    expected = expected_evaluations(steps, prior.length)
    assert abs(float(counts.mean()) - expected) < 4 * float(counts.std()) / math.sqrt(n)
    assert float(counts.max()) <= steps


def test_the_bound_is_exact_for_independent_tokens_and_its_error_honest():
    # Without layers and with one bias the network's tokens are independent: every order costs the same.
    network = random_network(axes=[5], vocabulary_size=4)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.head.bias.copy_(torch.tensor([0.3, -0.2, 0.9, 0.0]))
    prior = MaskedNetworkPrior(network, alphabet="ACGT")
    tokens = torch.tensor([[0, 1, 2, 3, 2], [2, 2, 2, 2, 2]])
    exact = torch.log_softmax(network.head.bias.double(), 0)[tokens].sum(1).detach()
    alike, error = prior.log_prob_bound(tokens[1:], samples=4)
    torch.testing.assert_close(alike, exact[1:])
    assert float(error) < 1e-10
    found, error = prior.log_prob_bound(tokens[:1].expand(200, 5), samples=8, seed=1)
    assert abs(float(found.mean() - exact[0])) < 4 * float(found.std()) / math.sqrt(200)
    assert float(error.mean()) > 0.9 * float(found.std())  # strata make it too large rather than too small


def test_files_keep_the_prior_and_its_key(tmp_path):
    prior = pictures()
    path = save_masked_prior(tmp_path / "tiny", prior, CARD)
    again = load_prior(path)
    assert isinstance(again, MaskedNetworkPrior)
    assert again.key == read_masked_card(path).weights["sha256"]
    assert not any(p.requires_grad for p in again.parameters())
    tokens = torch.full((1, 16), again.mask_token)
    torch.testing.assert_close(again.log_probs(tokens), prior.log_probs(tokens), atol=2e-2, rtol=0.0)  # half precision
    blob = bytearray((path.parent / "weights.safetensors").read_bytes())
    blob[-1] ^= 1
    (path.parent / "weights.safetensors").write_bytes(bytes(blob))
    with pytest.raises(ChecksumError):
        load_prior(path)


def test_a_key_tells_weights_apart():
    one, two = symbols(), symbols()
    assert one.key == two.key
    three = symbols()
    with torch.no_grad():
        three.network.head.bias.add_(1.0)
    assert three.key != one.key


@pytest.mark.parametrize("name", ["fashion-28-vq", "photos-64-vq", "promoters-251"])
def test_the_shipped_priors_know_their_data(name):
    prior = invdiff.load_prior(name)
    (length,), V = prior.shape, prior.vocabulary_size
    tokens = prior.sample(2, seed=0, steps=8)
    assert tokens.shape == (2, length)
    assert bool(torch.isfinite(prior.decode(tokens)).all())
    half = torch.where(torch.arange(length) % 2 == 0, tokens, prior.mask_token)
    entropy = torch.special.entr(prior.log_probs(half)[:, 1::2].double().exp()).sum(-1).mean()
    assert float(entropy) < (0.99 if V == 4 else 0.9) * math.log(V)
    if prior.tokenizer is not None:
        x = prior.decode(tokens)
        again = prior.decode(prior.encode(x))
        assert float((x - again).square().mean()) < 0.01  # a tokenizer's own pictures come back


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), ShapeError, "sequences of 5 tokens"),
        (torch.full((2, 5), 7), InputError, r"\[0, 4\]"),
        (torch.zeros(2, 5, dtype=torch.int32), InputError, "integers"),
    ],
)
def test_bad_tokens_are_named(tokens, error, words):
    with pytest.raises(error, match=words):
        symbols().log_probs(tokens)


def test_a_mask_cannot_be_decoded_or_bounded():
    masked = torch.full((1, 5), 4)
    with pytest.raises(InputError, match=r"\[0, 3\]"):
        symbols().decode(masked)
    with pytest.raises(InputError, match=r"\[0, 3\]"):
        symbols().log_prob_bound(masked)
    with pytest.raises(InputError, match="two samples"):
        symbols().log_prob_bound(torch.zeros(1, 5, dtype=torch.int64), samples=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": []}, "positive"),
        ({"depth": 0}, "positive"),
        ({"heads": 3}, "do not divide"),
        ({"dropout": 1.0}, "share"),
    ],
)
def test_settings_of_a_network_are_checked(changes, words):
    with pytest.raises(InputError, match=words):
        MaskedTransformer(**(NETWORK | changes))


def test_parts_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ShapeError, match="tokenizer makes 16 of 6"):
        MaskedNetworkPrior(random_network(axes=[4], vocabulary_size=6), pictures().tokenizer)
    with pytest.raises(InputError, match="alphabet 'AC'"):
        MaskedNetworkPrior(random_network(axes=[4], vocabulary_size=3), alphabet="AC")
    path = save_masked_prior(tmp_path, pictures(), CARD)
    path.write_text(path.read_text().replace("width = 16", "width = 8"))
    with pytest.raises(InputError, match="do not fit"):
        load_prior(path)
    path.write_text(path.read_text().replace('licence = "l"\n', ""))
    with pytest.raises(InputError, match="licence"):
        load_prior(path)


def test_first_weights_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    make_masked_prior(CARD)
    assert torch.equal(before, torch.get_rng_state())


def test_solve_weighs_every_candidate_only_where_they_are_few():
    prior = pictures()
    problem = invdiff.Problem.simulate(
        invdiff.operators.Scale((1, 8, 8)), prior.decode(prior.sample(1, seed=1))[0], noise_std=0.1, seed=0
    )
    posterior = Posterior(problem, prior)
    assert type(choose_sampler(posterior, 8)[0]) is invdiff.samplers.TwistedSMC  # 16 tokens of 6 kinds
    assert isinstance(default_twist(posterior), MomentMatched)  # 64 measured values
    shipped = invdiff.load_prior("fashion-28-vq")
    x = shipped.decode(shipped.sample(1, seed=1, steps=4))[0]
    problem = invdiff.Problem.simulate(invdiff.operators.Scale((1, 28, 28)), x, noise_std=0.1, seed=0)
    posterior = Posterior(problem, shipped)
    sampler, reason = choose_sampler(posterior, 8)
    # Weights would leave 8 particles with one ancestor.
    assert sampler == invdiff.samplers.APS(steps=50, inner_steps=10, lr=0.9, estimator="soft", sticky=False)
    assert "49 tokens of 256 kinds" in reason
    sampler, reason = choose_sampler(posterior, 256)
    assert sampler == invdiff.samplers.AnchoredSMC(every=3)
    assert "49 tokens of 256 kinds" in reason
    assert isinstance(default_twist(posterior), PlugIn)  # a derivative for each of 784 values would be too dear
    solution = invdiff.solve(problem, shipped, draws=4, seed=0)
    assert solution.about["sampler"] == "APS"
    assert solution.score(x)["psnr_mean"] > 15.0


def test_a_continuous_sampler_on_tokens_is_refused():
    prior = symbols()
    problem = invdiff.Problem.simulate(
        invdiff.operators.Scale((5, 4)), prior.decode(prior.sample(1))[0], noise_std=0.3, seed=0
    )
    with pytest.raises(CapabilityError, match="denoiser"):
        invdiff.solve(problem, prior, invdiff.samplers.DAPS(steps=2), draws=2)
    solution = invdiff.solve(problem, prior, invdiff.samplers.MaskedGibbs(steps=3), draws=4)
    assert solution.tokens.shape[-2:] == (4, 5)
