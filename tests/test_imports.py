"""What `import invdiff` costs, and that the packages' rooms load alone."""

import subprocess
import sys

import pytest

HEAVY = {
    "xarray",
    "scipy",
    "numba",
    "matplotlib",
    "deepinv",
    "pydantic",
    "skimage",
    "PIL",
    "typer",
    "rich",
    "pandas",
    "h5netcdf",
    "netCDF4",
    "ptwt",
    "pywt",
    "pooch",
}


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_library_loads_nothing_heavy():
    # Against torch alone: whatever torch brings along is not ours.
    names = "import sys; print('\\n'.join({m.split('.')[0] for m in sys.modules}))"
    ours = set(fresh(f"import invdiff; {names}").split()) - set(fresh(f"import torch, numpy; {names}").split())
    assert "invdiff" in ours
    assert not ours & HEAVY


def test_importing_the_library_leaves_the_global_random_state_alone():
    code = (
        "import torch; s = torch.get_rng_state(); t = torch.get_default_dtype(), torch.get_num_threads(); "
        "import invdiff; "
        "print(torch.equal(s, torch.get_rng_state()), t == (torch.get_default_dtype(), torch.get_num_threads()))"
    )
    assert fresh(code).split() == ["True", "True"]


@pytest.mark.parametrize("room", ["operators", "priors", "samplers", "solution"])
def test_every_room_can_be_imported_first(room):
    assert fresh(f"import invdiff.{room}; print('done')").strip() == "done"
