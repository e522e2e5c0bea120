"""The benchmarks' tasks on pictures: operators by seed, pictures by split, the same for every contender.

Noise 0.05 in [0, 1]; kernels of 7 x 7 at 28 pixels, 15 x 15 at 64 and 61 x 61 at 256; reflecting boundary; a missing
box of half the side; 30 % of the pixels observed; anti-aliased down-sampling by 2 and 4; twice the contrast, clipped;
camera shake in linear light. Where a task has a kernel or a mask that is random, there are eight, each shared by an
eighth of the pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from invdiff import operators
from invdiff.errors import CatalogueError, InputError
from invdiff.noise import stream_key
from invdiff.operators.base import Operator
from invdiff.problem import Problem
from invdiff.training.data import evaluation_pictures, read_tiles

NOISE_STD = 0.05
SEEDS = 8
"""Kernels or masks of a task."""
VALIDATION_SEED = 100
"""Seed of the kernel and mask that settings are tuned on: none of the eight that are tested."""
TASKS: Mapping[str, str] = {
    "gaussian-deblur": "Gaussian deblurring",
    "motion-deblur": "motion deblurring",
    "inpaint-random": "inpainting, 30 % observed",
    "inpaint-box": "box inpainting",
    "super-resolution-x4": "super-resolution x4",
}


MORE_TASKS: Mapping[str, str] = {
    "super-resolution-x2": "super-resolution x2",
    "high-dynamic-range": "high dynamic range",
    "nonlinear-blur": "non-linear blur",
}
"""Tasks beside those, two of them not linear."""
_KERNELS = {28: (7, 1.0), 64: (15, 1.5), 256: (61, 3.0)}  # size, and standard deviation of the Gaussian, by side
_FIXED = {"gaussian-deblur", "super-resolution-x2", "super-resolution-x4", "high-dynamic-range"}


def task_operator(task: str, side: int, seed: int, channels: int = 3) -> Operator:
    """Operator of a task for pictures of a side, RGB unless told otherwise, with the kernel or mask of a seed.

    Raises
    ------
    CatalogueError
        If there is no such task.
    InputError
        If the side is not 28, 64 or 256.
    """
    if side not in _KERNELS:
        raise InputError(f"The tasks are defined for pictures of 28, 64 and 256 pixels, got {side}.")
    shape, (kernel, std) = (channels, side, side), _KERNELS[side]
    if task == "gaussian-deblur":
        return operators.Blur(operators.gaussian_kernel(kernel, std), shape)
    if task == "motion-deblur":
        return operators.Blur(operators.motion_kernel(kernel, 0.5, seed), shape)
    if task == "inpaint-random":
        return operators.Inpainting(operators.random_mask((side, side), 0.3, seed), shape)
    if task == "inpaint-box":
        return operators.Inpainting(operators.box_mask((side, side), side // 2, seed=seed), shape)
    if task in ("super-resolution-x2", "super-resolution-x4"):
        return operators.Downsampling(shape, int(task[-1]))
    if task == "high-dynamic-range":
        return operators.HighDynamicRange(shape)
    if task == "nonlinear-blur":
        return operators.NonlinearBlur(shape, seed, size=kernel)
    raise CatalogueError.unknown("task", task, [*TASKS, *MORE_TASKS])


@dataclass(frozen=True, kw_only=True)
class Group:
    """Problems that share an operator, and the truths; solved in one run.

    Parameters
    ----------
    task, seed
        What was done to the pictures.
    indices
        Which pictures of the split.
    problems
        One a picture.
    truths
        Pictures (n, channels, side, side) in [0, 1].
    """

    task: str
    seed: int
    indices: tuple[int, ...]
    problems: tuple[Problem, ...]
    truths: Tensor


def pictures(data: Path, side: int, split: str, count: int) -> Tensor:
    """First pictures (count, channels, side, side) of a split.

    Fashion-MNIST's test set at 28 pixels, grey, of whose first 2000 the last are for validation; caltech64 at 64;
    kodak24 (test only) at 256.
    """
    if side == 28:
        tiles = read_tiles(data / "fashion_mnist_test2000.png", 2000, 28, 50)[:, :1].float() / 255
        return tiles[:count] if split == "test" else tiles[len(tiles) - count :]
    if side == 64:
        return evaluation_pictures("caltech64", data, split)[:count]
    if split != "test":
        raise InputError("kodak24 is for tests only; settings are tuned at 64 pixels.")
    return read_tiles(data / "kodak24_256.webp", min(count, 24), 256, 6).float() / 255


def group(task: str, truths: Tensor, indices: list[int], seed: int) -> Group:
    """Measure pictures with one operator; the noise follows task and index, never the sampler."""
    channels, side = truths.shape[1], truths.shape[-1]
    operator = task_operator(task, side, seed, channels)
    problems = tuple(
        Problem.simulate(
            operator, truths[i], noise_std=NOISE_STD, seed=stream_key(0, task, side, i), name=f"{task}-{side}-{i}"
        )
        for i in indices
    )
    return Group(task=task, seed=seed, indices=tuple(indices), problems=problems, truths=truths[indices])


def tests(task: str, truths: Tensor) -> list[Group]:
    """All pictures in eight groups, picture i with the kernel or mask i mod 8; in one where the task has but one."""
    seeds = 1 if task in _FIXED else SEEDS
    n = len(truths)
    return [group(task, truths, list(range(s, n, seeds)), s) for s in range(min(seeds, n))]
