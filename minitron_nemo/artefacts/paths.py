"""File names that came with somebody else's data, kept inside the folder they came in."""

import os
from pathlib import Path

from minitron_nemo.errors import UserError


def is_plain_name(name: str) -> bool:
    """True for a file name without any folder in it."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def contained_file(folder: str | Path, name: str) -> Path | None:
    """The regular file `name` of `folder`, None when there is nothing; UserError for a link that leads outside.

    What has the name and is no file (a folder, a pipe, a device, a link to nothing) is refused and never opened.

    The hub cache keeps a snapshot as links into the `blobs` folder beside it; those are inside.
    """
    folder, path = Path(folder), Path(folder) / name
    if not is_plain_name(name):
        raise UserError(f"{folder}: the file name {name!r} leaves the folder; only plain names are read")
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; put the file in its place, or move it away")
    real, root = path.resolve(), folder.resolve()
    inside = real.parent == root
    in_hub_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not inside and not in_hub_cache:
        raise UserError(f"{path}: a link out of its folder is not followed; copy the file in its place")
    return path
