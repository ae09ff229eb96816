"""Training checkpoints: model, optimizer, schedule and position, so that a resumed run equals an uninterrupted one.

`checkpoints/<name>/step_XXXXXXXX/` is published by one rename. Model weights are a torch_dist folder of any layout;
the optimizer's state is one safetensors file per rank, so a run resumes under the layout it was stopped in.
Nothing random needs storing: dropout is off and sample i of the data depends on the seed and i alone.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_nemo.arch import ModelArch
from minitron_nemo.checkpoint import manifest as artefact
from minitron_nemo.checkpoint.nemo import describe_folder
from minitron_nemo.checkpoint.torch_dist import TorchDistReader
from minitron_nemo.engine.optimizer import Optimization
from minitron_nemo.engine.schedule import unwrap
from minitron_nemo.engine.weights import read_weights, write_weights
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import Groups

logger = logging.getLogger(__name__)

KIND = "training_state"
WEIGHTS = "model_weights"


@dataclass
class Position:
    """How far training is."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass(frozen=True)
class CheckpointFolder:
    """The training checkpoints of one run. `fingerprint` identifies the run; a resumed run must have the same."""

    path: Path
    fingerprint: str
    arch: ModelArch
    groups: Groups
    layout: str  # under another one the files of the ranks would not fit
    keep: int = 2

    def save(self, training: Optimization, position: Position) -> None:
        """Publish `step_XXXXXXXX`, then drop the oldest beyond `keep`. Collective."""
        target = self.path / f"step_{position.step:08d}"
        temp = _shared_temp(target, self.groups)
        write_optimizer(temp / f"optimizer_{self.groups.rank:05d}.safetensors", training)
        if self.groups.is_main:
            (temp / WEIGHTS).mkdir()
        self.groups.barrier()
        hashes = write_weights(temp / WEIGHTS, unwrap(training.model), self.arch, self.groups)
        if self.groups.is_main:
            artefact.finish(
                temp,
                target,
                kind=KIND,
                fingerprint=self.fingerprint,
                config={},
                parents={},
                tokens=position.consumed_tokens,
                extra={"layout": self.layout, "position": vars(position)},
                overwrite=True,
                hashes={f"{WEIGHTS}/{name}": sha for name, sha in hashes.items()},
            )
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(old)
        self.groups.barrier()

    def resume(self, training: Optimization) -> Position:
        """Restore the newest whole checkpoint of this run; the start when there is none. Collective."""
        found = self.groups.share_json(self._newest() if self.groups.is_main else None)[0]
        if found is None:
            return Position()
        folder = Path(found)
        manifest = artefact.read_manifest(folder, kind=KIND)
        if (layout := manifest.extra["layout"]) != self.layout:
            raise UserError(
                f"{folder} was made under the layout {layout}, this is {self.layout}: resume under that layout, "
                f"or remove {self.path} to start again"
            )
        read_weights(unwrap(training.model), TorchDistReader(folder / WEIGHTS), self.arch, self.groups)
        read_optimizer(folder / f"optimizer_{self.groups.rank:05d}.safetensors", training)
        logger.info(f"resumed from {folder}")
        return Position(**manifest.extra["position"])

    def steps(self) -> list[Path]:
        """The checkpoints of this run, oldest first. Those of another configuration are left alone."""
        return [folder for folder in self._all_steps() if _fingerprint(folder) == self.fingerprint]

    def _all_steps(self) -> list[Path]:
        return sorted(self.path.glob("step_" + "[0-9]" * 8))

    def _newest(self) -> str | None:
        """The newest checkpoint whose every file has the right hash; what is passed over is named."""
        own = self.steps()
        if others := [folder.name for folder in self._all_steps() if folder not in own]:
            logger.warning(f"{self.path}: {', '.join(others)} of another configuration: neither resumed nor removed")
        for folder in reversed(own):
            try:
                artefact.verify_files(folder, artefact.read_manifest(folder, kind=KIND))
                return str(folder)
            except UserError as error:
                logger.warning(f"{error}; trying an older checkpoint")
        return None


def _fingerprint(folder: Path) -> str | None:
    """Whose checkpoint it is; None when that cannot be read."""
    try:
        return artefact.read_manifest(folder, kind=KIND).fingerprint
    except UserError:
        return None


def save_model(
    path: Path, model: Any, arch: ModelArch, groups: Groups, *, tokenizer: Path, tokens: int, origin: dict[str, Any]
) -> None:
    """Publish a trained model as a `.nemo` folder from all ranks; `origin` says where it comes from. Collective."""
    temp = _shared_temp(path, groups, overwrite=origin["overwrite"])
    part = unwrap(model)
    dtype = next(part.parameters()).dtype
    if groups.is_main:
        describe_folder(temp, arch, dtype, tokenizer)
        (temp / WEIGHTS).mkdir()
    groups.barrier()
    hashes = write_weights(temp / WEIGHTS, part, arch, groups)
    if groups.is_main:
        artefact.finish(
            temp,
            path,
            kind="model",
            tokens=tokens,
            extra={"arch": arch.to_dict()},
            hashes={f"{WEIGHTS}/{name}": sha for name, sha in hashes.items()},
            **origin,
        )
    groups.barrier()


def _shared_temp(target: Path, groups: Groups, *, overwrite: bool = True) -> Path:
    """A temporary folder beside `target`, made by rank 0 and known to all."""
    temp = str(artefact.begin(target, overwrite=overwrite)) if groups.is_main else None
    return Path(groups.share_json(temp)[0])


def _torch_optimizers(training: Optimization) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    """(Megatron's optimizer, the torch optimizer inside that holds this rank's part) for each there is."""
    for outer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        yield outer, outer.optimizer


def write_optimizer(path: Path, training: Optimization) -> None:
    """This rank's optimizer state: float32 weights, moments, step counts and the schedule, as safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {"schedule": training.schedule.state_dict(), "groups": []}
    for index, (_, inner) in enumerate(_torch_optimizers(training)):
        for number, parameter in _numbered(inner):
            tensors[f"{index}.{number}.weight"] = parameter.data
            for name, value in inner.state[parameter].items():
                tensors[f"{index}.{number}.{name}"] = torch.as_tensor(value)
        scalars["groups"].append(
            [{"step": int(group["step"])} if "step" in group else {} for group in inner.param_groups]
        )
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"scalars": json.dumps(scalars)})


def read_optimizer(path: Path, training: Optimization) -> None:
    """The inverse of `write_optimizer`, into an optimizer of the same model under the same layout."""
    with safe_open(path, framework="pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
        names: dict[tuple[int, int], list[str]] = {}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            index, number, name = key.split(".", 2)
            names.setdefault((int(index), int(number)), []).append(name)
        for index, (outer, inner) in enumerate(_torch_optimizers(training)):
            for number, parameter in _numbered(inner):
                for name in names[index, number]:
                    value = file.get_tensor(f"{index}.{number}.{name}")
                    if name == "weight":
                        parameter.data.copy_(value)
                    else:
                        # torch's Adam keeps its step count on the CPU, the moments beside the parameter
                        inner.state[parameter][name] = value if value.dim() == 0 else value.to(parameter.device)
            for group, saved in zip(inner.param_groups, scalars["groups"][index], strict=True):
                group.update(saved)
            if hasattr(outer, "_copy_main_params_to_model_params"):
                outer._copy_main_params_to_model_params()
    training.schedule.num_steps = 0  # Megatron adds the saved steps to those taken, and the first is taken already
    training.schedule.load_state_dict(scalars["schedule"])


def _numbered(inner: torch.optim.Optimizer) -> Iterator[tuple[int, torch.Tensor]]:
    yield from enumerate(parameter for group in inner.param_groups for parameter in group["params"])
