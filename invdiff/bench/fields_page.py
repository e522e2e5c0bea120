"""The table and the figure of `invdiff.bench.fields`, from its file alone."""

from collections.abc import Iterable, Sequence
from math import log
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MEAN_ERROR = {24: {300: 1.3, 100: 2.8}, 48: {300: 1.3, 100: 2.8}, 64: {300: 1.15, 100: 2.0}}
"""Largest mean error in floors, by side and evaluations."""
VARIANCE = {300: (0.98, 1.02), 100: (0.96, 1.05)}
INSIDE = {300: (0.895, 0.905)}
EVIDENCE, DEVIATION = 4.0, 2.5
"""Nats: mean error, and deviation over measurements."""
EASIER = "inpainting 30 %"  # only the largest side has bounds for it


def bounds(side: int, task: str, evaluations: int) -> dict[str, tuple[float, float]]:
    """Bounds of the gate, and at side 64 of the goal beyond it, by figure."""
    if side not in MEAN_ERROR or (task == EASIER and side != 64):
        return {}
    found: dict[str, tuple[float, float]] = {}
    if evaluations in MEAN_ERROR[side]:
        found["mean_error"] = (0.0, MEAN_ERROR[side][evaluations])
    for name, table_ in (("variance_ratio", VARIANCE), ("inside", INSIDE)):
        if evaluations in table_:
            found[name] = table_[evaluations]
    if side == 24 and evaluations == 300:
        found |= {"log_evidence_error": (-EVIDENCE, EVIDENCE), "log_evidence_deviation": (0.0, DEVIATION)}
    return found


def failures(report: dict[str, Any], name: str = "momentum") -> list[str]:
    """Figures of the gate's sampler outside their bounds, in words; and sides without an evidence that is near."""
    found = []
    rows = [r for r in report["rows"] if r["part"] == "gate" and r["name"] == name]
    for r in rows:
        for figure, (low, high) in bounds(r["side"], r["task"], r["wanted"]).items():
            value = r.get(figure)
            if value is None or not low <= value <= high:
                found.append(f"{r['side']}, {r['task']}, {r['wanted']}: {figure} {value} not in [{low}, {high}]")
    largest = [r for r in rows if r["side"] == 64]
    lacking = [t for t in tasks_of({"rows": largest}, "gate") if needed(r for r in largest if r["task"] == t) is None]
    words = f"no number of evaluations has the evidence within {EVIDENCE:g} nats"
    return found + [f"64, {task}: {words}" for task in lacking]


def needed(rows: Iterable[Row]) -> int | None:
    """Fewest evaluations from which on the evidence's mean error is within its bound; None if there are none."""
    fewest = None
    for r in sorted(rows, key=lambda r: -r["wanted"]):
        if r.get("log_evidence_error") is None or abs(r["log_evidence_error"]) > EVIDENCE:
            break
        fewest = int(r["wanted"])
    return fewest


def best(rows: Iterable[Row]) -> Row:
    """Row of the settings with the least error: that of the mean beyond the floor, and the variance's, as ratios."""

    def error(r: Row) -> float:
        e, v = max(1.0, r["mean_error"]), max(1e-9, r["variance_ratio"])
        return log(e) + abs(log(v))

    return min(rows, key=error)


def frontier(report: dict[str, Any], task: str) -> dict[str, list[Row]]:
    """Contenders' best rows at growing passes, by name."""
    rows = [r for r in report["rows"] if r["part"] == "frontier" and r["task"] == task and r["kind"] >= 0]
    found: dict[str, list[Row]] = {}
    for name in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in rows if r["name"] == name]
        found[name] = [best(r for r in own if r["wanted"] == k) for k in sorted({r["wanted"] for r in own})]
    return found


def tasks_of(report: dict[str, Any], part: str) -> list[str]:
    """Tasks of a part, in their order."""
    return list(dict.fromkeys(r["task"] for r in report["rows"] if r["part"] == part))


def table(report: dict[str, Any], source: str, picture: str | None = None) -> str:
    """Markdown from the file alone, with a picture of the frontier; figures outside their bounds are in bold."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    about = (
        f"{report['draws']} draws of each of {report['measurements']} measurements ({report['frontier_measurements']} "
        f"in the frontier), noise {report['noise_std']:g} on values of deviation {report['std']:g}, seed "
        f"{report['seed']}, {report['device']}; {versions}.{' A quick run.' if report['quick'] else ''}"
    )
    text = [f"Made from `{source}` by `python -m invdiff.bench.fields`; not edited by hand.", "", about]
    for side in sorted({r["side"] for r in report["rows"] if r["part"] == "gate"}):
        text += _gate(report, side)
    if picture is not None:
        text += ["", f"![Error of the mean and variance ratio against passes, by sampler and task]({picture})"]
    for task in tasks_of(report, "frontier"):
        text += _frontier(report, task)
    return "\n".join(text) + "\n"


def _gate(report: dict[str, Any], side: int) -> list[str]:
    head = ["task", "TransportLangevin", "evaluations", "mean error / floor", "variance ratio"]
    head += ["inside the 90 % interval", "whitened norm", "log evidence, nats", "its deviation"]
    digits_of = {"mean_error": 2, "variance_ratio": 3, "inside": 4, "whitened": 3}
    digits_of |= {"log_evidence_error": 1, "log_evidence_deviation": 1}
    text = ["", f"### The gate at {side} x {side}", "", *_head(head, 3)]
    rows = [r for r in report["rows"] if r["part"] == "gate" and r["side"] == side]
    for r in rows:
        limits = bounds(side, r["task"], r["wanted"]) if r["name"] in ("momentum", "default") else {}
        cells = [r["task"], r["name"], str(r["wanted"] or "")]
        for key, digits in digits_of.items():
            value = r.get(key)
            if value is None:
                cells.append("")
                continue
            figure = f"{value:+.{digits}f}" if key == "log_evidence_error" else f"{value:.{digits}f}"
            low, high = limits.get(key, (value, value))
            figure = figure if low <= value <= high else f"**{figure}**"
            cells.append(figure + (f" ({_range(low, high)})" if key in limits else ""))
        text.append("| " + " | ".join(cells) + " |")
    counts = {
        task: needed(r for r in rows if r["task"] == task and r["name"] == "momentum")
        for task in dict.fromkeys(r["task"] for r in rows)
    }
    words = [f"{task} {'more than were run' if k is None else k}" for task, k in counts.items()]
    return [*text, "", f"Evaluations from which on the evidence errs by at most {EVIDENCE:g} nats: {', '.join(words)}."]


def _range(low: float, high: float) -> str:
    if low == 0.0:
        return f"at most {high:g}"
    return f"± {high:g}" if low == -high else f"{low:g} to {high:g}"


def _frontier(report: dict[str, Any], task: str) -> list[str]:
    curves = frontier(report, task)
    passes = sorted({r["wanted"] for rows in curves.values() for r in rows})
    side = next(r["side"] for r in report["rows"] if r["part"] == "frontier")
    text = ["", f"### The frontier at {side} x {side}: {task}", ""]
    text += ["Mean error in floors / variance ratio, by passes through the network, forward and backward.", ""]
    text += _head(["sampler", *(str(k) for k in passes)], 1)
    for name, rows in curves.items():
        by_passes = {r["wanted"]: f"{r['mean_error']:.3g} / {r['variance_ratio']:.3g}" for r in rows}
        text.append("| " + " | ".join([name, *(by_passes.get(k, "") for k in passes)]) + " |")
    gone = [o for o in report["left_out"] if o["task"] == task]
    text += [f"\nLeft out: {o['name']} at {o['wanted']} passes, {o['settings']}: {o['reason']}" for o in gone]
    return text


def _head(names: Sequence[str], left: int) -> list[str]:
    rule = [" --- "] * left + [" ---: "] * (len(names) - left)
    return ["| " + " | ".join(names) + " |", "|" + "|".join(rule) + "|"]


_COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#808080", "#B8860B", "#56B4E9", "#000000")
"""By kind; after Okabe & Ito, told apart with every kind of colour vision, with a darker yellow."""
_COLUMNS = (
    ("mean_error", "error of the mean / floor", (0.7, 50.0)),
    ("variance_ratio", "variance ratio", (0.1, 10.0)),
)


def draw_figure(report: dict[str, Any], path: Path) -> None:
    """Draw the error of the mean and the variance ratio against passes, a row a task; curves end at the edges."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks = tasks_of(report, "frontier")
    with mpl.rc_context({"svg.hashsalt": "invdiff", "font.size": 9}):
        figure = Figure(figsize=(13.0, 5.4 * len(tasks)))
        axes = figure.subplots(len(tasks), len(_COLUMNS), squeeze=False)
        figure.subplots_adjust(left=0.05, right=0.86, top=1.0 - 0.1 / len(tasks), bottom=0.12 / len(tasks), wspace=0.55)
        for i, task in enumerate(tasks):
            for j, (key, label, limits) in enumerate(_COLUMNS):
                _panel(axes[i, j], frontier(report, task), key, limits)
                axes[i, j].set_title(f"{task}: {label}", loc="left")
                axes[i, j].set_xlabel("passes through the network, forward + backward")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _panel(ax: Any, curves: dict[str, list[Row]], key: str, limits: tuple[float, float]) -> None:
    low, high = limits
    ax.set(xscale="log", yscale="log", ylim=limits)
    ax.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    ends = []
    for name, rows in curves.items():
        x = [max(1.0, r["evaluations"] + r["backward"]) for r in rows]
        y = [min(high, max(low, r[key])) for r in rows]
        theirs, colour = rows[0]["library"] == "deepinv", _COLOURS[rows[0]["kind"]]
        heavy = name == "TransportLangevin, momentum"
        ax.plot(
            x,
            y,
            color=colour,
            linestyle=(0, (4, 2)) if theirs else "-",
            linewidth=2.2 if heavy else 0.9,
            marker="s" if theirs else "o",
            markersize=4.0 if heavy else 2.8,
            markerfacecolor="white" if theirs else colour,
            zorder=3 if heavy else 2,
            clip_on=False,
        )
        ends.append((log(y[-1] / low) / log(high / low), x[-1], y[-1], name, colour, heavy))
    ends.sort(key=lambda end: end[:2])
    ax.set_yticks(ticks := [t for t in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0) if low <= t <= high], [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    for place, (_, x_end, y_end, name, colour, heavy) in zip(_spread([e[0] for e in ends]), ends, strict=True):
        ax.annotate(
            name.replace("TransportLangevin", "Transport"),
            (x_end, y_end),
            xytext=(1.09, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            fontweight="bold" if heavy else "normal",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.4,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0.0, 0.5),
            },
        )
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _spread(places: Sequence[float], gap: float = 0.035) -> list[float]:
    """Rising places in [0, 1], moved as little as keeps them a gap apart: neighbours that collide share their mean."""
    groups: list[list[float]] = []
    for p in places:
        groups.append([p])
        while len(groups) > 1 and _first(groups[-1], gap) < _first(groups[-2], gap) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [_first(g, gap) + gap * i for g in groups for i in range(len(g))]


def _first(group: Sequence[float], gap: float) -> float:
    """Lowest place of a group about the mean of what it holds, within [0, 1]."""
    length = gap * (len(group) - 1)
    return min(max(0.0, sum(group) / len(group) - 0.5 * length), max(0.0, 1.0 - length))
