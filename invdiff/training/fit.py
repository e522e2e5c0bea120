"""Train a network within a budget of time: weights, their moving average, a clock, and a state on disk.

What is trained on is a `Task`. The budget is time: the learning rate follows the share of it that is used, so that a
training of any length ends annealed, and a training cut into several commands goes on where it stood. Several processes
(torchrun) average their gradients, and their clocks with them.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from invdiff.errors import InputError
from invdiff.training.checkpoint import Progress, load_state, pack, save_state, unpack
from invdiff.training.settings import Budget

BANDS = (0.05, 0.1, 0.4, 1.0)
"""Edges, latent units, of the noise levels that the log tells apart."""


@runtime_checkable
class Plan(Budget, Protocol):
    """Settings that every training has."""

    @property
    def batch(self) -> int:
        """Examples a step, over all processes."""
        ...

    @property
    def seed(self) -> int:
        """Of weights, examples and noise."""
        ...

    @property
    def ema_exponent(self) -> float:
        """Exponent of the moving average."""
        ...

    @property
    def log_every(self) -> int:
        """Steps between lines of the log."""
        ...

    @property
    def validate_every(self) -> int:
        """Steps between validations."""
        ...

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed training must share with its beginning."""
        ...


@runtime_checkable
class Task(Protocol):
    """What a network is trained on."""

    @property
    def settings(self) -> Plan:
        """Budget, batch and seed."""
        ...

    def network(self) -> nn.Module:
        """Make the network, its weights from torch's global generator."""
        ...

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw n examples and noise: what `losses` takes; the noise levels (n,) come first."""
        ...

    def losses(self, network: Callable[[Tensor, Tensor], Tensor], *drawn: Tensor) -> Tensor:
        """Losses of what was drawn, (n,)."""
        ...

    def validate(self, network: Any) -> str:
        """Give a line of the log on the averaged network."""
        ...

    def export(self, network: Any, progress: Progress, out: Path) -> None:
        """Write the finished prior."""
        ...


def learning_rate(progress: Progress, settings: Budget) -> float:
    """Warm-up by steps times a half cosine of the share of the budget that is used."""
    warm = min(1.0, (progress.step + 1) / max(1, settings.warmup_steps))
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, used(progress, settings))))


def used(progress: Progress, settings: Budget) -> float:
    """Share of the budget used: of the time or of the steps, whichever is larger."""
    return max(progress.elapsed / settings.seconds, progress.step / settings.steps if settings.steps else 0.0)


class Trainer:
    """Weights, their moving average, the optimiser, and one step of them.

    Parameters
    ----------
    task
        What to train on.
    device
        Where to train; on CUDA in bfloat16 autocast and channels-last.
    compiled
        Whether the network goes through torch.compile.
    captured
        Whether a step is replayed as one CUDA graph, which small networks need: their launches take longer than their
        work. On CUDA and in one process only.

    Raises
    ------
    InputError
        If a batch does not divide among the processes, or a step cannot be captured.
    """

    def __init__(self, task: Task, device: torch.device, *, compiled: bool = False, captured: bool = False) -> None:
        self.task, self.settings, self.device, self.cuda = task, task.settings, device, device.type == "cuda"
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.settings.batch % self.world:
            raise InputError(f"A batch of {self.settings.batch} does not divide among {self.world} processes.")
        if captured and (not self.cuda or self.world > 1):
            raise InputError("A step is captured as a CUDA graph on one CUDA device; train without --capture.")
        self.network = self._made()
        self.parameters = dict(self.network.named_parameters())
        self.average = {k: v.detach().clone() for k, v in self.parameters.items()}
        # Numbers that change from step to step stand on the device, where a captured step reads them.
        self._rate, self._share = torch.tensor(0.0, device=device), torch.tensor(0.0, device=device)
        self.optimiser = torch.optim.Adam(
            self.parameters.values(), lr=self._rate, betas=(0.9, 0.99), fused=self.cuda, capturable=self.cuda
        )
        self.progress = Progress()
        self.forward = torch.compile(self.network) if compiled else self.network
        self.generator = torch.Generator(device=device)
        self._captured = captured
        self._graph: tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor] | None = None
        self._since: float | None = None  # the first step compiles: the clock starts after it

    def step(self) -> tuple[Tensor, Tensor]:
        """Take one step; returns the noise levels and losses of this process's examples."""
        s, n = self.settings, self.settings.batch // self.world
        # The stream depends on the step, so that a resumed training sees what it would have seen.
        self.generator.manual_seed((s.seed * 1_000_003 + self.progress.step) * 1009 + self.rank)
        with torch.no_grad():
            drawn = self.task.draw(n, self.generator)
        self._set_numbers()
        if self._captured and self._graph is None and self._since is not None:
            self._capture(drawn)
        if self._graph is None:
            loss = self._update(drawn)
        else:
            graph, kept, loss = self._graph
            for k, d in zip(kept, drawn, strict=True):
                k.copy_(d)
            graph.replay()
            loss = loss.clone()
        self.progress.step += 1
        self.progress.images += s.batch
        if self._since is None or self.progress.step % 10 == 0:
            self._tick()
        return drawn[0], loss

    def _set_numbers(self) -> None:
        """Put this step's learning rate and share of the average on the device."""
        s = self.settings
        self._rate.fill_(learning_rate(self.progress, s))
        self._share.fill_(1 - (1 - 1 / (self.progress.step + 1)) ** (s.ema_exponent + 1))

    def _update(self, drawn: tuple[Tensor, ...]) -> Tensor:
        """Follow the gradient of what was drawn; returns the losses."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda, cache_enabled=not self._captured):
            loss = self.task.losses(self.forward, *drawn)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss.mean())
        self._all_reduce()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self._update_average()
        return loss.detach()

    def _capture(self, drawn: tuple[Tensor, ...]) -> None:
        """Record `_update` as a graph; what was compiled or allocated at the first step is there by now."""
        kept, graph = tuple(d.clone() for d in drawn), torch.cuda.CUDAGraph()
        self.optimiser.zero_grad()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            loss = self._update(kept)
        self._graph = (graph, kept, loss)

    def _all_reduce(self) -> None:
        """Average the gradients over all processes in one message."""
        if self.world == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for g, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))

    def _tick(self) -> None:
        """Add the slowest process's time since the last tick, that all share a learning rate; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._since is not None:
            clock = torch.tensor(now - self._since, device=self.device)
            if self.world > 1:
                dist.all_reduce(clock, op=dist.ReduceOp.MAX)
            self.progress.elapsed += float(clock)
        self._since = now

    def pause(self) -> None:
        """Stop the clock until the next step is done: what lies between, and a compilation, is not counted."""
        self._since = None

    @torch.no_grad()
    def _update_average(self) -> None:
        average = list(self.average.values())
        change = torch._foreach_sub([p.detach() for p in self.parameters.values()], average)
        torch._foreach_mul_(change, self._share)
        torch._foreach_add_(average, change)

    def averaged_network(self) -> nn.Module:
        """Make a network with the averaged weights."""
        network = self._made()
        network.load_state_dict(self.average)
        return network.eval().requires_grad_(requires_grad=False)

    def _made(self) -> nn.Module:
        """Make the task's network on the device, on CUDA in the memory format that its convolutions like."""
        with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator; leave it as it was
            torch.manual_seed(self.settings.seed)
            network = self.task.network().to(self.device)
        if self.cuda:
            network.to(memory_format=torch.channels_last)
        return network

    def save(self, folder: Path) -> None:
        """Write the training's state."""
        moments = {k: self.optimiser.state[p] for k, p in self.parameters.items()}
        first, second = ({k: m[name] for k, m in moments.items()} for name in ("exp_avg", "exp_avg_sq"))
        save_state(folder, pack(self.parameters, self.average, first, second), self.progress, self.settings.identity)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a state that `save` wrote."""
        tensors, self.progress = load_state(folder, self.settings.identity)
        self.network.load_state_dict(unpack(tensors, "weights"))
        for k, v in unpack(tensors, "average").items():
            self.average[k].copy_(v)
        first, second = unpack(tensors, "first"), unpack(tensors, "second")
        for k, p in self.parameters.items():
            step = torch.tensor(float(self.progress.step), device=self.device if self.cuda else "cpu")
            self.optimiser.state[p] = {
                "step": step,
                "exp_avg": torch.empty_like(p).copy_(first[k]),
                "exp_avg_sq": torch.empty_like(p).copy_(second[k]),
            }


def fit(
    task: Task,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    limit: float = math.inf,
    compiled: bool = False,
    captured: bool = False,
    log: Callable[[str], None] = print,
) -> bool:
    """Train until the budget or this command's time is used; write the state, and the prior of the averaged weights.

    Parameters
    ----------
    task
        What to train on.
    out
        Folder of the state (``out/state``) and of the finished prior; one that is cut short goes to ``out/so-far``.
    device
        Where to train.
    resume
        Go on from ``out/state``.
    limit
        Seconds after which this command stops training and saves; leave a minute for the end.
    compiled
        Use torch.compile.
    captured
        Replay a step as one CUDA graph.
    log
        Takes each line of the log.

    Returns
    -------
        Whether the budget is used and the prior written.
    """
    start = time.perf_counter()
    settings, trainer = task.settings, Trainer(task, device, compiled=compiled, captured=captured)
    if resume:
        trainer.load(out / "state")
    progress, lead = trainer.progress, trainer.rank == 0
    sums = torch.zeros(2, len(BANDS) + 1, device=device)
    edges = torch.tensor(BANDS, device=device)
    marked = (time.perf_counter(), progress.images)

    def agreed(*, stop: bool) -> bool:
        """Whether any process wants to stop, so that all stop at the same step."""
        flag = torch.tensor(float(stop), device=device)
        if trainer.world > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    while used(progress, settings) < 1:
        sigma, loss = trainer.step()
        band = torch.bucketize(sigma, edges)
        sums[0].index_add_(0, band, loss)
        sums[1].index_add_(0, band, torch.ones_like(loss))
        if progress.step % settings.log_every == 0:
            if not bool(torch.isfinite(sums).all()):
                raise InputError(f"The loss is not finite at step {progress.step}; lower the learning rate.")
            now = time.perf_counter()
            if lead:
                means = " ".join(f"{v:.4f}" for v in (sums[0] / sums[1].clamp_min(1)).tolist())
                rate = (progress.images - marked[1]) / (now - marked[0])
                log(
                    f"step {progress.step} used {used(progress, settings):.3f} "
                    f"lr {learning_rate(progress, settings):.2e} "
                    f"loss by sigma {BANDS}: {means}; {rate:.0f} examples/s"
                )
            sums.zero_()
            marked = (now, progress.images)
        if progress.step % settings.validate_every == 0:
            if lead:
                log(task.validate(trainer.averaged_network()))
            trainer.pause()
            agreed(stop=False)  # the others wait for the first
        if progress.step % 10 == 0 and agreed(stop=time.perf_counter() - start > limit):
            break
    finished = used(progress, settings) >= 1
    if lead:
        trainer.save(out / "state")
        log(
            f"state saved at step {progress.step}, {progress.elapsed:.0f} s of training, "
            f"{used(progress, settings):.3f} of the budget"
        )
    if lead and not finished:
        task.export(trainer.averaged_network(), progress, out / "so-far")
    if lead and finished:
        log(task.validate(trainer.averaged_network()))
        task.export(trainer.averaged_network(), progress, out)
        log(f"prior written to {out}")
    return finished


def arguments(description: str) -> argparse.ArgumentParser:
    """Make the command line that every training shares."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("settings", type=Path, help="TOML file, e.g. priors/photos-64/train.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the finished prior")
    parser.add_argument("--seconds", type=float, help="training time in all, over all commands")
    parser.add_argument("--steps", type=int, help="bound on the steps in all")
    parser.add_argument("--batch", type=int, help="examples a step over all processes")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which this command stops and saves"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--capture", action="store_true", help="replay a step as one CUDA graph: for small networks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run(make: Callable[[torch.device], Task], given: argparse.Namespace) -> None:
    """Train as the command line says, in one process or in those of torchrun."""
    device = torch.device(given.device)
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        fit(
            make(device),
            given.out,
            device,
            resume=given.resume,
            limit=given.limit,
            compiled=given.compile,
            captured=given.capture,
            log=lambda line: print(line, flush=True),
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
