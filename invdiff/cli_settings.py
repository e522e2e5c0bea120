"""Settings from the command line: ``--set sampler.steps=50``, checked against the dataclass that they set."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from inspect import isabstract
from types import NoneType, UnionType
from typing import Any, get_args

from invdiff.errors import CatalogueError, InputError

ROOMS = ("sampler", "operator", "noise")


def parse(items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Split ``room.key=value`` items by room.

    Returns
    -------
        For each of `ROOMS` a dict from the rest of the dotted key to the value: a number, a boolean or a list as JSON
        has them, else the text.

    Raises
    ------
    InputError
        If an item has no ``=`` or no such room, or a key is set twice.
    """
    found: dict[str, dict[str, Any]] = {room: {} for room in ROOMS}
    for item in items:
        key, equals, text = item.partition("=")
        room, _, rest = key.strip().partition(".")
        if not equals or not rest:
            raise InputError(
                f"--set takes NAME.SETTING=VALUE, e.g. sampler.steps=50 or operator.kernel.seed=3; got {item!r}."
            )
        if room not in found:
            raise CatalogueError.unknown("part to set", room, ROOMS)
        if rest in found[room]:
            raise InputError(f"--set gives {key.strip()} twice.")
        found[room][rest] = _value(text.strip())
    return found


def _value(text: str) -> Any:
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def apply(thing: Any, settings: Mapping[str, Any]) -> Any:
    """Replace settings of a dataclass; dotted keys reach into dataclasses that it holds.

    A field that holds a strategy (a PiGDM's covariance, say) takes the name of one, in any case.

    Raises
    ------
    CatalogueError
        If there is no such setting or strategy; the nearest names are offered.
    InputError
        If a value is of the wrong type or out of range.
    """
    name = type(thing).__name__
    known = {f.name: f for f in fields(thing)}
    # Whole strategies first, so that sampler.inner=langevin and sampler.inner.steps=20 may stand together in any order.
    for key in sorted(settings, key=lambda k: k.count(".")):
        head, _, rest = key.partition(".")
        if head not in known:
            raise CatalogueError.unknown(f"setting of {name}", head, known)
        old = getattr(thing, head)
        if rest:
            if not is_dataclass(old):
                raise InputError(f"{name}.{head} is {old!r}, which has no settings of its own; leave {rest!r} out.")
            new = apply(old, {rest: settings[key]})
        else:
            new = _fitting(f"{name}.{head}", settings[key], known[head].type)
        thing = replace(thing, **{head: new})
    return thing


def _fitting(name: str, value: Any, kind: Any) -> Any:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return None
    for k in kinds:
        if k is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if k in (int, str, bool) and type(value) is k:
            return value
        if isinstance(k, type) and isabstract(k):
            subclasses: list[type] = k.__subclasses__()
            strategies = {c.__name__.lower(): c for c in subclasses}
            if str(value).lower() not in strategies:
                raise CatalogueError.unknown(f"{k.__name__} for {name}", str(value), strategies)
            return strategies[str(value).lower()]()
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    wanted = " or ".join(words.get(k, getattr(k, "__name__", str(k))) for k in kinds)
    raise InputError(f"{name} takes {wanted}, got {value!r}.")
