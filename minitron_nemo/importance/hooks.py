"""Listening to a Megatron-Core model: hooks that feed the statistics of every criterion and always come off again.

The model is only touched by the names of its modules, so nothing here imports Megatron: `decoder.layers[k]` with
`layer_number` (from 1, global), and `decoder.final_layernorm` on the last pipeline stage. What is heard inside a layer
is said by the sites.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.spread import by_layer
from minitron_nemo.importance.accumulators import Hearing, Statistic
from minitron_nemo.importance.criteria import Criterion, chosen
from minitron_nemo.importance.scores import ImportanceScores, scores_of
from minitron_nemo.importance.sites import Module, Site
from minitron_nemo.importance.sums import Heard, ImportanceSums, Part
from minitron_nemo.shape.arch import ModelArch


class ImportanceStatistics:
    """What the hooks have heard so far. One forward pass serves every axis and every batch aggregation."""

    def __init__(
        self,
        arch: ModelArch,
        *,
        layers: Sequence[int],
        has_end: bool = True,
        sequence_aggregation: str = "mean",
        groups: Groups | None = None,
        device: torch.device | None = None,
        criteria: Mapping[str, Criterion] | None = None,
    ) -> None:
        """`layers`: the global numbers, from 0, of the layers of this pipeline stage; `has_end`: it is the last."""
        self.arch = arch
        self.layers = list(layers)
        self.has_end = has_end
        self.sequence_aggregation = sequence_aggregation
        self.groups = groups or Groups()
        self.criteria = dict(chosen() if criteria is None else criteria)
        self.statistics = {}  # axis -> one statistic for each site of its criterion
        for axis, criterion in self.criteria.items():
            self.statistics[axis] = [
                criterion.statistic(site, self._hearing(site, criterion, device)) for site in criterion.sites
            ]

    def _hearing(self, site: Site, criterion: Criterion, device: torch.device | None) -> Hearing:
        rows = int(self.has_end) if site.once else len(self.layers)
        return Hearing(rows, criterion.units(self.arch), self.sequence_aggregation, self.groups, device)

    def attach(self, module: Module, row: int, attached: ExitStack, *, once: bool = False) -> None:
        """Hook the sites of a layer, row `row` of this stage, or those heard `once`; they come off with `attached`."""
        for statistics in self.statistics.values():
            for statistic in statistics:
                if statistic.site.once == once:
                    handle = statistic.site.attach(module, self.arch, partial(statistic.add, row))
                    attached.callback(handle.remove)

    def finish(self, batch_aggregation: str = "l2", *, data_fingerprint: str = "") -> ImportanceScores:
        """The scores of the whole model, the same on every rank; all ranks must call it together."""
        return scores_of(self.sums(data_fingerprint), batch_aggregation)

    def sums(self, data_fingerprint: str = "") -> ImportanceSums:
        """What was heard so far, as one part, the same on every rank; all ranks must call it together."""
        num_samples, num_tokens = self._heard()
        heard, part = Heard(data_fingerprint, num_samples, num_tokens // num_samples), self._part(0, num_samples)
        return ImportanceSums(self.arch, self.criteria, self.sequence_aggregation, heard, (part,))

    def take(self, samples: range) -> Part:
        """What was heard since the last time, which were these samples of the set, and forget it; on all ranks.

        The same on every rank. Refuses another number of samples than that.
        """
        num_samples, _ = self._heard()
        if num_samples != len(samples):
            raise RuntimeError(f"heard {num_samples} samples, not the {len(samples)} from {samples.start} on")
        part = self._part(samples.start, samples.stop)
        for statistics in self.statistics.values():
            for statistic in statistics:
                statistic.forget()
        return part

    def _part(self, first: int, end: int) -> Part:
        """Of every axis the merged table of each site, over all ranks and layers, float64 on CPU."""
        tables = {
            axis: tuple(self._by_layer(statistic, statistic.merged()).cpu() for statistic in statistics)
            for axis, statistics in self.statistics.items()
        }
        return Part(first, end, tables)

    def _by_layer(self, statistic: Statistic, rows: Tensor) -> Tensor:
        here, everywhere = (self.layers, self.arch.num_layers)
        if statistic.site.once:
            here, everywhere = ([0] * self.has_end, 1)
        return by_layer(rows, here, num_layers=everywhere, group=self.groups.pp)

    def _heard(self) -> tuple[int, int]:
        """Samples and tokens. Refuses statistics in which a layer is missing, is counted twice or missed a sample."""
        heard = {
            f"{axis} at {statistic.site.name}": self._by_layer(statistic, statistic.heard())
            for axis, statistics in self.statistics.items()
            for statistic in statistics
        }
        samples, tokens = torch.cat(list(heard.values())).unbind(-1)
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
    criteria: Mapping[str, Criterion] | None = None,
) -> Iterator[ImportanceStatistics]:
    """Statistics of every forward pass inside the `with`; the hooks are gone after it, however it ends.

    `model` is this rank's GPT model, wrapped or not, or its list of virtual pipeline chunks. `criteria` are by default
    those of the published code.
    """
    layers, end = decoder_layers(model), _end(model)
    statistics = ImportanceStatistics(
        arch,
        layers=[layer.layer_number - 1 for layer in layers],
        has_end=end is not None,
        sequence_aggregation=sequence_aggregation,
        groups=groups,
        device=device_of(layers),
        criteria=criteria,
    )
    with ExitStack() as attached:
        for row, layer in enumerate(layers):
            statistics.attach(layer, row, attached)
        if end is not None:
            statistics.attach(end, 0, attached, once=True)
        yield statistics


def decoders(model: Module | Sequence[Module]) -> list[Module]:
    """The decoders on this rank, through any wrappers (`.module`)."""
    found: list[Module] = []
    several = isinstance(model, Sequence | nn.ModuleList)
    chunks: Sequence[Module] = model if several else [model]
    for chunk in chunks:
        while not hasattr(chunk, "decoder"):
            chunk = chunk.module
        found.append(chunk.decoder)
    return found


def decoder_layers(model: Module | Sequence[Module]) -> list[Module]:
    """The transformer layers on this rank."""
    return [layer for decoder in decoders(model) for layer in decoder.layers]


def _end(model: Module | Sequence[Module]) -> Module | None:
    """The decoder that ends in the final norm, where it is on this rank."""
    ends = [decoder for decoder in decoders(model) if getattr(decoder, "final_layernorm", None) is not None]
    return ends[-1] if ends else None


def device_of(layers: Sequence[Module]) -> torch.device:
    """Where the layers of this rank are; the CPU when it has none."""
    first = next((weight for layer in layers for weight in layer.parameters()), None)
    return torch.device("cpu") if first is None else first.device
