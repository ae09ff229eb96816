"""Sign the manifest of an artefact, or verify its signature.

    python -m minitron_nemo.artefacts.sign --key PRIVATE.pem ARTEFACT
    python -m minitron_nemo.artefacts.sign --verify --key PUBLIC.pem ARTEFACT

`minitron_nemo.artefacts.signature` says what a signature is. A key is read where it lies and kept nowhere. Verifying
looks at the manifest alone: the files that it lists are hashed by every recipe that opens the artefact.
"""

import argparse
import sys
from collections.abc import Sequence

from minitron_nemo.artefacts.signature import sign, verify
from minitron_nemo.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when it is signed or verified, 2 with one line on standard error when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", required=True, help="PEM file: the private key to sign, the public one to verify")
    parser.add_argument("--verify", action="store_true", help="verify instead of signing")
    parser.add_argument("artefact", help="folder that a recipe published, or a packed .nemo")
    given = parser.parse_args(arguments)
    try:
        if given.verify:
            verify(given.artefact, given.key)
            print(f"{given.artefact}: verified")
        else:
            print(f"{given.artefact}: signed in {sign(given.artefact, given.key)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
