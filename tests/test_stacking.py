"""Stacked operators: the contract, the parts of a measurement, and two measurements against one exact posterior."""

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import samplers
from invdiff.errors import InputError, ShapeError
from invdiff.likelihoods import Gaussian
from invdiff.operators import Affine, Blur, Downsampling, Inpainting, LinearOperator, Scale, box_mask, random_mask
from invdiff.operators.base import Operator, fingerprint
from invdiff.operators.mri import MRI, cartesian_mask
from invdiff.operators.stacking import LinearStack, Stack, stack
from invdiff.priors import FieldPrior
from invdiff.problem import Problem
from invdiff.testing import check_operator

SHAPE = (2, 8, 6)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blur() -> Blur:
    # A cross: not of rank one, so without an SVD, and far from singular, so that iterations are few.
    return Blur(
        torch.tensor([[0.0, 1.0, 0.0], [1.0, 4.0, 2.0], [0.0, 1.5, 0.0]], dtype=torch.float64), SHAPE, method="direct"
    )


def mask() -> Inpainting:
    return Inpainting(random_mask((8, 6), 0.5), SHAPE)


def mri() -> MRI:
    return MRI(cartesian_mask((8, 6), 2), SHAPE)


class Square(Operator):
    def __init__(self) -> None:
        super().__init__(SHAPE, SHAPE)

    def forward(self, x: Tensor) -> Tensor:
        return x**2


STACKS = {
    "two": lambda: stack([blur(), mask()]),
    "three": lambda: stack((Downsampling(SHAPE, 2), mri(), Scale(SHAPE, -2.0))),
    "one with svd": lambda: stack([mri()]),
    "one without svd": lambda: stack([blur()]),
    "nested": lambda: stack([stack([blur(), mask()]), mri()]),
    "after a scale": lambda: stack([blur() @ Scale(SHAPE, 3.0), mask()]) @ Scale(SHAPE, 0.5),
    "of compositions": lambda: stack([Inpainting(box_mask((8, 6), 3), SHAPE) @ blur(), mri() @ blur()]),
    "before an inpainting": lambda: Inpainting(random_mask((4, 18), 0.5), (1, 4, 18)) @ Reshape((72,), (1, 4, 18))
    @ stack([Downsampling(SHAPE, 2), Inpainting(torch.arange(48).reshape(8, 6) % 2 > 0, SHAPE)]),
}  # fmt: skip


class Reshape(LinearOperator):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.reshape(-1, *self.in_shape)


@pytest.mark.parametrize("name", STACKS)
def test_contract(name):
    A = STACKS[name]()
    assert isinstance(A, LinearOperator)
    assert (A.svd is not None) == (name == "one with svd")
    assert check_operator(A).adjointness < 1e-13
    check_operator(A, dtype=torch.float32, rtol=1e-5)


# What `@` makes of the new operators and the old.
COMPOSITIONS = {
    "blur after scale": lambda: blur() @ Scale(SHAPE, 2.0),
    "inpainting after blur": lambda: mask() @ blur(),
    "mri after scale": lambda: mri() @ Scale(SHAPE, -2.0),
    "scale after mri": lambda: Scale(mri().out_shape, 0.5) @ mri(),
    "mri after blur": lambda: mri() @ blur(),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name):
    A = COMPOSITIONS[name]()
    assert isinstance(A, LinearOperator)
    assert (A.svd is not None) == (name in {"mri after scale", "scale after mri"})
    check_operator(A)
    x = rand(2, *SHAPE)
    torch.testing.assert_close(A(x), A.outer(A.inner(x)), rtol=0, atol=0)


def test_the_parts_of_a_measurement():
    A, parts = stack([blur(), mask(), mri()]), [blur(), mask(), mri()]
    x = rand(3, *SHAPE)
    y = A(x)
    assert len(A) == len(A.parts) == 3
    assert A.out_shape == (sum(A.sizes),) == tuple(y.shape[1:])
    pieces = A.split(y)
    for B, piece in zip(parts, pieces, strict=True):
        assert piece.shape[1:] == B.out_shape
        torch.testing.assert_close(piece, B(x), rtol=0, atol=0)
    assert torch.equal(A.join(pieces), y)
    expected = sum(B.adjoint(piece) for B, piece in zip(parts, pieces, strict=True))
    torch.testing.assert_close(A.adjoint(y), expected, rtol=0, atol=1e-12)


def test_the_norm_lies_between_its_bounds():
    A = stack([blur(), mask(), mri()])
    norms = torch.tensor([B.norm() for B in A.parts], dtype=torch.float64)
    assert float(norms.max()) * (1 - 1e-5) <= A.norm() <= float(norms.norm()) * (1 + 1e-5)
    same = stack([Scale(SHAPE, 3.0), Scale(SHAPE, 4.0)])
    assert same.norm() == pytest.approx(5.0, rel=1e-6)
    assert stack([Scale(SHAPE, -3.0)]).norm() == 3.0


def test_what_is_not_linear_gives_an_operator():
    A = stack([blur(), Square()])
    assert isinstance(A, Stack)
    assert not isinstance(A, LinearOperator)
    check_operator(A)
    assert not isinstance(stack([Square()]) @ Affine(SHAPE), LinearOperator)
    check_operator(stack([Square()]) @ Affine(SHAPE, 2.0, -1.0))
    assert isinstance(stack([blur(), mask()]), LinearStack)


class Turn(LinearOperator):
    complex_output = True

    def __init__(self) -> None:
        super().__init__(SHAPE, SHAPE)

    def forward(self, x: Tensor) -> Tensor:
        return (1.0 + 2.0j) * x

    def adjoint(self, y: Tensor) -> Tensor:
        return ((1.0 - 2.0j) * y).real


def test_complex_outputs():
    A = stack([Turn(), Turn()])
    assert A.complex_output
    assert not stack([blur(), mask()]).complex_output
    assert check_operator(A).adjointness < 1e-13
    with pytest.raises(InputError, match="complex"):
        stack([Turn(), mask()])


def test_fingerprints_tell_stacks_apart():
    one, same, other = stack([blur(), mask()]), stack([blur(), mask()]), stack([mask(), blur()])
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert any("kernel" in name for name, _ in one.named_buffers())


def test_values_by_part():
    A = stack([mask(), mri()])
    m, k = A.sizes
    assert torch.equal(A.repeat([0.1, 2]), torch.tensor([0.1] * m + [2.0] * k, dtype=torch.float64))
    by_channel = A.repeat([1.0, torch.tensor([[3.0], [4.0]])])
    assert torch.equal(by_channel[m:], torch.tensor([3.0, 4.0], dtype=torch.float64).repeat_interleave(k // 2))


def test_two_measurements_with_noise_of_their_own():
    shape = (1, 4, 4)
    prior = FieldPrior.power_law(shape, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)
    coarse = Downsampling(shape, 2)
    A = stack([coarse, Inpainting(torch.arange(16).reshape(4, 4) % 4 == 0, shape)])
    std = A.repeat([0.1, 1.0])
    y = A(prior.sample(1, seed=3)) + std * rand(1, *A.out_shape, seed=1)
    likelihood = Gaussian(A, y[0], noise_std=std)
    exact = prior.posterior(A, y[0], std)
    # The likelihood is the product of the parts'.
    pieces = A.split(y)
    x = rand(3, *shape)
    expected = sum(Gaussian(B, p[0], s).log_prob(x) for B, p, s in zip(A.parts, pieces, (0.1, 1.0), strict=True))
    torch.testing.assert_close(likelihood.log_prob(x), expected)
    n = 400
    solution = invdiff.solve(Problem(likelihood), prior, samplers.PiGDM(steps=30), draws=n, seed=2, dtype=torch.float64)
    error = (solution.mean() - exact.mean) / exact.std
    # 16 means of 400 draws stay within 4 standard errors, 0.2; the walk of 30 steps has a bias of some hundredths.
    assert float(error.abs().max()) < 0.25
    # One noise for both, in place of each its own, would be seen.
    wrong = prior.posterior(A, y[0], 1.0)
    assert float(((wrong.mean - exact.mean) / exact.std).abs().max()) > 0.5


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="at least one"):
        stack([])
    with pytest.raises(ShapeError, match="one input shape"):
        stack([blur(), Scale((2, 6, 8))])
    A = stack([blur(), mask()])
    for shape in ((95,), (1, *SHAPE), (1, A.out_shape[0] + 1)):
        with pytest.raises(ShapeError, match="splits"):
            A.split(rand(*shape))
    with pytest.raises(ShapeError, match="takes inputs"):
        A(rand(1, 2, 8, 8))
    x = rand(2, *SHAPE)
    for measurements in ([blur()(x)], [mask()(x), blur()(x)], [blur()(x), mask()(x)[:1]]):
        with pytest.raises(ShapeError, match="joins"):
            A.join(measurements)
    with pytest.raises(ShapeError, match="each of the 2 parts"):
        A.repeat([0.1])
    with pytest.raises(ShapeError, match="broadcast"):
        A.repeat([0.1, torch.ones(7)])


def test_measurements_are_simulated_with_a_noise_for_each_part():
    A = stack([Scale(SHAPE), Scale(SHAPE, 2.0)])
    truth = torch.zeros(SHAPE, dtype=torch.float64)
    std = A.repeat([0.1, 3.0])
    y = Problem.simulate(A, truth, noise_std=std, seed=1).likelihood.measurement[0]
    unit = Problem.simulate(A, truth, noise_std=1.0, seed=1).likelihood.measurement[0]
    torch.testing.assert_close(y, std * unit, rtol=1e-6, atol=0.0)
    with pytest.raises(InputError, match="noise_std must be positive"):
        Problem.simulate(A, truth, noise_std=A.repeat([0.1, 0.0]))
