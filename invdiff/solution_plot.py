"""Pictures of a solution: measurement, mean, standard deviation, draws and truth, on a figure of its own.

Figures are made with matplotlib's object interface and the Agg canvas: no window, no global state, no change of the
user's own figures or settings.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdiff.errors import CapabilityError, InputError
from invdiff.event import Variable
from invdiff.files import atomic_path
from invdiff.solution import Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL, _TITLE, _HEAD, _BAR = 1.75, 0.24, 0.34, 0.68  # inches: long side of a panel, its title, heading, colour bar
_GAP = 0.08
_WORDS = 1.2  # width of the longest title
_DPI = 160
_GREY = 0.72  # what inpainting has not seen


def plot_solution(solution: Solution, draws: int = 3) -> "Figure":
    """Measurement, mean, truth, standard deviation and draws.

    Pictures (one or three channels, values in [0, 1], clipped for show) are panels without interpolation, so a
    down-sampled measurement keeps its pixels; one that is far from pixel values, such as counts, is scaled. The
    standard deviation is the root of the channels' mean variance, and where there is a truth, the error of the mean
    stands below it in the same colours. One-dimensional unknowns are the mean with the band of 90 % (of all draws,
    where there are fewer than 19).

    Parameters
    ----------
    solution
        A solution with one variable that is a picture, or whose variables are one-dimensional.
    draws
        Number of draws to show, from the first on.

    Raises
    ------
    CapabilityError
        If the unknown is neither.
    InputError
        If draws is negative.
    """
    if draws < 0:
        raise InputError(f"The number of draws to show must not be negative, got {draws}.")
    event = solution.event
    if len(event) == 1 and _is_picture(event[0].shape):
        return _pictures(solution, event[0], draws)
    if all(len(v.shape) == 1 for v in event):
        return _curves(solution, draws)
    raise CapabilityError(
        "Pictures with 1 or 3 channels and one-dimensional unknowns can be plotted, not "
        f"{', '.join(f'{v.name} of shape {v.shape}' for v in event)}; plot parts of solution.data, an xarray tree."
    )


def save_picture(figure: "Figure", path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    path = Path(path)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": "invdiff"})
    return path


def _is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def _shown(x: Tensor) -> Any:
    """(c, h, w) or (h, w) as an array (h, w) or (h, w, 3) in [0, 1]."""
    x = x.float().clamp(0.0, 1.0)
    if x.ndim == 3:
        x = x[0] if len(x) == 1 else x.permute(1, 2, 0)
    return x.numpy()


def _over_channels(x: Tensor) -> Any:
    """Root mean square over the channels: (c, h, w) -> (h, w)."""
    return (x.double() ** 2).mean(0).sqrt().numpy() if x.ndim == 3 else x.abs().double().numpy()


def _measured_picture(solution: Solution) -> Tensor | None:
    """Show the measurement as a picture; inpainting's is put back into its frame, grey where nothing was seen.

    Counts, line integrals and magnitudes are no pixel values: what passes them by far is scaled to its largest values.
    """
    y = solution.measurement
    if y is None or y.is_complex():
        return None
    if _is_picture(tuple(y.shape)):
        largest = y.flatten().kthvalue(max(1, round(0.995 * y.numel()))).values
        return y / largest if float(largest) > 1.5 else y  # noise takes pixel values a little past 1
    fill = getattr(getattr(solution.likelihood, "operator", None), "fill", None)
    if fill is None:
        return None
    picture: Tensor = fill(y[None], _GREY)[0]
    return picture if _is_picture(tuple(picture.shape)) else None


def _pictures(solution: Solution, variable: Variable, draws: int) -> "Figure":
    samples, mean = solution.by_chain[variable.name].flatten(0, 1), torch.as_tensor(solution.mean())
    truth = None if solution.reference is None else solution.reference[variable.name]
    measured = _measured_picture(solution)
    single = len(samples) == 1
    top = [("Measurement", _shown(measured))] if measured is not None else []
    top += [("Draw 1" if single else "Mean", _shown(mean))] + ([("Truth", _shown(truth))] if truth is not None else [])
    maps = [] if single else [("Standard deviation", _over_channels(torch.as_tensor(solution.std())))]
    if truth is not None:
        maps.append(("Error of the draw" if single else "Error of the mean", _over_channels(mean - truth)))
    count = 0 if single else min(draws, len(samples))
    # The maps share a colour scale and stand below each other in the last column; draws fill what is free below the
    # first row.
    columns = len(top)
    wide = columns + (1 if maps else 0)
    cells = {(0, i): cell for i, cell in enumerate(top)}
    free = ((r, c) for r in range(1, count + 2) for c in range(wide) if c < columns or r >= len(maps))
    cells |= {slot: (f"Draw {i + 1}", _shown(samples[i])) for i, slot in zip(range(count), free, strict=False)}
    rows = max(len(maps), 1 + max(row for row, _ in cells))

    h, w = mean.shape[-2:]
    height, width = _PANEL * h / max(h, w), _PANEL * w / max(h, w)
    pitch = max(width, _WORDS)
    size = (
        wide * pitch + (wide + 1) * _GAP + (_BAR if maps else 0.0),
        rows * (height + _TITLE) + rows * _GAP + _HEAD,
    )
    figure = _figure(size)

    def place(row: int, column: int) -> tuple[float, float, float, float]:
        left = _GAP + column * (pitch + _GAP) + 0.5 * (pitch - width)
        bottom = size[1] - _HEAD - (row + 1) * (height + _TITLE) - row * _GAP
        return (left / size[0], bottom / size[1], width / size[0], height / size[1])

    for (row, column), (title, values) in cells.items():
        axes = _panel(figure, place(row, column), title)
        axes.imshow(values, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
    if maps:
        ceiling = max(float(torch.as_tensor(values).quantile(0.995)) for _, values in maps) or 1.0
        shown: Any = None
        for row, (title, values) in enumerate(maps):
            axes = _panel(figure, place(row, columns), title)
            shown = axes.imshow(values, cmap="magma", vmin=0.0, vmax=ceiling, interpolation="nearest", aspect="auto")
        (_, bottom, _, _), (_, first, _, high) = place(len(maps) - 1, columns), place(0, columns)
        bar = figure.add_axes(((size[0] - _BAR) / size[0], bottom, 0.11 / size[0], first + high - bottom))
        colours = figure.colorbar(shown, cax=bar, extend="max")
        colours.set_label(_units(variable), fontsize=7)
        colours.outline.set_visible(False)
        bar.tick_params(labelsize=6.5, length=2, pad=2)
    _heading(figure, solution)
    return figure


def _curves(solution: Solution, draws: int) -> "Figure":
    event = solution.event
    figure = _figure((6.4, _HEAD + 0.15 + 2.3 * len(event)))
    for i, v in enumerate(event):
        low = (_HEAD + 0.15 + 2.3 * (i + 1)) / figure.get_figheight()
        axes = figure.add_axes((0.115, 1.0 - low + 0.42 / figure.get_figheight(), 0.865, 1.8 / figure.get_figheight()))
        samples = solution.by_chain[v.name].flatten(0, 1)
        t = list(v.coords.get(v.dims[0], range(v.shape[0])))
        if len(samples) >= 19:
            from invdiff import metrics

            low_edge, high_edge, label = (
                metrics.quantile(samples, 0.05),
                metrics.quantile(samples, 0.95),
                "90 % interval",
            )
        else:
            low_edge, high_edge, label = samples.amin(0), samples.amax(0), f"range of {len(samples)} draws"
        axes.fill_between(t, low_edge.numpy(), high_edge.numpy(), color="#3b6ea5", alpha=0.22, lw=0, label=label)
        for j in range(min(draws, len(samples))):
            axes.plot(t, samples[j].numpy(), color="#3b6ea5", lw=0.6, alpha=0.55, label="draws" if j == 0 else None)
        axes.plot(t, samples.mean(0).numpy(), color="#16365c", lw=1.4, label="mean")
        if solution.reference is not None:
            axes.plot(t, solution.reference[v.name].numpy(), color="#c2571a", lw=1.2, ls="--", label="truth")
        y = solution.measurement
        if y is not None and len(event) == 1 and tuple(y.shape) == v.shape and not y.is_complex():
            axes.plot(t, y.numpy(), ".", color="0.35", ms=3, label="measurement", zorder=0)
        axes.set_xlabel(v.dims[0], fontsize=8)
        axes.set_ylabel(v.name if v.units == "1" else f"{v.name} [{v.units}]", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            fontsize=7, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(-0.01, 0.98), borderaxespad=0.1
        )
    _heading(figure, solution)
    return figure


def _figure(size: tuple[float, float]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _panel(figure: "Figure", place: tuple[float, float, float, float], title: str) -> Any:
    axes = figure.add_axes(place)
    axes.set_title(title, fontsize=8.5, pad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _heading(figure: "Figure", solution: Solution) -> None:
    about, (chains, draws) = solution.about, solution.deviance.shape
    words = [str(about[k]) for k in ("problem", "prior", "sampler") if k in about]
    total = chains * draws
    text = "  ·  ".join([*words, f"{total} draw{'s' if total != 1 else ''}"])
    left = _GAP / figure.get_figwidth()
    figure.text(left, 1.0 - 0.1 / figure.get_figheight(), text, fontsize=9, weight="bold", va="top")


def _units(variable: Variable) -> str:
    if variable.units == "1":
        return "pixel value (0 to 1)" if len(variable.shape) == 3 else "dimensionless"
    return variable.units
