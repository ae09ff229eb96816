"""An imported model says what transformers says, under every layout, and saving it changes no bit."""

import itertools

import pytest
import torch
from hf_models import LLAMA3_ROPE, save_tiny_hf
from layouts import assert_same_weights, logits_and_copies, whole_logits

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import import_hf, open_hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.pruning.plain_forward import plain_logits
from minitron_nemo.testing import ALONE, LAYOUTS, run_layout

# Three layers do not divide over two stages; 32 original positions are far from Megatron's built-in 8192, and
# sequences longer than that make every branch of the scaling count; 4 heads of 12 channels are not 32.
MODELS = {
    "llama": ("llama", {}),
    "llama32": ("llama", {"tie_word_embeddings": True, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}}),
    "mistral": ("mistral", {}),
    "nemotron": ("nemotron", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


def logits_of_hf(groups, folder, tokens, documents=None):
    source = open_hf(folder)
    model = build_model(source.arch, BuildOptions(groups=groups))
    load_weights(model, source.weights, groups)
    apart = {} if documents is None else {"documents": documents}
    return whole_logits(model, tokens, vocab_size=source.arch.vocab_size, groups=groups, **apart).numpy()


CHECKED = {"alone": ALONE, **{name: LAYOUTS[name] for name in ("tp2", "tp2_sp", "pp2", "tp2_pp2")}}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Model name -> (.nemo folder, tokens, the logits of transformers)."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("imported")
    tokens = torch.randint(0, 131, (2, 48), generator=torch.Generator().manual_seed(1))
    models = {}
    for name, (family, overrides) in MODELS.items():
        source = save_tiny_hf(folder / f"{name}_hf", family, num_hidden_layers=3, **overrides)
        path = folder / f"{name}.nemo"
        folder_hf = open_hf(source)
        import_hf(folder_hf, path, tensors=stream(folder_hf.weights), origin=Origin(name))
        with torch.no_grad():
            wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(tokens).logits
        models[name] = (path, tokens, wanted)
    return models


@pytest.mark.parametrize("layout", CHECKED)
def test_imported_models_equal_transformers_and_save_unchanged(layout, imported, tmp_path):
    stages = [1, 2] if layout == "tp2_pp2" else None
    copies = {name: tmp_path / f"{name}.nemo" for name in imported}
    jobs = [(path, copies[name], tokens, stages) for name, (path, tokens, _) in imported.items()]
    answers = run_layout(logits_and_copies, CHECKED[layout], jobs)
    for (name, (path, _, wanted)), logits in zip(imported.items(), answers, strict=True):
        assert wanted.std() > 0.05, "logits that are all alike would prove nothing"
        torch.testing.assert_close(
            torch.from_numpy(logits), wanted, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert_same_weights(open_nemo(copies[name]), open_nemo(path))


def test_a_hugging_face_folder_is_a_source_like_any_other(imported):
    """Its weights go into a model straight away, each rank reading its boxes."""
    path, tokens, wanted = imported["llama"]
    logits = run_layout(logits_of_hf, LAYOUTS["tp2"], path.with_name("llama_hf"), tokens)
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["alone", "tp2_sp", "pp2"])
def test_documents_kept_apart_are_what_each_is_alone(layout, imported):
    """Of three in a sample; positions are not reset, and need not be: rotary embeddings are relative."""
    from transformers import AutoModelForCausalLM

    path, tokens, together = imported["llama"]
    ends = [0, 20, 21, 48]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(ends).diff()).expand_as(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(path.with_name("llama_hf"), dtype=torch.float32).eval()
    with torch.no_grad():
        alone = [theirs(tokens[:, start:end]).logits for start, end in itertools.pairwise(ends)]
    logits = torch.from_numpy(run_layout(logits_of_hf, CHECKED[layout], path.with_name("llama_hf"), tokens, documents))
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
    assert (logits - together)[:, 20:].abs().max() > 1e-2, "documents that mix would look the same"


def test_the_comparison_notices_a_wrong_rotary_scaling(imported, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    path, tokens, _ = imported["llama"]
    source = path.with_name("llama_hf")
    config = AutoConfig.from_pretrained(
        source, rope_parameters={**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    )
    with torch.no_grad():
        wrong = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32).eval()(tokens).logits
    (ours,) = run_layout(logits_and_copies, ALONE, [(path, tmp_path / "copy.nemo", tokens, None)])
    assert (torch.from_numpy(ours) - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_forward_pass_equals_transformers_and_so_the_engine(name, imported):
    path, tokens, wanted = imported[name]
    weights = open_nemo(path).weights
    torch.testing.assert_close(plain_logits(weights, tokens), wanted, rtol=0, atol=1e-5)
    in_bf16 = plain_logits(weights, tokens, dtype=torch.bfloat16)
    assert in_bf16.dtype is torch.float32
    assert 1e-5 < (in_bf16 - wanted).abs().max() < 0.05, "rounded to 16 bits between the products, and no coarser"
