"""What enters each matrix and norm of a model in a plain forward pass, and second moments made of it by brute force."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.importance.second_moments import FILE, shapes
from minitron_nemo.pruning.plain_forward import PlainModel


class Recording(PlainModel):
    """`heard[name]` is [T, U]: inputs of matrices, and under the names of norms what they make before their weight.

    `outputs_of_norms[name]` is what they give the matrix behind them.
    """

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self.heard: dict[str, Tensor] = {}
        self.outputs_of_norms: dict[str, Tensor] = {}

    def _norm(self, name: str, x_BSH: Tensor) -> Tensor:
        output = super()._norm(name, x_BSH)
        x = x_BSH.double()
        if self.arch.has_norm_bias:
            x = x - x.mean(-1, keepdim=True)
        n = x / (x.square().mean(-1, keepdim=True) + self.arch.norm_epsilon).sqrt()
        parts = name.split(".")
        place = "final_layernorm"
        if "layers" in parts:
            kind = "input_layernorm" if "linear_qkv" in parts else "pre_mlp_layernorm"
            place = f"{kind}.layer_{int(parts[2]):02d}"
        self.heard[place] = n.flatten(0, 1)
        self.outputs_of_norms[place] = output.flatten(0, 1).double()
        return output

    def _heads(self, layer: int, heads_BSND: Tensor) -> Tensor:
        self.heard[f"linear_proj.layer_{layer:02d}"] = heads_BSND.flatten(2).flatten(0, 1).double()
        return heads_BSND

    def _neurons(self, layer: int, neurons_BSF: Tensor) -> Tensor:
        self.heard[f"linear_fc2.layer_{layer:02d}"] = neurons_BSF.flatten(0, 1).double()
        return neurons_BSF


@torch.no_grad()
def recorded(source: TensorSource, tokens_BS: Tensor) -> Recording:
    """All that is heard in one forward pass."""
    model = Recording(source)
    x = model.embed(tokens_BS)
    for layer in range(source.arch.num_layers):
        x = x + model.attention(layer, x)
        x = x + model.mlp(layer, x)
    model.final_norm(x)
    return model


def moments_of(heard: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file, float64."""
    tensors = {name: torch.cat((x.T @ x, x.sum(0)[None])) for name, x in heard.items()}
    return tensors | {"tokens": torch.tensor([float(len(next(iter(heard.values()))))])}


def write_moments(folder: Path, source: TensorSource, model: Recording) -> None:
    """The file that estimate_importance writes, of this pass."""
    tensors = moments_of(model.heard)
    save_file({name: tensors[name].float() for name in shapes(source.arch)}, folder / FILE)
