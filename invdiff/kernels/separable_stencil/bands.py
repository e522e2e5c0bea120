"""Band matrices as windows: where each row, or block of rows, begins to be non-zero, and its values from there."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bands(
    matrix: Float[Tensor, "c outputs inputs"], block: int = 1, align: int = 1
) -> tuple[Int[Tensor, " blocks"], Float[Tensor, "c blocks block window"]]:
    """Return the windows of blocks of rows; they may wrap around the end of the inputs.

    Parameters
    ----------
    matrix
        Matrices that share their pattern of zeros, on a CPU.
    block
        Rows a window.
    align
        The window's length is a multiple of this, the rest zeros.

    Returns
    -------
    tuple
        First input of each window, in [0, inputs), int64; and the windows' values, of the matrix's dtype, zeros where
        the last block has no rows.
    """
    c, outputs, inputs = matrix.shape
    blocks = -(-outputs // block)
    used = torch.zeros(blocks * block, inputs, dtype=torch.bool)
    used[:outputs] = (matrix != 0).any(0)
    used = used.reshape(blocks, block, inputs).any(1)
    first, length = zip(*(_window(row.nonzero()[:, 0], inputs) for row in used), strict=True)
    size = max(*length, 1)
    start = torch.tensor([f if f + n > inputs else min(f, inputs - size) for f, n in zip(first, length, strict=True)])
    size = -(-size // align) * align
    index = start[:, None] + torch.arange(size)
    padded = matrix.new_zeros(c, blocks * block, inputs)
    padded[:, :outputs] = matrix
    values = padded.reshape(c, blocks, block, inputs).gather(
        3, (index % inputs)[None, :, None].expand(c, -1, block, -1)
    )
    # A window that is longer than the inputs would count the first of them twice.
    return start, values * (torch.arange(size) < inputs).to(values.dtype)


def _window(columns: Tensor, inputs: int) -> tuple[int, int]:
    """First index and length of the shortest circular window that holds some columns."""
    if len(columns) == 0:
        return 0, 0
    following = torch.cat((columns[1:], columns[:1] + inputs))
    gaps = following - columns
    widest = int(gaps.flip(0).argmax())  # the last of equal gaps: no wrapping where it is not needed
    at = (len(columns) - widest) % len(columns)
    return int(columns[at]), inputs - int(gaps.max()) + 1


def periodic_run(first: Tensor, weights: Tensor) -> tuple[int, int, int]:
    """Longest run of outputs [begin, end) whose stencil repeats each period, one input further; and the period.

    A plain convolution has period 1, the transpose of down-sampling by a factor has that factor.

    Parameters
    ----------
    first, weights
        Windows of single rows as from `bands`, with weights (c, outputs, window) that are equal where they differ by
        no more than the rounding of float64.
    """
    close, best = 8 * torch.finfo(torch.float64).eps * weights.abs().max(), (0, 0, 1)
    for period in range(1, min(16, len(first) // 4) + 1):
        same = first[period:] - first[:-period] == 1
        same &= ((weights[:, period:] - weights[:, :-period]).abs() <= close).all(2).all(0)
        begin = 0
        for i in [*(~same).nonzero()[:, 0].tolist(), len(same)]:
            # Outputs begin, ..., i + period - 1 follow one another if all pairs from begin up to i do.
            if i > begin and i - begin + period > best[1] - best[0]:
                best = (begin, i + period, period)
            begin = i + 1
        if best[1] > best[0]:
            return best
    return best
