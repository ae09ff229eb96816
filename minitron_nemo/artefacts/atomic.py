"""Text files that are either as they were or whole, whenever the writer dies."""

import os
import secrets
from pathlib import Path


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to a file beside `path`, flush it to disk and rename it over `path`."""
    path = Path(path)
    temp = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with temp.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
