"""JSON files that somebody else made."""

import json
from pathlib import Path
from typing import Any

from minitron_nemo.errors import UserError

LIMIT = 256 * 2**20  # bytes; the tokenizer.json of a vocabulary of a million has a tenth of it


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file; UserError when it is larger than `LIMIT` or holds anything else."""
    try:
        if (size := path.stat().st_size) > LIMIT:
            raise UserError(f"{path}: {size} bytes; no such file needs more than {LIMIT}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
