"""Listening to a Megatron-Core model: forward hooks that feed the importance statistics and always come off again.

The model is only touched by the names of its modules, so nothing here imports Megatron:
`decoder.layers[k]` with `layer_number` (from 1, global), `input_layernorm`, `self_attention.linear_qkv`,
`self_attention.linear_proj`, `pre_mlp_layernorm`, `mlp.linear_fc1`, `mlp.linear_fc2`.

Shapes: S sequence (a slice of it at norms and layers under sequence parallelism), B batch, H hidden_size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from minitron_nemo.arch import ModelArch
from minitron_nemo.importance import estimators
from minitron_nemo.importance.accumulators import (
    RankGroups,
    Spread,
    TokenAccumulator,
    UnitAccumulator,
    by_layer,
    group_size,
)
from minitron_nemo.importance.scores import ImportanceScores

# Megatron's modules, known here only by the names above.
Module = Any


@dataclass(frozen=True)
class Site:
    """A place in each layer where one axis is heard."""

    axis: str
    units: Spread  # over tp ranks
    sequence: Spread  # over tp ranks under sequence parallelism


SITES = {
    "input_layernorm": Site("hidden_size", Spread.REPLICATED, Spread.PARTIAL),
    "pre_mlp_layernorm": Site("hidden_size", Spread.REPLICATED, Spread.PARTIAL),
    "linear_proj": Site("num_attention_heads", Spread.SHARDED, Spread.REPLICATED),
    "linear_fc2": Site("ffn_hidden_size", Spread.SHARDED, Spread.REPLICATED),
}


class ImportanceStatistics:
    """What the hooks have heard so far. One forward pass serves every axis and every batch aggregation."""

    def __init__(
        self,
        arch: ModelArch,
        *,
        layers: Sequence[int],
        sequence_aggregation: str = "mean",
        groups: RankGroups | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`layers`: the global numbers, from 0, of the layers of this pipeline stage."""
        self.arch = arch
        self.layers = list(layers)
        self.sequence_aggregation = sequence_aggregation
        self.groups = groups or RankGroups()
        self.units = {name: self._accumulator(site, device) for name, site in SITES.items()}
        self.tokens = TokenAccumulator(layers=len(self.layers), device=device)

    def _accumulator(self, site: Site, device: torch.device | None) -> UnitAccumulator:
        shards = group_size(self.groups.tp) if site.units is Spread.SHARDED else 1
        return UnitAccumulator(
            self.sequence_aggregation,
            layers=len(self.layers),
            units=getattr(self.arch, site.axis) // shards,
            sequence_group=self.groups.sequence if site.sequence is Spread.PARTIAL else None,
            device=device,
        )

    def finish(self, batch_aggregation: str = "l2", *, data_fingerprint: str = "") -> ImportanceScores:
        """The scores of the whole model, the same on every rank; all ranks must call it together.

        Each site is scored on its own. The two norms of a layer, and the layers, are then plainly added into one
        score of the hidden channels that they share (paper 1).
        """
        num_samples = self._num_samples()
        cosines_L2 = self._by_layer(self.tokens.totals(self.groups))
        return ImportanceScores(
            arch=self.arch,
            hidden_size=self._axis_scores("hidden_size", batch_aggregation).sum(dim=0),
            ffn_hidden_size=self._axis_scores("ffn_hidden_size", batch_aggregation),
            num_attention_heads=self._axis_scores("num_attention_heads", batch_aggregation),
            num_layers=estimators.block_importance(cosines_L2).cpu(),
            num_samples=num_samples,
            seq_length=int(cosines_L2[0, 1]) // num_samples,
            sequence_aggregation=self.sequence_aggregation,
            batch_aggregation=batch_aggregation,
            data_fingerprint=data_fingerprint,
        )

    def _axis_scores(self, axis: str, batch_aggregation: str) -> Tensor:
        """[L, units] on CPU, added over the sites of the axis."""
        tables = [
            self._by_layer(self.units[name].scores(batch_aggregation, spread=site.units, groups=self.groups))
            for name, site in SITES.items()
            if site.axis == axis
        ]
        return torch.stack(tables).sum(dim=0).cpu()

    def _by_layer(self, rows: Tensor) -> Tensor:
        return by_layer(rows, self.layers, num_layers=self.arch.num_layers, group=self.groups.pp)

    def _num_samples(self) -> int:
        """Refuses statistics in which a layer is missing, is counted twice or missed a sample."""
        heard = torch.stack([self._by_layer(units.samples(self.groups)) for units in self.units.values()])
        if heard.min() != heard.max() or heard.min() == 0:
            table = {name: row.int().tolist() for name, row in zip(SITES, heard, strict=True)}
            raise RuntimeError(f"samples heard at each layer must be equal and at least one: {table}")
        return int(heard[0, 0])


@contextmanager
def listening(
    model: Module | Sequence[Module],
    *,
    arch: ModelArch,
    sequence_aggregation: str = "mean",
    groups: RankGroups | None = None,
) -> Iterator[ImportanceStatistics]:
    """Statistics of every forward pass inside the `with`; the hooks are gone after it, however it ends.

    `model` is this rank's GPT model, wrapped or not, or its list of virtual pipeline chunks.
    """
    layers = decoder_layers(model)
    statistics = ImportanceStatistics(
        arch,
        layers=[layer.layer_number - 1 for layer in layers],
        sequence_aggregation=sequence_aggregation,
        groups=groups,
        device=_device(layers),
    )
    with ExitStack() as attached:
        for row, layer in enumerate(layers):
            for handle in _attach(layer, row, statistics):
                attached.callback(handle.remove)
        yield statistics


def decoder_layers(model: Module | Sequence[Module]) -> list[Module]:
    """The transformer layers on this rank, through any wrappers (`.module`)."""
    layers: list[Module] = []
    chunks: Sequence[Module] = [model] if isinstance(model, nn.Module) else model
    for chunk in chunks:
        while not hasattr(chunk, "decoder"):
            chunk = chunk.module
        layers.extend(chunk.decoder.layers)
    return layers


def _device(layers: Sequence[Module]) -> torch.device:
    first = next((weight for layer in layers for weight in layer.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def _attach(layer: Module, row: int, statistics: ImportanceStatistics) -> Iterator[RemovableHandle]:
    """Yields each handle as soon as its hook is on, so that a failure half-way still detaches."""
    arch, units = statistics.arch, statistics.units
    attention, mlp = layer.self_attention, layer.mlp

    def heads(x_SBC: Tensor) -> Tensor:
        return estimators.head_norms(x_SBC, arch.kv_channels)

    yield _hear_norm(layer.input_layernorm, attention.linear_qkv, arch, _adder(units["input_layernorm"], row))
    yield _hear_norm(layer.pre_mlp_layernorm, mlp.linear_fc1, arch, _adder(units["pre_mlp_layernorm"], row))
    yield _hear_input(attention.linear_proj, _adder(units["linear_proj"], row, heads))
    yield _hear_input(mlp.linear_fc2, _adder(units["linear_fc2"], row))
    yield _hear_layer(layer, row, statistics.tokens)


def _adder(
    units: UnitAccumulator, row: int, transform: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], None]:
    def add(x: Tensor) -> None:
        units.add(row, x if transform is None else transform(x))

    return add


def _hear_input(module: Module, hear: Callable[[Tensor], None]) -> RemovableHandle:
    @torch.no_grad()
    def hook(_: nn.Module, args: tuple) -> None:
        hear(args[0])

    handle: RemovableHandle = module.register_forward_pre_hook(hook)
    return handle


def _hear_norm(norm: Module, projection: Module, arch: ModelArch, hear: Callable[[Tensor], None]) -> RemovableHandle:
    """Hears a norm's output. Transformer Engine fuses the norm into the projection after it: then apply it here."""
    if getattr(projection, "layer_norm_weight", None) is not None:
        return _hear_input(projection, lambda x_SBH: hear(_fused_norm(x_SBH, projection, arch)))

    @torch.no_grad()
    def hook(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        hear(output[0] if isinstance(output, tuple) else output)

    handle: RemovableHandle = norm.register_forward_hook(hook)
    return handle


def _fused_norm(x_SBH: Tensor, projection: Module, arch: ModelArch) -> Tensor:
    x_SBH = x_SBH.to(torch.promote_types(x_SBH.dtype, torch.float32))
    weight_H = projection.layer_norm_weight.to(x_SBH.dtype)
    size = (x_SBH.shape[-1],)
    if arch.normalization == "RMSNorm":
        return functional.rms_norm(x_SBH, size, weight_H, arch.norm_epsilon)
    # LayerNorm1p stores its weight minus one.
    bias_H = projection.layer_norm_bias.to(x_SBH.dtype)
    return functional.layer_norm(x_SBH, size, weight_H + 1, bias_H, arch.norm_epsilon)


def _hear_layer(layer: Module, row: int, tokens: TokenAccumulator) -> RemovableHandle:
    @torch.no_grad()
    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        before_SBH = args[0] if args else kwargs["hidden_states"]
        tokens.add(row, before_SBH, output[0] if isinstance(output, tuple) else output)

    handle: RemovableHandle = layer.register_forward_hook(hook, with_kwargs=True)
    return handle
