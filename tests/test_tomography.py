"""Tomography against Joseph's rays walked one by one, analytic line integrals, skimage and its own dense matrix."""

import copy
import math

import numpy as np
import pytest
import torch

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import fingerprint
from invdiff.operators.tomography import Tomography
from invdiff.testing import check_operator

ODD_ANGLES = torch.tensor([0.0, 10.0, 45.0, 90.0, -33.0, 135.0, 210.0], dtype=torch.float64)

OPERATORS = {
    "even": lambda: Tomography((1, 8, 8), 6),
    "odd": lambda: Tomography((2, 7, 9), 5),
    "tall": lambda: Tomography((3, 9, 4), ODD_ANGLES),
    "wide": lambda: Tomography((1, 3, 10), ODD_ANGLES),
    "one pixel": lambda: Tomography((1, 1, 1), 3),
    "cut off": lambda: Tomography((1, 8, 7), 4, detectors=5),
    "with room": lambda: Tomography((1, 5, 6), 4, detectors=24),
    "one angle": lambda: Tomography((1, 6, 5), 1),
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coordinates(h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right and up from the axis, pixels."""
    v, u = torch.meshgrid(
        h // 2 - torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64) - w // 2, indexing="ij"
    )
    return u, v


def gaussian(h: int, w: int, u0: float, v0: float, std: float) -> torch.Tensor:
    u, v = coordinates(h, w)
    return torch.exp(-((u - u0) ** 2 + (v - v0) ** 2) / (2 * std**2))[None, None]


def walked(picture: np.ndarray, degrees: float, detectors: int) -> np.ndarray:
    """Joseph's rays one by one: a step a row or a column, linear interpolation between the pixels passed there."""
    h, w = picture.shape
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    if abs(c) < abs(s):  # Steps along columns: the transposed picture, in which right is down and up is left.
        picture, (h, w), (c, s) = picture.T, (w, h), (-s, -c)
    sums = np.zeros(detectors)
    for k in range(detectors):
        for i in range(h):
            # u c + v s = k - detectors // 2 on row i, with v = h // 2 - i; columns outside the picture hold zero.
            j = (k - detectors // 2 - (h // 2 - i) * s) / c + w // 2
            sums[k] += np.interp(j, np.arange(-1, w + 1), np.pad(picture[i], 1), left=0.0, right=0.0) / abs(c)
    return sums


@pytest.mark.parametrize("name", OPERATORS)
def test_contract(name):
    report = check_operator(OPERATORS[name]())
    assert report.adjointness < 1e-14
    assert report.gradient < 1e-14


@pytest.mark.parametrize("name", OPERATORS)
def test_float32_inputs_are_followed(name):
    A = OPERATORS[name]()
    check_operator(A, dtype=torch.float32, rtol=1e-5)
    x = rand(2, *A.in_shape)
    torch.testing.assert_close(A(x.float()).double(), A(x), rtol=0, atol=1e-5 * float(A(x).abs().max()))
    assert A.filtered_back_projection(A(x.float())).dtype == torch.float32


@pytest.mark.parametrize("name", OPERATORS)
def test_rays_are_josephs(name):
    A = OPERATORS[name]()
    x = rand(1, *A.in_shape)
    expected = [
        [walked(channel, float(a), A.out_shape[2]) for a in A.angles] for channel in x[0].numpy()
    ]  # (c, angles, detectors)
    torch.testing.assert_close(A(x)[0], torch.tensor(np.array(expected)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_is_the_dense_transpose_and_gradients_are_exact_twice(name):
    A = OPERATORS[name]()
    d, m = math.prod(A.in_shape), math.prod(A.out_shape)
    M = A(torch.eye(d, dtype=torch.float64).reshape(d, *A.in_shape)).flatten(1).T
    T = A.adjoint(torch.eye(m, dtype=torch.float64).reshape(m, *A.out_shape)).flatten(1)
    assert torch.equal(M, T)
    x, y = rand(1, *A.in_shape).requires_grad_(), rand(1, *A.out_shape).requires_grad_()
    assert torch.autograd.gradcheck(A, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(A.adjoint, (y,), fast_mode=True)
    (slope,) = torch.autograd.grad((A(x) ** 3).sum(), x, create_graph=True)
    v = rand(1, *A.in_shape, seed=2)
    (curvature,) = torch.autograd.grad((slope * v).sum(), x)
    torch.testing.assert_close(curvature, A.adjoint(6 * A(x) * A(v)))


def test_line_integrals_of_a_gaussian_blob():
    # The error of linear interpolation, at most f'' / 8 with |f''| <= 1 / std^2 for a peak of 1, over the integral of
    # f's own width: 1 / (8 std^2) of the profile's peak; sums of a Gaussian along the ray are exact to rounding.
    std, u0, v0 = 5.0, 3.3, -6.7
    A = Tomography((1, 64, 60), ODD_ANGLES)
    theta = torch.deg2rad(A.angles)[:, None]
    s = torch.arange(A.out_shape[2], dtype=torch.float64) - A.out_shape[2] // 2
    peak = std * math.sqrt(2 * math.pi)
    exact = peak * torch.exp(-((s - u0 * theta.cos() - v0 * theta.sin()) ** 2) / (2 * std**2))
    error = (A(gaussian(64, 60, u0, v0, std))[0, 0] - exact).abs().max()
    assert float(error) < peak / (8 * std**2)
    # Second order: twice the width at twice the size has a quarter of the relative error.
    finer = Tomography((1, 128, 120), ODD_ANGLES)
    s = torch.arange(finer.out_shape[2], dtype=torch.float64) - finer.out_shape[2] // 2
    exact = 2 * peak * torch.exp(-((s - 2 * u0 * theta.cos() - 2 * v0 * theta.sin()) ** 2) / (8 * std**2))
    half = (finer(gaussian(128, 120, 2 * u0, 2 * v0, 2 * std))[0, 0] - exact).abs().max() / 2
    assert float(half / error) == pytest.approx(0.25, rel=0.15)


@pytest.mark.parametrize(("h", "w"), [(48, 48), (41, 41), (33, 48)])
def test_axis_and_angles_are_skimages(h, w):
    skimage = pytest.importorskip("skimage.transform")
    x = gaussian(h, w, 7.0, 3.0, 3.0) + 0.5 * gaussian(h, w, -6.0, -4.0, 2.5)
    degrees = np.array([0.0, 20.0, 45.0, 77.0, 90.0, 130.0, 175.0])
    expected = torch.from_numpy(skimage.radon(x[0, 0].numpy(), degrees, circle=False)).T
    A = Tomography((1, h, w), torch.from_numpy(degrees), detectors=expected.shape[1])
    # skimage interpolates a rotated picture bilinearly, in both axes: 2 f'' / 8 at most, f'' <= 1 / 2.5^2.
    assert float((A(x)[0, 0] - expected).abs().max() / expected.max()) < 0.04


def test_quarter_turns_and_opposite_rays():
    x = rand(1, 2, 9, 9)
    angles = torch.tensor([0.0, 17.0, 60.0], dtype=torch.float64)
    turned = Tomography((2, 9, 9), angles + 90.0)(torch.rot90(x, 1, (-2, -1)))
    straight = Tomography((2, 9, 9), angles)(x)
    torch.testing.assert_close(turned, straight)
    torch.testing.assert_close(Tomography((2, 9, 9), angles + 180.0)(x), straight.flip(-1))
    torch.testing.assert_close(Tomography((2, 9, 9), angles)(x.flip(-1))[:, :, 0], straight[:, :, 0].flip(-1))


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 9), (3, 12), (1, 1)])
def test_the_default_detectors_lose_nothing(h, w):
    angles = torch.arange(0.0, 360.0, 7.5, dtype=torch.float64)
    A = Tomography((1, h, w), angles)
    wide = Tomography((1, h, w), angles, detectors=A.out_shape[2] + 20)
    x = rand(1, 1, h, w)
    torch.testing.assert_close(wide(x)[..., 10:-10], A(x))
    assert wide(x)[..., :10].abs().max() == wide(x)[..., -10:].abs().max() == 0.0
    # Along rows and columns the detectors count every pixel once.
    torch.testing.assert_close(A(x)[0, 0, angles % 90 == 0].sum(1), x.sum().expand(4))


def test_filtered_back_projection_of_a_smooth_picture():
    x = gaussian(48, 40, 5.0, -4.0, 4.0) + 0.5 * gaussian(48, 40, -7.0, 8.0, 3.0)
    x = torch.cat([x, 2 * x], 1)
    A = Tomography((2, 48, 40), 90)
    # Joseph's interpolation and the one of back projection blur by about 1 / 6 pixel^2 each: near 2 % at a std of 3.
    assert float((A.filtered_back_projection(A(x)) - x).abs().max() / x.max()) < 0.03
    # The same rays in any order, twice over, or over the full circle.
    other = torch.cat([A.angles.flip(0), A.angles + 180.0])
    B = Tomography((2, 48, 40), other)
    torch.testing.assert_close(B.filtered_back_projection(B(x)), A.filtered_back_projection(A(x)), rtol=0, atol=1e-10)
    # A denser half of the circle does not count for more.
    C = Tomography((2, 48, 40), torch.cat([torch.arange(0.0, 90.0, 1.0), torch.arange(90.0, 180.0, 2.0)]))
    assert float((C.filtered_back_projection(C(x)) - x).abs().max() / x.max()) < 0.03


def test_filtered_back_projection_matches_skimages():
    skimage = pytest.importorskip("skimage.transform")
    x = gaussian(32, 32, 3.0, -4.0, 3.0)
    A = Tomography((1, 32, 32), 40, detectors=32)
    y = A(x)
    expected = torch.from_numpy(skimage.iradon(y[0, 0].numpy().T, circle=True, output_size=32))
    u, v = coordinates(32, 32)
    inside = u**2 + v**2 <= 15**2
    torch.testing.assert_close(A.filtered_back_projection(y)[0, 0][inside], expected[inside], rtol=0, atol=1e-3)


def test_a_missing_wedge_is_left_empty():
    # Beyond the gap's cap, no angle stands for what was not measured: all but the two at the ends weigh the same.
    A = Tomography((1, 9, 9), torch.arange(30.0, 150.0, 2.0, dtype=torch.float64))
    one = torch.zeros(60, 1, 60, A.out_shape[2], dtype=torch.float64)
    one[torch.arange(60), 0, torch.arange(60), A.out_shape[2] // 2] = 1.0
    axis = A.filtered_back_projection(one)[:, 0, 4, 4] * 4 * 180 / math.pi  # the ramp's value at its centre is 1 / 4
    torch.testing.assert_close(axis[1:-1], torch.full((58,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(axis[[0, -1]], torch.full((2,), (2.0 + 6.0) / 2, dtype=torch.float64))


def test_tables_follow_conversions_copies_and_inference_mode():
    A, x = Tomography((1, 8, 9), 7), rand(2, 1, 8, 9)
    with torch.inference_mode():
        exact = A(x)
    leaf = x.clone().requires_grad_()
    A(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * A.adjoint(exact))
    twin = copy.deepcopy(A)
    rounded = A.float()(x)
    assert rounded.dtype == torch.float64
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin(x), exact, rtol=0, atol=0)
    B = Tomography((1, 8, 9), torch.linspace(0.0, 90.0, 7))
    B(x)
    B.load_state_dict(twin.state_dict())
    assert torch.equal(B(x), exact)
    assert fingerprint(B) == fingerprint(twin) != fingerprint(Tomography((1, 8, 9), 7, detectors=9))


@pytest.mark.gpu
def test_on_cuda_it_is_the_same_and_repeats_bitwise():
    A, x = Tomography((2, 33, 32), 17, detectors=80), rand(5, 2, 33, 32)
    exact = A(x)
    back = A.adjoint(exact)
    A = A.cuda()
    check_operator(A)
    x = x.cuda()
    y = A(x)
    torch.testing.assert_close(y.cpu(), exact)
    torch.testing.assert_close(A.adjoint(y).cpu(), back)
    for _ in range(20):
        assert torch.equal(A(x), y)
        assert torch.equal(A.adjoint(y), A.adjoint(y))


def test_angles_of_every_real_type_are_taken():
    x = rand(1, 1, 5, 6)
    expected = Tomography((1, 5, 6), torch.tensor([0.0, 30.0, 90.0], dtype=torch.float64))(x)
    for dtype in (torch.float32, torch.int32):
        assert torch.equal(Tomography((1, 5, 6), torch.tensor([0, 30, 90], dtype=dtype))(x), expected)
    uniform = Tomography((1, 5, 6), 6)
    assert uniform.angles.tolist() == [0.0, 30.0, 60.0, 90.0, 120.0, 150.0]
    assert torch.equal(uniform(x)[:, :, [0, 1, 3]], expected)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused():
    for shape in ((8, 8), (1, 0, 8), (1, 8, 8, 8)):
        with pytest.raises(ShapeError, match="channels, height, width"):
            Tomography(shape)
    with pytest.raises(ShapeError, match="1-D"):
        Tomography((1, 8, 8), torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="1-D"):
        Tomography((1, 8, 8), torch.tensor(3.0))
    for angles in (torch.zeros(0), torch.tensor([0.0, math.nan]), torch.tensor([math.inf]), torch.zeros(2) + 1j):
        with pytest.raises(InputError, match="finite real"):
            Tomography((1, 8, 8), angles)
    for angles in (0, -3, 2.5):
        with pytest.raises(InputError, match="at least 1"):
            Tomography((1, 8, 8), angles)
    for detectors in (0, -1, 4.5):
        with pytest.raises(InputError, match="detectors"):
            Tomography((1, 8, 8), 4, detectors=detectors)
    with pytest.raises(ShapeError, match="takes inputs"):
        Tomography((1, 8, 8), 4)(rand(1, 1, 8, 9))
    with pytest.raises(ShapeError, match="Sinograms"):
        Tomography((1, 8, 8), 4).filtered_back_projection(rand(1, 1, 4, 8))
