"""The command line as people meet it: what it prints, what it leaves, and how it fails."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import invdiff
from invdiff import InputError, Problem, ShapeError, Solution, cards, cli, load_prior
from invdiff.cli_picture import padded
from invdiff.cli_settings import apply, parse
from invdiff.networks.unet import UNet
from invdiff.operators import Scale
from invdiff.priors import FrequencyTable, NetworkPrior
from invdiff.priors.frequency_table import KNOTS
from invdiff.priors.loading import TrainedCard, save_prior
from invdiff.samplers import PiGDM


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A folder with a tiny prior of random weights, whose sides must be divisible by 8."""
    network = {
        "channels": [8, 8, 8, 8], "blocks": [1, 1, 1, 1], "attention": [False] * 4, "embedding": 8, "groups": 4,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("prior")
    sigmas = torch.logspace(-3, 2, 8)
    table = (0.06 * sigmas**2 / (sigmas**2 + 0.06)).log()[:, None, None].expand(8, 3, len(KNOTS))
    with torch.random.fork_rng():
        unet = UNet(in_channels=3, **network)
    model = NetworkPrior(unet, (3, 64, 64), curvature=FrequencyTable((3, 64, 64), sigmas, table), name="tiny")
    card = TrainedCard(
        name="tiny", version="1", description="d", licence="l", shape=(3, 64, 64), sigma_min=0.002, sigma_max=80.0,
        sigma_data=0.5, network=network,
    )  # fmt: skip
    save_prior(folder, model, card)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with pictures of 21 x 13 pixels."""
    monkeypatch.chdir(tmp_path)
    levels = np.random.default_rng(0).integers(0, 256, (13, 21, 3)).astype(np.uint8)
    picture = Image.fromarray(levels)
    picture.save("plain.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    picture.save("rotated.jpg", exif=rotated, quality=95)
    picture.convert("RGBA").save("alpha.png")
    Image.fromarray(levels[..., 0].astype(np.uint16) * 257).save("deep.png")
    Image.fromarray((np.eye(3) * 255).astype(np.uint8)).save("kernel.png")
    Image.fromarray(((levels[..., 0] > 99) * 255).astype(np.uint8)).save("mask.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save("small.png")
    Image.fromarray(np.full((13, 21), np.nan, np.float32)).save("nan.tif")
    return tmp_path


def run(capsys, *words):
    status = cli.main([str(w) for w in words])
    said = capsys.readouterr()
    return status, said.out, said.err


def solve(capsys, prior, *words, card="motion-deblur"):
    fast = ["--draws", "2", "--steps", "2"] if "--draws" not in words else ["--steps", "2"]
    return run(capsys, "solve", card, "--prior", prior, *(() if "--steps" in words else fast), *words)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("image", "size", "note"),
    [
        ("plain.png", (13, 21), "sRGB values kept"),
        ("rotated.jpg", (21, 13), "EXIF orientation applied"),
        ("alpha.png", (13, 21), "alpha dropped"),
        ("deep.png", (13, 21), "16-bit values scaled"),
    ],
)
def test_pictures_of_all_kinds_are_restored_at_their_own_size(here, capsys, prior, image, size, note):
    status, out, err = solve(capsys, prior, "--image", image, "--simulate")
    assert status == 0, err
    assert note in " ".join(out.split()) and "PSNR" in out and "check" in out and "network evaluations a draw" in out
    solution = Solution.load(here / "result.nc")
    assert solution.draws.shape == (2, 3, *size) and solution.reference["image"].shape == (3, *size)
    assert np.asarray(Image.open(here / "result.png")).ndim == 3
    if image != "rotated.jpg":
        levels = torch.from_numpy(np.asarray(Image.open(here / image)).astype(np.float32))
        truth = levels / 65535 if image == "deep.png" else levels[..., :3].permute(2, 0, 1) / 255
        torch.testing.assert_close(solution.reference["image"], truth.expand(3, *size))


@pytest.mark.parametrize(
    ("card", "words", "size"),
    [
        ("motion-deblur", ["--set", "operator.kernel=kernel.png"], (13, 21)),
        ("motion-deblur", ["--set", "operator.kernel=kernel.png", "--set", "operator.boundary=valid"], (15, 23)),
        ("motion-deblur", ["--set", "operator.kernel.seed=3", "--set", "operator.kernel.size=5"], (13, 21)),
        ("inpaint-random", ["--set", "operator.mask=mask.png"], (13, 21)),
        ("super-resolution-x4", ["--set", "operator.factor=2"], (26, 42)),
        ("high-dynamic-range", ["--set", "operator.gain=2"], (13, 21)),
        (
            "nonlinear-blur",
            ["--set", "operator.kernel=kernel.png", "--set", "operator.boundary=valid", "--sampler", "dps"],
            (15, 23),
        ),
    ],
)
def test_a_picture_may_be_the_measurement(here, capsys, prior, card, words, size):
    status, out, err = solve(capsys, prior, "--image", "plain.png", "--noise", "0.02", *words, card=card)
    assert status == 0, err
    assert "your picture is the measurement" in " ".join(out.split()) and "PSNR" not in out
    solution = Solution.load(here / "result.nc")
    assert solution.draws.shape == (2, 3, *size) and solution.reference is None
    y = torch.from_numpy(np.asarray(Image.open("plain.png")).astype(np.float32)).permute(2, 0, 1) / 255
    mask = torch.from_numpy(np.asarray(Image.open("mask.png")) > 0).expand(3, -1, -1)
    torch.testing.assert_close(solution.measurement, y[mask] if card == "inpaint-random" else y)


@pytest.mark.parametrize(
    ("card", "sampler", "told"),
    [
        ("high-dynamic-range", "DPS", "HighDynamicRange (gain 2.0), noise 0.05"),
        ("phase-retrieval", "DPS", "PhaseRetrieval (oversampling 2.0), noise 0.05"),
        ("nonlinear-blur", "DPS", "NonlinearBlur (motion kernel, size 15, intensity 0.5, seed 3, boundary reflect,"),
        ("tomography", "PiGDM", "Tomography (angles 20), noise 0.4"),
        ("compressed-sensing", "PiGDM", "CompressedSensing (ratio 0.3, kind fourier, seed 3), noise 0.05"),
        ("poisson-deblur", "DPS", "boundary reflect), photon counts, 200 for white, 1 in the dark"),
    ],
)
def test_every_other_card_degrades_a_picture_and_finds_a_sampler_that_can(here, capsys, prior, card, sampler, told):
    words = ["--image", "plain.png", "--simulate", "--index", "3", "--draws", "1"]
    if sampler == "DPS":  # so weak that two steps of an untrained network stay finite
        words += ["--set", "sampler.scale=1e-4"]
    status, out, err = solve(capsys, prior, *words, card=card)
    said = " ".join(out.split())
    assert status == 0, err
    assert told in said and f"sampler {sampler} (" in said and "on 24 x 16 (padded" in said
    solution = Solution.load(here / "result.nc")
    assert solution.draws.shape == (1, 3, 13, 21) and solution.reference["image"].shape == (3, 13, 21)


def test_the_margin_is_not_measured(prior):
    """The likelihood on the padded grid is the picture's own, and does not see the margin."""
    from invdiff.cli_picture import on_grid, padded
    from invdiff.problem import problem_from_card, read_problem_card

    pixels = torch.rand(3, 13, 21, generator=torch.Generator().manual_seed(0))
    problem = problem_from_card(read_problem_card("motion-deblur", {"operator.kernel.size": 5}), pixels=pixels)
    grid = padded((3, 13, 21), load_prior(prior))
    assert grid == (3, 16, 24)
    scene = torch.rand(2, *grid, generator=torch.Generator().manual_seed(1))
    scene[1] = scene[0]
    scene[:, :, 1:14, 1:22] = pixels
    scene[1, :, 0] += 1.0
    own = problem.likelihood.log_prob(pixels[None])
    torch.testing.assert_close(on_grid(problem, grid).likelihood.log_prob(scene), own.expand(2))
    assert on_grid(problem, grid).reference is None and on_grid(problem, (3, 13, 21)) is problem
    for card in ("phase-retrieval", "poisson-deblur"):
        problem = problem_from_card(read_problem_card(card), pixels=pixels)
        own = problem.likelihood.log_prob(pixels[None])
        torch.testing.assert_close(on_grid(problem, grid).likelihood.log_prob(scene), own.expand(2))


def test_a_data_sets_picture_settings_and_named_files(here, capsys, prior):
    words = [
        "--index",
        "2",
        "--sampler",
        "DAPS",
        "--set",
        "sampler.inner.steps=3",
        "--out",
        "a.nc",
        "--picture",
        "b.png",
    ]
    words += ["--set", "operator.boundary=circular"]
    status, out, err = solve(capsys, prior, *words, "--draws", "1")
    assert status == 0, err
    assert "skimage-photos, number 2" in out and "seed 2" in " ".join(out.split())
    assert {"a.nc", "b.png"} <= set(files(here)) and "result.nc" not in files(here)
    assert "steps=3" in Solution.load("a.nc").about["sampler_settings"]


def test_resize_and_a_long_run_needs_yes(here, capsys, prior, monkeypatch):
    status, out, err = solve(capsys, prior, "--image", "plain.png", "--simulate", "--resize", "16")
    assert status == 0 and "shrunk to 16 x 10" in " ".join(out.split()), err
    before = files(here)
    words = ["--image", "plain.png", "--simulate", "--out", "long.nc", "--draws", "1"]
    monkeypatch.setattr("invdiff.cli_cost.LONG", 1e-9)
    status, _, err = solve(capsys, prior, *words)
    assert status == 2 and "--yes" in err and "--resize" in err and files(here) == before
    assert solve(capsys, prior, *words, "--yes")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "nothing.png", "--simulate"], "There is no picture nothing.png"),
        (["--image", "text.png", "--simulate"], "text.png is not a picture"),
        (["--image", "cut.png", "--simulate"], "cut.png is damaged or truncated"),
        (["--image", "nan.tif", "--noise", "0.1", "--set", "operator.kernel=kernel.png"], "finite"),
        (["--image", "plain.png", "--simulate", "--noise", "0"], "--noise must be positive"),
        (["--image", "plain.png", "--simulate", "--noise", "-1"], "--noise must be positive"),
        (["--image", "plain.png", "--simulate", "--noise", "nan"], "--noise must be positive"),
        (["--image", "plain.png", "--simulate", "--draws", "0"], "--draws must be at least 1"),
        (["--image", "plain.png", "--simulate", "--steps", "0"], "at least one step"),
        (["--image", "plain.png", "--simulate", "--sampler", "dap"], "did you mean 'daps'"),
        (["--image", "plain.png", "--simulate", "--device", "cpuu"], "did you mean 'cpu'"),
        (["--image", "plain.png", "--simulate", "--precision", "float31"], "did you mean 'float32'"),
        (
            ["--image", "plain.png", "--simulate", "--set", "sampler.stepz=3", "--sampler", "dps"],
            "did you mean 'steps'",
        ),
        (["--image", "plain.png", "--simulate", "--set", "steps=3"], "NAME.SETTING=VALUE"),
        (["--image", "plain.png", "--simulate", "--set", "operator.kernel.sise=3"], "sise: is not a field"),
        (["--image", "plain.png", "--simulate", "--set", "operator.kernel=text.png"], "text.png is not a picture"),
        (["--image", "plain.png", "--simulate", "--out", "none/a.nc"], "there is no folder none"),
        (["--image", "plain.png", "--simulate", "--out", "."], "is a folder"),
        (["--image", "plain.png", "--simulate", "--checkpoint", "none/a"], "there is no folder none"),
        (["--image", "plain.png", "--simulate", "--out", "a.png"], "--picture"),
        (["--image", "plain.png", "--simulate", "--index", "-1"], "--index counts from 0"),
        (["--image", "plain.png", "--simulate", "--max-seconds", "0"], "--max-seconds must be positive"),
        (["--image", "plain.png", "--noise", "0.1"], "--set operator.kernel=kernel.png"),
        (["--image", "plain.png", "--set", "operator.kernel=kernel.png"], "--noise 0.02"),
        (["--image", "plain.png", "--noise", "1", "--resize", "8"], "--resize would change"),
        (["--image", "plain.png", "--draws", "many"], "--draws"),
        (["--imag", "plain.png"], "--image"),
        (["--prior", "photos-65"], "did you mean 'photos-64'"),
        (["--prior", "corrupt"], "corrupt, truncated or replaced"),
        (["--prior", "truncated"], "corrupt, truncated or replaced"),
        (["--prior", "nowhere/prior"], "no prior at nowhere/prior"),
        (["--image", "small.png", "--simulate"], "kernel"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(here, capsys, prior, words, message):
    (here / "text.png").write_text("no picture")
    (here / "cut.png").write_bytes((here / "plain.png").read_bytes()[:-300])
    blob = (prior / "weights.safetensors").read_bytes()
    for name, content in (("corrupt", blob[:-1] + bytes([blob[-1] ^ 1])), ("truncated", blob[:-100])):
        (here / name).mkdir()
        (here / name / "prior.toml").write_bytes((prior / "prior.toml").read_bytes())
        (here / name / "weights.safetensors").write_bytes(content)
    before = files(here)
    status, out, err = solve(capsys, prior, *words)
    assert status == 2, err
    assert message in err and err.startswith("invdiff: ") and err.count("\n") == 1 and "Traceback" not in err
    assert files(here) == before and "took" not in out


@pytest.mark.parametrize(
    ("card", "words", "message"),
    [
        ("motion-deblurr", [], "did you mean 'motion-deblur'"),
        ("mine.toml", [], "noise.std"),
        (
            "inpaint-box",
            ["--image", "plain.png", "--noise", ".1", "--set", "operator.mask=small.png"],
            "The mask must be",
        ),
        (
            "super-resolution-x4",
            ["--image", "small.png", "--simulate", "--set", "operator.factor=8"],
            "smaller than the factor",
        ),
        ("phase-retrieval", ["--sampler", "pigdm"], "DPS"),
        ("poisson-deblur", ["--sampler", "pigdm"], "DPS"),
        ("poisson-deblur", ["--noise", "0.1"], "--set noise.gain=200"),
        ("tomography", ["--set", "operator.angles=[[0,45],[90,135]]"], "operator.angles: the angles are their number"),
        ("poisson-deblur", ["--image", "plain.png"], "photon counts"),
        ("tomography", ["--image", "plain.png", "--noise", ".1"], "line integrals"),
        ("high-dynamic-range", ["--image", "plain.png", "--noise", ".1"], "--set operator.gain=2"),
    ],
)
def test_bad_cards_and_masks(here, capsys, prior, card, words, message):
    text = cards.find("problems", "motion-deblur").read_text()
    (here / "mine.toml").write_text(text.replace("std = 0.05", 'std = "x"'))
    before = files(here)
    status, _, err = solve(capsys, prior, *words, card=card)
    assert status == 2 and message in err and err.count("\n") == 1 and files(here) == before


def test_a_sampler_that_cannot_names_those_that_can(here, capsys, tmp_path_factory, prior):
    bare = tmp_path_factory.mktemp("bare")
    model = load_prior(prior)
    card = TrainedCard(
        name="bare", version="1", description="d", licence="l", shape=(3, 64, 64), sigma_min=0.002, sigma_max=80.0,
        sigma_data=0.5, network={
            "channels": [8, 8, 8, 8], "blocks": [1, 1, 1, 1], "attention": [False] * 4, "embedding": 8, "groups": 4,
        },
    )  # fmt: skip
    save_prior(bare, NetworkPrior(model.network, (3, 64, 64), name="bare"), card)
    before = files(here)
    status, _, err = solve(capsys, bare, "--sampler", "pigdm", "--set", "sampler.covariance=spectral")
    assert status == 2 and "PiGDM needs curvature" in err and "Samplers that can:" in err and "DAPS" in err
    assert files(here) == before


def test_a_picture_of_other_channels_than_the_priors_is_refused_before_the_run(prior):
    grey = Problem.simulate(Scale((1, 64, 64)), torch.full((1, 64, 64), 0.5), noise_std=0.1)
    with pytest.raises(ShapeError, match="different unknowns"):
        invdiff.solve(grey, str(prior))
    with pytest.raises(ShapeError, match="channels"):
        padded((1, 64, 64), load_prior(prior))


def test_a_failed_run_is_status_1(here, capsys, prior):
    words = ["--image", "plain.png", "--simulate", "--steps", "4", "--draws", "1", "--max-evaluations", "2"]
    before = files(here)
    status, _, err = solve(capsys, prior, *words)
    assert status == 1 and "was stopped at" in err and files(here) == before
    status, _, err = solve(capsys, prior, *words, "--checkpoint", "state")
    assert status == 1 and "kept in state" in err and "state" in files(here)
    assert solve(capsys, prior, *words[:-2], "--checkpoint", "state")[0] == 0  # goes on from there
    assert "state" not in files(here) and "result.nc" in files(here)


def test_a_picture_that_cannot_be_written_takes_the_draws_back(here, capsys, prior, monkeypatch):
    def full(*args):
        raise InputError("Cannot write result.png: No space left on device.")

    monkeypatch.setattr("invdiff.solution_plot.save_picture", full)
    before = files(here)
    status, _, err = solve(capsys, prior, "--image", "plain.png", "--simulate")
    assert status == 2 and "No space left" in err and files(here) == before


def test_list_and_show(capsys, prior):
    for what in ("problems", "priors", "data", "samplers"):
        status, out, _ = run(capsys, "list", what)
        assert (
            status == 0
            and {"problems": "motion-deblur", "priors": "photos-64", "data": "kodak24", "samplers": "daps"}[what] in out
        )
    assert CliRunner().invoke(cli.app, ["list"]).output.count("\n") > 10
    status, out, _ = run(capsys, "show", "pigdm")
    assert status == 0 and "covariance = Jacobian" in out and "Noise levels" in out
    assert 'type = "motion"' in run(capsys, "show", "motion-deblur")[1]
    assert 'name = "tiny"' in run(capsys, "show", prior)[1]
    assert run(capsys, "show", "photo-64")[::2] == (2, run(capsys, "show", "photo-64")[2])
    assert "did you mean 'photos-64'" in run(capsys, "show", "photo-64")[2]
    assert "did you mean 'samplers'" in run(capsys, "list", "sampler")[2]


def test_help_and_usage(capsys):
    assert run(capsys)[0] == 0 and "solve" in run(capsys, "--help")[1]
    status, _, err = run(capsys, "solv")
    assert status == 2 and "solve" in err and err.count("\n") == 1
    status, _, err = run(capsys, "train", "none.toml", "--out", "x", "--data", "/nowhere")
    assert status == 2 and "--data" in err


def test_settings_reach_into_strategies():
    words = ["sampler.covariance.max_iterations=7", "sampler.covariance=Spectral", "sampler.levels.sigma_max=10"]
    settings = parse(words)
    sampler = apply(PiGDM(), settings["sampler"])
    assert type(sampler.covariance).__name__ == "Spectral" and sampler.covariance.max_iterations == 7
    assert sampler.levels.sigma_max == 10.0 and isinstance(sampler.levels.sigma_max, float)
    for bad in ({"steps": True}, {"steps": 2.5}, {"steps.a": 1}, {"levels.rho": "x"}, {"levels": 3}):
        with pytest.raises(InputError):
            apply(PiGDM(), bad)
    with pytest.raises(InputError, match="twice"):
        parse(["sampler.a=1", "sampler.a=2"])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_interrupt_ends_the_run_and_says_what_is_kept(here, prior, checkpoint):
    words = ["solve", "motion-deblur", "--prior", str(prior), "--steps", "100000", "--draws", "1", "--yes"]
    words += ["--checkpoint", "state"] if checkpoint else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    before = files(here)
    process = subprocess.Popen(
        [sys.executable, "-m", "invdiff.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        seen = b""
        while b"sigma=" not in seen:  # the first step is done
            chunk = os.read(process.stderr.fileno(), 4096)
            assert chunk, seen
            seen += chunk
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=20)[1].decode()  # within 2 s where nothing else runs
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    assert ("kept in state" if checkpoint else "nothing was kept") in err
    assert files(here) == sorted([*before, *(["state"] if checkpoint else [])])


def test_a_full_disk_leaves_nothing(here, prior):
    """A bound on the size of files stands for the disk: the draws are larger."""
    code = (
        "import resource, sys; from invdiff import cli; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["solve", "motion-deblur", "--prior", str(prior), "--steps", "2", "--draws", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    before = files(here)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, check=False
    )
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and message.startswith("invdiff: Cannot write result.nc"), done.stderr
    assert files(here) == before and "Traceback" not in done.stderr
