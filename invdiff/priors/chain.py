r"""Markov chain of tokens: ``p(x) = a(x_1) prod_i P(x_i, x_{i+1})``.

Given any known tokens the conditionals follow from the forward-backward recursions (Rabiner 1989): with evidence b_i(v)
that is 0 where a known token is another one and else 1,

    forward_1 = a b_1,  forward_{i+1} = (forward_i P) b_{i+1},   backward_i = P (b_{i+1} backward_{i+1}),
    p(x_i | known) ~ forward_i backward_i,

in logarithms, so that any length will do.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.draws import categorical
from invdiff.errors import ShapeError
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.priors.masked import ExactMaskedPrior, as_law, known_tokens


def log_matmul(log_a: Float[Tensor, "n s"], P: Float[Tensor, "s t"]) -> Float[Tensor, "n t"]:
    """Log of exp(log_a) @ P, a product of matrices shifted by the largest of each row.

    A state less probable than the row's largest by e^-745 counts as impossible.
    """
    top = log_a.amax(1, keepdim=True)
    return torch.log(torch.exp(log_a - top.nan_to_num(neginf=0.0)) @ P) + top


def forward_backward(
    initial: Float[Tensor, " s"], P: Float[Tensor, "s s"], evidence: Float[Tensor, "n length s"]
) -> Float[Tensor, "n length s"]:
    """Log of each state's posterior probability, normalised; NaN where the evidence has probability zero.

    Parameters
    ----------
    initial
        Logs of weights of the first state, not all minus infinity.
    P
        Non-negative weights of transitions; rows need not sum to 1.
    evidence
        Logs of the evidence for each state.
    """
    length = evidence.shape[1]
    forward, backward = [initial + evidence[:, 0]], [torch.zeros_like(evidence[:, 0])]
    for i in range(1, length):
        forward.append(log_matmul(forward[-1], P) + evidence[:, i])
        backward.append(log_matmul(backward[-1] + evidence[:, length - i], P.mT))
    both = torch.stack(forward, 1) + torch.stack(backward[::-1], 1)
    return both - torch.logsumexp(both, dim=2, keepdim=True)


@final
class MarkovChainPrior(ExactMaskedPrior):
    """A Markov chain of tokens with exact conditionals given any of them.

    Parameters
    ----------
    initial
        Probabilities of the first token, shape (V,).
    transition
        P(v, w), probability of token w after token v, shape (V, V).
    length
        Tokens of a sequence.
    codebook, detokeniser
        As in `ExactMaskedPrior`.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    InputError
        If they are not probabilities.
    """

    name: ClassVar[str] = "markov-chain"
    _defining: ClassVar[tuple[str, ...]] = ("log_initial", "transition")
    log_initial: Tensor
    transition: Tensor

    def __init__(
        self,
        initial: Float[Tensor, " v"],
        transition: Tensor,
        length: int,
        *,
        codebook: Tensor | None = None,
        detokeniser: Operator | None = None,
    ) -> None:
        V = len(initial)
        if tuple(transition.shape) != (V, V):
            raise ShapeError(f"For {V} tokens the transition has shape ({V}, {V}); got {tuple(transition.shape)}.")
        super().__init__(length, V, codebook, detokeniser)
        self.register_buffer("log_initial", as_law(initial, "The initial probabilities"))
        self.register_buffer("transition", as_law(transition, "The rows of the transition").exp())

    def _conditionals(self, tokens: Tensor) -> Tensor:
        return forward_backward(self.log_initial, self.transition, known_tokens(tokens, self.vocabulary_size))

    def log_prob(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
        """Log-probability of complete sequences, nats."""
        self._complete(tokens)
        steps = self.transition.log()[tokens[:, :-1], tokens[:, 1:]]
        return self.log_initial[tokens[:, 0]] + steps.sum(1)

    def _draw(self, noise: Noise) -> Tensor:
        u, log_P = noise.uniform(noise.slots, (self.length,)), self.transition.log()
        tokens = [categorical(self.log_initial.expand(len(u), -1), u[:, 0])]
        for i in range(1, self.length):
            tokens.append(categorical(log_P[tokens[-1]], u[:, i]))
        return torch.stack(tokens, 1)
