"""Tables derived from a buffer (spectra, factorisations), kept until the buffer moves or changes."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor

T = TypeVar("T")


@final
class Cache:
    """Derived tables of source tensors; emptied as soon as one is replaced (`module.to`) or written to."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._tables: dict[Hashable, Any] = {}

    def get(self, source: Tensor | tuple[Tensor, ...], key: Hashable, build: Callable[[], T]) -> T:
        """Return the table of that key, built if it is not there.

        Parameters
        ----------
        source
            The tensor, or the tensors, from which the table is made.
        key
            Name of the table, with the dtype if it has several.
        build
            Makes the table; runs without gradients.
        """
        sources = source if isinstance(source, tuple) else (source,)
        if torch.compiler.is_compiling():  # a trace cannot ask for versions; it begins from the tables that there are
            versions = self._versions
        else:
            versions = tuple(-1 if s.is_inference() else s._version for s in sources)
        same = len(sources) == len(self._sources) and all(a is b for a, b in zip(sources, self._sources, strict=True))
        if not same or versions != self._versions:
            self._sources, self._versions, self._tables = sources, versions, {}
        if key not in self._tables:
            # A table born in inference mode could never serve a gradient later.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._tables[key] = build()
        return cast(T, self._tables[key])
