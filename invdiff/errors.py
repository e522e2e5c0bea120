"""Errors: what was given, what is needed, what to do."""

import difflib
from collections.abc import Iterable


class InvdiffError(Exception):
    """Root of all errors raised on purpose by invdiff."""


class ShapeError(InvdiffError, ValueError):
    """A tensor, mask, kernel or event has the wrong shape."""


class InputError(InvdiffError, ValueError):
    """A value is out of range, not finite, or a file is not what it should be."""


class CapabilityError(InvdiffError, TypeError):
    """A problem or prior cannot do what was asked of it, e.g. a sampler needs a linear operator."""


class CatalogueError(InvdiffError, LookupError):
    """No card, prior, sampler or device of that name; the message offers the nearest names."""

    @classmethod
    def unknown(cls, kind: str, name: str, known: Iterable[str]) -> "CatalogueError":
        """Build the error for an unknown `name` of a `kind`, offering the nearest of the `known` names."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names) or 'none'}."
        return cls(f"There is no {kind} named {name!r}; {hint}")


class ChecksumError(InvdiffError, OSError):
    """A file's content differs from what its card promises: corrupt, truncated or replaced."""


class SamplingError(InvdiffError, RuntimeError):
    """A run failed; `partial` carries what was drawn so far (a Solution, a list of them, or None)."""

    def __init__(self, message: str, partial: object | None = None) -> None:
        super().__init__(message)
        self.partial = partial


class SolverError(InvdiffError, RuntimeError):
    """The solution of a differential equation is not finite; the message says when and where."""


class PeerError(SamplingError):
    """Another process of a distributed run failed, or is lost; the message says which where it is known."""
