"""Training data of trajectory priors, made by the project's solver: Burgers' equation with random forcing.

Three laws share initial states and grid and differ in the forcing. "published" is the setting's own
(`pde.burgers_data`). "weak" multiplies it by a factor uniform in (0, 1). "local" adds eight bumps that are narrower and
of more unequal size: widths log-uniform from a twelfth of the published median to the widest, amplitudes multiplied by
the square of a uniform number. A prior that has seen these too can find controls that cost less than random forcing.

Case i of a seed and a law depends on these alone. Cases are solved in float32 on several processes.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import log
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.noise import Noise, stream_key
from invdiff.pde.burgers_data import BurgersSetting, bumps, burgers_cases

Law = Literal["published", "weak", "local"]
_CHUNK, _BUMPS = 250, 8


def forced(setting: BurgersSetting, indices: range, law: Law, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw initial states (n, points) and forcing (n, windows, points) of some cases, float64.

    Raises
    ------
    CatalogueError
        If there is no such law.
    """
    if law not in get_args(Law):
        raise CatalogueError.unknown("law of the forcing", law, get_args(Law))
    initial, forcing = burgers_cases(setting, indices, seed=seed)
    if law == "published":
        return initial, forcing
    noise = Noise([stream_key(seed, "burgers", law, i) for i in indices], 1, dtype=torch.float64)
    U = noise.uniform(noise.slots, (6 * _BUMPS + 1,))
    if law == "weak":
        return initial, U[:, -1, None, None] * forcing
    V = U[:, :-1].reshape(-1, 6, _BUMPS)
    x = torch.linspace(0.0, 1.0, setting.points + 1, dtype=torch.float64)
    t = torch.linspace(0.0, setting.duration, setting.windows + 1, dtype=torch.float64)
    narrow, wide = 0.02 * setting.narrow, 0.4 * setting.narrow
    widths = narrow * (log(wide / narrow) * V[:, 4:6]).exp()
    size = setting.scale * (3.0 * V[:, 0] - 1.5) * V[:, 1].square()
    space = bumps(V[:, 2], widths[:, 0], x)
    time = bumps(setting.duration * V[:, 3], setting.duration * widths[:, 1], t)
    f = torch.einsum("nk,nkt,nkx->ntx", size, time, space)
    return initial, torch.where(setting.controlled, f, 0.0)


def _solved(job: tuple[BurgersSetting, range, Law, int, int]) -> tuple[Tensor, Tensor]:
    """States (n, windows + 1, points) and forcing of a chunk of cases, float32."""
    setting, indices, law, seed, refine = job
    initial, forcing = (a.float() for a in forced(setting, indices, law, seed=seed))
    with torch.no_grad():
        return setting.solver(refine)(initial, forcing), forcing


def trajectories(
    setting: BurgersSetting,
    counts: Mapping[Law, int],
    *,
    seed: int = 0,
    refine: int = 2,
    processes: int | None = None,
    kept: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Make the training set: states (n, windows + 1, points) and forcing (n, windows, points), float32.

    Parameters
    ----------
    setting
        Grid and law of initial states and forcing.
    counts
        Trajectories of each law.
    seed
        Another seed is another set.
    refine
        The solver's cells in a cell of the grid.
    processes
        At most; all processors if None. Small sets are made in this process.
    kept
        Folder where a set that was made is kept, and looked for; none if None.

    Raises
    ------
    InputError
        If there is no trajectory to make.
    """
    named = hashlib.sha256(repr((setting, dict(counts), seed, refine)).encode()).hexdigest()[:16]
    path = None if kept is None else kept / f"trajectories-{named}.safetensors"
    if path is not None and path.is_file():
        from safetensors.torch import load_file

        tensors = load_file(path)
        return tensors["state"], tensors["forcing"]
    jobs: Sequence[tuple[BurgersSetting, range, Law, int, int]] = [
        (setting, range(a, min(a + _CHUNK, n)), law, seed, refine)
        for law, n in counts.items()
        for a in range(0, n, _CHUNK)
    ]
    if not jobs:
        raise InputError(f"A training set has one trajectory at least, got {dict(counts)}.")
    workers = min(processes or os.cpu_count() or 1, max(1, sum(counts.values()) // _CHUNK))
    if workers == 1:
        parts = [_solved(job) for job in jobs]
    else:
        # spawn: threads of this process do not survive a fork
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            parts = list(pool.map(_solved, jobs))
    states, forcing = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if path is not None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"state": states, "forcing": forcing}, path)
    return states, forcing
