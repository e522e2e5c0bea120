"""The table and the figure of the benchmark of operators."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

_CALLS = {"forward": "A", "adjoint": "adjoint", "gradient": "log-likelihood and gradient", "prox": "proximal step"}


def _number(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a table a size and batch, in microseconds, with the ratio to the fastest peer and the share of a copy.

    The peers are deepinv, each way that it has, and for wavelets ptwt and PyWavelets.

    Parameters
    ----------
    report
        What the benchmark wrote.
    """
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines = [f"{report['device']}, {report['threads']} CPU threads, {report['dtype']}; {versions}."]
    for size, batch in sorted({(c["size"], c["batch"]) for c in report["cells"]}):
        lines += ["", f"### {size} x {size}, batch {batch}", ""]
        lines.append("| operator | call | invdiff, us | peer, us | torch, us | peer / invdiff | copy / invdiff |")
        lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for c in report["cells"]:
            if (c["size"], c["batch"]) != (size, batch):
                continue
            times = c["median_us"]
            ours, torchs = times["invdiff"], times.get("torch")
            peers = [v for k, v in times.items() if k.startswith(("deepinv", "ptwt", "pywavelets"))]
            cells = [_number(ours), _number(min(peers)) if peers else "", _number(torchs) if torchs else ""]
            cells += [f"{min(peers) / ours:.2g}" if peers else "", f"{times['copy'] / ours:.2g}"]
            lines.append(f"| {c['row']} | {_CALLS[c['call']]} | " + " | ".join(cells) + " |")
    if report["left_out"]:
        late = [key for key in report["left_out"] if key.endswith("the deadline passed")]
        others = [key for key in report["left_out"] if key not in late]
        lines += ["", f"Left out: {len(late)} for the deadline" + "".join(f"; {key}" for key in others) + "."]
    return "\n".join(lines) + "\n"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the time of a pixel against the number of pixels, one panel a row, invdiff and its peers; forward only.

    Parameters
    ----------
    report
        What the benchmark wrote.
    path
        Of the figure; its ending says the format.
    """
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(c["row"] for c in report["cells"] if c["call"] == "forward"))
    wide = min(3, max(1, len(rows)))
    high = -(-max(1, len(rows)) // wide)
    figure = Figure(figsize=(3.6 * wide, 2.8 * high), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False, sharex=True)
    libraries = [k for k in dict.fromkeys(k for c in report["cells"] for k in c["median_us"]) if k != "copy"]
    colours = {library: f"C{i}" for i, library in enumerate(libraries)}
    for axis, name in zip(axes.flat, rows, strict=False):
        points: dict[str, list[tuple[int, float]]] = {}
        for c in report["cells"]:
            if c["row"] == name and c["call"] == "forward":
                pixels = prod((c["batch"], c["size"], c["size"]))
                for library, us in c["median_us"].items():
                    points.setdefault(library, []).append((pixels, 1e3 * us / pixels))
        for library, values in points.items():
            best: dict[int, float] = {}  # of several sizes and batches with as many pixels
            for pixels, each in values:
                best[pixels] = min(each, best.get(pixels, each))
            style, colour = (":", "black") if library == "copy" else ("o-", colours[library])
            axis.loglog(*zip(*sorted(best.items()), strict=True), style, color=colour, markersize=3, label=library)
        axis.set_title(name, fontsize="small")
    for axis in axes[:, 0]:
        axis.set_ylabel("ns a pixel of a picture")
    for axis in axes[-1]:
        axis.set_xlabel("pixels in a batch")
    for axis in list(axes.flat)[len(rows) :]:
        axis.set_visible(False)
    shown = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)
