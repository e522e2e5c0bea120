r"""Protein variants under a measured reward: the GB1 landscape, where the tilted posterior is a sum that can be done.

    python -m invdiff.bench.gb1 --data FOLDER --out docs/gb1.json --table docs/gb1_table.md [--quick]

Four sites of protein GB1 have 20^4 = 160 000 variants, of which 149 361 have a measured fitness r, relative to the wild
type's (Wu et al. 2016, eLife 5: e16965). The prior is the library's own law: at each site the amino acids of NNK
codons, without the stop. The posterior is ``p(x) exp(r(x) / beta)`` over the measured variants; those that were not
measured have probability zero, which makes the truth an exact sum.
"""

import argparse
import csv
import io
import json
import lzma
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff.bench.discrete import learnt
from invdiff.bench.rounds import write
from invdiff.diagnostics.discrete import DiscreteProblem, marginal_tv, measure_tokens
from invdiff.errors import CatalogueError, InputError, SamplingError
from invdiff.likelihoods import Tabulated
from invdiff.priors.enumerated import EnumeratedPosterior
from invdiff.priors.product_mixture import ProductMixturePrior
from invdiff.problem import Problem
from invdiff.samplers import APS, G2D2, SGDD, SVDD, AnchoredSMC, MaskedGibbs, Sampler, TwistedSMC
from invdiff.solve import solve

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"
SITES = 4
FILE = "gb1_four_sites.csv.xz"
TEMPERATURES = (1.0, 0.5)
"""beta, in units of fitness."""
SEEDS, TOP = 8, 100
"""Chains of a run; the truth's most probable variants that are cells of their own, the rest being one more."""
_THREE, _TWO = "LRS", "AGPTV"  # of the 32 codons NNK three, or two, code for these; one for the others and one for stop


def nnk() -> Tensor:
    """Frequency of each amino acid among NNK codons, stop excluded, float64 (20,)."""
    counts = torch.tensor([3.0 if a in _THREE else 2.0 if a in _TWO else 1.0 for a in ALPHABET], dtype=torch.float64)
    return counts / counts.sum()


def read_fitness(folder: Path) -> Tensor:
    """Fitness of every variant, float64 (20, 20, 20, 20); NaN where it was not measured.

    Raises
    ------
    CatalogueError
        If the file is missing.
    InputError
        If it is not what it should be.
    """
    path = folder / FILE
    if not path.is_file():
        raise CatalogueError(f"The data set gb1 needs {path}; get it and give its folder with --data.")
    try:
        rows = list(csv.reader(io.StringIO(lzma.decompress(path.read_bytes()).decode("ascii"))))
        index = torch.tensor([[ALPHABET.index(a) for a in variant] for variant, _ in rows])
        values = torch.tensor([float(fitness) for _, fitness in rows], dtype=torch.float64)
    except (lzma.LZMAError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} is damaged, or not two columns, variant and fitness: {error}.") from error
    if index.shape[1:] != (SITES,):
        raise InputError(f"{path} holds variants of other lengths than {SITES}.")
    table = torch.full((len(ALPHABET),) * SITES, torch.nan, dtype=torch.float64)
    table[tuple(index.mT)] = values
    return table


def case(fitness: Tensor, temperature: float) -> DiscreteProblem:
    """Tilted posterior at a temperature, with its truth."""
    table = torch.where(torch.isnan(fitness), -torch.inf, fitness / temperature)
    theta = nnk().expand(1, SITES, len(ALPHABET))
    prior = ProductMixturePrior(torch.ones(1, dtype=torch.float64), theta)
    problem = Problem(Tabulated(table))
    return DiscreteProblem(
        name=f"beta {temperature:g}", prior=prior, problem=problem, exact=prior.posterior(problem.likelihood)
    )


def top_kl(tokens: Tensor, exact: EnumeratedPosterior, top: int = TOP) -> float:
    """KL(draws | truth), nats, of the masses of the truth's ``top`` variants and of the rest.

    n exact draws have about top / (2 n), the floor.
    """
    best = exact.log_probs.topk(top)
    p = torch.cat([best.values.exp(), (1.0 - best.values.exp().sum())[None]])
    found = exact.index(tokens)[:, None] == best.indices
    counts = torch.cat([found.sum(0), (~found.any(1)).sum()[None]]).double()
    q = counts / counts.sum()
    return float(torch.where(q > 0, q * (q / p).log(), 0.0).sum())


def runs(*, quick: bool) -> list[tuple[str, Sampler, int]]:
    """Samplers by label, with their draws in a chain; one more learns from its problem."""
    if quick:
        return [("TwistedSMC, no lookahead", TwistedSMC(lookahead=False), 50), ("APS", APS(steps=2, inner_steps=2), 20)]
    return [
        ("TwistedSMC, no lookahead", TwistedSMC(lookahead=False), 2000),
        ("AnchoredSMC", AnchoredSMC(), 2000),
        ("MaskedGibbs", MaskedGibbs(steps=400, blocks=(1, 1, 2, 4)), 1000),
        ("SGDD", SGDD(steps=100), 500),
        ("SVDD, one of 20", SVDD(), 1000),
        ("SVDD, the best of 20", SVDD(alpha=0.0), 1000),
        ("APS", APS(steps=SITES), 500),
        ("APS, no divergence", APS(steps=SITES, kl=0.0), 500),
        ("G2D2", G2D2(steps=10), 500),
    ]


def row(label: str, problem: DiscreteProblem, z: Tensor, fitness: Tensor) -> dict[str, Any]:
    """Figures of draws (chains, draws, 4); variants that were not measured count as fitness 0."""
    rewards = fitness[tuple(z.flatten(0, 1).mT)]
    impossible = torch.isnan(rewards)
    rewards = rewards.nan_to_num()
    return {
        "problem": problem.name,
        "sampler": label,
        "draws": z.shape[1],
        "top_kl": round(sum(top_kl(x, problem.exact) for x in z) / len(z), 4),
        "kl_floor": round(TOP / (2.0 * z.shape[1]), 4),
        "marginal_tv": round(sum(marginal_tv(x, problem.exact) for x in z) / len(z), 4),
        "tv_floor": round(problem.floor(z.shape[1]), 4),
        "fitness": round(float(rewards.mean()), 4),
        "impossible": round(float(impossible.double().mean()), 5),
        "distinct": round(sum(len({tuple(t) for t in x.tolist()}) for x in z) / len(z)),
    }


def collect(fitness: Tensor, *, quick: bool) -> dict[str, Any]:
    """Run every sampler at every temperature."""
    rows: list[dict[str, Any]] = []
    seeds = 2 if quick else SEEDS
    for temperature in TEMPERATURES:
        problem = case(fitness, temperature)
        before = problem.prior.sample(seeds * 2000, seed=2).reshape(seeds, -1, SITES)
        truth = problem.exact.sample(seeds * 2000, seed=1).reshape(seeds, -1, SITES)
        rows += [row("prior", problem, before, fitness), row("exact draws", problem, truth, fitness)]
        for label, given, draws in [*runs(quick=quick), ("AmortisedSMC", None, 50 if quick else 2000)]:
            try:
                sampler = learnt(problem, quick=quick) if given is None else given
                solution = solve(
                    problem.problem,
                    problem.prior,
                    sampler,
                    draws=draws,
                    chains=seeds,
                    dtype=torch.float64,
                    micro_batch=4096,
                )
            except (SamplingError, InputError) as error:  # the latter where there was nothing to learn from
                rows.append({"problem": problem.name, "sampler": label, "draws": draws, "failed": str(error)})
                print(json.dumps(rows[-1]), flush=True)
                continue
            figures = measure_tokens(solution, problem)
            assert not isinstance(solution, list)
            assert solution.tokens is not None
            found = row(label, problem, solution.tokens, fitness)
            found |= {"settings": repr(sampler), "evaluations": solution.about["evaluations_per_draw"]}
            if figures.log_evidence_error is not None and figures.ratio is not None:
                mean, se = figures.ratio
                found |= {
                    "evidence_deviation": round(float(figures.log_evidence_error.abs().mean()), 4),
                    "ratio": round(mean, 4),
                    "ratio_se": round(se, 4),
                }
            rows.append(found)
            print(json.dumps({k: v for k, v in found.items() if k != "settings"}), flush=True)
    return {
        "benchmark": "gb1",
        "quick": quick,
        "chains": seeds,
        "top": TOP,
        "measured": int((~torch.isnan(fitness)).sum()),
        "device": platform.machine() + " CPU",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "rows": rows,
    }


def table(report: dict[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    about = (
        f"{report['measured']} measured variants, {report['chains']} runs of each sampler, means over them; "
        f"{report['device']}, float64; {versions}. KL: of the draws from the truth, nats, in {report['top']} cells of "
        "the truth's most probable variants and one for the rest, and about what as many exact draws have. TV: of one "
        "site's amino acid, mean over sites. Impossible: share of draws that were not measured, which have probability "
        "zero; they count as fitness 0, and among the rest. Evidence: mean deviation of its log, nats, and mean ratio "
        "to the exact one with three standard errors. Passes: evaluations of the prior a draw."
    )
    text = [f"Made from `{source}` by `python -m invdiff.bench.gb1`; not edited by hand.", "", about]
    columns = [
        "sampler",
        "passes",
        "KL",
        "exact draws' KL",
        "TV",
        "mean fitness",
        "impossible",
        "distinct",
        "evidence",
        "ratio",
    ]
    for name in dict.fromkeys(r["problem"] for r in report["rows"]):
        text += ["", f"### {name}", "", "| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
        for r in (r for r in report["rows"] if r["problem"] == name and "failed" not in r):
            evidence = f"{r['evidence_deviation']:.3f}" if "ratio" in r else ""
            ratio = f"{r['ratio']:.3f} ± {3 * r['ratio_se']:.3f}" if "ratio" in r else ""
            passes = f"{r['evaluations']:.0f}" if "evaluations" in r else ""
            cells = [r["sampler"], passes, f"{r['top_kl']:.3f}", f"{r['kl_floor']:.3f}", f"{r['marginal_tv']:.3f}"]
            impossible = f"{r['impossible']:.2%}" if "impossible" in r else ""
            cells += [f"{r['fitness']:.2f}", impossible, f"{r['distinct']} of {r['draws']}", evidence, ratio]
            text.append("| " + " | ".join(cells) + " |")
        failed = [r for r in report["rows"] if r["problem"] == name and "failed" in r]
        text += [f"\nFailed: {r['sampler']}. {r['failed']}" for r in failed]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.gb1", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--quick", action="store_true", help="2 chains of few draws")
    options = parser.parse_args(arguments)
    report = collect(read_fitness(options.data), quick=options.quick)
    write(options.out, report)
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix()))


if __name__ == "__main__":
    main()
