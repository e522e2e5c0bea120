"""The loop: budgets, callbacks, checkpoints and how a run ends, with a small Markov chain as its sampler."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from invdiff import driver
from invdiff.draws import Draws
from invdiff.driver import Budget, Cost, Info, Sampler, State, load_checkpoint, save_checkpoint
from invdiff.errors import InputError, SamplingError
from invdiff.noise import Noise


@dataclass(frozen=True, kw_only=True)
class WalkState(State):
    last: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Walk(Sampler):
    """An autoregressive chain on numbers; `fail` makes a step go wrong."""

    steps: int = 6
    fail: tuple[int, str] | None = None
    anytime: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        return False

    def requires(self) -> frozenset[str]:
        return frozenset()

    def cost(self) -> Cost:
        return Cost(2 * self.steps)

    def init(self, posterior, ensembles, n, *, noise):
        return WalkState(z=noise.like(torch.zeros(ensembles, n, 3)))

    def step(self, posterior, state, *, noise):
        posterior.made += 2.0
        k = state.step + 1
        if self.fail == (k, "interrupt"):
            raise KeyboardInterrupt
        z = 0.5 * state.z + noise.like(state.z)
        if self.fail == (k, "nan"):
            z[1, 0, 0] = torch.nan
        return WalkState(z=z, step=k, last=state.z), Info(sigma=1.0 / k)

    def done(self, state):
        return state.step >= self.steps

    def progress(self, state):
        return state.step / self.steps

    def finish(self, posterior, state, *, noise):
        return Draws(z=torch.stack([state.z, state.last, noise.like(state.z)], dim=-1))


@dataclass(frozen=True, kw_only=True)
class Annealed(Walk):
    anytime: ClassVar[bool] = False


class Counter:
    made = 0.0


def run(sampler: Sampler, **settings) -> driver.Outcome:
    counter = Counter()
    noise = Noise([1, 2], 4)
    settings = {"evaluations": lambda: counter.made, **settings}
    return driver.run(sampler, counter, ensembles=2, n=4, noise=noise, **settings)


def test_a_run_takes_every_step_and_tells_of_it():
    seen = []
    outcome = run(Walk(), callback=lambda state, info: seen.append((state.step, info)))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert tuple(info for _, info in seen) == outcome.trace
    assert [i.evaluations for i in outcome.trace] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert [i.sigma for i in outcome.trace] == [1 / k for k in range(1, 7)]
    assert outcome.stopped is None
    assert outcome.seconds > 0.0


def test_every_step_has_streams_of_its_own():
    noise = Noise([1, 2], 4)
    z = noise.at(0).like(torch.zeros(2, 4, 3))
    for k in range(1, 7):
        last, z = z, 0.5 * z + noise.at(k).like(z)
    expected = torch.stack([z, last, noise.at(7).like(z)], dim=-1)
    assert torch.equal(run(Walk()).draws.z, expected)


def test_no_gradients_are_kept():
    class Watching(Counter):
        def __setattr__(self, name, value):
            assert not torch.is_grad_enabled()
            super().__setattr__(name, value)

    counter = Watching()
    driver.run(Walk(), counter, ensembles=2, n=4, noise=Noise([1, 2], 4), evaluations=lambda: counter.made)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("bound", "steps"), [(12.0, 6), (11.0, 5), (7.9, 3), (8.0, 4)])
def test_the_budget_of_evaluations_is_never_exceeded(bound, steps):
    outcome = run(Walk(), budget=Budget(max_evaluations=bound))
    assert len(outcome.trace) == steps
    assert outcome.trace[-1].evaluations <= bound
    assert (outcome.stopped is None) == (steps == 6)
    if outcome.stopped:
        assert "max_evaluations" in outcome.stopped


def test_a_chain_out_of_time_keeps_its_draws(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(driver.time, "perf_counter", lambda: float(next(clock)))
    outcome = run(Walk(steps=100), budget=Budget(max_seconds=10.0))
    assert outcome.stopped == "max_seconds=10 reached"
    assert 0 < len(outcome.trace) < 100
    assert bool(torch.isfinite(outcome.draws.z).all())


def test_an_annealed_run_out_of_budget_has_no_draws(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(SamplingError, match=r"Annealed was stopped at 50 % \(max_evaluations=6") as caught:
        run(Annealed(), budget=Budget(max_evaluations=6.0))
    assert "kept" not in str(caught.value)
    with pytest.raises(SamplingError, match=r"kept in .*run\.safetensors"):
        run(Annealed(), budget=Budget(max_evaluations=6.0), checkpoint=path)
    assert torch.equal(run(Annealed(), checkpoint=path).draws.z, run(Annealed()).draws.z)


@pytest.mark.parametrize("cut", [1, 2, 5, 6])
def test_a_resumed_run_gives_the_draws_of_the_uncut_one(tmp_path, cut):
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(Walk(fail=(cut, "interrupt")), checkpoint=path, identity="a")
    seen = []
    resumed = run(Walk(), checkpoint=path, identity="a", callback=lambda s, i: seen.append((s.step, i.evaluations)))
    assert torch.equal(resumed.draws.z, run(Walk()).draws.z)
    assert [step for step, _ in seen] == list(range(cut, 7))
    # The trace is that of the uncut run: what the interrupted step cost is not a cost of the draws.
    assert [e for _, e in seen] == [2.0 * step for step, _ in seen]
    assert resumed.trace == run(Walk()).trace
    assert not path.exists(), "a complete run leaves no checkpoint"


def test_checkpoints_are_kept_as_often_as_asked(tmp_path):
    path = tmp_path / "run.safetensors"
    steps = []

    def look(state, info):
        if path.exists():
            steps.append(load_checkpoint(path, state, "a")[0].step)

    run(Walk(), checkpoint=path, checkpoint_every=0.0, identity="a", callback=look)
    assert steps == [1, 2, 3, 4, 5]
    steps.clear()
    run(Walk(), checkpoint=path, checkpoint_every=1e9, identity="a", callback=look)
    assert steps == []


def test_a_checkpoint_round_trips_bit_by_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for state in (WalkState(z=z, step=4, last=z), WalkState(z=z[:, :, ::2], step=0)):
        trace = [Info(sigma=0.5, misfit=1.25, evaluations=2.5)]
        save_checkpoint(path, state, "id", trace)
        back, kept = load_checkpoint(path, WalkState(z=torch.zeros(1)), "id")
        assert kept == trace
        assert torch.equal(back.z, state.z)
        assert back.step == state.step
        assert (back.last is None) == (state.last is None)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, WalkState(z=torch.zeros(2, 4, 3), step=2), "other", [])
    before = path.read_bytes()
    with pytest.raises(InputError, match="belongs to another run"):
        run(Walk(), checkpoint=path, identity="a")
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, WalkState(z=torch.zeros(2, 4, 3), step=2), "a", [])
    if damage == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    else:
        content = {"cut": path.read_bytes()[:-10], "text": b"not a checkpoint at all", "empty": b""}[damage]
        path.write_bytes(content)
    with pytest.raises(InputError, match="remove it"):
        run(Walk(), checkpoint=path, identity="a")


def test_a_checkpoint_without_a_folder_is_refused_before_the_run(tmp_path):
    seen = []
    with pytest.raises(InputError, match="no folder"):
        run(Walk(), checkpoint=tmp_path / "missing" / "c", callback=lambda *a: seen.append(a))
    assert not seen


def test_a_checkpoint_holds_tensors_and_text_alone(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, WalkState(z=torch.ones(1, 2), step=3), "a", [])
    assert set(load_file(path)) == {"z"}
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["__metadata__"]["identity"] == "a"


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, WalkState(z=torch.ones(1, 2), step=3), "a", [])
    before = path.read_bytes()

    def replace(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, WalkState(z=torch.zeros(1, 2), step=4), "a", [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_non_finite_states_stop_the_run_with_step_and_sigma():
    with pytest.raises(SamplingError, match=r"step 3, sigma 0\.3333"):
        run(Walk(fail=(3, "nan")))


@pytest.mark.parametrize("label", [True, "a picture"])
def test_the_progress_bar_writes_to_standard_error_alone(capsys, label):
    run(Walk(), progress=label)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("sampling" if label is True else label) in err
    assert "100%" in err
    run(Walk())
    assert capsys.readouterr() == ("", "")
