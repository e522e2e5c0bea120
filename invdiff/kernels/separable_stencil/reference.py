"""The two matrix products themselves, in plain PyTorch."""

import torch
from torch import Tensor


def separable_stencil(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``L X R^T`` for matrices (c, p, h), (c, q, w) and a batch (n, c, h, w); the cheaper order of the two products."""
    (p, h), (q, w) = left.shape[-2:], right.shape[-2:]
    # One matrix for all channels: as a 2-D right factor the batch becomes the rows of a single matrix product.
    left, right = (side[0] if side.ndim == 3 and len(side) == 1 else side for side in (left, right))
    if p * w * (h + q) <= h * q * (w + p):
        return torch.matmul(torch.matmul(left, x), right.mT)
    return torch.matmul(left, torch.matmul(x, right.mT))
