"""A fault put into the sources by hand, and the tests that should notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`find` stands exactly once in `file`; with `replace` in its place the code does what `breaks` says.

    `tests` are arguments of pytest, as typed, that name few tests and pass without the fault.
    """

    file: str
    breaks: str
    find: str
    replace: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.file.removeprefix('minitron_nemo/')}: {self.breaks}"
