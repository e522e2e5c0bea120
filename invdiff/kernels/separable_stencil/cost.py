"""When bands are cheaper than dense products: cost models, measured in float32."""

from torch import Tensor


def cheaper_on_cpu(left: Tensor, right: Tensor, left_taps: int, right_taps: int, run: tuple[int, int, int]) -> bool:
    """Whether the compiled sweep beats two dense products on a CPU.

    Nanoseconds of one core with 512-bit vectors; pictures of 64 to 512 pixels a side, 5 to 23 taps, strides 1 to 4.

    Parameters
    ----------
    left, right
        Matrices (c, p, h) and (c, q, w).
    left_taps, right_taps
        Lengths of their windows.
    run
        Outputs of a row that share a stencil, as from `periodic_run`.
    """
    (p, h), (q, w) = left.shape[-2:], right.shape[-2:]
    sweep = sweep_on_cpu(p, q, w, left_taps, right_taps, run[1] - run[0], run[2])
    return sweep < 0.8 * 0.0106 * min(p * w * (h + q), h * q * (w + p))


def sweep_on_cpu(p: int, q: int, w: int, left_taps: int, right_taps: int, inner: int, period: int = 1) -> float:
    """Nanoseconds a picture of p x q outputs and rows of w inputs, ``inner`` outputs of a row sharing a stencil."""
    edges = (q - inner) * (1.2 + 0.19 * right_taps)
    along_rows = inner * (0.3 + 0.031 * right_taps + (0.7 if period > 1 else 0.0)) + edges
    return p * (50.0 + w * (0.3 + 0.031 * left_taps) + along_rows)


def tile_on_gpu(left: Tensor, right: Tensor) -> int | None:
    """Side of the kernel's tiles of outputs, or None where dense products are better: bands as wide as the picture."""
    (p, h), (q, w) = left.shape[-2:], right.shape[-2:]
    # Where outputs are fewer than inputs the window of a tile is large: smaller tiles keep more programs running.
    block = 16 if max(h / p, w / q) > 1.5 else 32
    widest = max(_bandwidth(left) / h, _bandwidth(right) / w)
    return block if min(h, w) >= 64 and widest <= 0.5 else None


def _bandwidth(matrix: Tensor) -> int:
    return int((matrix != 0).any(0).sum(-1).max())
