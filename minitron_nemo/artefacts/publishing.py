"""How an artefact appears: filled beside its place, completed by its manifest, put there by one rename.

It is a folder, or packed: one tar, into which its largest files are written at once and the small ones at the end.
"""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import contents_of, has
from minitron_nemo.artefacts.disk import free_bytes, in_bytes, writing
from minitron_nemo.artefacts.lock import Lock
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, Manifest, file_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.packed import PackedTar
from minitron_nemo.artefacts.signature import beside
from minitron_nemo.errors import UserError


def check_target(path: str | Path, *, overwrite: bool) -> None:
    """Refuse to publish over something: anything unless `overwrite`, and never what is not an artefact."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{path} exists already and was made by another configuration; set overwrite=true or move it")
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.is_symlink() or not (is_empty or _is_artefact(path)):
        raise UserError(f"{path} exists and is not an artefact of these recipes; it is never overwritten: move it")


def _is_artefact(path: Path) -> bool:
    try:
        return has(contents_of(path), MANIFEST_FILE)
    except UserError:
        return False


def check_free_space(path: str | Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes at `path` onto a disk that has less than 1.1 times that left."""
    free = free_bytes(path)
    if free < 1.1 * needed:
        raise UserError(f"{path}: needs {in_bytes(1.1 * needed)}, {in_bytes(free)} are free on that disk: make room")


@dataclass
class Draft:
    """An artefact in the making: a folder to fill, and what the manifest will say besides the files.

    Where it is to be one file, large files go into `tar` as they are written, and those of `folder` follow in the end.

    `hashes` takes the SHA-256 of files (by name relative to `folder`) that were hashed while they were written;
    `finish` reads the others. `lock` keeps other runs from the target until `finish` or `discard`.
    """

    folder: Path
    target: Path
    kind: str
    origin: Origin
    lock: Lock
    tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    tar: PackedTar | None = None

    def finish(self) -> Manifest:
        """Write the manifest and move the folder to its place; on one rank, when all are done."""
        check_target(self.target, overwrite=self.origin.overwrite)
        files = _list_files(self.folder, self.hashes)
        if self.tar is not None:
            files |= {name: {"size": size, "sha256": self.hashes[name]} for name, size in self.tar.sizes.items()}
        manifest = Manifest.of(self.kind, self.origin, files=files, tokens=self.tokens, extra=self.extra)
        (self.folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        if self.tar is None:
            fsync(self.folder / MANIFEST_FILE)
            fsync(self.folder)
            _move_into_place(self.folder, self.target)
        else:
            for name in [*sorted(set(files) - set(self.tar.sizes)), MANIFEST_FILE]:
                self.tar.add(name, (self.folder / name).read_bytes())
            self.tar.close()
            _move_into_place(self.tar.path, self.target)
            shutil.rmtree(self._temp)
        self.lock.release()
        return manifest

    @property
    def _temp(self) -> Path:
        return self.folder if self.tar is None else self.folder.parent

    def discard(self) -> None:
        """Remove what was made so far."""
        if self.tar is not None:
            self.tar.abandon()
        shutil.rmtree(self._temp, ignore_errors=True)
        self.lock.release()


def begin(
    target: str | Path,
    *,
    kind: str,
    origin: Origin,
    tokens: int = 0,
    extra: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> Draft:
    """A draft in a new empty folder beside `target`, of one file where it is `packed`; on one rank only.

    Raises UserError when another run is making the same, and when the disk takes nothing.
    """
    target = Path(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(target)
        try:
            _clear_up(target)
            check_target(target, overwrite=origin.overwrite)
            if packed and not origin.overwrite and os.path.lexists(beside(target)):
                raise UserError(f"{beside(target)}: the signature of what was {target} before; move it away")
            temp = _named(target, "tmp")
            temp.mkdir()
            folder, tar = temp, None
            if packed:
                folder, tar = temp / "files", PackedTar(temp / "tar")
                folder.mkdir()
        except BaseException:
            lock.release()
            raise
    return Draft(folder, target, kind, origin, lock, tokens, dict(extra or {}), tar=tar)


@contextmanager
def publishing(
    target: str | Path,
    *,
    kind: str,
    origin: Origin,
    tokens: int = 0,
    extra: Mapping[str, Any] | None = None,
    needed: int = 0,
    packed: bool = False,
) -> Iterator[Draft]:
    """A draft to fill; it becomes the artefact `target` when the block ends well and vanishes when it does not.

    UserError when the disk has less room than the bytes `needed`, or refuses something on the way.
    """
    check_free_space(target, needed)
    draft = begin(target, kind=kind, origin=origin, tokens=tokens, extra=extra, packed=packed)
    try:
        with writing(target, needed=needed):
            yield draft
            draft.finish()
    except BaseException:
        draft.discard()
        raise


def _list_files(folder: Path, hashes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_dir() and not file.is_symlink():
            fsync(file)
            continue
        name = file.relative_to(folder).as_posix()
        if name == MANIFEST_FILE:
            continue
        assert not file.is_symlink(), f"{file}: an artefact holds no links"
        fsync(file)
        files[name] = {"size": file.stat().st_size, "sha256": hashes.get(name) or file_sha256(file)}
    return files


def _named(target: Path, what: str) -> Path:
    """A new name beside the target, which `_clear_up` knows again."""
    return target.with_name(f"{target.name}.{what}-{secrets.token_hex(4)}")


def _clear_up(target: Path) -> None:
    """Take away what killed runs of the same step left behind: none that lives has the lock.

    What was there before goes back when they came no further than to move it aside.
    """
    name, hexadecimal = glob.escape(target.name), "[0-9a-f]" * 8
    for left in target.parent.glob(f"{name}.tmp-{hexadecimal}"):
        shutil.rmtree(left)
    for left in sorted(target.parent.glob(f"{name}.old-{hexadecimal}"), key=lambda path: -path.lstat().st_ctime_ns):
        if os.path.lexists(target):
            _remove(left)
        else:
            left.rename(target)


def _move_into_place(temp: Path, target: Path) -> None:
    """One rename; a folder that is in the place is moved aside before, and back when the rename fails.

    The signature of a packed artefact that was there is not one of the new artefact: it goes with the old one.
    """
    is_packed = temp.is_file() or target.is_file()
    aside = None
    if target.is_dir() or target.exists() and temp.is_dir():
        aside = _named(target, "old")
        target.rename(aside)
    try:
        temp.replace(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    if is_packed and not beside(target).is_dir():
        beside(target).unlink(missing_ok=True)
    fsync(target.parent)
    if aside is not None:
        _remove(aside)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
