"""Likelihoods against torch.distributions and autograd, alone, stacked and multiplied."""

import math

import pytest
import torch
from torch import Tensor

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.likelihoods import Gaussian, Likelihood, Objective, Poisson, Product
from invdiff.operators.base import LinearOperator, Operator

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Dense(LinearOperator):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix.to(y.dtype)


class Fourier(LinearOperator):
    complex_output = True

    def __init__(self, n: int) -> None:
        super().__init__((n,), (n,))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return (torch.fft.ifft(y) * y.shape[-1]).real


class Square(Operator):
    def __init__(self, n: int) -> None:
        super().__init__((n,), (n,))

    def forward(self, x: Tensor) -> Tensor:
        return x**2


A = Dense(normal(3, 4))
X = normal(5, 4, seed=1)
DIAGONAL = torch.tensor([0.5, 1.0, 2.0], dtype=F64)


def gradient(f: Likelihood, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f.log_prob(leaf).sum(), leaf)[0]


def check_gradient(f: Likelihood, x: Tensor) -> None:
    value, grad = f.log_prob_and_grad(x)
    torch.testing.assert_close(value, f.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, gradient(f, x), rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(f.log_prob, (x.clone().requires_grad_(),))
    assert not value.requires_grad
    assert not grad.requires_grad


@pytest.mark.parametrize("std", [0.3, DIAGONAL, torch.tensor([2.0])], ids=["scalar", "diagonal", "broadcast"])
@pytest.mark.parametrize("operator", [A, Square(3)], ids=["linear", "nonlinear"])
def test_gaussian_is_the_normal_density(operator, std):
    y, x = normal(3, seed=2), X[:, : operator.in_shape[0]]
    f = Gaussian(operator, y, std)
    expected = torch.distributions.Normal(operator(x), torch.as_tensor(std, dtype=F64)).log_prob(y).sum(1)
    torch.testing.assert_close(f.log_prob(x), expected, rtol=1e-12, atol=1e-12)
    check_gradient(f, x)
    chi2 = (((y - operator(x)) / torch.as_tensor(std, dtype=F64)) ** 2).sum(1)
    torch.testing.assert_close(f.deviance(x), chi2)
    assert f.measurements == 3
    assert f.problems == 1


@pytest.mark.parametrize("std", [0.7, torch.linspace(0.5, 1.0, 4, dtype=F64)], ids=["scalar", "diagonal"])
def test_complex_noise_is_per_real_component(std):
    operator, y = Fourier(4), torch.complex(normal(4, seed=2), normal(4, seed=3))
    f = Gaussian(operator, y, std)
    law = torch.distributions.Normal(torch.view_as_real(operator(X)), torch.as_tensor(std, dtype=F64).reshape(-1, 1))
    torch.testing.assert_close(f.log_prob(X), law.log_prob(torch.view_as_real(y)).flatten(1).sum(1))
    assert f.measurements == 8
    check_gradient(f, X)


def test_gaussian_follows_the_dtype_of_x_and_takes_integer_data():
    f = Gaussian(A, torch.tensor([1, 2, 3]), 0.5)
    value, grad = f.log_prob_and_grad(X.float())
    assert value.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(f.log_prob(X), Gaussian(A, torch.tensor([1.0, 2.0, 3.0], dtype=F64), 0.5).log_prob(X))


def poisson(y: Tensor, background: float = 0.3) -> Poisson:
    return Poisson(Dense(normal(3, 4).abs()), y, gain=20.0, background=background)


def test_poisson_is_the_poisson_law():
    y, x = torch.tensor([3.0, 0.0, 40.0], dtype=F64), X.abs() + 0.1
    f = poisson(y)
    law = torch.distributions.Poisson(20.0 * f.operator(x) + 0.3)
    torch.testing.assert_close(f.log_prob(x), law.log_prob(y).sum(1))
    perfect = torch.distributions.Poisson(y.clamp_min(1e-300)).log_prob(y).sum()
    torch.testing.assert_close(f.deviance(x), 2.0 * (perfect - f.log_prob(x)))
    check_gradient(f, x)


def test_poisson_clamps_negative_predictions_and_survives_darkness():
    f = poisson(torch.tensor([0.0, 0.0, 2.0], dtype=F64))
    law = torch.distributions.Poisson(torch.full((3,), 0.3, dtype=F64))
    torch.testing.assert_close(f.log_prob(-X.abs())[0], law.log_prob(f.measurement[0]).sum())
    dark = poisson(torch.zeros(3, dtype=F64), background=0.0)
    assert torch.equal(dark.deviance(torch.zeros(1, 4, dtype=F64)), torch.zeros(1, dtype=F64))


def test_objective_is_a_boltzmann_density():
    f = Objective(lambda x: (x**2).sum(1), 0.5, (4,))
    torch.testing.assert_close(f.log_prob(X), -2.0 * (X**2).sum(1))
    torch.testing.assert_close(f.deviance(X), 4.0 * (X**2).sum(1))
    check_gradient(f, X)
    assert f.rows(torch.arange(5)) is f
    assert Objective.stack([f, f]) is f
    assert (f.problems, f.measurements) == (1, 1)


def test_product_adds_up():
    parts = [Gaussian(A, normal(3, seed=4), DIAGONAL), Objective(lambda x: x.abs().sum(1), 2.0, (4,))]
    f = Product(parts)
    torch.testing.assert_close(f.log_prob(X), parts[0].log_prob(X) + parts[1].log_prob(X))
    torch.testing.assert_close(f.deviance(X), parts[0].deviance(X) + parts[1].deviance(X))
    assert f.measurements == 4
    check_gradient(f, X)


def make(kind: str, y: Tensor) -> Likelihood:
    if kind == "poisson":
        return poisson(y.abs().round())
    if kind == "product":
        return Product([Gaussian(A, y, 0.5), Gaussian(A, y + 1.0, DIAGONAL)])
    return Gaussian(A, y, DIAGONAL)


@pytest.mark.parametrize("kind", ["gaussian", "poisson", "product"])
def test_rows_of_a_stack_are_the_parts(kind):
    parts = [make(kind, 5.0 * normal(3, seed=s)) for s in (1, 2, 3)]
    stacked = type(parts[0]).stack(parts)
    assert stacked.problems == 3
    assert stacked.measurements == parts[0].measurements
    index = torch.tensor([2, 0, 0, 1, 2])
    rows = stacked.rows(index)
    expected = torch.cat([parts[i].log_prob(X[j : j + 1]) for j, i in enumerate(index.tolist())])
    torch.testing.assert_close(rows.log_prob(X), expected)
    torch.testing.assert_close(rows.log_prob_and_grad(X)[0], expected)
    one = torch.cat([parts[i].log_prob_and_grad(X[j : j + 1])[1] for j, i in enumerate(index.tolist())])
    torch.testing.assert_close(rows.log_prob_and_grad(X)[1], one)
    deviances = torch.cat([parts[i].deviance(X[j : j + 1]) for j, i in enumerate(index.tolist())])
    torch.testing.assert_close(rows.deviance(X), deviances)
    assert not torch.allclose(expected, stacked.rows(index.flip(0)).log_prob(X))
    torch.testing.assert_close(parts[0].rows(index).log_prob(X), parts[0].log_prob(X))


def test_equal_operators_stack_though_they_are_two_objects():
    twin = Dense(A.matrix.clone())
    assert Gaussian.stack([Gaussian(A, normal(3), 0.1), Gaussian(twin, normal(3), 0.1)]).problems == 2


def stack_errors() -> list[tuple]:
    y, other = normal(3), Dense(normal(3, 4, seed=9))
    g = Gaussian(A, y, 0.1)
    return [
        (lambda: Gaussian.stack([g, Gaussian(other, y, 0.1)]), InputError, "share one operator"),
        (lambda: Gaussian.stack([g, Gaussian(A, y, 0.2)]), InputError, "share one noise level"),
        (lambda: Poisson.stack([poisson(y.abs()), poisson(y.abs(), 0.5)]), InputError, "gain and background"),
        (lambda: Product.stack([Product([g]), Product([poisson(y.abs())])]), InputError, "kinds of factors"),
        (lambda: Product.stack([Product([g]), Product([g, g])]), InputError, "equally many factors"),
        (lambda: Objective.stack([objective(1.0), objective(1.0)]), CapabilityError, "one by one"),
    ]


def objective(temperature: float) -> Objective:
    return Objective(lambda x: x.sum(1), temperature, (4,))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Gaussian(A, normal(3), 0.0), InputError, r"positive.*got 0\.0.*1e-3"),
        (lambda: Gaussian(A, normal(3), -1.0), InputError, "positive"),
        (lambda: Gaussian(A, normal(3), math.inf), InputError, "finite"),
        (lambda: Gaussian(A, normal(3), math.nan), InputError, "positive"),
        (lambda: Gaussian(A, normal(3), torch.ones(4)), ShapeError, r"\(4,\) does not broadcast.*\(3,\)"),
        (lambda: Gaussian(A, normal(3), torch.tensor([1.0, 0.0, 1.0])), InputError, "positive"),
        (lambda: Gaussian(A, normal(4), 0.1), ShapeError, r"\(4,\), but Dense gives \(3,\)"),
        (lambda: Gaussian(A, normal(0, 3), 0.1), ShapeError, "one measurement"),
        (lambda: Gaussian(A, torch.tensor([0.0, math.nan, math.inf]), 0.1), InputError, "2 values.*Inpainting"),
        (lambda: poisson(torch.tensor([1.0, -1.0, 0.0])), InputError, "negative values"),
        (lambda: Poisson(A, torch.ones(3), gain=0.0), InputError, "gain > 0"),
        (lambda: Poisson(A, torch.ones(3), gain=1.0, background=-1.0), InputError, "background >= 0"),
        (lambda: Poisson(A, torch.ones(3), gain=1.0, background=math.nan), InputError, "background >= 0"),
        (lambda: objective(0.0), InputError, "temperature must be positive, got 0"),
        (lambda: Product([]), ShapeError, "at least one factor"),
        (lambda: Product([Gaussian(A, normal(3), 1.0), Gaussian(Square(3), normal(3), 1.0)]), ShapeError, "in_shape"),
        (
            lambda: Product([Gaussian(A, normal(2, 3), 1.0), Gaussian(A, normal(3, 3), 1.0)]),
            ShapeError,
            r"different numbers of problems: \[2, 3\]",
        ),
        *stack_errors(),
    ],
)
def test_errors_say_what_is_wrong(build, error, message):
    with pytest.raises(error, match=message):
        build()
