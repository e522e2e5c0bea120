"""Burgers' trajectories and their adjoint in Triton against the reference in float64."""

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


def cases(short: bool):
    """Cells, cells that share a forcing, batch, windows, steps and boundary."""
    for periodic in (False, True):
        yield 240, 2, 1, 1, 2, periodic
        for N in (4, 8, 9, 17) if short else (*range(4, 34), 256, 257, 481, 960):
            yield N, 1, 2, 2, 0, periodic
        yield 21, 3, 1, 3, 3, periodic
        yield 16, 4, 0, 2, 0, periodic
        yield 12, 1, 2, 0, 0, periodic


def check_all(device: str) -> None:
    """States, steps and gradients with poisoned outputs and scratch."""
    from invdiff.kernels.burgers_trajectory import gpu, reference

    empty = torch.empty
    torch.empty = lambda *a, **k: t.fill_(torch.nan) if (t := empty(*a, **k)).is_floating_point() else t.fill_(-1)
    gpu.SCRATCH = 2**14  # so that batches are split
    try:
        for N, repeat, n, windows, steps, periodic in cases(device == "cpu"):
            u, f = 2 * normal(n, N), 3 * normal(n, windows, N // repeat, seed=1)
            bar = normal(n, windows + 1, N, seed=2)
            h, nu, window = 1 / N, 0.5 / N, 2.5 / N**1.5
            numbers = (h, nu, window)
            a, b = u.clone().requires_grad_(), f.clone().requires_grad_()
            states, counts = reference.burgers_trajectory(a, b, *numbers, steps, periodic)
            gradients = torch.autograd.grad((states * bar).sum(), (a, b), allow_unused=True, materialize_grads=True)
            for dtype, tolerance in TOLERANCE.items():
                own = [t.to(device, dtype) for t in (u, f, bar)]
                found, steps_found = gpu.burgers_trajectory(own[0], own[1], *numbers, steps, periodic)
                assert found.dtype == dtype
                assert torch.equal(steps_found.cpu(), counts), (N, dtype)
                assert error(found, states.detach()) < tolerance, (N, periodic, dtype)
                back = gpu.adjoint(found, own[1], steps_found, own[2], *numbers, periodic)
                for got, expected in zip(back, gradients, strict=True):
                    assert error(got, expected) < tolerance, (N, periodic, dtype)
    finally:
        torch.empty = empty


if __name__ == "__main__":
    check_all("cpu")
