"""What stops a command: bad input, which the user is meant to read, a wish to stop, or a rank that failed."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 990  # characters of a message


def printable(text: str) -> str:
    """A text in one line: what would move the cursor, turn the direction or be no character at all is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """Bad input: the message says what was given, what is allowed and how to fix it, in one line.

    Entry points print it as `error: ...` and exit with code 2. Anything else is a defect of ours and
    keeps its traceback. Names and values in it are somebody else's: it is one line, of a length that can be read,
    whatever they are.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-290:]}"


class StoppedError(Exception):
    """Work was asked to stop and did: everything is saved, and the same command goes on from there.

    Entry points print it and exit with code 75.
    """


class RankError(RuntimeError):
    """A rank stopped with a defect; its traceback is already on standard error."""


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts the name of what was read before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def shown(value: object) -> str:
    """A value as a message shows it: ASCII, and not more than 60 characters of it."""
    text = ascii(value)
    return text if len(text) < 60 else text[:57] + "..."
