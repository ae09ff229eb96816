"""Models cut along every axis say what transformers says of the same model with the rows removed by hand."""

import itertools
import json
from pathlib import Path

import torch
from hf_models import save_tiny_hf
from layouts import logits_of
from torch import Tensor

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import export_hf, import_hf, open_hf
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.pruning.plan import PruningPlan, identity
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import blocks_first, shrink
from minitron_nemo.steps.prune import prune
from minitron_nemo.testing import LAYOUTS, run_layout

# Sizes to prune to: one axis alone, then all of them together.
TARGETS = {
    "groups": {"num_query_groups": 2, "num_attention_heads": 4},
    "groups and heads": {"num_query_groups": 2, "num_attention_heads": 2},
    "everything": {"num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 32, "num_attention_heads": 2,
                   "num_query_groups": 2, "vocab_size": 90},
}  # fmt: skip
MODELS = {"llama": ("llama", {}), "tied": ("mistral", {"tie_word_embeddings": True}), "nemotron": ("nemotron", {}),
          "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {})}  # fmt: skip


def random_plan(arch: ModelArch, target: ModelArch, *, seed: int) -> PruningPlan:
    """Units drawn at random, other ones in every layer, evenly over what holds them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: int, count: int) -> list[int]:
        return sorted(torch.randperm(size, generator=generator)[:count].tolist())

    keep = dict(identity(target).keep)
    for axis in blocks_first():
        rows = []
        for row in range(target.num_layers if axis.per_layer else 1):
            blocks = keep[axis.within][row] if axis.within else (0,)
            held, count = axis.size(arch) // axis.blocks(arch), axis.size(target) // len(blocks)
            rows.append(tuple(block * held + unit for block in blocks for unit in drawn(held, count)))
        keep[axis.name] = tuple(rows)
    return PruningPlan(arch, target, keep)


def channels(blocks: list[int], size: int) -> list[int]:
    return [block * size + channel for block in blocks for channel in range(size)]


def by_hand(state: dict[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    """The smaller model's tensors, from Hugging Face's names and rows; knows nothing of our packings."""
    hidden = list(plan.units("hidden_size"))
    words = list(plan.units("vocab_size"))
    d, kept = plan.source.kv_channels, {}
    for place, layer in enumerate(plan.layers):
        groups, heads = (list(plan.units(axis, place)) for axis in ("num_query_groups", "num_attention_heads"))
        neurons = list(plan.units("ffn_hidden_size", place))
        rows = {"q_proj": channels(heads, d), "k_proj": channels(groups, d), "v_proj": channels(groups, d),
                "gate_proj": neurons, "up_proj": neurons}  # fmt: skip
        columns = {"o_proj": channels(heads, d), "down_proj": neurons}
        for name, tensor in state.items():
            if not name.startswith(f"model.layers.{layer}."):
                continue
            part = name.split(".")[-2]
            if name.endswith("_proj.bias"):
                tensor = tensor[rows[part]]
            elif part in ("q_norm", "k_norm"):
                pass  # the channels of a head stay
            elif part in rows:
                tensor = tensor[rows[part]][:, hidden]
            elif part in columns:
                tensor = tensor[hidden][:, columns[part]]
            else:
                tensor = tensor[hidden]
            kept[name.replace(f"layers.{layer}.", f"layers.{place}.")] = tensor
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            kept[name] = state[name][words][:, hidden]
    return kept | {name: state[name][hidden] for name in state if name.startswith("model.norm.")}


def imported(name: str, folder: Path) -> tuple[Path, NemoFolder]:
    """(a transformers model of three layers and four query groups, the same as `.nemo`)"""
    family, overrides = MODELS[name]
    source = save_tiny_hf(folder / f"{name}_hf", family, num_hidden_layers=3, num_attention_heads=8,
                          num_key_value_heads=4, tokenizer=False, **overrides)  # fmt: skip
    opened = open_hf(source)
    import_hf(opened, folder / f"{name}.nemo", tensors=stream(opened.weights), origin=Origin("whole"))
    return source, open_nemo(folder / f"{name}.nemo")


def smaller_config(folder: Path, plan: PruningPlan):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        folder, num_hidden_layers=plan.target.num_layers, hidden_size=plan.target.hidden_size,
        intermediate_size=plan.target.ffn_hidden_size, num_attention_heads=plan.target.num_attention_heads,
        num_key_value_heads=plan.target.num_query_groups, vocab_size=plan.target.vocab_size,
        layer_types=["full_attention"] * plan.target.num_layers,
    )  # fmt: skip


def test_a_model_cut_along_any_axes_is_the_one_cut_by_hand(tmp_path):
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    wanted, cuts = {}, {}
    for (seed, name), (target, sizes) in itertools.product(enumerate(MODELS), TARGETS.items()):
        if name != "llama" and target != "everything":
            continue
        case = f"{name}, {target}"
        if case not in ("llama, groups and heads", "llama, everything"):
            source, whole = imported(name, tmp_path)
            state = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
        plan = random_plan(whole.arch, shrink(whole.arch, **sizes), seed=seed)
        model = AutoModelForCausalLM.from_config(smaller_config(source, plan)).to(torch.float32).eval()
        missing = model.load_state_dict(by_hand(state, plan), strict=False)
        assert not missing.unexpected_keys
        assert all("lm_head" in key for key in missing.missing_keys)
        model.tie_weights()
        cuts[case] = prune(whole, plan, tmp_path / f"{case}.nemo")
        assert json.loads((cuts[case].path / "plan.json").read_text()) == json.loads(plan.to_json())
        with torch.no_grad():
            wanted[case] = model(tokens).logits
    ours = run_layout(logits_of, LAYOUTS["tp2"], [cut.path for cut in cuts.values()], tokens)
    for case, logits in zip(cuts, ours, strict=True):
        torch.testing.assert_close(torch.from_numpy(logits), wanted[case], rtol=0, atol=2e-5)
        assert wanted[case].std() > 1e-2, "logits that are all alike would prove nothing"
        export_hf(cuts[case], tmp_path / f"{case}_hf", origin=Origin("export"))
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"{case}_hf", dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(exported(tokens).logits, wanted[case], rtol=0, atol=1e-6)
