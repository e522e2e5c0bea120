"""Problems of Burgers' equation from cards: what is given, measured and judged, solved under a prior, clear errors."""

import pytest
import torch

import invdiff
from invdiff import CatalogueError, InputError, ShapeError, cards, load_problem
from invdiff.card_equations import BurgersTable, EquationCard
from invdiff.cli import main
from invdiff.event import Variable
from invdiff.likelihoods import Gaussian, Objective
from invdiff.operators import BandRows, Reshape, WaveletDecoder, WaveletTransform
from invdiff.pde import (
    BurgersCost,
    BurgersSetting,
    TrajectoryCost,
    burgers_cases,
    burgers_judge,
    burgers_trajectories,
    read_trajectories,
    write_trajectories,
)
from invdiff.posterior import Posterior
from invdiff.priors import ConditionalPrior, GaussianPrior, WaveletPrior, gaussian_wavelet_prior
from invdiff.problem import read_problem_card
from invdiff.samplers import DPS, PCN, TransportLangevin
from invdiff.testing import check_operator

F64 = torch.float64
TINY = {"equation__points": 12, "equation__windows": 4, "equation__duration": 0.4, "equation__viscosity": 0.02}
CARDS = {n: c for n in cards.names("problems") if isinstance(c := read_problem_card(n), EquationCard)}
EVERY, BURGERS = list(CARDS), [n for n, c in CARDS.items() if isinstance(c.equation, BurgersTable)]


def split(x: torch.Tensor, points: int = 12, windows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """States and forcing, (n, ...), of flat events."""
    states, forcing = x.reshape(-1, (2 * windows + 1) * points).split([(windows + 1) * points, windows * points], 1)
    return states.reshape(-1, windows + 1, points), forcing.reshape(-1, windows, points)


def quick(name: str) -> invdiff.Problem:
    """Case 3 of a card, for a short time and without finer cells."""
    finer = {"equation__refine": 1} if hasattr(CARDS[name].equation, "refine") else {}
    return load_problem(name, 3, equation__duration=0.4, **finer)


@pytest.mark.parametrize("name", EVERY)
def test_every_card_is_a_problem(name):
    problem, card = quick(name), CARDS[name]
    assert problem.event[0].dims == ("time", "x")
    assert problem.reference.numel() == sum(v.size for v in problem.event)
    assert set(problem.given) == set(card.given)
    assert problem.name == problem.card["name"] == name
    assert (problem.card["index"], len(problem.card["hash"])) == (3, 64)
    if card.sensors is not None:
        # The noise is the card's: a chi-square of m degrees of freedom, six deviations.
        m = problem.likelihood.measurements
        assert isinstance(problem.likelihood, Gaussian)
        assert abs(float(problem.likelihood.deviance(problem.reference[None])) - m) < 6 * (2 * m) ** 0.5


@pytest.mark.parametrize("name", BURGERS)
def test_every_card_of_burgers_equation(name):
    problem, card = quick(name), CARDS[name]
    state, forcing = problem.event
    points, windows = state.shape[1], forcing.shape[0]
    assert (state.name, state.dims, state.shape) == ("state", ("time", "x"), (windows + 1, points))
    assert (forcing.name, forcing.dims, forcing.shape) == ("forcing", ("window", "x"), (windows, points))
    assert (points, windows) == ((120, 80) if card.equation.setting == "wdno" else (128, 10))
    assert state.coords["time"] == pytest.approx([0.4 * i / windows for i in range(windows + 1)])
    assert forcing.coords["window"][1] == pytest.approx(0.4 * 1.5 / windows)
    assert state.coords["x"] == forcing.coords["x"]
    shapes = {"initial": (points,), "target": (points,), "state": state.shape, "forcing": forcing.shape}
    assert all(tuple(value.shape) == shapes[key] for key, value in problem.given.items())
    if card.control is not None:
        truth = problem.reference[None]
        _, f = split(truth, points, windows)
        assert isinstance(problem.likelihood, Objective)
        J = -card.control.temperature * float(problem.likelihood.log_prob(truth))
        assert pytest.approx(card.control.weight * float(f.square().sum())) == J, "the target is where the data led"


def test_the_case_is_the_held_out_one_of_its_setting():
    problem = load_problem("burgers-control", 2, **TINY, equation__refine=3)
    setting = BurgersSetting(points=12, windows=4, duration=0.4, viscosity=0.02)
    initial, forcing = burgers_cases(setting, range(2, 3), seed=1)
    state = setting.solver(3)(initial, forcing)[0]
    states, f = split(problem.reference)
    assert torch.equal(f[0], forcing[0])
    assert torch.equal(states[0], state)
    assert torch.equal(problem.given["initial"], initial[0])
    assert torch.equal(problem.given["target"], state[-1])
    again, other = (load_problem("burgers-control", i, **TINY, equation__refine=3) for i in (2, 1))
    assert again.key == problem.key != other.key


def test_the_objective_sees_the_decoded_event():
    problem = load_problem("burgers-control", **TINY, control__weight=0.1, control__temperature=0.5)
    x = torch.randn(3, *problem.reference.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    states, f = split(x)
    J = (states[:, -1] - problem.given["target"]).square().mean(1) + 0.1 * f.square().sum((1, 2))
    torch.testing.assert_close(problem.likelihood.log_prob(x), -J / 0.5)


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("partial", ["none", "both"])
def test_the_same_law_as_a_measurement(weight, partial):
    settings = {**TINY, "control__weight": weight, "control__temperature": 0.5, "equation__partial": partial}
    objective = load_problem("burgers-control", **settings).likelihood
    linear = load_problem("burgers-control", **settings, control__quadratic=True).likelihood
    x = torch.randn(5, *objective.in_shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(linear.log_prob(x).diff(), objective.log_prob(x).diff())
    torch.testing.assert_close(linear.deviance(x), objective.deviance(x))
    seen = 12 if partial == "none" else 6
    assert linear.measurements == seen + (4 * seen if weight else 0)
    check_operator(linear.operator)


def test_the_objective_may_ask_the_solver():
    settings = {**TINY, "control__weight": 0.1, "control__temperature": 0.5}
    problem = load_problem("burgers-control", 1, **settings, control__solver=True, control__refine=3)
    x = 0.3 * torch.randn(2, *problem.reference.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    _, f = split(x)
    solver = BurgersSetting(points=12, windows=4, duration=0.4, viscosity=0.02).solver(3)
    final = solver(problem.given["initial"].expand(2, -1), f)[:, -1]
    J = (final - problem.given["target"]).square().mean(1) + 0.1 * f.square().sum((1, 2))
    value, slope = problem.likelihood.log_prob_and_grad(x)
    torch.testing.assert_close(value, -J / 0.5)
    states, forces = split(slope)
    assert not states.any(), "the solver looks at the forcing alone"
    assert bool(forces.any())


def test_what_is_not_seen_is_not_given_and_what_is_not_controlled_is_not_counted():
    grid = {"equation__points": 16, "equation__windows": 3, "equation__duration": 0.3}
    problem = load_problem("burgers-control-partial-both", **grid, control__weight=1.0)
    assert not problem.given["initial"][4:12].any()
    assert not problem.given["target"][4:12].any()
    assert bool(problem.given["target"][:4].all())
    states, f = (value.clone() for value in split(problem.reference, 16, 3))
    assert bool(states[0, 0, 4:12].any()), "the truth is whole"
    assert not f[..., 4:12].any()

    def J(states: torch.Tensor, f: torch.Tensor) -> float:
        return -1e-4 * float(problem.likelihood.log_prob(torch.cat((states.flatten(), f.flatten()))[None]))

    before = J(states, f)
    states[0, -1, 4:12] += 1.0
    f[0, :, 4:12] = 5.0
    assert J(states, f) == before
    states[0, -1, 3] += 1.0
    assert J(states, f) == pytest.approx(before + 1 / 8)


def test_sensors_read_cells_at_times():
    grid = {"sensors__count": 3, "sensors__first": 1, "sensors__last": 4, "sensors__every": 2}
    problem = load_problem("burgers-initial-sensors", 5, **TINY, **grid)
    A = problem.likelihood.operator
    check_operator(A)
    assert A.out_shape == (6,), "three cells at the ends of windows 1 and 3"
    time = torch.arange(5, dtype=F64).repeat_interleave(12)
    place = torch.arange(12, dtype=F64).repeat(5)
    forcing = torch.full((48,), 99.0, dtype=F64)
    assert A(torch.cat((time, forcing))[None])[0].tolist() == [1.0] * 3 + [3.0] * 3
    cells = A(torch.cat((place, forcing))[None])[0]
    assert torch.equal(cells[:3], cells[3:])
    assert len(set(cells[:3].tolist())) == 3
    places = {tuple(load_problem("burgers-initial-sensors", i, **TINY, **grid).likelihood.operator(
        torch.cat((place, forcing))[None])[0, :3].tolist()) for i in range(4)}  # fmt: skip
    assert len(places) > 1, "placed by index"
    simulate = load_problem("burgers-simulate", **TINY)
    torch.testing.assert_close(simulate.likelihood.operator(simulate.reference[None])[0], simulate.given["initial"])


def test_the_judge_asks_its_own_solver_alone():
    problem = load_problem("burgers-control", 1, **TINY, control__weight=0.01, equation__refine=3)
    _, f = split(problem.reference)
    own = burgers_judge(problem.card, f)
    assert float(own.misfit) == 0.0
    assert float(own.J) == pytest.approx(0.01 * float(f.square().sum()))
    assert float(own.energy) == pytest.approx(float(f.square().sum()))
    setting = BurgersSetting(points=12, windows=4, duration=0.4, viscosity=0.02)
    tried = torch.stack((0.5 * f[0], torch.zeros_like(f[0])))
    final = setting.solver(3)(problem.given["initial"].expand(2, -1), tried)[:, -1]
    misfit = (final - problem.given["target"]).square().mean(1)
    judged = burgers_judge(problem.card, tried)
    torch.testing.assert_close(judged.misfit, misfit)
    asking = load_problem("burgers-control", 1, **TINY, control__solver=True, control__weight=0.01, equation__refine=3)
    torch.testing.assert_close(burgers_judge(asking.card, tried).J, judged.J)
    with pytest.raises(InputError, match="'burgers-simulate' is none"):
        burgers_judge(load_problem("burgers-simulate", **TINY).card, f)
    with pytest.raises(ShapeError, match=r"forcing \(n, 4, 12\)"):
        burgers_judge(problem.card, f[:, :3])


def tiny_law() -> GaussianPrior:
    """The Gaussian law with mean and covariance of 300 training cases, flat."""
    cases = burgers_trajectories(BurgersSetting(points=12, windows=4, duration=0.4, viscosity=0.02), range(300))
    x = torch.cat([value.flatten(1) for value in cases.values.values()], 1)
    flat = tuple(Variable(name=v.name, dims=(f"{v.name}_place",), shape=(v.size,)) for v in cases.event)
    return GaussianPrior(x.mean(0), x.mT.cov() + 1e-4 * torch.eye(x.shape[1], dtype=F64), event=flat)


def tiny_prior(law: GaussianPrior, event: tuple[Variable, ...]) -> WaveletPrior:
    """The same law in the wavelet domain."""
    transforms = {v.name: WaveletTransform((1, *v.shape), "haar") for v in event}
    return gaussian_wavelet_prior(law, WaveletDecoder(transforms), event)


def test_sensors_under_a_wavelet_prior():
    """Draws of the state under a known forcing have the exact posterior's mean and variance."""
    problem, n = load_problem("burgers-initial-sensors", 3, **TINY, sensors__count=6, sensors__last=4), 100
    law = tiny_law()
    posterior = Posterior(problem, tiny_prior(law, problem.event), dtype=F64)
    solution = posterior.sample(TransportLangevin(steps=30, refreshes=2), draws=n, seed=1)
    assert solution.data["posterior"]["state"].dims == ("chain", "draw", "time", "x")
    forcing = problem.given["forcing"]
    torch.testing.assert_close(solution.draws["forcing"].double(), forcing.expand(n, -1, -1), rtol=0, atol=1e-3)
    known = law.condition({"forcing": forcing.flatten()})
    exact = known.posterior(problem.likelihood.operator, problem.likelihood.measurement, problem.likelihood.noise_std)
    variance = exact.covariance.diagonal()[:60]
    gap = solution.draws["state"].double().flatten(1) - exact.mean[:60]
    # The mean of |gap|^2 / n is the trace / n, and its variance at most twice that squared. Five deviations.
    assert float(gap.mean(0).square().sum()) < float(variance.sum()) / n * (1 + 5 * 2**0.5)
    assert float(gap.square().mean(0).sum()) == pytest.approx(float(variance.sum()), rel=5 * (2 / n) ** 0.5)
    # And the measurement told something.
    assert float(variance.sum()) < 0.5 * float(known.covariance.diagonal()[:60].sum())


@pytest.mark.parametrize(("sampler", "quadratic"), [(PCN(), False), (TransportLangevin(steps=20, refreshes=2), True)])
def test_control_under_a_wavelet_prior(sampler, quadratic):
    """A generic sampler finds forcing of a lower cost than the law's own."""
    problem = load_problem("burgers-control", 3, **TINY, control__temperature=1e-2, control__quadratic=quadratic)
    # A Gaussian law of whole trajectories has no condition "initial"; the state at the start is then free.
    free = invdiff.Problem(problem.likelihood, event=problem.event)
    prior = tiny_prior(tiny_law(), problem.event)
    solution = invdiff.solve(free, prior, sampler, draws=16, seed=1)
    own = prior.decode(prior.sample(64, seed=2))
    after = torch.cat([solution.draws[v.name].double().flatten(1) for v in problem.event], 1)
    cost = problem.likelihood.deviance
    assert float(cost(after).mean()) < 0.25 * float(cost(own).mean())
    assert burgers_judge(problem.card, solution.draws["forcing"]).J.shape == (16,)


def test_a_network_is_told_states_by_name(tmp_path):
    problem = load_problem("burgers-control", **TINY)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
            return self.factor * x + x[:, -2:-1]

    decoder = WaveletDecoder({v.name: WaveletTransform((1, *v.shape), "haar") for v in problem.event}, (4, 8))
    row = BandRows((1, 12), (4, 8), "haar") @ Reshape((12,), (1, 12))
    inner = ConditionalPrior(Net(), decoder.in_shape, {"initial": 2, "target": 2, "forcing": 4})
    prior = WaveletPrior(inner, decoder, problem.event, conditions={"initial": row, "target": row})
    solution = invdiff.solve(problem, prior, DPS(steps=3), draws=2, seed=0)
    assert solution.draws["forcing"].shape == (2, 4, 12)
    saved = invdiff.Solution.load(solution.save(tmp_path / "s.nc"))
    judged = burgers_judge(saved.about["problem_card"], saved.draws["forcing"])
    torch.testing.assert_close(judged.J, burgers_judge(problem.card, solution.draws["forcing"]).J)
    known = prior.condition({"forcing": split(problem.reference)[1][0]})
    torch.testing.assert_close(
        split(known.decode(known.denoise(torch.zeros(1, *prior.shape), 1.0)))[1].double(), split(problem.reference)[1]
    )


def test_training_cases_go_through_a_file(tmp_path):
    setting = BurgersSetting(points=12, windows=4, duration=0.4)
    cases = burgers_trajectories(setting, range(2, 4), refine=1)
    read = read_trajectories(write_trajectories(tmp_path / "b.nc", cases))
    assert read.event == cases.event
    assert all(torch.equal(read.values[name], value) for name, value in cases.values.items())
    assert read.attributes["viscosity"] == 0.01
    edges = torch.linspace(0.0, 0.4, 5, dtype=F64)
    torch.testing.assert_close(read.axes["window"].bounds, torch.stack((edges[:-1], edges[1:]), 1))


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        (
            "burgers-control",
            {"equation__setting": "wdnoo"},
            CatalogueError,
            "setting of Burgers' equation.*did you mean 'wdno'",
        ),
        ("burgers-control", {"equation__partial": "some"}, InputError, r"equation\.partial"),
        (
            "burgers-control",
            {"equation__type": "Burger"},
            InputError,
            "equation: .*'Burger'.*'Burgers', 'Advection', 'Flow'",
        ),
        ("burgers-control", {"control__weight": -1.0}, InputError, r"control\.weight.*greater than or equal to 0"),
        ("burgers-control", {"control__temperature": 0.0}, InputError, r"control\.temperature.*greater than 0"),
        ("burgers-control", {"given": ["start"]}, InputError, r"given\.0"),
        ("burgers-control", {"sensors__noise_std": 0.1}, InputError, "either a table control or a table sensors"),
        (
            "burgers-control",
            {"control__quadratic": True, "control__solver": True},
            InputError,
            "give quadratic or solver",
        ),
        ("burgers-control", {"noise__std": 0.1}, InputError, r"noise: is not a field"),
        ("burgers-simulate", {"sensors__count": 13}, InputError, "at most 12 cells.*got 13 sensors"),
        (
            "burgers-simulate",
            {"sensors__last": 5},
            InputError,
            "the initial one, to 4; got 12 sensors read from 0 to 5",
        ),
        ("burgers-simulate", {"sensors__first": 1}, InputError, "read from 1 to 0"),
        ("burgers-simulate", {"sensors__noise_std": 0.0}, InputError, r"sensors\.noise_std"),
    ],
)
def test_bad_settings(name, change, error, words):
    with pytest.raises(error, match=words):
        load_problem(name, **TINY, **change)


@pytest.mark.parametrize("index", [-1, 50])
def test_there_is_no_such_case(index):
    with pytest.raises(InputError, match=f"cases 0 to 49, got index {index}"):
        load_problem("burgers-control", index, **TINY)


def test_costs_refuse_what_does_not_fit(unchecked):
    setting = BurgersSetting(points=12, windows=4, duration=0.4)
    zero, none = torch.zeros(12, dtype=F64), torch.zeros(12, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"12 points, target has the shape \(13,\)"):
        TrajectoryCost(BurgersCost(setting.solver(), zero, torch.zeros(13)))
    with pytest.raises(InputError, match="one controlled"):
        TrajectoryCost(BurgersCost(setting.solver(), zero, zero, controlled=none))
    J = TrajectoryCost(BurgersCost(setting.solver(), zero, zero))
    with pytest.raises(ShapeError, match=r"have 108 values, .* got \(1, 48\)"):
        J(torch.zeros(1, 48))


def test_the_command_line_says_where_trajectories_are_solved(tmp_path, capsys):
    assert main(["solve", "burgers-control", "--prior", "photos-64", "--out", str(tmp_path / "out.nc")]) == 2
    assert "its unknown is a trajectory" in " ".join(capsys.readouterr().err.split())
    assert main(["show", str(cards.find("problems", "burgers-control"))]) == 0
    assert "wdno" in capsys.readouterr().out
