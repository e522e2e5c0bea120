"""Wavelet operators, windows and diagonals: against PyWavelets, and every part of the contract."""

from itertools import product

import numpy as np
import pytest
import pywt
import torch

from invdiff.errors import CatalogueError, InputError, ShapeError
from invdiff.likelihoods import Gaussian
from invdiff.linear_gaussian import linear_gaussian
from invdiff.operators import (
    Blur,
    Diagonal,
    InverseWaveletTransform,
    Shifted,
    WaveletTransform,
    Window,
    gaussian_kernel,
    stack,
)
from invdiff.testing import check_operator

MODES = ("zero", "constant", "symmetric", "reflect", "periodic", "periodization")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = {
    "1-D orthonormal": ((2, 32), "db2", 3, "periodization", None),
    "1-D": ((1, 13), "bior2.4", 1, "symmetric", None),
    "last axis alone": ((2, 3, 14), "db2", 2, "reflect", 1),
    "2-D orthonormal": ((2, 16, 8), "haar", 2, "periodization", None),
    "2-D biorthogonal": ((1, 8, 12), "bior2.4", 1, "periodization", None),
    "2-D odd": ((1, 13, 12), "db2", 2, "periodization", None),
    "2-D grows": ((1, 17, 13), "db2", 2, "zero", None),
    "2-D, two times two channels": ((2, 2, 6, 7), "sym3", 1, "constant", 2),
    "3-D": ((1, 5, 6, 8), "haar", 1, "periodic", None),
    "3-D, two levels": ((1, 8, 9, 8), "haar", 2, "symmetric", None),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    settings = CASES[name]
    for A in (WaveletTransform(*settings), InverseWaveletTransform(*settings)):
        report = check_operator(A)
        assert (report.svd is not None) == ("orthonormal" in name)
        check_operator(A, dtype=torch.float32, rtol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["db4", "bior1.3", "bior2.4", "coif1"])
def test_coefficients_are_those_of_pywavelets(mode, wavelet):
    for shape, levels in (((3, 81), 3), ((2, 41, 60), 1), ((2, 41, 60), 2), ((1, 40, 41, 42), 1), ((1, 40, 41, 42), 2)):
        axes = tuple(range(-(len(shape) - 1), 0))
        x = rand(2, *shape)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            W, V = WaveletTransform(shape, wavelet, levels, mode), InverseWaveletTransform(shape, wavelet, levels, mode)
            c = W(x.to(dtype))
            bands = c.reshape(2, shape[0], 2 ** len(axes), *c.shape[2:])
            low, *high = pywt.wavedecn(x.numpy(), wavelet, mode, levels, axes)
            expected = {(levels, "a" * len(axes)): low}
            expected |= {(levels - i, key): v for i, level in enumerate(high) for key, v in level.items()}
            assert set(W.places) == set(expected)
            left = torch.ones_like(bands, dtype=torch.bool)
            for key, place in W.places.items():
                got = bands[(slice(None), slice(None), *place)]
                assert got.shape == expected[key].shape
                scale = np.abs(expected[key]).max()
                assert np.abs(got.double().numpy() - expected[key]).max() < tolerance * scale
                assert bool(left[(slice(None), slice(None), *place)].all()), "no two bands share a place"
                left[(slice(None), slice(None), *place)] = False
            assert not bands[left].any(), "what no coefficient fills is zero"
            back = V(c)
            assert back.dtype == dtype
            torch.testing.assert_close(back.double(), x, rtol=0, atol=max(1e-10, 10 * tolerance))
            torch.testing.assert_close(W.inverse(c), back)
            torch.testing.assert_close(V.inverse(x.to(dtype)), c)


def test_the_layout_of_one_level_is_bands_within_channels():
    x = rand(1, 2, 6, 8)
    c = WaveletTransform((2, 6, 8), "haar")(x)[0]
    for channel, (i, name) in product(range(2), enumerate(("aa", "ad", "da", "dd"))):
        expected = pywt.dwtn(x[0, channel].numpy(), "haar", "periodization")[name]
        torch.testing.assert_close(c[4 * channel + i], torch.tensor(expected))


def test_critical_sampling_where_sides_allow_it():
    W = WaveletTransform((3, 64, 32), "db4", levels=2)
    assert W.out_shape == (12, 32, 16)
    x = rand(2, 3, 64, 32)
    torch.testing.assert_close(W(x).square().sum(), x.square().sum())
    assert W.norm() == 1.0


def test_the_trajectories_of_wdno_fit_its_network():
    # 81 x 120 values, 41 x 60 coefficients a band, 64 x 64 inputs.
    W = WaveletTransform((1, 81, 120), "bior2.4")
    assert W.out_shape == (4, 41, 60)
    P = Window(W.out_shape, (64, 64))
    x = rand(2, 1, 81, 120)
    z = (P @ W)(x)
    assert z.shape == (2, 4, 64, 64)
    assert not z[..., 41:, :].any()
    assert not z[..., 60:].any()
    torch.testing.assert_close(InverseWaveletTransform((1, 81, 120), "bior2.4")(P.adjoint(z)), x)


def test_batches_of_none_and_one():
    for settings in CASES.values():
        W = WaveletTransform(*settings)
        x = rand(1, *W.in_shape)
        assert W(x[:0]).shape == (0, *W.out_shape)
        assert W.adjoint(W(x[:0])).shape == (0, *W.in_shape)
        torch.testing.assert_close(W(torch.cat((x, 2 * x)))[:1], W(x))


def test_a_value_a_band():
    W = WaveletTransform((2, 12, 14), "db2", 2, "symmetric")
    c = W(rand(50, 2, 12, 14))
    rms = W.measure(c)
    assert rms.shape == (2, 7)
    scale = W.by_band(rms)
    assert scale.shape == W.out_shape
    torch.testing.assert_close(W.measure(c / scale), torch.ones(2, 7, dtype=torch.float64))
    values = W.by_band(torch.arange(7.0))
    assert {float(v) for v in values.flatten()} == set(range(7)), "also 1 where nothing is"
    (place,) = [p for key, p in W.places.items() if key == (2, "dd")]
    assert float(values.reshape(2, 4, *values.shape[1:])[(0, *place)].unique()) == list(W.places).index((2, "dd"))
    with pytest.raises(ShapeError, match=r"Give 7 values, or \(2, 7\)"):
        W.by_band(torch.ones(3))


def test_moving_to_another_dtype_makes_other_banks():
    W = WaveletTransform((1, 16), "db2")
    x = rand(1, 1, 16)
    y = W(x.float())
    torch.testing.assert_close(W.double()(x).float(), y)
    assert W.norm() == 1.0


def test_bad_input_is_told(unchecked):
    with pytest.raises(CatalogueError, match="no discrete wavelet named 'db4x'; did you mean 'db4'"):
        WaveletTransform((1, 64, 64), "db4x")
    with pytest.raises(CatalogueError, match="no boundary mode named 'periodisation'; did you mean 'periodization'"):
        InverseWaveletTransform((1, 64, 64), mode="periodisation")
    with pytest.raises(InputError, match=r"takes 1 to 3 levels, got 4"):
        WaveletTransform((1, 64, 64), "db4", 4)
    with pytest.raises(ShapeError, match="needs a shape with channels"):
        WaveletTransform((64,))
    with pytest.raises(ShapeError, match="needs a shape with channels"):
        WaveletTransform((1, 4, 4, 4, 4), axes=4)


@pytest.mark.parametrize(
    ("shape", "size", "corner"),
    [((2, 5, 6), (8, 9), None), ((2, 5, 6), (3, 4), (1, 2)), ((2, 5, 6), (7, 3), (1, 2)), ((4, 6), (2, 6), (1, 0))],
)
def test_windows(shape, size, corner):
    A = Window(shape, size, corner)
    check_operator(A)
    x = torch.arange(1.0, 1 + np.prod(shape)).reshape(1, *shape)
    y = A(x)
    (top, left), lead = corner or (0, 0), shape[:-2]
    for i, j in product(range(size[0]), range(size[1])):
        a, b = (k + c if n > s else k - c for k, c, n, s in zip((i, j), (top, left), shape[-2:], size, strict=True))
        inside = 0 <= a < shape[-2] and 0 <= b < shape[-1]
        expected = x[..., a, b] if inside else torch.zeros(1, *lead)
        assert torch.equal(y[..., i, j], expected)


def test_windows_that_do_not_fit():
    with pytest.raises(ShapeError, match="does not fit the sides"):
        Window((1, 5, 6), (8, 9), (4, 0))
    with pytest.raises(ShapeError, match="one positive length and one corner an axis"):
        Window((5,), (5, 6))
    with pytest.raises(ShapeError, match="one positive length and one corner an axis"):
        Window((5, 5), (0, 6))


def test_diagonal():
    D = Diagonal(torch.tensor([[2.0], [-0.5], [0.0]]), (3, 4))
    check_operator(D)
    assert torch.equal(D(torch.ones(1, 3, 4))[0, :, 0], torch.tensor([2.0, -0.5, 0.0]))
    x = rand(2, 2, 4)
    E = Diagonal(rand(2, 4, seed=1))
    torch.testing.assert_close(E.inverse(E(x)), x)
    with pytest.raises(ShapeError, match="do not broadcast"):
        Diagonal(torch.ones(3), (3, 4))
    with pytest.raises(InputError, match="real and finite"):
        Diagonal(torch.tensor([torch.inf]))


def test_a_linear_problem_after_a_shifted_decoder():
    """The measurement of the decoded state, written out: y = A (L z + b)."""
    A = Blur(gaussian_kernel(3, 1.0), (1, 8, 8))
    L = InverseWaveletTransform((1, 8, 8), "db2", mode="symmetric")
    decoder = Shifted(L @ Diagonal(rand(*L.in_shape).exp()), rand(1, 8, 1, seed=3))
    check_operator(decoder.linear)
    z = rand(2, *L.in_shape, seed=4)
    y = A(decoder(z)) + 0.01 * rand(2, *A.out_shape, seed=5)
    problem = linear_gaussian(Gaussian(A, y[0], 0.1), decoder)
    assert problem is not None
    torch.testing.assert_close(problem.residual(z[:1]), (y - A(decoder(z)))[:1])
    with pytest.raises(ShapeError, match="does not broadcast to the outputs"):
        Shifted(L, torch.ones(3))


def test_several_variables_of_one_tensor_are_a_stack():
    """States of 9 rows and a forcing of 8, each with its own transform, in the channels of one grid."""
    u, f = InverseWaveletTransform((1, 9, 12), "haar"), InverseWaveletTransform((1, 8, 12), "haar")
    latent = (8, 6, 8)
    parts = [u @ Window(latent, (4, 5, 6)), f @ Window(latent, (4, 4, 6), (4, 0, 0))]
    A = stack(parts)
    assert A.out_shape == (9 * 12 + 8 * 12,)
    check_operator(A)
