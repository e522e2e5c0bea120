"""Operators to and from other libraries; each library is imported when it is used."""

from invdiff.operators.adapters.deepinv import from_deepinv, to_deepinv

__all__ = ["from_deepinv", "to_deepinv"]
