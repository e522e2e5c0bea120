"""What all tests share: one thread, repeatable examples, checked shapes and types, an untouched global random state."""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from jaxtyping import install_import_hook

torch.set_num_threads(1)

hypothesis.settings.register_profile("invdiff", derandomize=True, deadline=None)
hypothesis.settings.load_profile("invdiff")

typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's types when it is called, but for Self, which beartype knows in whole classes only."""
    try:
        return typed(function)
    except BeartypeDecorHintPep673Exception:
        hints = function.__annotations__
        function.__annotations__ = {name: hint for name, hint in hints.items() if "Self" not in repr(hint)}
        return typed(function)


_jaxtyped = jaxtyping.jaxtyped


def outermost(**settings: Any) -> Callable[[Any], Any]:
    """Decorate what a module or a class defines, not what a function does: it would be compiled anew at every call."""
    decorate = _jaxtyped(**settings)
    return lambda function: function if "<locals>" in function.__qualname__ else decorate(function)


jaxtyping.jaxtyped = outermost  # type: ignore[assignment]

# The hook takes the checker by its importable name alone.
_checker = types.ModuleType("invdiff_type_checker")
_checker.check = check  # type: ignore[attr-defined]
sys.modules[_checker.__name__] = _checker
assert "invdiff" not in sys.modules, "the hook checks only what is imported after it"
install_import_hook("invdiff", "invdiff_type_checker.check")


@pytest.fixture(autouse=True)
def untouched_global_random_state() -> Iterator[None]:
    """Fail a test after which the global generators of torch and numpy are not as they were."""
    before, (kind, keys, *rest) = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 the state under test
    yield
    after = np.random.get_state()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before), "torch's global random state was changed"
    same = kind == after[0] and np.array_equal(keys, after[1]) and tuple(rest) == tuple(after[2:])
    assert same, "numpy's global random state was changed"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the checker off for a test that hands over wrong types on purpose, to see the library's own error."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
