"""Control of Burgers' equation: the cost and its gradient, the adjoint optimum, the benchmark, and clear errors."""

import json

import pytest
import torch

from invdiff.bench import burgers_control
from invdiff.errors import InputError, ShapeError
from invdiff.likelihoods import Objective
from invdiff.pde import Burgers, BurgersCost, BurgersSetting, burgers_cases, optimal_forcing

F64 = torch.float64
SETTING = BurgersSetting(points=24, windows=4, duration=0.8, viscosity=0.02)


def case(index: int = 0, weight: float = 2e-5, **masks: torch.Tensor) -> tuple[BurgersCost, torch.Tensor]:
    u, f = burgers_cases(SETTING, range(index, index + 1))
    solver = SETTING.solver()
    return BurgersCost(solver, u[0], solver(u, f)[0, -1], weight=weight, **masks), f[0]


def test_the_cost_is_its_parts():
    cost, f = case()
    assert float(cost.misfit(f[None])) == 0.0
    assert float(cost(f[None])) == pytest.approx(2e-5 * float(f.square().sum()))
    zero = torch.zeros_like(f)[None]
    u = cost.solver(cost.initial[None], zero)[0, -1]
    assert float(cost(zero)) == pytest.approx(float((u - cost.target).square().mean()))
    both = cost(torch.stack((f, zero[0])))
    assert both.tolist() == pytest.approx([float(cost(f[None])), float(cost(zero))])


def test_masks_say_what_acts_and_what_counts():
    outer = torch.arange(24) % 24 < 6
    cost, f = case(controlled=outer)
    assert torch.equal(cost.final(f[None]), cost.final(torch.where(outer, f, 7.0)[None]))
    assert float(cost.energy(f[None])) == pytest.approx(float(f[:, :6].square().sum()))
    seen, _ = case(observed=outer)
    moved = BurgersCost(seen.solver, seen.initial, seen.target + torch.where(outer, 0.0, 9.0), observed=outer)
    assert torch.equal(seen.misfit(f[None]), moved.misfit(f[None]))


def test_the_adjoint_finds_what_no_perturbation_betters():
    cost, f = case(weight=1e-4)
    found = optimal_forcing(cost, calls=60)
    assert found.calls <= 60
    assert found.cost == pytest.approx(float(cost(found.forcing[None])))
    assert found.cost < 0.8 * float(cost(f[None]))
    leaf = found.forcing.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost(leaf[None])[0], leaf)
    at_zero = torch.zeros_like(f).requires_grad_()
    (first,) = torch.autograd.grad(cost(at_zero[None])[0], at_zero)
    assert float(slope.norm()) < 1e-6 * float(first.norm())


def test_fewer_calls_find_less_and_a_start_is_taken():
    cost, _ = case(weight=1e-4)
    few, more = optimal_forcing(cost, calls=4), optimal_forcing(cost, calls=25)
    assert more.cost < few.cost
    assert optimal_forcing(cost, start=more.forcing, calls=1).cost == pytest.approx(more.cost)


def test_the_mask_holds_in_the_search():
    outer = torch.arange(24) % 24 < 6
    cost, _ = case(controlled=outer, weight=0.0)
    found = optimal_forcing(cost, calls=15)
    assert bool((found.forcing[:, 6:] == 0).all())
    assert bool((found.forcing[:, :6] != 0).any())


def test_a_cost_is_an_objective():
    cost, f = case()
    likelihood = Objective(cost, 1e-3, cost.in_shape)
    value, slope = likelihood.log_prob_and_grad(f[None])
    assert float(value) == pytest.approx(-float(cost(f[None])) / 1e-3)
    torch.testing.assert_close(slope[0], -2 * 2e-5 * f / 1e-3, rtol=1e-9, atol=1e-12)  # the misfit is at its minimum


def test_the_benchmark_orders_its_rows(tmp_path):
    out, page = tmp_path / "b.json", tmp_path / "t.md"
    name = "burgers-control-partial-both"
    burgers_control.main(f"--out {out} --table {page} --cases 2 --calls 5 --settings {name}".split())
    rows = {r["method"]: r for r in json.loads(out.read_text())["rows"]}
    nothing, own, pid, best = rows.values()
    assert list(rows) == ["no forcing", "the data's own", "PID", "adjoint"]
    assert tuple(pid["gains"]) in burgers_control.GAINS
    assert len(best["mean_costs"]) == 5
    assert best["mean_costs"] == sorted(best["mean_costs"], reverse=True)
    assert own["misfit"][0] == 0.0 < best["misfit"][0] < nothing["misfit"][0]
    assert nothing["energy"][0] == 0.0
    assert best["calls"][0] == 5
    assert f"### {name}" in page.read_text()
    assert f"| the data's own | {own['J'][0]:.3g}" in page.read_text()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(23, dtype=F64)}, ShapeError, r"24 points, target has the shape \(23,\)"),
        ({"controlled": torch.zeros(24, dtype=torch.bool)}, InputError, "one controlled"),
        ({"observed": torch.zeros(24, dtype=torch.bool)}, InputError, "must be observed"),
        ({"weight": -1.0}, InputError, "not negative, got -1"),
    ],
)
def test_bad_input(change, error, message, unchecked):
    zero = torch.zeros(24, dtype=F64)
    with pytest.raises(error, match=message):
        BurgersCost(**{"solver": Burgers(24, 2, 0.1), "initial": zero, "target": zero} | change)


def test_a_search_needs_a_call():
    with pytest.raises(InputError, match="at least one solver call, got 0"):
        optimal_forcing(case()[0], calls=0)
