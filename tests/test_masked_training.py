"""Training a masked prior on a Markov chain whose entropy is known: the loss, the splits, the best weights, the end."""

import json
import lzma
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.networks import MaskedTransformer
from invdiff.priors import MarkovChainPrior
from invdiff.priors.loading import load_prior
from invdiff.priors.masked_loading import read_masked_card
from invdiff.training.checkpoint import load_state
from invdiff.training.masked import MaskedTrainer, any_order_loss, bound, draw_masks, export, main, train
from invdiff.training.masked_settings import MaskedSettings
from invdiff.training.sequences import PROMOTERS_FILE, Promoters, encode, part_of, read_promoters
from invdiff.training.settings import read_settings_as

CPU, LENGTH, ALPHABET = torch.device("cpu"), 12, "ACGT"
TOML = """
name = "tiny"
version = "1.0"
description = "For tests."
licence = "CC0"
shape = [12]
alphabet = "ACGT"
batch = 32
learning_rate = 4e-3
warmup_steps = 5
steps = 20
seconds = 1e9
log_every = 10
validate_every = 5
[network]
width = 16
depth = 1
heads = 2
dropout = 0.1
[mixture]
promoters = 1
"""


def chain() -> MarkovChainPrior:
    """A chain that stays, or goes on to the next token: 1.16 bits a token in the long run."""
    P = 0.7 * torch.eye(4) + 0.2 * torch.eye(4).roll(1, 1) + 0.025
    return MarkovChainPrior(torch.full((4,), 0.25), P, LENGTH)


def text_of(tokens: Tensor) -> list[str]:
    return ["".join(ALPHABET[v] for v in row) for row in tokens.tolist()]


def write(folder: Path, rows: list[tuple[str, str]]) -> None:
    text = "".join(f"{kind}\t{sequence}\n" for kind, sequence in rows)
    (folder / PROMOTERS_FILE).write_bytes(lzma.compress(text.encode(), preset=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sequences")
    write(path, [("Mouse_tata", s) for s in text_of(chain().sample(4000, seed=1))])
    (path / "train.toml").write_text(TOML)
    return path


@pytest.fixture
def settings(folder: Path) -> MaskedSettings:
    return read_settings_as(MaskedSettings, folder / "train.toml")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(settings: MaskedSettings, data: Path, out: Path, **options: object) -> list[str]:
    lines: list[str] = []
    train(settings, data, out, CPU, log=lines.append, **options)
    return lines


# The loss


def test_masks_have_k_places_that_are_stratified_and_anywhere() -> None:
    masked, k = draw_masks(6000, 6, generator())
    assert torch.equal(masked.sum(1), k)
    assert torch.bincount(k)[1:].tolist() == [1000] * 6  # one from each n-th of 1, ..., L
    # Each place is masked in k / L of the draws: (L + 1) / 2 L on average.
    p = 7 / 12
    assert float((masked.double().mean(0) - p).abs().max()) < 4.5 * math.sqrt(p * (1 - p) / 6000)
    few, _ = draw_masks(3, 6, generator())
    assert few.sum(1).sort().values.diff().min() >= 1  # thirds of 1, ..., 6


def test_the_loss_bounds_the_cost_of_a_sequence_and_ignores_known_tokens() -> None:
    """For independent tokens the loss of any mask is the mean cost of its tokens, and its mean the sequence's."""
    with torch.random.fork_rng(devices=[]):
        network = MaskedTransformer([3], 4, width=8, depth=1, heads=2)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.head.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    cost = -torch.log_softmax(network.head.bias.detach(), 0)
    tokens = torch.tensor([[0, 2, 3]])
    masked = torch.tensor([[True, False, True]])
    found = any_order_loss(network, tokens, masked, masked.sum(1))
    torch.testing.assert_close(found.detach(), ((cost[0] + cost[3]) / 2)[None])
    many, k = draw_masks(3000, 3, generator())
    losses = any_order_loss(network, tokens.expand(3000, 3), many, k).detach().double()
    assert abs(float(losses.mean() - cost[tokens].mean())) < 4.5 * float(losses.std()) / math.sqrt(3000)


def test_no_masked_token_is_seen() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MaskedTransformer([4], 3, width=8, depth=1, heads=2)
    seen: list[Tensor] = []
    network.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens, masked = torch.tensor([[0, 1, 2, 1]]), torch.tensor([[False, True, True, False]])
    any_order_loss(network, tokens, masked, masked.sum(1))
    assert seen[0].tolist() == [[0, 3, 3, 1]]


# The data


def test_splits_share_no_sequence_and_have_their_tenths(folder: Path) -> None:
    parts = Promoters(folder, LENGTH, ALPHABET, CPU)
    sequences = [s for _, s in read_promoters(folder)]
    n = len(sequences)
    assert n == len(set(sequences)) == len(set(text_of(chain().sample(4000, seed=1))))
    drawn = set(text_of(torch.cat([parts.batch(2000, generator(i)) for i in range(30)])))
    held = {split: set(text_of(parts.held_out(split, n))) for split in ("validation", "test")}
    assert not drawn & held["validation"] and not drawn & held["test"] and not held["validation"] & held["test"]
    assert drawn | held["validation"] | held["test"] == set(sequences)
    for part in held.values():
        assert abs(len(part) / n - 0.1) < 4.5 * math.sqrt(0.09 / n)
    assert {part_of(s) for s in drawn} == {"train"}


def test_only_promoters_are_read_each_once_in_order(tmp_path: Path) -> None:
    rows = [("Mouse_tata", "ACG"), ("Mouse_nonprom", "TTT"), ("Arabidopsis_tata", "GGG"), ("Arabidopsis_tata", "ACG")]
    write(tmp_path, rows)
    assert read_promoters(tmp_path) == [rows[0], rows[2]]
    assert read_promoters(tmp_path, ("Mouse_nonprom",)) == [rows[1]]
    assert encode(["ACGT", "TTAA"], ALPHABET).tolist() == [[0, 1, 2, 3], [3, 3, 0, 0]]


def test_wrong_data_are_named(folder: Path, tmp_path: Path, settings: MaskedSettings) -> None:
    with pytest.raises(CatalogueError, match=r"promoters\.tsv\.xz is missing; give its folder"):
        read_promoters(tmp_path)
    with pytest.raises(InputError, match=r"\[12\] nucleotides.*shape = \[9\]"):
        Promoters(folder, 9, ALPHABET, CPU)
    write(tmp_path, [("Mouse_tata", "ACG"), ("Mouse_tata", "ACGT")])
    with pytest.raises(InputError, match=r"\[3, 4\] nucleotides"):
        Promoters(tmp_path, 3, ALPHABET, CPU)
    (tmp_path / PROMOTERS_FILE).write_bytes(b"no archive")
    with pytest.raises(InputError, match="damaged"):
        read_promoters(tmp_path)
    with pytest.raises(InputError, match="not in the alphabet 'ACGT'"):
        encode(["ACGN"], ALPHABET)
    with pytest.raises(InputError, match="different lengths"):
        encode(["ACG", "AC"], ALPHABET)
    with pytest.raises(InputError, match="Pictures need a tokenizer"):
        MaskedTrainer(replace(settings, mixture={"caltech64": 1.0}), folder, None, CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alphabet": ""}, "an alphabet"),
        ({"shape": (3, 8, 8)}, "an alphabet"),
        ({"batch": 0}, "batch = 0"),
        ({"weight_decay": -1.0}, "weight_decay = -1"),
    ],
)
def test_settings_are_checked(settings: MaskedSettings, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(settings, **changes)


def test_settings_of_the_network_are_checked(settings: MaskedSettings, folder: Path) -> None:
    with pytest.raises(InputError, match=r"\[network\] of tiny.*colour"):
        MaskedTrainer(replace(settings, network={"colour": 1}), folder, None, CPU)


# The training


def test_a_trained_network_costs_what_the_chain_does(settings: MaskedSettings, folder: Path, tmp_path: Path) -> None:
    """The bound on the chain's own fresh draws less their exact cost is the network's error, and never negative."""
    longer = replace(
        settings,
        network={"width": 32, "depth": 2, "heads": 2},
        learning_rate=1e-2,
        batch=64,
        steps=400,
        warmup_steps=20,
        log_every=1000,
        validate_every=1000,
    )
    truth = chain()
    fresh = truth.sample(400, seed=9)
    exact = -truth.log_prob(fresh) / (LENGTH * math.log(2))
    trainer = MaskedTrainer(longer, folder, None, CPU)
    before = -trainer.prior(trainer.average).log_prob_bound(fresh, samples=4)[0] / (LENGTH * math.log(2))
    assert float((before - exact).mean()) > 0.5
    run(longer, folder, tmp_path)
    prior = load_prior(tmp_path)
    gap = -prior.log_prob_bound(fresh, samples=24, seed=3)[0] / (LENGTH * math.log(2)) - exact
    error = float(gap.std()) / math.sqrt(len(gap))
    assert -4.5 * error < float(gap.mean()) < 0.08
    # Its conditionals are the chain's, not only its mean cost.
    tokens = torch.where(torch.arange(LENGTH) % 3 == 1, truth.mask_token, fresh[:200])
    ours, theirs = prior.log_probs(tokens).double().exp(), truth.log_probs(tokens).exp()
    assert float((ours - theirs).abs().sum(-1).mean(0)[1::3].max() / 2) < 0.1


def test_a_training_that_is_cut_goes_on_where_it_stood(settings: MaskedSettings, folder: Path, tmp_path: Path) -> None:
    run(settings, folder, tmp_path / "whole")
    lines = run(settings, folder, tmp_path / "cut", limit=0.0)
    assert not (tmp_path / "cut" / "prior.toml").exists()
    assert any("state saved at step 10" in line for line in lines)
    run(settings, folder, tmp_path / "cut", resume=True)
    states = [load_state(tmp_path / part / "state", settings.identity) for part in ("whole", "cut")]
    assert states[0][1].step == states[1][1].step == 20
    assert states[0][0].keys() == states[1][0].keys()
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
    cards = [read_masked_card(tmp_path / part / "prior.toml") for part in ("whole", "cut")]
    assert cards[0].weights == cards[1].weights
    with pytest.raises(InputError, match="made with"):
        train(replace(settings, seed=1), folder, tmp_path / "cut", CPU, resume=True)
    with pytest.raises(CatalogueError, match="start without --resume"):
        train(settings, folder, tmp_path / "none", CPU, resume=True)


def test_the_best_weights_are_kept_and_survive_a_cut(settings: MaskedSettings, folder: Path, tmp_path: Path) -> None:
    trainer = MaskedTrainer(settings, folder, None, CPU)
    held = trainer.sequences.held_out("validation", 100)
    for _ in range(10):
        trainer.step()
    good = trainer.validate(held)
    kept = {k: v.clone() for k, v in trainer.average.items()}
    assert trainer.record == (good, 10)
    for value in trainer.average.values():
        value.add_(0.5)
    assert trainer.validate(held) > good
    assert trainer.record == (good, 10)
    trainer.save(tmp_path / "state")
    again = MaskedTrainer(settings, folder, None, CPU)
    assert again.record == (math.inf, 0)
    again.load(tmp_path / "state")
    assert again.record == (good, 10)
    for k, v in kept.items():
        assert torch.equal(again.best[k], v) and not torch.equal(again.average[k], v)
    assert bound(again.prior(again.best), held, samples=16)["bits_per_token"] == good
    export(again, tmp_path)
    assert read_masked_card(tmp_path / "prior.toml").training["steps"] == 10
    for k, v in load_prior(tmp_path).network.state_dict().items():
        assert torch.equal(v, kept[k].half().float()), k


def test_the_command_writes_a_prior_and_figures_of_its_rounded_weights(folder: Path, tmp_path: Path, capsys) -> None:
    assert main([str(folder / "train.toml"), "--data", str(folder), "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "prior written" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    prior, card = load_prior(tmp_path), read_masked_card(tmp_path / "prior.toml")
    state, _ = load_state(tmp_path / "state", read_settings_as(MaskedSettings, folder / "train.toml").identity)
    for k, v in prior.network.state_dict().items():
        assert torch.equal(v, state[f"best.{k}"].half().float()), k
    held = Promoters(folder, LENGTH, ALPHABET, CPU).held_out("test", 1000)
    expected = bound(prior, held, samples=64)
    assert report["bound"]["test"] == pytest.approx(expected)
    assert report["bits_per_dimension"] == pytest.approx(expected["bits_per_token"])
    assert report["parameters"] == sum(p.numel() for p in prior.network.parameters())
    assert report["bytes"] == (tmp_path / "weights.safetensors").stat().st_size
    assert card.training["steps"] <= 20 and card.training["sequences"] == 32 * card.training["steps"]
    assert "dropout" not in card.network and prior.network.layers[0].dropout == 0.0
    assert prior.alphabet == ALPHABET


def test_a_loss_that_is_not_finite_stops_the_training(
    settings: MaskedSettings, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "invdiff.training.masked.any_order_loss",
        lambda network, tokens, masked, k: network(tokens).sum((1, 2)) * math.inf,
    )
    with pytest.raises(InputError, match="not finite at step 10"):
        run(settings, folder, tmp_path)


def test_a_markov_chain_of_counts_is_the_baseline():
    from invdiff.training.markov import baseline, markov_bits

    generator = torch.Generator().manual_seed(0)
    V, length = 3, 40
    P = torch.softmax(1.5 * torch.randn(V, V, generator=generator, dtype=torch.float64), 1)
    chain = MarkovChainPrior(torch.linalg.matrix_power(P, 200)[0], P, length)
    train, validation, test = (chain.sample(n, seed=s) for n, s in ((3000, 1), (300, 2), (300, 3)))
    found = baseline(train, validation, test, V)
    assert found["order"] in (1, 2)
    exact = -chain.log_prob(test) / (length * math.log(2.0))
    assert found["bits_per_token"] == pytest.approx(float(exact.mean()), abs=0.01)
    # By hand: counts plus one of single tokens, and of pairs from the second place on.
    few = torch.tensor([[0, 1, 1], [1, 1, 2]])
    first = markov_bits(few, torch.tensor([[0, 1, 2]]), 1, V)
    counts = torch.tensor([1, 4, 2]) + 1.0  # of 0, 1, 2 among six tokens
    by_hand = -math.log2(float(counts[0]) / 9)
    by_hand += -math.log2(2 / 4) - math.log2(2 / 6)  # pairs 01: 1 + 1 of 1 + 3; 12: 1 + 1 of 3 + 3
    assert float(first) == pytest.approx(by_hand / 3)
