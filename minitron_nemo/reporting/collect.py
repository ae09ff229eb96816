"""What the steps of a run left behind, read back for its report; measures and formats nothing."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from minitron_nemo.artefacts.manifest import PACKAGES, read_manifest
from minitron_nemo.artefacts.records import read_record
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores, read_scores
from minitron_nemo.pruning.plan import PruningPlan, plan_of_model
from minitron_nemo.reporting.making import Making, Records, makings, reference_of
from minitron_nemo.shape.arch import ModelArch

METRICS = ("params", "tokens", "cross_entropy", "perplexity", "forward_kl", "top1_agreement")
OPTIONAL = ("forward_kl", "top1_agreement")  # an evaluation without a reference has neither
# What earlier versions called a metric in eval.json and metrics.jsonl.
FORMER_NAMES = {"validation_loss": "cross_entropy", "lm_loss": "cross_entropy", "val_lm_loss": "val_cross_entropy"}

Model = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What the steps of one run left behind, in the order in which it is shown.

    `models` maps a name to the `METRICS` of its evaluation and its `arch`; `curves` holds the training records of
    those that were trained here, one per step; `plans` those of the pruned ones; `made` how each was made; `reference`
    the model that all are compared with, in words.
    """

    title: str
    models: dict[str, Model]
    curves: dict[str, Records]
    scores: ImportanceScores | None
    plans: dict[str, PruningPlan]
    made: dict[str, Making]
    reference: str
    facts: dict[str, Any]


def collect(run_dir: str | Path, models: Sequence[str]) -> Report:
    """Everything that a report of these models shows.

    Every model needs `<name>.nemo` and `eval/<name>.json` under `run_dir`; training metrics, importance and plans are
    taken where they exist. Raises UserError naming the file that is missing or damaged.
    """
    run_dir = Path(run_dir)
    if not models:
        raise UserError("report.models=[]: name at least one model to show")
    scores = run_dir / "importance"
    plans = {name: plan_of_model(run_dir / f"{name}.nemo") for name in models}
    read = {name: _read_model(run_dir, name) for name in models}
    curves = {name: records for name in models if (records := read_metrics(run_dir / "logs" / name))}
    return Report(
        title=run_dir.resolve().name,
        models=read,
        curves=curves,
        scores=read_scores(scores) if scores.is_dir() else None,
        plans={name: plan for name, plan in plans.items() if plan is not None},
        made=makings(run_dir, models, curves),
        reference=reference_of(run_dir, models),
        facts=_facts(),
    )


def _read_model(run_dir: Path, name: str) -> Model:
    path = run_dir / "eval" / f"{name}.json"
    manifest = read_manifest(run_dir / f"{name}.nemo", kind="model")
    if not path.exists():
        raise UserError(f"{path}: no evaluation of {name} there; run evaluate on {name}.nemo first")
    values = _renamed(read_record(path, kind="evaluation"))
    for key in METRICS:
        if not (_is_number(values.get(key)) or (key in OPTIONAL and values.get(key) is None)):
            raise UserError(f"{path}: {key}={values.get(key)!r} is not a number; run evaluate again")
    arch = ModelArch.from_dict(values.get("arch"), source=f"{path}: arch")  # type: ignore[arg-type]
    if manifest.extra.get("arch", arch.to_dict()) != arch.to_dict():
        raise UserError(f"{path}: evaluates another shape than {name}.nemo now has; run evaluate again")
    return {**{key: values.get(key) for key in METRICS}, "arch": arch.to_dict()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(folder: Path) -> Records:
    """The records of `metrics.jsonl`, merged by step (a resumed run repeats some); empty where there is none.

    A last line that was cut off by an interruption is left out; any other damage is refused by line number.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            steps.setdefault(int(record["step"]), {}).update(_renamed(record))
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a record with a step; remove the line") from None
    return [steps[step] for step in sorted(steps)]


def _renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record under today's names; where it has both, today's value stays."""
    former = {FORMER_NAMES[name]: value for name, value in record.items() if name in FORMER_NAMES}
    return former | {name: value for name, value in record.items() if name not in FORMER_NAMES}


def _facts() -> dict[str, Any]:
    """Date, machine and versions, for the reader who wants to know what made these numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": versions,
    }


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    parts = [names[0] if names else platform.machine(), f"{cores} cores", f"{memory:.0f} GiB memory"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)
