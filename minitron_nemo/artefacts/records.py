"""An artefact that is one JSON file: its values, with the kind, fingerprint and parents beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError


def read_record(path: str | Path, *, kind: str) -> dict[str, Any]:
    """The record at `path`; UserError when it is not a record of this kind."""
    try:
        values = parse_json(Path(path).read_bytes(), infinities=True)  # the perplexity of a model that diverged
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable {kind} record: {error}") from None
    if not isinstance(values, dict) or values.get("kind") != kind:
        raise UserError(f"{path}: not a {kind} record; it is never overwritten or read as one")
    return values


def write_record(path: str | Path, values: Mapping[str, Any], *, kind: str, origin: Origin) -> None:
    """Publish a record by one rename; replaces only a record of the same kind, and only where `origin` allows."""
    path = Path(path)
    check_record_target(path, kind=kind, overwrite=origin.overwrite)
    record = {
        "kind": kind,
        "fingerprint": origin.fingerprint,
        **values,
        "parents": dict(origin.parents),
        "config": dict(origin.config),
    }
    write_text_atomically(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def check_record_target(path: Path, *, kind: str, overwrite: bool) -> None:
    """Refuse to write over anything that is not a record of this kind, or over one without `overwrite`."""
    if not path.exists():
        return
    read_record(path, kind=kind)
    if not overwrite:
        raise UserError(f"{path} exists already and was made by another configuration; set overwrite=true or move it")


def is_current_record(path: Path, fingerprint: str, *, kind: str) -> bool:
    """Whether a record made by this fingerprint is there."""
    try:
        return bool(read_record(path, kind=kind)["fingerprint"] == fingerprint)
    except (UserError, KeyError):
        return False
