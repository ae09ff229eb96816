"""What becomes of sums: kept in the run folder while an estimate is under way, published with the scores at its end.

A run that stopped goes on from what was kept.
"""

import contextlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import scores_of
from minitron_nemo.importance.sums import ImportanceSums, read_sums
from minitron_nemo.steps.step import Job

logger = logging.getLogger(__name__)

KIND = "partial_importance"


@dataclass(frozen=True)
class KeptSums:
    """Sums over the first samples of an estimate, which `fingerprint` identifies: `path/FINGERPRINT/samples_XXXXXXXX`.

    They are global sums, so a run may go on under another layout. Each folder is published by one rename before the
    one before it goes.
    """

    path: Path
    fingerprint: str

    @classmethod
    def of(cls, run_dir: str, job: Job) -> "KeptSums":
        """Where a run keeps the sums of this job."""
        return cls(Path(run_dir) / "checkpoints" / job.output.name, job.origin.fingerprint)

    @property
    def folder(self) -> Path:
        return self.path / self.fingerprint[:16]

    def save(self, sums: ImportanceSums) -> None:
        """Publish the sums and remove those before them; on one rank."""
        before = self._all()
        target = self.folder / f"samples_{sums.parts[-1].end:08d}"
        with publishing(target, kind=KIND, origin=Origin(self.fingerprint, overwrite=True)) as draft:
            sums.write(draft.folder)
        for old in before:
            if old != target:
                shutil.rmtree(old)

    def load(self, groups: Groups) -> ImportanceSums | None:
        """The newest whole sums; None when there are none. On all ranks."""
        found = groups.share_json(self._newest() if groups.is_main else None)[0]
        if found is None:
            return None
        sums = read_sums(found)
        logger.info(f"goes on from {found}: {sums.num_samples} samples are done")
        return sums

    def remove(self) -> None:
        """Remove what was kept, when the scores are published; on one rank."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other estimates of the same name keep theirs there
            self.path.rmdir()

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("samples_" + "[0-9]" * 8))

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


def publish(sums: ImportanceSums, job: Job, *, batch_aggregation: str) -> None:
    """Publish the scores that sums come to, and the sums beside them; on one rank."""
    scores = scores_of(sums, batch_aggregation)
    with publishing(job.output, kind=job.kind, origin=job.origin, extra={"arch": sums.arch.to_dict()}) as draft:
        scores.write(draft.folder)
        sums.write(draft.folder)
