"""Observation at scattered points against bilinear interpolation point by point and dense matrices in float64."""

import math

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import InputError, ShapeError
from invdiff.kernels import scattered as room
from invdiff.kernels.scattered import Tables, cpu, gather_sum, reference, tables
from invdiff.operators import Scattered
from invdiff.testing import check_operator


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(m: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    u = torch.rand(m, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u * torch.tensor([h - 1, w - 1])


CORNERS = torch.tensor(
    [[0.0, 0.0], [6.0, 8.0], [0.0, 8.0], [6.0, 0.0], [3.0, 4.0], [2.5, 8.0], [6.0, 1.25], [3.0, 4.0]]
)

OPERATORS = {
    "square": lambda: Scattered(points(11, 8, 8), (8, 8)),
    "channels": lambda: Scattered(points(30, 7, 9), (2, 3, 7, 9)),
    "corners and twice": lambda: Scattered(CORNERS, (2, 7, 9)),
    "one row": lambda: Scattered(points(5, 1, 6), (1, 1, 6)),
    "one pixel": lambda: Scattered(torch.zeros(2, 2), (1, 1)),
    "globe": lambda: Scattered(points(20, 5, 8) * 3 % 4 - torch.tensor([0.0, 30.0]), (2, 5, 8), periodic=True),
    "around the seam": lambda: Scattered(
        torch.tensor([[1.5, 7.5], [0.0, -0.25], [2.0, -1e-20]]), (3, 8), periodic=True
    ),
    "crowd": lambda: Scattered(points(500, 2, 2), (1, 6, 5)),
}


def by_hand(picture: torch.Tensor, A: Scattered) -> list[float]:
    """Interpolate along columns, then along rows."""
    h, w = picture.shape
    seen = []
    for r, q in A.points.tolist():
        i, j = math.floor(r), math.floor(q)
        across = []
        for row in (i, i + 1):
            line = picture[min(row, h - 1)]
            one, other = (line[k % w] if A.periodic else line[min(k, w - 1)] for k in (j, j + 1))
            across.append(one + (q - j) * (other - one))
        seen.append(float(across[0] + (r - i) * (across[1] - across[0])))
    return seen


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name):
    A = OPERATORS[name]()
    report = check_operator(A)
    assert report.adjointness < 1e-14
    assert report.gradient < 1e-14
    check_operator(A, dtype=torch.float32, rtol=1e-5)
    x = rand(3, *A.in_shape)
    planes = x.reshape(-1, *A.in_shape[-2:])
    expected = torch.tensor([by_hand(p, A) for p in planes], dtype=torch.float64).reshape(3, *A.out_shape)
    torch.testing.assert_close(A(x), expected, rtol=1e-13, atol=1e-13)
    y = rand(3, *A.out_shape, seed=1)
    with kernels.use("reference"):
        torch.testing.assert_close(A(x), expected, rtol=1e-13, atol=1e-13)
        back = A.adjoint(y)
    torch.testing.assert_close(A.adjoint(y), back, rtol=1e-13, atol=1e-13)
    assert A(x[:0]).shape == (0, *A.out_shape)
    torch.testing.assert_close(A(x[:1]), A(x)[:1], rtol=1e-14, atol=1e-14)
    wide = torch.stack((x, 9 * x), -1)[..., 0]
    assert torch.equal(A(wide), A(x))
    leaf = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(A, (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda t: A(t) ** 2, (leaf,), (y[:1].clone().requires_grad_(),), fast_mode=True)
    torch.testing.assert_close(torch.func.vmap(A)(torch.stack((x, 2 * x)))[1], 2 * A(x))


def test_planes_are_seen_exactly():
    # Bilinear interpolation is exact for a + b r + c q + d r q.
    p, (h, w) = points(40, 9, 13), (9, 13)
    r, q = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    f = lambda r, q: 1.0 + 2.0 * r - 3.0 * q + 0.5 * r * q  # noqa: E731
    torch.testing.assert_close(Scattered(p, (h, w))(f(r, q)[None])[0], f(*p.unbind(1)))


def sparse(outputs: int, inputs: int, k: int, dtype: torch.dtype) -> tuple[Tables, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    index = torch.randint(inputs, (outputs, k), generator=generator)
    weights = rand(outputs, k, seed=1) * (rand(outputs, k, seed=2) > -0.5)
    dense = torch.zeros(outputs, inputs, dtype=torch.float64)
    return tables(index, weights, inputs, dtype), dense.index_put_(
        (torch.arange(outputs)[:, None].expand_as(index), index), weights, accumulate=True
    )


CASES = [(1, 1, 1), (7, 5, 3), (4500, 500, 4), (300, 301, 4)]


def check(run, device: str) -> None:
    """One version against a dense product in float64, with poisoned outputs."""
    empty = torch.empty
    torch.empty = lambda *a, **k: t.fill_(torch.nan) if (t := empty(*a, **k)).is_floating_point() else t
    try:
        for outputs, inputs, k in CASES:
            for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
                made, dense = sparse(outputs, inputs, k, dtype)
                for matrix, D in ((made, dense), (made.mT, dense.mT)):
                    for batch in (0, 1, 3):
                        x = rand(batch, 2 * D.shape[1])[:, ::2].to(dtype)
                        got = run(x.to(device), *(t.to(device) for t in matrix.forward)).cpu()
                        expected = x.double() @ D.mT
                        assert got.shape == expected.shape and got.dtype == dtype
                        if batch:
                            error = (got.double() - expected).abs().max()
                            assert float(error) <= tolerance * float(expected.abs().max().clamp_min(1e-30))
    finally:
        torch.empty = empty


@pytest.mark.parametrize("run", [cpu.gather_sum, reference.gather_sum])
def test_versions_on_the_cpu(run):
    check(run, "cpu")


def check_on_a_gpu() -> None:
    """Every version there, and the operator compiled."""
    A = Scattered(points(1000, 60, 120), (3, 60, 120), periodic=True)
    x = rand(4, *A.in_shape)
    expected = A(x)
    A.cuda()
    torch.testing.assert_close(A(x.cuda()).cpu(), expected)
    torch.testing.assert_close(torch.compile(A, fullgraph=True)(x.cuda()).cpu(), expected)


SCRIPT = """
from test_scattered import check
from invdiff.kernels.scattered import gpu
check(gpu.gather_sum, {device!r})
"""


@has_triton
def test_triton_in_the_interpreter():
    check_alone(SCRIPT.format(device="cpu"), interpret=True)


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    check_alone(
        SCRIPT.format(device="cuda") + "from test_scattered import check_on_a_gpu\ncheck_on_a_gpu()", interpret=False
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_operation_is_well_formed():
    matrix, _ = sparse(7, 5, 3, torch.float64)
    torch.library.opcheck(room._operation, (rand(2, 5).requires_grad_(), matrix.forward, matrix.transposed))


def test_it_compiles_whole_once_its_tables_are_made():
    # Alone: the checker of shapes, which the tests switch on, cannot be traced.
    source = """
import torch
from invdiff.operators import Scattered
x, A = torch.rand(2, 3, 9, 8), Scattered(7 * torch.rand(20, 2), (3, 9, 8))
y = A(x)
assert torch.equal(torch.compile(A, fullgraph=True, backend="aot_eager")(x), y)
"""
    check_alone(source, interpret=False)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_told():
    with pytest.raises(InputError, match=r"1 of 2 points lie outside the grid, .* number 1 at \(0\.0, 8\.5\)"):
        Scattered(torch.tensor([[0.0, 8.0], [0.0, 8.5]]), (7, 9))
    with pytest.raises(InputError, match="any column"):
        Scattered(torch.tensor([[6.5, 8.0]]), (7, 9), periodic=True)
    for bad in (torch.zeros(0, 2), torch.full((1, 2), math.nan), torch.zeros(1, 2) + 1j):
        with pytest.raises(InputError, match="finite real"):
            Scattered(bad, (7, 9))
    with pytest.raises(ShapeError, match="rows and columns"):
        Scattered(torch.zeros(2, 3), (7, 9))
    for shape in ((9,), (0, 9)):
        with pytest.raises(ShapeError, match="positive sizes"):
            Scattered(torch.zeros(1, 2), shape)
    matrix, _ = sparse(7, 5, 3, torch.float64)
    with pytest.raises(ShapeError, match=r"Rows must be \(n, 5\)"):
        gather_sum(rand(2, 6), matrix)
    with pytest.raises(InputError, match=r"tables are torch\.float64 on cpu, the rows torch\.float32"):
        gather_sum(rand(2, 5).float(), matrix)
