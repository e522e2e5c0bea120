"""The command ``solve``: everything is checked before any work, and files are written whole or not at all."""

import tempfile
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from invdiff.driver import Sampler
from invdiff.errors import CatalogueError, InputError
from invdiff.parallel import Shard
from invdiff.posterior import PRECISIONS, Posterior
from invdiff.solution import Solution
from invdiff.solve import check_able, choose_sampler, choose_variant, sampler_by_name, solve

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for; see the options of ``invdiff solve``."""

    problem: str
    image: Path | None
    simulate: bool
    index: int
    prior: str
    sampler: str | None
    steps: int | None
    draws: int
    noise: float | None
    seed: int
    device: str | None
    out: Path
    picture: Path | None
    settings: tuple[str, ...]
    resize: int | None
    yes: bool
    max_seconds: float | None
    max_evaluations: float | None
    checkpoint: Path | None
    precision: str


def run_solve(request: Request) -> None:
    """Solve a problem as the command line asked; with the processes that torchrun started, where there are several.

    Then each has an even share of the draws and a device of its own, and the first alone prints and writes.

    Raises
    ------
    InvdiffError
        If the input is bad, before any work; if the run fails, a SamplingError.
    KeyboardInterrupt
        After Ctrl-C, with ``kept`` saying what was kept.
    """
    from invdiff.cli_processes import processes

    with processes(request.device) as (shard, device), shard.together():
        _run(request, shard, device)


def _run(request: Request, shard: Shard, device: torch.device) -> None:
    from rich.console import Console

    from invdiff.cli_cost import LONG, least_seconds, measure, micro_batch, words
    from invdiff.cli_picture import decoded, off_grid, on_grid, padded, picture_problem
    from invdiff.cli_settings import apply, parse
    from invdiff.priors.diffusion import NetworkPrior
    from invdiff.priors.loading import load_prior
    from invdiff.priors.masked_network import MaskedNetworkPrior

    lead, share = shard.rank == 0, shard.share(request.draws) if request.draws > 0 else 0
    console = Console(highlight=False, soft_wrap=True, quiet=not lead)
    settings = parse(request.settings)
    _check_numbers(request)
    if lead:
        check_writable(request.out)
    picture = request.picture or request.out.with_suffix(".png")
    for path in filter(None, (picture if lead else None, request.checkpoint)):
        check_writable(path)
    sampler = _named_sampler(request, settings["sampler"])
    prior = load_prior(request.prior)
    if not isinstance(prior, NetworkPrior | MaskedNetworkPrior):
        raise InputError(f"The prior of {request.prior} is one of tokens, not of pictures; use it in Python.")
    grey = not isinstance(prior, NetworkPrior) and prior.tokenizer is not None and prior.detokeniser.out_shape[0] == 1
    problem, lines = picture_problem(request, settings["operator"], settings["noise"], grey=grey)
    shape = tuple(problem.event[0].shape)
    if isinstance(prior, NetworkPrior):
        grid = padded(shape, prior)
        cost = (sampler or sampler_by_name("pigdm", **_steps(request))).cost()
        # The first process's clock is everyone's, for all have to refuse or none.
        seconds = shard.agree(least_seconds(prior, grid, cost, share, device))[0][0]
        _refuse_long(seconds, "at least ", request, LONG)
        prior = prior.at(grid)
    else:
        grid = decoded(shape, prior)
    task = on_grid(problem, grid)
    batch = micro_batch(grid, share, device)
    posterior = Posterior(task, prior, device=device, micro_batch=batch, precision=request.precision)
    reason = "given"
    if sampler is None:
        sampler, reason = choose_sampler(posterior, request.draws)
        sampler = apply(sampler, settings["sampler"] | _steps(request))
    elif not any(key.startswith("covariance") for key in settings["sampler"]):
        sampler = apply(choose_variant(type(sampler), posterior), settings["sampler"] | _steps(request))
    check_able(sampler, posterior)

    pad = "" if grid == shape else f", on {_size(grid)} (padded for the network, cropped back)"
    rows = [
        *lines,
        ("prior", f"{prior.name}{pad}"),
        ("sampler", describe(sampler) + ("" if reason == "given" else f"; {reason}")),
    ]
    print_table(console, rows)
    estimate = measure(posterior, sampler, share)
    where = str(device) if shard.world == 1 else f"{shard.world} processes, each with its own {device.type}"
    print_table(console, [("cost", f"{request.draws} draws, {estimate}, on {where}")])
    seconds = shard.agree(estimate.seconds)[0][0]
    _refuse_long(seconds, "about ", request, LONG)
    if request.max_seconds is not None and seconds > request.max_seconds:
        console.print(f"[yellow]This may not end within --max-seconds {words(request.max_seconds)}.[/]")
    try:
        result: Solution = solve(
            task,
            prior,
            sampler,
            draws=request.draws,
            seed=request.seed,
            device=device,
            micro_batch=batch,
            precision=request.precision,
            max_evaluations=request.max_evaluations,
            max_seconds=request.max_seconds,
            progress=problem.name,
            checkpoint=request.checkpoint,
            distributed=shard.world > 1,
        )
        solution = off_grid(result, problem).because(reason)
        if lead:
            write(solution, request.out, picture)
    except KeyboardInterrupt as interrupt:
        interrupt.kept = kept(request.checkpoint and shard.own(request.checkpoint))  # type: ignore[attr-defined]  # the one who reports it looks for it
        raise
    if not lead:
        return
    report(console, solution)
    console.print(f"Wrote [bold]{request.out}[/] and [bold]{picture}[/].")


def _check_numbers(request: Request) -> None:
    if request.draws < 1:
        raise InputError(f"--draws must be at least 1, got {request.draws}.")
    if request.noise is not None and not 0 < request.noise < float("inf"):
        raise InputError(
            f"--noise must be positive and finite, got {request.noise:g}. For a noiseless picture give a small value, "
            "e.g. 1e-3."
        )
    if request.resize is not None and request.resize < 8:
        raise InputError(f"--resize takes a long side of at least 8 pixels, got {request.resize}.")
    if request.index < 0:
        raise InputError(f"--index counts from 0, got {request.index}.")
    for name, bound in (("--max-seconds", request.max_seconds), ("--max-evaluations", request.max_evaluations)):
        if bound is not None and not bound > 0:
            raise InputError(f"{name} must be positive, got {bound:g}.")
    if request.precision not in PRECISIONS:
        raise CatalogueError.unknown("precision", request.precision, PRECISIONS)
    if request.out.suffix.lower() in {".png", ".jpg", ".jpeg"}:
        raise InputError(f"--out is the NetCDF file of the draws, got {request.out}; name the picture with --picture.")
    if request.picture is not None and request.picture.suffix.lower() != ".png":
        raise InputError(f"--picture writes PNG, got {request.picture}; give it the suffix .png.")


def _steps(request: Request) -> dict[str, Any]:
    return {} if request.steps is None else {"steps": request.steps}


def _named_sampler(request: Request, settings: dict[str, Any]) -> Sampler | None:
    from invdiff.cli_settings import apply

    if request.steps is not None and "steps" in settings:
        raise InputError("--steps and --set sampler.steps say the same thing; give one of them.")
    if request.sampler is None:
        return None
    sampler: Sampler = apply(sampler_by_name(request.sampler), settings | _steps(request))
    return sampler


def check_writable(path: Path) -> None:
    """Raise InputError unless a file can be written at a path; nothing is left behind."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise InputError(f"Cannot write {path}: there is no folder {path.parent}; make it first.")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"\0")
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error


def kept(checkpoint: Path | None) -> str:
    """Say what an interrupted run leaves."""
    if checkpoint is None:
        return "nothing was kept (with --checkpoint FILE the run could go on from here)"
    if checkpoint.exists():
        return f"the last complete step is kept in {checkpoint}, and the same command goes on from there"
    return "nothing was kept, for no step was complete"


def _refuse_long(seconds: float, bound: str, request: Request, limit: float) -> None:
    from invdiff.cli_cost import words

    if seconds > limit and not request.yes:
        smaller = "shrink the picture with --resize LONGSIDE, " if request.simulate else ""
        raise InputError(
            f"This run would take {bound}{words(seconds)} on this device; {smaller}take fewer --draws or --steps, or "
            "start it all the same with --yes."
        )


def write(solution: Solution, out: Path, picture: Path) -> None:
    """Write draws and overview; when the second fails the first is taken back, unless it was there before."""
    from invdiff.solution_plot import plot_solution, save_picture

    figure = plot_solution(solution)
    fresh = not out.exists()
    solution.save(out)
    try:
        save_picture(figure, picture)
    except BaseException:
        if fresh:
            out.unlink(missing_ok=True)
        raise


def report(console: "Console", solution: Solution) -> None:
    """Print scores where the truth is known, and the residuals' check."""
    about = solution.about
    rows = [("took", f"{about['seconds']:.1f} s, {about['evaluations_per_draw']:.4g} network evaluations a draw")]
    if solution.reference is not None:
        rows += scores(solution)
    found = solution.check()
    meaning = {
        "consistent": "the draws explain the measurement as well as the noise allows",
        "misfit": "the draws miss the measurement: the noise is larger than stated, the operator another, or the run "
        "too short",
        "overfit": "the draws fit the measurement closer than its noise: the noise is smaller than stated",
    }[str(found["verdict"])]
    ratio = float(found["reduced_chi_square"])
    rows.append(("check", f"{found['verdict']}, reduced chi-square {ratio:.3f}; {meaning}"))
    print_table(console, rows)


def scores(solution: Solution) -> list[tuple[str, str]]:
    """Scores against the truth, in words."""
    found = solution.score()
    rows = [
        ("PSNR", f"{found['psnr_mean']:.2f} dB of the mean, {found['psnr_draw']:.2f} dB of a draw (higher is better)"),
        ("CRPS", f"{found['crps']:.4f} (lower is better)"),
    ]
    if "ssim_mean" in found:
        rows.insert(1, ("SSIM", f"{found['ssim_mean']:.3f} of the mean"))
    if found["coverage_90"] == found["coverage_90"]:
        rows.append(("coverage", f"{100 * found['coverage_90']:.1f} % of pixels lie in their 90 % interval"))
    else:
        rows.append(("coverage", "needs at least 19 draws"))
    return rows


def describe(sampler: Sampler) -> str:
    """Say a sampler's name and settings, strategies by their names."""
    values = ((f.name, getattr(sampler, f.name)) for f in fields(sampler))  # type: ignore[arg-type]  # all are dataclasses
    plain = (f"{k} {type(v).__name__ if is_dataclass(v) else v}" for k, v in values if type(v).__name__ != "Levels")
    return f"{type(sampler).__name__} ({', '.join(plain)})"


def print_table(console: "Console", rows: list[tuple[str, str]]) -> None:
    """Print rows of a name and a text."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", min_width=9)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    console.print(table)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]} x {shape[-2]}"
