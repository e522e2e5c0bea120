"""The network prior: EDM's preconditioning, other grids, its measured curvature, and its files."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from invdiff.cards import catalogue_root
from invdiff.errors import CatalogueError, ChecksumError, InputError, ShapeError
from invdiff.networks import UNet
from invdiff.priors import DiffusionPrior, FrequencyTable, NetworkPrior, load_prior
from invdiff.priors.frequency_table import KNOTS, hat_weights, opponent_colours, radial_frequency
from invdiff.priors.loading import TrainedCard, read_trained_card, save_prior

SMALL = {"channels": [16, 32], "blocks": 1, "attention": [False, True], "embedding": 16, "groups": 16}


class Probe(nn.Module):
    """A network that shows what it was given: F(x, c) = a x + c."""

    stride = 4

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.seen.append((x, c))
        return self.a * x + c[:, None, None, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_table(shape: tuple[int, ...] = (3, 16, 16)) -> FrequencyTable:
    sigmas = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
    return FrequencyTable(shape, sigmas, normal(4, 3, len(KNOTS)) - 4)


def small_prior(curvature: FrequencyTable | None = None) -> NetworkPrior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = UNet(3, **SMALL)
        for p in network.parameters():
            nn.init.normal_(p, std=0.1)
    return NetworkPrior(network, (3, 16, 16), curvature=curvature, name="small").eval_only()


CARD = TrainedCard(
    name="small",
    version="1.0",
    description='A "small" prior.',
    licence="Apache-2.0",
    shape=(3, 16, 16),
    sigma_min=0.002,
    sigma_max=80.0,
    sigma_data=0.5,
    network=SMALL,
    training={"steps": 3, "data": ["a", "b"]},
)


@pytest.fixture(scope="module")
def shipped() -> NetworkPrior:
    return load_prior("photos-64")


@pytest.fixture
def photograph() -> Tensor:
    """The astronaut's face and suit, 64 x 64 in [0, 1], shape (1, 3, 64, 64)."""
    from skimage.data import astronaut

    x = torch.from_numpy(astronaut()[:384, 64:448].copy()).permute(2, 0, 1).float()[None] / 255
    return nn.functional.avg_pool2d(x, 6)


# Preconditioning


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
def test_the_preconditioning_is_that_of_edm(sigma: float) -> None:
    network, s = Probe(), 0.4
    prior = NetworkPrior(network, (3, 8, 8), sigma_data=s)
    z = normal(2, 3, 8, 8).double()
    got = prior.denoise(z, sigma).detach()
    c_skip = s**2 / (sigma**2 + s**2)
    c_out = sigma * s / math.sqrt(sigma**2 + s**2)
    c_in = 1 / math.sqrt(sigma**2 + s**2)
    (x, c), a = network.seen[0], float(network.a.detach())
    torch.testing.assert_close(x.double(), c_in * z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(c, torch.full((2,), math.log(sigma) / 4), rtol=1e-6, atol=1e-6)
    expected = c_skip * z + c_out * (a * c_in * z + math.log(sigma) / 4)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float64 and x.dtype == torch.float32 == prior.dtype


def test_a_float_and_one_sigma_a_particle_agree() -> None:
    prior, z = small_prior(), normal(3, 3, 16, 16)
    one = prior.denoise(z, 0.3)
    torch.testing.assert_close(prior.denoise(z, torch.tensor(0.3)), one)
    torch.testing.assert_close(prior.denoise(z, torch.full((3,), 0.3)), one)
    mixed = prior.denoise(z, torch.tensor([0.3, 2.0, 0.3]))
    torch.testing.assert_close(mixed[::2], one[::2], rtol=1e-4, atol=1e-5)
    assert float((mixed[1] - one[1]).abs().max()) > 0.01
    with pytest.raises(ShapeError, match=r"float or have shape \(3,\), got \(2,\)"):
        prior.denoise(z, torch.tensor([0.3, 2.0]))


def test_pictures_go_in_and_out() -> None:
    prior, x = small_prior(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(prior.encode(x), 2 * x - 1)
    torch.testing.assert_close(prior.decode(prior.encode(x)), x)
    assert prior.event[0].shape == (3, 16, 16)
    assert isinstance(prior, DiffusionPrior)
    assert not any(p.requires_grad for p in prior.parameters())


def test_another_grid_shares_the_weights() -> None:
    prior = small_prior(random_table())
    other = prior.at((3, 24, 8))
    assert other.network is prior.network and other.shape == (3, 24, 8)
    assert other.curvature is not None and other.curvature.shape == (3, 24, 8)
    assert (other.key, other.name, other.sigma_max) == (prior.key, prior.name, prior.sigma_max)
    assert other.denoise(normal(1, 3, 24, 8), 1.0).shape == (1, 3, 24, 8)
    with pytest.raises(ShapeError, match="see at"):
        other.denoise(normal(1, 3, 16, 16), 1.0)
    for bad in ((3, 24, 9), (3, 0, 8), (24, 8)):
        with pytest.raises(ShapeError, match="sides divisible by 2"):
            prior.at(bad)
    with pytest.raises(ShapeError, match="3 channels"):
        prior.at((1, 16, 16))


def test_wrong_noise_levels_are_refused() -> None:
    with pytest.raises(InputError, match="0 < sigma_min < sigma_max"):
        NetworkPrior(Probe(), (3, 8, 8), sigma_min=2.0, sigma_max=1.0)


def test_a_draw_depends_on_its_number_alone() -> None:
    prior = small_prior()
    many = prior.sample(5, seed=1, steps=4)
    torch.testing.assert_close(prior.sample(5, seed=1, steps=4, batch=2), many, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prior.sample(2, seed=1, steps=4), many[:2], rtol=1e-3, atol=1e-3)
    assert float((prior.sample(2, seed=2, steps=4) - many[:2]).abs().max()) > 0.1


# Curvature


def test_the_colour_transform_is_orthonormal_and_the_basis_complete() -> None:
    torch.testing.assert_close(opponent_colours() @ opponent_colours().T, torch.eye(3, dtype=torch.float64))
    for shape in ((3, 16, 16), (3, 15, 8)):
        table, z = random_table(shape), normal(2, *shape).double()
        c = table.to_basis(z)
        torch.testing.assert_close(table.from_basis(c), z)
        grey = torch.ones(1, *shape, dtype=torch.float64)
        assert float(table.to_basis(grey)[:, 1:].abs().max()) < 1e-10  # grey has no colour


@pytest.mark.parametrize("w", [8, 9])
def test_the_basis_keeps_the_norm(w: int) -> None:
    table, z = random_table((3, 6, w)), normal(1, 3, 6, w).double()
    power = table.to_basis(z).abs().square()
    twice = torch.full((w // 2 + 1,), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    twice[-1] = 1.0 if w % 2 == 0 else 2.0
    torch.testing.assert_close((power * twice).sum(), z.square().sum())


def test_hats_interpolate_and_clamp() -> None:
    knots = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    values = torch.tensor([-1.0, 0.0, 0.25, 1.0, 2.5, 9.0], dtype=torch.float64)
    expected = [[1, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    torch.testing.assert_close(hat_weights(values, knots), torch.tensor(expected, dtype=torch.float64))


def test_the_table_interpolates_in_log_sigma_and_in_frequency() -> None:
    table = random_table((3, 64, 64))
    middle = table.variance(math.sqrt(0.1))  # halfway from 0.1 to 1 in the logarithm
    column = KNOTS.index(8 / 64)
    expected = (table.log_variance[1, :, column] + table.log_variance[2, :, column]) / 2
    torch.testing.assert_close(middle[:, 0, 8].double().log(), expected.clamp(max=math.log(0.1)), rtol=1e-4, atol=1e-4)
    between = (table.log_variance[2, 0, KNOTS.index(6 / 64)] + table.log_variance[2, 0, column]) / 2
    torch.testing.assert_close(
        table.variance(1.0)[0, 7, 0].double().log(), between.clamp(max=0.0), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(table.variance(40.0), table.variance(10.0))  # beyond the table: its end
    # Below the table its end too, but never above sigma^2, the error of not denoising at all.
    assert float(table.variance(1e-4).max()) == pytest.approx(1e-8)
    assert float(table.variance(1e-4).min()) > 0


def test_a_table_serves_other_sizes() -> None:
    table = random_table((3, 16, 16))
    large = table.at((3, 32, 32))
    torch.testing.assert_close(large.variance(1.0)[:, ::2, ::2], table.variance(1.0))


def test_measuring_recovers_the_error_of_a_gaussian_field() -> None:
    """The exact denoiser of a stationary field: error variance sigma^2 S / (S + sigma^2), S(f) exact at the knots."""
    n, side = 64, 64
    sigmas = torch.tensor([0.1, 1.0], dtype=torch.float64)
    f = radial_frequency(side, side)
    spectrum = torch.stack([k * torch.exp(-f / 0.15) for k in (2.0, 0.5, 0.1)])  # by colour
    basis = random_table((3, side, side))

    def filtered(z: Tensor, weights: Tensor) -> Tensor:
        return basis.from_basis(weights * basis.to_basis(z))

    white = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    field = filtered(white, spectrum.sqrt())

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        s2 = float(sigma[0]) ** 2
        return filtered(z, spectrum / (spectrum + s2))

    generator = torch.Generator().manual_seed(6)
    table = FrequencyTable.measure(denoise, field.split_with_sizes([40, 24]), sigmas, generator=generator)
    for i, sigma in enumerate(sigmas.tolist()):
        exact = sigma**2 * spectrum / (spectrum + sigma**2)
        for k, knot in enumerate(KNOTS):
            # An average with the hat's weights: compare with the same average of the exact variance. The relative error
            # of a mean of m independent squares of normals is sqrt(2 / m). Bound: five of them.
            w = hat_weights(f, torch.tensor(KNOTS, dtype=torch.float64))[..., k]
            twice = torch.full((side // 2 + 1,), 2.0, dtype=torch.float64)
            twice[[0, -1]] = 1.0
            w = w * twice
            expected = (exact * w).sum((1, 2)) / w.sum()
            effective = n * float(w.sum()) ** 2 / float((w**2 / twice).sum())
            ratio = table.log_variance[i, :, k].exp() / expected
            assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / effective), (sigma, knot)


def test_small_pictures_are_measured_too() -> None:
    """At 16 x 16 some knots have no coefficient near them; a denoiser that does nothing errs alike everywhere."""
    pictures, sigmas = torch.zeros(200, 3, 16, 16), torch.tensor([0.1, 1.0])
    generator = torch.Generator().manual_seed(2)
    table = FrequencyTable.measure(lambda z, _: z, [pictures], sigmas, generator=generator)
    # The constant, alone at its knot, is a mean of 200 squares: five of its standard errors.
    expected = 2 * sigmas.log()[:, None, None].double().expand(2, 3, len(KNOTS))
    torch.testing.assert_close(table.log_variance, expected, rtol=0, atol=5 * math.sqrt(2 / 200))


def test_each_coefficient_of_the_real_transform_weighs_what_it_stands_for() -> None:
    """An error along one column alone: a column of rfft2 inside stands for two coefficients, the outer ones for one."""
    side, n, sigmas = 16, 400, torch.tensor([0.5, 1.0])
    basis, knots = random_table((3, side, side)), torch.tensor(KNOTS, dtype=torch.float64)
    hats = hat_weights(radial_frequency(side, side), knots)
    twice = torch.full((side // 2 + 1,), 2.0, dtype=torch.float64)
    twice[[0, -1]] = 1.0
    seen = hats.sum((0, 1)) > 0
    for column in (0, 3, side // 2):
        keep = torch.zeros(side // 2 + 1)
        keep[column] = 1.0

        def denoise(z: Tensor, _: Tensor, keep: Tensor = keep) -> Tensor:
            return basis.from_basis(keep * basis.to_basis(z)) + 1e-3 * z

        generator = torch.Generator().manual_seed(column)
        table = FrequencyTable.measure(denoise, [torch.zeros(n, 3, side, side)], sigmas, generator=generator)
        error = (keep.double() + 1e-3).square()
        expected = torch.einsum("w,hwk->k", error * twice, hats) / torch.einsum("w,hwk->k", twice, hats)
        ratio = table.log_variance[1].exp() / expected
        # At least one coefficient of n squares of normals at each knot: five standard errors.
        assert float((ratio[:, seen] - 1).abs().max()) < 5 * math.sqrt(2 / n)


def test_wrong_tables_are_refused() -> None:
    sigmas = torch.tensor([0.1, 1.0])
    with pytest.raises(ShapeError, match=r"shape \(3, h, w\)"):
        FrequencyTable((1, 8, 8), sigmas, torch.zeros(2, 3, len(KNOTS)))
    with pytest.raises(ShapeError, match="must have shape"):
        FrequencyTable((3, 8, 8), sigmas, torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="rising"):
        FrequencyTable((3, 8, 8), sigmas.flip(0), torch.zeros(2, 3, len(KNOTS)))
    with pytest.raises(InputError, match="at least one picture"):
        FrequencyTable.measure(lambda z, _: z, [], sigmas, generator=torch.Generator())


# Files


def test_the_shipped_prior_denoises_a_photograph(shipped: NetworkPrior, photograph: Tensor) -> None:
    noisy = photograph + 0.1 * normal(*photograph.shape, seed=2)
    estimate = shipped.decode(shipped.denoise(shipped.encode(noisy), 0.2))  # sigma is in units of [-1, 1]
    before, after = (10 * math.log10(1 / float((x - photograph).square().mean())) for x in (noisy, estimate))
    assert before == pytest.approx(20, abs=0.2)
    assert after > before + 6.0


def test_the_shipped_prior_keeps_what_is_almost_clean_and_forgets_what_is_lost(
    shipped: NetworkPrior, photograph: Tensor
) -> None:
    z = shipped.encode(photograph)
    slight = z + 0.004 * normal(*z.shape)
    assert float((shipped.denoise(slight, 0.004) - z).square().mean().sqrt()) < 0.0045
    lost = shipped.denoise(z + 80.0 * normal(*z.shape), 80.0)
    assert float((lost - lost.mean((-2, -1), keepdim=True)).abs().mean()) < 0.2  # close to the mean picture
    assert float(lost.abs().max()) < 1.0


def test_the_shipped_curvature_is_an_error_variance(shipped: NetworkPrior) -> None:
    assert shipped.curvature is not None
    for sigma in (0.001, 0.002, 0.02, 0.2, 2.0, 20.0, 80.0, 200.0):
        v = shipped.curvature.variance(sigma)
        assert float(v.min()) > 0 and float(v.max()) <= sigma**2 * (1 + 1e-6)
    v = shipped.curvature.variance(0.4)
    assert float(v[0, 0, 0]) > float(v[1, 0, 20])  # grey is harder than colour
    assert float(shipped.curvature.variance(80.0)[0, 0, 0]) > 100 * float(shipped.curvature.variance(80.0)[0, 32, 32])


def test_the_card_of_the_shipped_prior_fits_it(shipped: NetworkPrior) -> None:
    card = read_trained_card(catalogue_root() / "priors" / "photos-64" / "prior.toml")
    assert shipped.key == card.weights["sha256"]
    assert shipped.shape == card.shape == (3, 64, 64)


def test_a_prior_is_saved_and_loaded(tmp_path: Path) -> None:
    prior = small_prior(random_table())
    path = save_prior(tmp_path / "small", prior, CARD)
    z = normal(2, 3, 16, 16)
    for source in (path, path.parent, str(path.parent)):
        again = load_prior(source)
        torch.testing.assert_close(again.denoise(z, 0.5), prior.denoise(z, 0.5), rtol=0.02, atol=0.02)  # half precision
    assert again.curvature is not None
    torch.testing.assert_close(again.curvature.variance(0.3), random_table().variance(0.3), rtol=1e-5, atol=0)
    assert again.key and not any(p.requires_grad for p in again.parameters())
    stored = read_trained_card(path)
    assert replace(stored, weights={}) == replace(CARD, network={**SMALL}, weights={})
    # Once in half precision, always the same.
    second = save_prior(tmp_path / "again", again, CARD)
    assert read_trained_card(second).weights == stored.weights


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    folder = save_prior(tmp_path, small_prior(), CARD).parent
    file = folder / "weights.safetensors"
    blob = bytearray(file.read_bytes())
    if damage == "flipped":
        blob[-1] ^= 1
    file.write_bytes({"flipped": blob, "cut": blob[: len(blob) // 2], "empty": b""}[damage])
    with pytest.raises(ChecksumError, match=r"weights\.safetensors .*corrupt, truncated or replaced"):
        load_prior(folder)


def test_missing_things_are_named(tmp_path: Path) -> None:
    folder = save_prior(tmp_path / "p", small_prior(), CARD).parent
    (folder / "weights.safetensors").unlink()
    with pytest.raises(CatalogueError, match=r"weights\.safetensors of the prior 'small' are missing"):
        load_prior(folder)
    with pytest.raises(CatalogueError, match="no prior at"):
        load_prior(tmp_path / "none" / "here")
    with pytest.raises(CatalogueError, match="did you mean 'photos-64'"):
        load_prior("photo-64")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "small"', "", "needs the field 'name'"),
        ("sigma_max = 80.0", 'sigma_max = "high"', "sigma_max"),
        ('family = "edm-unet"', 'family = "vp"', "of family 'vp'"),
        ('version = "1.0"', 'version = "1.0"\ncolour = 1', "fields that no trained prior has: colour"),
        ("sha256 = ", "md5 = ", "'file' and 'sha256'"),
        ('name = "small"', "name = ", "not a TOML file"),
        ("channels = [16, 32]", "channels = [32, 32]", "do not fit"),
        ("channels = [16, 32]", "width = 3", "do not fit"),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = save_prior(tmp_path, small_prior(), CARD)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        load_prior(path)
