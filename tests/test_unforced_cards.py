"""Problems of advection and of compressible flow from cards: truth, sensors, solving under a prior, clear errors."""

from dataclasses import replace

import pytest
import torch

import invdiff
from invdiff import CatalogueError, InputError, load_problem
from invdiff.cli import main
from invdiff.operators import BandRows, Reshape, WaveletDecoder, WaveletTransform
from invdiff.pde import (
    AdvectionSetting,
    ShockTubeSetting,
    advection_cases,
    advection_trajectories,
    burgers_judge,
    flow_cases,
    flow_trajectories,
    read_trajectories,
    riemann_solution,
    shock_tubes,
    write_trajectories,
)
from invdiff.pde.flow import conserved, primitive
from invdiff.priors import ConditionalPrior, GaussianPrior, WaveletPrior
from invdiff.samplers import DPS, TransportLangevin
from invdiff.testing import check_operator

F64 = torch.float64
NAMES = ("advection-simulate", "flow-1d-simulate")
SMALL = {"equation__points": 16, "equation__states": 5}
WAVES = SMALL | {"equation__highest": 3}
TINY = {"advection-simulate": WAVES, "flow-1d-simulate": SMALL}
SHAPES = {"advection-simulate": [("state", (201, 128))], "flow-1d-simulate": [
    (name, (81, 128)) for name in ("density", "velocity", "pressure")]}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_unknown_is_the_trajectory_on_its_grid(name):
    problem = load_problem(name, 2)
    assert [(v.name, v.shape) for v in problem.event] == SHAPES[name]
    low, high, end = (0.0, 1.0, 2.0) if name == "advection-simulate" else (-1.0, 1.0, 0.4)
    for v in problem.event:
        assert (v.dims, v.units) == (("time", "x"), "1")
        times, half = v.coords["time"], 0.5 * (high - low) / 128
        assert times == pytest.approx([end * i / (len(times) - 1) for i in range(len(times))])
        assert v.coords["x"] == pytest.approx([low + half * (2 * i + 1) for i in range(128)])
    again, other = load_problem(name, 2), load_problem(name, 1)
    assert again.key == problem.key != other.key
    assert again.card["hash"] == other.card["hash"]


@pytest.mark.parametrize("name", NAMES)
def test_the_initial_state_is_given_and_measured(name):
    problem = load_problem(name, 2, **TINY[name])
    initial = problem.given["initial"]
    A, y = problem.likelihood.operator, problem.likelihood.measurement.flatten()
    torch.testing.assert_close(A(problem.reference[None])[0], initial.flatten())
    gap = (y - initial.flatten()) / 0.01
    # A mean of squares of standard normals, six deviations.
    assert float(gap.square().mean()) == pytest.approx(1.0, abs=6 * (2 / len(y)) ** 0.5)
    check_operator(A)


def test_advection_shifts_the_held_out_case_exactly():
    problem = load_problem("advection-simulate", 3, **WAVES, equation__duration=1.25)
    setting = AdvectionSetting(points=16, states=5, duration=1.25, highest=3)
    initial = advection_cases(setting, range(3, 4), seed=1)[0]
    assert torch.equal(problem.given["initial"], initial)
    expected = torch.stack([initial.roll(5 * k) for k in range(5)])  # 5 cells from state to state, to the right
    torch.testing.assert_close(problem.reference, expected, rtol=0, atol=1e-12)
    # And by half cells to the left, which are whole cells on a grid twice as fine.
    settings = {"equation__duration": 1.0, "equation__speed": -0.125}
    half = load_problem("advection-simulate", 3, **WAVES, **settings).reference
    fine = advection_cases(replace(setting, points=32), range(3, 4), seed=1)[0]
    expected = torch.stack([fine.roll(-k).reshape(16, 2).mean(1) for k in range(5)])
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-12)


def test_flow_is_the_held_out_case_averaged_from_finer_cells():
    problem = load_problem("flow-1d-simulate", 3, **SMALL, equation__refine=3, equation__duration=0.2)
    setting = ShockTubeSetting(points=16, states=5, duration=0.2)
    initial = flow_cases(setting, range(3, 4), seed=1)
    assert torch.equal(problem.given["initial"], initial[0])
    truth = problem.reference.reshape(3, 5, 16)
    torch.testing.assert_close(truth[:, 0], initial[0])
    fine = replace(setting, points=48)
    states = conserved(fine.solver()(flow_cases(fine, range(3, 4), seed=1)), setting.gamma)[0]
    means = torch.stack([states[..., i::3] for i in range(3)]).mean(0)
    torch.testing.assert_close(truth.transpose(0, 1), primitive(means, setting.gamma))
    own = load_problem("flow-1d-simulate", 3, **SMALL, equation__refine=1, equation__duration=0.2).reference
    torch.testing.assert_close(own.reshape(3, 5, 16).transpose(0, 1), setting.solver()(initial)[0])


def test_finer_cells_come_nearer_to_the_exact_solution():
    setting, exact = ShockTubeSetting(points=32, states=2, duration=0.15), []
    left, right, position = shock_tubes(setting, range(4), seed=1)
    x = (torch.arange(32 * 64, dtype=F64) + 0.5) / (16 * 64) - 1.0
    for k in range(4):
        rays = (x - position[k]) / 0.15
        values = riemann_solution(left[k : k + 1], right[k : k + 1], rays, gamma=setting.gamma)
        averages = conserved(values, setting.gamma).reshape(3, 32, 64).mean(-1)
        exact.append(primitive(averages, setting.gamma))
    errors = []
    for refine in (1, 4):
        found = flow_trajectories(setting, range(4), seed=1, refine=refine).values
        last = torch.stack([found[name][:, -1] for name in ("density", "velocity", "pressure")], 1)
        errors.append(float((last - torch.stack(exact)).abs().mean()))
    assert errors[1] < 0.5 * errors[0] < 0.05


def test_steps_may_be_said():
    name, small = "flow-1d-simulate", SMALL | {"equation__refine": 1}
    few = load_problem(name, **small, equation__steps=40).reference
    own = load_problem(name, **small).reference
    assert not torch.equal(few, own)
    assert float((few - own).abs().mean()) < 0.05
    with pytest.raises(InputError, match=r"steps=1 makes steps of .* or more, or None"):
        load_problem(name, **small, equation__steps=1)
    assert ShockTubeSetting(steps=3).solver(2).steps == 6, "on cells half as wide as many more"


@pytest.mark.parametrize("name", NAMES)
def test_sensors_read_the_same_cells_of_every_variable(name):
    grid = {"sensors__count": 3, "sensors__first": 1, "sensors__last": 4, "sensors__every": 2}
    problem = load_problem(name, 5, **TINY[name], **grid)
    A, n = problem.likelihood.operator, len(problem.event)
    check_operator(A)
    time = torch.arange(5, dtype=F64)[None, :, None] + 10.0 * torch.arange(n, dtype=F64)[:, None, None]
    shape = (1, *problem.reference.shape)
    times = A(time.expand(n, 5, 16).reshape(shape))[0]
    assert times.tolist() == [10.0 * i + t for i in range(n) for t in (1, 3) for _ in range(3)]
    cells = A(torch.arange(16, dtype=F64).expand(n, 5, 16).reshape(shape))[0].reshape(2 * n, 3)
    assert bool((cells == cells[0]).all())
    assert len(set(cells[0].tolist())) == 3


def test_a_draw_is_near_the_exact_posterior():
    """Under the Gaussian law of cases the initial state tells all later ones, since each wave is known by it."""
    problem, n = load_problem("advection-simulate", 3, **WAVES), 50
    setting = AdvectionSetting(points=16, states=5, highest=3)
    cases = advection_trajectories(setting, range(300)).values["state"].flatten(1)
    C = cases.mT.cov() + 1e-5 * torch.eye(80, dtype=F64)
    law = GaussianPrior(cases.mean(0), C, shape=(5, 16), event=problem.event)
    # A Gaussian law of states has no condition "initial"; what is measured says it.
    free = invdiff.Problem(problem.likelihood, event=problem.event, reference=problem.reference)
    solution = invdiff.solve(free, law, TransportLangevin(steps=30, refreshes=2), draws=n, seed=1)
    draws = solution.draws.double()
    assert draws.shape == (n, 5, 16)
    exact = law.posterior(problem.likelihood.operator, problem.likelihood.measurement, problem.likelihood.noise_std)
    variance = float(exact.covariance.diagonal().sum())
    # As for the sensors of Burgers' equation: five deviations.
    gap = draws.flatten(1) - exact.mean.flatten()
    assert float(gap.mean(0).square().sum()) < variance / n * (1 + 5 * 2**0.5)
    assert variance < 0.01 * float(C.diagonal().sum())
    assert float((draws.mean(0) - problem.reference).square().mean()) < 0.01 * float(C.diagonal().mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_told_the_initial_state(name):
    problem = load_problem(name, **TINY[name] | {"equation__states": 8})
    initial = problem.given["initial"]
    channels = 1 if initial.ndim == 1 else 3

    seen = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
            # Behind the latents stand what is known, whether it is, and the positions.
            latents = 4 * len(problem.event)
            seen.append(x[:, latents:].detach())
            return self.factor * x[:, :latents] + x[:, latents : latents + 1]

    single = tuple(problem.reference.shape) if channels == 1 else None
    decoder = WaveletDecoder({v.name: WaveletTransform((1, *v.shape), "haar") for v in problem.event}, out_shape=single)
    torch.testing.assert_close(decoder(decoder.inverse(problem.reference[None]))[0], problem.reference)
    row = BandRows((channels, 16), decoder.in_shape[1:], "haar") @ Reshape(tuple(initial.shape), (channels, 16))
    inner = ConditionalPrior(Net(), decoder.in_shape, {"initial": row.out_shape[0]})
    prior = WaveletPrior(inner, decoder, problem.event, conditions={"initial": row})
    solution = invdiff.solve(problem, prior, DPS(steps=3), draws=2, seed=0)
    found = {v.name: solution.data["posterior"][v.name] for v in problem.event}
    assert all(draws.dims == ("chain", "draw", "time", "x") for draws in found.values())
    assert all(draws.shape == (1, 2, 8, 16) for draws in found.values())
    known = row(initial[None])[0].float()
    assert bool(known.any())
    assert seen
    for x in seen:
        torch.testing.assert_close(x[:, : len(known)], known.expand(len(x), -1, -1, -1))


@pytest.mark.parametrize("name", NAMES)
def test_training_cases_go_through_a_file(name, tmp_path):
    if name == "advection-simulate":
        waves = AdvectionSetting(points=16, states=5, highest=3)
        cases, event = advection_trajectories(waves, range(2, 4)), waves.event
    else:
        tubes = ShockTubeSetting(points=16, states=5)
        cases, event = flow_trajectories(tubes, range(2, 4), refine=1), tubes.event
    read = read_trajectories(write_trajectories(tmp_path / "t.nc", cases))
    assert all(torch.equal(read.values[v.name], value) for v, value in zip(event, cases.values.values(), strict=True))
    for found, expected in zip(read.event, event, strict=True):
        assert (found.name, found.dims, found.shape) == (expected.name, expected.dims, expected.shape)
        assert all(found.coords[dim] == pytest.approx(values) for dim, values in expected.coords.items())
    width = (read.axes["x"].bounds[:, 1] - read.axes["x"].bounds[:, 0]).sum()
    assert float(width) == pytest.approx(1.0 if name == "advection-simulate" else 2.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"equation__setting": "wave"}, CatalogueError, "setting of (linear advection|compressible flow) named 'wave'"),
        ({"equation__type": "Heat"}, InputError, "equation: .*'Heat'.*'Burgers', 'Advection', 'Flow'"),
        ({"equation__viscosty": 0.1}, InputError, r"equation\.viscosty: is not a field"),
        ({"equation__windows": 4}, InputError, r"equation\.windows: is not a field"),
        ({"equation__states": 1}, InputError, r"equation\.states.*greater than or equal to 2, got 1"),
        ({"equation__duration": 0.0}, InputError, r"equation\.duration.*greater than 0"),
        (
            {"control__weight": 0.0, "control__temperature": 1.0},
            InputError,
            "no forcing to control; give .*sensors",
        ),
        ({"forcing__scale": 1.0}, InputError, "forcing: is not a field"),
        ({"given": ["initial", "forcing"]}, InputError, "'initial' and 'state', not 'forcing'"),
        ({"given": ["target"]}, InputError, "no target to force it to.*not 'target'"),
        ({"sensors__count": 17}, InputError, "at most 16 cells.*got 17 sensors"),
        ({"sensors__last": 5}, InputError, "to 4; got 16 sensors read from 0 to 5"),
        ({"sensors__first": 1}, InputError, "read from 1 to 0"),
    ],
)
def test_bad_settings(name, change, error, words):
    with pytest.raises(error, match=words):
        load_problem(name, **TINY[name] | change)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("advection-simulate", {"equation__points": 6}, "highest=3, points=6"),
        ("advection-simulate", {"equation__speed": float("inf")}, r"equation\.speed.*finite"),
        ("flow-1d-simulate", {"equation__gamma": 1.0}, r"equation\.gamma.*greater than 1"),
        ("flow-1d-simulate", {"equation__gamma": 30.0}, "may open a vacuum"),
        ("flow-1d-simulate", {"equation__speed": 1.0}, r"equation\.speed: is not a field"),
    ],
)
def test_bad_numbers_of_one_equation(name, change, words):
    with pytest.raises(InputError, match=words):
        load_problem(name, **TINY[name] | change)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", [-1, 1000])
def test_there_is_no_such_case(name, index):
    with pytest.raises(InputError, match=f"cases 0 to 999, got index {index}"):
        load_problem(name, index, **TINY[name])


def test_refinement_is_a_number_of_cells():
    with pytest.raises(InputError, match="refine=0"):
        flow_trajectories(ShockTubeSetting(points=16, states=2), range(1), refine=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_forced_is_not_judged(name):
    with pytest.raises(InputError, match=f"control of Burgers' equation are judged; '{name}' is none"):
        burgers_judge(load_problem(name, **TINY[name]).card, torch.zeros(1, 4, 16, dtype=F64))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_says_where_trajectories_are_solved(name, tmp_path, capsys):
    assert main(["solve", name, "--prior", "photos-64", "--out", str(tmp_path / "out.nc")]) == 2
    assert "its unknown is a trajectory" in " ".join(capsys.readouterr().err.split())
    assert main(["show", name]) == 0
    assert "simulate" in capsys.readouterr().out
