"""A solution as an xarray DataTree in ArviZ's schema, and back; this is where xarray loads.

Groups: ``posterior`` (chain, draw, event), ``particles`` with ``log_weight`` where there were weights,
``tokens`` under a masked prior, ``sample_stats``, ``trace`` (one entry a step), ``observed_data``, ``constant_data``
(the truth); provenance in the root's attributes.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdiff.driver import Info
from invdiff.errors import InputError
from invdiff.event import Event, Variable

if TYPE_CHECKING:
    import xarray as xr

    from invdiff.solution import Solution

_JSON = ("problem_card",)


def _dims(event: Event) -> dict[str, tuple[str, ...]]:
    """Axis names by variable; an axis that two variables have with other values is named after the variable."""
    axes: dict[str, set[tuple[Any, ...]]] = {}
    for v in event:
        for dim, size in zip(v.dims, v.shape, strict=True):
            axes.setdefault(dim, set()).add((size, *v.coords.get(dim, ())))
    # xarray would join such axes and pad both variables with NaN.
    return {v.name: tuple(d if len(axes[d]) == 1 else f"{v.name}_{d}" for d in v.dims) for v in event}


def _array(t: Tensor, lead: tuple[str, ...], variable: Variable, dims: dict[str, tuple[str, ...]]) -> "xr.DataArray":
    import numpy as np
    import xarray as xr

    coords: dict[str, Any] = {d: np.arange(t.shape[i]) for i, d in enumerate(lead)}
    names = dims[variable.name]
    for name, dim, size in zip(names, variable.dims, variable.shape, strict=True):
        coords[name] = np.asarray(variable.coords[dim]) if dim in variable.coords else np.arange(size)
    return xr.DataArray(
        t.numpy(), dims=(*lead, *names), coords=coords, name=variable.name, attrs={"units": variable.units}
    )


def to_tree(solution: "Solution") -> "xr.DataTree":
    """Build the tree."""
    import numpy as np
    import xarray as xr

    event, dims = solution.event, _dims(solution.event)
    chain_draw = ("chain", "draw")
    stats: dict[str, Any] = {"deviance": (chain_draw, solution.deviance.numpy())}
    if solution.ancestors is not None:
        stats["ancestor"] = (chain_draw, solution.ancestors.numpy())
    if solution.chain_log_evidence is not None:
        stats["log_evidence"] = (("chain",), solution.chain_log_evidence.numpy())
    chains, draws = solution.deviance.shape
    coords = {"chain": np.arange(chains), "draw": np.arange(draws)}
    groups: dict[str, Any] = {
        "/posterior": xr.Dataset({v.name: _array(solution.by_chain[v.name], chain_draw, v, dims) for v in event}),
        "/sample_stats": xr.Dataset(stats, coords=coords),
    }
    if solution.particles is not None and solution.log_weights is not None:
        lead = ("chain", "particle")
        groups["/particles"] = xr.Dataset(
            {v.name: _array(solution.particles[v.name], lead, v, dims) for v in event}
        ).assign(log_weight=(lead, solution.log_weights.numpy()))
    if solution.tokens is not None:
        found = {"tokens": ((*chain_draw, "position"), solution.tokens.numpy())}
        if solution.particle_tokens is not None:
            found["particle_tokens"] = (("chain", "particle", "position"), solution.particle_tokens.numpy())
        groups["/tokens"] = xr.Dataset(found)
    if solution.trace:
        columns = {
            f.name: (
                "step",
                np.array(
                    [np.nan if (x := getattr(i, f.name)) is None else x for i in solution.trace], dtype=np.float64
                ),
            )
            for f in fields(Info)
        }
        groups["/trace"] = xr.Dataset(columns, coords={"step": np.arange(1, len(solution.trace) + 1)})
    if solution.measurement is not None:
        y = solution.measurement
        axes = tuple(f"y_dim_{i}" for i in range(y.ndim))
        if len(event) == 1 and y.ndim == len(event[0].dims):
            # A measurement on the unknown's own grid shares the names of its axes.
            axes = tuple(
                d if a == b else f"y_{d}" for d, a, b in zip(event[0].dims, y.shape, event[0].shape, strict=True)
            )
        groups["/observed_data"] = xr.Dataset({"measurement": (axes, y.numpy())})
    if solution.reference is not None:
        groups["/constant_data"] = xr.Dataset({v.name: _array(solution.reference[v.name], (), v, dims) for v in event})
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update(solution.provenance())
    return tree


def _tensors(dataset: Any, event: Event) -> dict[str, Tensor]:
    return {v.name: torch.from_numpy(dataset[v.name].values.copy()) for v in event}


def read_solution(path: Path) -> "Solution":
    """Read a file that `Solution.save` wrote."""
    import xarray as xr

    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        with xr.open_datatree(path, engine="h5netcdf") as opened:
            tree = opened.load()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a NetCDF file that this can read, or is damaged ({error}).") from error
    try:
        return _from_tree(tree)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is a NetCDF file but not a solution that Solution.save wrote ({error!r}).") from error


def _from_tree(tree: "xr.DataTree") -> "Solution":
    """Solution of a tree; KeyError, ValueError or TypeError where it is another tree."""
    from invdiff.solution import Solution, variables_from_json

    attrs = dict(tree.attrs)
    event, is_chain = variables_from_json(attrs.pop("event")), bool(attrs.pop("is_chain"))
    about = {str(k): json.loads(v) if k in _JSON else v.item() if hasattr(v, "item") else v for k, v in attrs.items()}
    groups = tree.children
    stats = groups["sample_stats"].to_dataset()

    def column(dataset: Any, name: str) -> Tensor | None:
        return torch.from_numpy(dataset[name].values.copy()) if name in dataset else None

    trace: tuple[Info, ...] = ()
    if "trace" in groups:
        names = [f.name for f in fields(Info)]
        rows = zip(*(tree["trace"][n].values for n in names), strict=True)
        # NaN, which differs from itself, stands for None.
        entries = ({n: None if x != x else float(x) for n, x in zip(names, row, strict=True)} for row in rows)
        trace = tuple(Info(**entry) for entry in entries)  # type: ignore[arg-type]
    weighted = "particles" in groups
    return Solution(
        event=event,
        by_chain=_tensors(tree["posterior"], event),
        particles=_tensors(tree["particles"], event) if weighted else None,
        log_weights=column(tree["particles"], "log_weight") if weighted else None,
        ancestors=column(stats, "ancestor"),
        tokens=column(tree["tokens"], "tokens") if "tokens" in groups else None,
        particle_tokens=column(tree["tokens"], "particle_tokens") if "tokens" in groups else None,
        chain_log_evidence=column(stats, "log_evidence"),
        is_chain=is_chain,
        deviance=torch.from_numpy(stats["deviance"].values.copy()),
        trace=trace,
        measurement=column(tree["observed_data"], "measurement") if "observed_data" in groups else None,
        reference=_tensors(tree["constant_data"], event) if "constant_data" in groups else None,
        about=about,
    )
