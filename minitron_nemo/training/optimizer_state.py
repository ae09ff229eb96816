"""What training changes besides the weights, as safetensors files.

One rank's optimizer state: float32 weights, moments, step counts and the schedule. And what is trained beside the
model, which is the same on every rank.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.training.state import TrainedBeside, TrainState


def _torch_optimizers(state: TrainState) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    """(Megatron's optimizer, the torch optimizer inside that holds this rank's part) for each there is."""
    for outer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        yield outer, outer.optimizer


def write_optimizer(path: Path, state: TrainState) -> None:
    """This rank's optimizer state: float32 weights, moments, step counts and the schedule, as safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {"schedule": state.schedule.state_dict(), "groups": []}
    for index, (_, inner) in enumerate(_torch_optimizers(state)):
        for number, parameter in _numbered(inner):
            tensors[f"{index}.{number}.weight"] = parameter.data
            for name, value in inner.state[parameter].items():
                tensors[f"{index}.{number}.{name}"] = torch.as_tensor(value)
        scalars["groups"].append(
            [{"step": int(group["step"])} if "step" in group else {} for group in inner.param_groups]
        )
    save_file(_on_cpu(tensors), path, metadata={"scalars": json.dumps(scalars)})


def read_optimizer(path: Path, state: TrainState) -> None:
    """The inverse of `write_optimizer`, into an optimizer of the same model under the same layout."""
    with safe_open(path, framework="pt") as file:
        scalars = parse_json(file.metadata()["scalars"])
        names: dict[tuple[int, int], list[str]] = {}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            index, number, name = key.split(".", 2)
            names.setdefault((int(index), int(number)), []).append(name)
        for index, (outer, inner) in enumerate(_torch_optimizers(state)):
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
    state.schedule.num_steps = 0  # Megatron adds the saved steps to those taken, and the first is taken already
    state.schedule.load_state_dict(scalars["schedule"])


def _numbered(inner: torch.optim.Optimizer) -> Iterator[tuple[int, torch.Tensor]]:
    yield from enumerate(parameter for group in inner.param_groups for parameter in group["params"])


def write_beside(path: Path, beside: TrainedBeside) -> None:
    """What is trained beside the model, as safetensors; on one rank, as all have the same."""
    save_file(_on_cpu(beside.tensors()), path)


def read_beside(path: Path, beside: TrainedBeside) -> None:
    """The inverse of `write_beside`, on every rank."""
    beside.load(load_file(path))


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
