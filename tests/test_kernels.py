"""Kernels against their references; the Triton ones in Triton's interpreter, and compiled where there is a GPU."""

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff.kernels import philox_uniform as uniform
from invdiff.kernels.philox_normal import reference
from invdiff.kernels.philox_uniform import cpu as uniform_cpu
from invdiff.kernels.philox_uniform import reference as uniform_reference

CASES = [(1, 3, 7, 0), (5, 4, 2, 9), (3, 1030, 2**32 - 1, 2**31 + 1), (0, 8, 1, 1), (2, 4096, 0, 1), (2, 1, 16, 16)]
"""Rows, values a row, step, call: odd sizes, a ragged last block, none, and words that do not fit 31 bits."""


def philox_inputs(rows: int, device: str = "cpu"):
    generator = torch.Generator().manual_seed(rows)
    keys = torch.randint(0, 2**32, (rows, 2), generator=generator)
    slots = torch.randint(0, 2**32, (rows,), generator=generator)
    return keys.to(device), slots.to(device)


def check_philox(kernel, device: str) -> None:
    for rows, size, step, call in CASES:
        keys, slots = philox_inputs(rows, device)
        for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            got = kernel(keys, slots, step, call, size, dtype)
            expected = reference.philox_normal(keys.cpu(), slots.cpu(), step, call, size, dtype)
            assert got.shape == (rows, size)
            assert got.dtype == dtype
            torch.testing.assert_close(got.cpu(), expected, rtol=rtol, atol=1e-14)


def check_uniform(kernel, device: str) -> None:
    for rows, size, step, call in [*CASES, (3, 8193, 1, 2)]:
        keys, slots = philox_inputs(rows, device)
        got = kernel(keys, slots, step, call, size)
        assert got.dtype == torch.float64
        assert torch.equal(got.cpu(), uniform_reference.philox_uniform(keys.cpu(), slots.cpu(), step, call, size))


def test_uniforms_compiled_for_a_cpu_have_the_same_bits():
    check_uniform(uniform_cpu.philox_uniform, "cpu")
    check_uniform(uniform.philox_uniform, "cpu")


SCRIPT = """
from test_kernels import check_philox, check_uniform
from invdiff.kernels.philox_normal import gpu
check_philox(gpu.philox_normal, {device!r})
from invdiff.kernels.philox_uniform import gpu
check_uniform(gpu.philox_uniform, {device!r})
"""


@has_triton
def test_triton_in_the_interpreter():
    check_alone(SCRIPT.format(device="cpu"), interpret=True)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    check_alone(SCRIPT.format(device="cuda"), interpret=False)
