"""What makes a folder an artefact: `manifest.json` with its kind, its origin and the hash of every file.

The manifest is written last, before the one rename that publishes the folder (`artefacts.publishing`): a manifest that
is there means the artefact is whole.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import Any

from minitron_nemo.artefacts.contents import MEMBERS_LIMIT, Place, contents_of, has, read_small
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.signature import MANIFEST_FILE, SIGNATURE_FILE, check_signature, is_asked_for
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError
from minitron_nemo.progress import progress

BLOCK = 16 << 20  # bytes read at a time
THREADS = 4  # that hash beside each other; a fast disk gives more than four cores hash
LIMIT = 16 * 2**20  # bytes of a manifest; ten thousand ancestors have two of them
WORTH_A_LINE = 1 << 30  # bytes: hashing less takes a second or two
PACKAGES = ("minitron_nemo", "torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Manifest:
    """The origin of an artefact and the size and SHA-256 of its files.

    `fingerprint`, `config`, `parents` and `command` are those of its `Origin`; `tokens` counts the tokens that this
    step trained on; `extra` holds free facts, among them the `lineage` of an artefact that has parents.
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
    command: str = ""

    @classmethod
    def of(
        cls,
        kind: str,
        origin: Origin,
        *,
        files: Mapping[str, dict[str, Any]],
        tokens: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> "Manifest":
        """The manifest of an artefact that is made now, here."""
        return cls(
            kind=kind,
            fingerprint=origin.fingerprint,
            config=dict(origin.config),
            parents=dict(origin.parents),
            tokens=tokens,
            files=dict(files),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            git_revision=_git_revision(),
            extra={**(extra or {}), **({"lineage": list(map(dict, origin.lineage))} if origin.lineage else {})},
            command=origin.command,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"


def file_sha256(file: str | Path | Stretch, *, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, or of a stretch of one, in hex; `advance` is told of the bytes as they are read."""
    stretch, digest, done = file if isinstance(file, Stretch) else Stretch.whole(file), hashlib.sha256(), 0
    with stretch.path.open("rb") as opened:
        opened.seek(stretch.start)
        while block := opened.read(min(BLOCK, stretch.length - done)):
            digest.update(block)
            done += len(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


def manifest_sha256(artefact: Place) -> str:
    """What a child writes down under `parents`: the SHA-256 of the manifest of an artefact."""
    return hashlib.sha256(read_small(contents_of(artefact), MANIFEST_FILE)).hexdigest()


def read_manifest(artefact: Place, *, kind: str | None) -> Manifest:
    """The manifest of an artefact of this kind (None: any), in a folder or packed; UserError for anything else."""
    contents = contents_of(artefact)
    folder, path = contents.path, contents.path / MANIFEST_FILE
    if not has(contents, MANIFEST_FILE):
        reason = f"no {MANIFEST_FILE}" if os.path.lexists(folder) else "no such folder"
        if kind == "model":
            raise UserError(f"{folder} is not a .nemo model folder: {reason}; import_hf or random_init make one")
        what = f"{'an' if kind[0] in 'aeio' else 'a'} {kind} artefact" if kind else "an artefact"
        raise UserError(f"{folder} is not {what}: {reason}; give the folder that a recipe published")
    try:
        values = parse_json(read_small(contents, MANIFEST_FILE, limit=LIMIT))
        manifest = Manifest(**values)
        _check_fields(manifest)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest: {' '.join(str(error).split())}") from None
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder} is a {manifest.kind} artefact; a {kind} artefact is needed here")
    return manifest


def _check_fields(manifest: Manifest) -> None:
    types = {"kind": str, "fingerprint": str, "config": dict, "parents": dict, "tokens": int, "files": dict,
             "created": str, "versions": dict, "git_revision": str, "extra": dict, "command": str}  # fmt: skip
    for name, expected in types.items():
        if not isinstance(getattr(manifest, name), expected):
            raise ValueError(f"{name} must be a {expected.__name__}")
    if isinstance(manifest.tokens, bool) or manifest.tokens < 0:
        raise ValueError("tokens must be a count")
    if not all(isinstance(sha, str) for sha in manifest.parents.values()):
        raise ValueError("parents must map roles to hashes")
    if len(manifest.files) > MEMBERS_LIMIT:
        raise ValueError(f"files lists {len(manifest.files)}; at most {MEMBERS_LIMIT} are read")
    if not manifest.files:
        raise ValueError("files lists nothing, and every artefact holds something")
    for name, entry in manifest.files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
            raise ValueError(f"file name {name!r} leaves the folder")
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            raise ValueError(f"file {name!r} has no size")
        if not isinstance(entry.get("sha256"), str):
            raise ValueError(f"file {name!r} has no sha256")


def check_sizes(artefact: Place, manifest: Manifest) -> None:
    """Refuse, by name, the first file that is missing, a link or of another size; reads no content."""
    contents = contents_of(artefact)
    for name, entry in sorted(manifest.files.items()):
        found, label = contents.find(name), contents.path / name
        if found is None or label.is_symlink():
            raise UserError(f"{label}: listed in {MANIFEST_FILE} but not a regular file there; make the artefact again")
        if found.length != entry["size"]:
            raise UserError(
                f"{label}: {found.length} bytes, {MANIFEST_FILE} says {entry['size']}; make the artefact again"
            )


def check_listed(artefact: Place, manifest: Manifest) -> None:
    """Refuse, by name, the first file that the manifest does not list.

    Dot files at the top (`.git`, `.DS_Store`) are nobody's content and pass.
    """
    contents = contents_of(artefact)
    for name in contents.names():
        is_known = name in manifest.files or name in (MANIFEST_FILE, SIGNATURE_FILE)
        if not is_known and not name.startswith("."):
            raise UserError(
                f"{contents.path / name}: not listed in {MANIFEST_FILE}; move it away, or make the artefact again"
            )


def damaged(path: Path) -> UserError:
    """The refusal of a file whose content is not what was published."""
    return UserError(f"{path}: damaged: its SHA-256 is not that of {MANIFEST_FILE}")


def verify_files(
    artefact: Place, manifest: Manifest, *, part: int = 0, parts: int = 1, leave: Container[str] = ()
) -> None:
    """Refuse, by name, the first file that is not listed or whose size or SHA-256 is not that of the manifest.

    Of `parts` processes that share the reading, each hashes the files of its `part`, from 0. Files to `leave` are
    hashed by who reads them.
    """
    contents = contents_of(artefact)
    check_listed(contents, manifest)
    check_sizes(contents, manifest)
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name]["size"], name))
    own = sorted(name for name in by_size[part::parts] if name not in leave)
    total = sum(manifest.files[name]["size"] for name in own)
    is_worth_a_line = part == 0 and total >= WORTH_A_LINE
    with (
        progress(total, f"verify {contents.path.name}", unit="byte", enabled=is_worth_a_line) as bar,
        _hashing(bar.advance, threads=THREADS if parts == 1 else 1) as hashing,
    ):
        hashes = {name: hashing(found) for name in own if (found := contents.find(name)) is not None}
        for name in own:
            if name not in hashes or hashes[name].result() != manifest.files[name]["sha256"]:
                raise damaged(contents.path / name)


@contextmanager
def _hashing(advance: Callable[[int], None], *, threads: int) -> Iterator[Callable[[Stretch], Future[str]]]:
    """Hashes files beside each other, outside of Python's lock; what is not done when the block ends is given up."""
    lock, ended = Lock(), Event()

    def counted(size: int) -> None:
        if ended.is_set():
            raise CancelledError
        with lock:
            advance(size)

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            yield lambda file: pool.submit(file_sha256, file, advance=counted)
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)


def check_signed(artefact: Place, *, kind: str, under: str = "", leave: Container[str] = ()) -> None:
    """Refuse what the trusted key did not sign as an artefact of this kind, and files that are not what was signed.

    A signature is of the manifest alone, so the files are hashed too: those whose names begin with `under`, without
    those to `leave`, which are hashed by who reads them. Nothing is asked where no key is trusted.
    """
    if is_asked_for():
        check_signature(artefact)
        manifest = read_manifest(artefact, kind=kind)
        others = {name for name in manifest.files if not name.startswith(under) or name in leave}
        verify_files(artefact, manifest, leave=others)


def is_current(path: str | Path, fingerprint: str) -> bool:
    """True when an artefact is there, complete by file sizes, and made by this fingerprint."""
    try:
        manifest = read_manifest(path, kind=None)
        check_sizes(path, manifest)
    except (OSError, UserError):
        return False
    return manifest.fingerprint == fingerprint


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
