"""JSON that nobody vouches for: parsed under a budget, and refused where two readers could understand it differently.

Refused are keys that come twice, NaN and infinities, whole numbers of absurd length, halves of surrogate pairs, nesting
without end, and texts whose values would take far more memory than their bytes.
"""

import json
import math
import re
from typing import Any, NoReturn

MEMORY_LIMIT = 256 * 2**20  # bytes that the values may take; those of a tokenizer of a million words take 240 MiB
DEPTH_LIMIT = 64
DIGITS_LIMIT = 40  # transformers writes 10^30 for "no limit"
# What a list, a dict and any other value take at least, with their place in what holds them; they are counted by the
# marks that begin or divide them, which strings may hold too.
_COSTS = ((b"{", 240), (b"[", 100), (b",", 48))
# Without such digits no number can be too large. Each digit stands for any: a search for a text is fast, as one for an
# expression is not, and most files have none.
_LARGE = (b"0" * (DIGITS_LIMIT + 1), b"e000", b"e+000")
_AS_ZERO = bytes.maketrans(b"123456789E", b"000000000e")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: bytes | str, *, infinities: bool = False) -> Any:
    """The value that a JSON text stands for; ValueError, in one line, for any other text and for those above.

    With `infinities` those that Python writes are numbers too.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    cost = sum(bytes_each * data.count(mark) for mark, bytes_each in _COSTS)
    if cost > MEMORY_LIMIT:
        raise ValueError(f"its values would take more than {MEMORY_LIMIT >> 20} MiB of memory")
    hooks: dict[str, Any] = {"parse_int": _whole_number, "parse_float": _number} if _may_be_large(data) else {}
    constant = float if infinities else _no_number
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=constant, **hooks)
    except RecursionError:
        raise ValueError("nested without end") from None
    _check_depth(value)
    if _SURROGATE.search(data):
        _check_text(value)
    return value


def _may_be_large(data: bytes) -> bool:
    digits = data.translate(_AS_ZERO)
    return any(part in digits for part in _LARGE)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {ascii(twice)[:60]} comes twice in one object")
    return values


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS_LIMIT:
        raise ValueError(f"a whole number of {len(digits)} digits; at most {DIGITS_LIMIT} are read")
    return int(digits)


def _number(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:DIGITS_LIMIT]} is too large for a number")
    return number


def _check_depth(value: Any) -> None:
    """Refuse lists and objects inside of each other beyond the limit, walking level by level."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {DEPTH_LIMIT} deep")


def _check_text(value: Any) -> None:
    """Refuse strings that no file can hold: half of a surrogate pair is no character."""
    values = [value]
    while values:
        inner = values.pop()
        if isinstance(inner, dict):
            values += [*inner, *inner.values()]
        elif isinstance(inner, list):
            values += inner
        elif isinstance(inner, str):
            try:
                inner.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"the string {ascii(inner)[:60]} has half of a surrogate pair") from None
