"""Magnetic resonance imaging: against numpy's transforms, the contract, and an exact posterior."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import samplers
from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import fingerprint
from invdiff.operators.coil_maps import birdcage_maps
from invdiff.operators.mri import MRI, cartesian_mask
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior
from invdiff.problem import Problem
from invdiff.testing import check_operator

SIZES = [(8, 6), (7, 9), (6, 5), (1, 4)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Half of k-space, at random: unlike lines, it shows rows and columns taken one for the other."""
    return rand(*size, seed=seed) > 0


def maps(coils: int, size: tuple[int, int]) -> Tensor:
    """Maps without any symmetry or normalisation."""
    return torch.complex(rand(coils, *size, seed=5), rand(coils, *size, seed=6))


OPERATORS = {
    f"{h} x {w}, {'one coil' if coils is None else f'{coils} coils'}": lambda size=(h, w), coils=coils: MRI(
        points(size), (2, *size), coil_maps=None if coils is None else maps(coils, size)
    )
    for h, w in SIZES
    for coils in (None, 1, 3)
}


@pytest.mark.parametrize("name", OPERATORS)
def test_contract(name):
    A = OPERATORS[name]()
    report = check_operator(A)
    assert report.adjointness < 1e-13
    assert (report.svd is None) == (A.coil_maps is not None)
    # Maps of magnitude near 1 have singular values from 0 to some units: 100 roundings of float32 in each figure.
    check_operator(A, dtype=torch.float32, rtol=1e-5)


@pytest.mark.parametrize("coils", [None, 3])
@pytest.mark.parametrize("size", SIZES)
def test_against_numpy(size, coils):
    mask, s = points(size), None if coils is None else maps(coils, size)
    A = MRI(mask, (2, *size), coil_maps=s)
    x = rand(2, 2, *size, seed=1)
    picture = (x[:, 0] + 1j * x[:, 1]).numpy()[:, None] * (1.0 if s is None else s.numpy())
    axes = (-2, -1)
    k = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(picture, axes=axes), norm="ortho"), axes=axes)
    observed = k[..., mask.numpy()]
    expected = torch.from_numpy(np.stack((observed.real, observed.imag), axis=-2))
    y = A(x)
    torch.testing.assert_close(y, expected if coils else expected[:, 0], rtol=0, atol=1e-13)
    # Back to a grid of k-space, and out of one.
    torch.testing.assert_close(A.fill(y), torch.from_numpy(np.where(mask.numpy(), k, 0.0)), rtol=0, atol=1e-13)
    torch.testing.assert_close(A.select(torch.from_numpy(k)), y, rtol=0, atol=1e-13)
    # The adjoint is the zero-filled reconstruction.
    zero_filled = np.fft.fftshift(
        np.fft.ifft2(np.fft.ifftshift(np.where(mask.numpy(), k, 0.0), axes=axes), norm="ortho"), axes=axes
    )
    combined = (zero_filled * (1.0 if s is None else s.numpy().conj())).sum(1)
    torch.testing.assert_close(
        A.adjoint(y), torch.from_numpy(np.stack((combined.real, combined.imag), axis=1)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("size", SIZES)
def test_frequency_zero_is_in_the_middle(size):
    h, w = size
    mask = torch.zeros(size)
    mask[h // 2, w // 2] = 1
    y = MRI(mask, (2, h, w))(torch.tensor([3.0, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, h, w))
    torch.testing.assert_close(y, (h * w) ** 0.5 * torch.tensor([[[3.0], [-2.0]]]))


def test_the_origin_of_the_picture_is_in_the_middle():
    x = torch.zeros(1, 2, 6, 7)
    x[0, 0, 3, 3] = 1.0
    y = MRI(torch.ones(7), (2, 6, 7))(x)
    torch.testing.assert_close(y, torch.tensor([1.0, 0.0])[None, :, None].expand(1, 2, 42) / 42**0.5)


def test_svd_of_one_coil():
    mask = points((5, 6))
    svd = MRI(mask, (2, 5, 6)).svd
    assert svd.singular_values.shape == (2, 5, 6)
    assert torch.equal(torch.fft.fftshift(svd.singular_values, dim=(-2, -1)), mask.double().expand(2, 5, 6))
    x, y = rand(3, 2, 5, 6), rand(3, 2, int(mask.sum()))
    torch.testing.assert_close(svd.v_adjoint(svd.v(x)), x)
    torch.testing.assert_close(svd.v(svd.v_adjoint(x)), x)
    assert torch.equal(svd.u(svd.u_adjoint(y)), y)


def test_column_masks_and_numbers_as_masks():
    columns = torch.tensor([0, 1, 1, 0, 1])
    A, B = MRI(columns, (2, 4, 5)), MRI(columns.bool().expand(4, 5), (2, 4, 5))
    assert A.out_shape == (2, 12)
    assert fingerprint(A) == fingerprint(B) != fingerprint(MRI(columns.flip(0), (2, 4, 5)))
    x = rand(2, 2, 4, 5)
    assert torch.equal(A(x), B(x))


def test_one_constant_map_is_one_coil():
    mask = points((6, 7))
    one, coil = MRI(mask, (2, 6, 7)), MRI(mask, (2, 6, 7), coil_maps=torch.ones(1, 6, 7, dtype=torch.complex64))
    x = rand(2, 2, 6, 7)
    torch.testing.assert_close(coil(x), one(x)[:, None], rtol=0, atol=1e-14)
    torch.testing.assert_close(coil.adjoint(coil(x)), one.adjoint(one(x)), rtol=0, atol=1e-14)
    torch.testing.assert_close(coil.fill(coil(x)), one.fill(one(x)), rtol=0, atol=1e-14)
    assert coil.norm() == pytest.approx(one.norm(), rel=1e-5)


def test_normalised_maps_keep_the_energy_of_fully_sampled_pictures():
    A = MRI(torch.ones(9), (2, 8, 9), coil_maps=birdcage_maps(5, (8, 9)))
    x = rand(2, 2, 8, 9)
    torch.testing.assert_close(A.adjoint(A(x)), x, rtol=0, atol=1e-13)
    assert MRI(cartesian_mask((8, 9), 3), (2, 8, 9), coil_maps=birdcage_maps(5, (8, 9))).norm() <= 1.0


def test_maps_survive_conversions():
    A = MRI(points((6, 5)), (2, 6, 5), coil_maps=maps(2, (6, 5)))
    x = rand(2, 2, 6, 5)
    y, twin = A(x), copy.deepcopy(A)
    state = {k: v.clone() for k, v in A.state_dict().items()}
    rounded = A.to(torch.float32)(x)
    assert rounded.dtype == torch.float64
    assert 0.0 < float((rounded - y).abs().max()) < 1e-5
    torch.testing.assert_close(twin(x), y, rtol=0, atol=0)
    A.double().load_state_dict(state)
    torch.testing.assert_close(A(x), y, rtol=0, atol=0)
    assert torch.equal(A.coil_maps, maps(2, (6, 5)))


def test_maps_given_as_a_conjugate_view():
    s, x = maps(2, (6, 5)), rand(1, 2, 6, 5)
    A = MRI(torch.ones(5), (2, 6, 5), coil_maps=s.conj())
    assert torch.equal(A(x), MRI(torch.ones(5), (2, 6, 5), coil_maps=s.conj().resolve_conj())(x))


# Masks and maps.


@pytest.mark.parametrize("equispaced", [False, True])
@pytest.mark.parametrize(
    ("w", "acceleration", "fraction"), [(64, 4, 0.08), (63, 4, 0.08), (17, 2.5, 0.2), (368, 8, 0.04), (9, 3, 0.0)]
)
def test_cartesian_masks_have_the_exact_number_of_lines(w, acceleration, fraction, equispaced):
    total, centre = round(w / acceleration), round(fraction * w)
    masks = [
        cartesian_mask((4, w), acceleration, centre_fraction=fraction, seed=s, equispaced=equispaced) for s in range(30)
    ]
    for mask in masks:
        assert mask.dtype == torch.bool
        assert torch.equal(mask, mask[:1].expand(4, w))
        assert int(mask[0].sum()) == total
        # The middle, as symmetric about frequency zero as its number of columns lets it be.
        below = centre // 2
        assert mask[0, w // 2 - below : w // 2 - below + centre].all()
    assert len({tuple(m[0].tolist()) for m in masks}) > 1
    assert torch.stack(masks).any(0).sum() > 4 * 1.5 * total  # the places move
    if equispaced:
        step = (w - centre) / (total - centre)
        for mask in masks:
            start = (w - centre + 1) // 2
            others = torch.cat((mask[0, :start], mask[0, start + centre :])).nonzero()[:, 0]
            assert set(others.diff().tolist()) <= {int(step), int(np.ceil(step))}
    assert torch.equal(masks[3], cartesian_mask((4, w), acceleration, centre_fraction=fraction, seed=3,
                                                equispaced=equispaced))  # fmt: skip


def test_random_lines_are_uniform():
    """Each column outside the middle is observed with probability 3 / 15: binomial, within 4.5 standard deviations."""
    n = 2000
    count = sum(cartesian_mask((1, 16), 4, centre_fraction=0.06, seed=s)[0].double() for s in range(n))
    assert int(count[8]) == n
    others = torch.cat((count[:8], count[9:])) / n
    assert float((others - 0.2).abs().max()) < 4.5 * (0.2 * 0.8 / n) ** 0.5


def test_a_mask_may_take_everything():
    assert cartesian_mask((3, 8), 1).all()
    assert cartesian_mask((3, 8), 1, centre_fraction=1.0, equispaced=True).all()


@pytest.mark.parametrize("size", [(8, 8), (5, 12), (1, 1)])
@pytest.mark.parametrize("coils", [1, 2, 8])
def test_birdcage_maps_are_normalised_and_repeat(coils, size):
    s = birdcage_maps(coils, size)
    assert s.shape == (coils, *size)
    assert s.dtype == torch.complex128
    torch.testing.assert_close((s.abs() ** 2).sum(0), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(s, birdcage_maps(coils, size))


def test_birdcage_maps_are_the_fields_of_wires():
    s = birdcage_maps(4, (17, 17), radius=1.6)
    # Coil 0 lies at the right, coil 1 at the bottom; each is strongest next to itself, and a turn of the picture by a
    # right angle turns one into the other, with the phase of a field that turns along.
    assert int(s[0].abs().sum(0).argmax()) == 16
    assert int(s[1].abs().sum(1).argmax()) == 16
    turned = torch.rot90(s[0], -1)
    torch.testing.assert_close(s[1], -1j * turned, rtol=0, atol=1e-14)
    # B_x - i B_y of a wire at z = 1.6, in the middle: -i / (0 - 1.6), of phase i.
    torch.testing.assert_close(complex(s[0, 8, 8]), 0.5j)
    # In the ratio of two maps the normalisation drops out: a ratio of distances, and an angle between the wires.
    z = complex(*(np.array([5, -3]) * 2 / 17))
    torch.testing.assert_close(complex(s[0, 8 - 3, 8 + 5] / s[1, 8 - 3, 8 + 5]), (z - 1.6j) / (z - 1.6))
    # Away from the border the unnormalised field is smooth: halving the pixel halves the step between neighbours.
    coarse, fine = (birdcage_maps(4, (n, n))[0].diff(dim=-1).abs().max() for n in (32, 64))
    assert float(coarse / fine) == pytest.approx(2.0, rel=0.1)


# The whole way.


def test_pigdm_agrees_with_the_exact_posterior():
    shape = (2, 8, 8)
    prior = FieldPrior.power_law(shape, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)
    A = MRI(cartesian_mask((8, 8), 2, centre_fraction=0.25, seed=1), shape)
    problem = Problem.simulate(A, prior.sample(1, seed=3)[0], noise_std=1.0, seed=1)
    exact = prior.posterior(A, problem.likelihood.measurement[0], 1.0)
    assert Posterior(problem, prior, dtype=torch.float64).linear.has_svd
    n = 400
    solution = invdiff.solve(problem, prior, samplers.PiGDM(steps=30), draws=n, seed=2, dtype=torch.float64)
    error = (solution.mean() - exact.mean) / exact.std
    # 128 means of 400 draws stay within 4 standard errors, 0.2, but for one run in some hundred; the walk of 30 steps
    # has a bias of some hundredths.
    assert float(error.abs().max()) < 0.3
    # Unlike the largest error the mean square knows the bias apart: it is 1 / n for exact draws, 128 of them.
    assert float((error**2).mean()) < 2.0 / n
    zero_filled = (A.adjoint(problem.likelihood.measurement)[0] - exact.mean) / exact.std
    assert float(zero_filled.abs().max()) > 1.0  # else the bounds would show nothing
    ratio = solution.std() / exact.std
    assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 1.2


def test_several_coils_have_an_exact_posterior_too():
    """The mean, by dense algebra on the operator's matrix, solves the normal equations written with its adjoint."""
    shape = (2, 6, 5)
    prior = FieldPrior.power_law(shape, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)
    A = MRI(cartesian_mask((6, 5), 2.5), shape, coil_maps=birdcage_maps(3, (6, 5)))
    y = Problem.simulate(A, prior.sample(1, seed=3)[0], noise_std=0.3, seed=1).likelihood.measurement
    mean = prior.posterior(A, y[0], 0.3).mean
    C = prior.covariance
    expected = (C @ A.adjoint(y - A(mean[None])).flatten() / 0.3**2).reshape(shape)
    torch.testing.assert_close(mean - prior.mean, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused():
    ones, s = torch.ones(8, 6), torch.ones(3, 8, 6, dtype=torch.complex64)
    for shape in ((1, 8, 6), (3, 8, 6)):
        with pytest.raises(ShapeError, match=r"\(2, h, w\)"):
            MRI(ones, shape)
    with pytest.raises(ShapeError, match="shape must be"):
        MRI(ones, (8, 6))
    for mask in (torch.ones(6, 8), torch.ones(8), torch.ones(2, 8, 6), torch.ones(1, 6)):
        with pytest.raises(ShapeError, match="mask must be"):
            MRI(mask, (2, 8, 6))
    for value in (0.5, float("nan")):
        with pytest.raises(InputError, match="0 "):
            MRI(torch.full((8, 6), value), (2, 8, 6))
    with pytest.raises(InputError, match="observes nothing"):
        MRI(torch.zeros(6), (2, 8, 6))
    for bad in (s[0], s[:, :, :5], s[:0], s.mT):
        with pytest.raises(ShapeError, match="coil_maps must be"):
            MRI(ones, (2, 8, 6), coil_maps=bad)
    with pytest.raises(InputError, match="complex"):
        MRI(ones, (2, 8, 6), coil_maps=s.real)
    with pytest.raises(InputError, match="finite"):
        MRI(ones, (2, 8, 6), coil_maps=s * torch.inf)
    with pytest.raises(InputError, match="everywhere"):
        MRI(ones, (2, 8, 6), coil_maps=0 * s)
    A = MRI(ones, (2, 8, 6), coil_maps=s)
    with pytest.raises(ShapeError, match="takes inputs"):
        A(rand(1, 2, 6, 8))
    with pytest.raises(ShapeError, match="k-space must be"):
        A.select(torch.ones(1, 2, 8, 6, dtype=torch.complex128))
    with pytest.raises(InputError, match="acceleration"):
        cartesian_mask((8, 6), 7)
    with pytest.raises(InputError, match="acceleration"):
        cartesian_mask((8, 6), 0.5)
    with pytest.raises(InputError, match="centre_fraction"):
        cartesian_mask((8, 6), 2, centre_fraction=1.5)
    with pytest.raises(InputError, match="lower one"):
        cartesian_mask((8, 16), 8, centre_fraction=0.5)
    with pytest.raises(InputError, match="at least one coil"):
        birdcage_maps(0, (8, 6))
    for radius in (1.4, float("inf"), float("nan")):
        with pytest.raises(InputError, match="radius"):
            birdcage_maps(2, (8, 6), radius=radius)
