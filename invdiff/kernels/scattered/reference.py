"""Weighted sums of gathered entries in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def gather_sum(x: Tensor, starts: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return (n, outputs) from (n, inputs); see `invdiff.kernels.scattered`."""
    if not x.numel() or not len(index):
        return torch.zeros(len(x), len(starts) - 1, dtype=x.dtype, device=x.device)
    y = embedding_bag(
        index, x.mT.contiguous(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return y.mT.contiguous()
