"""Trajectories of many cases, and their files: NetCDF.

A file of trajectories holds variables over (case, their own axes), such as a state over (case, time, x) and a forcing
over (case, window, x), each axis with its coordinate, unit and, where it counts cells or windows, their bounds, after
the CF conventions. What is written is read again without loss. Other programs read it as any NetCDF-4 file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.event import Event, Variable
from invdiff.files import atomic_path, reserve

Plain = str | int | float


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """Coordinate of an axis.

    Parameters
    ----------
    values
        One for each place along the axis, (n,), in ``units``.
    units
        CF units; "1" in equations without dimensions.
    bounds
        Edges (n, 2) of what a value stands for, such as a cell or a window of time; None for points.

    Raises
    ------
    ShapeError
        If the bounds are not two for each value.
    """

    values: Tensor
    units: str = "1"
    bounds: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or (self.bounds is not None and tuple(self.bounds.shape) != (len(self.values), 2)):
            raise ShapeError(
                f"A coordinate has values (n,) and bounds (n, 2), got {tuple(self.values.shape)} and "
                f"{None if self.bounds is None else tuple(self.bounds.shape)}."
            )

    @classmethod
    def between(cls, edges: Tensor, units: str = "1") -> "Axis":
        """Return the axis of the cells between neighbouring edges (n + 1,); its values are their centres."""
        return cls(values=0.5 * (edges[1:] + edges[:-1]), units=units, bounds=torch.stack((edges[:-1], edges[1:]), 1))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    r"""Variables of many cases of an equation.

    Parameters
    ----------
    values
        By name of the variable, (cases, \*its axes), real, in ``units``.
    dims
        Names of each variable's axes after the case.
    axes
        Coordinates by name of the axis; an axis without one is counted from zero.
    units
        CF units by variable; "1" where none is given.
    cases
        Numbers of the cases in their set; from zero if None.
    attributes
        What else there is to know, e.g. viscosity, boundary, seed and setting: text and numbers.

    Raises
    ------
    ShapeError
        If variables, axes and cases do not agree.
    InputError
        If there is no variable, names clash, or an attribute is neither text nor a number.
    """

    values: Mapping[str, Tensor]
    dims: Mapping[str, tuple[str, ...]]
    axes: Mapping[str, Axis] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    cases: Sequence[int] | None = None
    attributes: Mapping[str, Plain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values or set(self.values) != set(self.dims):
            raise InputError(
                f"Trajectories need the axes of every variable, and one variable at least; got the variables "
                f"{sorted(self.values)} and the axes of {sorted(self.dims)}."
            )
        taken = {*sum(self.dims.values(), ()), *self.axes, "case"}
        clash = taken & set(self.values) | {f"{a}_bounds" for a in self.axes} & {*self.values, *taken}
        if clash or any("case" in dims for dims in self.dims.values()):
            raise InputError(
                f"Variables and axes must have names of their own, none of them 'case'; got {sorted(clash)}."
            )
        for name, about in self.attributes.items():
            if isinstance(about, bool) or not isinstance(about, str | int | float):
                raise InputError(f"Attributes are text or numbers, got {name}={about!r}; write it as text.")
        if self.cases is None:
            object.__setattr__(self, "cases", range(len(next(iter(self.values.values())))))
        lengths = {name: len(axis.values) for name, axis in self.axes.items()} | {"case": len(self.cases or ())}
        for name, value in self.values.items():
            dims = ("case", *self.dims[name])
            if len(dims) != value.ndim or any(
                lengths.setdefault(d, n) != n for d, n in zip(dims, value.shape, strict=True)
            ):
                raise ShapeError(
                    f"{name!r} has the shape {tuple(value.shape)} over {dims}, whose lengths are {lengths}."
                )

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.cases or ())

    @property
    def event(self) -> Event:
        """The variables of one case as an unknown."""
        return tuple(
            Variable(
                name=name,
                dims=self.dims[name],
                shape=tuple(value.shape[1:]),
                units=self.units.get(name, "1"),
                coords={d: tuple(self.axes[d].values.tolist()) for d in self.dims[name] if d in self.axes},
            )
            for name, value in self.values.items()
        )


def write_trajectories(path: str | Path, trajectories: Trajectories) -> Path:
    """Write a NetCDF-4 file, whole or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    import xarray as xr

    def arrays(t: Tensor) -> Any:
        return t.detach().cpu().numpy()

    coords: dict[str, Any] = {"case": ("case", torch.tensor(list(trajectories.cases or ()), dtype=torch.int64).numpy())}
    data: dict[str, Any] = {
        name: (("case", *trajectories.dims[name]), arrays(value), {"units": trajectories.units.get(name, "1")})
        for name, value in trajectories.values.items()
    }
    for name, axis in trajectories.axes.items():
        about = {"units": axis.units}
        if axis.bounds is not None:
            about["bounds"] = f"{name}_bounds"
            data[f"{name}_bounds"] = ((name, "edge"), arrays(axis.bounds))
        coords[name] = (name, arrays(axis.values), about)
    set_ = xr.Dataset(data, coords, {"Conventions": "CF-1.11", **trajectories.attributes})
    path = Path(path)
    with atomic_path(path) as partial:
        # HDF5 dies at exit after a write that failed for want of space: take the space first.
        reserve(partial, set_.nbytes)
        # Without fill values: a state that is not finite stays what it is.
        set_.to_netcdf(partial, engine="h5netcdf", encoding={str(v): {"_FillValue": None} for v in set_.variables})
    return path


def read_trajectories(path: str | Path, cases: range | None = None) -> Trajectories:
    """Read what `write_trajectories` wrote, or some of its cases.

    Parameters
    ----------
    path
        File.
    cases
        Places in the file, from 0; only these are read. All if None.

    Raises
    ------
    InputError
        If the file is not there, not NetCDF or of another kind, or does not have these cases.
    """
    import xarray as xr

    path = existing_file(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf", decode_cf=False) as opened:
            if "case" not in opened.dims or "case" not in opened.coords:
                raise InputError(
                    f"{path} is a NetCDF file but holds no trajectories: it has the axes "
                    f"{sorted(map(str, opened.dims))}, needed is 'case' with a coordinate."
                )
            chosen = cases_within(cases, opened.sizes["case"], path)
            found = opened.isel(case=slice(chosen.start, chosen.stop, chosen.step)).load()
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a NetCDF file that this can read, or is damaged ({error}).") from error

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(found[name].values.copy())

    axes = {}
    for name in map(str, found.coords):
        if name != "case":
            bounds = found[name].attrs.get("bounds")
            axes[name] = Axis(
                values=tensor(name),
                units=str(found[name].attrs.get("units", "1")),
                bounds=None if bounds is None else tensor(bounds),
            )
    names = [str(v) for v in found.data_vars if found[v].dims[:1] == ("case",)]
    about = {str(k): v.item() if hasattr(v, "item") else v for k, v in found.attrs.items() if k != "Conventions"}
    return Trajectories(
        values={name: tensor(name) for name in names},
        dims={name: tuple(map(str, found[name].dims[1:])) for name in names},
        axes=axes,
        units={name: str(found[name].attrs.get("units", "1")) for name in names},
        cases=tensor("case").tolist(),
        attributes=about,
    )


def existing_file(path: str | Path) -> Path:
    """Return a path where there is a file; InputError if there is none."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    return path


def cases_within(cases: range | None, count: int, path: Path) -> range:
    """Return the cases that were asked for; InputError if the file does not have them."""
    chosen = range(count) if cases is None else cases
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise InputError(f"{path} has the cases 0 to {count - 1}, got {chosen}.")
    return chosen
