"""What makes a folder an artefact: `manifest.json` with its kind, its origin and the hash of every file.

A folder is published by one rename, with the manifest written last: a manifest that is there means the
artefact is whole. A step that finds its output made by the same fingerprint has nothing to do.
"""

import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from minitron_nemo.errors import UserError

MANIFEST_FILE = "manifest.json"
PACKAGES = ("minitron_nemo", "torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Manifest:
    """The origin of an artefact and the size and SHA-256 of its files.

    `fingerprint` identifies what determined the content; `parents` maps a role (such as "teacher") to the
    SHA-256 of that artefact's manifest; `tokens` counts the tokens that this step trained on; `extra` holds free facts.
    """

    kind: str
    fingerprint: str
    config: dict[str, Any] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    git_revision: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def fingerprint_of(*parts: Any) -> str:
    """SHA-256, in hex, of JSON-able values; the order of keys does not matter."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_sha256(folder: str | Path) -> str:
    """What a child writes down under `parents`: the SHA-256 of the manifest of the artefact `folder`."""
    return file_sha256(Path(folder) / MANIFEST_FILE)


def read_manifest(folder: str | Path, *, kind: str | None) -> Manifest:
    """The manifest of an artefact of this kind (None: any); UserError when `folder` is anything else."""
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        reason = f"no {MANIFEST_FILE}" if Path(folder).is_dir() else "no such folder"
        what = f"{'an' if kind[0] in 'aeio' else 'a'} {kind} artefact" if kind else "an artefact"
        raise UserError(f"{folder} is not {what}: {reason}; give the folder that a recipe published")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**values)
        _check_fields(manifest)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest: {' '.join(str(error).split())}") from None
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder} is a {manifest.kind} artefact; a {kind} artefact is needed here")
    return manifest


def _check_fields(manifest: Manifest) -> None:
    types = {"kind": str, "fingerprint": str, "config": dict, "parents": dict, "tokens": int, "files": dict,
             "created": str, "versions": dict, "git_revision": str, "extra": dict}  # fmt: skip
    for name, expected in types.items():
        if not isinstance(getattr(manifest, name), expected):
            raise ValueError(f"{name} must be a {expected.__name__}")
    for name, entry in manifest.files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
            raise ValueError(f"file name {name!r} leaves the folder")
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            raise ValueError(f"file {name!r} has no size")
        if not isinstance(entry.get("sha256"), str):
            raise ValueError(f"file {name!r} has no sha256")


def check_sizes(folder: str | Path, manifest: Manifest) -> None:
    """Refuse, by name, the first file that is missing, a link or of another size; reads no content."""
    for name, entry in sorted(manifest.files.items()):
        path = Path(folder) / name
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: listed in {MANIFEST_FILE} but not a regular file there; make the artefact again")
        if (size := path.stat().st_size) != entry["size"]:
            raise UserError(f"{path}: {size} bytes, {MANIFEST_FILE} says {entry['size']}; make the artefact again")


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Refuse, by name, the first file whose size or SHA-256 is not that of the manifest."""
    check_sizes(folder, manifest)
    for name, entry in sorted(manifest.files.items()):
        if file_sha256(Path(folder) / name) != entry["sha256"]:
            raise UserError(f"{Path(folder) / name}: damaged: its SHA-256 is not that of {MANIFEST_FILE}")


def is_current(path: str | Path, fingerprint: str) -> bool:
    """True when an artefact is there, complete by file sizes, and made by this fingerprint."""
    try:
        manifest = read_manifest(path, kind=None)
        check_sizes(path, manifest)
    except (OSError, UserError):
        return False
    return manifest.fingerprint == fingerprint


def check_target(path: str | Path, *, overwrite: bool) -> None:
    """Refuse to publish over something: anything unless `overwrite`, and never what is not an artefact."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{path} exists already and was made by another configuration; set overwrite=true or move it")
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.is_symlink() or not (is_empty or (path / MANIFEST_FILE).is_file()):
        raise UserError(f"{path} exists and is not an artefact of these recipes; it is never overwritten: move it")


def check_free_space(path: str | Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes at `path` onto a disk that has less than 1.1 times that left."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise UserError(f"{path}: needs {1.1 * needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on that disk")


def begin(path: str | Path, *, overwrite: bool = False) -> Path:
    """A new empty folder beside `path`, to be filled and then given to `finish`; on one rank only."""
    path = Path(path)
    check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        shutil.rmtree(left)  # what a killed run of the same step left behind
    temp = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    temp.mkdir()
    return temp


def finish(
    temp: Path,
    path: str | Path,
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    tokens: int = 0,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    hashes: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash the files of `temp`, write its manifest and rename it to `path`; on one rank, when all are done.

    `hashes` gives the SHA-256 of files (by name relative to `temp`) that were hashed while being written.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        config=dict(config),
        parents=dict(parents),
        tokens=tokens,
        files=_list_files(temp, dict(hashes or {})),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        git_revision=_git_revision(),
        extra=dict(extra or {}),
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=2, allow_nan=False)
    (temp / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    _fsync(temp / MANIFEST_FILE)
    _fsync(temp)
    _move_into_place(temp, path)
    return manifest


def _list_files(folder: Path, hashes: dict[str, str]) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_dir() and not file.is_symlink():
            _fsync(file)
            continue
        name = file.relative_to(folder).as_posix()
        if name == MANIFEST_FILE:
            continue
        assert not file.is_symlink(), f"{file}: an artefact holds no links"
        _fsync(file)
        files[name] = {"size": file.stat().st_size, "sha256": hashes.get(name) or file_sha256(file)}
    return files


def _move_into_place(temp: Path, path: Path) -> None:
    aside = None
    if path.exists():
        aside = path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")
        path.rename(aside)
    temp.rename(path)
    _fsync(path.parent)
    if aside is not None:
        shutil.rmtree(aside)


@contextmanager
def publishing(
    path: str | Path,
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    tokens: int = 0,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    hashes: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """A folder to fill; it becomes the artefact `path` when the block ends well and vanishes when it does not.

    `hashes` may be filled inside the block.
    """
    temp = begin(path, overwrite=overwrite)
    try:
        yield temp
        finish(temp, path, kind=kind, fingerprint=fingerprint, config=config, parents=parents, tokens=tokens,
               extra=extra, overwrite=overwrite, hashes=hashes)  # fmt: skip
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_revision() -> str:
    """The commit of this source tree, empty when it is not a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
