"""Listening to a Megatron-Core model: hooks that feed the statistics of every criterion and always come off again.

The model is only touched by the names of its modules, so nothing here imports Megatron: `decoder.layers[k]` with
`layer_number` (from 1, global). What is heard inside a layer is said by the sites.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.spread import by_layer
from minitron_nemo.importance.accumulators import Hearing
from minitron_nemo.importance.criteria import CRITERIA, Criterion
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.importance.sites import Module
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES


class ImportanceStatistics:
    """What the hooks have heard so far. One forward pass serves every axis and every batch aggregation."""

    def __init__(
        self,
        arch: ModelArch,
        *,
        layers: Sequence[int],
        sequence_aggregation: str = "mean",
        groups: Groups | None = None,
        device: torch.device | None = None,
        criteria: Mapping[str, Criterion] = CRITERIA,
    ) -> None:
        """`layers`: the global numbers, from 0, of the layers of this pipeline stage."""
        self.arch = arch
        self.layers = list(layers)
        self.sequence_aggregation = sequence_aggregation
        self.groups = groups or Groups()
        self.criteria = dict(criteria)
        self.statistics = {}  # axis -> one statistic for each site of its criterion
        for axis, criterion in self.criteria.items():
            hearing = Hearing(len(self.layers), AXES[axis].size(arch), sequence_aggregation, self.groups, device)
            self.statistics[axis] = [criterion.statistic(site, hearing) for site in criterion.sites]

    def attach(self, layer: Module, row: int, attached: ExitStack) -> None:
        """Hook every site of a layer, row `row` of this stage; each hook comes off with `attached`."""
        for statistics in self.statistics.values():
            for statistic in statistics:
                handle = statistic.site.attach(layer, self.arch, partial(statistic.add, row))
                attached.callback(handle.remove)

    def finish(self, batch_aggregation: str = "l2", *, data_fingerprint: str = "") -> ImportanceScores:
        """The scores of the whole model, the same on every rank; all ranks must call it together."""
        num_samples, num_tokens = self._heard()
        by_axis = {}
        for axis, statistics in self.statistics.items():
            tables = [self._by_layer(statistic.merged()).cpu() for statistic in statistics]
            by_axis[axis] = self.criteria[axis].finish(tables, batch_aggregation)
        return ImportanceScores(
            arch=self.arch,
            by_axis=by_axis,
            num_samples=num_samples,
            seq_length=num_tokens // num_samples,
            sequence_aggregation=self.sequence_aggregation,
            batch_aggregation=batch_aggregation,
            data_fingerprint=data_fingerprint,
        )

    def _by_layer(self, rows: Tensor) -> Tensor:
        return by_layer(rows, self.layers, num_layers=self.arch.num_layers, group=self.groups.pp)

    def _heard(self) -> tuple[int, int]:
        """Samples and tokens. Refuses statistics in which a layer is missing, is counted twice or missed a sample."""
        heard = {
            f"{axis} at {statistic.site.name}": self._by_layer(statistic.heard())
            for axis, statistics in self.statistics.items()
            for statistic in statistics
        }
        samples, tokens = torch.stack(list(heard.values())).flatten(0, 1).unbind(-1)
        if samples.min() != samples.max() or tokens.min() != tokens.max() or samples.min() == 0:
            table = {name: table_L2.int().tolist() for name, table_L2 in heard.items()}
            raise RuntimeError(
                f"samples heard at each layer must be equal and at least one, tokens equal: [samples, tokens] {table}"
            )
        return int(samples[0]), int(tokens[0])


@contextmanager
def listening(
    model: Module | Sequence[Module],
    *,
    arch: ModelArch,
    sequence_aggregation: str = "mean",
    groups: Groups | None = None,
    criteria: Mapping[str, Criterion] = CRITERIA,
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
        criteria=criteria,
    )
    with ExitStack() as attached:
        for row, layer in enumerate(layers):
            statistics.attach(layer, row, attached)
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
