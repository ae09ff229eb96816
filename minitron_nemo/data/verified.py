"""Files whose hash was found right once are not read again while their size and time of change stay the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.manifest import WORTH_A_LINE, file_sha256
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError
from minitron_nemo.progress import progress

CACHE_FILE = "verified.json"


def verify_once(expected: Mapping[Path, str], *, cache: Path, remedy: str) -> None:
    """Refuse the first file whose SHA-256 (hex) is not the expected one; those found right are kept in `cache`.

    `cache` is a folder. Keeping is for speed alone: where it cannot be written, the files are hashed again.
    """
    known = _read(cache / CACHE_FILE)
    marks = {path: [*_size_and_time(path), sha] for path, sha in expected.items()}
    todo = [path for path, mark in marks.items() if known.get(str(path.absolute())) != mark]
    if not todo:
        return
    total = sum(path.stat().st_size for path in todo)
    with progress(total, "verify data", unit="byte", enabled=total >= WORTH_A_LINE) as bar:
        for path in todo:
            if file_sha256(path, advance=bar.advance) != expected[path]:
                raise UserError(f"{path}: damaged: its SHA-256 is not the one it was prepared with; {remedy}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        known |= {str(path.absolute()): marks[path] for path in todo}
        write_text_atomically(cache / CACHE_FILE, json.dumps(known, indent=2) + "\n")
    except (OSError, UserError):
        return


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    try:
        known = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
