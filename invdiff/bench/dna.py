r"""Promoters under a reward: the evidence for a TATA box, and how natural the sequences stay that are drawn for it.

    python -m invdiff.bench.dna --data FOLDER --out docs/dna.json --table docs/dna_table.md

The reward is the log Bayes factor of one TATA box, at a uniform place of a window, against uniform nucleotides,

    r(x) = log 1/|S| sum_{s in S} prod_j P_j(x_{s + j}) / (1 / 4),

with P a motif that follows the consensus TATAWAAR (W: A or T; R: A or G) in nine of ten sequences at each of its
positions; the consensus is Bucher's (1990, J. Mol. Biol. 212, 563-578), the nine tenths are ours. Sequences are aligned
at the start of transcription, nucleotide 200 of 251, and boxes start 25 to 40 before it. The posterior is
``p(x) exp(r(x) / beta)``: for beta = 1 that of a promoter of which a TATA box was seen. Naturalness is the prior's
bound on bits a nucleotide.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff.bench.rounds import mean_and_error, write
from invdiff.likelihoods import Objective
from invdiff.priors.loading import load_prior
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.problem import Problem
from invdiff.samplers import APS, G2D2, SVDD, AnchoredSMC, MaskedGibbs, PlugIn, Sampler, TwistedSMC
from invdiff.solve import solve
from invdiff.training.sequences import encode, part_of, read_promoters

CONSENSUS = ("T", "A", "T", "A", "AT", "A", "A", "AG")
FIDELITY = 0.9
WINDOW = (160, 176)
"""First places of a box, from nucleotide 0; the start of transcription is nucleotide 200."""
TEMPERATURES = (1.0, 0.5)
MASKS = 32
"""Masks of a sequence for its bits."""


def motif(alphabet: str) -> Tensor:
    """P, probability of each nucleotide at each position of the box, (8, 4)."""
    rows = []
    for letters in CONSENSUS:
        others = (1.0 - FIDELITY) / (len(alphabet) - len(letters))
        rows.append([FIDELITY / len(letters) if a in letters else others for a in alphabet])
    return torch.tensor(rows, dtype=torch.float64)


def reward(x: Tensor, P: Tensor) -> Tensor:
    """Log Bayes factor (n,) of one-hot vectors x (n, length, 4); of laws, that of independent nucleotides."""
    ratios = torch.einsum("nlv,jv->nlj", x, 4.0 * P.to(x))
    first, last = WINDOW
    factor = torch.ones_like(x[:, first:last, 0])
    for j in range(len(P)):
        factor = factor * ratios[:, first + j : last + j, j]
    return factor.mean(1).log()


def consensus(tokens: Tensor, alphabet: str) -> Tensor:
    """Whether a sequence (n, length) has the consensus itself in the window, (n,)."""
    first, last = WINDOW
    found = torch.ones(len(tokens), last - first, dtype=torch.bool)
    for j, letters in enumerate(CONSENSUS):
        fits = torch.tensor([a in letters for a in alphabet])
        found &= fits[tokens.cpu()[:, first + j : last + j]]
    return found.any(1)


def problem(prior: MaskedNetworkPrior, temperature: float) -> Problem:
    """Reward as a likelihood."""
    P = motif(prior.alphabet)
    best = float((4.0 * P).amax(1).log().sum())
    shape = (prior.length, prior.vocabulary_size)
    return Problem(Objective(lambda x: best - reward(x, P), temperature, shape), name=f"TATA box, beta {temperature:g}")


def runs(*, quick: bool) -> list[tuple[str, Sampler]]:
    """Samplers by label."""
    if quick:
        return [("TwistedSMC", TwistedSMC(lookahead=False, twist=PlugIn())), ("APS", APS(steps=4, inner_steps=3))]
    return [
        ("TwistedSMC, no lookahead", TwistedSMC(lookahead=False, twist=PlugIn())),
        ("AnchoredSMC", AnchoredSMC(inner_steps=10, every=16, twist=PlugIn())),
        ("MaskedGibbs", MaskedGibbs(steps=40, blocks=(8, 16))),
        ("SVDD, one of 8", SVDD(steps=32, candidates=8)),
        ("APS", APS(steps=32)),
        ("APS, no divergence", APS(steps=32, kl=0.0)),
        ("G2D2", G2D2(steps=32)),
    ]


def row(label: str, tokens: Tensor, prior: MaskedNetworkPrior) -> dict[str, Any]:
    """Reward and naturalness of sequences."""
    r = reward(prior.decode(tokens).double(), motif(prior.alphabet)).cpu()
    bits = -prior.log_prob_bound(tokens, samples=MASKS)[0].cpu() / (prior.length * torch.tensor(2.0).log())
    levels = torch.quantile(r, torch.tensor([0.1, 0.5, 0.9], dtype=r.dtype)).tolist()
    return {
        "sampler": label,
        "sequences": len(tokens),
        "distinct": len({tuple(t) for t in tokens.tolist()}),
        "reward": [round(v, 4) for v in mean_and_error(r.tolist())],
        "reward_quantiles": [round(v, 3) for v in levels],
        "consensus": round(float(consensus(tokens, prior.alphabet).double().mean()), 4),
        "bits": [round(v, 4) for v in mean_and_error(bits.tolist())],
    }


def collect(prior: MaskedNetworkPrior, options: argparse.Namespace) -> dict[str, Any]:
    """Run every sampler at every temperature, and write after each."""
    device = torch.device(options.device)
    report: dict[str, Any] = {
        "benchmark": "dna",
        "prior": prior.name,
        "prior_key": prior.key,
        "quick": options.quick,
        "window": list(WINDOW),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "rows": [],
    }

    def note(found: dict[str, Any]) -> None:
        report["rows"].append(found)
        write(options.out, report)
        print(json.dumps(found), flush=True)

    if options.data is not None:
        held = [s for _, s in read_promoters(options.data) if part_of(s) == "test"]
        # The file goes class by class.
        tokens = encode(held[:: max(1, len(held) // options.draws)], prior.alphabet)[: options.draws].to(device)
        note({"beta": None} | row("held-out promoters", tokens, prior))
    note({"beta": None} | row("prior", prior.sample(options.draws, seed=1), prior))
    for temperature in TEMPERATURES[:1] if options.quick else TEMPERATURES:
        for label, sampler in runs(quick=options.quick):
            solution = solve(
                problem(prior, temperature), prior, sampler, draws=options.draws, micro_batch=options.micro_batch
            )
            assert not isinstance(solution, list)
            assert solution.tokens is not None
            found = {"beta": temperature} | row(label, solution.tokens.flatten(0, 1).to(device), prior)
            found |= {"settings": repr(sampler), "evaluations": solution.about["evaluations_per_draw"]}
            note(found | {"log_evidence": solution.log_evidence})
    return report


def table(report: dict[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    n = max(r["sequences"] for r in report["rows"])
    about = (
        f"Prior {report['prior']}, {n} sequences; {report['device']}; {versions}. Reward: log Bayes factor of a TATA "
        "box, nats, mean with its standard error, and quantiles of 10, 50 and 90 %. Consensus: share with TATAWAAR "
        "itself in the window. Bits: the prior's bound a nucleotide, with its standard error over sequences. Passes: "
        "evaluations of the prior a draw."
    )
    text = [f"Made from `{source}` by `python -m invdiff.bench.dna`; not edited by hand.", "", about, ""]
    text += ["| beta | sampler | passes | reward | 10, 50, 90 % | consensus | bits | distinct | log evidence |"]
    text += ["| --- | --- |" + " ---: |" * 7]
    for r in report["rows"]:
        beta = "" if r["beta"] is None else f"{r['beta']:g}"
        passes = f"{r['evaluations']:.0f}" if "evaluations" in r else ""
        evidence = "" if r.get("log_evidence") is None else f"{r['log_evidence']:.2f}"
        levels = ", ".join(f"{v:.1f}" for v in r["reward_quantiles"])
        cells = [beta, r["sampler"], passes, f"{r['reward'][0]:.2f} ± {r['reward'][1]:.2f}", levels]
        cells += [f"{r['consensus']:.2f}", f"{r['bits'][0]:.3f} ± {r['bits'][1]:.3f}"]
        text.append("| " + " | ".join([*cells, f"{r['distinct']} of {r['sequences']}", evidence]) + " |")
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.dna", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--data", type=Path, help="folder of promoters.tsv.xz, for held-out promoters beside the draws")
    parser.add_argument("--prior", default="promoters-251")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two samplers, one temperature")
    options = parser.parse_args(arguments)
    prior: Any = load_prior(options.prior)
    report = collect(prior.to(options.device), options)
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix()))


if __name__ == "__main__":
    main()
