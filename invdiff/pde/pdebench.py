"""One-dimensional sets of PDEBench as trajectories.

PDEBench (Takamoto et al. 2022, arXiv 2210.07182) keeps its one-dimensional sets as HDF5: ``tensor`` (case, time, x)
for advection, Burgers' and reaction-diffusion equations, ``density``, ``pressure`` and ``Vx`` for compressible flow,
with ``x-coordinate`` and ``t-coordinate``, the latter in most files with one time after the last state's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from invdiff.errors import InputError, ShapeError
from invdiff.pde.trajectory_files import Axis, Trajectories, cases_within, existing_file

_FAMILIES: Mapping[str, Mapping[str, str]] = {
    "advection, Burgers' or reaction-diffusion equation": {"tensor": "state"},
    "compressible flow": {"density": "density", "Vx": "velocity", "pressure": "pressure"},
}
"""Keys of PDEBench's files, and our names."""
_GRID = ("t-coordinate", "x-coordinate")


def read_pdebench(
    path: str | Path, cases: range | None = None, *, every_time: int = 1, every_point: int = 1
) -> Trajectories:
    """Read a one-dimensional set of PDEBench, or some of its cases.

    ``tensor`` becomes the variable "state"; ``density``, ``Vx`` and ``pressure`` become "density", "velocity" and
    "pressure", all over (case, time, x), in their own dtype and without units. The file's attributes are kept.

    Parameters
    ----------
    path
        File.
    cases
        Places in the file, from 0; only these are read. All if None.
    every_time, every_point
        Take every so-manieth state and point, beginning with the first.

    Raises
    ------
    InputError
        If the file is not there, not HDF5, of a family that is not known, or does not have these cases; or a stride is
        less than 1.
    ShapeError
        If the file's variables and coordinates do not agree.
    """
    import h5py

    path = existing_file(path)
    if min(every_time, every_point) < 1:
        raise InputError(f"Strides are at least 1, got every_time={every_time} and every_point={every_point}.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is not an HDF5 file, or is damaged ({error}).") from error
    with file:
        keys = _family(file, path)
        shape = tuple(file[next(iter(keys))].shape)
        t, x = (torch.from_numpy(file[name][...]) for name in _GRID)
        uneven = {key: tuple(file[key].shape) for key in keys if tuple(file[key].shape) != shape}
        if len(shape) != 3 or uneven or len(x) != shape[2] or len(t) not in (shape[1], shape[1] + 1):
            raise ShapeError(
                f"{path} should hold variables (case, time, x) of one shape, with as many x-coordinates as points, and "
                f"as many t-coordinates as states or one more; got {shape}{f' and {uneven}' if uneven else ''} with "
                f"{len(x)} and {len(t)}. Sets of two or three dimensions are not read."
            )
        chosen = cases_within(cases, shape[0], path)
        # Strides of cases may go down, which HDF5 does not know.
        part = slice(min(chosen), max(chosen) + 1, abs(chosen.step))
        values = {name: torch.from_numpy(file[key][part, ::every_time, ::every_point]) for key, name in keys.items()}
        about = {k: v.item() if hasattr(v, "item") and v.ndim == 0 else str(v) for k, v in file.attrs.items()}
    return Trajectories(
        values=values if chosen.step > 0 else {name: v.flip(0) for name, v in values.items()},
        dims=dict.fromkeys(values, ("time", "x")),
        axes={"time": Axis(values=t[: shape[1] : every_time]), "x": Axis(values=x[::every_point])},
        cases=chosen,
        attributes=about,
    )


def _family(file: Any, path: Path) -> Mapping[str, str]:
    """Keys of the file's family."""
    for keys in _FAMILIES.values():
        if all(key in file for key in (*keys, *_GRID)):
            return keys
    known = "; ".join(f"{', '.join((*keys, *_GRID))} ({family})" for family, keys in _FAMILIES.items())
    there = sorted(map(str, file))
    listed = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
    raise InputError(f"{path} is no set of PDEBench that is known: it has {listed or 'nothing'}; needed are {known}.")
