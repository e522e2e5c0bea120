"""Measure a trained prior and write its model card: report.json, two pictures and README.md in its folder.

    python -m invdiff.training.report priors/photos-64 --data FOLDER

The parts are kept in report.json as they are done; a report that was cut off goes on where it stood, and parts that
were made with other weights or settings are made again.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from invdiff.priors.loading import load_network_prior, read_trained_card
from invdiff.training.baselines import PATCH
from invdiff.training.measurements import Report, ReportSettings
from invdiff.training.model_card import model_card
from invdiff.training.settings import read_settings

QUICK = ReportSettings(
    levels=(0.1, 0.2), pictures=8, subset=4, tuning=2, samples=12, steps=4, calibration=2, compared=10, searched=200
)


def environment(device: torch.device) -> dict[str, str | int]:
    """Say what a part ran on."""
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-image", "PyWavelets")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {"python": platform.python_version(), **packages, "device": name, "threads": torch.get_num_threads()}


def write_report(
    folder: Path,
    data: Path,
    out: Path,
    settings: ReportSettings,
    device: torch.device,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure what report.json does not hold yet, and write the pictures and the model card.

    Parameters
    ----------
    folder
        Of the prior, with ``train.toml`` beside its card.
    data, out
        Folder of the pictures; where to write.
    settings, device
        What to measure, and where to run the network.
    log
        Takes each line of the log.

    Returns
    -------
        The content of report.json.
    """
    card, train = read_trained_card(folder / "prior.toml"), read_settings(folder / "train.toml")
    prior = load_network_prior(folder, card).to(device)
    identity = json.loads(
        json.dumps(
            {
                "prior": {"name": card.name, "version": card.version, "sha256": card.weights["sha256"]},
                "parameters": sum(p.numel() for p in prior.network.parameters()),
                "bytes": (folder / card.weights["file"]).stat().st_size,
                "mixture": dict(train.mixture),
                "settings": asdict(settings) | {"NL-means": PATCH},
            }
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any(report.get(k) != v for k, v in identity.items()):
        report = {**identity, "parts": {}}
    parts = list(Report(prior, train.mixture, data, out, settings).parts())
    kinds = {name.split()[0] for name, _ in parts}
    for name, work in parts:
        if name not in report["parts"]:
            report["parts"][name] = {**work(), "environment": environment(device)}
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            log(f"{name} done")
        if kinds == {done.split()[0] for done in report["parts"]}:  # some of each: enough for a card of what there is
            (out / "README.md").write_text(model_card(card, train, report), encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Command line of a report."""
    parser = argparse.ArgumentParser(description="Measure a trained prior and write its model card.")
    parser.add_argument("prior", type=Path, help="folder of the prior, e.g. priors/photos-64")
    parser.add_argument("--data", type=Path, default=os.environ.get("INVDIFF_DATA"), help="folder of the pictures")
    parser.add_argument("--out", type=Path, help="where to write; the prior's folder if not given")
    parser.add_argument("--quick", action="store_true", help="a few pictures only, to try the report; needs --out")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    if given.data is None:
        parser.error("give the folder of the pictures with --data or INVDIFF_DATA")
    if given.quick and given.out is None:
        parser.error("--quick measures too little for a model card: give another folder than the prior's with --out")
    torch.backends.cudnn.allow_tf32 = False  # the figures are those of float32
    settings = QUICK if given.quick else ReportSettings()
    out, device = given.out or given.prior, torch.device(given.device)
    write_report(given.prior, given.data, out, settings, device, log=lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
