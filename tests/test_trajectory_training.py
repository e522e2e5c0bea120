"""Training of trajectory priors: data and their laws, what the network is shown, and the prior that comes out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from invdiff.errors import CatalogueError, ChecksumError, InputError
from invdiff.pde import BurgersSetting, burgers_cases
from invdiff.priors import load_prior
from invdiff.training.fit import Trainer, fit
from invdiff.training.settings import read_settings_as
from invdiff.training.trajectories import TrajectorySettings, TrajectoryTask, main
from invdiff.training.trajectories_data import forced, trajectories

CPU = torch.device("cpu")
TEXT = """
name = "tiny"
version = "1.0"
description = "Tiny trajectories."
licence = "Apache-2.0"
shape = [4, 8]
batch = 8
steps = 60
seconds = 600.0
learning_rate = 4e-3
warmup_steps = 5
held_out = 2
log_every = 20
validate_every = 20
[setting]
named = "wdno"
points = 16
windows = 6
duration = 1.0
[network]
channels = [16, 32]
blocks = 1
attention = [false, true]
embedding = 16
groups = 8
[laws]
published = 6
weak = 3
local = 3
[given]
"initial+target" = 0.5
"initial+forcing" = 0.3
"nothing" = 0.1
"state" = 0.1
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrajectorySettings:
    path = tmp_path_factory.mktemp("settings") / "train.toml"
    path.write_text(TEXT)
    return read_settings_as(TrajectorySettings, path)


@pytest.fixture(scope="module")
def task(settings: TrajectorySettings) -> TrajectoryTask:
    return TrajectoryTask(settings, CPU)


def test_the_laws_of_forcing_differ_as_they_say(unchecked):
    setting = BurgersSetting.named("diffphycon", "control")
    published, weak, local = (forced(setting, range(20), law, seed=3) for law in ("published", "weak", "local"))
    for other in (weak, local):
        torch.testing.assert_close(other[0], published[0], msg="initial states are shared")
        assert not other[1][:, :, ~setting.controlled].any()
    ratio = weak[1][:, :, setting.controlled] / published[1][:, :, setting.controlled]
    factor = ratio.flatten(1).nanmedian(1).values
    assert bool(((factor > 0) & (factor < 1)).all()) and float(factor.std()) > 0.1
    torch.testing.assert_close(weak[1], factor[:, None, None] * published[1])
    assert float(local[1].square().sum()) < 0.5 * float(published[1].square().sum())
    torch.testing.assert_close(forced(setting, range(5, 7), "local", seed=3)[1], local[1][5:7])
    with pytest.raises(CatalogueError, match="no law of the forcing"):
        forced(setting, range(1), "wild")  # type: ignore[arg-type]


def test_a_set_is_made_once_and_kept(tmp_path: Path):
    setting = BurgersSetting(points=16, windows=4, duration=0.5)
    states, forcing = trajectories(setting, {"published": 3, "local": 2}, processes=1, kept=tmp_path)
    initial, own = burgers_cases(setting, range(3))
    torch.testing.assert_close(forcing[:3], own.float())
    torch.testing.assert_close(states[:3], setting.solver(2)(initial.float(), own.float()))
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = trajectories(setting, {"published": 3, "local": 2}, processes=1, kept=tmp_path)
    assert torch.equal(again[0], states) and torch.equal(again[1], forcing) and file.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="one trajectory at least"):
        trajectories(setting, {})


def test_what_the_network_is_shown_and_asked(task: TrajectoryTask):
    generator = torch.Generator().manual_seed(0)
    sigma, whole, target, weights = task.draw(64, generator)
    c, told = 8, {"state": (8, 4), "forcing": (13, 4), "initial": (18, 2), "target": (21, 2)}
    assert whole.shape == (64, 8 + 4 + 4 + 2 + 2 + 4 + 2, 4, 8) and target.shape == weights.shape == (64, c, 4, 8)
    for name, (first, count) in told.items():
        flag = whole[:, first + count].flatten(1)
        assert bool(((flag == 0) | (flag == 1)).all()) and torch.equal(flag.amin(1), flag.amax(1)), name
        shown = whole[:, first : first + count].flatten(1).abs().amax(1) > 0
        assert torch.equal(shown, flag[:, 0] == 1), f"{name} is shown where its flag says so, and nowhere else"
        if name in ("state", "forcing"):
            part = weights[:, :4] if name == "state" else weights[:, 4:]
            assert torch.equal(part.flatten(1).amax(1) == 0, shown), "what is known is not asked for"
    assert not weights[:, ~task.filled].any(), "padding is not asked for"
    torch.testing.assert_close(whole[:, -2, :, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75]).expand(64, -1))
    torch.testing.assert_close(whole[:, -1, 0], ((torch.arange(8) + 0.5) / 4 - 1).expand(64, -1))
    # A network that returns the target has no loss; one that returns zero that of a unit variance, nearly.
    exact = torch.cat((target, whole[:, c:]), 1)
    assert float(task.losses(lambda x, _: exact, sigma, whole, target, weights).abs().max()) == 0.0
    zero = task.losses(lambda x, _: torch.zeros_like(x), sigma, whole, target, weights)
    assert 0.2 < float(zero.mean()) < 2.0


def test_training_lowers_the_loss_and_the_prior_is_told_what_is_known(
    settings: TrajectorySettings, task: TrajectoryTask, tmp_path: Path
):
    lines: list[str] = []
    trainer = Trainer(task, CPU)
    drawn = task.draw(64, torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = float(task.losses(trainer.network, *drawn).mean())
    assert fit(task, tmp_path, CPU, log=lines.append)
    trainer.load(tmp_path / "state")
    with torch.no_grad():
        assert float(task.losses(trainer.network, *drawn).mean()) < 0.9 * before
    assert sum("validation: mean squared error of 2 trajectories" in line for line in lines) == 4
    prior = load_prior(tmp_path)
    setting = settings.burgers
    assert prior.event == setting.event and prior.shape == (8, 4, 8)
    initial, forcing = (x[0].float() for x in burgers_cases(setting, range(1), seed=9))
    known = prior.condition({"initial": initial, "forcing": forcing})
    z = torch.randn(2, 8, 4, 8, generator=torch.Generator().manual_seed(0))
    x = known.decode(known.denoise(z, 0.5))
    torch.testing.assert_close(x[0, 7 * 16 :], forcing.flatten(), rtol=0, atol=1e-5, msg="the forcing is what it is")
    assert not torch.equal(known.denoise(z, 0.5)[:, :4], prior.denoise(z, 0.5)[:, :4])
    # Its latents have the spread that the card promises.
    states = setting.solver(2)(*(a.float() for a in burgers_cases(setting, range(50), seed=0)))
    _, f = burgers_cases(setting, range(50), seed=0)
    latents = prior.encode(torch.cat((states.flatten(1), f.float().flatten(1)), 1))
    assert 0.3 < float(latents[:, 0].square().mean().sqrt()) < 1.0
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ChecksumError):
        load_prior(tmp_path)


def test_a_training_that_is_cut_leaves_a_prior_so_far(
    settings: TrajectorySettings, task: TrajectoryTask, tmp_path: Path
):
    assert not fit(task, tmp_path, CPU, limit=0.0, log=lambda _: None)
    assert load_prior(tmp_path / "so-far").name.endswith("tiny")
    assert not (tmp_path / "prior.toml").exists()


def test_settings_say_what_is_wrong(settings: TrajectorySettings, task: TrajectoryTask, tmp_path: Path):
    with pytest.raises(InputError, match="given is made of state, forcing, initial, target"):
        replace(settings, given={"initial+end": 1.0})
    with pytest.raises(InputError, match="must not be negative"):
        replace(settings, given={"nothing": -1.0})
    with pytest.raises(InputError, match="batch = 0"):
        replace(settings, batch=0)
    with pytest.raises(InputError, match="on one CUDA device"):
        Trainer(task, CPU, captured=True)
    path = tmp_path / "train.toml"
    path.write_text(TEXT.replace('licence = "Apache-2.0"\n', ""))
    with pytest.raises(InputError, match="licence"):
        main([str(path), "--out", str(tmp_path)])


def test_every_recipe_can_be_read():
    folder = Path(__file__).parents[1] / "priors" / "burgers-wavelet"
    recipes = sorted(folder.glob("*.toml"))
    for path in recipes:
        if path.name != "prior.toml":
            read = read_settings_as(TrajectorySettings, path)
            rows, sides = read.burgers.windows + 1, read.burgers.points
            assert 2 * read.shape[0] >= rows and 2 * read.shape[1] >= sides, path
    assert len(recipes) >= 7
