"""How the models of a run were made: the part each plays, its training, and what its manifest says of its origin."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import contents_of, has
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, Manifest, manifest_sha256, read_manifest
from minitron_nemo.artefacts.records import read_record
from minitron_nemo.errors import UserError

Records = list[dict[str, Any]]

# The parts that models play. A student starts from what a cut left and learns from a teacher; a baseline lacks one.
STUDENT, WITHOUT_TEACHER, WITHOUT_PRUNING, OTHER = "student", "no teacher", "random start", ""
RANDOM_SETTING = "init_method_std"  # that only the manifest of random weights has


@dataclass(frozen=True)
class Making:
    """What a manifest says of a model, and how long it was trained; `steps` is 0 where it was not, or not here."""

    part: str
    size: int  # bytes on disk
    created: str
    command: str  # empty in manifests of older versions
    git_revision: str
    steps: int = 0
    tokens: float = 0
    seconds: float = 0  # of steps alone: neither validation nor saving
    utilization: float | None = None  # of the device's peak, mean over the records; None where the peak is not known

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def makings(run_dir: Path, names: Sequence[str], curves: Mapping[str, Records]) -> dict[str, Making]:
    """How each of these models of a run was made."""
    folders = folders_by_hash(run_dir)
    found = {}
    for name in names:
        manifest = read_manifest(run_dir / f"{name}.nemo", kind="model")
        found[name] = Making(
            part=_part(manifest, folders),
            size=sum(entry["size"] for entry in manifest.files.values()),
            created=manifest.created,
            command=manifest.command,
            git_revision=manifest.git_revision,
            **_training(curves.get(name, [])),
        )
    return found


def reference_of(run_dir: Path, names: Sequence[str]) -> str:
    """The model that all evaluations compare with: its name, or the start of its hash when it is not of this run.

    Empty when there is none, or several.
    """
    found = set()
    for name in names:
        parents = read_record(run_dir / "eval" / f"{name}.json", kind="evaluation").get("parents")
        if isinstance(parents, dict) and isinstance(parents.get("reference"), str):
            found.add(parents["reference"])
    if len(found) != 1:
        return ""
    sha = found.pop()
    folder = folders_by_hash(run_dir).get(sha)
    return folder.name.removesuffix(".nemo") if folder else f"a model of another run ({sha[:12]})"


def folders_by_hash(run_dir: Path) -> dict[str, Path]:
    """The models of a run, packed ones too, by the SHA-256 of their manifests; what is no model is passed over."""
    found = {}
    for path in sorted(run_dir.glob("*.nemo")):
        with suppress(UserError):
            if has(contents := contents_of(path), MANIFEST_FILE):
                found[manifest_sha256(contents)] = path
    return found


def _part(manifest: Manifest, folders: Mapping[str, Path]) -> str:
    """A model is a student or a baseline by what its manifest names, never by its own name."""
    if "student" not in manifest.parents or not any(role.startswith("teacher") for role in manifest.parents):
        return OTHER
    if manifest.config.get("kl_weight") == 0:
        return WITHOUT_TEACHER
    start = folders.get(manifest.parents["student"])
    is_random = start is not None and RANDOM_SETTING in read_manifest(start, kind="model").config
    return WITHOUT_PRUNING if is_random else STUDENT


def _training(records: Records) -> dict[str, Any]:
    """Steps, tokens, seconds and utilization of the records of a training run."""
    seconds, before, shares = 0.0, 0.0, []
    for record in records:
        speed, consumed = record.get("tokens_per_second"), record.get("consumed_tokens")
        if not speed or consumed is None:
            continue
        seconds += (consumed - before) / speed
        before = consumed
        if (share := record.get("model_flops_utilization")) is not None:
            shares.append(share)
    if not before:
        return {}
    utilization = sum(shares) / len(shares) if shares else None
    return {"steps": records[-1]["step"], "tokens": before, "seconds": seconds, "utilization": utilization}
