"""The report of a run: `report.json` for scripts and a self-contained `report.html` with plots beside it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.errors import UserError
from minitron_nemo.reporting.collect import Report, collect
from minitron_nemo.reporting.verdict import verdict


def write_report(run_dir: str | Path, models: Sequence[str], *, output: str | Path) -> Report:
    """Write `output` (HTML) and the JSON of the same name beside it; returns what they show.

    Raises UserError naming the file of the run that is missing or damaged, before anything is written.
    """
    from minitron_nemo.reporting.page import render_page  # brings matplotlib, which nothing else here needs

    output = Path(output)
    if output.suffix != ".html":
        raise UserError(f"report.output={output}: must end in .html; the .json goes beside it")
    report = collect(run_dir, models)
    page = render_page(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output.with_suffix(".json"), render_json(report))
    write_text_atomically(output, page)
    return report


def render_json(report: Report) -> str:
    """The models of a report, how they were made, the verdict and the facts; what is not finite becomes null."""
    values = {
        "verdict": verdict(report.models, report.made, reference=report.reference),
        "reference": report.reference,
        "models": report.models,
        "made": {name: dataclasses.asdict(making) for name, making in report.made.items()},
        "facts": report.facts,
    }
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
