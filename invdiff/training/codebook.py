r"""A codebook learnt by moving averages: each code follows the mean of the vectors that it is nearest to.

With n_v the number of a batch's N vectors z whose nearest code is v, and s_v their sum,

    N_v <- d N_v + (1 - d) n_v V / N,     m_v <- d m_v + (1 - d) s_v V / N,     E_v = m_v / N_v

which is van den Oord et al. 2017 (arXiv 1711.00937, appendix A.1) with counts scaled to a mean of one: an online
k-means. A code whose N_v falls below a twentieth is dead; it starts again at a random vector of the batch with N_v = 1
(random restarts as in Dhariwal et al. 2020, arXiv 2005.00341), and so has log(20) / (1 - d) steps to find its place.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

_DEAD, _FADED = 0.05, 1e-6


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """Value of e, gradient to z (Bengio et al. 2013, arXiv 1308.3432)."""
    return z + (e - z).detach()


@final
class CodebookAverage:
    """Moving averages that a codebook follows; nothing here waits for the device.

    Parameters
    ----------
    codebook
        E (V, c), float32; written in place.
    decay
        d, per batch.

    Attributes
    ----------
    counts, sums
        N (V,) and m (V, c).
    """

    def __init__(self, codebook: Float[Tensor, "V c"], decay: float) -> None:
        self.codebook, self.decay = codebook, decay
        self.counts, self.sums = codebook.new_ones(len(codebook)), codebook.clone()

    @torch.no_grad()
    def start(self, z: Float[Tensor, "N c"], generator: torch.Generator) -> None:
        """Begin at random vectors of a batch."""
        self.sums.copy_(self._some(z, generator))
        self.counts.fill_(1.0)
        self.codebook.copy_(self.sums)

    @torch.no_grad()
    def update(
        self, z: Float[Tensor, "N c"], tokens: Int[Tensor, " N"], generator: torch.Generator, *, revive: bool = True
    ) -> None:
        """Take in a batch of vectors and the tokens of their nearest codes."""
        scale = len(self.counts) / len(z)
        n = torch.zeros_like(self.counts).index_add_(0, tokens, torch.ones_like(z[:, 0]))
        s = torch.zeros_like(self.sums).index_add_(0, tokens, z)
        self.counts.lerp_(n * scale, 1 - self.decay)
        self.sums.lerp_(s * scale, 1 - self.decay)
        candidates = self._some(z, generator)  # drawn in any case, so that the stream does not depend on who is dead
        if revive:
            dead = self.counts < _DEAD
            self.sums.copy_(torch.where(dead[:, None], candidates, self.sums))
            self.counts.masked_fill_(dead, 1.0)
        alive = self.counts > _FADED  # below, the ratio of two vanishing numbers: such a code stays where it was
        self.codebook.copy_(torch.where(alive[:, None], self.sums / self.counts[:, None], self.codebook))

    def _some(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return z[torch.randint(len(z), (len(self.counts),), generator=generator, device=z.device)]
