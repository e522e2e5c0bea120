"""Pictures of a calibration: rank histograms above, differences of distribution functions below, each with its band.

Figures are made with matplotlib's object interface and the Agg canvas: no window, no global state.
"""

from typing import TYPE_CHECKING

import torch

from invdiff.diagnostics.calibration_ranks import simultaneous_band
from invdiff.diagnostics.calibration_result import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND, _INK, _LINE = "0.88", "#3b6ea5", "#16365c"


def plot_calibration(calibration: Calibration) -> "list[Axes]":
    """Draw the histograms and, below them, ECDF differences.

    A histogram's band holds all its bins at once with a probability of 95 %; the band of the differences all ranks of
    all components of a quantity (with Bonferroni's correction for these), one line a component.

    Parameters
    ----------
    calibration
        What to draw.

    Returns
    -------
        Histograms first, then differences, in the order of the quantities.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, n, total = list(calibration.members), calibration.truths, calibration.draws + 1
    figure = Figure(figsize=(2.3 * len(names) + 0.4, 4.6), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(names), squeeze=False)
    t = torch.arange(total + 1, dtype=torch.float64) / total
    for axes, name in zip(grid[0], names, strict=True):
        h = calibration.histogram(name)
        left = torch.arange(len(h.counts)).double() / len(h.counts)
        width = 1.0 / len(h.counts)
        bottom, height, middle = h.low.tolist(), (h.high - h.low).tolist(), (left + 0.5 * width).tolist()
        axes.bar(middle, height, width, bottom, color=_BAND)
        axes.bar(middle, h.counts.tolist(), 0.9 * width, color=_INK, alpha=0.8)
        axes.axhline(h.expected, color="0.4", lw=0.7, ls="--")
        axes.set_title(f"{name}\np = {calibration.uniformity(name):.2g}", fontsize=8)
        axes.set_xlabel("rank / draws", fontsize=7)
    for axes, name in zip(grid[1], names, strict=True):
        ranks = calibration.ranks[name]
        components = ranks.shape[1]
        low, high = simultaneous_band(n, calibration.draws, 1.0 - 0.05 / components)
        inner = t[1:-1]
        axes.fill_between(inner.tolist(), (low / n - inner).tolist(), (high / n - inner).tolist(), color=_BAND, lw=0)
        edges = torch.arange(total + 1)
        for column in ranks.T:
            below = (column[None] < edges[:, None]).sum(1) / n
            axes.plot(t.tolist(), (below - t).tolist(), color=_LINE, lw=0.9, alpha=max(0.35, 1.0 / components))
        axes.axhline(0.0, color="0.4", lw=0.7, ls="--")
        axes.set_xlabel("rank / draws", fontsize=7)
    grid[0, 0].set_ylabel("truths x components", fontsize=7)
    grid[1, 0].set_ylabel("ECDF less uniform", fontsize=7)
    for axes in grid.flat:
        axes.set_xlim(0.0, 1.0)
        axes.tick_params(labelsize=6.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{calibration.sampler}\n{n} truths, {calibration.draws} draws of each, "
        f"{calibration.evaluations:g} evaluations a draw, p = {calibration.p_value:.2g}",
        fontsize=8,
    )
    return [*grid.flat]
