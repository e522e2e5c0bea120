"""What `invdiff.bench.mixtures` measured, as Markdown from its file alone: first the bounds, then every row."""

from dataclasses import dataclass
from math import log, sqrt
from typing import Any

EXACT = "exact draws"
WEIGHTED = "TransportLangevin, weighted, Heun"
UNWEIGHTED = "TransportLangevin, unweighted"
W2_BOUNDS = {"mixture-2": 0.025, "mixture-4": 0.035, "mixture-8": 0.05}
EVIDENCE_BOUNDS = {"mixture-2": 0.15, "mixture-4": 0.15, "mixture-8": 0.2}
TDS_REFERENCE = {"mixture-2": (0.022, 0.04), "mixture-4": (0.037, 0.07), "mixture-8": (0.048, 0.12)}
"""Mean distance and rms error of the evidence that plain code of the same algorithm had, means of 4 runs."""
MODES_BOUND = 0.05
CHAIN_FLOORS, CHAIN_MODES, R_HAT, CHAIN_EVALUATIONS = 2.0, 0.03, 1.01, 20.0
SLOPE = 0.1
"""By how much the exponent of the distance in the number of particles may differ from -1/2."""


@dataclass(frozen=True)
class Gate:
    """A bound, and the figure that is to keep it."""

    claim: str
    bound: str
    figure: str
    met: bool


Row = dict[str, Any]


class Rows:
    """The rows of a report by part, problem and sampler."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.rows: list[Row] = report["rows"]

    def all(self, part: str, problem: str = "", sampler: str = "") -> list[Row]:
        """Return the rows of a part, and of a problem or a sampler if one is named."""
        return [
            r
            for r in self.rows
            if r["part"] == part and problem in {"", r["problem"]} and sampler in {"", r["sampler"]}
        ]

    def pairs(self, part: str, *samplers: str) -> list[tuple[Row, ...]]:
        """Return the rows of these samplers, one tuple a problem, where all are there."""
        problems = dict.fromkeys(r["problem"] for r in self.all(part))
        found = [tuple(self.all(part, p, s)[:1] for s in samplers) for p in problems]
        return [tuple(r[0] for r in rows) for rows in found if all(rows)]


def gates(report: dict[str, Any]) -> list[Gate]:
    """All bounds whose rows are there."""
    rows = Rows(report)
    return [*_law(rows), *_particles(rows), *_steps(rows), *_twisted(rows), *_modes(rows), *_ring(rows), *_chains(rows)]


def _law(rows: Rows) -> list[Gate]:
    found = []
    for r, floor in rows.pairs("mixtures", WEIGHTED, EXACT):
        name, w2, e = r["problem"], r["w2"], r["evidence_error"]
        bound, evidence = W2_BOUNDS[name], EVIDENCE_BOUNDS[name]
        figure = f"{w2['rms']:.4f} (exact draws {floor['w2']['rms']:.4f})"
        found.append(Gate(f"{name}: W2, rms of {r['runs']} runs", f"{bound:g}", figure, w2["rms"] <= bound))
        figure = f"{e['mean']:+.3f} ± {e['se'] or 0.0:.3f} (rms {e['rms']:.3f})"
        found.append(Gate(f"{name}: mean error of log evidence", f"{evidence:g}", figure, abs(e["mean"]) <= evidence))
    for (r,) in rows.pairs("other measurements", WEIGHTED):
        name, e = r["problem"], r["evidence_error"]
        figure, bound = f"{e['mean']:+.3f} ± {e['se'] or 0.0:.3f} (rms {e['rms']:.3f})", EVIDENCE_BOUNDS[name]
        claim = f"{name}, {r['runs']} other measurements: mean error of log evidence"
        found.append(Gate(claim, f"{bound:g}", figure, abs(e["mean"]) <= bound))
    wrong = [s for s in dict.fromkeys(r["sampler"] for r in rows.all("mixtures")) if s.startswith("DPS")]
    for sampler in (UNWEIGHTED, *wrong):
        for (r,) in rows.pairs("mixtures", sampler):
            bound, w2 = W2_BOUNDS[r["problem"]], r["w2"]["rms"]
            found.append(Gate(f"{r['problem']}: {sampler} fails it", f"> {bound:g}", f"{w2:.3f}", w2 > bound))
    return found


def _particles(rows: Rows) -> list[Gate]:
    found = []
    for name in dict.fromkeys(r["problem"] for r in rows.all("particles")):
        own = [(r["particles"], r["w2"]["rms"]) for r in rows.all("particles", name, WEIGHTED)]
        if len(own) < 2:
            continue
        order = slope([(log(n), log(w), 1.0) for n, w in own if n <= 4096])[0]
        listing = ", ".join(f"{w:.4f}" for _, w in own)
        claim = f"{name}: W2 at {', '.join(str(n) for n, _ in own)} particles falls as N^-1/2 up to 4096"
        found.append(Gate(claim, f"-0.5 ± {SLOPE:g}", f"{order:+.2f} ({listing})", abs(order + 0.5) <= SLOPE))
    return found


def _steps(rows: Rows) -> list[Gate]:
    own = [(r["steps"], r["evidence_error"]) for r in rows.all("steps", sampler="AFDPS, half")]
    if len(own) < 2:
        return []
    # log |bias| has the standard error se / |bias|; weights are its inverse square.
    points = [(log(k), log(abs(e["mean"])), (e["mean"] / e["se"]) ** 2) for k, e in own if e["mean"] and e["se"]]
    order, error = slope(points)
    listing = ", ".join(f"{e['mean']:+.4f} ± {e['se']:.4f}" for _, e in own)
    claim = f"AFDPS, half: bias of log evidence at {', '.join(str(k) for k, _ in own)} steps falls to first order"
    bound = "-1 within two standard errors"
    return [Gate(claim, bound, f"{order:+.2f} ± {error:.2f} ({listing})", abs(order + 1.0) <= 2.0 * error)]


def slope(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Slope of a weighted straight line through (x, y, weight), and its standard error for weights 1 / variance."""
    total = sum(w for _, _, w in points)
    x, y = (sum(p[i] * p[2] for p in points) / total for i in (0, 1))
    square = sum(w * (a - x) ** 2 for a, _, w in points)
    return sum(w * (a - x) * (b - y) for a, b, w in points) / square, 1.0 / sqrt(square)


def _twisted(rows: Rows) -> list[Gate]:
    found = []
    for (r,) in rows.pairs("mixtures", "TDS, prior's tau"):
        w2, evidence = TDS_REFERENCE[r["problem"]]
        # Means of 4 runs and of ours scatter; the rms of 4 errors by a factor of sqrt(chi^2_4 / 4), in 95 % below 1.54.
        allowed = w2 + 2.0 * (r["w2"]["se"] or 0.0) * sqrt(r["runs"] / 4.0 + 1.0)
        figure = f"{r['w2']['mean']:.4f}"
        claim = f"{r['problem']}: TDS, mean W2, compatible with plain code's {w2:g} of 4 runs"
        found.append(Gate(claim, f"{allowed:.3f}", figure, r["w2"]["mean"] <= allowed))
        rms = r["evidence_error"]["rms"]
        claim = f"{r['problem']}: TDS, rms error of log evidence, compatible with plain code's {evidence:g} of 4 runs"
        found.append(Gate(claim, f"{1.54 * evidence:.3f}", f"{rms:.3f}", rms <= 1.54 * evidence))
    return found


def _modes(rows: Rows) -> list[Gate]:
    found = []
    for r, free in rows.pairs("wide", "TransportLangevin, weighted", UNWEIGHTED):
        e, u = r["mode_error"], free["mode_error"]
        claim = f"{r['problem']}, {r['runs']} measurements, {r['evaluations']:.0f} evaluations: modes, rms TV"
        figure = f"{e['rms']:.3f} (largest {e['max']:.3f})"
        found.append(Gate(claim, f"{MODES_BOUND:g}", figure, e["rms"] <= MODES_BOUND))
        found.append(
            Gate(
                f"{r['problem']}: {UNWEIGHTED} fails it",
                f"> {MODES_BOUND:g}",
                f"{u['rms']:.3f}",
                u["rms"] > MODES_BOUND,
            )
        )
    return found


def _ring(rows: Rows) -> list[Gate]:
    found = []
    for r, floor in rows.pairs("ring", WEIGHTED, EXACT):
        bound, error = 2.0 * floor["angle_error"]["rms"], r["angle_error"]["rms"]
        figure = f"{error:.3f} (exact draws {floor['angle_error']['rms']:.3f})"
        found.append(Gate("ring: TV of the angle's law, at most two floors", f"{bound:.3f}", figure, error <= bound))
        e = r["evidence_error"]
        figure = f"{e['mean']:+.3f} ± {e['se'] or 0.0:.3f}"
        found.append(Gate("ring: mean error of log evidence", "0.15", figure, abs(e["mean"]) <= 0.15))
    for sampler in (UNWEIGHTED, "DPS, scale 0.03", "DPS, scale 0.3"):
        for r, floor in rows.pairs("ring", sampler, EXACT):
            bound, error = 2.0 * floor["angle_error"]["rms"], r["angle_error"]["rms"]
            found.append(Gate(f"ring: {sampler} fails it", f"> {bound:.3f}", f"{error:.3f}", error > bound))
    return found


def _chains(rows: Rows) -> list[Gate]:
    found = []
    for r, floor in rows.pairs("chains", "DMCMC", EXACT):
        name, ratio, draws = r["problem"], r["w2"]["rms"] / floor["w2"]["rms"], r["particles"]
        met = r["evaluations"] <= CHAIN_EVALUATIONS
        claim = f"{name}: DMCMC, evaluations a draw, burn-in and all"
        found.append(Gate(claim, f"{CHAIN_EVALUATIONS:g}", f"{r['evaluations']:.2f}", met))
        claim = f"{name}: DMCMC, W2 of {draws} draws, rms of {r['runs']} chains, in floors"
        found.append(Gate(claim, f"{CHAIN_FLOORS:g}", f"{ratio:.2f}", ratio <= CHAIN_FLOORS))
        together, hat = r["joint_mode_error"], r["r_hat"]
        claim = f"{name}: DMCMC, modes' TV of four chains of {draws} draws, largest of {r['runs'] // 4} runs"
        figure = f"{together['max']:.3f} (rms {together['rms']:.3f}; one chain {r['mode_error']['rms']:.3f})"
        found.append(Gate(claim, f"{CHAIN_MODES:g}", figure, together["max"] <= CHAIN_MODES))
        claim = f"{name}: DMCMC, split R-hat of four chains, largest of {r['runs'] // 4} runs"
        found.append(Gate(claim, f"< {R_HAT:g}", f"{hat['max']:.4f}", hat["max"] < R_HAT))
        said = "no warning" if not r["warnings"] else "warns"
        found.append(Gate(f"{name}: DMCMC does not warn", "no warning", said, not r["warnings"]))
    for r in rows.all("mixtures", "mixture-8", "DMCMC, 20 evaluations"):
        said = "no warning" if not r["warnings"] else "warns"
        found.append(
            Gate(f"{r['problem']}: DMCMC, whose walkers do not climb, warns", "warns", said, bool(r["warnings"]))
        )
    return found


# The page.

_TITLES = {
    "mixtures": "One measurement of each mixture",
    "other measurements": "Other measurements of the same mixtures",
    "particles": "Number of particles",
    "steps": "Number of steps",
    "wide": "Live modes in 64 dimensions",
    "ring": "A measured radius",
    "chains": "Chains",
}
_COLUMNS = {
    "w2": ("sliced W2", "rms", 4),
    "mode_error": ("modes, TV", "rms", 3),
    "angle_error": ("angle, TV", "rms", 3),
    "radius_error": ("radius, error in std", "mean", 3),
    "radius_std_ratio": ("radius, std ratio", "mean", 3),
    "joint_mode_error": ("modes, TV of 4 chains", "rms", 3),
    "r_hat": ("largest split R-hat", "max", 4),
    "evidence_error": ("log evidence, error", "", 3),
}


def table(report: dict[str, Any], source: str) -> str:
    """Markdown from the file alone; bounds that are not kept are in bold."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    quick = ", --quick: too few particles for the bounds" if report["quick"] else ""
    about = (
        f"Seed {report['seed']}, {report['device']}, {report['dtype']}; {versions}{quick}. A bound that names no "
        f"sampler is of {WEIGHTED}, 20 levels and so 119 evaluations. Figures are over the runs of a row: the rms of "
        "distances, the mean with its standard error of errors that have a sign. Passes: through the network, a draw, "
        "forward + backward."
    )
    text = [f"Made from `{source}` by `python -m invdiff.bench.mixtures`; not edited by hand.", "", about, ""]
    text += ["### Bounds", "", "| claim | bound | measured | kept |", "| --- | ---: | ---: | --- |"]
    text += [f"| {g.claim} | {g.bound} | {g.figure} | {'yes' if g.met else '**no**'} |" for g in gates(report)]
    for part, title in _TITLES.items():
        rows = [r for r in report["rows"] if r["part"] == part]
        if not rows:
            continue
        columns = [k for k in _COLUMNS if any(k in r for r in rows)]
        head = ["problem", "sampler", "steps", "particles", "runs", "passes", *(_COLUMNS[k][0] for k in columns)]
        text += ["", f"### {title}", "", "| " + " | ".join(head) + " |"]
        text.append("|" + "|".join([" --- "] * 2 + [" ---: "] * (len(head) - 2)) + "|")
        for r in rows:
            passes = f"{r['evaluations']:.0f} + {r['backward']:.0f}" if r["steps"] else ""
            cells = [r["problem"], r["sampler"], str(r["steps"] or ""), str(r["particles"]), str(r["runs"]), passes]
            text.append("| " + " | ".join([*cells, *(_cell(r, k) for k in columns)]) + " |")
        said = [f"{r['sampler']} on {r['problem']}: {w}" for r in rows for w in r["warnings"]]
        text += ["", "Warnings given:", "", *(f"- {w}" for w in said)] if said else []
    return "\n".join(text) + "\n"


def _cell(row: Row, key: str) -> str:
    found = row.get(key)
    if found is None:
        return ""
    _, which, digits = _COLUMNS[key]
    if which:
        return f"{found[which]:.{digits}f}"
    return f"{found['mean']:+.3f} ± {found['se'] or 0.0:.3f}"
