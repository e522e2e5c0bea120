"""Filter banks in plain PyTorch: a matrix product for short signals, tap by tap for long ones."""

from torch import Tensor

DENSE = 2**20
"""Entries of the largest matrix that is written out."""


def _apply(x: Tensor, tables: list[Tensor], dense: Tensor | None) -> Tensor:
    """Matrix on the axis before the last: (..., inputs, i) -> (..., outputs, i)."""
    if dense is not None:
        return x.mT.matmul(dense.mT).mT if x.shape[-1] == 1 else dense.matmul(x)
    index, weights = tables[:2]
    total = x.index_select(-2, index[:, 0]) * weights[:, :1]
    for k in range(1, index.shape[1]):
        total = total + x.index_select(-2, index[:, k]) * weights[:, k, None]
    return total


def split(x: Tensor, tables: list[Tensor], dense: Tensor | None) -> Tensor:
    """Both bands of signals: (o, d, N, i) -> (o, 2, d, m, i)."""
    o, d, _, inner = x.shape
    return _apply(x, tables, dense).reshape(o, d, 2, len(tables[0]) // 2, inner).transpose(1, 2)


def merge(c: Tensor, tables: list[Tensor], dense: Tensor | None) -> Tensor:
    """Signals of both bands: (o, 2, d, m, i) -> (o, d, N, i); ``dense`` is the matrix itself, (N, 2 m)."""
    return _apply(c.transpose(1, 2).flatten(2, 3), tables, dense)
