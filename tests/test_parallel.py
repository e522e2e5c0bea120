"""One run on several processes: the draws of a single one, and an end for all when one of them fails.

Starting processes is dear, so that two worlds, of two and of four, each live through all scenes below, and the tests
read what every process wrote down. A single process's answers are made here.
"""

import json
import os
import signal
import socket
import time
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from test_posterior import DENSE, RUNS, Bend
from test_posterior import MASK as LARGE_MASK
from test_posterior import SHAPE as LARGE
from test_posterior import problem as large_problem
from torch import Tensor

from invdiff import likelihoods, operators, peers, samplers
from invdiff.driver import Budget
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.parallel import ALONE, Shard
from invdiff.posterior import Posterior
from invdiff.potential import Tempered
from invdiff.priors import MixturePrior
from invdiff.priors.base import DiffusionPrior
from invdiff.problem import Problem
from invdiff.samplers.annealing import Levels
from invdiff.samplers.particles import BirthDeath, Residual, Stratified, Systematic, Weighted
from invdiff.solve import sampler_classes, solve

F64 = torch.float64
SHAPE = (1, 2, 2)
DRAWS, CHAINS = 12, 2
LIMIT = 150.0  # seconds for a world; reached only by one that hangs
MASK = operators.Inpainting(torch.tensor([[True, True], [False, True]]), SHAPE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture() -> MixturePrior:
    means = torch.stack([1.5 * normal(*SHAPE, seed=s) for s in (1, 2)])
    covariances = torch.stack([(0.3 + 0.2 * s) * torch.eye(4, dtype=F64) for s in (0, 1)])
    return MixturePrior(torch.tensor([0.4, 0.6]), means, covariances, sigma_min=1e-2, sigma_max=20.0)


def problems() -> list[Problem]:
    return [Problem(likelihoods.Gaussian(MASK, normal(*MASK.out_shape, seed=s), 0.5)) for s in (10, 11)]


def posterior(prior: object = None, device: str | None = None) -> Posterior:
    return Posterior(problems(), mixture() if prior is None else prior, dtype=F64, device=device)


# Every sampler's runs of another test, on problems of its own; and more here, on the mixture in four dimensions, of
# which the weighted ones resample by all ways that there are.
EVERY = {f"every {name}": sampler for name, (sampler, _) in RUNS.items()}
WEIGHTED = {
    "transport": samplers.TransportLangevin(steps=6, refreshes=2, resampling=Systematic(), threshold=1.0),
    "tds": samplers.TDS(steps=8, resampling=Stratified(), threshold=1.0),
    "steering": samplers.FKSteering(steps=8, resampling=Residual(), threshold=0.9, potential="maximum"),
    "importance": samplers.ImportanceSampling(steps=6),
    "births": samplers.TDS(steps=8, resampling=BirthDeath(), threshold=1.0),
    "ladder": samplers.TransportLangevin(
        steps=2, refreshes=1, resampling=BirthDeath(), threshold=0.9, conditional_ess=0.9
    ),
    "afdps": samplers.AFDPS(steps=8, threshold=1.0, resampling=Residual()),
    "afdps-tempered": samplers.AFDPS(steps=8, form="laplacian", path=Tempered(scale=0.5), threshold=0.9),
    "mcgdiff": samplers.MCGDiff(steps=8, resampling=Stratified()),
    "mcgdiff-published": samplers.MCGDiff(steps=8, bridge=False, kappa=0.1, threshold=0.9),
    "pcn": samplers.PCN(steps=3, moves=2, prior_steps=3),
    "fps": samplers.FPS(steps=8, resampling=BirthDeath()),
    "fps-drawn": samplers.FPS(steps=8, trajectory="drawn"),
}
SAMPLERS = WEIGHTED | {
    "unweighted": samplers.TransportLangevin(steps=6, refreshes=2),
    "pigdm": samplers.PiGDM(steps=6),
    "gibbs": samplers.SplitGibbs(steps=5, levels=Levels(sigma_max=2.0, sigma_min=0.05)),
    "dmcmc": samplers.DMCMC(steps=10, rungs=3, burn_in=20, keep=1),
    "dmcmc-few": samplers.DMCMC(steps=2, rungs=3, burn_in=20, keep=3),  # fewer visits than draws
}
ALL = SAMPLERS | EVERY
COMPARED = {2: list(ALL), 4: [*WEIGHTED, "unweighted", "pigdm", "dmcmc", "dmcmc-few", "every twisted-smc"]}


def large(name: str, prior: DiffusionPrior | None = None, device: str | None = None) -> Posterior:
    """Posterior of one of `EVERY`."""
    sampler, make = RUNS[name.removeprefix("every ")]
    operator = LARGE_MASK if "svd" in sampler.requires() else DENSE
    problems = [large_problem(operator, seed) for seed in (1, 2)]
    return Posterior(problems, make() if prior is None else prior, dtype=F64, device=device)


def answers(name: str, *, distributed: bool, device: str | None = None) -> dict[str, Tensor]:
    """What a run gives, problem by problem."""
    p = large(name, device=device) if name in EVERY else posterior(device=device)
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DMCMC's ladder is too short")
        solutions = p.sample(ALL[name], DRAWS, seed=3, chains=CHAINS, distributed=distributed)
    for i, s in enumerate(solutions):
        values = {
            "draws": next(iter(s.by_chain.values())),
            "particles": None if s.particles is None else next(iter(s.particles.values())),
            "log_weights": s.log_weights,
            "ancestors": s.ancestors,
            "evidence": s.chain_log_evidence,
            "misfit": torch.tensor([float("nan") if t.misfit is None else t.misfit for t in s.trace], dtype=F64),
            "ess": torch.tensor([float("nan") if t.ess is None else t.ess for t in s.trace], dtype=F64),
            "cost": torch.tensor([s.about["evaluations_per_draw"], *(t.evaluations for t in s.trace)], dtype=F64),
            "likelihood": torch.tensor(s.about["likelihood_evaluations_per_draw"], dtype=F64),
        }
        if isinstance(ALL[name], (samplers.MCGDiff, samplers.FPS)):
            del values["likelihood"]  # the one look at an ensemble's start is made by every process
        found |= {f"{name}/{i}/{key}": value.contiguous() for key, value in values.items() if value is not None}
    return found


# What every process does; each scene leaves a JSON file by name and rank, which holds what was seen or raised.


def scene_same(folder: Path, rank: int, world: int) -> object:
    found: dict[str, Tensor] = {}
    for name in COMPARED[world]:
        found |= answers(name, distributed=True)
    save_file(found, folder / f"same.{rank}.safetensors")
    return "done"


def scene_exchange(folder: Path, rank: int, world: int) -> object:
    """Random ancestors, against plain indexing; and how many rows travel, against a count by sets."""
    shard, sent, wrong = Shard(rank, world), [], []
    original = dist.all_to_all_single

    def counting(got: Tensor, rows: Tensor, *rest: object, **more: object) -> object:
        sent.append(len(rows))
        return original(got, rows, *rest, **more)

    dist.all_to_all_single = counting
    for trial in range(40):
        generator = torch.Generator().manual_seed(trial)
        e, m = 1 + trial % 3, 1 + trial % 5
        n = m * world
        whole = [
            torch.randn(e, n, 3, generator=generator, dtype=F64),
            torch.randint(0, 99, (e, n), generator=generator),
            torch.rand(e, n, 1, generator=generator) < 0.5,
            torch.randn(e, n, 2, 2, generator=generator, dtype=torch.complex64),
        ]
        ancestors = torch.randint(0, n, (e, n), generator=generator)
        if trial % 4 == 0:
            ancestors = torch.arange(n).expand(e, n).contiguous()
        elif trial % 4 == 1:
            ancestors = ancestors.sort(dim=1).values
        elif trial % 4 == 2:
            ancestors = torch.full((e, n), trial % n)
        sent.clear()
        block = shard.block(n)
        moved = shard.exchange([t[:, block] for t in whole], ancestors)
        right = [t[torch.arange(e)[:, None], ancestors][:, block] for t in whole]
        if not all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(moved, right, strict=True)):
            wrong.append(f"rows of trial {trial}")
        pairs = {
            (i, int(a), j // m)
            for i in range(e)
            for j, a in enumerate(ancestors[i].tolist())
            if a // m == rank and j // m != rank
        }
        travel = bool((ancestors // m != torch.arange(n) // m).any())
        if sent != ([len(pairs)] if travel else []):
            wrong.append(f"trial {trial} sent {sent}, not {len(pairs)}")
        if not torch.equal(shard.gather(whole[2][:, block]), whole[2]) or not torch.equal(
            shard.first(whole[3] + rank), whole[3]
        ):
            wrong.append(f"gather or first of trial {trial}")
    dist.all_to_all_single = original
    return wrong


def scene_statistics(folder: Path, rank: int, world: int) -> object:
    """Functions of the particle core that no sampler here calls."""
    n = 4 * world
    whole, g = normal(2, n, seed=7), normal(2, n, seed=8)
    results = []
    for shard in (Shard(rank, world), ALONE):
        block = shard.block(n)
        noise = Noise([1, 2], n, dtype=F64, shard=shard)
        state = Weighted.begin(whole[:, block, None], 3.0 * whole[:, block], shard=shard)
        new = state.resampled(Systematic(), noise.at(1), 1.0)
        results.append([state.conditional_ess(g[:, block]), new.survivors(), new.evidence, torch.tensor(state.ess)])
    try:
        state = Weighted.begin(whole[:, Shard(rank, world).block(n), None])
        state.resampled(Systematic(), Noise([1, 2], n, shard=Shard(rank, world)))
        refused = ""
    except InputError as error:
        refused = str(error)
    close = [bool(torch.allclose(a.double(), b.double(), rtol=1e-13)) for a, b in zip(*results, strict=True)]
    return {"close": close, "refused": refused}


def spoilt(prior: DiffusionPrior, rank: int, how: str) -> DiffusionPrior:
    """Let a prior's network give NaN, or raise, on one process from its fifth call on."""
    name = "denoise" if hasattr(prior, "denoise") else "log_probs"
    whole, calls = getattr(prior, name), []

    def network(*given: Tensor | float) -> Tensor:
        calls.append(given)
        if len(calls) >= 5 and dist.get_rank() == rank:
            if how == "raise":
                raise ValueError("the network's own trouble")
            return whole(*given) * float("nan")
        return whole(*given)

    setattr(prior, name, network)
    return prior


class Nowhere(likelihoods.Gaussian):
    """Explained by nothing."""

    def log_prob(self, x: Tensor) -> Tensor:
        return super().log_prob(x) - torch.inf

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = super().log_prob_and_grad(x)
        return value - torch.inf, grad


TEMPERED = Tempered(scale=0.5)
DEAD = {
    "afdps": samplers.AFDPS(steps=3),
    "tds": samplers.TDS(steps=3),
    "steering": samplers.FKSteering(steps=3),
    "importance": samplers.ImportanceSampling(steps=3),
    "pcn": samplers.PCN(steps=3, moves=1, prior_steps=3),
    "transport": samplers.TransportLangevin(steps=3, path=TEMPERED, slope=1.3),
    "dmcmc": samplers.DMCMC(keep=1, path=TEMPERED, slope=1.3),
}
UNSTABLE = {
    "ula": samplers.ULA(steps=400, slope=1e-3),
    "transport": samplers.TransportLangevin(
        steps=40, path=TEMPERED, slope=1e-3, resampling=Systematic(), conditional_ess=0.9
    ),
    "dmcmc": samplers.DMCMC(steps=30, keep=1, path=TEMPERED, slope=1e-3),
}


def raised(function, kind: type[BaseException] = Exception) -> list[str]:
    began = time.perf_counter()
    try:
        function()
    except kind as error:
        return [type(error).__name__, str(error), f"{time.perf_counter() - began:.3f}"]
    return ["nothing", "", "0"]


def scene_failures(folder: Path, rank: int, world: int) -> object:
    last, found = world - 1, {}
    for how in ("nan", "raise"):
        for name in ("transport", "pigdm"):
            run = partial(posterior(spoilt(mixture(), last, how)).sample, SAMPLERS[name], DRAWS, distributed=True)
            found[f"{how} {name}"] = raised(run)
    for name, (sampler, make) in (RUNS if world == 2 else {}).items():
        p = large(name, spoilt(make(), last, "nan"))
        found[f"every {name}"] = raised(partial(p.sample, sampler, DRAWS, distributed=True))
    bent = Bend(LARGE, LARGE)
    for title, cases, likelihood in (
        ("nowhere", DEAD, Nowhere(bent, normal(1, *LARGE), 0.5)),
        ("unstable", UNSTABLE, likelihoods.Gaussian(bent, normal(1, *LARGE), 0.01)),
    ):
        for name, sampler in (cases if world == 2 else {"dmcmc": cases["dmcmc"]}).items():
            p = Posterior(Problem(likelihood), RUNS["tds"][1](), dtype=F64)
            found[f"{title} {name}"] = raised(partial(p.sample, sampler, DRAWS, distributed=True))
    uneven = partial(posterior().sample, samplers.DMCMC(keep=4), DRAWS, distributed=True)
    found["walkers"] = raised(uneven)
    dead = partial(Weighted.begin, torch.zeros(1, 2, 1), torch.full((1, 2), -torch.inf), shard=Shard(rank, world))
    found["dead"] = raised(dead)
    half = torch.full((1, 2), 0.0 if rank else -torch.inf)
    found["some dead"] = raised(partial(Weighted.begin, torch.zeros(1, 2, 1), half, shard=Shard(rank, world)))
    found["odd"] = raised(partial(posterior().sample, SAMPLERS["pigdm"], DRAWS + 1, distributed=True))
    found["seeds"] = raised(partial(posterior().sample, SAMPLERS["pigdm"], DRAWS, seed=rank, distributed=True))
    shard = Shard(rank, world)
    found["kinds"] = raised(lambda: shard.gather(torch.zeros(1, 2)) if rank else shard.agree(0.0))
    found["sizes"] = raised(lambda: shard.gather(torch.zeros(1, 2 + rank)))

    def ends_early() -> None:
        with shard.together():
            if rank == 0:
                raise InputError("bad input here alone")

    found["together"] = raised(ends_early)
    time_up = Budget(max_seconds=1e9 if rank else 0.0)  # the first one's clock counts
    chain = samplers.ULA(steps=5)
    run = partial(posterior().sample, chain, DRAWS, budget=time_up, distributed=True)
    found["budget"] = [run()[0].about["stopped"]]
    # After all that the processes still work together.
    after = answers("pigdm", distributed=True)
    save_file(after, folder / f"after.{rank}.safetensors")
    return found


def scene_interrupted(folder: Path, rank: int, world: int) -> object:
    """Ctrl-C reaches one process alone, at the worst moment: when the others wait for its tensor."""
    path, steps, meet_alike, armed = folder / "run.safetensors", [], Shard._meet_alike, []

    def note(state: object, info: object) -> None:
        steps.append(state.step)
        armed[:] = [True] if rank == world - 1 and state.step == 3 else []

    def and_interrupt(self: Shard, kind: str, tensor: Tensor) -> None:
        meet_alike(self, kind, tensor)
        if armed:
            armed.clear()
            os.kill(os.getpid(), signal.SIGINT)

    sampler = SAMPLERS["tds"]
    run = partial(posterior().sample, sampler, DRAWS, seed=3, chains=CHAINS, checkpoint=path, distributed=True)
    Shard._meet_alike = and_interrupt
    first = raised(partial(run, callback=note), KeyboardInterrupt)
    Shard._meet_alike = meet_alike
    dist.barrier()
    kept = sorted(p.name for p in folder.glob("run.safetensors*"))
    dist.barrier()
    alone = raised(partial(posterior().sample, sampler, DRAWS, seed=3, chains=CHAINS, checkpoint=path))
    later: list[int] = []
    solution = run(callback=lambda state, info: later.append(state.step))[1]
    save_file({"particles": next(iter(solution.particles.values()))}, folder / f"resumed.{rank}.safetensors")
    dist.barrier()
    left = sorted(p.name for p in folder.glob("run.safetensors*"))
    return {"first": first, "steps": steps, "kept": kept, "alone": alone, "later": later, "left": left}


def scene_command(folder: Path, rank: int, world: int) -> object:
    """The command line with the environment that torchrun makes."""
    from invdiff import cli

    dist.destroy_process_group()
    variables = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": (folder / "port").read_text(),
    }  # fmt: skip
    os.environ |= {key: str(value) for key, value in variables.items()}
    os.chdir(folder)
    words = ["solve", "motion-deblur", "--image", "plain.png", "--simulate", "--prior", str(folder / "prior")]
    words += ["--steps", "2", "--device", "cpu", "--out", "shared.nc"]
    status = cli.main([*words, "--draws", str(world)])
    return {"status": status, "odd": cli.main([*words, "--draws", str(world + 1)])}


def scene_silent(folder: Path, rank: int, world: int) -> object:
    """A process that does not answer, though it lives."""
    join(folder / "silent", rank, world, seconds=2.0)

    def sleep(state: object, info: object) -> None:
        if rank == world - 1:
            wait_for([folder / f"silent.{r}.json" for r in range(world - 1)])

    return raised(partial(posterior().sample, SAMPLERS["tds"], DRAWS, callback=sleep, distributed=True))


def scene_killed(folder: Path, rank: int, world: int) -> object:
    """A process that is gone; the others, which live on, each learn of it."""
    join(folder / "killed", rank, world, seconds=60.0)

    def die(state: object, info: object) -> None:
        if rank == world - 1 and state.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    return raised(partial(posterior().sample, SAMPLERS["tds"], DRAWS, callback=die, distributed=True))


SCENES = {
    2: [scene_same, scene_exchange, scene_statistics, scene_failures, scene_interrupted, scene_command, scene_silent,
        scene_killed],
    4: [scene_same, scene_exchange, scene_failures, scene_killed],
}  # fmt: skip


def join(store: Path, rank: int, world: int, seconds: float) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    peers.TIMEOUT = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=peers.TIMEOUT)


def wait_for(paths: list[Path]) -> None:
    end = time.monotonic() + 60.0
    while not all(p.exists() for p in paths) and time.monotonic() < end:
        time.sleep(0.05)


def live(folder: Path, rank: int, world: int) -> None:
    """Life of a process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    join(folder / "store", rank, world, seconds=60.0)
    for scene in SCENES[world]:
        name = scene.__name__.removeprefix("scene_")
        partial_path = folder / f"{name}.{rank}.part"
        try:
            seen_here = scene(folder, rank, world)
        except BaseException:  # noqa: BLE001 it is written down
            (folder / f"crash.{rank}").write_text(traceback.format_exc())
            os._exit(1)
        partial_path.write_text(json.dumps(seen_here))
        partial_path.rename(folder / f"{name}.{rank}.json")
    # Those who live wait for each other: none learns of the dead one by another's end.
    wait_for([folder / f"killed.{r}.json" for r in range(world - 1)])
    os._exit(0)


def run_world(folder: Path, world: int) -> Path:
    context = mp.get_context("spawn")
    processes = [context.Process(target=live, args=(folder, rank, world)) for rank in range(world)]
    for p in processes:
        p.start()
    end = time.monotonic() + LIMIT
    for p in processes:
        p.join(max(0.1, end - time.monotonic()))
    hung = [p for p in processes if p.is_alive()]
    for p in hung:
        p.kill()
        p.join()
    crashes = [p.read_text() for p in sorted(folder.glob("crash.*"))]
    assert not crashes, "\n".join(crashes)
    assert not hung, f"{len(hung)} processes hang; seen: {sorted(p.name for p in folder.iterdir())}"
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    prepare_command(folder)
    return run_world(folder, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_world(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def alone():
    return {key: value for name in ALL for key, value in answers(name, distributed=False).items()}


def prepare_command(folder: Path) -> None:
    """A picture, a tiny prior of random weights, and a port that is free."""
    import numpy as np
    from PIL import Image

    from invdiff.networks.unet import UNet
    from invdiff.priors import FrequencyTable, NetworkPrior
    from invdiff.priors.frequency_table import KNOTS
    from invdiff.priors.loading import TrainedCard, save_prior

    levels = np.random.default_rng(0).integers(0, 256, (13, 21, 3)).astype(np.uint8)
    Image.fromarray(levels).save(folder / "plain.png")
    network = {
        "channels": [8, 8, 8, 8], "blocks": [1, 1, 1, 1], "attention": [False] * 4, "embedding": 8, "groups": 4,
    }  # fmt: skip
    shape, sigmas = (3, 64, 64), torch.logspace(-3, 2, 8)
    table = (0.06 * sigmas**2 / (sigmas**2 + 0.06)).log()[:, None, None].expand(8, 3, len(KNOTS))
    with torch.random.fork_rng():
        unet = UNet(in_channels=3, **network)
    (folder / "prior").mkdir()
    card = TrainedCard(
        name="tiny", version="1", description="d", licence="l", shape=shape, sigma_min=0.002, sigma_max=80.0,
        sigma_data=0.5, network=network,
    )  # fmt: skip
    save_prior(folder / "prior", NetworkPrior(unet, shape, curvature=FrequencyTable(shape, sigmas, table)), card)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))


def seen(folder: Path, scene: str, ranks: int) -> list:
    return [json.loads((folder / f"{scene}.{r}.json").read_text()) for r in range(ranks)]


def worlds(*sizes: int):
    return pytest.mark.parametrize(
        ("world", "size"), [(name, n) for n, name in ((2, "two"), (4, "four")) if n in sizes]
    )


# The draws.


def test_every_sampler_of_the_library_is_run_here(alone):
    assert {type(s) for s in EVERY.values()} == set(sampler_classes().values())
    have_weights = {type(ALL[key.split("/")[0]]) for key in alone if key.endswith("/log_weights")}
    of_tokens = {samplers.TwistedSMC, samplers.AnchoredSMC, samplers.AmortisedSMC}
    assert have_weights == {type(s) for s in WEIGHTED.values()} | of_tokens


@pytest.mark.parametrize(("size", "sampler"), [(size, name) for size, names in COMPARED.items() for name in names])
def test_several_processes_give_the_draws_of_one(request, alone, size, sampler):
    folder = request.getfixturevalue({2: "two", 4: "four"}[size])
    expected = {key: value for key, value in alone.items() if key.startswith(f"{sampler}/")}
    assert len(expected) >= 2 * (5 if sampler in WEIGHTED else 3)
    for rank in range(size):
        found = load_file(folder / f"same.{rank}.safetensors")
        assert {key for key in found if key.startswith(f"{sampler}/")} == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-10, atol=1e-10, equal_nan=True, msg=f"{key} of {rank}"
            )


def test_the_runs_resample_across_blocks(alone):
    """Else the test above would say nothing of particles that change place."""
    p = posterior()
    for name in WEIGHTED.keys() - {"importance"}:  # which weighs once, at the end
        firsts = []
        p.sample(SAMPLERS[name], DRAWS, seed=3, chains=CHAINS, callback=lambda s, _, f=firsts: f.append(s.first))
        block = DRAWS // 4
        home = torch.arange(DRAWS) // block
        crossed = [int((f // block != home).sum()) for f in firsts]
        assert max(crossed) > 6, name  # of the 48 particles in four ensembles


@worlds(2, 4)
def test_every_process_has_the_same_solution_bit_by_bit(request, world, size):
    folder = request.getfixturevalue(world)
    first = load_file(folder / "same.0.safetensors")
    for rank in range(1, size):
        other = load_file(folder / f"same.{rank}.safetensors")
        assert all(torch.equal(first[key], other[key]) or bool(first[key].isnan().any()) for key in first)


def test_solve_passes_it_on():
    with pytest.raises(InputError, match="init_process_group"):
        solve(problems(), mixture(), SAMPLERS["pigdm"], draws=2, distributed=True)


# Slots and shares.


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_noise_of_the_shards_is_that_of_the_whole(world):
    whole = Noise([4, 9], 6, dtype=F64)
    z = whole.at(2).like(torch.empty(2, 6, 3, dtype=F64))
    u = whole.uniform(whole.slots, (2,)).reshape(2, 6, 2)
    shared = whole.shared()
    zs, us = [], []
    for rank in range(world):
        noise = Noise([4, 9], 6, dtype=F64, shard=Shard(rank, world))
        assert (noise.n, len(noise.all_slots), len(noise.slots)) == (6, 12, 12 // world)
        zs.append(noise.at(2).like(torch.empty(2, 6 // world, 3, dtype=F64)))
        us.append(noise.uniform(noise.slots, (2,)).reshape(2, -1, 2))
        assert torch.equal(noise.shared(), shared)
    assert torch.equal(torch.cat(zs, 1), z)
    assert torch.equal(torch.cat(us, 1), u)


def test_shares_are_even_or_refused():
    assert [Shard(r, 3).block(12) for r in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(InputError, match=r"20 draws .* by 3 processes; ask for 18 or 21"):
        Shard(0, 3).share(20)
    with pytest.raises(InputError, match="ask for 4"):
        Noise([1], 2, shard=Shard(0, 4))
    with pytest.raises(InputError, match="rank"):
        Shard(2, 2)


def test_a_single_process_calls_nothing(monkeypatch):
    for name in ("meet", "control", "here"):
        monkeypatch.setattr(peers, name, lambda *a, **k: pytest.fail("a single process talks to itself"))
    x = normal(2, 4, 3)
    ancestors = torch.tensor([[0, 0, 1, 3], [3, 2, 1, 0]])
    with ALONE.together():
        assert ALONE.gather(x) is x
        assert ALONE.first(x) is x
        assert ALONE.agree(1.0, 2.0) == [[1.0, 2.0]]
        assert torch.equal(ALONE.exchange([x], ancestors)[0], x[torch.arange(2)[:, None], ancestors])
    posterior().sample(SAMPLERS["tds"], 4)


@worlds(2, 4)
def test_rows_move_as_by_plain_indexing_and_no_more_than_must(request, world, size):
    assert seen(request.getfixturevalue(world), "exchange", size) == [[]] * size


def test_statistics_of_the_particle_core_are_those_of_all(two):
    for found in seen(two, "statistics", 2):
        assert found["close"] == [True] * 4
        assert "shard=noise.shard" in found["refused"]


# Failures.


@worlds(2, 4)
def test_an_error_in_one_process_is_an_error_in_all(request, world, size):
    reports = seen(request.getfixturevalue(world), "failures", size)
    last = size - 1
    for name in ("transport", "pigdm"):
        raiser = reports[last][f"raise {name}"]
        assert raiser[:2] == ["ValueError", "the network's own trouble"]
        for report in reports[:last]:
            kind, text, _ = report[f"raise {name}"]
            assert kind == "PeerError"
            assert f"Process {last} of {size}" in text
            assert "ValueError: the network's own trouble" in text
    assert reports[last]["nan pigdm"][0] == "SamplingError"
    for report in reports:
        # Weights are everyone's: all see the NaN themselves. Without weights the others are told.
        assert report["nan transport"][0] == "SamplingError"
        assert "NaN" in report["nan transport"][1]
        assert "left the finite numbers at step" in report["nan pigdm"][1]
        assert report["dead"][0] == "SamplingError"
        assert f"All {2 * size} particles of ensemble 0 are dead" in report["dead"][1]
        assert report["some dead"][0] == "nothing"
        assert report["together"][0] == ("InputError" if report is reports[0] else "PeerError")
        assert "bad input here alone" in report["together"][1]
        for name in RUNS if size == 2 else ():
            assert report[f"every {name}"][0] in ("SamplingError", "PeerError"), name
            assert "NaN" in report[f"every {name}"][1] or "left the finite numbers" in report[f"every {name}"][1], name
        for name in DEAD if size == 2 else ("dmcmc",):
            kind, text, _ = report[f"nowhere {name}"]
            assert kind == ("InputError" if name == "importance" else "SamplingError"), (name, text)
            assert "no particle explains" in text or "are dead" in text or "likelihood is zero" in text, name
        for name in UNSTABLE if size == 2 else ("dmcmc",):
            kind, text, _ = report[f"unstable {name}"]
            assert kind in ("SamplingError", "PeerError"), name
            assert "left the finite numbers" in text or "log-weight that is NaN or infinite" in text, name
    assert all(f"Process {last} of {size}" in r["nan pigdm"][1] for r in reports[:last])


@worlds(2, 4)
def test_what_processes_cannot_do_together_is_refused_by_all(request, world, size):
    for report in seen(request.getfixturevalue(world), "failures", size):
        assert report["odd"][0] == "InputError"
        assert f"{DRAWS + 1} draws cannot be shared evenly by {size}" in report["odd"][1]
        assert report["walkers"][0] == "InputError"
        assert (
            f"3 walkers at keep=4, which {size} processes cannot share evenly; take keep=3, for 4."
            in report["walkers"][1]
        )
        assert report["seeds"][0] == "InputError"
        assert "different things" in report["seeds"][1]
        assert report["kinds"][0] == "PeerError"
        assert "0: numbers, 1: gather" in report["kinds"][1]
        assert report["sizes"][0] == "PeerError"
        assert "different sizes" in report["sizes"][1]
        assert report["budget"] == ["max_seconds=0 reached"]


@worlds(2, 4)
def test_told_failures_leave_the_processes_able_to_go_on(request, alone, world, size):
    for rank in range(size):
        for key, value in load_file(request.getfixturevalue(world) / f"after.{rank}.safetensors").items():
            torch.testing.assert_close(value, alone[key], rtol=1e-10, atol=1e-10, equal_nan=True)


def test_ctrl_c_in_one_process_ends_all_at_one_step_and_all_go_on_from_it(two, alone):
    parts = ["run.safetensors.0-of-2", "run.safetensors.1-of-2"]
    for rank, report in enumerate(seen(two, "interrupted", 2)):
        assert report["first"][0] == "KeyboardInterrupt"
        assert report["steps"] == [1, 2, 3]
        assert report["kept"] == parts
        assert report["alone"][0] == "InputError"
        assert "another number of processes than 1" in report["alone"][1]
        assert report["later"] == [4, 5, 6, 7, 8]
        assert report["left"] == []
        found = load_file(two / f"resumed.{rank}.safetensors")["particles"]
        torch.testing.assert_close(found, alone["tds/1/particles"], rtol=1e-10, atol=1e-10)


@worlds(2, 4)
def test_a_killed_process_ends_the_others_with_an_error(request, world, size):
    for kind, text, seconds in seen(request.getfixturevalue(world), "killed", size - 1):
        assert kind == "PeerError"
        assert "has ended" in text
        assert float(seconds) < 30.0  # half of the timeout: found by its closed connection


def test_a_silent_process_ends_the_others_after_the_timeout(two):
    (kind, text, seconds), sleeper = seen(two, "silent", 2)
    assert kind == sleeper[0] == "PeerError"
    assert "not answered for 2 s" in text
    assert 1.5 < float(seconds) < 30.0


def test_the_command_shares_its_draws_and_the_first_process_writes(two, monkeypatch, capsys):
    from invdiff import Solution, cli

    assert seen(two, "command", 2) == [{"status": 0, "odd": 2}] * 2
    shared = Solution.load(two / "shared.nc")
    assert shared.about["processes"] == 2
    monkeypatch.chdir(two)
    words = ["--image", "plain.png", "--simulate", "--prior", "prior", "--steps", "2", "--device", "cpu"]
    assert cli.main(["solve", "motion-deblur", *words, "--draws", "2"]) == 0, capsys.readouterr().err
    single = Solution.load(two / "result.nc")
    torch.testing.assert_close(shared.draws, single.draws, rtol=1e-3, atol=1e-4)  # float32, other batches


def live_on_a_gpu(rank: int, folder: Path, world: int) -> None:
    torch.cuda.set_device(rank)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=world)
    found: dict[str, Tensor] = {}
    for name in ALL:
        found |= answers(name, distributed=True, device=f"cuda:{rank}")
    save_file(found, folder / f"same.{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_gpus_give_the_draws_of_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    mp.start_processes(live_on_a_gpu, args=(tmp_path, 2), nprocs=2, start_method="spawn")
    for name in ALL:
        for key, value in answers(name, distributed=False, device="cuda:0").items():
            for rank in range(2):
                found = load_file(tmp_path / f"same.{rank}.safetensors")[key]
                torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10, equal_nan=True, msg=key)
