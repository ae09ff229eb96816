"""The report of a run: `report.json` for scripts and a self-contained `report.html` with plots beside it.

Reads what the steps left under the run folder; measures nothing itself.
"""

import dataclasses
import json
import math
import os
import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from minitron_nemo.arch import ModelArch, billions
from minitron_nemo.checkpoint.manifest import PACKAGES, read_manifest
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import FACTS_FILE, ImportanceScores, read_scores
from minitron_nemo.pruning.plan import PruningPlan, read_plan

METRICS = ("params", "tokens", "validation_loss", "perplexity", "forward_kl", "top1_agreement")
HEADINGS = ("model", "parameters", "tokens", "validation loss", "perplexity", "forward KL", "top-1 agreement")

Model = dict[str, Any]
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """What the steps of one run left behind, in the order in which it is shown.

    `models` maps a name to the `METRICS` of its evaluation and its `arch`; `curves` holds the training records of
    those that were trained here, one per step; `plans` those of the pruned ones.
    """

    title: str
    models: dict[str, Model]
    curves: dict[str, Records]
    scores: ImportanceScores | None
    plans: dict[str, PruningPlan]
    facts: dict[str, Any]

    def to_json(self) -> str:
        """`models` and `facts`; a number that is not finite becomes null."""
        values = {"models": self.models, "facts": self.facts}
        return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def write_report(run_dir: str | Path, models: Sequence[str], *, output: str | Path) -> dict[str, Model]:
    """Writes `output` (HTML) and the JSON of the same name beside it; returns the `models` of that JSON.

    Every model needs `<name>.nemo` and `eval/<name>.json` under `run_dir`. Training metrics, importance and plans are
    shown where they exist. Raises UserError naming the file that is missing or damaged.
    """
    from minitron_nemo.report_page import render_page  # brings matplotlib, which nothing else here needs

    output = Path(output)
    if output.suffix != ".html":
        raise UserError(f"report.output={output}: must end in .html; the .json goes beside it")
    report = collect(run_dir, models)
    page = render_page(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(output.with_suffix(".json"), report.to_json())
    _write_atomically(output, page)
    return report.models


def collect(run_dir: str | Path, models: Sequence[str]) -> Report:
    """Everything that a report of these models shows. Raises UserError naming the file that is missing or damaged."""
    run_dir = Path(run_dir)
    if not models:
        raise UserError("report.models=[]: name at least one model to show")
    scores = run_dir / "importance"
    plans = {name: run_dir / f"{name}.nemo" / "plan.json" for name in models}
    return Report(
        title=run_dir.resolve().name,
        models={name: _read_model(run_dir, name) for name in models},
        curves={name: records for name in models if (records := read_metrics(run_dir / "logs" / name))},
        scores=read_scores(scores) if (scores / FACTS_FILE).exists() else None,
        plans={name: read_plan(path) for name, path in plans.items() if path.exists()},
        facts=_facts(),
    )


def format_table(models: Mapping[str, Model]) -> str:
    """The results as an aligned text table, one line per model, for a terminal."""
    rows = [HEADINGS, *(tuple(table_row(name, model)) for name, model in models.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    lines = [form.format(*row) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def table_row(name: str, model: Model) -> list[str]:
    """The cells of one model under `HEADINGS`."""
    return [
        name,
        billions(model["params"]),
        billions(model["tokens"]),
        _cell(model["validation_loss"], ".4f"),
        _cell(model["perplexity"], ".2f"),
        _cell(model["forward_kl"], ".4f"),
        _cell(model["top1_agreement"], ".1%"),
    ]


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else "diverged"


def _read_model(run_dir: Path, name: str) -> Model:
    path = run_dir / "eval" / f"{name}.json"
    manifest = read_manifest(run_dir / f"{name}.nemo", kind="model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no evaluation of {name} there; run evaluate on {name}.nemo first") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())}); run evaluate again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with {', '.join(METRICS)}; run evaluate again")
    for key in METRICS:
        optional = key in ("forward_kl", "top1_agreement")  # an evaluation without a reference has neither
        if not (_is_number(values.get(key)) or (optional and values.get(key) is None)):
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
            steps.setdefault(int(record["step"]), {}).update(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a record with a step; remove the line") from None
    return [steps[step] for step in sorted(steps)]


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


def _finite(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _finite(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_atomically(path: Path, text: str) -> None:
    temp = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with temp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
