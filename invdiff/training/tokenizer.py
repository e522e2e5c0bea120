"""Training of a VQ tokenizer.

The encoder and the decoder follow the gradient of the reconstruction (absolute and squared error, and the difference
of finite differences at three scales, which needs no foreign network), passed straight through the nearest codes, and
a commitment of the encoder's vectors to their codes; the codes follow moving averages (`codebook`). The budget is time,
as in `train`: the learning rate follows the share of it that is used. A training that is cut into several commands goes
on exactly where it stood.

    python -m invdiff.training.tokenizer SETTINGS.toml --data FOLDER --out FOLDER --seconds 240
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.networks.tokenizer import Tokenizer
from invdiff.training.checkpoint import Progress, load_state, save_state
from invdiff.training.codebook import CodebookAverage, straight_through
from invdiff.training.fit import learning_rate, used
from invdiff.training.jpeg import jpeg_psnr
from invdiff.training.pictures import held_out, training_pictures
from invdiff.training.reconstruction import (
    load_tokenizer,
    measure_reconstruction,
    reconstruction_loss,
    save_tokenizer,
)
from invdiff.training.settings import read_settings_as
from invdiff.training.tokenizer_settings import TokenizerSettings


def make(settings: TokenizerSettings) -> Tokenizer:
    """Make an untrained tokenizer; its weights depend on the settings alone."""
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator; leave it as it was
        torch.manual_seed(settings.seed)
        try:
            return Tokenizer(settings.shape, **settings.tokenizer)
        except TypeError as error:
            raise InputError(f"[tokenizer] of {settings.name}: {error}.") from error


@final
class TokenizerTrainer:
    """A tokenizer, the averages of its weights and codes, the optimiser, and one step of them.

    Parameters
    ----------
    settings
        What to train.
    data
        Folder of the training pictures.
    device
        Where to train; on CUDA in bfloat16 autocast and channels-last.
    compiled
        Whether encoder and decoder go through torch.compile.
    """

    def __init__(
        self, settings: TokenizerSettings, data: Path, device: torch.device, *, compiled: bool = False
    ) -> None:
        self.settings, self.device, self.cuda = settings, device, device.type == "cuda"
        self.tokenizer = self._placed(make(settings))
        self.parameters = dict(self.tokenizer.named_parameters())
        self.average = {k: v.detach().clone() for k, v in self.tokenizer.state_dict().items()}
        self.codes = CodebookAverage(self.tokenizer.codebook, settings.code_decay)
        self.optimiser = torch.optim.Adam(
            self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99), fused=self.cuda
        )
        self.progress = Progress()
        self.pictures = training_pictures(settings.shape, settings.mixture, data, device)
        self.features: Callable[[Tensor], Tensor] = self.tokenizer.features
        self.detokenise: Callable[[Tensor], Tensor] = self.tokenizer.detokeniser
        if compiled:
            self.features, self.detokenise = torch.compile(self.features), torch.compile(self.detokenise)
        self.generator = torch.Generator(device=device)
        self._since: float | None = None  # the first step compiles: the clock starts after it

    def step(self) -> Tensor:
        """Take one step; returns the loss and its squared and commitment errors, shape (3,)."""
        s = self.settings
        # The stream depends on the step, so that a resumed training sees the pictures it would have seen.
        self.generator.manual_seed(s.seed * 1_000_003 + self.progress.step)
        x = self.pictures.batch(s.batch, self.generator)
        if self.cuda:
            x = x.to(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            z = self.features(x).float()
            flat = z.detach().flatten(0, 1)
            if self.progress.step == 0:
                self.codes.start(flat, self.generator)
            tokens = self.tokenizer.nearest(z)
            e = self.tokenizer.codebook[tokens]
            loss, mse = reconstruction_loss(
                self.detokenise(straight_through(z, e)),
                x,
                absolute=s.absolute,
                squared=s.squared,
                gradients=s.gradients,
            )
            commitment = (z - e).square().mean()
            loss = loss + s.commitment * commitment
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.progress, s)
        self.optimiser.step()
        self.codes.update(flat, tokens.flatten(), self.generator, revive=used(self.progress, s) < s.revive_until)
        self._update_average()
        self.progress.step += 1
        self.progress.images += s.batch
        if self._since is None or self.progress.step % 10 == 0:
            self._tick()
        return torch.stack((loss.detach(), mse, commitment.detach()))

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = (1 - 1 / (self.progress.step + 1)) ** (self.settings.ema_exponent + 1)
        torch._foreach_lerp_(list(self.average.values()), list(self.tokenizer.state_dict().values()), 1 - decay)

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

    def _placed(self, tokenizer: Tokenizer) -> Tokenizer:
        tokenizer.to(self.device)
        return tokenizer.to(memory_format=torch.channels_last) if self.cuda else tokenizer

    def averaged(self) -> Tokenizer:
        """Make a tokenizer with the averaged weights and codes."""
        tokenizer = make(self.settings)
        tokenizer.load_state_dict(self.average)
        return self._placed(tokenizer).eval().requires_grad_(requires_grad=False)

    def _tensors(self) -> dict[str, Tensor]:
        """All that a training goes on from, by name; the tensors themselves."""
        moments = {
            f"{name}.{k}": self.optimiser.state[p][name]
            for k, p in self.parameters.items()
            for name in ("exp_avg", "exp_avg_sq")
        }
        weights = {f"weights.{k}": v for k, v in self.tokenizer.state_dict().items()}
        average = {f"average.{k}": v for k, v in self.average.items()}
        return {**weights, **average, **moments, "codes.counts": self.codes.counts, "codes.sums": self.codes.sums}

    def save(self, folder: Path) -> None:
        """Write the training's state, in float32: it is small, and going on is then exact."""
        save_state(folder, self._tensors(), self.progress, self.settings.identity)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a state that `save` wrote."""
        tensors, self.progress = load_state(folder, self.settings.identity)
        for p in self.parameters.values():
            step = torch.tensor(float(self.progress.step), device=self.device if self.cuda else "cpu")
            moments = {"exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
            self.optimiser.state[p] = {"step": step, **moments}
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])


def validate(tokenizer: Tokenizer, settings: TokenizerSettings, data: Path, count: int) -> dict[str, dict[str, float]]:
    """Figures of `measure_reconstruction` on the first validation pictures of each data set."""
    return {
        name: measure_reconstruction(tokenizer, held_out(name, data, "validation", settings.shape[1])[:count])
        for name in settings.mixture
    }


def _finish(trainer: TokenizerTrainer, data: Path, out: Path) -> dict[str, dict[str, float]]:
    """Write the tokenizer, and its figures as they are once its weights are rounded."""
    s, device = trainer.settings, trainer.device
    tokenizer, arguments = trainer.averaged(), {"shape": list(s.shape), **s.tokenizer}
    about: dict[str, Any] = {
        "settings": asdict(s),
        "steps": trainer.progress.step,
        "images": trainer.progress.images,
        "seconds": round(trainer.progress.elapsed, 1),
        "device": torch.cuda.get_device_name(device) if trainer.cuda else "cpu",
        "torch": torch.__version__,
        "parameters": sum(v.numel() for v in tokenizer.state_dict().values()),
        "bits": tokenizer.length * math.log2(tokenizer.vocabulary_size),
    }
    save_tokenizer(out, tokenizer, arguments, about)
    rounded = load_tokenizer(out).to(device)
    figures = validate(rounded, s, data, count=500)
    for name, found in figures.items():
        pictures = held_out(name, data, "validation", s.shape[1])[:500]
        found |= jpeg_psnr(pictures, about["bits"])
    save_tokenizer(out, rounded, arguments, {**about, "validation": figures})
    return figures


def train(
    settings: TokenizerSettings,
    data: Path,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    limit: float = math.inf,
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> bool:
    """Train until the budget or this command's time is used; write the state and, at the end, the tokenizer.

    Parameters
    ----------
    settings
        What to train.
    data, out
        Folder of the pictures; folder of the state (``out/state``) and of the finished tokenizer.
    device
        Where to train.
    resume
        Go on from ``out/state``.
    limit
        Seconds after which this command stops training and saves.
    compiled
        Use torch.compile.
    log
        Takes each line of the log.

    Returns
    -------
        Whether the budget is used and the tokenizer written.

    Raises
    ------
    InputError
        If the loss is not finite.
    """
    start = time.perf_counter()
    trainer = TokenizerTrainer(settings, data, device, compiled=compiled)
    if resume:
        trainer.load(out / "state")
    progress, sums = trainer.progress, torch.zeros(3, device=device)
    marked = (time.perf_counter(), progress.images)
    while used(progress, settings) < 1:
        sums += trainer.step()
        if progress.step % settings.log_every == 0:
            loss, mse, commitment = (sums / settings.log_every).tolist()
            if not math.isfinite(loss):
                raise InputError(f"The loss is not finite at step {progress.step}; lower the learning rate.")
            now = time.perf_counter()
            log(
                f"step {progress.step} used {used(progress, settings):.3f} lr {learning_rate(progress, settings):.2e} "
                f"loss {loss:.4f} mse {mse:.5f} ({-10 * math.log10(max(mse, 1e-12)):.2f} dB) commitment "
                f"{commitment:.4f}; {(progress.images - marked[1]) / (now - marked[0]):.0f} images/s"
            )
            sums.zero_()
            marked = (now, progress.images)
        if progress.step % settings.validate_every == 0:
            log(f"validation: {validate(trainer.averaged(), settings, data, 100)}")
            trainer.pause()
        if progress.step % 10 == 0 and time.perf_counter() - start > limit:
            break
    finished = used(progress, settings) >= 1
    trainer.save(out / "state")
    log(f"state saved at step {progress.step}, {progress.elapsed:.0f} s of training")
    if finished:
        log(f"tokenizer written to {out}; validation: {_finish(trainer, data, out)}")
    return finished


def main(arguments: list[str] | None = None) -> int:
    """Command line of a tokenizer's training."""
    parser = argparse.ArgumentParser(description="Train a VQ tokenizer of pictures.")
    parser.add_argument("settings", type=Path, help="TOML file, e.g. priors/photos-64-vq/tokenizer.toml")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("INVDIFF_DATA"), help="folder of the pictures (or INVDIFF_DATA)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the finished tokenizer")
    parser.add_argument("--seconds", type=float, help="training time in all, over all commands")
    parser.add_argument("--steps", type=int, help="bound on the steps in all")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which this command stops and saves"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    if given.data is None:
        parser.error("give the folder of the pictures with --data or INVDIFF_DATA")
    settings = read_settings_as(
        TokenizerSettings, given.settings, seconds=given.seconds, steps=given.steps, batch=given.batch
    )
    train(
        settings,
        Path(given.data),
        given.out,
        torch.device(given.device),
        resume=given.resume,
        limit=given.limit,
        compiled=given.compile,
        log=lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
