"""Sums of work that is under way, kept in the run folder: a run that stopped goes on from them, under any layout."""

import contextlib
import dataclasses
import glob
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.errors import UserError
from minitron_nemo.steps.step import Job

logger = logging.getLogger(__name__)

KIND = "partial_sums"
DIGITS = 8


@dataclass(frozen=True)
class KeptSums:
    """Sums over the first items of a job, which `fingerprint` identifies: `path/FINGERPRINT/PART_XXXXXXXX`.

    `part` says what the items are; the number is how many are done. Sums are global, so a run may go on under another
    layout. Each folder is published by one rename before the one before it goes.
    """

    path: Path
    fingerprint: str
    part: str = "samples"

    @classmethod
    def of(cls, run_dir: str, job: Job) -> "KeptSums":
        """Where a run keeps the sums of this job."""
        return cls(Path(run_dir) / "checkpoints" / job.output.name, job.origin.fingerprint)

    def of_part(self, part: str) -> "KeptSums":
        """Where the same job keeps those of another part."""
        return dataclasses.replace(self, part=part)

    @property
    def folder(self) -> Path:
        return self.path / self.fingerprint[:16]

    def save(self, done: int, write: Callable[[Path | None], None], groups: Groups) -> None:
        """Publish the sums of `done` items and remove those before them; on all ranks.

        `write(folder)` writes them, on one rank into a folder, on the others into None.
        """
        target, before = self.folder / f"{self.part}_{done:0{DIGITS}d}", self._all() if groups.is_main else []
        with ExitStack() as stack:
            draft = None
            if groups.is_main:
                origin = Origin(self.fingerprint, overwrite=True)
                draft = stack.enter_context(publishing(target, kind=KIND, origin=origin))
            write(None if draft is None else draft.folder)
        for old in before:
            if old != target:
                shutil.rmtree(old)

    def newest(self, groups: Groups) -> tuple[Path, int] | None:
        """The newest whole sums and how many items are done in them; None when there are none. On all ranks."""
        found = groups.share_json(self._newest() if groups.is_main else None)[0]
        if found is None:
            return None
        folder = Path(found)
        if not folder.is_dir():
            raise UserError(f"{folder}: not there on rank {groups.rank}; run_dir must be one folder to all nodes")
        done = int(folder.name[-DIGITS:])
        logger.info(f"goes on from {folder}: {done} are done")
        return folder, done

    def remove(self) -> None:
        """Remove what was kept of all parts, when the result is published; on one rank."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other jobs of the same name keep theirs there
            self.path.rmdir()

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{glob.escape(self.part)}_" + "[0-9]" * DIGITS))

    def _newest(self) -> str | None:
        """The newest whose every file has the right hash; what is passed over is named."""
        for folder in reversed(self._all()):
            try:
                manifest = read_manifest(folder, kind=KIND)
                verify_files(folder, manifest)
                if manifest.fingerprint == self.fingerprint:
                    return str(folder)
            except UserError as error:
                logger.warning(f"{error}; trying older sums")
        return None
