"""Tables of every setting, rendered from the schema: for docs/configuration.md and for `--help`.

python -m minitron_nemo.config.document docs/configuration.md   rewrites the tables of that page in place
"""

import dataclasses
import inspect
import os
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from minitron_nemo.config.closing import is_optional
from minitron_nemo.config.schema import MISSING, Config, TrainingConfig
from minitron_nemo.config.setting import Setting, inner_section, setting_of
from minitron_nemo.config.shapes import ModelConfig

# Sections that occur in several places and have one table.
SHARED: dict[type, str] = {TrainingConfig: "training", ModelConfig: "model"}
TYPES = {int: "int", float: "float", bool: "bool", str: "text"}


@dataclasses.dataclass(frozen=True)
class Row:
    key: str
    type: str
    default: str
    known: Setting

    @property
    def allowed(self) -> str:
        return f"{self.known.allowed} {self.known.unit}".strip()


def rows(schema: type, prefix: str = "", *, shared: bool = True) -> Iterator[Row]:
    """Every setting of a section; with `shared`, sections that have a table of their own are left to it."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, key = hints[field.name], prefix + field.name
        inner = inner_section(hint)
        if hint is not inner:
            yield Row(key, _type_name(hint), _default_name(field), setting_of(field))
        if inner is not None and not (inner is ModelConfig and prefix) and not (shared and inner in SHARED):
            suffix = {"dict": ".<name>", "list": "[]"}.get(getattr(typing.get_origin(hint), "__name__", ""), "")
            yield from rows(inner, f"{key}{suffix}.", shared=shared)


def _type_name(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return f"name: {_type_name(arguments[1])}"
    if is_optional(hint):
        return f"{_type_name(arguments[0])} or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return TYPES.get(hint, "section")


def _default_name(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            return f"{len(value)} {field.name}"
    else:
        value = field.default
    if value == MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    if isinstance(value, list):
        value = [entry.value if isinstance(entry, Enum) else entry for entry in value]
    return f"`{value.value if isinstance(value, Enum) else value}`"


def settings_page() -> str:
    """`Every setting` of docs/configuration.md: a heading, the section's docstring and a table for each."""
    hints = typing.get_type_hints(Config)
    sections = {name: part for name, hint in hints.items() if (part := inner_section(hint)) is not None}
    top = [row for row in rows(Config) if "." not in row.key and row.key not in sections]
    parts = ["### Top level", _table(top)]
    described: set[type] = set()
    for name, part in sections.items():
        parts += _section_parts(name, part)
        for shared, title in SHARED.items():
            inside = [field for field, hint in typing.get_type_hints(part).items() if hint is shared]
            parts += [f"and everything under `{name}.{field}`, see [{title}](#{title})." for field in inside]
            if inside and shared not in described:
                described.add(shared)
                parts += _section_parts(title, shared)
    return "\n\n".join(parts)


def _section_parts(name: str, part: type) -> list[str]:
    return [f"### {name}", inspect.cleandoc(part.__doc__ or ""), _table(list(rows(part, f"{name}.")))]


def _table(lines: list[Row]) -> str:
    cells = [(f"`{row.key}`", row.type, row.default, row.allowed, row.known.help) for row in lines]
    return _markdown(("key", "type", "default", "allowed", "meaning"), cells)


def _markdown(head: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *cells))


def places_page() -> str:
    """Where each path is under `run_dir` when none is given."""
    cells = [
        (f"`{row.key}`", f"`{row.known.place.replace('{checkpoint}', '<name of the checkpoint>')}`")
        for row in rows(Config)
        if row.known.place is not None
    ]
    return _markdown(("setting", "place under `run_dir`"), cells)


def settings_help(section: str) -> str:
    """The settings of one section for a terminal."""
    part = inner_section(typing.get_type_hints(Config)[section])
    assert part is not None
    lines = []
    for row in rows(part, f"{section}.", shared=False):
        place = "" if row.known.place is None else f"under run_dir: {row.known.place}"
        facts = [row.type, row.default if row.default == "required" else f"default {row.default}", place, row.allowed]
        lines.append(f"  {row.key}  ({', '.join(fact for fact in facts if fact)})".replace("`", ""))
        lines += textwrap.wrap(row.known.help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def documented(page: str) -> str:
    """A page with what lies between its markers rendered anew."""
    for name, text in (("settings", settings_page()), ("places", places_page())):
        marked = re.compile(rf"(<!-- {name}: .*?-->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
        page, found = marked.subn(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)  # type: ignore
        if found != 1:
            raise ValueError(f"the page has {found} blocks marked {name!r}, not one")
    return page


def main(arguments: list[str]) -> None:
    page = Path(arguments[0])
    temp = page.with_name(f".{page.name}.{os.getpid()}")
    temp.write_text(documented(page.read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(temp, page)


if __name__ == "__main__":
    main(sys.argv[1:])
