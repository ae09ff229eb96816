"""What is known of one setting: help, range, unit and role, said beside its declaration in the schema.

`setting` declares, `check_ranges` walks a section and refuses what a range excludes. OmegaConf checks the types.
"""

import copy
import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from minitron_nemo.errors import UserError

KEY = "setting"  # of the record in a field's metadata
# No real run comes near; a slip of the keyboard does, and must be refused before it fills a machine.
MAX_SIZE = 10**7


@dataclass(frozen=True)
class Setting:
    """What a field of the schema says of itself; in lists and mappings the range is that of each entry.

    `how_it_runs`: it changes how a step runs and not what it makes, so no fingerprint holds it. A `path` is such a
    setting: what lies there is hashed by its content. `place`: where the path is under `run_dir` when none is given;
    `{checkpoint}` stands for the name of the section's checkpoint; `unless` another field of the section, which says
    something, stands in for the path. `later`: declared after outputs existed; at its
    default no fingerprint holds it, so that those outputs stay current.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    length: int | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    form: str = ""  # the pattern in words
    unit: str = ""
    how_it_runs: bool = False
    later: bool = False
    path: bool = False
    place: str | None = None
    unless: str | None = None

    @property
    def allowed(self) -> str:
        """The range in words, empty where the type says all."""
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        words = [f"{word} {number(bound)}" for word, bound in bounds if bound is not None]
        if self.choices:
            words.append("one of " + ", ".join(self.choices))
        if self.multiple_of is not None:
            words.append("even" if self.multiple_of == 2 else f"a multiple of {self.multiple_of}")
        if self.form:
            words.append(self.form)
        return " and ".join(words)

    def refusal(self, value: Any) -> str | None:
        """Why one value is not allowed; None when it is."""
        if isinstance(value, str):
            if not value.strip() or "\0" in value:
                return "must not be empty" if not value.strip() else "must hold no NUL"
            wrong = bool(self.choices) and value not in self.choices
            wrong = wrong or (self.pattern is not None and not re.fullmatch(self.pattern, value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                return "must be a finite number" + (f", {self.allowed}" if self.allowed else "")
            wrong = not self._contains(value)
        else:
            return None
        return f"must be {self.allowed}" if wrong else None

    def _contains(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    multiple_of: int | None = None,
    length: int | None = None,
    choices: Sequence[str] = (),
    pattern: str | None = None,
    form: str = "",
    unit: str = "",
    how_it_runs: bool = False,
    later: bool = False,
    path: bool = False,
    place: str | None = None,
    unless: str | None = None,
) -> Any:
    """A dataclass field with its `Setting`; a list, mapping or section as default is copied for each section."""
    known = Setting(
        help=help,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        multiple_of=multiple_of,
        length=length,
        choices=tuple(choices),
        pattern=pattern,
        form=form,
        unit=unit,
        how_it_runs=how_it_runs,
        later=later,
        path=path,
        place=place,
        unless=unless,
    )
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata={KEY: known})
    return dataclasses.field(default=default, metadata={KEY: known})


def count(
    default: Any,
    help: str,
    *,
    at_least: int = 1,
    at_most: int = MAX_SIZE,
    unit: str = "",
    how_it_runs: bool = False,
    later: bool = False,
) -> Any:
    """A field that holds a whole number of things."""
    return setting(default, help, at_least=at_least, at_most=at_most, unit=unit, how_it_runs=how_it_runs, later=later)


def path(help: str, *, default: Any = None, place: str | None = None, unless: str | None = None) -> Any:
    """A field that holds the path of something."""
    return setting(default, help, how_it_runs=True, path=True, place=place, unless=unless)


def setting_of(field: "dataclasses.Field[Any]") -> Setting:
    """What a field says of itself; a section declared without `setting` says nothing."""
    return field.metadata.get(KEY, Setting(help=""))


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """What a field holds when nothing is given; MISSING of dataclasses where it has no default."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def inner_section(hint: Any) -> type | None:
    """The dataclass in a type hint: `X`, `X | None`, `list[X]` or `dict[str, X]`."""
    return next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)  # type: ignore


def number(value: float) -> str:
    """A bound as people write it: `10^7`, `0.5`, `4294967295`."""
    digits = str(value)
    return f"10^{len(digits) - 1}" if re.fullmatch("10{5,}", digits) else digits


def check_ranges(section: Any, prefix: str = "") -> None:
    """Refuse the first value anywhere in a section that its field's range excludes."""
    for refusal in _refusals(section, prefix):
        raise UserError(refusal)


def _refusals(section: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(section):
        value, key, known = getattr(section, field.name), prefix + field.name, setting_of(field)
        if dataclasses.is_dataclass(value):
            yield from _refusals(value, f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if not str(name).strip():
                    yield f"{key}: a name in it is empty"
                yield from _entry_refusals(entry, f"{key}.{name}", known, shown=entry)
        elif isinstance(value, list):
            if known.length is not None and len(value) != known.length:
                yield f"{key}={given(value)}: must have {known.length} entries"
            for index, entry in enumerate(value):
                inner = dataclasses.is_dataclass(entry)
                place = f"{key}[{index}]" if inner else key
                yield from _entry_refusals(entry, place, known, shown=value, each="" if inner else "each ")
        else:
            yield from _entry_refusals(value, key, known, shown=value)


def _entry_refusals(entry: Any, key: str, known: Setting, *, shown: Any, each: str = "") -> Iterator[str]:
    if dataclasses.is_dataclass(entry):
        yield from _refusals(entry, f"{key}.")
    elif (why := known.refusal(entry)) is not None:
        yield f"{key}={given(shown)}: {each}{why}"


def given(value: Any) -> str:
    """A value in a one-line message: short, printable, and visible when it is empty."""
    value = value.value if isinstance(value, Enum) else value
    text = value if isinstance(value, str) and value.isprintable() and value.strip() else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
