"""The benchmark on decoded tokens: its tasks, its contenders within their decoder calls, and the way to a table."""

import json

import pytest
import torch
from torch import Tensor

from invdiff import samplers
from invdiff.bench import decoded, tasks
from invdiff.bench.contenders import Contender, trial
from invdiff.bench.decoded_contenders import CONTENDERS, Decoded, Room, evenly, run
from invdiff.bench.tasks import group, pictures, task_operator
from invdiff.errors import CatalogueError, InputError
from invdiff.operators import NonlinearBlur
from invdiff.operators.base import Operator, fingerprint
from invdiff.priors import ProductMixturePrior
from invdiff.solve import sampler_classes

LENGTH, V = 4, 5
TASKS = list(decoded.DECODED_TASKS)


class Bumps(Operator):
    """Vectors (4, 2) to a picture (1, 28, 28): each place a bump of its own quarter, not linear in its vector."""

    def forward(self, e: Tensor) -> Tensor:
        t = torch.linspace(-1.0, 1.0, 14, dtype=e.dtype, device=e.device)
        tile = torch.sigmoid(e[..., :1, None] + 3.0 * e[..., 1:, None] * t[:, None] * t)  # (n, 4, 14, 14)
        rows = torch.cat((tile[:, :2], tile[:, 2:]), dim=2)
        return torch.cat((rows[:, :1], rows[:, 1:]), dim=3)


def prior() -> ProductMixturePrior:
    generator = torch.Generator().manual_seed(0)
    theta = torch.softmax(2.0 * torch.randn(3, LENGTH, V, generator=generator, dtype=torch.float64), 2)
    codebook = 2.0 * torch.randn(V, 2, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return ProductMixturePrior(weights, theta, codebook=codebook, detokeniser=Bumps((LENGTH, 2), (1, 28, 28)))


PRIOR = prior()


def truths(n: int) -> Tensor:
    return PRIOR.decode(PRIOR.sample(n, seed=7)).float()


def attempt(contender: Contender, settings: dict, batch, *, draws: int = 3, calls: int = 600):
    return run(
        contender, settings, batch, PRIOR, draws=draws, calls=calls, device="cpu", precision="float32", micro_batch=512
    )


# Tasks.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64)])
def test_tasks_are_those_of_photographs_and_three_more(task, shape):
    operator = task_operator(task, shape[1], 0, shape[0])
    assert operator.in_shape == shape
    factor = int(task[-1]) if "super" in task else 1
    if "inpaint" not in task:
        assert operator.out_shape == (shape[0], shape[1] // factor, shape[2] // factor)
    every = (*range(8), decoded.VALIDATION_SEEDS[shape[1]])
    seeds = {fingerprint(task_operator(task, shape[1], s, shape[0])) for s in every}
    assert len(seeds) == (9 if task in ("motion-deblur", "inpaint-random", "inpaint-box", "nonlinear-blur") else 1)
    assert len(tasks.tests(task, torch.zeros(9, *shape))) == (8 if len(seeds) > 1 else 1)


def test_what_is_no_task_is_refused():
    assert len(TASKS) == 8
    assert task_operator("nonlinear-blur", 28, 3, 1).blur.kernel.shape[-2:] == (7, 7)
    assert isinstance(task_operator("nonlinear-blur", 64, 3), NonlinearBlur)
    with pytest.raises(CatalogueError, match="did you mean 'nonlinear-blur'"):
        task_operator("nonlinear-blurr", 28, 0)


def test_fashion_pictures_of_the_two_splits_are_different_ones(tmp_path):
    from PIL import Image

    grid = torch.arange(40 * 50).reshape(40, 50) % 251  # a grey level for each of 2000 tiles
    tiles = grid.repeat_interleave(28, 0).repeat_interleave(28, 1).to(torch.uint8)
    Image.fromarray(tiles.numpy()).save(tmp_path / "fashion_mnist_test2000.png")
    test, validation = (pictures(tmp_path, 28, split, 3) for split in ("test", "validation"))
    assert test.shape == validation.shape == (3, 1, 28, 28)
    for found, first in ((test, 0), (validation, 1997)):
        levels = torch.tensor([(first + k) % 251 for k in range(3)]) / 255
        torch.testing.assert_close(found, levels[:, None, None, None].expand(3, 1, 28, 28))


# Contenders.


def test_every_sampler_of_tokens_takes_part():
    room = Room(calls=500, length=LENGTH, vocabulary_size=V)
    made = {type(c.make(room, **_settings(c, 0))) for c in CONTENDERS}
    learns = {samplers.AmortisedSMC}  # anew for every picture, which no budget of decoder calls has room for
    assert made == {c for c in sampler_classes().values() if "masked" in c().requires()} - learns
    assert len({c.name for c in CONTENDERS}) == len(CONTENDERS)


def _settings(contender: Contender, k: int) -> dict:
    return {key: value for key, value in trial(contender, k).items() if key != "particles"}


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_every_contender_draws_within_its_decoder_calls(contender):
    batch = group("high-dynamic-range", truths(2), [0, 1], 0)
    for k in range(3):
        found = attempt(contender, trial(contender, k), batch)
        assert found.draws.shape == (2, 3, 1, 28, 28)
        assert 0 < found.calls <= 600
        assert found.passes > 0
        if contender.name in ("MaskedGibbs", "SGDD"):
            assert found.calls > 600 - 3 * 22  # what is left is less than a level
    if found.exact:  # draws belong to their pictures: better off than with the other's
        own, other = ((found.draws - t[:, None]).square().mean() for t in (batch.truths, batch.truths.flip(0)))
        assert float(own) < float(other)


def test_particles_share_the_calls_and_the_draws_are_among_them():
    contender = next(c for c in CONTENDERS if c.name.startswith("TwistedSMC"))
    batch = group("nonlinear-blur", truths(1), [0], 0)
    found = attempt(contender, {"particles": 20}, batch)
    assert found.draws.shape == (1, 3, 1, 28, 28)
    assert found.calls == 20 * (LENGTH * V + 2)
    assert evenly(torch.arange(20), 4).tolist() == [0, 5, 10, 15]
    assert evenly(torch.arange(5), 3).tolist() == [0, 1, 3]
    with pytest.raises(InputError, match="3 draws need as many particles, got 2"):
        attempt(contender, {"particles": 2}, batch)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_too_few_calls_are_said_before_the_run(contender):
    batch = group("inpaint-box", truths(1), [0], 0)
    with pytest.raises(InputError, match=r"decoder calls a particle at least, and may spend [02];"):
        attempt(contender, {}, batch, calls=6)


# From trials to a table.


def test_tuning_testing_merging_and_the_table(tmp_path, monkeypatch):
    names = ("MaskedGibbs", "SVDD", "TwistedSMC, no lookahead")
    monkeypatch.setattr(decoded, "CONTENDERS", tuple(c for c in CONTENDERS if c.name in names))
    monkeypatch.setattr(decoded, "DECODED_TASKS", {"high-dynamic-range": "high dynamic range"})
    monkeypatch.setattr(decoded, "load_prior", lambda name: PRIOR)
    monkeypatch.setattr(decoded, "pictures", lambda data, side, split, count: truths(count))
    settings, parts = tmp_path / "settings.json", [tmp_path / "0.json", tmp_path / "1.json"]
    common = ["--data", str(tmp_path), "--draws", "3", "--calls", "65"]
    decoded.main(["tune", *common, "--pictures", "2", "--trials", "6", "--out", str(settings)])
    tuned = {r["contender"]: r for r in json.loads(settings.read_text())["rows"]}
    done = [t for t in tuned["SVDD"]["trials"] if "crps" in t]
    assert len({t["crps"] for t in done}) > 1
    assert tuned["SVDD"]["best"] == min(done, key=lambda t: t["crps"])["settings"]
    # 21 calls a particle, of the 22 that it needs, and fewer where there are more of them.
    assert tuned[names[2]]["best"] is None
    assert all("InputError" in t["failed"] for t in tuned[names[2]]["trials"])
    claim = tmp_path / "claim"
    claim.mkdir()
    (claim / f"high-dynamic-range {names[2]}").touch()
    test = ["test", *common, "--pictures", "5", "--together", "2", "--settings", str(settings), "--claim", str(claim)]
    decoded.main([*test, "--out", str(parts[0])])
    (claim / f"high-dynamic-range {names[2]}").unlink()
    decoded.main([*test, "--out", str(parts[1])])
    out, table = tmp_path / "test.json", tmp_path / "table.md"
    decoded.main(["merge", "--out", str(out), "--parts", *map(str, parts[::-1])])
    walkers, greedy, left_out = json.loads(out.read_text())["rows"]
    assert walkers["pictures"] == len(walkers["each_crps"]) == 5
    assert walkers["calls"] == [63.0, 0.0]
    assert (walkers["exact"], greedy["exact"]) == (True, False)
    assert "22 decoder calls" in left_out["failed"]
    decoded.main(["table", "--out", str(out), "--table", str(table)])
    text = table.read_text()
    assert f"5 pictures of 28 x 28, prior product-mixture ({LENGTH} tokens of {V})" in text
    assert "| MaskedGibbs | yes | 63 + 0 |" in text
    assert "| SVDD | no |" in text
    assert f"{walkers['seconds'][0]:.2f} ± {walkers['seconds'][1]:.2f}" in text
    best = max(r["psnr_mean"][0] for r in (walkers, greedy))
    assert f"**{best:.2f}" in text
    assert "Left out: TwistedSMC, no lookahead (invdiff). InputError" in text
    assert "up to 2 processes that shared a machine" in text
    assert "dagger" not in text
    # Rows of another precision say so; a row that comes twice, or from another benchmark, is refused.
    report = json.loads(parts[0].read_text())
    parts[0].write_text(json.dumps(report | {"precision": "bfloat16"}))
    decoded.main(["merge", "--out", str(out), "--processes", "7", "--parts", str(parts[1]), str(parts[0])])
    decoded.main(["table", "--out", str(out), "--table", str(table)])
    assert "up to 7 processes" in table.read_text()
    assert "Rows with a dagger: bfloat16." in table.read_text()
    assert "| SVDD † |" in table.read_text()
    with pytest.raises(InputError, match="again"):
        decoded.main(["merge", "--out", str(out), "--parts", str(parts[0]), str(parts[0])])
    parts[0].write_text(json.dumps(report | {"calls": 64}))
    with pytest.raises(InputError, match=r"differ in calls"):
        decoded.main(["merge", "--out", str(out), "--parts", str(parts[1]), str(parts[0])])


def test_a_picture_bears_its_share_of_its_runs_cost():
    runs = [
        Decoded(draws=torch.zeros(n, 1), calls=9.0, backward=0.0, passes=1.0, seconds=s, exact=True)
        for n, s in ((3, 1.0), (1, 5.0))
    ]
    row = decoded.cost(runs, 4)
    assert row["calls"] == [9.0, 0.0]
    assert row["seconds"] == pytest.approx([2.0, 1.0])  # values 1, 1, 1, 5: deviation 2, of four


def test_every_sampler_is_the_one_that_its_row_names():
    room = Room(calls=500, length=LENGTH, vocabulary_size=V)
    published = next(c for c in CONTENDERS if c.name == "SGDD, as published").make(
        Room(calls=350_002, length=1024, vocabulary_size=256)
    )
    assert (published.steps, published.mh_steps, published.schedule) == (70, 5000, "linear")
    assert next(c for c in CONTENDERS if c.name == "SVDD").make(room, candidates=4) == samplers.SVDD(
        steps=124, candidates=4
    )
