r"""Train a masked prior of tokens, by the any-order loss.

    loss = E_k (1 / k) sum_masked -log p(x_i | tokens that are not masked),   k uniform on 1, ..., L

L times it bounds -log p (Ou et al. 2024, arXiv 2406.03736, the k-form of the denoising cross-entropy). The numbers of
masked tokens are stratified over a batch, which lowers the loss's variance. The budget is time, as in `train`. Small
data sets are learnt by heart in minutes: the averaged weights with the best held-out bound are the ones that are kept.

    python -m invdiff.training.masked SETTINGS.toml --data FOLDER --out FOLDER [--tokenizer FOLDER] --seconds 300
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import InputError
from invdiff.networks.masked_transformer import MaskedTransformer
from invdiff.priors.masked_loading import MaskedCard, load_masked_prior, read_masked_card, save_masked_prior
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.training.checkpoint import Progress, load_state, save_state
from invdiff.training.fit import learning_rate, used
from invdiff.training.jpeg import jpeg_psnr
from invdiff.training.masked_settings import MaskedSettings
from invdiff.training.pictures import held_out
from invdiff.training.reconstruction import load_tokenizer, measure_reconstruction
from invdiff.training.sequences import training_sequences
from invdiff.training.settings import read_settings_as

_NATS = math.log(2.0)


def draw_masks(n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks (n, length) with k masked places each, one k from each n-th of 1, ..., length; and k (n,)."""
    device = generator.device
    u = (torch.randperm(n, generator=generator, device=device) + torch.rand(n, generator=generator, device=device)) / n
    k = (u * length).long().clamp_max(length - 1) + 1
    order = torch.rand(n, length, generator=generator, device=device).argsort(-1).argsort(-1)
    return order < k[:, None], k


def any_order_loss(network: Callable[[Tensor], Tensor], tokens: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """Mean cross-entropy of the masked tokens of each sequence (n,), nats a token."""
    V: int = network.vocabulary_size  # type: ignore[attr-defined]
    logits = network(torch.where(masked, V, tokens)).float()
    each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return torch.where(masked, each, 0.0).sum(1) / k


@final
class MaskedTrainer:
    """A transformer, the average of its weights, the optimiser, and one step of them.

    Parameters
    ----------
    settings
        What to train.
    data
        Folder of the training data.
    tokenizer
        Folder of the pictures' tokenizer; None for sequences of symbols.
    device
        Where to train; on CUDA in bfloat16 autocast.
    compiled
        Whether the network goes through torch.compile.
    """

    def __init__(
        self,
        settings: MaskedSettings,
        data: Path,
        tokenizer: Path | None,
        device: torch.device,
        *,
        compiled: bool = False,
    ) -> None:
        self.settings, self.device, self.cuda = settings, device, device.type == "cuda"
        self.data, self.tokenizer = data, None if tokenizer is None else load_tokenizer(tokenizer).to(device)
        self.about = {} if tokenizer is None else json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        self.sequences = training_sequences(settings, data, self.tokenizer, device)
        self.network = self._made()
        self.parameters = dict(self.network.named_parameters())
        self.average = {k: v.detach().clone() for k, v in self.parameters.items()}
        self.best = {k: v.clone() for k, v in self.average.items()}
        self._record = torch.tensor([math.inf, 0.0], dtype=torch.float64)
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        rest = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=self.cuda)
        self.progress = Progress()
        self.forward: Any = torch.compile(self.network) if compiled else self.network
        self.generator = torch.Generator(device=device)
        self._since: float | None = None  # the first step compiles: the clock starts after it

    @property
    def network_settings(self) -> dict[str, Any]:
        """What makes the network."""
        t = self.tokenizer
        axes, V = (self.settings.shape, len(self.settings.alphabet)) if t is None else (t.grid, t.vocabulary_size)
        return {"axes": list(axes), "vocabulary_size": V, **self.settings.network}

    def _made(self) -> MaskedTransformer:
        with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator; leave it as it was
            torch.manual_seed(self.settings.seed)
            try:
                return MaskedTransformer(**self.network_settings).to(self.device)
            except TypeError as error:
                raise InputError(f"[network] of {self.settings.name}: {error}.") from error

    def step(self) -> Tensor:
        """Take one step; returns the mean loss, nats a token."""
        s = self.settings
        # The stream depends on the step, so that a resumed training sees the sequences it would have seen.
        stream = s.seed * 1_000_003 + self.progress.step
        self.generator.manual_seed(stream)
        tokens = self.sequences.batch(s.batch, self.generator)
        masked, k = draw_masks(s.batch, tokens.shape[1], self.generator)
        with self._dropout_stream(stream):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
                loss = any_order_loss(self.forward, tokens, masked, k).mean()
            self.optimiser.zero_grad()
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.progress, s)
        self.optimiser.step()
        with torch.no_grad():
            decay = (1 - 1 / (self.progress.step + 1)) ** (s.ema_exponent + 1)
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        self.progress.step += 1
        self.progress.images += s.batch
        if self._since is None or self.progress.step % 10 == 0:
            self._tick()
        return loss.detach()

    @contextmanager
    def _dropout_stream(self, stream: int) -> Iterator[None]:
        """Give dropout, which knows the global generators only, a stream of its own; they are left as they were."""
        with torch.random.fork_rng(devices=[self.device] if self.cuda else []):
            torch.manual_seed(stream + 2**40)  # not the masks' own numbers
            yield

    def _tick(self) -> None:
        """Add the time since the last tick; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.progress.elapsed += 0.0 if self._since is None else now - self._since
        self._since = now

    def pause(self) -> None:
        """Stop the clock until the next step is done: what lies between, and a compilation, is not counted."""
        self._since = None

    @property
    def record(self) -> tuple[float, int]:
        """Held-out bound of the best weights, bits a token, and their step; (infinity, 0) before a validation."""
        value, step = self._record.tolist()
        return value, int(step)

    def validate(self, held: Tensor) -> float:
        """Held-out bound of the averaged weights, bits a token; they are kept if they are the best."""
        found = bound(self.prior(self.average), held, samples=16)["bits_per_token"]
        if found < self.record[0]:
            self._record = torch.tensor([found, float(self.progress.step)], dtype=torch.float64)
            self.best = {k: v.clone() for k, v in self.average.items()}
        return found

    def prior(self, weights: dict[str, Tensor]) -> MaskedNetworkPrior:
        """Make a prior with some weights: the averaged ones, or the best."""
        network = self._made()
        network.load_state_dict(weights)
        name, alphabet = self.settings.name, self.settings.alphabet
        return MaskedNetworkPrior(network, self.tokenizer, name=name, alphabet=alphabet).to(self.device).eval_only()

    def _tensors(self) -> dict[str, Tensor]:
        """All that a training goes on from, by name; the tensors themselves."""
        moments = {
            f"{name}.{k}": self.optimiser.state[p][name]
            for k, p in self.parameters.items()
            for name in ("exp_avg", "exp_avg_sq")
        }
        weights = {f"weights.{k}": v for k, v in self.parameters.items()}
        kept = {f"{part}.{k}": v for part in ("average", "best") for k, v in getattr(self, part).items()}
        return {**weights, **kept, **moments, "record": self._record}

    def save(self, folder: Path) -> None:
        """Write the training's state, in float32: it is small, and going on is then exact."""
        save_state(folder, self._tensors(), self.progress, self.settings.identity)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a state that `save` wrote."""
        tensors, self.progress = load_state(folder, self.settings.identity)
        for p in self.parameters.values():
            step = torch.tensor(float(self.progress.step), device=self.device if self.cuda else "cpu")
            self.optimiser.state[p] = {"step": step, "exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])


def bound(prior: MaskedNetworkPrior, tokens: Tensor, *, samples: int) -> dict[str, float]:
    """Held-out bound in bits a token, with its standard error over sequences."""
    found = -prior.log_prob_bound(tokens, samples=samples)[0] / (_NATS * prior.length)
    return {
        "sequences": len(tokens),
        "bits_per_token": float(found.mean()),
        "bits_per_token_se": float(found.std() / len(found) ** 0.5),
    }


def export(trainer: MaskedTrainer, out: Path) -> dict[str, Any]:
    """Write the best weights' card, weights and report.json; returns the report, measured on the rounded weights."""
    s, progress, (_, best), prior = trainer.settings, trainer.progress, trainer.record, trainer.prior(trainer.best)
    card = MaskedCard(
        name=s.name,
        version=s.version,
        description=s.description,
        licence=s.licence,
        network={k: v for k, v in trainer.network_settings.items() if k != "dropout"},
        tokenizer=trainer.about.get("tokenizer", {}),
        alphabet=s.alphabet,
        training={
            "data": list(s.mixture),
            "steps": best,
            "sequences": best * s.batch,
            "seconds": round(progress.elapsed * best / progress.step, 1),
            "device": torch.cuda.get_device_name(trainer.device) if trainer.cuda else "cpu",
            "torch": torch.__version__,
        },
    )
    path = save_masked_prior(out, prior, card)
    rounded = load_masked_prior(out, read_masked_card(path)).to(trainer.device)
    report: dict[str, Any] = {
        "parameters": sum(p.numel() for p in prior.network.parameters()),
        "bytes": (out / "weights.safetensors").stat().st_size,
        "bound": {split: bound(rounded, trainer.sequences.held_out(split, 1000), samples=64) for split in SPLITS},
    }
    tokens_a_dimension = prior.length / math.prod(s.shape)
    report["bits_per_dimension"] = report["bound"]["test"]["bits_per_token"] * tokens_a_dimension
    if rounded.tokenizer is not None:
        report["tokenizer"] = {k: v for k, v in trainer.about.items() if k not in ("tokenizer", "settings", "sha256")}
        report["tokenizer"]["test"] = {}
        for name in s.mixture:
            pictures = held_out(name, trainer.data, "test", s.shape[1])[:500]
            figures = measure_reconstruction(rounded.tokenizer, pictures)
            report["tokenizer"]["test"][name] = figures | jpeg_psnr(pictures, trainer.about["bits"])
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


SPLITS = ("validation", "test")


def train(
    settings: MaskedSettings,
    data: Path,
    out: Path,
    device: torch.device,
    *,
    tokenizer: Path | None = None,
    resume: bool = False,
    limit: float = math.inf,
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> bool:
    """Train until the budget or this command's time is used; write the state and, at the end, the prior.

    Parameters
    ----------
    settings
        What to train.
    data, out
        Folder of the data; folder of the state (``out/state``) and of the finished prior.
    device
        Where to train.
    tokenizer
        Folder of the pictures' tokenizer; None for sequences of symbols.
    resume
        Go on from ``out/state``, the best weights so far among it.
    limit
        Seconds after which this command stops training and saves.
    compiled
        Use torch.compile.
    log
        Takes each line of the log.

    Returns
    -------
        Whether the budget is used and the prior written.

    Raises
    ------
    InputError
        If the loss is not finite.
    """
    start = time.perf_counter()
    trainer = MaskedTrainer(settings, data, tokenizer, device, compiled=compiled)
    if resume:
        trainer.load(out / "state")
    progress, total = trainer.progress, torch.zeros((), device=device)
    marked, held = (time.perf_counter(), progress.images), trainer.sequences.held_out("validation", 500)

    def validate() -> None:
        found, (value, step) = trainer.validate(held), trainer.record
        log(f"step {progress.step}: held-out bound {found:.4f} bits a token; best {value:.4f} at step {step}")
        trainer.pause()

    while used(progress, settings) < 1:
        total += trainer.step()
        if progress.step % settings.log_every == 0:
            loss = float(total) / settings.log_every
            if not math.isfinite(loss):
                raise InputError(f"The loss is not finite at step {progress.step}; lower the learning rate.")
            now = time.perf_counter()
            log(
                f"step {progress.step} used {used(progress, settings):.3f} lr {learning_rate(progress, settings):.2e} "
                f"loss {loss / _NATS:.4f} bits a token; "
                f"{(progress.images - marked[1]) / (now - marked[0]):.0f} a second"
            )
            total.zero_()
            marked = (now, progress.images)
        if progress.step % settings.validate_every == 0:
            validate()
        if progress.step % 10 == 0 and time.perf_counter() - start > limit:
            break
    finished = used(progress, settings) >= 1
    if finished:
        validate()
    trainer.save(out / "state")
    log(f"state saved at step {progress.step}, {progress.elapsed:.0f} s of training")
    if finished:
        log(f"prior written to {out}; {export(trainer, out)}")
    return finished


def main(arguments: list[str] | None = None) -> int:
    """Command line of a masked prior's training."""
    parser = argparse.ArgumentParser(description="Train a masked prior of tokens.")
    parser.add_argument("settings", type=Path, help="TOML file, e.g. priors/promoters-251/train.toml")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("INVDIFF_DATA"), help="folder of the data (or INVDIFF_DATA)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the finished prior")
    parser.add_argument("--tokenizer", type=Path, help="folder of what invdiff.training.tokenizer wrote; for pictures")
    parser.add_argument("--seconds", type=float, help="training time in all, over all commands")
    parser.add_argument("--steps", type=int, help="bound on the steps in all")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which this command stops and saves"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    if given.data is None:
        parser.error("give the folder of the data with --data or INVDIFF_DATA")
    settings = read_settings_as(
        MaskedSettings, given.settings, seconds=given.seconds, steps=given.steps, batch=given.batch
    )
    train(
        settings,
        Path(given.data),
        given.out,
        torch.device(given.device),
        tokenizer=given.tokenizer,
        resume=given.resume,
        limit=given.limit,
        compiled=given.compile,
        log=lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
