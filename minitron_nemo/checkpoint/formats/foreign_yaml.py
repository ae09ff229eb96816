"""YAML files that somebody else made: plain values, nothing that a tag or `_target_` asks for."""

from typing import Any

from minitron_nemo.artefacts.contents import Contents, read_small
from minitron_nemo.artefacts.strict_yaml import BYTES_LIMIT, parse_yaml
from minitron_nemo.errors import UserError


def read_yaml_mapping(contents: Contents, name: str) -> dict[str, Any]:
    """The mapping in a file; UserError when it is missing, too large, or holds anything else."""
    path = contents.path / name
    try:
        values = parse_yaml(read_small(contents, name, limit=BYTES_LIMIT))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def function_name(value: Any) -> str | None:
    """The last name of a function that a config names, as text or as `{_target_: ...}`; it is not looked up."""
    value = value.get("_target_") if isinstance(value, dict) else value
    return value.rsplit(".", 1)[-1] if isinstance(value, str) else None
