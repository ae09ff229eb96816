"""JSON files that somebody else made."""

from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import SMALL_LIMIT, Contents, FolderContents, read_small
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError

JSON_LIMIT = 16 * 2**20  # bytes; the index of a thousand layers has two of them
VOCABULARIES = ("tokenizer.json", "vocab.json")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file; UserError when it is missing, too large, or holds anything else."""
    return read_json_in(FolderContents(path.parent), path.name)


def read_json_in(contents: Contents, name: str) -> dict[str, Any]:
    """The object in a file of a folder or a tar; UserError when it is missing, too large, or holds anything else."""
    path = contents.path / name
    try:
        values = parse_json(read_small(contents, name, limit=SMALL_LIMIT if name in VOCABULARIES else JSON_LIMIT))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
