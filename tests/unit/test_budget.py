"""A budget becomes the largest shape of its rule: within the limit, on the grid, and no common factor does better."""

import dataclasses
import math
import re
from fractions import Fraction

import pytest

from minitron_nemo.config.compose import compose
from minitron_nemo.config.shapes import BudgetConfig, TargetConfig
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch, billions
from minitron_nemo.shape.budget import Budget, fit, granularity
from minitron_nemo.shape.figures import FIGURES, Workload
from minitron_nemo.testing import TINY

LLAMA = compose("llama31_width").model_arch()
NEMOTRON = compose("nemotron4_8b").model_arch()
SMALL = dataclasses.replace(TINY["nemotron"], hidden_size=64, ffn_hidden_size=160)
WORK = Workload(seq_length=64)
UNSET = ["prune.target={hidden_size: null, ffn_hidden_size: null}"]
WIDTH = ("hidden_size", "ffn_hidden_size")
EVERYTHING = (*WIDTH, "num_layers", "num_attention_heads", "num_query_groups")


def fitted(source: ModelArch, limits: dict[str, float], *, axes=WIDTH, tp: int = 1, **fixed: int) -> ModelArch:
    multiples = granularity(source, {}, tp=tp)
    return fit(source, Budget(limits, WORK), axes=axes, fixed=fixed, multiples=multiples).arch


def by_hand(source: ModelArch, limit: float, figure: str, *, channels: int, neurons: int) -> ModelArch:
    """The rule as it is written down: try every factor from 1 downwards, round down, take the first that fits."""
    grid = {Fraction(lot * n, size) for lot, size in ((channels, source.hidden_size), (neurons, source.ffn_hidden_size))
            for n in range(1, size // lot + 1)}  # fmt: skip
    for factor in sorted(grid | {Fraction(1)}, reverse=True):
        hidden = max(math.floor(factor * source.hidden_size / channels), 1) * channels
        ffn = max(math.floor(factor * source.ffn_hidden_size / neurons), 1) * neurons
        if factor == 1:
            hidden, ffn = source.hidden_size, source.ffn_hidden_size
        arch = dataclasses.replace(source, hidden_size=hidden, ffn_hidden_size=ffn)
        if FIGURES[figure].of(arch, WORK) <= limit:
            return arch
    raise AssertionError("nothing fits")


@pytest.mark.parametrize("share", [0.97, 0.7, 0.45, 0.2])
@pytest.mark.parametrize("figure", ["parameters", "non_embedding_parameters", "memory_bytes", "flops_per_token"])
def test_the_shape_is_that_of_the_rule_written_out(figure, share):
    for source, channels, neurons in ((NEMOTRON, 256, 512), (SMALL, 8, 16)):
        limit = share * FIGURES[figure].of(source, WORK)
        assert fitted(source, {figure: limit}) == by_hand(source, limit, figure, channels=channels, neurons=neurons)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_every_size_is_on_the_grid(tp, share):
    for source in (LLAMA, TINY["llama"], TINY["nemotron"]):
        limit = share * source.num_params()
        arch = fitted(source, {"parameters": limit}, axes=EVERYTHING, tp=tp)
        assert arch.num_params() <= limit
        assert all(size % tp == 0 for size in (arch.ffn_hidden_size, arch.num_query_groups, arch.num_attention_heads))
        assert arch.num_attention_heads % arch.num_query_groups == 0
        assert arch.heads_per_group <= source.heads_per_group
        if source.family == "llama":
            assert arch.hidden_size % arch.num_attention_heads == 0, "transformers would not open it"
    assert fitted(LLAMA, {"parameters": 5e9}).hidden_size % 256 == 0
    assert fitted(LLAMA, {"parameters": 5e9}).ffn_hidden_size % 512 == 0


def test_a_model_that_fits_stays_as_it_is_also_off_the_grid():
    odd = dataclasses.replace(SMALL, hidden_size=61, ffn_hidden_size=157)
    assert fitted(odd, {"parameters": odd.num_params()}) == odd
    assert fitted(odd, {"parameters": odd.num_params() - 1}) != odd


def test_what_is_fixed_stays_and_the_rest_pays_for_it():
    arch = fitted(LLAMA, {"parameters": 5e9}, num_layers=28, hidden_size=3584)
    assert (arch.num_layers, arch.hidden_size) == (28, 3584)
    assert arch.ffn_hidden_size < 14336


def test_several_limits_all_hold():
    limits = {"parameters": 6e9, "flops_per_token": 8e9, "kv_cache_bytes_per_token": 70000}
    arch = fitted(LLAMA, limits, axes=(*WIDTH, "num_query_groups"))
    assert all(FIGURES[name].of(arch, WORK) <= most for name, most in limits.items())
    assert (arch.num_query_groups, arch.num_attention_heads) == (4, 16), "query heads go with their group"


def test_memory_counts_the_weights_and_the_cache_that_is_asked_for():
    work = Workload(1, cached_tokens=1000)
    cache = 2 * 32 * 8 * 128 * 2 * 1000  # keys and values, layers, groups, channels, bytes, tokens
    assert FIGURES["memory_bytes"].of(LLAMA, work) == 2 * LLAMA.num_params() + cache
    budget = Budget({"memory_bytes": 12e9}, Workload(1, cached_tokens=16384))
    with_cache = fit(LLAMA, budget, axes=WIDTH, fixed={}, multiples=granularity(LLAMA, {}, tp=1)).arch
    assert with_cache.num_params() < fitted(LLAMA, {"memory_bytes": 12e9}).num_params()


def test_a_budget_out_of_reach_is_refused_with_the_smallest_figure_in_reach():
    for limits, said in (
        ({"parameters": 1e6}, r"budget.parameters=1e\+06: cannot be met: shrinking hidden_size \(multiples of 256\)"),
        ({"kv_cache_bytes_per_token": 1e5, "parameters": 5e9}, r"budget.kv_cache_bytes_per_token=100000: cannot be "
         r"met: .* reaches 131072 \(128 KiB\) at the least; .*prune.target.budget.axes"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as refused:
            fitted(LLAMA, limits)
        assert "\n" not in str(refused.value)
    smallest = dataclasses.replace(LLAMA, hidden_size=256, ffn_hidden_size=512).num_params()
    with pytest.raises(UserError, match=re.escape(f"reaches {smallest:g} ({billions(smallest)})")):
        fitted(LLAMA, {"parameters": 1e6})
    with pytest.raises(UserError, match="shrinking no axis"):
        fitted(LLAMA, {"parameters": 1e6}, hidden_size=4096, ffn_hidden_size=14336)


def test_a_config_fits_its_budget_for_its_ranks_and_its_sequences():
    budget = ["prune.target.budget={flops_per_token: 1.2e10, ffn_multiple: 1, hidden_multiple: 64}"]
    config = compose("llama31_width", [*UNSET, *budget, "parallel.tensor_model_parallel_size=8"])
    found = config.fit(LLAMA)
    assert found.arch.ffn_hidden_size % 8 == 0
    assert found.arch.flops_per_token(8192) <= 1.2e10
    shorter = compose("llama31_width", [*UNSET, *budget, "data.seq_length=1024"]).fit(LLAMA).arch
    assert shorter.num_params() > found.arch.num_params(), "attention costs less in shorter sequences"
    assert any("rounded   hidden_size 4096 x" in line and "(multiples of 64)" in line for line in found.lines)
    assert "of at most 12 G" in found.lines[0]


def test_a_target_with_an_empty_or_impossible_budget_is_refused():
    with pytest.raises(UserError, match="^prune.target.budget: limits nothing; set one of parameters, "):
        TargetConfig(budget=BudgetConfig()).shrink(LLAMA)
    with pytest.raises(UserError, match="^prune.target.budget.parameters=1: cannot be met"):
        TargetConfig(budget=BudgetConfig(parameters=1)).shrink(LLAMA)
    with pytest.raises(UserError, match=r"budget.axes=.*each must be one of hidden_size"):
        compose("llama31_width", ["prune.target.budget={parameters: 5e9, axes: [kv_channels]}"])


def test_groups_take_their_heads_unless_heads_are_said():
    assert TargetConfig(num_query_groups=4).shrink(LLAMA).num_attention_heads == 16
    assert TargetConfig(num_query_groups=4, num_attention_heads=8).shrink(LLAMA).num_attention_heads == 8
