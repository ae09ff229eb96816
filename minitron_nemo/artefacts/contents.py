"""The files of a checkpoint or an artefact, in a folder or inside of one tar: looked up by name, read where they lie.

A tar is never extracted. Its headers are read once, under a budget of bytes, and an entry that is anything but a
regular file with a plain name refuses all of it.
"""

import os
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol

from minitron_nemo.artefacts.paths import contained_file, is_plain_name
from minitron_nemo.artefacts.stretch import OverBudgetError, Stretch, StretchFile
from minitron_nemo.errors import UserError

SMALL_LIMIT = 128 * 2**20  # bytes; the tokenizer.json of a quarter of a million words has a quarter of it
HEADERS_LIMIT = 32 * 2**20  # bytes; a header has 512, and at most a few kB with long names
MEMBERS_LIMIT = 20_000  # a checkpoint of a thousand ranks has a few thousand files
FILES_LIMIT = 100_000  # of a folder, with the folders in it: one of zarr has a file for each chunk
END_LIMIT = 2**20  # bytes of nothing at the end of a tar; archivers fill up to 10 kB, some to 512
DEPTH_LIMIT = 8
NAME_LIMIT = 250  # characters
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Contents(Protocol):
    """Files by their relative names, with `/` between folders."""

    @property
    def path(self) -> Path:
        """What the user gave, and the folder inside of it: for messages, as a tar has no path to open there."""

    def names(self) -> list[str]:
        """Everything that is there and is no folder, sorted."""

    def find(self, name: str) -> Stretch | None:
        """Where the bytes of a file lie, None when there is nothing of that name.

        UserError for a name that leaves the folder, a link out of it and what is not a regular file.
        """

    def inside(self, folder: str) -> "Contents":
        """What lies under `folder`; nothing when there is no such folder."""


Place = str | Path | Contents  # what functions take that read an artefact


def contents_of(path: Place) -> Contents:
    """The contents of a folder or of a tar; nothing at all where nothing is. UserError for any other file."""
    if not isinstance(path, str | Path):
        return path
    return TarContents(Path(path)) if Path(path).is_file() else FolderContents(Path(path))


def read_small(contents: Contents, name: str, *, limit: int = SMALL_LIMIT) -> bytes:
    """All of a file; UserError when it is not there, or has more bytes than `limit`."""
    found = contents.find(name)
    if found is None:
        raise UserError(f"{contents.path / name}: no such file")
    if found.length > limit:
        raise UserError(f"{contents.path / name}: {found.length} bytes; no such file needs more than {limit}")
    return found.read()


def has(contents: Contents, name: str) -> bool:
    """Whether there is a regular file of this name."""
    return contents.find(name) is not None


def _is_contained(name: str) -> bool:
    return all(is_plain_name(part) for part in name.split("/"))


def _is_sane(name: str) -> bool:
    return name.isprintable() and len(name) <= NAME_LIMIT and len(PurePosixPath(name).parts) <= DEPTH_LIMIT


@dataclass(frozen=True)
class FolderContents:
    """The files of a folder on the disk, which lies inside of `root` where it is part of a checkpoint."""

    path: Path
    root: Path | None = None

    def names(self) -> list[str]:
        found: list[str] = []
        folders = [""] if self.path.is_dir() and self._holds(self.path) else []
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self.path / folder) as entries:
                    for entry in entries:
                        # A link is listed and never followed.
                        is_folder = entry.is_dir(follow_symlinks=False)
                        (folders if is_folder else found).append(f"{folder}{entry.name}{'/' if is_folder else ''}")
                        if len(found) + len(folders) > FILES_LIMIT:
                            raise UserError(f"{self.path}: more than {FILES_LIMIT} files; no checkpoint has that many")
            except OSError as error:
                raise UserError(f"{self.path / folder}: cannot be read: {error.strerror}") from None
        return sorted(found)

    def find(self, name: str) -> Stretch | None:
        file = self.path / name
        if not _is_contained(name) or not self._holds(file.parent):
            raise UserError(f"{self.path}: the file name {name!r} leaves the folder; only names inside of it are read")
        found = contained_file(file.parent, file.name)
        return None if found is None else Stretch(found, 0, found.stat().st_size)

    def inside(self, folder: str) -> "FolderContents":
        return FolderContents(self.path / folder, self.root or self.path)

    def _holds(self, folder: Path) -> bool:
        """Whether a folder lies inside, links followed."""
        return folder.resolve().is_relative_to((self.root or self.path).resolve())


@dataclass(frozen=True)
class TarContents:
    """The files of an uncompressed tar, below `prefix`."""

    archive: Path
    prefix: str = ""

    @property
    def path(self) -> Path:
        return self.archive / self.prefix

    @cached_property
    def _members(self) -> dict[str, Stretch]:
        members = tar_members(self.archive)
        return {n.removeprefix(self.prefix): at for n, at in members.items() if n.startswith(self.prefix)}

    def names(self) -> list[str]:
        return sorted(self._members)

    def find(self, name: str) -> Stretch | None:
        if not _is_contained(name):
            raise UserError(f"{self.path}: the file name {name!r} leaves the archive; only names inside of it are read")
        return self._members.get(name)

    def inside(self, folder: str) -> "TarContents":
        return TarContents(self.archive, f"{self.prefix}{folder}/")


def tar_members(archive: Path) -> dict[str, Stretch]:
    """Where each regular file of a tar lies, by name; UserError, by name, for what no checkpoint has in it.

    Refused are links, devices, pipes, sparse files, absolute names and such that climb out, names that come twice or
    are no text, and headers without end.
    """
    with archive.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(2)
        if magic in COMPRESSED:
            raise UserError(f"{archive}: compressed with {COMPRESSED[magic]}; it is read in place: decompress it first")
        try:
            return _read_headers(archive, StretchFile(file, 0, size, budget=HEADERS_LIMIT))
        except UserError:
            raise
        except OverBudgetError:
            raise UserError(f"{archive}: its headers have over {HEADERS_LIMIT} bytes, no checkpoint has") from None
        # Headers that make no sense raise nearly anything in the library; whatever it is, the archive is refused.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{archive}: neither a folder nor a readable tar: {reason}") from None


def _read_headers(archive: Path, file: StretchFile) -> dict[str, Stretch]:
    members: dict[str, Stretch] = {}
    # `errors` as it is: a name that is no UTF-8 has surrogates then, which are refused below.
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        for count, member in enumerate(tar):
            if count >= MEMBERS_LIMIT:
                raise UserError(f"{archive}: more than {MEMBERS_LIMIT} entries; no checkpoint has that many")
            name = member.name.removeprefix("./") if member.name != "." else ""
            shown = ascii(member.name)[:80]
            if member.isdir() and name == "":
                continue
            if not _is_contained(name) or not _is_sane(name):
                raise UserError(f"{archive}: the entry {shown} has a name that leaves the archive or is no file name")
            if member.isdir() and member.size == 0:
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"{archive}: the entry {shown} is a link, a device or sparse; only files are read")
            if name in members:
                raise UserError(f"{archive}: the entry {shown} comes twice; nobody can say which one is meant")
            size = member.pax_headers.get("size", "0")
            if not (size.isascii() and size.isdigit()):  # the library takes other scripts' digits, or the older field
                raise UserError(f"{archive}: the entry {shown} has a size that is no number")
            if member.size < 0 or member.offset_data + member.size > file.length:
                raise UserError(f"{archive}: the entry {shown} is longer than the archive; it was cut short")
            members[name] = Stretch(archive, member.offset_data, member.size)
        _check_end(archive, file, tar.offset)
    _check_no_file_is_a_folder(archive, members)
    return members


def _check_end(archive: Path, file: StretchFile, at: int) -> None:
    """Refuse what is no end, which the library takes for one, and what lies behind it, which some archivers read on."""
    file.seek(at)
    rest = file.read(END_LIMIT + 1)
    if rest[: tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE:
        raise UserError(f"{archive}: no entry and no mark of its end at byte {at}; damaged or cut short")
    if len(rest) > END_LIMIT or rest.strip(b"\0"):
        raise UserError(f"{archive}: something lies behind the mark of its end at byte {at}; pack one archive alone")


def _check_no_file_is_a_folder(archive: Path, members: dict[str, Stretch]) -> None:
    for name in members:
        for parent in PurePosixPath(name).parents:
            if str(parent) in members:
                raise UserError(f"{archive}: {str(parent)!a} is a file and the folder of {name!a} at once")
