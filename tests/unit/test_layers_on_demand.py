"""Layers that are elsewhere while they do not run: the same bits, few at a time, begun before they are needed."""

import pytest
import torch
from torch import nn

from minitron_nemo.distillation.layers_on_demand import LayersOnDemand, OnDemand
from minitron_nemo.distributed.flat import ALIGNMENT, FlatLayer

CPU = torch.device("cpu")
LAYERS, WIDTH = 5, 6


class Layer(nn.Module):
    """Two matrices and a vector, none of a size that fills whole units."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def on_demand(*, ahead: int, chunks: int = 1):
    """(a model as it is, the same on the meta device and on demand, what brings its layers in)."""
    torch.manual_seed(0)
    plain = nn.ModuleList(nn.Sequential(*(Layer() for _ in range(LAYERS))) for _ in range(chunks))
    with torch.device("meta"):
        model = nn.ModuleList(nn.Sequential(*(Layer() for _ in range(LAYERS))) for _ in range(chunks))
    values = iter([chunk_layer for chunk in plain for chunk_layer in chunk])

    def load(parameters):
        assert sum(parameter.numel() > 0 for parameter in model.parameters() if not parameter.is_meta) == 3
        for parameter, value in zip(parameters, next(values).parameters(), strict=True):
            parameter.data.copy_(value.data)

    layers = LayersOnDemand([(chunk, list(chunk)) for chunk in model], dtype=torch.float32, load=load,
                            how=OnDemand(ahead=ahead, device=CPU, in_host_memory=True))  # fmt: skip
    return plain, model, layers


@torch.no_grad()
@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
def test_layers_on_demand_are_the_same_bits_and_few_have_memory_at_a_time(ahead):
    plain, model, layers = on_demand(ahead=ahead, chunks=2)
    running, in_use = [], []
    for chunk in model:
        for layer in chunk:
            layer.register_forward_hook(lambda *_: in_use.append(len(layers.buffers) - len(layers._free)))
            layer.up.register_forward_hook(
                lambda *_: running.append(sum(parameter.numel() > 0 for parameter in model.parameters()))
            )
    for seed in range(2):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
        for ours, theirs in zip(model, plain, strict=True):
            assert torch.equal(ours(x), theirs(x))
    assert set(running) == {3}, "only the parameters of the layer that runs"
    assert max(in_use) <= min(ahead + 1, LAYERS)
    assert len(layers.buffers) == min(ahead + 1, LAYERS) == len(layers._free)
    assert not any(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_layer_is_on_its_way_before_those_ahead_of_it_have_run(ahead):
    _, model, layers = on_demand(ahead=ahead)
    happened: list[str] = []
    for number, resting in enumerate(layers.layers):
        share = resting.share.data_ptr()
        resting.layer.up.register_forward_hook(lambda *_, number=number: happened.append(f"run {number}"))
        layers.names = {**getattr(layers, "names", {}), share: number}
    bring = layers._bring
    layers._bring = lambda share, whole: (happened.append(f"bring {layers.names[share.data_ptr()]}"),
                                          bring(share, whole))[1]  # fmt: skip
    model[0](torch.ones(1, WIDTH))
    for number in range(LAYERS):
        begun = happened.index(f"bring {number}")
        before = sum(event.startswith("run") for event in happened[:begun])
        assert before == max(0, number - ahead), "not later, and not so early that it takes more memory"
    assert len(happened) == 2 * LAYERS


@pytest.mark.parametrize(("sizes", "item", "ranks"), [((1, 64, 65), 4, 1), ((7, 1000), 2, 3), ((129,), 2, 8)])
def test_a_flat_layer_holds_every_parameter_apart_in_equal_shares(sizes, item, ranks):
    flat = FlatLayer.of(sizes, item=item, ranks=ranks)
    ends = [start + size for start, size in zip(flat.starts, sizes, strict=True)]
    assert all(start * item % ALIGNMENT == 0 for start in flat.starts)
    assert all(end <= start for end, start in zip(ends, [*flat.starts[1:], flat.size], strict=True))
    assert flat.share * ranks == flat.size
    assert flat.share * item % ALIGNMENT == 0
    assert flat.size - sum(sizes) < (len(sizes) + ranks) * ALIGNMENT // item
