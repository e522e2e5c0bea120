"""Operators in and out of deepinv, by deepinv's own tests."""

import subprocess
import sys

import pytest
import torch

from invdiff.errors import CapabilityError
from invdiff.operators import Affine, Blur, Downsampling, Inpainting, Scale, gaussian_kernel, motion_kernel, random_mask
from invdiff.operators.adapters import from_deepinv, to_deepinv
from invdiff.operators.base import LinearOperator
from invdiff.testing import check_operator

deepinv = pytest.importorskip("deepinv")

SHAPE = (2, 12, 16)
OPERATORS = {
    "circular": lambda: Blur(motion_kernel(5), SHAPE, "circular"),
    "reflect": lambda: Blur(motion_kernel(5), SHAPE, "reflect"),
    "separable": lambda: Blur(gaussian_kernel(5, 1.0), SHAPE, "reflect"),
    "valid": lambda: Blur(gaussian_kernel(5, 1.0), SHAPE, "valid"),
    "inpainting": lambda: Inpainting(random_mask(SHAPE[1:], 0.5), SHAPE),
    "downsampling": lambda: Downsampling(SHAPE, 4),
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_deepinv_is_not_imported_with_the_operators():
    code = "import sys, invdiff.operators; assert not {'deepinv', 'scipy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_out_passes_deepinvs_own_tests(name):
    A = OPERATORS[name]()
    physics = to_deepinv(A)
    assert isinstance(physics, deepinv.physics.LinearPhysics)
    x = rand(1, *SHAPE)
    assert torch.equal(physics(x), A(x))
    with torch.random.fork_rng():  # both draw from the global generator
        torch.manual_seed(0)
        error = float(physics.adjointness_test(x))
        norm = physics.compute_norm(x, max_iter=1000, tol=1e-6, verbose=False, squared=False)
    assert error < 1e-3  # the bound of deepinv's own tests
    assert float(norm) == pytest.approx(A.norm(), rel=1e-2)
    y = A(x)
    assert float((A(physics.A_dagger(y)) - y).norm() / y.norm()) < 0.03
    z = rand(1, *SHAPE, seed=1)
    p = physics.prox_l2(z, y, 0.7)
    slope = 0.7 * A.adjoint(A(p) - y) + p - z
    assert float(slope.norm() / z.norm()) < 1e-5


def test_pseudo_inverse_is_exact_where_there_is_an_svd():
    A = OPERATORS["downsampling"]()
    y = rand(2, *A.out_shape).double()
    M = A(torch.eye(384, dtype=torch.float64).reshape(384, *SHAPE)).flatten(1).T
    expected = (torch.linalg.pinv(M) @ y.flatten(1).T).T
    torch.testing.assert_close(to_deepinv(A).A_dagger(y).flatten(1), expected, rtol=1e-9, atol=1e-9)


PHYSICS = {
    "blur": lambda: deepinv.physics.Blur(filter=motion_kernel(5).float()[None, None], padding="circular", use_fft=True),
    "down": lambda: deepinv.physics.Downsampling(img_size=SHAPE, filter="bicubic", factor=4),
    "inpainting": lambda: deepinv.physics.Inpainting(img_size=SHAPE, mask=random_mask(SHAPE[1:], 0.5).float()),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_in_keeps_the_contract(name):
    physics = PHYSICS[name]()
    A = from_deepinv(physics, SHAPE)
    assert isinstance(A, LinearOperator)
    x = rand(2, *SHAPE)
    assert torch.equal(A(x), physics.A(x))
    check_operator(A, dtype=torch.float32, rtol=1e-5)


def test_in_agrees_with_our_own():
    x, kernel = rand(2, *SHAPE), motion_kernel(5, seed=4).float()
    theirs = from_deepinv(deepinv.physics.Blur(filter=kernel[None, None], padding="circular"), SHAPE)
    torch.testing.assert_close(theirs(x), Blur(kernel, SHAPE, "circular")(x), rtol=1e-4, atol=1e-5)
    theirs = from_deepinv(deepinv.physics.DownsamplingMatlab(factor=2), (2, 16, 16))
    x = rand(2, 2, 16, 16)
    torch.testing.assert_close(theirs(x), Downsampling((2, 16, 16), 2, boundary="symmetric")(x), rtol=1e-4, atol=1e-5)


def test_round_trip_and_operators_that_are_not_linear():
    A = Scale(SHAPE, 2.0)
    assert from_deepinv(to_deepinv(A), SHAPE) is A
    physics = to_deepinv(Affine(SHAPE, 2.0, 1.0))
    assert not isinstance(physics, deepinv.physics.LinearPhysics)
    assert torch.equal(physics(torch.ones(1, *SHAPE)), torch.full((1, *SHAPE), 3.0))
    haze = from_deepinv(deepinv.physics.Physics(A=lambda x, **_: x**2), SHAPE)
    assert not isinstance(haze, LinearOperator)
    check_operator(haze)
    stacked = deepinv.physics.Denoising().stack(deepinv.physics.Denoising())
    with pytest.raises(CapabilityError, match="Product"):
        from_deepinv(stacked, SHAPE)
    with pytest.raises(CapabilityError, match="Physics"):
        from_deepinv(torch.nn.Identity(), SHAPE)


def test_physics_moves_with_its_operator():
    physics = to_deepinv(OPERATORS["reflect"]())
    assert physics.double().operator.kernel.dtype == torch.float64
    assert physics.float().operator.kernel.dtype == torch.float32
