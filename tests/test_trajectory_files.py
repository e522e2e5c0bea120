"""Files of trajectories: ours back without loss, PDEBench's two families, and clear errors."""

import h5py
import numpy as np
import pytest
import torch
import xarray as xr

from invdiff.errors import InputError, ShapeError
from invdiff.pde import Axis, Trajectories, read_pdebench, read_trajectories, write_trajectories

F64 = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def burgers() -> Trajectories:
    x, t = Axis.between(torch.linspace(0.0, 1.0, 7, dtype=F64)), torch.linspace(0.0, 0.8, 5, dtype=F64)
    state = rand(3, 5, 6)
    state[1, 2, 3] = torch.nan  # a solution that ended
    return Trajectories(
        values={"state": state, "forcing": rand(3, 4, 6, seed=1, dtype=torch.float32), "initial": state[:, 0]},
        dims={"state": ("time", "x"), "forcing": ("window", "x"), "initial": ("x",)},
        axes={"time": Axis(values=t, units="s"), "window": Axis.between(t, "s"), "x": x},
        units={"state": "m s-1", "forcing": "m s-2", "initial": "m s-1"},
        cases=range(7, 10),
        attributes={"viscosity": 0.01, "boundary": "wall", "seed": 1, "setting": "wdno"},
    )


def same(a: Trajectories, b: Trajectories) -> None:
    assert list(a.cases) == list(b.cases)
    assert (a.event, dict(a.attributes)) == (b.event, dict(b.attributes))
    for name, value in a.values.items():
        torch.testing.assert_close(b.values[name], value, rtol=0, atol=0, equal_nan=True)
    for name, axis in a.axes.items():
        other = b.axes[name]
        assert torch.equal(axis.values, other.values)
        assert axis.units == other.units
        assert (axis.bounds is None) == (other.bounds is None)
        if axis.bounds is not None:
            assert torch.equal(axis.bounds, other.bounds)


def test_what_is_written_is_read(tmp_path):
    written = burgers()
    path = write_trajectories(tmp_path / "b.nc", written)
    read = read_trajectories(path)
    same(written, read)
    assert isinstance(read.attributes["seed"], int)
    assert [v.name for v in read.event] == ["state", "forcing", "initial"]
    assert read.event[1].coords["window"] == pytest.approx((0.1, 0.3, 0.5, 0.7))
    assert len(list(tmp_path.iterdir())) == 1


def test_some_cases_are_read(tmp_path):
    written = burgers()
    path = write_trajectories(tmp_path / "b.nc", written)
    for cases in (range(1, 3), range(0, 3, 2), range(2, 0, -1)):
        read = read_trajectories(path, cases)
        assert list(read.cases) == [7 + i for i in cases]
        assert torch.equal(read.values["forcing"], written.values["forcing"][list(cases)])
    with pytest.raises(InputError, match=r"has the cases 0 to 2, got range\(2, 4\)"):
        read_trajectories(path, range(2, 4))


def test_other_programs_read_units_and_bounds(tmp_path):
    with xr.open_dataset(write_trajectories(tmp_path / "b.nc", burgers()), decode_timedelta=False) as found:
        assert found["state"].dims == ("case", "time", "x")
        assert found["forcing"].attrs["units"] == "m s-2"
        assert found["window"].attrs["units"] == "s"
        assert (found.attrs["boundary"], found.attrs["viscosity"]) == ("wall", 0.01)
        np.testing.assert_allclose(found["window_bounds"][1], [0.2, 0.4])
        np.testing.assert_allclose(found["x"], (np.arange(6) + 0.5) / 6)


def test_flow_has_three_variables(tmp_path):
    names = ("density", "velocity", "pressure")
    flow = Trajectories(
        values={name: rand(2, 3, 4, seed=i, dtype=torch.float32) for i, name in enumerate(names)},
        dims=dict.fromkeys(names, ("time", "x")),
    )
    path = write_trajectories(tmp_path / "f.nc", flow)
    same(flow, read_trajectories(path))


def pdebench(path, keys=("tensor",), extra: int = 1, **attributes):
    data = {key: rand(4, 5, 8, seed=i, dtype=torch.float32).numpy() for i, key in enumerate(keys)}
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
        file["x-coordinate"] = ((np.arange(8) + 0.5) / 8).astype(np.float32)
        file["t-coordinate"] = 0.01 * np.arange(5 + extra, dtype=np.float32)
        file.attrs.update(attributes)
    return data


@pytest.mark.parametrize("extra", [0, 1])
def test_pdebench_of_one_state(tmp_path, extra):
    data = pdebench(tmp_path / "a.hdf5", extra=extra, beta=0.4)
    found = read_pdebench(tmp_path / "a.hdf5")
    assert torch.equal(found.values["state"], torch.from_numpy(data["tensor"]))
    assert found.dims["state"] == ("time", "x")
    np.testing.assert_allclose(found.axes["time"].values, 0.01 * np.arange(5), rtol=1e-6)
    np.testing.assert_allclose(found.axes["x"].values, (np.arange(8) + 0.5) / 8)
    assert found.attributes == {"beta": 0.4}
    write_trajectories(tmp_path / "a.nc", found)
    same(found, read_trajectories(tmp_path / "a.nc"))


def test_pdebench_of_flow_in_parts(tmp_path):
    data = pdebench(tmp_path / "c.hdf5", ("density", "pressure", "Vx"), eta=1e-8, zeta=1e-8)
    for cases in (range(1, 4), range(3, -1, -1), range(3, 0, -2), range(0, 4, 3)):
        found = read_pdebench(tmp_path / "c.hdf5", cases, every_time=2, every_point=3)
        assert list(found.values) == ["density", "velocity", "pressure"]
        for name, key in (("density", "density"), ("velocity", "Vx"), ("pressure", "pressure")):
            np.testing.assert_array_equal(found.values[name], data[key][list(cases), ::2, ::3])
        assert list(found.cases) == list(cases)
    np.testing.assert_allclose(found.axes["time"].values, [0.0, 0.02, 0.04], rtol=1e-6)
    np.testing.assert_allclose(found.axes["x"].values, [0.5 / 8, 3.5 / 8, 6.5 / 8])


def test_files_that_are_something_else(tmp_path):
    text, path = tmp_path / "t.hdf5", tmp_path / "p.hdf5"
    text.write_text("no HDF5")
    for read in (read_pdebench, read_trajectories):
        with pytest.raises(InputError, match=r"There is no file .*nothing\.nc"):
            read(tmp_path / "nothing.nc")
    with pytest.raises(InputError, match=r"t\.hdf5 is not an HDF5 file"):
        read_pdebench(text)
    with pytest.raises(InputError, match=r"t\.hdf5 is not a NetCDF file"):
        read_trajectories(text)
    pdebench(path, ("density", "pressure"))
    with pytest.raises(
        InputError,
        match=r"it has density, pressure, t-coordinate, x-coordinate; needed are tensor.*Vx.*\(compressible flow",
    ):
        read_pdebench(path)
    xr.Dataset({"a": ("x", np.zeros(3))}).to_netcdf(tmp_path / "o.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=r"holds no trajectories: it has the axes \['x'\]"):
        read_trajectories(tmp_path / "o.nc")
    with pytest.raises(InputError, match="Cannot write"):
        write_trajectories(tmp_path / "no folder" / "b.nc", burgers())


def test_pdebench_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "p.hdf5"
    pdebench(path)
    with pytest.raises(InputError, match="Strides are at least 1, got every_time=0"):
        read_pdebench(path, every_time=0)
    for cases in (range(0), range(3, 5), range(-1, 2)):
        with pytest.raises(InputError, match="has the cases 0 to 3, got range"):
            read_pdebench(path, cases)
    pdebench(path, extra=2)
    with pytest.raises(ShapeError, match=r"got \(4, 5, 8\) with 8 and 7"):
        read_pdebench(path)
    with h5py.File(path, "w") as file:
        file["tensor"], file["x-coordinate"], file["t-coordinate"] = np.zeros((2, 3, 4, 4)), np.zeros(4), np.zeros(3)
    with pytest.raises(ShapeError, match="two or three dimensions are not read"):
        read_pdebench(path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": {}, "dims": {}}, InputError, "one variable at least"),
        ({"dims": {"u": ("time",)}}, ShapeError, r"'u' has the shape \(2, 3, 4\) over \('case', 'time'\)"),
        ({"axes": {"x": Axis(values=torch.zeros(5))}}, ShapeError, "'x': 5"),
        ({"cases": [1, 2, 3]}, ShapeError, "'case': 3"),
        ({"dims": {"u": ("u", "x")}}, InputError, r"names of their own, .* got \['u'\]"),
        ({"attributes": {"periodic": True}}, InputError, "periodic=True; write it as text"),
    ],
)
def test_trajectories_agree_within(change, error, message, unchecked):
    with pytest.raises(error, match=message):
        Trajectories(**{"values": {"u": torch.zeros(2, 3, 4)}, "dims": {"u": ("time", "x")}} | change)


def test_bounds_are_two_for_each_value(unchecked):
    with pytest.raises(ShapeError, match=r"bounds \(n, 2\), got \(3,\) and \(3,\)"):
        Axis(values=torch.zeros(3), bounds=torch.zeros(3))
