"""The command line: a thin layer over `invdiff.solve`, for people.

Errors are one message on standard error: status 2 for bad input, 1 for a failed run, 130 after Ctrl-C.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="invdiff",
    help="Solve inverse problems with diffusion priors: posterior draws, and how sure they are.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; the best there is if left out.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws and of a simulated measurement's noise.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the draws.")] = Path(),
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Restore a blurred, noisy portrait in under a minute, and see how sure the restoration is."""
    from invdiff.cli_demo import run_demo

    run_demo(out, device=device, seed=seed)


@app.command()
def solve(
    problem: Annotated[str, typer.Argument(help="A problem of `invdiff list problems`, or a path to a card.")],
    image: Annotated[Path | None, typer.Option(help="Your picture; the problem's own data set if left out.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Degrade the picture first; else the picture is the measurement.")
    ] = False,
    index: Annotated[int, typer.Option(help="Which picture of the data set; also seeds kernels and masks.")] = 0,
    prior: Annotated[
        str, typer.Option(help="A prior of `invdiff list priors`, or a path to its folder.")
    ] = "photos-64",
    sampler: Annotated[
        str | None, typer.Option(help="A sampler of `invdiff list samplers`; chosen for the problem if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Noise levels; the same as --set sampler.steps=N.")] = None,
    draws: Annotated[int, typer.Option(help="Draws from the posterior; 90 % intervals need 19.")] = 20,
    noise: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the noise, pixel values in 0 to 1; the problem's if left out."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="NetCDF file for the draws.")] = Path("result.nc"),
    picture: Annotated[Path | None, typer.Option(help="PNG file for the overview; beside --out if left out.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="E.g. sampler.steps=50 or operator.kernel=kernel.png; repeatable."
        ),
    ] = None,
    resize: Annotated[int | None, typer.Option(help="Shrink the picture to this long side first, in pixels.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start even if it takes over 10 minutes.")] = False,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after this wall time.")] = None,
    max_evaluations: Annotated[
        float | None, typer.Option(help="Stop after this many network evaluations a draw.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Keep the state here; the same command then goes on.")] = None,
    precision: Annotated[str, typer.Option(help="Of the network: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Restore a picture: draws from the posterior of a problem under a prior.

    On several GPUs: torchrun --nproc-per-node=N -m invdiff solve ...; N divides --draws.
    """
    from invdiff.cli_solve import Request, run_solve

    run_solve(
        Request(
            problem=problem,
            image=image,
            simulate=simulate,
            index=index,
            prior=prior,
            sampler=sampler,
            steps=steps,
            draws=draws,
            noise=noise,
            seed=seed,
            device=device,
            out=out,
            picture=picture,
            settings=tuple(setting or ()),
            resize=resize,
            yes=yes,
            max_seconds=max_seconds,
            max_evaluations=max_evaluations,
            checkpoint=checkpoint,
            precision=precision,
        )
    )


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="problems, priors, data or samplers; all of them if left out.")] = "all",
) -> None:
    """List what there is: problems, priors, data sets and samplers."""
    from invdiff.cli_catalogue import run_list

    run_list(what)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a problem, prior, data set or sampler, or a path to a card.")],
) -> None:
    """Show a card, or a sampler's settings and what they mean."""
    from invdiff.cli_catalogue import run_show

    run_show(name)


@app.command()
def train(
    settings: Annotated[Path, typer.Argument(help="TOML file of settings, e.g. priors/photos-64/train.toml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the state and the finished prior; NAME-trained if left out.")
    ] = None,
    data: Annotated[Path | None, typer.Option(envvar="INVDIFF_DATA", help="Folder of the pictures.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Training time in all; the settings' if left out.")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in --out.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
) -> None:
    """Train a diffusion prior of pictures."""
    import torch

    from invdiff.errors import InputError
    from invdiff.solve import as_device
    from invdiff.training.settings import read_settings
    from invdiff.training.train import train as run

    if data is None or not data.is_dir():
        raise InputError(f"Training needs the folder of the pictures, with --data or INVDIFF_DATA; got {data}.")
    place = as_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = read_settings(settings, seconds=seconds)
    folder = out or Path(f"{chosen.name}-trained")
    if (folder / "state" / "state.json").exists() and not resume:
        raise InputError(
            f"{folder} holds the state of a training; go on with --resume, or name another folder with --out."
        )
    run(chosen, data, folder, place, resume=resume, compiled=compiled, log=typer.echo)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the entry point of ``invdiff``.

    Parameters
    ----------
    arguments
        Words after the command's name; those of the process if None.

    Returns
    -------
        Exit status: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C.
    """
    from invdiff.errors import InvdiffError, SamplingError

    command = typer.main.get_command(app)
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        # Not app(): typer would turn errors into boxes, and Ctrl-C into silence.
        with command.make_context("invdiff", words) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort) as interrupt:
        return _say(f"Interrupted; {getattr(interrupt, 'kept', 'nothing was kept')}.", 130, interrupt)
    except SamplingError as error:
        return _say(str(error), 1, error)
    except InvdiffError as error:
        return _say(str(error), 2, error)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last resort: people are told, once
        if hasattr(error, "format_message"):
            return _say(_usage(error), 2, error)
        if os.environ.get("INVDIFF_TRACEBACK"):
            raise
        return _say(_unexpected(error), 1, error)
    return 0


def _say(message: str, status: int, error: BaseException) -> int:
    from invdiff.peers import is_told

    if is_told(error) and os.environ.get("RANK", "0") != "0":
        return status  # of the processes of one run the first tells it
    print(f"invdiff: {message}", file=sys.stderr)  # noqa: T201 the one place that speaks of errors
    return status


def _usage(error: Any) -> str:
    message = error.format_message().rstrip(" .")
    context = getattr(error, "ctx", None)
    return f"{message}. See `{context.command_path} --help`." if context is not None else f"{message}."


def _unexpected(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "out of memory" in text or "not enough memory" in text:
        return f"There is not enough memory for this run; take fewer draws or a smaller picture (--resize). ({text})"
    return f"The run failed unexpectedly, {text}. Set INVDIFF_TRACEBACK=1 to see where, and please report it."


if __name__ == "__main__":
    sys.exit(main())
