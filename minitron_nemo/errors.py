"""What stops a command: bad input, which the user is meant to read, or a rank that failed."""


class UserError(Exception):
    """Bad input: the message says what was given, what is allowed and how to fix it, in one line.

    Entry points print it as `error: ...` and exit with code 2. Anything else is a defect of ours and
    keeps its traceback.
    """


class RankError(RuntimeError):
    """A rank stopped with a defect; its traceback is already on standard error."""
