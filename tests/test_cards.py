"""The catalogue's cards: where they are found, what they may hold, what their errors name, and their hash."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from invdiff import CatalogueError, InputError, cards, metrics
from invdiff.card_models import (
    BlurCard,
    DataCard,
    FileKernel,
    FileMask,
    GaussianNoise,
    PoissonNoise,
    ProblemCard,
    card_hash,
    override,
    read_card,
    read_values,
    validate,
)
from invdiff.priors.loading import read_card as read_prior_card

EVERY = [(kind, name) for kind in cards.KINDS for name in cards.names(kind)]

KERNEL = """type = "Blur"
kernel = { type = "gaussian", size = 5, std = 1.0 }"""

CARD = f"""
name = "mine"
version = 1
title = "t"
description = "d"
[operator]
{KERNEL}
[noise]
std = 0.05
[data]
set = "skimage-photos"
side = 16
"""

DATA = """
name = "tiles"
version = 1
title = "t"
source = "s"
licence = "CC0"
reader = "tiles"
side = 8
columns = 2
[splits]
test = [0, 4]
[[files]]
name = "a.png"
count = 4
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
"""


@pytest.fixture
def written(tmp_path):
    """Write a card with one change, and return its path."""

    def write(text=CARD, *change):
        path = tmp_path / "mine.toml"
        assert not change or change[0] in text
        path.write_text(text.replace(*change) if change else text)
        return path

    return write


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_card_reads_and_bears_its_files_name(kind, name):
    path = cards.find(kind, name)
    card = read_prior_card(path) if kind == "priors" else read_card(path, kind)
    assert card.name == name == (path.parent.name if kind == "priors" else path.stem)
    if isinstance(card, ProblemCard):
        assert card.data.set in cards.names("data")
        shown = metrics.score(*_draws_and_truth())
        assert set(card.metrics) <= set(shown)
    if isinstance(card, DataCard) and card.reader == "tiles":
        assert sorted(card.splits.values())[0][0] == 0
        edges = sorted(card.splits.values())
        assert all(before[1] == after[0] for before, after in pairwise(edges))  # no gap, no overlap
        assert edges[-1][1] == sum(f.count for f in card.files)


def _draws_and_truth():
    import torch

    return torch.zeros(20, 3, 16, 16), torch.ones(3, 16, 16)


def test_the_catalogue_is_not_empty():
    assert {kind for kind, _ in EVERY} == set(cards.KINDS)
    assert cards.names("problems") == sorted(cards.names("problems"))


def _catalogue(root: Path, name: str) -> None:
    for kind in cards.KINDS:
        folder = root / kind / name if kind == "priors" else root / kind
        folder.mkdir(parents=True)
        (folder / ("prior.toml" if kind == "priors" else f"{name}.toml")).write_text("")


def test_a_checkout_wins_over_the_package_and_a_wheel_has_its_own(tmp_path, monkeypatch):
    package = tmp_path / "invdiff"
    _catalogue(package / "_catalogue", "packaged")
    _catalogue(tmp_path, "checked-out")
    monkeypatch.setattr(cards, "files", lambda _: package)
    cards.catalogue_root.cache_clear()
    try:
        # Folders of these names beside an installed package are somebody else's: there is no pyproject.toml.
        assert cards.catalogue_root() == package / "_catalogue"
        assert all(cards.names(kind) == ["packaged"] for kind in cards.KINDS)
        (tmp_path / "pyproject.toml").write_text("")
        cards.catalogue_root.cache_clear()
        assert cards.catalogue_root() == tmp_path
        assert all(cards.names(kind) == ["checked-out"] for kind in cards.KINDS)
        assert cards.find("priors", "checked-out") == tmp_path / "priors" / "checked-out" / "prior.toml"
    finally:
        cards.catalogue_root.cache_clear()


def test_find_by_name_and_by_path(tmp_path, monkeypatch, written):
    path = written()
    assert cards.find("problems", path) == cards.find("problems", str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert cards.find("problems", "mine.toml") == Path("mine.toml")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "prior.toml").write_text("")
    for given in ("own", tmp_path / "own", tmp_path / "own" / "prior.toml"):
        assert cards.find("priors", given).samefile(tmp_path / "own" / "prior.toml")
    # The catalogue's name wins over a folder of that name.
    (tmp_path / "photos-64").mkdir()
    assert cards.find("priors", "photos-64").parent.parent == cards.catalogue_root() / "priors"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("problems", "motion-deblurr", "no problem named 'motion-deblurr'; did you mean 'motion-deblur'"),
        ("problems", "inpaint-ramdom", "'inpaint-random' or 'inpaint-box'"),
        ("priors", "photo-64", "no prior named 'photo-64'; did you mean 'photos-64'"),
        ("data", "kodak", "no data set named 'kodak'; did you mean 'kodak24'"),
        ("data", "zzzz", "known: caltech64, fashion-mnist"),
        ("problem", "motion-deblur", "no kind of card named 'problem'; did you mean 'problems'"),
    ],
)
def test_an_unknown_name_offers_near_ones(kind, name, words):
    with pytest.raises(CatalogueError, match=words):
        cards.find(kind, name)


def test_a_path_without_a_card(tmp_path):
    for kind, path in (("problems", tmp_path / "no.toml"), ("priors", tmp_path), ("data", tmp_path)):
        with pytest.raises(InputError, match=rf"no {cards.KINDS[kind]} card at .*{tmp_path.name}.*known by name: "):
            cards.find(kind, path)
    with pytest.raises(CatalogueError, match="kind of card"):
        validate({}, "problem", "here")


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        ("std = 0.05", 'std = "0.05"', "noise.std", "valid number, got '0.05'"),  # text is no number
        ("std = 0.05", "std = true", "noise.std", "valid number, got True"),
        ("std = 0.05", "std = nan", "noise.std", "got nan"),
        ("std = 0.05", "std = inf", "noise.std", "finite number, got inf"),
        ("std = 0.05", "std = 0", "noise.std", "greater than 0, got 0"),
        ("std = 0.05", "", "noise.std", "field required"),
        ("std = 0.05", "std = 0.05\nsdt = 1", "noise.sdt", "is not a field of this card"),
        ("[noise]\nstd = 0.05", "", "noise", "field required"),
        ('title = "t"', "title = 3", "title", "valid string, got 3"),
        ('title = "t"', 'titel = "t"', "title", "field required; titel: is not a field"),
        ("version = 1", "version = 1.5", "version", "valid integer.*got 1.5"),
        ("side = 16", "side = 0", "data.side", "greater than or equal to 1, got 0"),
        ("side = 16", "side = true", "data.side", "valid integer, got True"),
        ("size = 5", "size = 5.0", "operator.kernel.size", "valid integer, got 5.0"),
        ("size = 5, ", "", "operator.kernel.size", "field required"),
        ("std = 1.0 }", 'std = 1.0, file = "k.png" }', "operator.kernel.file", "is not a field"),
        ('type = "gaussian"', 'type = "gauss"', "operator.kernel", "'gauss'.*'gaussian', 'motion', 'file'"),
        ('type = "Blur"', 'type = "Blurr"', "operator", "'Blurr'.*'Blur', 'Inpainting', 'Downsampling'"),
        ('type = "Blur"', "", "operator", "'type'"),
        ("[noise]\nstd = 0.05", "[noise]\ntype = 'poison'", "noise", "'poison'.*'gaussian', 'poisson'"),
        ("std = 0.05", "type = 'poisson'", "noise.gain", "field required"),
        ("std = 0.05", "type = 'poisson'\ngain = 0", "noise.gain", "greater than 0, got 0"),
        ("std = 0.05", "type = 'poisson'\ngain = 1\nbackground = -1", "noise.background", "equal to 0, got -1"),
        ("std = 0.05", "type = 'poisson'\ngain = 1\nstd = 1", "noise.std", "is not a field"),
        ("[noise]\nstd = 0.05", "[noise]\ntype = 3\nstd = 0.05", "noise", "'3'"),
        (
            KERNEL,
            "type = 'Tomography'\nangles = [[0, 45], [90, 135]]",
            "operator.angles",
            r"flat list.*got \[\[0, 45\]",
        ),
        (KERNEL, "type = 'Tomography'\nangles = []", "operator.angles", r"flat list.*got \[\]"),
        (KERNEL, "type = 'Tomography'\nangles = [0, nan]", "operator.angles", "finite degrees"),
        (KERNEL, "type = 'Tomography'\nangles = ['0']", "operator.angles", "finite degrees"),
        (KERNEL, "type = 'Tomography'\nangles = 0", "operator.angles", "at least 1.*got 0"),
        (KERNEL, "type = 'Tomography'\nangles = true", "operator.angles", "got True"),
        (KERNEL, "type = 'Tomography'\nangles = 2.5", "operator.angles", "got 2.5"),
        (KERNEL, "type = 'Tomography'", "operator.angles", "field required"),
        (KERNEL, "type = 'CompressedSensing'\nratio = 1.5", "operator.ratio", "less than or equal to 1, got 1.5"),
        (KERNEL, "type = 'HighDynamicRange'\ngain = -1", "operator.gain", "greater than 0, got -1"),
        (KERNEL, "type = 'PhaseRetrieval'\noversampling = -1", "operator.oversampling", "equal to 0, got -1"),
        (
            KERNEL,
            "type = 'NonlinearBlur'\ngamma = 0.5",
            "operator.kernel",
            "field required.*gamma.*equal to 1, got 0.5",
        ),
        ('type = "Blur"', 'type = "Blur"\nboundary = "wrap"', "operator.boundary", "'circular'.*got 'wrap'"),
    ],
)
def test_a_bad_field_is_named_with_its_file(written, old, new, field, words):
    path = written(CARD, old, new)
    with pytest.raises(InputError, match=words) as caught:
        read_card(path, "problems")
    assert str(caught.value).startswith(f"{path}: {field}: ")


def test_all_bad_fields_are_named_at_once(written):
    with pytest.raises(InputError, match=r"data\.side: .*; colour: is not a field"):
        read_card(written('colour = "red"\n' + CARD.replace("side = 16", "side = -1")), "problems")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("columns = 2", "", "the card: the reader 'tiles' needs side, columns, and files with a count each"),
        ("side = 8", "", "needs side"),
        ("count = 4", "", "a count each"),
        ("test = [0, 4]", "test = [0, 5]", "the split 'test' from 0 to 5 is empty or ends after"),
        ("test = [0, 4]", "test = [4, 4]", "the split 'test' from 4 to 4 is empty"),
        ("test = [0, 4]", "test = [-1, 4]", r"splits\.test\.0: .*greater than or equal to 0, got -1"),
        ('reader = "tiles"', 'reader = "skimage"', "the reader 'skimage' needs entries"),
        (
            'reader = "tiles"',
            'reader = "skimage"\nentries = [{ box = [0, 0, 1] }]',
            r"entries\.0\.file: field required",
        ),
        ('sha256 = "00', 'sha256 = "0', r"files\.0\.sha256: .*match pattern"),
    ],
)
def test_a_data_card_holds_what_its_reader_needs(written, old, new, words):
    assert isinstance(read_card(written(DATA), "data"), DataCard)
    with pytest.raises(InputError, match=words) as caught:
        read_card(written(DATA, old, new), "data")
    assert "{'" not in str(caught.value)  # no table is printed


def test_a_syntax_error_names_the_line(written, tmp_path):
    with pytest.raises(InputError, match=r"mine\.toml is no TOML: .*line 4"):
        read_card(written(CARD, 'title = "t"', "title = t"), "problems")
    (tmp_path / "latin.toml").write_bytes('title = "\xe9"'.encode("latin-1"))
    with pytest.raises(InputError, match=r"Cannot read the card .*latin\.toml: .*utf-8"):
        read_values(tmp_path / "latin.toml")
    with pytest.raises(InputError, match=r"Cannot read the card .*nowhere\.toml: .*No such file"):
        read_values(tmp_path / "nowhere.toml")


def test_override(written):
    values = read_values(written())
    before = json.dumps(values)
    changed = override(values, {"noise.std": 0.1, "operator.kernel.size": 7, "data.side": 32, "title": "u"})
    card = validate(changed, "problems", "here")
    assert isinstance(card, ProblemCard) and isinstance(card.operator, BlurCard)
    assert (card.noise.std, card.operator.kernel.size, card.data.side, card.title) == (0.1, 7, 32, "u")
    assert json.dumps(values) == before  # a copy, to the last table
    assert override(values, {"new.table.x": 1})["new"] == {"table": {"x": 1}}
    with pytest.raises(InputError, match=r"noise\.std\.x: std is a value, not a table"):
        override(values, {"noise.std.x": 1})
    with pytest.raises(InputError, match=r"here: noise\.sdt: is not a field"):
        validate(override(values, {"noise.sdt": 1}), "problems", "here")


@pytest.mark.parametrize("path", ["k.png", Path("folder") / "k.png"])
def test_override_of_a_kernel_or_mask_by_a_path(written, path):
    values = read_values(written())
    card = validate(override(values, {"operator.kernel": path}), "problems", "here")
    assert card.operator.kernel == FileKernel(type="file", path=str(path))
    inpainting = override(values, {"operator": {"type": "Inpainting"}, "operator.mask": path})
    assert validate(inpainting, "problems", "here").operator.mask == FileMask(type="file", path=str(path))
    table = {"type": "gaussian", "size": 3, "std": 0.5}
    assert validate(override(values, {"operator.kernel": table}), "problems", "here").operator.kernel.size == 3


def test_noise_is_gaussian_unless_the_card_says_otherwise(written):
    read = read_card(written(), "problems")
    assert isinstance(read, ProblemCard) and isinstance(read.noise, GaussianNoise)
    counted = read_card(written(CARD, "std = 0.05", "type = 'poisson'\ngain = 30"), "problems")
    assert isinstance(counted, ProblemCard) and counted.noise == PoissonNoise(
        type="poisson", gain=30.0, background=1e-3
    )
    # As written by a solution's provenance and read again, angles and all.
    listed = read_card(written(CARD, KERNEL, "type = 'Tomography'\nangles = [0, 45.5]"), "problems")
    again = validate(json.loads(json.dumps(listed.model_dump(mode="json"))), "problems", "here")
    assert again == listed and card_hash(again) == card_hash(listed)


def test_the_hash_is_of_the_content_alone(written):
    original = read_card(written(), "problems")
    reordered = "# a comment\n" + CARD.replace('name = "mine"\nversion = 1', 'version = 1\nname = "mine"')
    reordered = reordered.replace("size = 5, std = 1.0", "std = 1, size = 5")
    same = read_card(written(reordered), "problems")
    spelled = read_card(written(CARD, "[noise]", '[noise]\ntype = "gaussian"'), "problems")  # a default, spelled out
    assert card_hash(original) == card_hash(same) == card_hash(spelled)
    expected = json.dumps(original.model_dump(mode="json"), sort_keys=True)
    assert card_hash(original) == hashlib.sha256(expected.encode()).hexdigest()
    script = (
        "import sys; from pathlib import Path; from invdiff.card_models import *; "
        "print(card_hash(read_card(Path(sys.argv[1]), 'problems')))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script, str(written())],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(cards.__file__).parent.parent)},
    )
    assert printed.stdout.strip() == card_hash(original)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("std = 0.05", "std = 0.050001"),
        ("size = 5", "size = 7"),
        ("version = 1", "version = 2"),
        ("side = 16", "side = 17"),
        ('type = "Blur"', 'type = "Blur"\nboundary = "zero"'),
        ('name = "mine"', 'name = "Mine"'),
    ],
)
def test_the_hash_sees_every_change(written, old, new):
    assert card_hash(read_card(written(), "problems")) != card_hash(read_card(written(CARD, old, new), "problems"))


def test_looking_up_cards_loads_no_pydantic():
    script = (
        "import sys; from invdiff import cards; cards.names('problems'); cards.find('data', 'kodak24'); "
        "print([name for name in ('pydantic', 'PIL', 'skimage', 'xarray', 'scipy', 'numba') if name in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(cards.__file__).parent.parent)},
    )
    assert printed.stdout.strip() == "[]"
