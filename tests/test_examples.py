"""Every example runs from start to end and leaves its results in the folder that it was given."""

import runpy
import sys
from pathlib import Path

import pytest

import invdiff

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "priors" / "photos-64" / "weights.safetensors"
OPTIONS = {
    "choose_a_blur_by_evidence": ["--draws", "10", "--steps", "5"],
    "deblur_a_photograph": ["--draws", "2"],
    "steer_burgers": ["--search", "2", "--solver-calls", "1"],
}
STEERING = {"steer_burgers"}  # an objective has no noise that residuals could agree with
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert {p.stem for p in SCRIPTS} >= {"deblur_a_photograph", "your_own_operator", "your_own_prior"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_example_runs(script, tmp_path, monkeypatch, capsys):
    if "photos-64" in script.read_text("utf-8") and not WEIGHTS.is_file():
        pytest.skip("priors/photos-64/weights.safetensors is not there yet; this example needs the trained prior")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path), *OPTIONS.get(script.stem, [])])
    runpy.run_path(str(script), run_name="__main__")
    assert "written:" in capsys.readouterr().out
    solution = invdiff.Solution.load(tmp_path / f"{script.stem}.nc")
    if script.stem not in STEERING:
        assert solution.check()["verdict"] == "consistent"
    assert (tmp_path / f"{script.stem}.png").stat().st_size > 0
