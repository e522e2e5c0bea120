"""Burgers' trajectories and their adjoint in Triton against the reference in float64."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

F64 = torch.float64
TOLERANCE = {F64: 1e-12, torch.float32: 1e-5}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error relative to the largest value; infinite where something was not written."""
    assert got.shape == expected.shape
    gap = (got.cpu().double() - expected).abs()
    assert bool(torch.isfinite(gap).all())
    return float(gap.max() / expected.abs().max()) if expected.numel() else 0.0


# Cells, cells that share a forcing, batch, windows, steps, whether periodic, and whether in float32 too.
# A lane has eight cells and the last one 1 to 8, each of which has ghosts elsewhere.
Case = tuple[int, int, int, int, int, bool, bool]
FEW: list[Case] = [
    (240, 2, 1, 1, 1, False, True),
    (9, 3, 1, 1, 2, False, False),
    (9, 1, 1, 1, 0, True, False),
    (12, 1, 2, 2, 0, True, False),
    (16, 4, 0, 2, 0, False, False),
    (12, 1, 1, 0, 0, False, False),
]
MANY: list[Case] = [
    (N, 1, 1, 2, 0, periodic, False) for N in (4, 8, 9, 18, 27, 36, 45, 54, 63) for periodic in (False, True)
]
LARGE: list[Case] = [
    (240, 2, 5, 8, 0, False, True),
    (256, 1, 3, 3, 0, True, True),
    (960, 8, 3, 4, 0, False, True),
    (481, 13, 2, 3, 7, False, False),
    (270, 1, 2, 3, 0, True, False),
]


def check_blow_up(device: str) -> None:
    """What is not finite ends: its steps are those of no speed at all, or of the largest that counts."""
    from invdiff.kernels.burgers_trajectory import gpu, reference

    u, f = normal(3, 8), normal(3, 2, 8, seed=1)
    u[0] = torch.nan
    f[1, 0, 3] = torch.inf
    numbers = (1 / 8, 0.01, 1e-6, 0, False)
    expected = reference.burgers_trajectory(u, f, *numbers)
    found = gpu.burgers_trajectory(u.to(device), f.to(device), *numbers)
    assert torch.equal(found[1].cpu(), expected[1])
    assert expected[1].max() > 1
    assert bool(found[0][0].isnan().all())
    assert not bool(found[0][1, 1:].isfinite().all())
    assert error(found[0][2], expected[0][2]) < 1e-12


def check(device: str, cases: list[Case]) -> None:
    """States, steps and gradients, with poisoned outputs and scratch, and batches in parts."""
    from invdiff.kernels.burgers_trajectory import gpu, reference

    empty, scratch = torch.empty, gpu.SCRATCH
    torch.empty = lambda *a, **k: t.fill_(torch.nan) if (t := empty(*a, **k)).is_floating_point() else t.fill_(-1)
    gpu.SCRATCH = 2**13
    try:
        for N, repeat, n, windows, steps, periodic, single in cases:
            case = f"{N} cells, {'periodic' if periodic else 'walls'}"
            u, f = 2 * normal(n, N), 3 * normal(n, windows, N // repeat, seed=1)
            bar = normal(n, windows + 1, N, seed=2)
            numbers = (1 / N, 0.2 / N, 0.7 / N)
            a, b = u.clone().requires_grad_(), f.clone().requires_grad_()
            states, counts = reference.burgers_trajectory(a, b, *numbers, steps, periodic)
            gradients = torch.autograd.grad((states * bar).sum(), (a, b), allow_unused=True, materialize_grads=True)
            for dtype in TOLERANCE if single else [F64]:
                own = [t.to(device, dtype) for t in (u, f, bar)]
                found, steps_found = gpu.burgers_trajectory(own[0], own[1], *numbers, steps, periodic)
                back = gpu.adjoint(found, own[1], steps_found, own[2], *numbers, periodic)
                assert torch.equal(steps_found.cpu(), counts), case
                for got, expected in zip((found, *back), (states.detach(), *gradients), strict=True):
                    assert got.dtype == dtype
                    assert error(got, expected) < TOLERANCE[dtype], f"{case}, {dtype}"
    finally:
        torch.empty, gpu.SCRATCH = empty, scratch


def check_operation() -> None:
    """On CUDA the kernels stand behind the operation and its gradient, where they are taken at all."""
    from invdiff import kernels
    from invdiff.kernels.burgers_trajectory import burgers_trajectory

    kernels.ON_GPU |= {"burgers_trajectory"}
    u, f, bar = 2 * normal(4, 24), 3 * normal(4, 3, 12, seed=1), normal(4, 4, 24, seed=2)
    every = []
    for device in ("cuda", "cpu"):
        a, b = (t.to(device).requires_grad_() for t in (u, f))
        with kernels.use("auto" if device == "cuda" else "reference"):
            states, counts = burgers_trajectory(a, b, 1 / 24, 0.02, 0.05)
        assert (type(states.grad_fn).__name__ == "StackBackward0") == (device == "cpu")  # which is the reference's
        every.append((states.detach(), counts, *torch.autograd.grad((states * bar.to(device)).sum(), (a, b))))
    for got, expected in zip(*every, strict=True):
        assert error(got, expected.double()) < 1e-12


def check_all(device: str) -> None:
    """All that a GPU can be held to; cases side by side, since each number of cells is compiled."""
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(partial(check, device), [[case] for case in (*LARGE, *FEW, *MANY)]):
            pass
    check_blow_up(device)
    if device == "cuda":
        check_operation()


@has_triton
def test_triton_in_the_interpreter():
    check_alone("from test_burgers_gpu import *\ncheck('cpu', FEW)\ncheck_blow_up('cpu')", interpret=True)


@pytest.mark.slow
@has_triton
def test_every_number_of_cells_in_the_last_lane():
    check_alone("from test_burgers_gpu import *\ncheck('cpu', MANY)", interpret=True)


@pytest.mark.gpu
@has_gpu
@pytest.mark.timeout(1200)  # each number of cells is compiled
def test_triton_on_the_gpu():
    check_alone("from test_burgers_gpu import *\ncheck_all('cuda')", interpret=False)
