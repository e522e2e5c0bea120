"""The benchmarks of learned control and simulation, on small runs."""

import json

import pytest

from invdiff.bench import burgers_control, burgers_simulate


def test_control_by_the_prior_and_searches(tmp_path, monkeypatch):
    """One case, few calls: the rows, what each one asked, and that all of them steer."""
    few = burgers_control.Task(card="burgers-control", draws=1, calls=3)
    monkeypatch.setattr(burgers_control, "TASKS", {"burgers-control": few})
    monkeypatch.setattr(burgers_control, "CHOSEN_ON", 0)
    monkeypatch.setattr(burgers_control, "gains", lambda _: (1.0, 0.0, 0.0))
    out, page = tmp_path / "b.json", tmp_path / "t.md"
    burgers_control.main(f"--out {out} --table {page} --cases 1 --calls 6".split())
    report = json.loads(out.read_text())
    rows = {r["method"]: r for r in report["rows"]}
    assert list(rows) == [
        "no forcing", "the data's own", "PID", "WDNO", "WDNO, search through the prior", "adjoint",
        "WDNO, search, then adjoint",
    ]  # fmt: skip
    J = {label: r["J"][0] for label, r in rows.items()}
    assert J["WDNO, search, then adjoint"] < J["WDNO, search through the prior"] < 0.1 * J["no forcing"]
    assert J["WDNO"] < 0.1 * J["no forcing"]
    assert [rows[k]["evaluations"][0] for k in list(rows)[3:]] == [25, 31, 0, 31]
    assert [rows[k]["calls"][0] for k in list(rows)[3:]] == [0, 0, 6, 3]
    assert rows["WDNO, search, then adjoint"]["seconds"][0] > rows["WDNO, search through the prior"]["seconds"][0]
    assert report["priors"]["burgers-control"]["prior"].startswith("wavelets of burgers-wavelet, ")
    text = page.read_text()
    assert "within 1.1 of the best after" in text
    least = min(J[label] for label in J if label != "the data's own")
    assert f"WDNO {J['WDNO'] / least:.3g}; WDNO, search through the prior" in text
    assert str(tmp_path) not in out.read_text()


def test_simulation(tmp_path, monkeypatch):
    monkeypatch.setattr(burgers_simulate, "LEVELS", ((80.0,), (80.0, 1.0)))
    monkeypatch.setattr(burgers_simulate, "COARSER", (1, 2))
    out, page = tmp_path / "b.json", tmp_path / "t.md"
    burgers_simulate.main(f"--out {out} --table {page} --cases 2".split())
    one, two, first, second, mean = json.loads(out.read_text())["rows"]
    assert (one["method"], two["method"], first["method"]) == (
        "solver, refine=1",
        "solver, refine=2",
        "burgers-wavelet",
    )
    # A second order in the cells' width at least, and a prior is no solver.
    assert two["mse"] < one["mse"] / 4 < first["mse"] < 0.01 * mean["mse"]
    assert second["evaluations"] == 2
    assert second["mse"] < first["mse"]
    assert f"| burgers-wavelet | 80, 1 | 2 | {second['mse']:.2e}" in page.read_text()
    assert "*WDNO, published*" in page.read_text()
    with pytest.raises(SystemExit):
        burgers_simulate.main([])
