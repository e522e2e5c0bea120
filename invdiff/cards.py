"""Where the catalogue is: problems, priors and data sets by name, or a user's own from any path."""

from functools import cache
from importlib.resources import files
from pathlib import Path

from invdiff.errors import CatalogueError, InputError

KINDS = {"problems": "problem", "priors": "prior", "data": "data set"}
"""Folders of the catalogue, and what one of their entries is called."""


@cache
def catalogue_root() -> Path:
    """Find the catalogue: the repository's root in a checkout, which wins; else inside the installed package."""
    package = Path(str(files("invdiff")))
    checkout = package.parent
    if all((checkout / kind).is_dir() for kind in KINDS) and (checkout / "pyproject.toml").is_file():
        return checkout
    return package / "_catalogue"


def _cards(kind: str) -> dict[str, Path]:
    if kind not in KINDS:
        raise CatalogueError.unknown("kind of card", kind, KINDS)
    root = catalogue_root() / kind
    if kind == "priors":
        return {p.parent.name: p for p in sorted(root.glob("*/prior.toml"))}
    return {p.stem: p for p in sorted(root.glob("*.toml"))}


def names(kind: str) -> list[str]:
    """List the names in the catalogue of a kind: "problems", "priors" or "data"."""
    return sorted(_cards(kind))


def find(kind: str, name_or_path: str | Path) -> Path:
    """Find a card: of the catalogue by its name, or a user's own by its path (a prior's by its folder too).

    Raises
    ------
    CatalogueError
        If there is no such kind or name; the nearest ones are offered.
    InputError
        If a path was given and there is no card.
    """
    known, text = _cards(kind), str(name_or_path)
    if text in known:
        return known[text]
    path = Path(text)
    if path.is_dir() and kind == "priors":
        path = path / "prior.toml"
    if path.suffix == ".toml" or len(path.parts) > 1:
        if not path.is_file():
            raise InputError(f"There is no {KINDS[kind]} card at {path}; known by name: {', '.join(known) or 'none'}.")
        return path
    raise CatalogueError.unknown(KINDS[kind], text, known)
