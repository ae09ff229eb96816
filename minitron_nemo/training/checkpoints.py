"""Training checkpoints: model, optimizer, schedule and position, so that a resumed run equals an uninterrupted one.

`checkpoints/<name>/step_XXXXXXXX/` is published by one rename. Model weights are a torch_dist folder of any layout;
the optimizer's state is one safetensors file per rank, so a run resumes under the layout it was stopped in.
Nothing random needs storing: dropout is off and sample i of the data depends on the seed and i alone. The trained
model is published the same way, without the optimizer.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import Place
from minitron_nemo.artefacts.disk import writing
from minitron_nemo.artefacts.lock import locked
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, file_sha256, read_manifest, verify_files
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import check_free_space, publishing
from minitron_nemo.checkpoint.formats.nemo import KIND as MODEL
from minitron_nemo.checkpoint.formats.nemo import WEIGHTS, describe_folder, model_facts
from minitron_nemo.checkpoint.torch_dist_weights import TorchDistWeights
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import ModelChunks
from minitron_nemo.engine.optimizer import whole
from minitron_nemo.engine.weights import load_weights, write_weights
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.training.optimizer_state import read_beside, read_optimizer, write_beside, write_optimizer
from minitron_nemo.training.state import Position, TrainState

logger = logging.getLogger(__name__)

KIND = "training_state"
BESIDE = "beside.safetensors"  # what is trained beside the model, where there is any


@dataclass(frozen=True)
class CheckpointFolder:
    """The training checkpoints of one run. `fingerprint` identifies the run; a resumed run must have the same."""

    path: Path
    fingerprint: str
    arch: ModelArch
    groups: Groups
    layout: str  # under another one the files of the ranks would not fit
    keep: int = 2
    optimizer_copies: int = 1  # data-parallel ranks share the optimizer's state, or each has (and writes) a copy
    objective: str = ""  # in words: what is minimized
    parents: Mapping[str, str] = field(default_factory=dict)  # role -> SHA-256 of the manifest of what the run read
    overwrite: bool = False  # start again where checkpoints of another objective lie

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from this folder while the block runs; on rank 0, which finds out for all."""
        with ExitStack() as stack:
            if self.groups.is_main:
                with writing(self.path):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(self.path))
            yield

    def check_space(self, saves_left: int) -> None:
        """Refuse to start where the disk cannot hold the checkpoints that will lie there at the same time."""
        if self.groups.is_main and saves_left:
            there = len(self.steps())
            most = min(self.keep + 1, there + saves_left)  # a new one is whole before the oldest goes
            check_free_space(self.path, max(most - there, 1) * self._size())

    def _size(self) -> int:
        """Bytes of a checkpoint: weights of at most float32, float32 main weights and Adam's two moments."""
        return self.arch.num_params() * 4 * (1 + 3 * self.optimizer_copies)

    def save(self, state: TrainState) -> None:
        """Publish `step_XXXXXXXX`, then drop the oldest beyond `keep`. Collective."""
        position = state.position
        target = self.path / f"step_{position.step:08d}"
        if self.groups.is_main and target.is_dir() and not (target / MANIFEST_FILE).exists():
            logger.warning(f"{target}: no {MANIFEST_FILE}, so no whole checkpoint; made again")
            shutil.rmtree(target)
        with _publishing_weights(
            target,
            state.model,
            self.arch,
            self.groups,
            kind=KIND,
            origin=Origin(self.fingerprint, parents=self.parents, overwrite=True),
            tokens=position.consumed_tokens,
            extra={"layout": self.layout, "objective": self.objective, "position": vars(position)},
            needed=self._size(),
        ) as (folder, hashes):
            name = f"optimizer_{self.groups.rank:05d}.safetensors"
            write_optimizer(folder / name, state)
            hashes[name] = file_sha256(folder / name)
            if state.beside is not None and self.groups.is_main:
                write_beside(folder / BESIDE, state.beside)
                hashes[BESIDE] = file_sha256(folder / BESIDE)
        if self.groups.is_main:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(old)
        self.groups.barrier()

    def resume(self, state: TrainState) -> None:
        """Restore the newest whole checkpoint of this run; nothing when there is none. Collective.

        Raises UserError where the newest is of a run that minimized something else, or had another teacher: by its
        place it is meant to go on.
        """
        folder = self._newest()
        if folder is None:
            self._refuse_other_run()
            return
        manifest = read_manifest(folder, kind=KIND)
        if (layout := manifest.extra["layout"]) != self.layout:
            raise UserError(
                f"{folder} was made under the layout {layout}, this is {self.layout}: resume under that layout, "
                f"or remove {self.path} to start again"
            )
        weights = TorchDistWeights(folder / WEIGHTS, self.arch, source="the run's model")
        load_weights(state.model, weights, self.groups)
        read_optimizer(folder / f"optimizer_{self.groups.rank:05d}.safetensors", state)
        if state.beside is not None:
            read_beside(folder / BESIDE, state.beside)
        state.position = Position(**manifest.extra["position"])
        logger.info(f"resumed from {folder}")

    def _refuse_other_run(self) -> None:
        others = [] if self.overwrite else self._all_steps()
        for folder in others[-1:]:
            before = _objective(folder)
            if before and before != self.objective:
                raise UserError(
                    f"{folder} minimized {before}, this is {self.objective}: go on with the settings it had, or give "
                    "overwrite=true to start again, or another output"
                )
            theirs, ours = _teachers(_parents(folder)), _teachers(self.parents)
            if theirs and theirs != ours:
                raise UserError(
                    f"{folder} learned from another teacher ({_in_short(theirs)}), this is {_in_short(ours)}: go on "
                    "with the teacher it had, or give overwrite=true to start again, or another output"
                )

    def steps(self) -> list[Path]:
        """The checkpoints of this run, oldest first. Those of another configuration are left alone."""
        return [folder for folder in self._all_steps() if _fingerprint(folder) == self.fingerprint]

    def _all_steps(self) -> list[Path]:
        return sorted(self.path.glob("step_" + "[0-9]" * 8))

    def _newest(self) -> Path | None:
        """The newest checkpoint whose every file has the right hash; what is passed over is named. Collective."""
        own = self.steps() if self.groups.is_main else []
        if self.groups.is_main and (others := [folder.name for folder in self._all_steps() if folder not in own]):
            logger.warning(f"{self.path}: {', '.join(others)} of another configuration: neither resumed nor removed")
        for name in reversed(self.groups.share_json([folder.name for folder in own])[0]):
            found = [damage for damage in self.groups.share_json(self._damage(self.path / name)) if damage is not None]
            if not found:
                return self.path / name
            if self.groups.is_main:
                logger.warning(f"{found[0]}; trying an older checkpoint")
        return None

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of the files, the optimizer's being many and large."""
        try:
            manifest = read_manifest(folder, kind=KIND)
            verify_files(folder, manifest, part=self.groups.rank, parts=self.groups.layout.world_size)
        except UserError as error:
            return str(error)
        return None


def _fingerprint(folder: Path) -> str | None:
    """Whose checkpoint it is; None when that cannot be read."""
    try:
        return read_manifest(folder, kind=KIND).fingerprint
    except UserError:
        return None


def _objective(folder: Path) -> str:
    """What its run minimized, in words; empty when that cannot be read."""
    try:
        return str(read_manifest(folder, kind=KIND).extra.get("objective", ""))
    except UserError:
        return ""


def _parents(folder: Path) -> Mapping[str, str]:
    """What its run read, as far as that was written down."""
    try:
        return read_manifest(folder, kind=KIND).parents
    except UserError:
        return {}


def _teachers(parents: Mapping[str, str]) -> dict[str, str]:
    return {role: sha for role, sha in sorted(parents.items()) if role.startswith("teacher")}


def _in_short(hashes: Mapping[str, str]) -> str:
    return ", ".join(sha[:12] for sha in hashes.values()) or "none"


def save_model(
    path: Path, model: ModelChunks, arch: ModelArch, groups: Groups, *, tokenizer: Place, tokens: int, origin: Origin
) -> None:
    """Publish a trained model as a `.nemo` folder from all ranks. Collective."""
    dtype = next(model.parameters()).dtype
    facts = model_facts(arch, dtype)
    size = arch.num_params() * dtype.itemsize
    with _publishing_weights(
        path, model, arch, groups, kind=MODEL, origin=origin, tokens=tokens, extra=facts, needed=size
    ) as (temp, _):
        if groups.is_main:
            describe_folder(temp, arch, dtype=dtype, tokenizer=tokenizer)


@contextmanager
def _publishing_weights(
    target: Path,
    model: ModelChunks,
    arch: ModelArch,
    groups: Groups,
    *,
    kind: str,
    origin: Origin,
    tokens: int,
    extra: Mapping[str, Any],
    needed: int,
) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder known to all ranks, for them to fill; the weights of the model join it and rank 0 publishes it.

    The mapping takes the SHA-256 of what this rank wrote, so that rank 0 does not read the files of all.
    """
    with ExitStack() as stack:
        draft = None
        if groups.is_main:
            draft = stack.enter_context(
                publishing(target, kind=kind, origin=origin, tokens=tokens, extra=extra, needed=needed)
            )
        folder = Path(groups.share_json(str(draft.folder) if draft else None)[0])
        stack.enter_context(writing(target, needed=needed))
        own: dict[str, str] = {}
        yield folder, own
        if draft:
            (folder / WEIGHTS).mkdir()
        written = groups.share_json(own)
        hashes = write_weights(folder / WEIGHTS, whole(model), arch, groups)
        if draft:
            for part in written:
                draft.hashes.update(part)
            draft.hashes.update({f"{WEIGHTS}/{name}": sha for name, sha in hashes.items()})
    groups.barrier()
