"""The schema as Hydra is given it, and the way back: what was composed is closed, complete and in its places.

Hydra's overrides reach into a section only when it is there, and give an entry of a mapping only a plain value. So
the schema is opened for it: an optional section is there, with nothing set, and a mapping of sections takes anything.
Afterwards the real schema is put over the result.
"""

import dataclasses
import functools
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from minitron_nemo.config import schema as schema_module
from minitron_nemo.config.nemo_keys import advice
from minitron_nemo.config.schema import MISSING, Config
from minitron_nemo.config.setting import inner_section, setting_of
from minitron_nemo.errors import UserError


@functools.cache
def opened(schema: type) -> type:
    """A dataclass like `schema` in which optional sections exist and mappings of sections take anything."""
    fields: list[Any] = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, inner = hints[field.name], inner_section(hints[field.name])
        if inner is None or typing.get_origin(hint) is list:
            default = {"default": field.default, "default_factory": field.default_factory}
            given: dict[str, Any] = {name: value for name, value in default.items() if value is not dataclasses.MISSING}
            fields.append((field.name, hint, dataclasses.field(**given)))
        elif typing.get_origin(hint) is dict:
            fields.append((field.name, dict[str, Any], dataclasses.field(default_factory=dict)))
        else:
            section = opened(inner)
            kind = section | None if is_optional(hint) else section
            fields.append((field.name, kind, dataclasses.field(default_factory=section)))
    return dataclasses.make_dataclass(schema.__name__, fields)


def is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (UnionType, typing.Union) and type(None) in typing.get_args(hint)


def drop_unset(values: Any, untouched: Any, schema: type) -> None:
    """Make every optional section in which nothing was set null, as it is in the real schema."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner, value = inner_section(hints[field.name]), values.get(field.name)
        if inner is None or not isinstance(value, dict) or typing.get_origin(hints[field.name]) is dict:
            continue
        if is_optional(hints[field.name]) and value == untouched[field.name]:
            values[field.name] = None
        else:
            drop_unset(value, untouched[field.name], inner)


def refuse_undeclared(values: Any, hint: Any, path: str) -> None:
    """`+foo=1` walks past a structured config, so compare keys with the declared fields ourselves."""
    inner = inner_section(hint)
    if typing.get_origin(hint) is dict and isinstance(values, dict):
        for key, value in values.items():
            refuse_undeclared(value, typing.get_args(hint)[1], f"{path}.{key}")
    elif typing.get_origin(hint) is list and isinstance(values, list):
        for index, value in enumerate(values):
            refuse_undeclared(value, typing.get_args(hint)[0], f"{path}[{index}]")
    elif inner is not None and isinstance(values, dict):
        hints = typing.get_type_hints(inner)
        for key, value in values.items():
            dotted = f"{path}.{key}" if path else str(key)
            if key not in hints:
                raise UserError(unknown_key(dotted))
            refuse_undeclared(value, hints[key], dotted)


def unknown_key(dotted: str, *, owner: str = "") -> str:
    """The refusal of a key that no section declares, with the keys that there are or what replaces it.

    `owner` is the class that lacks the key, for a refusal that does not say where in the config it is.
    """
    if (instead := advice(dotted, "")) is not None:
        return f"{dotted}: {instead}"
    *path, _ = dotted.replace("[", ".[").split(".")
    hint: Any = Config if path or not owner else getattr(schema_module, owner, Config)
    for word in path:
        section = inner_section(hint)
        hint = section if typing.get_origin(hint) in (dict, list) else typing.get_type_hints(section).get(word)
        if hint is None:
            return f"{dotted}: unknown key"
    if typing.get_origin(hint) is dict:
        return f"{dotted}: no such entry; a new one is added with +{dotted}=..."
    section = inner_section(hint)
    where = dotted.rpartition(".")[0] or ("the config" if section is Config else "this section")
    return f"{dotted}: unknown key" + (f"; {where} has {', '.join(typing.get_type_hints(section))}" if section else "")


def refuse_missing(values: Any, path: str) -> None:
    """Refuse a setting without a default that nothing has set."""
    if values == MISSING:
        raise UserError(f"{path} is not set: it has no default")
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        refuse_missing(value, f"{path}[{key}]" if isinstance(values, list) else f"{path}.{key}".lstrip("."))


def fill_places(config: Config) -> None:
    """Put every path that is not given where its field says, under `run_dir`."""
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            place, unless = setting_of(field).place, setting_of(field).unless
            if unless is not None and getattr(section, unless):
                continue
            if place is not None and getattr(section, field.name) is None:
                stem = Path(str(getattr(section, "checkpoint", ""))).name.removesuffix(".nemo")
                setattr(section, field.name, str(Path(config.run_dir) / place.replace("{checkpoint}", stem)))
