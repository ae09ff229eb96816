"""YAML that nobody vouches for: mappings, lists and plain scalars, and nothing that refers, constructs or unfolds.

Refused are tags, anchors, aliases, merge keys, several documents, keys that come twice or are no text, nesting and
sizes without end. A plain scalar is null, true or false, a decimal number, or else text: dates, hours, and numbers of
other bases stay the text that they are.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

BYTES_LIMIT = 2**20  # the config of a model has a few thousand
EVENTS_LIMIT = 50_000
DEPTH_LIMIT = 32
DIGITS_LIMIT = 40
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}


def parse_yaml(data: bytes) -> Any:
    """The value that a YAML text stands for; ValueError, in one line, for any other text and for those above."""
    if len(data) > BYTES_LIMIT:
        raise ValueError(f"{len(data)} bytes of YAML; at most {BYTES_LIMIT} are read")
    try:
        return _Builder().build(_events(data.decode("utf-8")))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from None


def _events(text: str) -> Iterator[yaml.Event]:
    for count, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        if count >= EVENTS_LIMIT:
            raise ValueError(f"it has more than {EVENTS_LIMIT} parts")
        yield event


class _Builder:
    """Puts values together from the events of the parser, with no call for each level of nesting."""

    def __init__(self) -> None:
        self.open: list[Any] = []  # the containers that the next value lies in, the innermost last
        self.keys: list[Any] = []  # of each, the key that waits for its value; () where none does
        self.documents: list[Any] = []

    def build(self, events: Iterator[yaml.Event]) -> Any:
        for event in events:
            where = f"line {event.start_mark.line + 1}"  # type: ignore[union-attr]
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ValueError(f"{where}: anchors and aliases are not read; write the value out")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"{where}: the tag {ascii(event.tag)[:60]} is not read; nothing is constructed")  # type: ignore[attr-defined]
            if isinstance(event, yaml.ScalarEvent):
                self._put(_scalar(event, where), where)
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._enter({} if isinstance(event, yaml.MappingStartEvent) else [], where)
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                self.open.pop(), self.keys.pop()
            elif isinstance(event, yaml.DocumentStartEvent) and self.documents:
                raise ValueError(f"{where}: a second document begins; one is read")
        return self.documents[0] if self.documents else None

    def _enter(self, container: Any, where: str) -> None:
        if len(self.open) >= DEPTH_LIMIT:
            raise ValueError(f"{where}: nested more than {DEPTH_LIMIT} deep")
        self._put(container, where)
        self.open.append(container)
        self.keys.append(())

    def _put(self, value: Any, where: str) -> None:
        if not self.open:
            self.documents.append(value)
        elif isinstance(holder := self.open[-1], list):
            holder.append(value)
        elif self.keys[-1] == ():
            if not isinstance(value, str) or value == "<<":
                raise ValueError(f"{where}: the key {ascii(value)[:60]} is no name")
            if value in holder:
                raise ValueError(f"{where}: the key {ascii(value)[:60]} comes twice")
            self.keys[-1] = value
        else:
            holder[self.keys[-1]] = value
            self.keys[-1] = ()


def _scalar(event: yaml.ScalarEvent, where: str) -> Any:
    text = event.value
    if not event.implicit[0]:  # it is quoted
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        if len(text) > DIGITS_LIMIT:
            raise ValueError(f"{where}: a whole number of {len(text)} digits; at most {DIGITS_LIMIT} are read")
        return int(text)
    if _NUMBER.fullmatch(text) and len(text) <= DIGITS_LIMIT and not text.lstrip("+-").isdigit():
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{where}: {text} is too large for a number")
        return number
    return text
