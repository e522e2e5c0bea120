"""The README and the quickstart do what they say, and the pages build without a warning."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import invdiff
from invdiff.likelihoods import Likelihood
from invdiff.operators import Operator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text("utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    return [
        body
        for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        if kind == language
    ]


def test_readme_gives_the_two_commands_before_anything_else():
    first, second = blocks(README)[:2]
    assert first == "pip install -e . && invdiff demo\n"
    assert second == 'pip install -e ".[test]" && pytest\n'
    assert README.index(first) < README.index("\n## ")


@pytest.mark.parametrize("text", [README, QUICKSTART], ids=["README", "quickstart"])
def test_python_runs(text, tmp_path):
    source = "\n".join(blocks(text, "python"))
    assert "invdiff.solve(" in source
    words = [sys.executable, "-W", "error", "-c", source]  # a process of its own, as a reader would have it
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (saved,) = tmp_path.glob("*.nc")
    assert invdiff.Solution.load(saved).check()["verdict"] == "consistent"


def test_readme_has_ten_lines_of_python_at_most():
    (block,) = blocks(README, "python")
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 10


def command_lines() -> list[str]:
    lines = [line.strip() for block in blocks(README) for line in block.splitlines()]
    lines += [line.strip() for line in QUICKSTART.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith("invdiff ")]


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line):
    typer = pytest.importorskip("typer")
    from invdiff.cli import app

    _, name, *words = shlex.split(line)
    commands = typer.main.get_command(app).commands
    assert name in commands
    commands[name].make_context(name, words)  # raises for an unknown option or a missing argument


def test_problems_named_on_command_lines_exist():
    named = {shlex.split(line)[2] for line in command_lines() if line.startswith("invdiff solve ")}
    assert named
    known = {path.stem for path in (ROOT / "problems").rglob("*.toml")}
    assert named <= known


def parts(module, base) -> set[str]:
    return {
        n
        for n, c in vars(module).items()
        if n in module.__all__ and inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)
    }


def test_readme_names_every_part():
    table = README[README.index("## What this version has") :]
    offered = parts(invdiff.operators, Operator) | parts(invdiff.likelihoods, Likelihood)
    offered |= parts(invdiff.samplers, invdiff.Sampler) | parts(invdiff.integrators, invdiff.integrators.Integrator)
    offered |= {n for n in invdiff.priors.__all__ if n.endswith("Prior")} - {"DiffusionPrior", "MaskedPrior"}
    assert not {name for name in offered if f"`{name}`" not in table}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text("utf-8"))
    inside = [link for link in links if not link.startswith("http") and link != "docs/_static/demo.png"]
    assert not [link for link in inside if not (ROOT / link).exists()]


@pytest.mark.slow
def test_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    words = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-n",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "PiGDM" in (tmp_path / "api" / "samplers.html").read_text("utf-8")
