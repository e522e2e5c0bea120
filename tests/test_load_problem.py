"""Problems from cards: every shipped card, seeds by index, files beside a card, overrides, and clear errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from invdiff import CatalogueError, InputError, ShapeError, cards, load_problem, operators
from invdiff.card_models import (
    BlurCard,
    CompressedSensingCard,
    InpaintingCard,
    NonlinearBlurCard,
    ProblemCard,
    TomographyCard,
)
from invdiff.operators.crop import Crop
from invdiff.operators.from_card import operator_from_card
from invdiff.problem import read_problem_card
from invdiff.testing import check_operator

CARD = """
name = "mine"
version = 1
title = "t"
description = "d"
[operator]
type = "Blur"
kernel = { type = "file", path = "kernel.png" }
[noise]
std = 0.05
[data]
set = "skimage-photos"
side = 16
"""


PICTURES = [n for n in cards.names("problems") if isinstance(read_problem_card(n), ProblemCard)]


@pytest.mark.parametrize("name", PICTURES)
def test_every_shipped_card_of_pictures_is_a_problem(name):
    problem = load_problem(name, 1)
    assert problem.name == name and problem.event[0].shape == (3, 64, 64)
    assert (
        problem.reference.shape == (3, 64, 64)
        and 0 <= float(problem.reference.min()) <= float(problem.reference.max()) <= 1
    )
    assert problem.card["name"] == name and problem.card["index"] == 1 and len(problem.card["hash"]) == 64
    noise, clean = problem.card["noise"], problem.likelihood.operator(problem.reference[None]).double()
    if noise["type"] == "gaussian":
        mean, std = clean, noise["std"]
    else:
        mean = noise["gain"] * clean + noise["background"]
        std = mean.sqrt()
    z = (problem.likelihood.measurement - mean) / std
    # The noise is the card's: mean 0 and mean square 1, the latter with variance 2, or 2 + 1 / rate for counts, whose
    # rate is here at least the background of 1; six standard errors.
    assert abs(float(z.mean())) < 6 / z.numel() ** 0.5
    assert abs(float(z.square().mean()) - 1) < 6 * (3 / z.numel()) ** 0.5


def test_the_same_index_is_the_same_problem_and_another_is_not():
    again, other = load_problem("motion-deblur", 2), load_problem("motion-deblur", 3)
    assert load_problem("motion-deblur", 2).key == again.key != other.key
    kernels = [p.likelihood.operator.kernel for p in (again, other, load_problem("motion-deblur", 3, data=None))]
    assert not torch.equal(kernels[0], kernels[1]) and torch.equal(kernels[1], kernels[2])


def test_eight_kernels_and_masks_by_index():
    blur = BlurCard.model_validate({"type": "Blur", "kernel": {"type": "motion", "size": 9}})
    kernels = [operator_from_card(blur, (1, 16, 16), i).kernel for i in range(9)]
    assert len({k.numpy().tobytes() for k in kernels}) == 8 and torch.equal(kernels[0], kernels[8])
    fixed = BlurCard.model_validate({"type": "Blur", "kernel": {"type": "motion", "size": 9, "seed": 3}})
    assert torch.equal(operator_from_card(fixed, (1, 16, 16), 5).kernel, kernels[3])
    box = InpaintingCard.model_validate({"type": "Inpainting", "mask": {"type": "box", "side": 0.5, "centred": True}})
    mask = operator_from_card(box, (1, 16, 12), 4).mask[0]
    assert torch.equal(mask, operators.box_mask((16, 12), 6))


def test_other_operators_from_cards():
    shape, size = (1, 16, 12), 16 * 12
    blur = {
        "type": "NonlinearBlur",
        "kernel": {"type": "motion", "size": 9},
        "gamma": 1.8,
        "exposure": 1.1,
        "knee": 0.2,
    }
    built = operator_from_card(NonlinearBlurCard.model_validate(blur), shape, 10)
    own = operators.NonlinearBlur(shape, 2, size=9, gamma=1.8, exposure=1.1, knee=0.2)  # 10 modulo 8 seeds
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(built(x), own(x))
    sensing = CompressedSensingCard.model_validate({"type": "CompressedSensing", "ratio": 0.3, "seeds": 4})
    seen = [operator_from_card(sensing, shape, i)(x) for i in (1, 2, 5)]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], operators.CompressedSensing(shape, round(0.3 * size), seed=1)(x))
    listed = TomographyCard.model_validate({"type": "Tomography", "angles": [0, 45.5, 90], "detectors": 9})
    expected = operators.Tomography(shape, torch.tensor([0.0, 45.5, 90.0]), detectors=9)
    assert torch.equal(operator_from_card(listed, shape)(x), expected(x))
    assert load_problem("high-dynamic-range", operator__gain=3.0).likelihood.operator.gain == 3.0
    assert load_problem("phase-retrieval", operator__oversampling=4.0).likelihood.operator.out_shape == (3, 128, 128)


def test_photon_counts_from_a_card():
    problem = load_problem("poisson-deblur", noise__gain=50.0)
    y = problem.likelihood.measurement
    assert (problem.likelihood.gain, problem.likelihood.background) == (50.0, 1.0)
    assert torch.equal(y, y.round()) and float(y.min()) >= 0
    assert problem.key == load_problem("poisson-deblur", noise__gain=50.0).key != load_problem("poisson-deblur").key
    counts = load_problem("motion-deblur", noise={"type": "poisson", "gain": 10.0})  # another kind of noise, whole
    assert (counts.likelihood.gain, counts.likelihood.background) == (10.0, 1e-3)


def test_overrides_and_files(tmp_path, monkeypatch):
    assert float(load_problem("gaussian-deblur", noise__std=0.1).likelihood.noise_std) == 0.1
    kernel = np.zeros((3, 5), np.uint8)
    kernel[1, :] = 51
    Image.fromarray(kernel).save(tmp_path / "kernel.png")
    (tmp_path / "mine.toml").write_text(CARD)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[1] = 0.2
    beside = load_problem(tmp_path / "mine.toml")  # beside the card, wherever one works
    torch.testing.assert_close(beside.likelihood.operator.kernel[0], expected)
    monkeypatch.chdir(tmp_path)
    given = load_problem("motion-deblur", operator__kernel="kernel.png")  # from the working folder
    torch.testing.assert_close(given.likelihood.operator.kernel[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (("std = 0.05", 'std = "much"'), InputError, r"mine\.toml.*noise\.std"),
        (("std = 0.05", "std = -1"), InputError, r"noise\.std.*greater than 0"),
        (('type = "Blur"', 'type = "Blurr"'), InputError, r"mine\.toml.*Blurr"),
        (("side = 16", "side = 16\nsize = 3"), InputError, r"data\.size.*not a field"),
        (("kernel.png", "nothing.png"), InputError, r"no picture .*nothing\.png"),
        (("kernel.png", "black.png"), InputError, "black everywhere"),
        (("side = 16", "side = 2"), ShapeError, "kernel"),
        (("skimage-photos", "skimage-photo"), CatalogueError, "did you mean 'skimage-photos'"),
        (("version", "= version"), InputError, "no TOML"),
    ],
)
def test_bad_cards_name_the_file_and_the_field(tmp_path, change, error, words):
    Image.fromarray(np.full((5, 5), 10, np.uint8)).save(tmp_path / "kernel.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "mine.toml").write_text(CARD.replace(*change))
    with pytest.raises(error, match=words):
        load_problem(tmp_path / "mine.toml")


def test_unknown_names_and_indices():
    with pytest.raises(CatalogueError, match="did you mean 'motion-deblur'"):
        load_problem("motion-deblurr")
    with pytest.raises(InputError, match="counts from 0"):
        load_problem("motion-deblur", -1)
    with pytest.raises(InputError, match="0 to 7, got index 8"):
        load_problem("motion-deblur", 8)


def test_mask_of_the_wrong_shape(tmp_path):
    Image.fromarray(np.full((5, 5), 255, np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ShapeError, match=r"mask must be .*got \(5, 5\)"):
        load_problem("inpaint-random", operator__mask=str(tmp_path / "mask.png"))


@pytest.mark.parametrize(
    ("shape", "size", "corner"), [((3, 16, 24), (11, 17), None), ((1, 8, 8), (8, 8), None), ((2, 9, 7), (1, 3), (8, 4))]
)
def test_crop_is_an_operator(shape, size, corner):
    check_operator(Crop(shape, size, corner))
    x = torch.arange(float(np.prod(shape))).reshape(1, *shape)
    crop = Crop(shape, size, corner)
    top, left = crop.corner
    assert torch.equal(crop(x), x[..., top : top + size[0], left : left + size[1]])
    assert corner is None or crop.corner == corner


def test_crop_composes_and_refuses_what_does_not_fit():
    check_operator(operators.Blur(operators.motion_kernel(5, seed=1), (3, 11, 17)) @ Crop((3, 16, 24), (11, 17)))
    for size, corner in (((17, 4), None), ((4, 4), (14, 0)), ((4, 4), (-1, 0)), ((0, 4), None)):
        with pytest.raises(ShapeError, match="does not lie inside"):
            Crop((3, 16, 24), size, corner)
