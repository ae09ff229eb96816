"""Audit: what a checkpoint is, and whether it is sound; any format, without a GPU and without loading it.

    python recipes/audit.py CHECKPOINT [--json] [--values] [--no-hashes | --key PUBLIC.pem]

Exit code 0 when it is sound, 2 when it is not: the first fault is named in one line. With a key, what it did
not sign is not sound.
"""

import argparse
import json
import sys

from minitron_nemo.cli import leave, run_safely
from minitron_nemo.errors import UserError


def arguments_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python recipes/audit.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="a folder or a .nemo file, of any format in docs/formats.md")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--values", action="store_true", help="read every weight and tell whether all are finite")
    less_or_more = parser.add_mutually_exclusive_group()
    less_or_more.add_argument("--no-hashes", action="store_true", help="go by the sizes of files alone")
    less_or_more.add_argument(
        "--key", help="PEM file of a public key: its signature must be there, and all hashes hold"
    )
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    if words == ["--processes"]:
        print("one")
        return 0
    asked = arguments_of(words)

    def report() -> None:
        from minitron_nemo.checkpoint.audit import audit, in_lines  # brings torch

        found = audit(asked.checkpoint, hashes=not asked.no_hashes, values=asked.values, key=asked.key)
        print(json.dumps(found.to_dict(), indent=2) if asked.json else in_lines(found))
        if found.fault is not None:
            raise UserError(found.fault)

    return run_safely(report)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
