"""Compressed sensing: the transform against its definition, orthonormal rows, and the statistics of the ensembles."""

import copy
import math

import pytest
import torch

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import fingerprint
from invdiff.operators.compressed_sensing import CompressedSensing, hartley
from invdiff.testing import check_operator

OPERATORS = {
    f"{kind} {shape} {m}": lambda kind=kind, shape=shape, m=m: CompressedSensing(shape, m, kind=kind, seed=3)
    for kind in ("fourier", "gaussian")
    for shape, m in (
        ((1, 8, 8), 20),
        ((3, 5, 4), 17),
        ((1, 7, 5), 1),
        ((3, 3, 5), 45),
        ((1, 1, 13), 6),
        ((1, 1, 2), 1),
        ((1, 1, 1), 1),
    )
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(A: CompressedSensing) -> torch.Tensor:
    d = math.prod(A.in_shape)
    return A(torch.eye(d, dtype=torch.float64).reshape(d, *A.in_shape)).T


@pytest.mark.parametrize("name", OPERATORS)
def test_contract(name):
    A = OPERATORS[name]()
    report = check_operator(A)
    assert report.svd is not None
    assert report.adjointness < 1e-13
    assert report.gradient < 1e-13
    check_operator(A, dtype=torch.float32, rtol=2e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_and_dense_matrix(name):
    A = OPERATORS[name]()
    x, y, w = rand(3, *A.in_shape), rand(3, *A.out_shape, seed=1), torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(A, (x[:1].clone().requires_grad_(),), fast_mode=True)
    assert torch.autograd.gradcheck(A.adjoint, (y[:1].clone().requires_grad_(),), fast_mode=True)
    M = matrix(A)
    eye = torch.eye(M.shape[1], dtype=torch.float64)
    expected = [
        torch.linalg.solve(eye + v * M.T @ M, b + v * M.T @ t) for b, t, v in zip(x.flatten(1), y, w, strict=True)
    ]
    torch.testing.assert_close(A.prox(x, y, w).flatten(1), torch.stack(expected))
    exact = torch.linalg.svdvals(M)
    found = A.svd.singular_values.sort(descending=True).values
    torch.testing.assert_close(found[: len(exact)], exact)
    assert not found[len(exact) :].any()
    inverse = torch.linalg.inv(eye + 2.0 * M.T @ M)
    torch.testing.assert_close(A.svd.gram(lambda s2: 1.0 / (1.0 + 2.0 * s2), x).flatten(1), x.flatten(1) @ inverse)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 12, 31])
def test_hartley_is_its_definition_and_own_inverse(d):
    k = torch.arange(d, dtype=torch.float64)
    phase = 2 * math.pi * k[:, None] * k / d
    H = (phase.cos() + phase.sin()) / d**0.5
    x = rand(4, d)
    torch.testing.assert_close(hartley(x), x @ H)
    torch.testing.assert_close(hartley(hartley(x)), x)


@pytest.mark.parametrize(("shape", "m"), [((1, 8, 8), 20), ((3, 5, 7), 60), ((2, 3, 3), 18)])
def test_fourier_rows_are_orthonormal(shape, m):
    A = CompressedSensing(shape, m)
    M = matrix(A)
    torch.testing.assert_close(M @ M.T, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-13)
    assert A.norm() == 1.0
    assert int(A.svd.singular_values.sum()) == m
    # Every entry is at most sqrt(2 / d): no measurement looks at few pixels alone.
    assert float(M.abs().max()) <= math.sqrt(2 / math.prod(shape)) + 1e-14
    y = rand(2, m)
    torch.testing.assert_close(A(A.adjoint(y)), y)


@pytest.mark.parametrize("picture", ["constant", "point", "wave"])
def test_fourier_keeps_its_share_of_every_picture(picture):
    # Given the signs, |A x|^2 d / m is the mean of m of d numbers a_k = d c_k^2 whose mean is |x|^2 = 1, drawn without
    # replacement: its variance is at most E a^2 / m. The signs bound E c_k^4 by 3 (sum_j h_kj^2 x_j^2)^2 <= 12 / d^2.
    # So the mean over s seeds deviates by at most sqrt(12 / (m s)), one standard deviation; five are allowed.
    d, m, seeds = 8 * 16, 32, 300
    x = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    if picture == "point":
        x[..., 3, 5] = 1.0
    else:
        j = torch.arange(d, dtype=torch.float64).reshape(x.shape)
        x = torch.ones_like(x) if picture == "constant" else torch.cos(2 * math.pi * 5 * j / d)
    x = x / x.norm()
    shares = torch.stack([CompressedSensing((1, 8, 16), m, seed=s)(x).square().sum() for s in range(seeds)]) * d / m
    assert abs(float(shares.mean()) - 1.0) < 5 * math.sqrt(12 / (m * seeds))
    # Without signs, a constant or a wave would be seen whole or not at all: a variance near d / m = 4.
    assert float(shares.var()) < 12 / m


def test_gaussian_entries_and_isometry():
    m, shape = 40, (2, 10, 15)
    A = CompressedSensing(shape, m, kind="gaussian", seed=1)
    d = 300
    g = A.matrix * m**0.5
    # Moments of m d standard normals, each within five standard deviations of its mean.
    n = m * d
    assert abs(float(g.mean())) < 5 / math.sqrt(n)
    assert abs(float(g.square().mean()) - 1.0) < 5 * math.sqrt(2 / n)
    assert abs(float(g.pow(4).mean()) - 3.0) < 5 * math.sqrt(96 / n)
    # For orthonormal x_j the m |A x_j|^2 are independent chi-squares of m degrees, variance 2 m and, of their squared
    # deviations, (2 m)^2 (2 + 12 / m).
    q, _ = torch.linalg.qr(rand(d, d))
    chi = m * A(q.reshape(d, *shape)).square().sum(1)
    assert abs(float(chi.mean()) - m) < 5 * math.sqrt(2 * m / d)
    assert abs(float((chi - m).square().mean()) / (2 * m) - 1.0) < 5 * math.sqrt((2 + 12 / m) / d)
    # The edges of the spectrum, sqrt(d / m) -+ 1, are passed by t / sqrt(m) with a chance below 2 exp(-t^2 / 2).
    s = A.svd.singular_values[:m]
    assert float(s.max()) < math.sqrt(d / m) + 1 + 5 / math.sqrt(m)
    assert float(s.min()) > math.sqrt(d / m) - 1 - 5 / math.sqrt(m)


@pytest.mark.parametrize("kind", ["fourier", "gaussian"])
def test_seeds(kind):
    x = rand(2, 1, 6, 6)
    A = CompressedSensing((1, 6, 6), 12, kind=kind, seed=4)
    again, other = (CompressedSensing((1, 6, 6), 12, kind=kind, seed=s) for s in (4, 5))
    assert torch.equal(A(x), again(x))
    assert not torch.equal(A(x), other(x))
    assert fingerprint(A) == fingerprint(again) != fingerprint(other)


@pytest.mark.parametrize("kind", ["fourier", "gaussian"])
def test_tables_follow_conversions_copies_and_inference_mode(kind):
    A, x = CompressedSensing((2, 4, 5), 12, kind=kind), rand(2, 2, 4, 5)
    with torch.inference_mode():
        exact = A(x)
        A.prox(x, exact, 1.0)
    leaf = x.clone().requires_grad_()
    A.prox(leaf, A(leaf), 0.5).square().sum().backward()
    # For data without noise the proximal step is the identity.
    torch.testing.assert_close(leaf.grad, 2 * x)
    twin = copy.deepcopy(A)
    rounded = A.float()(x)
    assert rounded.dtype == torch.float64
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin(x), exact, rtol=0, atol=0)
    other = CompressedSensing((2, 4, 5), 12, kind=kind, seed=9)
    other(x)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fourier", "gaussian"])
def test_on_cuda_it_is_the_same(kind):
    A, x = CompressedSensing((3, 8, 9), 50, kind=kind), rand(4, 3, 8, 9)
    exact = A(x)
    A = A.cuda()
    check_operator(A)
    torch.testing.assert_close(A(x.cuda()).cpu(), exact)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused():
    with pytest.raises(ShapeError, match="channels, height, width"):
        CompressedSensing((8, 8), 4)
    for m in (0, -1, 65, 0.5, 3.5):
        with pytest.raises(InputError, match="from 1 to 64"):
            CompressedSensing((1, 8, 8), m)
    with pytest.raises(InputError, match="round"):
        CompressedSensing((1, 8, 8), 0.25)
    with pytest.raises(InputError, match="fourier, gaussian"):
        CompressedSensing((1, 8, 8), 4, kind="hadamard")
    with pytest.raises(InputError, match="dense matrix of 20000 x 196608"):
        CompressedSensing((3, 256, 256), 20000, kind="gaussian")
    with pytest.raises(ShapeError, match="takes inputs"):
        CompressedSensing((1, 8, 8), 4)(rand(1, 1, 8, 9))
