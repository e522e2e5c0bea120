"""The benchmark of the solver of Burgers' equation: its peer, its converged solutions, its rows, table and figure."""

import json

import pytest
import torch

from invdiff.bench import burgers_solver
from invdiff.bench.burgers_solver import converged, distance, euler
from invdiff.bench.burgers_solver_table import accurate, plot, quickest, table
from invdiff.errors import InputError
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases

SHORT = BurgersSetting(points=24, windows=2, duration=0.1, viscosity=0.05)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(burgers_solver, "SETTING", SHORT)
    monkeypatch.setattr(burgers_solver, "LEVELS", (6, 4))


def test_the_peer_solves_the_same_equation_to_second_order():
    errors = []
    for points in (48, 96):
        fine = BurgersSetting(points=points, windows=2, duration=0.1, viscosity=0.05)
        u, f = burgers_cases(fine, range(3), seed=2)
        found = euler(u, f, 0.05, 2000, nu=0.05, points=points, rate=20000)
        errors.append(distance(found[:, None], fine.solver(4)(u, f)[:, -1:])["worst"])
    assert errors[0] < 1e-2
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_the_peer_takes_the_forcing_of_its_window():
    u, f = torch.zeros(1, 4).double(), torch.zeros(1, 3, 4).double()
    f[0, 1] = 1.0
    found = euler(u, f, 0.1, 30, nu=1e-9, points=4, rate=100)
    torch.testing.assert_close(found, torch.full_like(u, 0.1), atol=1e-2, rtol=0)  # walls are far from steep
    assert float(euler(u, f, 0.1, 10, nu=1e-9, points=4, rate=100).abs().max()) == 0.0


def test_a_distance_is_the_worst_and_the_median_case():
    truth = torch.zeros(3, 2, 2).double()
    truth[:, :, 0] = 1.0
    found = truth.clone()
    found[0, 0, 1], found[1, 1, 1] = 0.2, 0.1  # of norms sqrt 2 over both times
    got = distance(found, truth)
    expected = {"worst": 0.2 / 2**0.5, "median": 0.1 / 2**0.5, "worst_end": 0.1, "median_end": 0.0}
    assert got == pytest.approx(expected, rel=1e-3)


def test_converged_solutions_are_kept_for_the_same_cases(tmp_path, monkeypatch):
    keep = tmp_path / "truth.safetensors"
    made, where = converged(2, CPU, keep)
    assert set(made) == {6, 4}
    assert distance(made[4], made[6])["worst"] < 1e-4
    monkeypatch.setattr(BurgersSetting, "solver", None)  # nothing is solved again
    again, told = converged(2, CPU, keep)
    assert told == where
    assert all(torch.equal(again[r], made[r]) for r in made)
    with pytest.raises(InputError, match="of another cases; name another file, or give --cases 2"):
        converged(3, CPU, keep)
    monkeypatch.setattr(burgers_solver, "SEED", 5)
    with pytest.raises(InputError, match="of another seed"):
        converged(2, CPU, keep)


def test_from_runs_to_table_and_figure(tmp_path, capsys):
    out, page, figure = tmp_path / "b.json", tmp_path / "t.md", tmp_path / "p.svg"
    words = f"--out {out} --table {page} --plot {figure} --device cpu --cases 2 --refine 1 2 --batches 1 3 --steps 3"
    burgers_solver.main([*words.split(), "--seconds", "0.001", "--dtypes", "float64"])
    capsys.readouterr()
    report = json.loads(out.read_text())
    errors = {(r["refine"], r["dtype"]): r["worst"] for r in report["rows"] if r["what"] == "error"}
    timed = [r for r in report["rows"] if r["what"] == "time"]
    assert len(errors) == 2
    assert len(timed) == 2 * 2 * 2
    assert report["left_out"] == []
    assert all(r["calls"] >= 3 and r["seconds"] > 0.0 for r in timed)
    assert errors[2, "float64"] < errors[1, "float64"] / 4
    u, f = burgers_cases(SHORT, range(2), seed=1)
    assert errors[1, "float64"] == distance(SHORT.solver(1)(u, f), SHORT.solver(6)(u, f))["worst"]
    refine, dtypes = accurate(report)
    assert errors[refine, dtypes[0]] < 1e-3
    best = quickest(report, "forward", refine, dtypes)
    text = page.read_text()
    assert f"{0.695 / best['seconds']:.3g} times the trajectories" in text
    assert "measured apart, not by this benchmark" in text
    assert "<svg" in figure.read_text()
    burgers_solver.main(["--report", str(out), "--table", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text() == text


def test_the_coarsest_accurate_grid_is_compared_with_the_published_code(tmp_path):
    def error(refine: int, dtype: str, worst: float) -> dict:
        each = {"worst": worst, "median": worst / 2, "worst_end": worst, "median_end": worst / 2}
        return {"what": "error", "refine": refine, "dtype": dtype, **each}

    def took(refine: int, dtype: str, batch: int, seconds: float) -> dict:
        row = {"what": "time", "call": "forward", "refine": refine, "dtype": dtype, "batch": batch}
        return {**row, "seconds": seconds, "least": seconds, "calls": 3}

    rows = [error(1, "float32", 0.01), error(2, "float32", 2e-3), error(2, "float64", 9e-4), error(3, "float32", 1e-4)]
    rows += [took(2, "float32", 1, 1e-6), took(2, "float64", 1, 1e-3), took(2, "float64", 64, 6.95e-6)]
    report = {"rows": rows, "left_out": [], "published": burgers_solver.PUBLISHED, "device": "a GPU", "cases": 4}
    report |= {"versions": {"torch": "2"}, "points": 24, "converged": {"levels": [6, 4], "device": "it"} | rows[0]}
    text = table([report], ["b.json"])
    assert (
        "refine=2, in float64. At batch 64 in float64, forward takes 6.95 us" in text
    )  # in float32 it is not accurate
    assert "100,000 times the trajectories" in text
    assert "| 2 | float64 | forward | 1 ms | 6.95 us |" in text
    assert "| 2 | float32 | forward | 1 us |  |" in text
    assert "| 3 | 72 | float32 | 1.00e-04 | 5.00e-05 |" in text
    plot([report, report], tmp_path / "p.svg")
    first = (tmp_path / "p.svg").read_bytes()
    plot([report, report], tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_bytes() == first


def test_a_deadline_and_long_calls_leave_rows_out(tmp_path, capsys):
    out = tmp_path / "b.json"
    words = f"--out {out} --device cpu --cases 1 --refine 1 --dtypes float64 --batches 1 2 3 --steps 1".split()
    burgers_solver.main([*words, "--longest", "0"])
    report = json.loads(out.read_text())
    assert [r["batch"] for r in report["rows"] if r["what"] == "time"] == [1, 1]
    assert report["left_out"][0] == "forward, float64, refine=1, batch 2: too slow"
    burgers_solver.main([*words, "--deadline", "0"])
    capsys.readouterr()
    report = json.loads(out.read_text())
    assert [r["what"] for r in report["rows"]] == ["euler"]
    assert len(report["left_out"]) == 7
    text = table([report], ["b.json"])
    assert "No grid has a worst error below 0.001" in text
    plot([report], tmp_path / "p.png")


def test_a_device_without_a_kernel_is_refused(tmp_path):
    from invdiff import kernels

    with kernels.use("reference"), pytest.raises(InputError, match="No compiled kernel runs on cpu"):
        burgers_solver.main(["--out", str(tmp_path / "b.json"), "--device", "cpu"])
