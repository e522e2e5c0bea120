"""The one loop that runs every sampler: progress, budgets, checkpoints, stopping. It knows no sampler by name."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.errors import InputError, SamplingError
from invdiff.noise import Noise


@dataclass(frozen=True, kw_only=True)
class State:
    """State of a run: tensors with leading axes (ensemble, particle), and how many steps were made.

    A sampler's own state adds fields that are tensors with the same leading axes, or None.
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
        Reduced chi-square of the state's prediction, mean over particles, where the step computed it.
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

    @abstractmethod
    def init(self, posterior: Any, ensembles: int, n: int, *, noise: Noise) -> State:
        """First state, of ``ensembles`` ensembles of ``n`` particles."""

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

    Parameters
    ----------
    sampler, posterior
        What runs on what.
    ensembles, n
        Ensembles and particles in each.
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
        What the run is a run of; a checkpoint of another identity is refused.

    Raises
    ------
    SamplingError
        If a state is not finite, or an annealed run hits its budget.
    InputError
        If the checkpoint belongs to another run.
    """
    budget = budget or Budget()
    if checkpoint is not None and not checkpoint.parent.is_dir():
        raise InputError(f"Cannot keep a checkpoint in {checkpoint}: there is no folder {checkpoint.parent}.")
    start = time.perf_counter()
    trace: list[Info] = []
    stopped = None
    before = 0.0  # evaluations made by the process that wrote the checkpoint
    with torch.no_grad():
        state = sampler.init(posterior, ensembles, n, noise=noise.at(0))
    if checkpoint is not None and checkpoint.exists():
        state, trace = load_checkpoint(checkpoint, state, identity)
        before = trace[-1].evaluations - evaluations() if trace else 0.0
    resumed = len(trace)
    saved = time.perf_counter()
    bar = _Bar(progress)
    try:
        while not sampler.done(state):
            elapsed, made = time.perf_counter() - start, before + evaluations()
            per_step = evaluations() / (len(trace) - resumed) if len(trace) > resumed else 0.0
            if budget.max_seconds is not None and elapsed >= budget.max_seconds:
                stopped = f"max_seconds={budget.max_seconds:g} reached"
            elif budget.max_evaluations is not None and made + per_step > budget.max_evaluations:
                stopped = f"max_evaluations={budget.max_evaluations:g} reached"
            if stopped:
                break
            with torch.no_grad():
                new, info = sampler.step(posterior, state, noise=noise.at(state.step + 1))
            if not bool(torch.isfinite(new.z).all()):
                raise SamplingError(
                    f"{type(sampler).__name__} left the finite numbers at step {state.step + 1}, "
                    f"sigma {info.sigma:.4g}. Take more steps or smaller ones, or check the scale of noise_std."
                )
            state = new
            info = replace(info, evaluations=before + evaluations())
            trace.append(info)
            bar.update(sampler.progress(state), info)
            if callback is not None:
                callback(state, info)
            if checkpoint is not None and time.perf_counter() - saved >= checkpoint_every:
                save_checkpoint(checkpoint, state, identity, trace)
                saved = time.perf_counter()
    except KeyboardInterrupt:
        if checkpoint is not None:
            save_checkpoint(checkpoint, state, identity, trace)
        raise
    finally:
        bar.close()
    if stopped and not sampler.anytime:
        if checkpoint is not None:
            save_checkpoint(checkpoint, state, identity, trace)
        kept = f" Its last step is kept in {checkpoint}." if checkpoint is not None else ""
        raise SamplingError(
            f"{type(sampler).__name__} was stopped at {100 * sampler.progress(state):.0f} % ({stopped}); "
            f"an annealed run has no draws before its end.{kept} Raise the budget or take fewer steps."
        )
    with torch.no_grad():
        draws = sampler.finish(posterior, state, noise=noise.at(state.step + 1))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return Outcome(draws=draws, trace=tuple(trace), seconds=time.perf_counter() - start, stopped=stopped)


def save_checkpoint(path: Path, state: State, identity: str, trace: Sequence[Info]) -> None:
    """Write a state and the trace to it to a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    values = {f.name: getattr(state, f.name) for f in fields(state)}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in values.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
    partial = path.with_name(path.name + ".part")
    try:
        save_file(
            tensors,
            partial,
            metadata={"identity": identity, "rest": json.dumps(rest), "trace": json.dumps([asdict(i) for i in trace])},
        )
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
