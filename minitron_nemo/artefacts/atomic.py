"""Text files that are either as they were or whole, whenever the writer dies."""

import os
import secrets
from pathlib import Path

from minitron_nemo.artefacts.disk import writing


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to a file beside `path`, flush it to disk and rename it over `path`; makes its folder.

    What the disk refuses is a UserError.
    """
    path = Path(path)
    temp = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    with writing(path, needed=len(text)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temp.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
