"""The one loop that runs every sampler: progress, budgets, checkpoints, stopping. It knows no sampler by name."""

import glob
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import nan
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.errors import InputError, SamplingError
from invdiff.noise import Noise
from invdiff.parallel import ALONE, Shard


@dataclass(frozen=True, kw_only=True)
class State:
    """State of a run: tensors with leading axes (ensemble, particle), and how many steps were made.

    A sampler's own state adds fields that are tensors with the same leading axes, or None. In a distributed run they
    are those of this process's particles.
    """

    z: Tensor
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a step has to tell.

    Parameters
    ----------
    sigma
        Noise level after the step, latent units.
    misfit
        Reduced chi-square of the state's prediction, mean over particles, where the step computed it; a step gives that
        of its own process's particles, and the driver puts the mean over processes in its place.
    ess
        Smallest effective sample size of an ensemble as a share of its particles, where there are weights.
    evaluations
        Network evaluations a particle so far; filled in by the driver.
    """

    sigma: float
    misfit: float | None = None
    ess: float | None = None
    evaluations: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Network evaluations a particle: forward passes, and passes backward through the network."""

    forward: int
    backward: int = 0


class Sampler(ABC):
    """A posterior sampler: settings in a final, frozen, keyword-only dataclass, and pure functions on states.

    Attributes
    ----------
    anytime
        Whether a run stopped early has draws (Markov chains), or none (annealed samplers).
    citation
        BibTeX entry of its paper.
    """

    anytime: ClassVar[bool] = False
    citation: ClassVar[str] = ""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether its law tends to the posterior in the limit that its file names; `check_sampler` holds it to that."""

    @abstractmethod
    def requires(self) -> frozenset[str]:
        """Capabilities of the posterior without which it cannot run; checked before step 0."""

    @abstractmethod
    def cost(self) -> Cost:
        """Network evaluations that one draw will need, for estimates before the run."""

    def cost_on(self, posterior: Any) -> Cost:  # noqa: ARG002 for those that override it
        """As `cost`, on a given posterior; they differ where the cost follows from the number of tokens."""
        return self.cost()

    @abstractmethod
    def init(self, posterior: Any, ensembles: int, n: int, *, noise: Noise) -> State:
        """First state, of ``ensembles`` ensembles of ``n`` particles, those of this process."""

    @abstractmethod
    def step(self, posterior: Any, state: Any, *, noise: Noise) -> tuple[State, Info]:
        """One step; the returned state's ``step`` is one larger."""

    @abstractmethod
    def done(self, state: Any) -> bool:
        """Whether the run is complete."""

    @abstractmethod
    def progress(self, state: Any) -> float:
        """Share of the run that is done, in [0, 1]."""

    @abstractmethod
    def finish(self, posterior: Any, state: Any, *, noise: Noise) -> Draws:
        """Draws from the last state."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds on a run; None is no bound.

    Parameters
    ----------
    max_evaluations
        Network evaluations a particle; the run stops before a step that could exceed it.
    max_seconds
        Wall time.
    """

    max_evaluations: float | None = None
    max_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Draws and the trace of a run; ``stopped`` says why a run ended early."""

    draws: Draws
    trace: tuple[Info, ...]
    seconds: float
    stopped: str | None = None


Callback = Callable[[State, Info], None]
_BOUNDS = ("", "max_seconds", "max_evaluations")


def run(
    sampler: Sampler,
    posterior: Any,
    *,
    ensembles: int,
    n: int,
    noise: Noise,
    evaluations: Callable[[], float],
    budget: Budget | None = None,
    callback: Callback | None = None,
    progress: bool | str = False,
    checkpoint: Path | None = None,
    checkpoint_every: float = 30.0,
    identity: str = "",
) -> Outcome:
    """Run a sampler to its end, its budget or an interruption.

    In a distributed run, which is one whose noise has a `Shard` of several processes, every process makes this call.
    The budget, the clock and the counts that end a run are the first process's; an error or an interruption of one ends
    all; each keeps its own part of a checkpoint, ``checkpoint`` with ``.RANK-of-WORLD``, all of the same step; the
    callback is called on all, and the bar shown by the first. The outcome is that of all particles, on every process.

    Parameters
    ----------
    sampler, posterior
        What runs on what.
    ensembles, n
        Ensembles and particles in each, those of all processes.
    noise
        Streams of ``ensembles`` ensembles of ``n`` particles. Step k draws from the streams of step k + 1, `init` from
        those of step 0 and `finish` from those after the last step, so that a resumed run repeats the one that was not
        cut.
    evaluations
        () -> network evaluations a particle so far in this process.
    budget, callback, progress
        Bounds; a function called after every step; whether to show a progress bar (a string is its label).
    checkpoint, checkpoint_every
        File to keep the last complete step in, and how often, seconds. It is read first where it exists, and removed
        when the run completes.
    identity
        What the run is a run of; a checkpoint of another identity is refused, and so is a run whose processes differ in
        theirs.

    Raises
    ------
    SamplingError
        If a state is not finite, or an annealed run hits its budget; a PeerError if it was another process's.
    InputError
        If the checkpoint belongs to another run.
    """
    budget, shard = budget or Budget(), noise.shard
    if checkpoint is not None and not checkpoint.parent.is_dir():
        raise InputError(f"Cannot keep a checkpoint in {checkpoint}: there is no folder {checkpoint.parent}.")
    start = time.perf_counter()
    stopped, trace = None, list[Info]()
    own = None if checkpoint is None else shard.own(checkpoint)
    with shard.together(), torch.no_grad():
        _check_same(identity, shard)
        state = sampler.init(posterior, ensembles, shard.share(n), noise=noise.at(0))
        if checkpoint is not None:
            state, trace = _resume(checkpoint, state, identity, shard)
    # Evaluations made by the process that wrote the checkpoint.
    before = trace[-1].evaluations - evaluations() if trace else 0.0
    resumed = len(trace)
    saved = time.perf_counter()
    bar = _Bar(progress if shard.rank == 0 else False)
    try:
        with shard.together():
            while not sampler.done(state):
                per_step = evaluations() / (len(trace) - resumed) if len(trace) > resumed else 0.0
                elapsed, made = time.perf_counter() - start, before + evaluations()
                reached = ("", 0.0)
                if budget.max_seconds is not None and elapsed >= budget.max_seconds:
                    reached = ("max_seconds", budget.max_seconds)
                elif budget.max_evaluations is not None and made + per_step > budget.max_evaluations:
                    reached = ("max_evaluations", budget.max_evaluations)
                which, bound = shard.agree(_BOUNDS.index(reached[0]), reached[1])[0]
                if which:
                    stopped = f"{_BOUNDS[int(which)]}={bound:g} reached"
                    break
                with torch.no_grad():
                    new, info = sampler.step(posterior, state, noise=noise.at(state.step + 1))
                if not bool(torch.isfinite(new.z).all()):
                    raise SamplingError(
                        f"{type(sampler).__name__} left the finite numbers at step {state.step + 1}, "
                        f"sigma {info.sigma:.4g}. Take more steps or smaller ones, or check the scale of noise_std."
                    )
                due = own is not None and time.perf_counter() - saved >= checkpoint_every
                # Here all learn whether all have made the step.
                rows = shard.agree(nan if info.misfit is None else info.misfit, before + evaluations(), due)
                misfit, made = (sum(row[i] for row in rows) / shard.world for i in (0, 1))
                state = new
                info = replace(info, misfit=None if info.misfit is None else misfit, evaluations=made)
                trace.append(info)
                bar.update(sampler.progress(state), info)
                if callback is not None:
                    callback(state, info)
                if own is not None and rows[0][2]:
                    save_checkpoint(own, state, identity, trace, shard)
                    saved = time.perf_counter()
    except KeyboardInterrupt:
        if own is not None:
            save_checkpoint(own, state, identity, trace, shard)
        raise
    finally:
        bar.close()
    if stopped and not sampler.anytime:
        if own is not None:
            save_checkpoint(own, state, identity, trace, shard)
        kept = f" Its last step is kept in {own}." if own is not None else ""
        raise SamplingError(
            f"{type(sampler).__name__} was stopped at {100 * sampler.progress(state):.0f} % ({stopped}); "
            f"an annealed run has no draws before its end.{kept} Raise the budget or take fewer steps."
        )
    with shard.together(), torch.no_grad():
        draws = _gathered(sampler.finish(posterior, state, noise=noise.at(state.step + 1)), shard)
    if own is not None:
        own.unlink(missing_ok=True)
    return Outcome(draws=draws, trace=tuple(trace), seconds=time.perf_counter() - start, stopped=stopped)


def _check_same(identity: str, shard: Shard) -> None:
    """Raise InputError unless all processes run the same."""
    digest = hashlib.blake2b(identity.encode(), digest_size=6).digest()  # 48 bits, which a float holds
    if len({row[0] for row in shard.agree(float(int.from_bytes(digest, "little")))}) > 1:
        raise InputError(
            "The processes of this run were asked for different things; give all of them the same problem, prior, "
            f"sampler, draws, chains and seed. Here: {identity}"
        )


def _gathered(draws: Draws, shard: Shard) -> Draws:
    """Draws of all processes."""
    if shard.world == 1:
        return draws
    w, evidence = draws.log_weights, draws.log_evidence
    return replace(
        draws,
        z=shard.gather(draws.z),
        log_weights=None if w is None else shard.gather(w),
        log_evidence=None if evidence is None else shard.first(evidence),
    )


def _resume(checkpoint: Path, state: State, identity: str, shard: Shard) -> tuple[State, list[Info]]:
    """Read this process's part of a checkpoint, where there is one."""
    own = shard.own(checkpoint)
    parts = {Shard(k, shard.world).own(checkpoint).name for k in range(shard.world)}
    others = [p.name for p in checkpoint.parent.glob(f"{glob.escape(checkpoint.name)}.*-of-*") if p.suffix != ".part"]
    foreign = sorted({*others, *([checkpoint.name] if checkpoint.exists() else [])} - parts)
    if shard.any(bool(foreign)):
        raise InputError(
            f"{checkpoint} was written by another number of processes than {shard.world} ({', '.join(foreign)}); start "
            "as many as then, or remove it to start afresh."
        )
    found = [bool(row[0]) for row in shard.agree(own.exists())]
    if not any(found):
        return state, []
    if not all(found):
        raise InputError(f"Parts of the checkpoint {checkpoint} are missing; remove the others to start afresh.")
    state, trace = load_checkpoint(own, state, identity)
    if len({row[0] for row in shard.agree(state.step)}) > 1:
        raise InputError(f"The parts of the checkpoint {checkpoint} are of different steps; remove them.")
    return state, trace


def save_checkpoint(
    path: Path,
    state: State,
    identity: str,
    trace: Sequence[Info],
    shard: Shard = ALONE,
) -> None:
    """Write a state and the trace to it to a safetensors file, whole or not at all.

    With several processes each writes its own file, and none replaces an older one before all have written.
    """
    from safetensors.torch import save_file

    values = {f.name: getattr(state, f.name) for f in fields(state)}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in values.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in values.items() if not isinstance(v, (Tensor, Shard))}
    partial = path.with_name(path.name + ".part")
    try:
        trace_text = json.dumps([asdict(i) for i in trace])
        metadata = {"identity": identity, "rest": json.dumps(rest), "trace": trace_text}
        with shard.together():
            save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path, template: State, identity: str) -> tuple[State, list[Info]]:
    """State and trace from a checkpoint of the same run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {k: file.get_tensor(k).to(template.z.device) for k in file.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a checkpoint of invdiff, or is damaged ({error}); remove it to start afresh."
        ) from error
    if meta.get("identity") != identity:
        raise InputError(
            f"{path} belongs to another run (other problem, prior, sampler, draws or seed); "
            "remove it or name another file."
        )
    trace = [Info(**entry) for entry in json.loads(meta["trace"])]
    return replace(template, **tensors, **json.loads(meta["rest"])), trace


class _Bar:
    """Progress bar on standard error with sigma, misfit, evaluations and the time left."""

    def __init__(self, progress: bool | str) -> None:
        self._bar: Any = None
        if progress:
            from tqdm import tqdm

            label = progress if isinstance(progress, str) else "sampling"
            self._bar = tqdm(total=100.0, desc=label, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")

    def update(self, share: float, info: Info) -> None:
        """Show a step."""
        if self._bar is not None:
            parts = {"sigma": f"{info.sigma:.3g}", "evaluations": f"{info.evaluations:.0f}"}
            if info.misfit is not None:
                parts["misfit"] = f"{info.misfit:.2f}"
            if info.ess is not None:
                parts["ess"] = f"{info.ess:.2f}"
            self._bar.set_postfix(parts, refresh=False)
            self._bar.update(100.0 * share - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
