"""A tiled prior: exact where tiles need no context, close where they need little, and measured where it is not."""

from itertools import pairwise

import pytest
import torch

import invdiff
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.operators import Inpainting, random_mask
from invdiff.operators.composition import Affine
from invdiff.priors import FieldPrior, FrequencyTable
from invdiff.priors.base import DiffusionPrior
from invdiff.priors.frequency_table import KNOTS
from invdiff.priors.tiled import TiledPrior
from invdiff.samplers import PiGDM


def white(shape, std=0.7):
    return FieldPrior.power_law(shape, exponent=0.0, std=std, mean=0.3)


def noisy(shape, n=3, sigma=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 0.3 + (0.7**2 + sigma**2) ** 0.5 * torch.randn(n, *shape, generator=g, dtype=torch.float64)


CASES = [
    ((2, 8), (2, 8), None),
    ((2, 8), (2, 21), 3),
    ((1, 8, 8), (1, 13, 8), 0),
    ((3, 8, 6), (3, 19, 23), 5),
    ((1, 4, 6, 6), (1, 5, 14, 9), 3),
]


@pytest.mark.parametrize(("tile", "shape", "overlap"), CASES)
def test_tiles_of_independent_values_are_the_large_prior(tile, shape, overlap):
    tiled = TiledPrior(white(tile), shape, overlap=overlap)
    assert isinstance(tiled, DiffusionPrior)
    assert tiled.event[0].shape == shape
    z = noisy(shape)
    for sigma in (0.1, 2.0, torch.tensor([0.1, 1.0, 5.0])):
        assert torch.allclose(tiled.denoise(z, sigma), white(shape).denoise(z, sigma), atol=1e-12)
    assert float(tiled.seam(z, 0.5).nan_to_num().max()) < 1e-12
    single = tiled.denoise(z.float(), 0.5)
    assert single.dtype == torch.float32


@pytest.mark.parametrize(("tile", "shape", "overlap"), CASES)
def test_the_weights_are_a_partition_of_unity(tile, shape, overlap):
    tiled = TiledPrior(white(tile), shape, overlap=overlap)
    total = tiled._blend(torch.ones(tiled.tiles, 1, *tile, dtype=torch.float64))
    assert torch.allclose(total, torch.ones_like(total), atol=1e-15, rtol=0)
    assert bool((tiled.weights > 0).all())
    assert bool((tiled.weights <= 1).all())
    for starts, small, large in zip(tiled.starts, tile[1:], shape[1:], strict=True):
        assert starts[0] == 0
        assert starts[-1] + small == large
        assert all(a + small - b >= tiled.overlap for a, b in pairwise(starts))
    assert tiled.tiles == len(tiled.weights)


def test_the_weights_fall_smoothly_to_the_inner_edges():
    ramp = TiledPrior(white((1, 16)), (1, 28), overlap=4).weights[0]
    assert ramp[:12].tolist() == [1.0] * 12
    assert bool((ramp[12:].diff() < 0).all())
    assert float(ramp[12]) > 0.95
    assert float(ramp[15]) < 0.05


def test_short_correlations_leave_a_small_error_that_a_wider_overlap_shrinks():
    """A field's tile has periodic ends in the place of its context; only the inner of the picture is compared."""
    sigma, shape = 0.3, (1, 48, 48)
    inner = (..., slice(6, 42), slice(6, 42))

    def error(length, overlap):
        large = FieldPrior.matern(shape, length, std=0.5)
        eps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z = large.sample(2, seed=3) + sigma * eps
        exact = large.denoise(z, sigma)
        tiled = TiledPrior(FieldPrior.matern((1, 16, 16), length, std=0.5), shape, overlap=overlap)
        wrong = (tiled.denoise(z, sigma) - exact)[inner].square().mean().sqrt()
        return float(wrong / (z - exact).square().mean().sqrt()), float(tiled.seam(z, sigma).mean())

    (none, _), (little, seam), (wide, small_seam) = (error(1.0, overlap) for overlap in (0, 4, 8))
    assert none > 5 * little
    assert little > wide
    assert wide < 0.05
    assert seam > small_seam  # which needs no exact answer
    assert error(6.0, 8)[0] > 1.5 * wide  # longer correlations need more context


def test_the_seam_is_the_disagreement_of_two_tiles():
    """Tiles that answer with their own number: d_t = t, so that the spread is known in every cell."""

    class Counting:
        shape, sigma_min, sigma_max = (1, 4), 0.1, 10.0

        def denoise(self, z, sigma):
            return torch.arange(len(z), dtype=z.dtype)[:, None, None].expand(z.shape)

    tiled = TiledPrior(Counting(), (1, 6), overlap=2)
    w = tiled.weights[0][2:].double()  # the first tile's in the two shared cells; the second's is 1 - w
    z = torch.zeros(1, 1, 6, dtype=torch.float64) + 3.0
    blended = 1.0 - w
    expected = ((w * (1 - w)).sum() / ((3.0 - blended) ** 2).sum()).sqrt()
    assert float(tiled.seam(z, 1.0)[0]) == pytest.approx(float(expected), rel=1e-12)
    apart = TiledPrior(Counting(), (1, 8), overlap=0)
    assert bool(apart.seam(torch.zeros(2, 1, 8), 1.0).isnan().all())


def test_gradients_pass():
    tiled = TiledPrior(FieldPrior.matern((1, 4, 4), 1.0), (1, 6, 5), overlap=2)
    z = noisy((1, 6, 5), 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tiled.denoise(t, torch.tensor([0.3, 1.0])), (z,))


def test_the_way_out_and_the_levels_are_the_tiles():
    tile = FieldPrior(white((1, 6, 6)).spectrum, 0.0, decoder=Affine((1, 6, 6), 0.5, 0.25))
    tiled = TiledPrior(tile, (1, 9, 9))
    z = noisy((1, 9, 9))
    assert torch.equal(tiled.decode(z), 0.5 * z + 0.25)
    assert torch.allclose(tiled.encode(tiled.decode(z)), z)
    assert (tiled.sigma_min, tiled.sigma_max) == (tile.sigma_min, tile.sigma_max)
    assert tiled.overlap == 1
    assert tiled.at((1, 12, 9)).shape == (1, 12, 9)
    keys = {t.key for t in (tiled, tiled.at((1, 12, 9)), TiledPrior(tile, (1, 9, 9), overlap=3))}
    assert len(keys) == 3
    assert tiled.key == TiledPrior(tile, (1, 9, 9)).key
    assert tiled.name == "field, tiled"
    assert tiled.curvature is None  # a field's Fourier basis has one size


def test_a_curvature_is_passed_on_for_the_large_shape():
    class Tabled:
        shape, sigma_min, sigma_max, dtype = (3, 8, 8), 0.1, 10.0, torch.float64
        curvature = FrequencyTable((3, 8, 8), torch.tensor([0.1, 10.0]), torch.zeros(2, 3, len(KNOTS)))

        def denoise(self, z, sigma):
            return z

    tiled = TiledPrior(Tabled(), (3, 12, 10))
    assert tiled.curvature.variance(2.0).shape == (3, 12, 6)
    assert tiled.curvature is tiled.curvature
    assert tiled.dtype == torch.float64


def test_draws_have_the_tiles_law_and_do_not_depend_on_batches():
    tiled = TiledPrior(white((1, 4, 4), std=0.7), (1, 6, 7), overlap=2)
    draws = tiled.sample(60, seed=1, steps=24)
    values = draws.numel()  # independent, but for the discretisation: 42 a draw
    assert float(draws.mean()) == pytest.approx(0.3, abs=4 * 0.7 / values**0.5 + 0.01)
    assert float(draws.std()) == pytest.approx(0.7, rel=4 / (2 * values) ** 0.5 + 0.02)
    assert torch.allclose(tiled.sample(5, seed=1, steps=24, batch=2), draws[:5], atol=1e-5)


def test_it_solves_a_problem_as_the_large_prior_does():
    shape = (1, 9, 9)
    large = white(shape)
    tiled = TiledPrior(white((1, 6, 6)), shape, overlap=2)
    truth = large.sample(1, seed=2)[0]
    problem = invdiff.Problem.simulate(Inpainting(random_mask(shape[1:], 0.5), shape), truth, noise_std=0.1)
    sampler = PiGDM(steps=6)
    a, b = (
        invdiff.solve(problem, p, sampler, draws=2, dtype=torch.float64)
        for p in (tiled, FieldPrior(large.spectrum, large.mean, sigma_min=tiled.sigma_min, sigma_max=tiled.sigma_max))
    )
    assert torch.allclose(a.draws, b.draws, atol=1e-5)
    assert a.about["prior"] == "field, tiled"


@pytest.mark.parametrize(
    ("shape", "overlap", "error", "words"),
    [
        ((1, 5, 9), None, ShapeError, "no side less"),
        ((2, 9, 9), None, ShapeError, "channels"),
        ((1, 9), None, ShapeError, "axes"),
        ((1, 9, 9), 6, InputError, "between 0 and 5"),
        ((1, 9, 9), -1, InputError, "between 0 and 5"),
    ],
)
def test_errors(shape, overlap, error, words):
    with pytest.raises(error, match=words):
        TiledPrior(white((1, 6, 6)), shape, overlap=overlap)


def test_a_decoder_that_mixes_values_and_a_wrong_shape_are_refused():
    class Mixed:
        shape, sigma_min, sigma_max = (1, 6, 6), 0.1, 10.0
        decoder = Inpainting(torch.ones(6, 6), (1, 6, 6))

        def denoise(self, z, sigma):
            return z

    with pytest.raises(CapabilityError, match="Inpainting"):
        TiledPrior(Mixed(), (1, 9, 9))
    with pytest.raises(ShapeError, match=r"got \(3, 1, 6, 6\)"):
        TiledPrior(white((1, 6, 6)), (1, 9, 9)).denoise(noisy((1, 6, 6)), 1.0)
