"""Who takes part in the benchmark on decoded tokens: samplers, and the ranges they are tuned over.

All are held to the same number of decoder calls a picture, those of all its particles together. A decoder call takes
one sequence, or its vectors, through the detokeniser and the operator; those backward are reported beside. The first
trial of every contender is its default settings; the others are drawn from its ranges by a seed, as on photographs.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invdiff.bench.contenders import Contender
from invdiff.bench.tasks import Group
from invdiff.errors import InputError
from invdiff.posterior import Posterior
from invdiff.priors.base import MaskedPrior
from invdiff.samplers import APS, G2D2, SGDD, SVDD, AnchoredSMC, MaskedGibbs, PlugIn, Sampler, TwistedSMC

CALLS = 5000
"""Decoder calls a picture unless told otherwise, forward."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a sampler may spend.

    Parameters
    ----------
    calls
        Decoder calls a particle, forward.
    length, vocabulary_size
        Tokens of a picture, and how many there are.
    """

    calls: int
    length: int
    vocabulary_size: int

    def number(self, what: str, each: int, more: int) -> int:
        """How many steps fit that cost so many calls each, with so many more for all.

        Raises
        ------
        InputError
            If not one does.
        """
        found = (self.calls - more) // each
        if found < 1:
            raise InputError(
                f"{what} needs {each + more} decoder calls a particle at least, and may spend {self.calls}; give it "
                "more calls or fewer particles."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Draws of each picture, and what they cost.

    Parameters
    ----------
    draws
        (pictures, draws, c, h, w), in [0, 1].
    calls, backward
        Decoder calls a picture, forward and backward.
    passes
        Of a sequence through the network, a picture.
    seconds
        Wall time a picture.
    exact
        Whether the sampler's law tends to the posterior, in the limit that its file names.
    """

    draws: Tensor
    calls: float
    backward: float
    passes: float
    seconds: float
    exact: bool


def _masked_gibbs(room: Room, blocks: str = "1, 4, 8") -> Sampler:
    sizes = tuple(int(b) for b in blocks.split(","))
    return MaskedGibbs(steps=room.number("MaskedGibbs", 1, 2), blocks=sizes)  # and the start's, and the misfit's


def _sgdd(room: Room, mh_steps: int = 5, **settings: Any) -> Sampler:
    mh_steps = min(mh_steps, max(room.calls - 2, 1))
    return SGDD(steps=room.number("SGDD", mh_steps, 2), mh_steps=mh_steps, **{"prior_steps": 8, **settings})


def _sgdd_published(room: Room) -> Sampler:
    """70 levels, b from nearly 1 to nearly 0, all calls that there are in moves; 5000 a level in the paper."""
    return SGDD(steps=70, mh_steps=room.number("SGDD", 70, 2), prior_steps=64, tightest=1e-3, schedule="linear")


def _svdd(room: Room, candidates: int = 20, alpha: float = 1.0) -> Sampler:
    return SVDD(steps=room.number("SVDD", candidates, 1), candidates=candidates, alpha=alpha)


def _aps(room: Room, inner_steps: int = 20, kl: float = 1.0, **settings: Any) -> Sampler:
    steps = min(room.number("APS", inner_steps, 1), room.length)
    return APS(steps=steps, inner_steps=inner_steps, kl=kl, **settings)


def _g2d2(room: Room, inner_steps: int = 20, **settings: Any) -> Sampler:
    return G2D2(steps=min(room.number("G2D2", inner_steps, 1), room.length), inner_steps=inner_steps, **settings)


def _anchored(room: Room, inner_steps: int = 5, **settings: Any) -> Sampler:
    """As many fits as there is room for, evenly spread over the tokens."""
    fits = min(room.number("AnchoredSMC", inner_steps, room.length + 2), room.length)
    return AnchoredSMC(inner_steps=inner_steps, every=-(-room.length // fits), twist=PlugIn(), **settings)


def _twisted(room: Room, order: Any = "random") -> Sampler:
    room.number("TwistedSMC", room.length * room.vocabulary_size, 2)
    return TwistedSMC(twist=PlugIn(), lookahead=False, order=order)


_PARTICLES = [10, 20, 50]

CONTENDERS: tuple[Contender, ...] = (
    Contender(
        name="MaskedGibbs",
        make=_masked_gibbs,
        ranges={"blocks": ["1", "1, 2", "1, 4, 8", "2, 4, 8, 16", "8, 32"]},
    ),
    Contender(
        name="SGDD",
        make=_sgdd,
        ranges={
            "mh_steps": [2, 5, 10, 20],
            "prior_steps": [4, 8, 16],
            "loosest": [0.3, 0.6, 1.0],
            "tightest": (1e-4, 0.1),
            "schedule": ["geometric", "linear"],
        },
    ),
    Contender(name="SGDD, as published", make=_sgdd_published),
    Contender(
        name="SVDD",
        make=_svdd,
        ranges={"candidates": [5, 10, 20, 50, 100], "alpha": (0.3, 300.0)},
    ),
    Contender(
        name="APS",
        make=_aps,
        backward=1,
        ranges={
            "inner_steps": [10, 20, 50],
            "lr": (0.03, 1.0),
            "estimator": ["hard", "soft", "entropy"],
            "sticky": [True, False],
        },
    ),
    Contender(
        name="APS, no divergence",
        make=partial(_aps, kl=0.0),
        backward=1,
        ranges={
            "inner_steps": [10, 20, 50],
            "lr": (0.03, 1.0),
            "estimator": ["hard", "soft", "entropy"],
            "sticky": [True, False],
        },
    ),
    Contender(
        name="G2D2",
        make=_g2d2,
        backward=1,
        ranges={
            "inner_steps": [10, 20, 30],
            "lr": (0.1, 10.0),
            "lr_decades": [0.0, 1.0, 2.0],
            "kl": (0.1, 10.0),
            "forget": [0.1, 0.3, 1.0],
        },
    ),
    Contender(
        name="AnchoredSMC",
        make=_anchored,
        backward=1,
        ranges={"inner_steps": [3, 5, 10, 20], "lr": (0.1, 2.0), "defence": [0.05, 0.1, 0.3]},
    ),
    Contender(
        name="AnchoredSMC, islands",
        make=_anchored,
        backward=1,
        fixed={"island": 4},
        ranges={"island": [2, 4, 8], "inner_steps": [3, 5, 10], "lr": (0.1, 2.0), "defence": [0.05, 0.1]},
    ),
    Contender(
        name="TwistedSMC, no lookahead",
        make=_twisted,
        ranges={"particles": _PARTICLES, "order": ["random", "entropy"]},
    ),
)


def run(
    contender: Contender,
    settings: Mapping[str, Any],
    batch: Group,
    prior: MaskedPrior,
    *,
    draws: int,
    calls: int,
    device: str,
    precision: str,
    micro_batch: int,
) -> Decoded:
    """Draw for every problem of a group, with at most so many decoder calls a picture.

    The setting ``particles``, where a contender has it, says how many share the calls, of which the draws are taken;
    else there are as many as draws. With the setting ``island`` every draw has an ensemble of so many particles of its
    own: draws are then independent of each other, and each is only as near to the posterior as so few particles bring
    it.

    Raises
    ------
    CapabilityError
        If the contender cannot do the task.
    InputError
        If the calls are too few for it, or the particles for the draws.
    """
    assert contender.make is not None
    own = {**contender.fixed, **settings}
    island = own.pop("island", 0)
    particles, chains = (island, draws) if island else (own.pop("particles", draws), 1)
    if particles * chains < draws:
        raise InputError(f"{draws} draws need as many particles, got {particles}; raise it, or ask for fewer draws.")
    (length,) = prior.shape
    room = Room(calls=calls // (particles * chains), length=length, vocabulary_size=prior.vocabulary_size)
    make: Callable[..., Sampler] = contender.make
    sampler, count = make(room, **own), len(batch.problems)
    began = time.perf_counter()
    posterior = Posterior(list(batch.problems), prior, device=device, precision=precision, micro_batch=micro_batch)
    solutions: Any = posterior.sample(sampler, particles, chains=chains, seed=0)
    found = torch.stack([evenly(s.draws, draws) for s in solutions])  # of islands, the first of each
    spent = posterior.evaluations
    return Decoded(
        draws=found,
        calls=spent.likelihood / count,
        backward=spent.likelihood_grad / count,
        passes=spent.denoiser / count,
        seconds=(time.perf_counter() - began) / count,
        exact=sampler.exact,
    )


def evenly(x: Tensor, number: int) -> Tensor:
    """Evenly spaced ones of draws: those of a systematic resampling stand in their ancestors' order."""
    return x[torch.arange(number) * len(x) // number]
