"""``invdiff solve`` under priors of tokens."""

import numpy as np
import pytest
import torch
from PIL import Image

import invdiff
from invdiff.cli import main


@pytest.fixture
def picture(tmp_path):
    prior = invdiff.load_prior("fashion-28-vq")
    x = prior.decode(prior.sample(1, seed=3, steps=8))[0, 0]
    path = tmp_path / "p.png"
    Image.fromarray((x.clamp(0, 1) * 255).numpy().astype(np.uint8)).save(path)
    return path


def run(capsys, *words: object) -> tuple[int, str]:
    status = main(["solve", *map(str, words)])
    printed = capsys.readouterr()
    return status, " ".join((printed.out + printed.err).split())


def test_a_grey_picture_is_restored_under_tokens(picture, tmp_path, capsys):
    out = tmp_path / "o.nc"
    common = ("--image", picture, "--simulate", "--prior", "fashion-28-vq", "--draws", 3, "--out", out, "--yes")
    code, text = run(
        capsys, "super-resolution-x4", *common, "--sampler", "svdd", "--steps", 7, "--set", "sampler.candidates=2"
    )
    assert code == 0, text
    assert "SVDD" in text
    solution = invdiff.Solution.load(out)
    assert solution.tokens.shape == (1, 3, 49)
    assert solution.draws.shape == (3, 1, 28, 28)
    prior = invdiff.load_prior("fashion-28-vq")
    assert torch.allclose(prior.decode(solution.tokens[0]), solution.draws, atol=1e-6)
    assert solution.score()["psnr_mean"] > 8.0
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        ("fashion-28-vq", ("decode to pictures of 28 x 28, grey", "(3, 64, 64)")),
        ("promoters-251", ("is a prior of sequences",)),
    ],
)
def test_what_does_not_fit_is_refused(prior, words, tmp_path, capsys):
    code, text = run(capsys, "gaussian-deblur", "--prior", prior, "--out", tmp_path / "o.nc")
    assert code == 2
    assert all(w in text for w in words), text


def test_a_continuous_sampler_is_refused(picture, tmp_path, capsys):
    words = ("--image", picture, "--simulate", "--prior", "fashion-28-vq", "--sampler", "dps", "--draws", 2)
    code, text = run(capsys, "gaussian-deblur", *words, "--out", tmp_path / "o.nc")
    assert code == 2
    assert "Samplers that can" in text
