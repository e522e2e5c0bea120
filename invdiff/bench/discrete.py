"""How right samplers of tokens are, against enumerated posteriors, as one JSON file and a table made from it.

    python -m invdiff.bench.discrete --out docs/discrete.json --table docs/discrete_table.md [--quick]
        [--picture docs/_static/unmasking.png] [--only PROBLEM ...] [--samplers LABEL ...]

Every sampler runs on every named problem of `diagnostics.discrete`, 16 seeds as 16 chains of one run; figures are means
over them, and beside them stands what they must keep to. The file holds no times and repeats on one kind of machine.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import invdiff
from invdiff.diagnostics.discrete import PROBLEMS, DiscreteProblem, TokenFigures, marginal_tv, measure_tokens, named
from invdiff.errors import InputError
from invdiff.noise import Noise, stream_key
from invdiff.posterior import Posterior
from invdiff.priors.unmasking import expected_evaluations, unmask
from invdiff.samplers import APS, G2D2, SGDD, SVDD, AmortisedSMC, AnchoredSMC, MaskedGibbs, Sampler, TwistedSMC
from invdiff.solve import solve
from invdiff.training.amortise import AmortiseSettings, amortise

SEEDS = 16
TV = {
    "chain-8": 0.025,
    "ising-4x4": 0.025,
    "product-mixture-tokens": 0.02,
    "product-mixture-sums": 0.02,
    "parity-8": 0.025,
    "parity-12": 0.05,
}
"""Largest marginal TV of 4000 twisted particles, by problem."""
EVIDENCE = {name: 0.06 if name.startswith("product") or name == "parity-8" else 0.15 for name in TV}
"""Largest mean deviation of their log evidence, nats."""
FALL, GIBBS_TV = 0.35, 0.03
"""Largest TV of 16 000 particles over that of 1000, twisted or anchored; largest TV of walkers."""
MOVES = {"chain-8": 400, "product-mixture-sums": 600, "parity-12": 900}
_FEW_MOVES = 150
_REPORTED = (APS, G2D2, SGDD, SVDD)  # biased at these settings, or at any; without bounds
_FALLING = ("TwistedSMC", "AnchoredSMC")  # labels
_MICRO_BATCH = 8192  # fits a core's cache


def learnt(case: DiscreteProblem, *, quick: bool) -> Sampler:
    """`AmortisedSMC` with a proposal that was fitted to the problem, which the passes of a draw do not count."""
    posterior = Posterior(case.problem, case.prior, dtype=torch.float64)
    settings = AmortiseSettings(steps=10, batch=16) if quick else AmortiseSettings()
    return AmortisedSMC(proposal=amortise(posterior, settings)[0])


def runs(name: str, *, quick: bool) -> list[tuple[str, Sampler | None, int]]:
    """Samplers of a problem by label, with their draws in a chain; None is `learnt`, which takes its time."""
    twisted = "TwistedSMC"
    if quick:
        return [
            *((twisted, TwistedSMC(), n) for n in (100, 200)),
            ("MaskedGibbs", MaskedGibbs(steps=20), 50),
            *(("AnchoredSMC", AnchoredSMC(inner_steps=3), n) for n in (100, 200)),
            ("APS", APS(steps=4, inner_steps=4), 50),
            ("G2D2", G2D2(steps=4, inner_steps=4), 50),
            ("SGDD", SGDD(steps=10, mh_steps=5), 50),
            ("SVDD", SVDD(candidates=4), 50),
            ("AmortisedSMC", None, 200),
        ]
    return [
        *((twisted, TwistedSMC(), n) for n in (1000, 4000, 16_000)),
        ("TwistedSMC, order by entropy", TwistedSMC(order="entropy"), 4000),
        ("TwistedSMC, no lookahead", TwistedSMC(lookahead=False), 4000),
        *(("AnchoredSMC", AnchoredSMC(), n) for n in (1000, 4000, 16_000)),
        ("MaskedGibbs", MaskedGibbs(steps=MOVES.get(name, _FEW_MOVES)), 500),
        ("APS", APS(), 500),
        ("APS, decoded means", APS(estimator="soft"), 500),
        ("APS, anchors compete again", APS(sticky=False), 500),
        ("APS, no divergence", APS(kl=0.0), 500),
        ("G2D2", G2D2(), 500),
        ("SGDD, 100 levels of 20 moves", SGDD(), 250),
        ("SGDD, 400 levels of 20 moves", SGDD(steps=400), 100),
        ("SVDD, one of 20", SVDD(), 1000),
        ("SVDD, the best of 20", SVDD(alpha=0.0), 1000),
        ("AmortisedSMC", None, 4000),
    ]


def bounds(name: str, sampler: Sampler, draws: int, se: float | None) -> dict[str, float]:
    """Return what the figures of a run must not exceed."""
    if isinstance(sampler, MaskedGibbs):
        return {"marginal_tv": GIBBS_TV}
    if isinstance(sampler, _REPORTED):
        return {}
    found = {} if se is None else {"ratio_error": 3.0 * se}
    return found | ({"marginal_tv": TV[name], "evidence_deviation": EVIDENCE[name]} if draws == 4000 else {})


def run_one(case: DiscreteProblem, label: str, sampler: Sampler, draws: int, seeds: int) -> dict[str, Any]:
    """Run one sampler on one problem."""
    solution = solve(
        case.problem,
        case.prior,
        sampler,
        draws=draws,
        chains=seeds,
        dtype=torch.float64,
        micro_batch=_MICRO_BATCH,
    )
    figures: TokenFigures = measure_tokens(solution, case)
    ess = [info.ess for info in solution.trace if info.ess is not None]
    found: dict[str, Any] = {
        "problem": case.name,
        "sampler": label,
        "settings": repr(sampler),
        "draws": draws,
        "evaluations": solution.about["evaluations_per_draw"],
        "floor": round(case.floor(draws), 4),
        "marginal_tv": round(float(figures.marginal_tv.mean()), 4),
        "largest_tv": round(float(figures.marginal_tv.max()), 4),
        "likelihood_error": round(float(figures.likelihood_error.mean()), 3),
        "least_ess": round(min(ess), 3) if ess else None,
    }
    se = None
    if figures.log_evidence_error is not None and figures.ratio is not None:
        mean, se = figures.ratio
        found |= {
            "evidence_deviation": round(float(figures.log_evidence_error.abs().mean()), 4),
            "ratio": round(mean, 4),
            "ratio_se": round(se, 4),
            "ratio_error": round(abs(mean - 1.0), 4),
        }
    limits = {key: round(value, 4) for key, value in bounds(case.name, sampler, draws, se).items()}
    return found | {"bounds": limits, "outside": [key for key, value in limits.items() if found[key] > value]}


def exact_row(case: DiscreteProblem, draws: int, seeds: int) -> dict[str, Any]:
    """Exact draws: what chance leaves."""
    z = case.exact.sample(draws * seeds, seed=1).reshape(seeds, draws, -1)
    tvs = [marginal_tv(x, case.exact) for x in z]
    head = {"problem": case.name, "sampler": "exact draws", "settings": "", "draws": draws, "evaluations": 0.0}
    figures = {"marginal_tv": round(sum(tvs) / seeds, 4), "largest_tv": round(max(tvs), 4)}
    return head | {"floor": round(case.floor(draws), 4), **figures, "bounds": {}, "outside": []}


def falls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TV of the most particles over that of the fewest, by problem, of the samplers that are held to it."""
    found = []
    for name in dict.fromkeys(r["problem"] for r in rows):
        for sampler in _FALLING:
            own = [r for r in rows if r["problem"] == name and r["sampler"] == sampler]
            if not own:
                continue
            own.sort(key=lambda r: int(r["draws"]))
            ratio = own[-1]["marginal_tv"] / own[0]["marginal_tv"]
            head = {"problem": name, "sampler": sampler, "from": own[0]["draws"], "to": own[-1]["draws"]}
            found.append(head | {"fall": round(ratio, 3)})
    return found


def unmasking(*, quick: bool) -> list[dict[str, Any]]:
    """Count evaluations of parallel unmasking at several numbers of steps."""
    prior, n = named("ising-4x4").prior, 200 if quick else 2000
    rows = []
    for steps in (1, 2, 4, 8, 16, 32, 64, 128):
        noise = Noise([stream_key(0, "unmasking", steps)], n, dtype=torch.float64)
        made = unmask(prior, noise, steps).evaluations.double()
        se = float(made.std()) / n**0.5
        expected = expected_evaluations(steps, prior.length)
        rows.append({"steps": steps, "measured": float(made.mean()), "se": se, "expected": expected})
    return rows


def collect(*, quick: bool, only: Sequence[str] = (), samplers: Sequence[str] = ()) -> dict[str, Any]:
    """Run everything, or the problems of these names alone, or samplers of these labels."""
    rows: list[dict[str, Any]] = []
    seeds = 4 if quick else SEEDS
    names = [name for name in PROBLEMS if not only or name in only]
    for name in names:
        case = named(name)
        if not samplers:
            rows.append(exact_row(case, 4000, seeds))
        for label, given, draws in runs(name, quick=quick):
            if samplers and label not in samplers:
                continue
            sampler = learnt(case, quick=quick) if given is None else given
            rows.append(run_one(case, label, sampler, draws, seeds))
            shown = ("problem", "sampler", "draws", "marginal_tv", "evidence_deviation", "outside")
            print(json.dumps({key: rows[-1].get(key) for key in shown}), flush=True)
    return {
        "benchmark": "discrete",
        "quick": quick,
        "seeds": seeds,
        "device": "cpu",
        "dtype": "float64",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "about": {name: about(name) for name in names},
        "bounds": {"marginal_tv": TV, "evidence_deviation": EVIDENCE, "fall": FALL, "gibbs_tv": GIBBS_TV},
        "rows": rows,
        "falls": falls(rows),
        "unmasking": unmasking(quick=quick),
    }


def update(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Put the samplers of a new run in the place of their old figures on its problems, or beside those of others.

    Raises
    ------
    InputError
        If the two were not made alike.
    """
    for key in ("quick", "seeds", "device", "dtype", "versions", "bounds"):
        if old[key] != new[key]:
            raise InputError(f"The file's {key} is {old[key]}, this run's is {new[key]}; run everything again.")
    places = PROBLEMS
    merged = new | {"about": {n: (old["about"] | new["about"])[n] for n in places if n in old["about"] | new["about"]}}
    again = {(r["problem"], r["sampler"]) for r in new["rows"]}
    kept = [r for r in old["rows"] if (r["problem"], r["sampler"]) not in again]
    merged["rows"] = sorted(kept + new["rows"], key=lambda r: places.index(r["problem"]))
    return merged | {"falls": falls(merged["rows"])}


def about(name: str) -> str:
    """Size of a problem in words."""
    case = named(name)
    length, V = case.prior.length, case.prior.vocabulary_size
    return f"{length} tokens of {V}, {V**length} sequences, {case.problem.likelihood.measurements} measured values"


def table(report: dict[str, Any], source: str, target: str) -> str:
    """Markdown from the file alone; figures beyond their bound are in bold."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    quick = " --quick" if report["quick"] else ""
    command = f"python -m invdiff.bench.discrete --out {source} --table {target}{quick}"
    head = [
        "sampler",
        "draws",
        "passes",
        "TV",
        "bound",
        "largest TV",
        "likelihood",
        "log evidence",
        "bound",
        "ratio - 1",
    ]
    head += ["3 s.e.", "least ESS"]
    made = f"Made from `{source}` by `{command}`; not edited by hand."
    how = f"Means over {report['seeds']} seeds, {report['device']}, {report['dtype']}; {versions}."
    text = [made, "", f"{how} **Bold** figures are beyond their bound."]
    for name, size in report["about"].items():
        text += ["", f"### {name}", "", f"{size}.", ""]
        text += ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|"]
        for r in (r for r in report["rows"] if r["problem"] == name):
            limit, ratio = r["bounds"], r.get("ratio")
            cells = [
                r["sampler"],
                str(r["draws"]),
                f"{r['evaluations']:.0f}" if r["evaluations"] else "",
                _cell(r, "marginal_tv", 4),
                f"{limit['marginal_tv']:.3f}" if "marginal_tv" in limit else "",
                f"{r['largest_tv']:.4f}",
                f"{r['likelihood_error']:+.3f}" if "likelihood_error" in r else "",
                _cell(r, "evidence_deviation", 3),
                f"{limit['evidence_deviation']:.2f}" if "evidence_deviation" in limit else "",
                "" if ratio is None else _bold(r, "ratio_error", f"{ratio - 1.0:+.4f}"),
                f"{limit['ratio_error']:.4f}" if "ratio_error" in limit else "",
                "" if r.get("least_ess") is None else f"{r['least_ess']:.2f}",
            ]
            text.append("| " + " | ".join(cells) + " |")
    text += ["", "### TV as particles grow", ""]
    text += ["| problem | sampler | particles | TV over TV | bound |", "| --- | --- | ---: | ---: | ---: |"]
    for f in report["falls"]:
        bound = report["bounds"]["fall"]
        figure = f"{f['fall']:.3f}" if f["fall"] <= bound else f"**{f['fall']:.3f}**"
        text.append(f"| {f['problem']} | {f['sampler']} | {f['from']} to {f['to']} | {figure} | {bound} |")
    text += ["", "### Evaluations of parallel unmasking", ""]
    text += ["16 tokens of ising-4x4; the formula is T (1 - (1 - 1 / T)^16).", ""]
    text += ["| steps T | evaluations a draw | standard error | formula |", "| ---: | ---: | ---: | ---: |"]
    for u in report["unmasking"]:
        text.append(f"| {u['steps']} | {u['measured']:.3f} | {u['se']:.3f} | {u['expected']:.3f} |")
    return "\n".join(text) + "\n"


def _bold(r: dict[str, Any], key: str, figure: str) -> str:
    return f"**{figure}**" if key in r["outside"] else figure


def _cell(r: dict[str, Any], key: str, digits: int) -> str:
    return _bold(r, key, f"{r[key]:.{digits}f}") if key in r else ""


def picture(report: dict[str, Any], path: Path) -> None:
    """Plot evaluations of parallel unmasking against steps."""
    from matplotlib.figure import Figure

    rows = report["unmasking"]
    steps = [r["steps"] for r in rows]
    figure = Figure(figsize=(5.0, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, steps, ":", color="0.5", label="one a step")
    axes.plot(steps, [r["expected"] for r in rows], "-", label="T (1 - (1 - 1/T)^16)")
    axes.plot(steps, [r["measured"] for r in rows], "o", label="measured")
    axes.set(xscale="log", yscale="log", xlabel="steps T", ylabel="evaluations a draw")
    axes.set_xticks(steps, [str(t) for t in steps])
    axes.set_ylim(0.8, 64.0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write the file, its table and its picture."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.discrete", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--picture", type=Path, help="PNG of the evaluations of parallel unmasking")
    parser.add_argument("--only", nargs="*", default=(), help="run these problems again, in the file there is")
    parser.add_argument("--samplers", nargs="*", default=(), help="run samplers of these labels alone, as `--only`")
    parser.add_argument("--quick", action="store_true", help="4 seeds, few particles")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = collect(quick=options.quick, only=options.only, samplers=options.samplers)
    if (options.only or options.samplers) and options.out.exists():
        report = update(json.loads(options.out.read_text()), report)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    report = json.loads(options.out.read_text())
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix(), options.table.as_posix()))
    if options.picture is not None:
        picture(report, options.picture)


if __name__ == "__main__":
    main()
