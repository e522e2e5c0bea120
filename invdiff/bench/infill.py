r"""Infilling of text with letters lost and misread, where the posterior is known, as one JSON file and a table.

    python -m invdiff.bench.infill --text LICENSE --out docs/infill.json --table docs/infill_table.md

The prior is a Markov chain of 26 letters and the space, with the pairs counted in the first four fifths of a text; the
sentences to fill are from its last fifth. Of their symbols a part is given, a part is read through a channel that errs,
and the rest is lost. There are too many sequences to sum over, and yet the posterior's marginals and its evidence are
known, by the forward-backward recursion over given and read symbols alike: every sampler of tokens is held to them.
"""

import argparse
import json
import platform
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff.bench.rounds import mean_and_error, write
from invdiff.errors import InputError
from invdiff.likelihoods import SymmetricChannel
from invdiff.noise import Noise, stream_key
from invdiff.posterior import Posterior
from invdiff.priors import MarkovChainPrior
from invdiff.priors.chain import forward_backward
from invdiff.priors.enumerated import token_marginals
from invdiff.priors.masked import known_tokens
from invdiff.problem import Problem
from invdiff.samplers import APS, G2D2, SGDD, SVDD, AmortisedSMC, AnchoredSMC, MaskedGibbs, PlugIn, Sampler, TwistedSMC
from invdiff.training.amortise import AmortiseSettings, amortise

ALPHABET = ascii_lowercase + " "
LENGTH, SENTENCES = 40, 4
GIVEN, READ, ERROR_RATE = 0.2, 0.4, 0.2
"""Shares of the symbols that are given, and read; how often the latter are wrong."""
SMOOTHING = 0.1
"""Added to every count of a pair."""
DRAWS = 200


def symbols(text: str) -> Tensor:
    """Letters and single spaces of a text as tokens, (n,)."""
    kept = " ".join("".join(c if c in ascii_lowercase else " " for c in text.lower()).split())
    return torch.tensor([ALPHABET.index(c) for c in kept])


def bigrams(tokens: Tensor, length: int) -> MarkovChainPrior:
    """Fit a Markov chain to the pairs of a text."""
    V = len(ALPHABET)
    counts = torch.zeros(V, V, dtype=torch.float64)
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1, dtype=torch.float64), accumulate=True)
    counts += SMOOTHING
    first = torch.bincount(tokens, minlength=V).double() + SMOOTHING
    return MarkovChainPrior(first / first.sum(), counts / counts.sum(1, keepdim=True), length)


def damaged(truth: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Symbols (length,) that are given, and those that are read; the vocabulary's size where there is none."""
    V, n = len(ALPHABET), len(truth)
    noise = Noise([stream_key(0, "infill", index)], 1, dtype=torch.float64)
    u = noise.uniform(noise.slots, (3, n))[0]
    kind = u[0].argsort().argsort() / n  # exact shares
    other = (truth + 1 + (u[2] * (V - 1)).long().clamp_max(V - 2)) % V
    read = torch.where(u[1] < ERROR_RATE, other, truth)
    return (
        torch.where(kind < GIVEN, truth, V),
        torch.where((kind >= GIVEN) & (kind < GIVEN + READ), read, V),
    )


def exact(prior: MarkovChainPrior, given: Tensor, read: Tensor) -> tuple[Tensor, float]:
    """Marginals (length, V) of the posterior, and log p(read | given)."""
    V = len(ALPHABET)
    known = known_tokens(given, V)
    hit = torch.nn.functional.one_hot(read.clamp_max(V - 1), V).double()
    channel = torch.log((1.0 - ERROR_RATE) * hit + ERROR_RATE / (V - 1) * (1.0 - hit))
    evidence = known + torch.where((read < V)[:, None], channel, 0.0)
    marginals = forward_backward(prior.log_initial, prior.transition, evidence[None])[0].exp()
    return marginals, _total(prior, evidence) - _total(prior, known)


def _total(prior: MarkovChainPrior, evidence: Tensor) -> float:
    """Log of the sum over all sequences."""
    a, log_P = prior.log_initial + evidence[0], prior.transition.log()
    for e in evidence[1:]:
        a = torch.logsumexp(a[:, None] + log_P, dim=0) + e
    return float(torch.logsumexp(a, dim=0))


def runs(posterior: Posterior, *, quick: bool) -> list[tuple[str, Sampler]]:
    """Samplers by label; one of them learns."""
    learning = AmortiseSettings(steps=3, batch=4) if quick else AmortiseSettings(steps=150, through=4)
    proposal = amortise(posterior, learning)[0]
    if quick:
        return [
            ("TwistedSMC, no lookahead", TwistedSMC(lookahead=False)),
            ("AmortisedSMC", AmortisedSMC(proposal=proposal)),
            ("APS", APS(steps=2, inner_steps=2)),
        ]
    return [
        ("TwistedSMC, no lookahead", TwistedSMC(lookahead=False)),
        ("TwistedSMC, no lookahead, order by entropy", TwistedSMC(lookahead=False, order="entropy")),
        ("AnchoredSMC", AnchoredSMC(inner_steps=5, every=4, twist=PlugIn())),
        ("AmortisedSMC", AmortisedSMC(proposal=proposal)),
        ("MaskedGibbs", MaskedGibbs(steps=400, blocks=(1, 2, 4))),
        ("SGDD", SGDD(steps=60, mh_steps=100, prior_steps=8)),
        ("SVDD, one of 20", SVDD()),
        ("APS", APS(steps=20)),
        ("APS, no divergence", APS(steps=20, kl=0.0)),
        ("G2D2", G2D2(steps=20)),
    ]


def collect(text: str, *, quick: bool) -> dict[str, Any]:
    """Fill every sentence with every sampler.

    Raises
    ------
    InputError
        If the text is too short.
    """
    tokens, number, draws = symbols(text), 1 if quick else SENTENCES, 30 if quick else DRAWS
    split = len(tokens) * 4 // 5
    if len(tokens) - split < LENGTH * number:
        raise InputError(f"The text has {len(tokens)} letters and spaces; {5 * LENGTH * number} are needed.")
    prior = bigrams(tokens[:split], LENGTH)
    starts = [split + i * (len(tokens) - split - LENGTH) // max(number - 1, 1) for i in range(number)]
    found: dict[str, list[dict[str, float]]] = {}
    sentences, passes = [], {}
    for i, start in enumerate(starts):
        truth = tokens[start : start + LENGTH]
        given, read = damaged(truth, i)
        marginals, log_evidence = exact(prior, given, read)
        problem = Problem(SymmetricChannel(read, len(ALPHABET), ERROR_RATE), given={"tokens": given})
        posterior = Posterior(problem, prior, dtype=torch.float64)
        unknown = given == len(ALPHABET)
        best = marginals.argmax(1)
        rows = found.setdefault("exact marginals", [])
        rows.append({"wrong": _share(best[unknown] != truth[unknown])})
        filled = {}
        for label, sampler in runs(posterior, quick=quick):
            solution = posterior.sample(sampler, draws, seed=0)
            assert not isinstance(solution, list)
            assert solution.tokens is not None
            z = solution.tokens.flatten(0, 1)
            own = token_marginals(z, torch.full((len(z),), 1.0 / len(z), dtype=torch.float64), len(ALPHABET))
            row = {
                "marginal_tv": float(0.5 * (own - marginals).abs().sum(1)[unknown].mean()),
                "wrong": _share(own.argmax(1)[unknown] != truth[unknown]),
                "distinct": float(len({tuple(t) for t in z.tolist()})),
            }
            if solution.log_evidence is not None:
                row["evidence_error"] = abs(solution.log_evidence - log_evidence)
            found.setdefault(label, []).append(row)
            passes[label] = solution.about["evaluations_per_draw"]
            filled[label] = _text(z[0])
            print(json.dumps({"sentence": i, "sampler": label} | row), flush=True)
        floor = (marginals * (1.0 - marginals) / (2.0 * torch.pi * draws)).sqrt().sum(1)[unknown].mean()
        sentences.append(
            {
                "truth": _text(truth),
                "given": _text(given),
                "read": _text(read),
                "most_likely": _text(best),
                "log_evidence": round(log_evidence, 4),
                "tv_floor": round(float(floor), 4),
                "a_draw": filled,
            }
        )
    return {
        "benchmark": "infill",
        "quick": quick,
        "draws": draws,
        "length": LENGTH,
        "given": GIVEN,
        "read": READ,
        "error_rate": ERROR_RATE,
        "letters_counted": split,
        "device": platform.machine() + " CPU",
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "sentences": sentences,
        "rows": [
            {"sampler": label, "evaluations": passes.get(label)}
            | {key: [round(v, 4) for v in mean_and_error([r[key] for r in rows])] for key in rows[0]}
            for label, rows in found.items()
        ],
    }


def _share(t: Tensor) -> float:
    return float(t.double().mean())


def _text(tokens: Tensor) -> str:
    """Letters; _ for a space, . for what is not known."""
    return "".join((ascii_lowercase + "_.")[t] for t in tokens.tolist())


def table(report: dict[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    floor = sum(s["tv_floor"] for s in report["sentences"]) / len(report["sentences"])
    about = (
        f"{len(report['sentences'])} sentences of {report['length']} symbols, {report['given']:.0%} of them given, "
        f"{report['read']:.0%} read with {report['error_rate']:.0%} of errors, the rest lost; a chain of the pairs in "
        f"{report['letters_counted']} symbols; {report['draws']} draws; {report['device']}, float64; {versions}. TV: "
        f"of the marginals of symbols that are not given, of which chance leaves {floor:.3f}. Wrong: share of those "
        "whose most frequent symbol is not the true one. Evidence: mean deviation of its log, nats. Passes: "
        "evaluations of the prior a draw. Means over sentences with standard errors."
    )
    text = [f"Made from `{source}` by `python -m invdiff.bench.infill`; not edited by hand.", "", about, ""]
    text += ["| sampler | passes | TV | wrong | evidence | distinct draws |", "| --- |" + " ---: |" * 5]
    for r in report["rows"]:
        cells = [r["sampler"], f"{r['evaluations']:.0f}" if r["evaluations"] else ""]
        for key, digits in (("marginal_tv", 3), ("wrong", 3), ("evidence_error", 3)):
            cells.append(f"{r[key][0]:.{digits}f} ± {r[key][1]:.{digits}f}" if key in r else "")
        cells.append(f"{r['distinct'][0]:.0f}" if "distinct" in r else "")
        text.append("| " + " | ".join(cells) + " |")
    text += ["", "The first sentence, a dot where nothing is known and _ for a space:", "", "```text"]
    first = report["sentences"][0]
    names = {"truth": "truth", "given": "given", "read": "read", "most_likely": "exact marginals"}
    text += [f"{first[key]}  {name}" for key, name in names.items()]
    text += [f"{line}  a draw of {label}" for label, line in first["a_draw"].items()]
    return "\n".join([*text, "```"]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.infill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a text in plain ASCII, some thousand letters")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--quick", action="store_true", help="one sentence, few draws")
    options = parser.parse_args(arguments)
    report = collect(options.text.read_text("utf-8"), quick=options.quick)
    write(options.out, report)
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix()))


if __name__ == "__main__":
    main()
