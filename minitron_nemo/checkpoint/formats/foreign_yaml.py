"""YAML files that somebody else made: plain values, nothing that a tag or `_target_` asks for."""

from typing import Any

import yaml

from minitron_nemo.artefacts.contents import Contents, read_small
from minitron_nemo.errors import UserError

LIMIT = 8 * 2**20  # bytes; a config has some dozen KiB


def read_yaml_mapping(contents: Contents, name: str) -> dict[str, Any]:
    """The mapping in a file; UserError when it is missing, too large, or holds anything else."""
    path = contents.path / name
    try:
        values = yaml.safe_load(read_small(contents, name, limit=LIMIT).decode())
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def function_name(value: Any) -> str | None:
    """The last name of a function that a config names, as text or as `{_target_: ...}`; it is not looked up."""
    value = value.get("_target_") if isinstance(value, dict) else value
    return value.rsplit(".", 1)[-1] if isinstance(value, str) else None
