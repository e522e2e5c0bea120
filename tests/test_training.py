"""Training on a grid of synthetic tiles: data, schedules, a falling loss, going on after a cut, and the model card."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.priors import load_prior
from invdiff.training import data as data_module
from invdiff.training.baselines import BASELINES, Baseline, baseline_psnr, tune
from invdiff.training.checkpoint import Progress, load_state, pack, save_state, unpack
from invdiff.training.data import Mixture, TileSet, augment_aerial, augment_photos, evaluation_pictures, read_split
from invdiff.training.export import add_noise, denoising_psnr, psnr
from invdiff.training.fit import Trainer, learning_rate, used
from invdiff.training.measurements import ReportSettings, grid
from invdiff.training.memorisation import nearest, views
from invdiff.training.report import main as report_main
from invdiff.training.report import write_report
from invdiff.training.settings import Settings, read_settings
from invdiff.training.train import PictureTask, denoising_loss, draw_sigmas, main, train

CPU = torch.device("cpu")
PHOTOS = TileSet(
    name="photos16",
    files=(("photos_0.png", 20), ("photos_1.png", 19)),
    side=16,
    columns=6,
    validation=6,
    test=8,
    aerial=False,
    source="synthetic",
    licence="CC0",
    attribution="Nobody.",
)
AERIAL = replace(
    PHOTOS,
    name="aerial32",
    files=(("aerial_0.png", 12), ("aerial_1.png", 12)),
    side=32,
    columns=4,
    validation=4,
    aerial=True,
)
TOML = """
name = "tiny"
version = "1.0"
description = "For tests."
licence = "CC0"
shape = [3, 16, 16]
batch = 8
learning_rate = 4e-3
warmup_steps = 5
steps = 40
seconds = 1e9
log_every = 10
validate_every = 1000
[network]
channels = [16, 32]
blocks = 1
attention = [false, false]
embedding = 16
[mixture]
photos16 = 3
aerial32 = 1
"""


def tiles(tileset: TileSet, folder: Path, seed: int) -> None:
    """Write smooth random tiles, the first pixel of each its number in its file."""
    rng = np.random.default_rng(seed)
    for name, count in tileset.files:
        rows, s = -(-count // tileset.columns), tileset.side
        picture = np.zeros((rows * s, tileset.columns * s, 3), np.uint8)
        for i in range(count):
            top, left = i // tileset.columns * s, i % tileset.columns * s
            coarse = rng.integers(30, 220, (4, 4, 3))
            picture[top : top + s, left : left + s] = np.kron(coarse, np.ones((s // 4, s // 4, 1)))
            picture[top, left] = i
        from PIL import Image

        Image.fromarray(picture).save(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles")
    tiles(PHOTOS, path, 0)
    tiles(AERIAL, path, 1)
    (path / "train.toml").write_text(TOML)
    return path


@pytest.fixture(autouse=True)
def synthetic_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"photos16": PHOTOS, "aerial32": AERIAL}
    for module in ("data", "memorisation", "model_card"):
        monkeypatch.setattr(f"invdiff.training.{module}.SETS", MappingProxyType(sets))


@pytest.fixture
def settings(folder: Path) -> Settings:
    return read_settings(folder / "train.toml")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Data


def test_splits_are_the_tiles_that_they_should_be(folder: Path) -> None:
    def numbers(split: str) -> list[int]:
        return [int(i) for i in read_split(PHOTOS, folder, split)[:, 0, 0, 0]]

    assert numbers("train") == list(range(20))
    assert numbers("validation") == list(range(6))
    assert numbers("test") == list(range(11, 19))
    x = read_split(PHOTOS, folder, "train")
    assert x.dtype == torch.uint8 and x.shape == (20, 3, 16, 16)
    with pytest.raises(InputError, match="no split 'all'"):
        read_split(PHOTOS, folder, "all")


def test_pictures_are_scored_at_their_centre(folder: Path) -> None:
    x = evaluation_pictures("aerial32", folder, "validation", 16)
    whole = read_split(AERIAL, folder, "validation")
    torch.testing.assert_close(x, whole[:, :, 8:24, 8:24].float() / 255)


def test_wrong_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"photos_0\.png is missing; give its folder"):
        read_split(PHOTOS, tmp_path, "train")
    with pytest.raises(InputError, match="no grid of 5 tiles"):
        data_module.read_tiles(folder / "photos_0.png", 20, 16, 5)
    with pytest.raises(InputError, match="holds the tiles 0 to 23"):
        data_module.read_tiles(folder / "photos_0.png", 25, 16, 6)


def test_photographs_are_mirrored_half_the_time_and_zoomed_a_quarter(folder: Path) -> None:
    x, index = read_split(PHOTOS, folder, "train"), torch.full((400,), 3)
    out = augment_photos(x, index, 16, generator())
    original = x[3].float()
    plain = sum(torch.equal(y, original) for y in out)
    mirrored = sum(torch.equal(y, original.flip(-1)) for y in out)
    assert plain + mirrored == 300  # the others are zoomed
    assert abs(mirrored - 150) < 5 * math.sqrt(300) / 2
    assert out.min() >= 0 and out.max() <= 255


def test_aerial_pictures_come_cut_or_halved_in_all_symmetries(folder: Path) -> None:
    x, index = read_split(AERIAL, folder, "train"), torch.full((256,), 5)
    out = augment_aerial(x, index, 16, generator())
    half = torch.nn.functional.avg_pool2d(x[5].float(), 2)
    symmetric = [f for t in (half, half.mT) for u in (t, t.flip(-2)) for f in (u, u.flip(-1))]
    counts = [sum(torch.equal(y, s) for y in out) for s in symmetric]
    assert abs(sum(counts) - 128) < 5 * 8
    assert min(counts) > 0
    patches = x[5].float().unfold(1, 16, 1).unfold(2, 16, 1)
    crops = {tuple(p.flatten().tolist()) for p in patches.permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)}
    cut = next(y for y in out if not any(torch.equal(y, s) for s in symmetric))
    forms = [f for t in (cut, cut.mT) for u in (t, t.flip(-2)) for f in (u, u.flip(-1))]
    assert any(tuple(f.flatten().tolist()) in crops for f in forms)


def test_a_batch_keeps_the_shares(folder: Path, settings: Settings) -> None:
    mixture = Mixture(folder, settings.mixture, 16, CPU)
    assert mixture.weights == {"photos16": 0.75, "aerial32": 0.25}
    batch = mixture.batch(8, generator())
    assert batch.shape == (8, 3, 16, 16) and -1 <= float(batch.min()) < float(batch.max()) <= 1
    assert torch.equal(batch, mixture.batch(8, generator()))
    with pytest.raises(InputError, match="non-negative weights"):
        Mixture(folder, {"nothing": 1.0}, 16, CPU)


# Settings, schedules, loss


def test_settings_are_read_and_overridden(folder: Path, settings: Settings) -> None:
    assert (settings.shape, settings.batch, settings.sigma_data) == ((3, 16, 16), 8, 0.5)
    other = read_settings(folder / "train.toml", steps=7, seconds=None)
    assert other.steps == 7 and other.seconds == 1e9
    assert other.identity == settings.identity  # the budget may change while a training goes on
    assert read_settings(folder / "train.toml", batch=4).identity != settings.identity


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch = 8", "batch = 0", "batch = 0"),
        ("batch = 8", "batches = 8", "does not know: batches"),
        ("steps = 40", "steps = -1", "steps must not be negative"),
        ("shape = [3, 16, 16]", "shape = [3, 16, 8]", "RGB squares"),
        ('name = "tiny"', "", "name"),
        ("batch = 8", "batch = ", "Cannot read"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_settings(path)
    with pytest.raises(InputError, match="Cannot read the training settings"):
        read_settings(tmp_path / "none.toml")


def test_noise_levels_are_stratified(settings: Settings) -> None:
    n = 200
    sigma = draw_sigmas(n, settings, generator())
    normal = (sigma.double().log() - settings.p_mean) / settings.p_std
    u = torch.special.ndtr(normal).sort().values
    # One in each n-th of the distribution: the empirical law differs from the uniform by 1/n at most.
    assert torch.equal((u * n).clamp(max=n - 0.5).floor(), torch.arange(n, dtype=torch.float64))
    assert float((sigma.log().argsort() - torch.arange(n)).abs().float().mean()) > n / 6  # in random order
    narrow = draw_sigmas(n, replace(settings, sigma_min=0.2, sigma_max=0.5), generator())
    assert float(narrow.min()) == pytest.approx(0.2) and float(narrow.max()) == pytest.approx(0.5)


def test_the_loss_is_edms() -> None:
    """(sigma^2 + s^2) / (sigma s)^2 |D - z0|^2, with D made of the network by the preconditioning of the prior."""
    from invdiff.priors.diffusion import precondition

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(0.3), requires_grad=False)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.a * x.flip(-1) + c[:, None, None, None]

    z0, noise = torch.randn(2, 4, 3, 8, 8, generator=generator())
    sigma, s = torch.tensor([0.01, 0.1, 1.0, 20.0]), 0.5
    loss = denoising_loss(Network(), z0, sigma, noise, s)
    error = precondition(Network(), z0 + sigma[:, None, None, None] * noise, sigma, s) - z0
    expected = (sigma**2 + s**2) / (sigma * s) ** 2 * error.square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-5)


def test_the_learning_rate_warms_up_and_falls_to_zero(settings: Settings) -> None:
    def rate(step: int, elapsed: float = 0.0, **changes: object) -> float:
        return learning_rate(Progress(step=step, elapsed=elapsed), replace(settings, **changes))

    peak = settings.learning_rate
    assert rate(0, steps=0) == pytest.approx(peak / 5)
    assert rate(4, steps=0) == pytest.approx(peak)
    assert rate(20) == pytest.approx(peak / 2)  # half of the steps
    assert rate(10, elapsed=0.5, seconds=1.0) == pytest.approx(peak / 2)  # half of the time, a quarter of the steps
    assert rate(40) == pytest.approx(0, abs=1e-12)
    assert rate(100, elapsed=9.0, seconds=1.0, steps=0) == pytest.approx(0, abs=1e-12)
    assert used(Progress(step=10, elapsed=0.1), replace(settings, seconds=1.0)) == 0.25


def test_the_moving_average_is_the_power_function(folder: Path, settings: Settings) -> None:
    """After t steps step i weighs in proportion to i^gamma, up to terms of order 1/i (Karras et al. 2024, eq. 1)."""
    trainer = Trainer(PictureTask(replace(settings, ema_exponent=2.0), folder, CPU), CPU)
    seen: list[Tensor] = []
    name, parameter = next(iter(trainer.parameters.items()))
    for i in range(1, 13):
        with torch.no_grad():
            parameter.fill_(float(i))
        trainer._set_numbers()
        trainer._update_average()
        trainer.progress.step += 1
        seen.append(trainer.average[name].flatten()[0].clone())
    average, expected = 0.0, []
    for i in range(1, 13):
        decay = (1 - 1 / i) ** 3
        average = decay * average + (1 - decay) * i
        expected.append(average)
    torch.testing.assert_close(torch.stack(seen), torch.tensor(expected), rtol=1e-5, atol=0)
    assert expected[-1] == pytest.approx(12 * 3 / 4, rel=0.06)  # the mean of t i^2: t (gamma + 1) / (gamma + 2)


# Training


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """One uncut training of 40 steps by the command line's function."""
    out, lines = tmp_path_factory.mktemp("out"), []
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr("invdiff.training.data.SETS", {"photos16": PHOTOS, "aerial32": AERIAL})
        assert train(read_settings(folder / "train.toml"), folder, out, CPU, log=lines.append)
    return out, lines


def test_the_loss_falls_and_the_prior_denoises(
    trained: tuple[Path, list[str]], folder: Path, settings: Settings
) -> None:
    out, lines = trained
    trainer = Trainer(PictureTask(settings, folder, CPU), CPU)
    noise, z0 = torch.randn(8, 3, 16, 16, generator=generator()), trainer.task.mixture.batch(8, generator(1))
    sigma = torch.full((8,), 0.5)

    def loss() -> float:
        with torch.no_grad():
            return float(denoising_loss(trainer.network, z0, sigma, noise, 0.5).mean())

    before = loss()
    trainer.load(out / "state")
    assert loss() < 0.75 * before
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["10", "20", "30", "40"]
    assert sum("validation PSNR" in line for line in lines) == 1
    prior = load_prior(out)
    pictures = evaluation_pictures("photos16", folder, "test", 16)
    noisy = psnr(add_noise(pictures, 0.4), pictures)
    assert float((denoising_psnr(prior, pictures, 0.4) - noisy).mean()) > 1.0
    assert prior.curvature is not None and len(prior.curvature.sigmas) == 24


def test_a_training_that_was_cut_goes_on_where_it_stood(
    trained: tuple[Path, list[str]], folder: Path, settings: Settings, tmp_path: Path
) -> None:
    """A limit of no time cuts after ten. The state keeps its moments in bfloat16: the runs agree to about that."""
    assert not train(settings, folder, tmp_path, CPU, limit=0.0, log=lambda _: None)
    assert not (tmp_path / "prior.toml").exists()
    text = json.loads((tmp_path / "state" / "state.json").read_text())
    assert text["progress"]["step"] == 10 and text["progress"]["images"] == 80
    assert train(settings, folder, tmp_path, CPU, resume=True, log=lambda _: None)
    (one, ours), (two, theirs) = (load_state(p / "state", settings.identity) for p in (tmp_path, trained[0]))
    assert (ours.step, ours.images) == (theirs.step, theirs.images) == (40, 320)
    initial = dict(Trainer(PictureTask(settings, folder, CPU), CPU).network.named_parameters())
    change = math.sqrt(sum(float((unpack(two, "weights")[k] - v.detach()).square().sum()) for k, v in initial.items()))
    for part in ("weights", "average"):
        a, b = unpack(one, part), unpack(two, part)
        assert a.keys() == initial.keys()
        # Relative to the way travelled; pictures or noise of another step would make it of order one.
        assert math.sqrt(sum(float((a[k] - b[k]).square().sum()) for k in a)) < 0.05 * change
    trainer, other = Trainer(PictureTask(settings, folder, CPU), CPU), Trainer(PictureTask(settings, folder, CPU), CPU)
    trainer.load(tmp_path / "state")
    other.progress.step = 40
    assert torch.equal(trainer.step()[0], other.step()[0])  # the same noise levels come next


def test_a_state_is_packed_and_checked(tmp_path: Path) -> None:
    w = {"a": torch.randn(40, 50, generator=generator())}
    average = {"a": w["a"] + 0.01}
    packed = pack(w, average, {"a": w["a"] * 2}, {"a": w["a"].square()})
    save_state(tmp_path, packed, Progress(step=3, images=5, elapsed=1.5), {"x": (1, 2)})
    tensors, progress = load_state(tmp_path, {"x": [1, 2]})
    assert (progress.step, progress.images, progress.elapsed) == (3, 5, 1.5)
    assert torch.equal(unpack(tensors, "weights")["a"], w["a"])
    torch.testing.assert_close(unpack(tensors, "average")["a"], average["a"], rtol=0, atol=0.01 * 2**-8)
    torch.testing.assert_close(unpack(tensors, "second")["a"], w["a"].square(), rtol=2**-8, atol=0)
    with pytest.raises(InputError, match="made with"):
        load_state(tmp_path, {"x": [1, 3]})
    with pytest.raises(CatalogueError, match="no training state"):
        load_state(tmp_path / "none", {})


def test_the_command_line_trains(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        str(folder / "train.toml"),
        "--data",
        str(folder),
        "--out",
        str(tmp_path),
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    assert main(given) == 0
    assert "prior written to" in capsys.readouterr().out
    assert load_prior(tmp_path).name == "tiny"


# Report


def test_noise_belongs_to_the_picture_and_not_to_the_batch(trained: tuple[Path, list[str]], folder: Path) -> None:
    x = evaluation_pictures("photos16", folder, "test", 16)
    noisy = add_noise(x, 0.3, seed=1)
    assert torch.equal(add_noise(x[5:], 0.3, seed=1, first=5), noisy[5:])
    assert not torch.equal(add_noise(x, 0.3, seed=2), noisy)
    # 8 * 768 normals: five standard errors of a standard deviation, sqrt(1 / 2n).
    assert float((noisy - x).std()) == pytest.approx(0.3, rel=5 / math.sqrt(2 * x.numel()))
    prior = load_prior(trained[0])
    torch.testing.assert_close(
        denoising_psnr(prior, x, 0.2, batch=3), denoising_psnr(prior, x, 0.2), rtol=1e-4, atol=1e-3
    )


def test_psnr_is_of_the_clipped_estimate() -> None:
    truth = torch.ones(1, 3, 4, 4)
    assert float(psnr(truth + 5, truth)) > 100
    assert float(psnr(truth - 0.1, truth)) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("name", list(BASELINES))
def test_classical_denoisers_denoise(name: str, folder: Path) -> None:
    x = evaluation_pictures("photos16", folder, "test", 16)[:3]
    noisy = float(psnr(add_noise(x, 0.15), x).mean())
    assert float(baseline_psnr(BASELINES[name], x, 0.15, 0.6 if name != "wavelet" else 1.0).mean()) > noisy + 1


def test_tuning_finds_the_best_factor(folder: Path) -> None:
    x = evaluation_pictures("photos16", folder, "test", 16)[:3]

    def shrink(noisy: np.ndarray, level: float, share: float) -> np.ndarray:
        return noisy + (0.5 - noisy) * share / level  # what is handed over is the factor times the level

    # To grey: with noise of 2 the best share is near 1, with noise of 0.01 it is 0.
    baseline = Baseline(name="", parameter="share", factors=(0.0, 0.25, 0.45), denoise=shrink)
    assert tune(baseline, x, 2.0) == 0.45
    assert tune(baseline, x, 0.01) == 0.0


def test_copies_of_training_pictures_are_found(folder: Path) -> None:
    sets = {"photos16": 1.0, "aerial32": 1.0}
    photo = read_split(PHOTOS, folder, "train")[7].float().flip(-1) / 255
    aerial = read_split(AERIAL, folder, "train")[4].float()
    cut = aerial[:, 8:24, 16:32].mT.flip(-1) / 255
    halved = torch.nn.functional.avg_pool2d(aerial, 2).flip(-2) / 255
    new = torch.rand(3, 16, 16, generator=generator())
    queries = torch.stack((photo, cut, halved, new))
    found = nearest(queries, folder, sets)
    assert float(found.distance[:3].max()) < 2e-3  # what float32 leaves of |a|^2 + |b|^2 - 2ab
    torch.testing.assert_close(found.pictures[:3], queries[:3])
    assert float((found.distance / found.second)[:3].max()) < 1 / 3 < float((found.distance / found.second)[3])
    # By brute force, the least distance to each training picture over its views; the second is another picture's.
    brute = torch.cat(
        [
            torch.stack(
                [(new - v).square().mean((1, 2, 3)).sqrt() for v in views(t, read_split(t, folder, "train"), 16)]
            )
            .min(0)
            .values
            for t in (PHOTOS, AERIAL)
        ]
    ).sort()
    assert float(found.distance[3]) == pytest.approx(float(brute.values[0]), rel=1e-4)
    assert float(found.second[3]) == pytest.approx(float(brute.values[1]), rel=1e-4)
    assert len(brute.values) == 32
    assert float(nearest(queries, folder, sets, count=3).distance[0]) > 0.05


def test_pictures_are_laid_out_row_by_row() -> None:
    x = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2) / 10
    out = grid(x, 3)
    assert out.shape == (3, 8, 12)
    torch.testing.assert_close(out[0, ::4, ::4], torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]))
    assert float(out[:, 2:4].min()) == 1.0


def test_the_report_goes_on_and_its_card_holds_its_numbers(
    trained: tuple[Path, list[str]], folder: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "prior", tmp_path / "out"
    home.mkdir()
    for file in ("prior.toml", "weights.safetensors"):
        (home / file).write_bytes((trained[0] / file).read_bytes())
    (home / "train.toml").write_text(TOML)
    small = ReportSettings(levels=(0.1, 0.3), subset=3, tuning=2, samples=12, steps=3, calibration=4, compared=8)
    lines: list[str] = []
    report = write_report(home, folder, out, small, CPU, log=lines.append)
    assert len(lines) == len(report["parts"]) == 1 + 2 * 4
    text = (out / "README.md").read_text()
    figure = report["parts"]["denoising 0.3"]["prior"]["pooled"]
    assert f"{figure['mean']:.2f} ± {figure['standard_error']:.2f}" in text
    assert f"{figure['pictures']} pictures in all" in text and figure["pictures"] == 16
    assert "Nobody." in text and f"{report['parameters']:,} parameters" in text
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!", "    "))]
    assert max(map(len, prose)) <= 120 and "torchrun --standalone --nproc_per_node 2" in text
    assert report["parts"]["samples"]["evaluations_per_sample"] == 5
    prior, x = load_prior(home), evaluation_pictures("photos16", folder, "test", 16)
    mean = report["parts"]["denoising 0.1"]["prior"]["photos16"]["mean"]
    assert mean == pytest.approx(float(denoising_psnr(prior, x, 0.1).mean()), abs=0.01)
    for picture in ("samples.png", "neighbours.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    # What is there is kept, what is missing made again, the same.
    stored = json.loads((out / "report.json").read_text())
    removed = stored["parts"].pop("denoising 0.1")
    (out / "report.json").write_text(json.dumps(stored))
    lines.clear()
    again = write_report(home, folder, out, small, CPU, log=lines.append)
    assert lines == ["denoising 0.1 done"] and again["parts"]["denoising 0.1"] == removed
    assert (out / "README.md").read_text() == text


def test_a_quick_report_needs_a_folder_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report_main([str(folder), "--data", str(folder), "--quick"])
    assert "--out" in capsys.readouterr().err
