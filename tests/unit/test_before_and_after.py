"""What a dry run of `prune` sets side by side, and what it refuses before anything is cut."""

import json

import pytest

from minitron_nemo.config.compose import compose
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.plan import identity
from minitron_nemo.shape.axes import shrink
from minitron_nemo.steps.describe import describe
from recipes import prune


def dry_run(name: str, *overrides: str) -> dict[str, list[str]]:
    """The lines of a dry run by their first words, each as what stands in its last two columns."""
    lines = describe(prune.RECIPE, compose(name, list(overrides))).splitlines()
    return {" ".join(line.split()[:2]): line.split() for line in lines}


def test_the_published_cut_is_shown_with_the_published_numbers():
    """Hand-made: 8.03 B x 2 bytes is 15 GiB; 2 x 32 layers x 8 groups x 128 channels x 2 bytes is 128 KiB."""
    shown = describe(prune.RECIPE, compose("llama31_depth"))
    for words in (
        "num_layers 32 16",
        "hidden_size 4096 4096",
        "num_query_groups 8 8",
        "parameters 8.03 B 4.54 B",
        "without embeddings 6.98 B 3.49 B",
        "bf16 memory 15 GiB 8.46 GiB",
        "KV cache a token 128 KiB 64 KiB",
        "tensor parallel 1, 2, 4, 8 1, 2, 4, 8",
        "published before: Llama-3.1-8B (arXiv 2408.11796): 8.03 B parameters, 6.98 B without embeddings",
        "published after: Llama-3.1-Minitron-4B-Depth (arXiv 2408.11796): 4.54 B parameters, 3.49 B without embeddings",
    ):
        assert any(" ".join(line.split()) == words for line in shown.splitlines()), words
    assert "published" not in describe(prune.RECIPE, compose("quickstart"))


def test_flop_are_those_of_the_sequences_of_the_run():
    long, short = (dry_run("llama31_width", f"data.seq_length={n}")["FLOP a"][-2:] for n in (8192, 1024))
    assert float(short[0]) < float(long[0])


def test_the_rounding_of_a_budget_is_shown():
    unset = "prune.target={hidden_size: null, ffn_hidden_size: null, budget: {parameters: 4.6e9}}"
    shown = dry_run("llama31_width", unset)
    assert "4.41 B of at most 4.6 B (95.9%)" in " ".join(shown["budget parameters"])
    assert "4096 x 0.714 = 2926 -> 2816 (multiples of 256)" in " ".join(shown["rounded hidden_size"])
    assert shown["hidden_size 4096"][-1] == "2816"


def test_a_plan_file_is_what_is_shown_where_one_is_given(tmp_path):
    arch = compose("llama31_width").model_arch()
    target = shrink(arch, num_query_groups=4, num_attention_heads=16)
    values = json.loads(identity(target).to_json())
    values["source"] = arch.to_dict()
    values["keep"]["num_query_groups"] = [list(range(4))] * 32
    (tmp_path / "plan.json").write_text(json.dumps(values))
    shown = dry_run("llama31_width", f"prune.plan={tmp_path}/plan.json")
    assert shown["num_query_groups 8"][-1] == "4"
    assert shown["hidden_size 4096"][-1] == "4096", "the target of the config is not used"


def test_a_target_off_the_grid_of_the_ranks_is_refused():
    refused = r"^parallel.tensor_model_parallel_size=2: must divide the pruned model's ffn_hidden_size=9217; allowed"
    with pytest.raises(UserError, match=refused):
        dry_run("llama31_width", "prune.target.ffn_hidden_size=9217")
    with pytest.raises(UserError, match=r"pruned model's num_query_groups=7; allowed are 1"):
        dry_run("llama31_width", "prune.target.num_query_groups=7")
