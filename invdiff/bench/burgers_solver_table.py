"""Tables and figure of the benchmark of the solver of Burgers' equation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GOAL = 1e-3
"""Worst relative L2 error that the published code's speed is compared at."""
Report = Mapping[str, Any]


def quickest(report: Report, call: str, refine: int, dtypes: Sequence[str]) -> dict[str, Any] | None:
    """Return the row with the least time a trajectory, over batches and precisions, of a kind of call on a grid."""
    rows = [r for r in report["rows"] if r["what"] == "time" and (r["call"], r["refine"]) == (call, refine)]
    return min((r for r in rows if r["dtype"] in dtypes), key=lambda r: r["seconds"], default=None)


def accurate(report: Report) -> tuple[int, list[str]] | None:
    """Coarsest grid whose worst error is below `GOAL`, and the precisions in which it is."""
    rows = [r for r in report["rows"] if r["what"] == "error" and r["worst"] < GOAL]
    refine = min((r["refine"] for r in rows), default=None)
    return None if refine is None else (refine, [r["dtype"] for r in rows if r["refine"] == refine])


def _short(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _summary(report: Report) -> str:
    found, published = accurate(report), report["published"]["seconds"]
    if found is None:
        return f"No grid has a worst error below {GOAL:g}."
    refine, dtypes = found
    text = f"The first grid with a worst error below {GOAL:g} is refine={refine}, in {' and '.join(dtypes)}."
    for call in ("forward", "forward and adjoint"):
        best = quickest(report, call, refine, dtypes)
        if best is not None:
            gain = float(f"{published / best['seconds']:.3g}")
            text += (
                f" At batch {best['batch']} in {best['dtype']}, {call} takes {_short(best['seconds'])} a trajectory "
                f"and unit of time: {gain:,.0f} times the trajectories that the published code solves in a second."
            )
    return text


def _device(report: Report) -> str:
    threads = f", {report['threads']} thread{'s' * (report['threads'] > 1)}" if report["device"].endswith("CPU") else ""
    return f"{report['device']}{threads}"


def table(reports: Sequence[Report], sources: Sequence[str]) -> str:
    """Markdown from the files alone: for each device what is gained, the errors, and the times.

    Parameters
    ----------
    reports, sources
        What the benchmark wrote, and where.
    """
    text = []
    for report, source in zip(reports, sources, strict=True):
        versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        made, (fine, check) = report["converged"], report["converged"]["levels"]
        text += [f"Made from `{source}` by `python -m invdiff.bench.burgers_solver`; not edited by hand.", ""]
        text += [f"### {_device(report)}", "", f"{versions}; {report['cases']} random cases. {_summary(report)}", ""]
        text.append(
            f"The converged solution has refine={fine} in float64 ({made['device']}); refine={check} differs from it "
            f"by {made['worst']:.2g} at worst, {made['worst_end']:.2g} at the end."
        )
        text += ["", "Relative L2 error over cases, all times together and at the end:", ""]
        text += ["| refine | cells | precision | worst | median | worst, end | median, end |"]
        text += ["| ---: | ---: | --- | ---: | ---: | ---: | ---: |"]
        for r in report["rows"]:
            if r["what"] == "error":
                cells = " | ".join(f"{r[key]:.2e}" for key in ("worst", "median", "worst_end", "median_end"))
                text.append(f"| {r['refine']} | {r['refine'] * report['points']} | {r['dtype']} | {cells} |")
        timed = [r for r in report["rows"] if r["what"] == "time"]
        batches = sorted({r["batch"] for r in timed})
        text += ["", "Time a trajectory and unit of time, by batch:", ""]
        text += ["| refine | precision | call | " + " | ".join(map(str, batches)) + " |"]
        text += ["| ---: | --- | --- |" + " ---: |" * len(batches)]
        for refine, dtype, call in sorted({(r["refine"], r["dtype"], r["call"]) for r in timed}):
            own = {r["batch"]: r for r in timed if (r["refine"], r["dtype"], r["call"]) == (refine, dtype, call)}
            cells = " | ".join(_short(own[b]["seconds"]) if b in own else "" for b in batches)
            text.append(f"| {refine} | {dtype} | {call} | {cells} |")
        text.append("")
        for r in report["rows"]:
            if r["what"] == "euler":
                text.append(
                    f"A plain PyTorch loop of explicit Euler steps on the published grid takes {_short(r['seconds'])} "
                    f"({r['dtype']}, batch {r['batch']}, from {r['steps']} steps)."
                )
        cited = report["published"]
        text += [f"The published code takes {_short(cited['seconds'])} ({cited['source']}).", ""]
        if report["left_out"]:
            reasons = Counter(entry.rpartition(": ")[2] for entry in report["left_out"])
            text += ["Left out: " + ", ".join(f"{n} times ({why})" for why, n in reasons.items()) + ".", ""]
    return "\n".join(text)


def plot(reports: Sequence[Report], path: Path) -> None:
    """Draw the worst error against the least forward time; a curve a device and precision.

    Parameters
    ----------
    reports
        What the benchmark wrote.
    path
        Of the figure; its ending says the format.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "invdiff", "font.size": 9}):
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        axis = figure.subplots()
        axis.set(xscale="log", yscale="log")
        for i, report in enumerate(reports):
            errors = [r for r in report["rows"] if r["what"] == "error"]
            for dtype in dict.fromkeys(r["dtype"] for r in errors):
                own = [r for r in errors if r["dtype"] == dtype]
                pairs = [(r, quickest(report, "forward", r["refine"], [dtype])) for r in own]
                points = [(best["seconds"], r["worst"], r["refine"]) for r, best in pairs if best is not None]
                if not points:
                    continue
                x, y, refine = zip(*points, strict=True)
                single = dtype == "float32"
                line = ("o-", "full") if single else ("s--", "none")
                label = f"{_device(report)}, {dtype}"
                axis.plot(x, y, line[0], color=f"C{i}", fillstyle=line[1], markersize=5, linewidth=1.0, label=label)
                for a, b, number in zip(x, y, refine, strict=True):
                    offset, side = ((-5, -9), "right") if single else ((5, 3), "left")
                    axis.annotate(str(number), (a, b), offset, textcoords="offset points", fontsize=7, ha=side)
        cited = reports[0]["published"]["seconds"]
        axis.axvline(cited, color="0.4", linestyle=":", linewidth=1.0, label="published code, H100 (cited)")
        axis.axhline(GOAL, color="0.7", linewidth=0.8, zorder=0)
        axis.set_xlabel("seconds a trajectory and unit of time, at the best batch; numbers are cells in a control cell")
        axis.set_ylabel("worst relative L2 error")
        axis.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
