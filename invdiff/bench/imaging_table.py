"""Tables of the benchmark on photographs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from invdiff.bench.contenders import CONTENDERS
from invdiff.bench.tasks import TASKS

_COLUMNS = (
    ("psnr_mean", "PSNR of the mean, dB", 2),
    ("psnr_draw", "PSNR of a draw, dB", 2),
    ("ssim_mean", "SSIM of the mean", 3),
    ("crps", "CRPS x 1000", 2),
    ("coverage", "coverage", 3),
    ("spread_skill", "spread / skill", 2),
    ("chi_square", "chi-square", 2),
)


def _cell(row: Mapping[str, Any], key: str, digits: int, best: float | None) -> str:
    value, error = (1000 * v for v in row[key]) if key == "crps" else row[key]
    text = f"{value:.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if best is not None and value == best else text


def sections(
    rows: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, str],
    names: Sequence[str],
    titles: Sequence[str],
    lead: Callable[[Mapping[str, Any]], list[str]],
) -> list[str]:
    """Lines of one table a task; the best mean of a column that has a best is bold.

    Parameters
    ----------
    rows
        What `test` wrote.
    tasks, names
        Tasks with their titles, and the contenders that were to run.
    titles, lead
        Columns before the figures, the first two of words, and what they hold.
    """
    text = []
    for task, title in tasks.items():
        own = [r for r in rows if r["task"] == task]
        done = [r for r in own if "failed" not in r]
        if not own:
            continue
        best = {
            key: (min if key == "crps" else max)(
                (1000 * r[key][0] if key == "crps" else r[key][0] for r in done), default=None
            )
            for key in ("psnr_mean", "psnr_draw", "ssim_mean", "crps")
        }
        text += ["", f"### {title}", ""]
        head = [*titles, *(c[1] for c in _COLUMNS)]
        text += ["| " + " | ".join(head) + " |", "| --- | --- " + "| ---: " * (len(head) - 2) + "|"]
        for r in sorted(done, key=lambda r: r["crps"][0]):
            cells = [_cell(r, key, digits, best.get(key)) for key, _, digits in _COLUMNS]
            text.append("| " + " | ".join([*lead(r), *cells]) + " |")
        text += [f"\nLeft out: {r['contender']} ({r['library']}). {r['failed']}" for r in own if "failed" in r]
        missing = [name for name in names if name not in {r["contender"] for r in own}]
        text += [f"\nNot run: {', '.join(missing)}."] if missing else []
    return text


def table(report: Mapping[str, Any], source: str, times: Mapping[str, Any] | None = None) -> str:
    """Markdown from the file alone; the best mean of a column that has a best is bold.

    Parameters
    ----------
    report, source
        What `test` wrote, and where.
    times
        What `time` wrote, for the seconds and for their ratio to the network's alone.
    """
    timed = {(r["task"], r["contender"]): r for r in (times["rows"] if times else []) if "failed" not in r}
    n, versions = report["draws"], ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    about = (
        f"{report['pictures']} pictures of {report['side']} x {report['side']}, prior {report['prior']}, noise "
        f"{report['noise_std']}, {n} draws a picture, at most {report['evaluations']} network evaluations a draw"
        f"{', backward passes counted' if report.get('count_backward') else ''}; "
        f"{report['device']}, {report['precision']}; {versions}. Means with standard errors over pictures. Coverage is "
        f"that of the range of {n} draws, {(n - 1) / (n + 1):.3f} if calibrated; spread / skill and the reduced "
        "chi-square of single draws are 1 if calibrated. Passes: through the network, a draw, forward + backward."
    )
    if times:
        about += (
            f" Seconds: {times['pictures']} pictures in one run, {times['device']}, torch "
            f"{times['versions']['torch']}; x network: over the forward passes alone, "
            f"{1000 * times['network_seconds']:.2f} ms for {times['pictures'] * times['draws']} draws."
        )
    text = [f"Made from `{source}` by `python -m invdiff.bench.imaging table`; not edited by hand.", "", about]

    def lead(r: Mapping[str, Any]) -> list[str]:
        cells = [r["library"], r["contender"], f"{r['evaluations']:.0f} + {r['backward']:.0f}"]
        if timed:
            took = timed.get((r["task"], r["contender"]))
            cells += ["", ""] if took is None else [f"{took[k]:.2f}" for k in ("seconds_per_picture", "over_network")]
        return cells

    titles = ["library", "sampler", "passes", *(["s a picture", "x network"] if timed else [])]
    text += sections(report["rows"], TASKS, [c.name for c in CONTENDERS], titles, lead)
    return "\n".join(text) + "\n"
