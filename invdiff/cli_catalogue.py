"""The commands ``list`` and ``show``."""

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from invdiff import cards
from invdiff.errors import CatalogueError
from invdiff.solve import sampler_classes

if TYPE_CHECKING:
    from rich.console import Console

KINDS = ("problems", "priors", "data", "samplers")


def run_list(what: str) -> None:
    """Print names and titles of a kind, or of all.

    Raises
    ------
    CatalogueError
        If there is no such kind.
    InputError
        If a card of the catalogue is damaged.
    """
    from rich.table import Table
    from rich.text import Text

    console = _console()
    if what not in (*KINDS, "all"):
        raise CatalogueError.unknown("list", what, KINDS)
    for kind in KINDS if what == "all" else (what,):
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True, min_width=20)
        table.add_column(overflow="fold")
        for name, title in _entries(kind):
            table.add_row(name, Text(title))
        console.print(f"[bold]{kind}[/]")
        console.print(table)


def _entries(kind: str) -> list[tuple[str, str]]:
    if kind == "samplers":
        return [(name, _first_sentence(c)) for name, c in sorted(sampler_classes().items())]
    found = []
    for name in cards.names(kind):
        path = cards.find(kind, name)
        if kind == "priors":
            from invdiff.priors.loading import read_card as read_trained

            card = read_trained(path)
            there = (path.parent / card.weights["file"]).is_file()
            found.append((name, card.description + ("" if there else " (its weights are missing)")))
        else:
            from invdiff.card_models import read_card

            found.append((name, read_card(path, kind).title))
    return found


def run_show(name: str) -> None:
    """Print a card, or a sampler's text and settings.

    Raises
    ------
    CatalogueError
        If nothing has that name.
    InputError
        If a card is not what it should be.
    """
    console = _console()
    samplers = sampler_classes()
    if name.lower() in samplers:
        _show_sampler(console, samplers[name.lower()])
        return
    found = [(kind, cards.find(kind, name)) for kind in cards.KINDS if name in cards.names(kind)]
    if not found and (Path(name).suffix == ".toml" or len(Path(name).parts) > 1 or Path(name).is_dir()):
        from invdiff.card_models import read_values

        path = cards.find("priors", name)  # a card's file, or a prior's folder
        keys = read_values(path)
        found = [("problems" if {"operator", "equation"} & {*keys} else "data" if "reader" in keys else "priors", path)]
    if not found:
        known = [*samplers, *(n for kind in cards.KINDS for n in cards.names(kind))]
        raise CatalogueError.unknown("problem, prior, data set or sampler", name, known)
    for kind, path in found:
        _show_card(console, kind, path)


def _show_card(console: "Console", kind: str, path: Path) -> None:
    from rich.syntax import Syntax

    if kind == "priors":
        from invdiff.priors.loading import read_card as read_trained

        read_trained(path)
    else:
        from invdiff.card_models import read_card

        read_card(path, kind)
    console.print(f"[dim]# {path}[/]")
    console.print(Syntax(path.read_text(encoding="utf-8"), "toml", background_color="default", word_wrap=True))
    model_card = path.parent / "README.md"
    if kind == "priors" and model_card.is_file():
        console.print(f"The model card is {model_card}.")


def _show_sampler(console: "Console", cls: type) -> None:
    from rich.text import Text

    module = sys.modules[cls.__module__]
    console.print(f"[bold]{cls.__name__}[/]")
    console.print(Text(inspect.cleandoc(module.__doc__ or "")))
    console.print("\n[bold]Settings[/], e.g. --set sampler.steps=50")
    for f in fields(cls):
        default = getattr(cls(), f.name)
        console.print(Text(f"  {f.name} = {default!r}"))
        about = _parameter(cls, f.name)
        if about:
            console.print(Text(f"      {about}", style="dim"))


def _parameter(cls: type, name: str) -> str:
    """Find what a class's docstring says of a parameter, in the section Parameters."""
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    for i, line in enumerate(lines):
        if not line.startswith(" ") and name in (part.strip() for part in line.split(",")):
            text = []
            for following in lines[i + 1 :]:
                if not following.startswith(" "):
                    break
                text.append(following.strip())
            return " ".join(text)
    return ""


def _first_sentence(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").splitlines()[0]


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)
