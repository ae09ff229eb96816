"""Second moments of what enters the matrices of a model, from the forward passes of importance; repairs need them.

`second_moments.safetensors` lies beside the scores. For each layer it has the sums over all tokens of x_i x_j, and in a
row more those of x_i: float32 [U + 1, U]

    input_layernorm.layer_00     x = n, the residual stream normalized before attention, without the norm's weight
    linear_proj.layer_00         x = outputs of the heads, on their way to the output projection
    pre_mlp_layernorm.layer_00   x = n before the MLP
    linear_fc2.layer_00          x = the neurons
    final_layernorm              x = n behind the last layer
    tokens                       how many tokens the sums are over, [1]

Such sums add up over jobs, to the rounding of float32. While an estimate is under way they are kept in float64.

Layers from 0. For a model of L layers, H channels, C channels of heads and F neurons these are 4 L (2 H^2 + C^2 + F^2)
bytes, and twice that on the devices while they are gathered (float64), over which tensor parallelism shares C and F.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.spread import Spread, merge
from minitron_nemo.errors import UserError
from minitron_nemo.importance.accumulators import Hearing, SecondMoments
from minitron_nemo.importance.hooks import decoder_layers, device_of
from minitron_nemo.importance.sites import (
    FINAL_NORM,
    HEAD_CHANNELS,
    NEURONS,
    NORM_BEFORE_ATTENTION,
    NORM_BEFORE_MLP,
    Module,
    Site,
)
from minitron_nemo.shape.arch import ModelArch

FILE = "second_moments.safetensors"
TOKENS = "tokens"
SITES = (NORM_BEFORE_ATTENTION, HEAD_CHANNELS, NORM_BEFORE_MLP, NEURONS)


def units_at(site: str, arch: ModelArch) -> int:
    """How many numbers are heard at a site."""
    sizes = {HEAD_CHANNELS.name: arch.query_size, NEURONS.name: arch.ffn_hidden_size}
    return sizes.get(site, arch.hidden_size)


def shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """What the file holds for a model: names in their order, and shapes."""
    names = [name_of(site.name, layer) for layer in range(arch.num_layers) for site in SITES]
    found = {name: units_at(name.partition(".")[0], arch) for name in [*names, FINAL_NORM.name]}
    return {name: (units + 1, units) for name, units in found.items()} | {TOKENS: (1,)}


def name_of(site: str, layer: int | None) -> str:
    """`linear_fc2.layer_03`; of the final norm there is one."""
    return site if layer is None else f"{site}.layer_{layer:02d}"


class SecondMomentStatistics:
    """What the hooks have heard so far, on this rank."""

    def __init__(self, arch: ModelArch, *, groups: Groups, device: torch.device | None) -> None:
        self.arch, self.groups, self.device = arch, groups, device
        self.statistics: dict[str, SecondMoments] = {}

    def attach(self, layer: Module, number: int, attached: ExitStack) -> None:
        """Hook the sites of a layer of this stage, counted from 0 over the model."""
        for site in SITES:
            self._attach(layer, site, name_of(site.name, number), attached)
        if number == self.arch.num_layers - 1:
            self._attach(layer, FINAL_NORM, FINAL_NORM.name, attached)

    def _attach(self, layer: Module, site: Site, name: str, attached: ExitStack) -> None:
        hearing = Hearing(1, units_at(site.name, self.arch), groups=self.groups, device=self.device)
        self.statistics[name] = SecondMoments(site, hearing)
        attached.callback(site.attach(layer, self.arch, partial(self.statistics[name].add, 0)).remove)

    def restore(self, file: "SecondMomentFile") -> None:
        """Begin with what an earlier run heard, under whatever layout."""
        for name, statistic in self.statistics.items():
            width, shards = statistic.values.shape[-1], statistic.site.units is Spread.SHARDED
            first = width * self.groups.tp_rank if shards else 0
            statistic.restore(file.read(name, slice(first, first + width)).to(self.device), int(file.tokens))

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the file in its order, one at a time, the same on every rank; all ranks must take all."""
        tokens = set()
        for name, shape in shapes(self.arch).items():
            if name == TOKENS:
                continue
            # The ranks of the other pipeline stages give zeros.
            values = torch.zeros((*shape,), dtype=torch.float64, device=self.device)
            heard = torch.zeros(1, dtype=torch.float64, device=self.device)
            if (statistic := self.statistics.get(name)) is not None:
                values, heard = statistic.merged()[0], statistic.heard()[:, 1]
            tokens.add(float(merge(heard, Spread.PARTIAL, self.groups.pp)))
            yield name, merge(values, Spread.PARTIAL, self.groups.pp).cpu().to(dtype)
        if len(tokens) != 1 or tokens == {0.0}:
            raise RuntimeError(f"tokens heard at each site must be equal and at least one, they are {sorted(tokens)}")
        yield TOKENS, torch.tensor(list(tokens), dtype=dtype)


@contextmanager
def listening_to_second_moments(
    model: Module | Sequence[Module], *, arch: ModelArch, groups: Groups | None = None
) -> Iterator[SecondMomentStatistics]:
    """Second moments of every forward pass inside the `with`; the hooks are gone after it, however it ends."""
    layers = decoder_layers(model)
    statistics = SecondMomentStatistics(arch, groups=groups or Groups(), device=device_of(layers))
    with ExitStack() as attached:
        for layer in layers:
            statistics.attach(layer, layer.layer_number - 1, attached)
        yield statistics


class SecondMomentFile:
    """The file of an importance folder, a tensor read when it is asked for.

    Raises UserError when there is none, or when it is not for the model `arch`.
    """

    def __init__(self, folder: Path | str, arch: ModelArch) -> None:
        self.path = Path(folder) / FILE
        if not self.path.is_file():
            raise UserError(
                f"{folder} has no second moments, which this repair needs; run estimate_importance with "
                "estimate_importance.second_moments=true"
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.path}: cannot be read ({reason}); run estimate_importance again") from None
        if found != shapes(arch):
            raise UserError(f"{self.path}: was made from another model; run estimate_importance on this one")
        self.arch = arch
        self.tokens = float(self.read(TOKENS))

    def sums(self, site: str, layer: int | None) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of x_i x_j [U, U] and of x_i [U], float64."""
        values = self.read(name_of(site, layer)).double()
        if not torch.isfinite(values).all():
            raise UserError(f"{self.path}: {name_of(site, layer)} is not finite; run estimate_importance again")
        return values[:-1], values[-1]

    def read(self, name: str, columns: slice = slice(None)) -> Tensor:
        """A tensor of the file as it is stored, or some of its columns."""
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[..., columns]
        return tensor


def added(files: Sequence[SecondMomentFile], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of several jobs added up, one at a time."""
    for name in shapes(files[0].arch):
        total = files[0].read(name).double()
        for other in files[1:]:
            total += other.read(name)
        yield name, total.to(dtype)
