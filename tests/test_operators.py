"""Measurement operators: every part of the contract against an independent reference."""

import copy

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invdiff.errors import InputError, ShapeError
from invdiff.operators import (
    Affine,
    Blur,
    Downsampling,
    Inpainting,
    Scale,
    Separable,
    bicubic_kernel,
    box_mask,
    gaussian_kernel,
    motion_kernel,
    random_mask,
)
from invdiff.operators.base import LinearOperator, fingerprint
from invdiff.operators.boundary import good_length
from invdiff.testing import check_operator

FEW = settings(deadline=None, derandomize=True, max_examples=25)
SCIPY_MODES = {"circular": "wrap", "reflect": "mirror", "zero": "constant"}
BOUNDARIES = ["circular", "reflect", "zero", "valid"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def box(h: int, w: int) -> torch.Tensor:
    return torch.ones(h, w, dtype=torch.float64) / (h * w)


# One of every kind; a new operator belongs here.
OPERATORS = {
    "scale": lambda: Scale((2, 5, 4), -1.5),
    "separable wide": lambda: Separable(rand(4, 9), rand(3, 7, seed=1), (2, 9, 7)),
    "separable tall": lambda: Separable(rand(11, 6), rand(3, 7, seed=1), (2, 6, 7)),
    "separable by channel": lambda: Separable(rand(2, 4, 6), rand(2, 9, 7, seed=1), (2, 6, 7)),
    "downsampling": lambda: Downsampling((3, 16, 12), 4),
    "downsampling symmetric": lambda: Downsampling((1, 9, 12), 3, boundary="symmetric"),
    "inpainting": lambda: Inpainting(random_mask((8, 7), 0.4), (3, 8, 7)),
    "inpainting by channel": lambda: Inpainting(random_mask((3, 8, 7), 0.1), (3, 8, 7)),
    "composition": lambda: Downsampling((1, 8, 8), 2) @ Scale((1, 8, 8), 2.0),
    "composition without svd": lambda: Downsampling((1, 8, 8), 2) @ Blur(rand(3, 3), (1, 8, 8)),
    "flat kernel with nulls": lambda: Blur(box(4, 4), (2, 8, 8), "circular"),
    "kernel by channel": lambda: Blur(rand(3, 3, 4), (3, 9, 8), "reflect"),
    "kernel by channel, circular": lambda: Blur(rand(3, 3, 4), (3, 9, 8), "circular"),
    "large circular kernel": lambda: Blur(rand(7, 9), (1, 5, 6), "circular"),
    "float32 kernel": lambda: Blur(gaussian_kernel(5, 1.0).float(), (2, 9, 8)),
} | {
    f"blur {boundary} {name} {method}": lambda boundary=boundary, kernel=kernel, method=method: Blur(
        kernel, (2, 9, 10), boundary, method
    )
    for boundary in BOUNDARIES
    for name, kernel, methods in (
        ("odd", rand(5, 3), ("direct", "fft")),
        ("even", rand(4, 6), ("direct", "fft")),
        ("gaussian", gaussian_kernel((5, 4), (1.2, 0.7)), ("separable", "fft")),
    )
    for method in methods
}


def matrix(A: LinearOperator) -> torch.Tensor:
    """Dense matrix of an operator: column j is A e_j."""
    d = int(np.prod(A.in_shape))
    return A(torch.eye(d, dtype=torch.float64).reshape(d, *A.in_shape)).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_contract(name):
    report = check_operator(OPERATORS[name]())
    assert report.adjointness < 1e-12
    assert report.gradient < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_float32_inputs_are_followed(name):
    A = OPERATORS[name]()
    # 100 roundings of float32 in each figure is what sums of some hundred terms may lose.
    check_operator(A, dtype=torch.float32, rtol=1e-5)
    x = rand(2, *A.in_shape)
    torch.testing.assert_close(A(x.float()).double(), A(x), rtol=0, atol=1e-5 * float(A(x).abs().max()))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients(name):
    A = OPERATORS[name]()
    x = rand(1, *A.in_shape).requires_grad_()
    y = rand(1, *A.out_shape).requires_grad_()
    assert torch.autograd.gradcheck(A, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(A.adjoint, (y,), fast_mode=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_against_the_dense_matrix(name):
    A = OPERATORS[name]()
    M = matrix(A)
    x, y, w = rand(3, *A.in_shape), rand(3, *A.out_shape, seed=1), torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    eye = torch.eye(M.shape[1], dtype=torch.float64)
    expected = torch.stack(
        [
            torch.linalg.solve(eye + v * M.T @ M, b + v * M.T @ t)
            for b, t, v in zip(x.flatten(1), y.flatten(1), w, strict=True)
        ]
    )
    torch.testing.assert_close(A.prox(x, y, w).flatten(1), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(A.prox(x, y, 0.3).flatten(1)[0], expected[0], rtol=1e-8, atol=1e-9)
    assert A.norm() == pytest.approx(
        float(torch.linalg.matrix_norm(M, ord=2)), rel=1e-12 if A.svd is not None else 2e-3
    )
    if A.svd is None:
        return
    # A function with f(0) != 0: the null spaces of A and of A^T count.
    for apply, T, t in ((A.svd.gram, M.T @ M, x), (A.svd.outer, M @ M.T, y)):
        inverse = torch.linalg.inv(torch.eye(len(T), dtype=torch.float64) + 2.0 * T)
        torch.testing.assert_close(apply(lambda s2: 1.0 / (1.0 + 2.0 * s2), t).flatten(1), t.flatten(1) @ inverse)


@pytest.mark.parametrize("name", OPERATORS)
def test_conversion_to_float32_and_back_refreshes_tables(name):
    A = OPERATORS[name]()
    x = rand(2, *A.in_shape)
    exact = A(x)
    A.prox(x, exact, 1.0)
    twin = copy.deepcopy(A)
    rounded = A.float()(x)
    assert rounded.dtype == torch.float64
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin(x), exact, rtol=0, atol=0)


@FEW
@given(
    h=st.integers(4, 12),
    w=st.integers(4, 12),
    kh=st.integers(1, 6),
    kw=st.integers(1, 6),
    boundary=st.sampled_from(BOUNDARIES),
    channels=st.integers(1, 3),
    rank_one=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blur_is_scipys_convolution_and_all_methods_agree(h, w, kh, kw, boundary, channels, rank_one, seed):
    if boundary == "valid":
        kh, kw = min(kh, h), min(kw, w)
    kernel = rand(kh, 1, seed=seed) * rand(1, kw, seed=seed + 1) if rank_one else rand(kh, kw, seed=seed)
    x = rand(2, channels, h, w, seed=seed + 2)
    expected = np.stack(
        [
            scipy.signal.convolve2d(p, kernel.numpy(), mode="valid")
            if boundary == "valid"
            else scipy.ndimage.convolve(p, kernel.numpy(), mode=SCIPY_MODES[boundary])
            for p in x.reshape(-1, h, w).numpy()
        ]
    )
    expected = torch.from_numpy(expected).reshape(2, channels, *expected.shape[-2:])
    for method in ("auto", "direct", "fft", *(("separable",) if rank_one else ())):
        A = Blur(kernel, (channels, h, w), boundary, method)
        torch.testing.assert_close(A(x), expected, rtol=1e-11, atol=1e-11)
        y = torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(expected.shape)))
        assert float((A(x) * y).sum()) == pytest.approx(float((x * A.adjoint(y)).sum()), rel=1e-10, abs=1e-10)


@FEW
@given(
    c=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    deficient=st.booleans(),
)
def test_separable_svd_for_every_shape(c, sizes, deficient):
    p, h, q, w = sizes
    left = rand(p, h) if not deficient else rand(p, 1) @ rand(1, h)
    check_operator(Separable(left, rand(q, w, seed=1), (c, h, w)))


@FEW
@given(h=st.integers(2, 9), w=st.integers(2, 9), c=st.integers(1, 3), fraction=st.floats(0.05, 1.0))
def test_inpainting_keeps_the_observed_entries_in_order(h, w, c, fraction):
    mask = random_mask((h, w), fraction)
    assert int(mask.sum()) == max(1, round(fraction * h * w))
    A, x = Inpainting(mask, (c, h, w)), rand(2, c, h, w)
    assert torch.equal(A(x), torch.stack([p[mask.expand(c, h, w)] for p in x]))
    assert torch.equal(A.fill(A(x), value=7.0), torch.where(mask, x, 7.0))
    assert A.svd.singular_values.sum() == A.out_shape[0] == c * int(mask.sum())
    check_operator(A)


@pytest.mark.parametrize(
    ("factor", "h", "w"), [(1, 5, 6), (2, 8, 10), (3, 27, 9), (4, 32, 16), (5, 15, 10), (8, 16, 24)]
)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_downsampling_is_torchs_antialiased_interpolation(factor, h, w, mode):
    A, x = Downsampling((3, h, w), factor, mode), rand(2, 3, h, w)
    expected = torch.nn.functional.interpolate(x, (h // factor, w // factor), mode=mode, antialias=True)
    # torch rounds its scale to single precision, which shows where the factor is no power of two. Outputs of one pixel
    # are left out: there torch 2.14 depends on the memory layout of its input.
    tolerance = 1e-12 if factor & (factor - 1) == 0 else 1e-7
    torch.testing.assert_close(A(x), expected, rtol=tolerance, atol=tolerance)


def test_downsampling_of_constants_means_and_interior():
    x = rand(1, 1, 24, 24)
    for edge in ("truncate", "symmetric"):
        assert torch.allclose(Downsampling((1, 24, 24), 4, boundary=edge)(torch.ones_like(x)), x.new_ones(1, 1, 6, 6))
    means = Downsampling((1, 24, 24), 4, "box")(x)
    torch.testing.assert_close(means, torch.nn.functional.avg_pool2d(x, 4))
    # Inside, it is convolution with the bicubic kernel, then every fourth pixel.
    blurred = Blur(bicubic_kernel(4), (1, 24, 24), "valid")(x)
    torch.testing.assert_close(Downsampling((1, 24, 24), 4)(x)[..., 2:4, 2:4], blurred[..., 2:7:4, 2:7:4])


def test_downsampling_symmetric_is_matlabs():
    # MATLAB's padding of one axis, written out: two copies of the axis around it, mirrored with the edge repeated.
    x = rand(1, 1, 8, 8)
    wide = torch.cat([x.flip(-1), x, x.flip(-1)], -1)
    wide = torch.cat([wide.flip(-2), wide, wide.flip(-2)], -2)
    expected = Downsampling((1, 24, 24), 2)(wide)[..., 4:8, 4:8]
    torch.testing.assert_close(Downsampling((1, 8, 8), 2, boundary="symmetric")(x), expected)


def test_spectral_nulls_and_negative_kernels():
    A = Blur(box(4, 4), (1, 8, 8), "circular")
    s = A.svd.singular_values
    assert int((s == 0).sum()) == 64 - 25  # a box of 4 on 8 pixels has nulls at 3 of the 8 frequencies of each axis
    assert A.norm() == pytest.approx(1.0, rel=1e-14)
    assert Blur(-box(3, 3), (1, 8, 8), "circular").norm() == pytest.approx(1.0, rel=1e-14)


def test_the_cost_model_picks_each_method():
    gaussian, motion = gaussian_kernel(23, 3.0), motion_kernel(61)
    assert Blur(motion, (3, 256, 256)).chosen_method("cpu") == "fft"
    assert Blur(motion, (3, 256, 256)).chosen_method("cuda") == "fft"
    assert Blur(gaussian, (3, 256, 256)).chosen_method("cuda") == "separable"
    assert Blur(gaussian, (3, 64, 64)).chosen_method("cpu") == "separable"
    assert Blur(motion_kernel(3), (3, 256, 256)).chosen_method("cpu") == "direct"
    assert [good_length(n) for n in (1, 2, 7, 316, 286, 257, 1025)] == [1, 2, 8, 320, 288, 270, 1080]


def test_float32_gaussian_is_found_to_be_rank_one():
    A = Blur(gaussian_kernel(9, 1.5).float(), (1, 16, 16), method="separable")
    B = Blur(gaussian_kernel(9, 1.5).float(), (1, 16, 16), method="direct")
    x = rand(1, 1, 16, 16)
    torch.testing.assert_close(A(x), B(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="rank one"):
        Blur(rand(3, 3), (1, 8, 8), method="separable")


def test_tables_made_in_inference_mode_serve_gradients():
    for A in (Blur(rand(5, 5), (1, 8, 8), method="fft"), Downsampling((1, 8, 8), 2)):
        with torch.inference_mode():
            A(rand(1, 1, 8, 8))
        x = rand(1, 1, 8, 8).requires_grad_()
        A(x).square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * A.adjoint(A(x)).detach())


def test_loading_other_weights_refreshes_tables():
    A, B, x = (
        Blur(rand(5, 5), (1, 8, 8), method="fft"),
        Blur(rand(5, 5, seed=9), (1, 8, 8), method="fft"),
        rand(1, 1, 8, 8),
    )
    A(x)
    A.load_state_dict(B.state_dict())
    assert torch.equal(A(x), B(x))
    assert fingerprint(A) == fingerprint(B)


def test_kernels():
    g = gaussian_kernel(61, 3.0)
    t = torch.arange(61, dtype=torch.float64) - 30
    assert float(g.sum()) == pytest.approx(1.0, abs=1e-14)
    assert float((g.sum(0) * t**2).sum()) == pytest.approx(9.0, rel=1e-6)
    assert torch.equal(g, g.flip(0))
    state = torch.random.get_rng_state()
    for seed, intensity in ((0, 0.5), (1, 0.0), (2, 1.0)):
        k = motion_kernel(61, intensity, seed)
        assert float(k.sum()) == pytest.approx(1.0, abs=1e-13)
        assert float(k.min()) >= 0.0
        assert abs(float((k.sum(1) * t).sum())) < 1e-10
        assert abs(float((k.sum(0) * t).sum())) < 1e-10
        assert torch.equal(k, motion_kernel(61, intensity, seed))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(motion_kernel(61, seed=1), motion_kernel(61, seed=2))
    # Without shake the path is a line: its second moments are those of one direction, to the pixels' own width.
    k, u = motion_kernel(61, 0.0, 3), t
    cov = torch.stack([(k.sum(1) * u**2).sum(), (k * u[:, None] * u).sum(), (k.sum(0) * u**2).sum()])
    spread = torch.linalg.eigvalsh(torch.stack([cov[:2], cov[1:]]))
    assert spread[0] < 0.5
    assert spread[1] > 50.0


def test_masks():
    mask = box_mask((16, 12), (4, 6))
    assert int((~mask).sum()) == 24
    assert not mask[6:10, 3:9].any()
    for seed in range(20):
        rows, columns = (~box_mask((3, 16, 12), 4, margin=2, seed=seed))[0].nonzero().T
        assert len(rows) == 16
        assert rows.min() >= 2
        assert rows.max() < 14
        assert columns.min() >= 2
        assert columns.max() < 10
    assert not torch.equal(random_mask((9, 9), 0.5, seed=0), random_mask((9, 9), 0.5, seed=1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused():
    with pytest.raises(ShapeError, match="too large"):
        Blur(rand(9, 9), (1, 4, 4), "reflect")
    with pytest.raises(ShapeError, match="too large"):
        Blur(rand(5, 5), (1, 4, 4), "valid")
    with pytest.raises(ShapeError, match="kernel must be"):
        Blur(rand(2, 3, 3), (3, 8, 8))
    with pytest.raises(InputError, match="boundary"):
        Blur(rand(3, 3), (3, 8, 8), "mirror")
    with pytest.raises(InputError, match="finite"):
        Blur(rand(3, 3) / 0.0, (3, 8, 8))
    with pytest.raises(ShapeError, match="takes inputs"):
        Blur(rand(3, 3), (3, 8, 8))(rand(1, 1, 8, 8))
    with pytest.raises(ShapeError, match="mask"):
        Inpainting(torch.ones(8, 7), (3, 8, 8))
    with pytest.raises(InputError, match="0 "):
        Inpainting(torch.full((8, 8), 0.5), (3, 8, 8))
    with pytest.raises(InputError, match="observes nothing"):
        Inpainting(torch.zeros(8, 8), (3, 8, 8))
    with pytest.raises(ShapeError, match="divide"):
        Downsampling((3, 9, 8), 4)
    with pytest.raises(ShapeError, match="left"):
        Separable(rand(3, 4), rand(3, 4), (1, 5, 4))
    with pytest.raises(InputError, match="fit"):
        box_mask((8, 8), 9)
    with pytest.raises(InputError, match="fraction"):
        random_mask((8, 8), 0.0)


class Broken(LinearOperator):
    """Down-sampling by every second pixel with one part wrong."""

    def __init__(self, part: str) -> None:
        super().__init__((1, 6, 6), (1, 3, 3))
        self.part = part

    def forward(self, x):
        y = x[..., ::2, ::2]
        return y.abs() if self.part == "linearity" else y

    def adjoint(self, y):
        x = y.new_zeros(len(y), *self.in_shape)
        x[..., ::2, ::2] = y * (1.001 if self.part == "adjointness" else 1.0)
        return x

    def norm(self):
        return 1.1 if self.part == "norm" else super().norm()

    def prox(self, x, y, weight):
        return super().prox(x, y, 1.01 * weight if self.part == "prox" else weight)


@pytest.mark.parametrize("part", ["linearity", "adjointness", "gradient", "norm", "prox"])
def test_the_check_finds_what_is_broken(part):
    check_operator(Broken("nothing"))
    with pytest.raises(AssertionError, match=part):
        check_operator(Broken("adjointness" if part == "gradient" else part))


def test_the_check_takes_operators_that_are_not_linear():
    assert check_operator(Affine((2, 3, 3), 2.0, -1.0)).gradient < 1e-8
