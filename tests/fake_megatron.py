"""A model with Megatron-Core's module names that replays given activations, for tests of the listening hooks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitron_nemo.shape.arch import ModelArch

ARCH = ModelArch(num_layers=4, hidden_size=12, ffn_hidden_size=16, num_attention_heads=8, num_query_groups=4,
                 kv_channels=3, vocab_size=32, seq_length=64)  # fmt: skip


@dataclass(frozen=True)
class Tape:
    """What happens inside one layer: every activation the hooks can hear, each [s, b, channels]."""

    before: Tensor
    norm_1: Tensor
    attention: Tensor
    norm_2: Tensor
    neurons: Tensor
    after: Tensor

    def shard(self, *, rank: int, tp: int, sequence_parallel: bool) -> "Tape":
        """What tensor-parallel rank `rank` of `tp` sees."""
        by_sequence = (lambda x: x.chunk(tp, dim=0)[rank]) if sequence_parallel else (lambda x: x)
        by_unit = lambda x: x.chunk(tp, dim=-1)[rank]  # noqa: E731
        return Tape(
            before=by_sequence(self.before), norm_1=by_sequence(self.norm_1), attention=by_unit(self.attention),
            norm_2=by_sequence(self.norm_2), neurons=by_unit(self.neurons), after=by_sequence(self.after),
        )  # fmt: skip


def random_tapes(arch: ModelArch, *, seq: int, batch: int, seed: int) -> list[Tape]:
    """One tape per layer; samples and channels differ in scale, so that wrong merges show.

    float64, in which laws hold to the last digits; what float32 and bfloat16 lose is the estimators' own test.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(channels: int) -> Tensor:
        x = torch.randn(seq, batch, channels, generator=generator, dtype=torch.float64)
        return x * torch.rand(batch, 1, generator=generator) * 3 + torch.randn(channels, generator=generator)

    tapes = []
    for _ in range(arch.num_layers):
        before = noise(arch.hidden_size)
        tapes.append(Tape(before=before, norm_1=noise(arch.hidden_size), attention=noise(arch.query_size),
                          norm_2=noise(arch.hidden_size), neurons=noise(arch.ffn_hidden_size),
                          after=before + 0.5 * noise(arch.hidden_size)))  # fmt: skip
    return tapes


class Pass(nn.Module):
    """Gives back what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FakeLayer(nn.Module):
    def __init__(self, layer_number: int, *, norm_returns_tuple: bool = False) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.input_layernorm, self.pre_mlp_layernorm = TuplePass() if norm_returns_tuple else Pass(), Pass()
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.self_attention.linear_qkv, self.self_attention.linear_proj = Pass(), Pass()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = Pass(), Pass()

    def forward(self, hidden_states: Tensor, tape: Tape) -> tuple[Tensor, None]:
        self.input_layernorm(tape.norm_1)
        self.self_attention.linear_qkv(tape.norm_1)
        self.self_attention.linear_proj(tape.attention)
        self.pre_mlp_layernorm(tape.norm_2)
        self.mlp.linear_fc1(tape.norm_2)
        self.mlp.linear_fc2(tape.neurons)
        return tape.after, None


class TuplePass(Pass):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class FakeModel(nn.Module):
    """The layers of one pipeline stage, `numbers` counted from 1."""

    def __init__(self, numbers: list[int], **options: bool) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(FakeLayer(number, **options) for number in numbers)

    def forward(self, tapes: list[Tape]) -> None:
        for layer in self.decoder.layers:
            tape = tapes[layer.layer_number - 1]
            layer(hidden_states=tape.before, tape=tape)


def select_samples(tapes: list[Tape], samples: slice) -> list[Tape]:
    return [Tape(**{name: x[:, samples] for name, x in vars(tape).items()}) for tape in tapes]
