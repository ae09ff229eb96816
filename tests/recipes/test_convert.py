"""A conversion changes the form of a checkpoint and no bit of it; an audit says what it is and whether it is sound."""

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
import torch
from tiny_run import ROOT, tree

import minitron_nemo
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.audit import audit, in_lines
from minitron_nemo.checkpoint.formats.known import FORMATS, open_checkpoint
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.cli import run_command
from minitron_nemo.data.tokenizer import load_tokenizer, train_tokenizer
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import RopeScaling
from minitron_nemo.steps.convert import facts_of_source
from minitron_nemo.testing import TINY, random_nemo
from recipes.audit import main as run_audit


def convert(source, output, format, *overrides):
    words = [f"convert.source={source}", f"convert.output={output}", f"convert.format={format}", *overrides]
    recipe = importlib.import_module("recipes.convert").RECIPE
    return run_command(recipe, ["--config-name", "convert", *words])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    # The one scaling that every format can say.
    arch = dataclasses.replace(TINY["llama"], rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    return random_nemo(folder / "start.nemo", arch)


NORM = "decoder.final_layernorm.weight"
WRITTEN = [name for name, row in FORMATS.items() if row.write is not None]


@pytest.mark.parametrize("format", WRITTEN)
def test_every_format_that_is_written_comes_back_bit_for_bit(start, tmp_path, format):
    there, back = tmp_path / f"there_{format}", tmp_path / "back.nemo"
    layout = ["convert.tensor_model_parallel_size=2", "convert.pipeline_model_parallel_size=2"]
    assert convert(start.path, there, format, *(layout if FORMATS[format].splits else [])) == 0
    assert convert(there, back, "nemo") == 0
    again = open_nemo(back, verify=True)
    assert again.arch == start.arch
    for name in start.weights.names():
        assert torch.equal(again.weights.read(name), start.weights.read(name))
    assert open_checkpoint(there).format == format.removesuffix("_019")
    assert there.is_file() == format.endswith("_tar")
    if FORMATS[format].splits:
        assert len(list(there.rglob("*.distcp"))) == 4


def test_the_tokenizer_goes_along_and_what_is_done_is_not_done_again(start, tmp_path, capsys):
    tokenizer = train_tokenizer(["a b c"], vocab_size=257, output=tmp_path / "tokenizer")
    path, origin = tmp_path / "m.nemo", Origin("m")
    write_nemo(path, start.arch, stream(start.weights), dtype=start.dtype, tokenizer=tokenizer.folder, origin=origin)
    for source, format in ((path, "nemo_tar"), (tmp_path / "nemo_tar", "hf"), (tmp_path / "hf", "nemo")):
        assert convert(source, tmp_path / format, format) == 0
        assert load_tokenizer(tmp_path / format).fingerprint == tokenizer.fingerprint
    before = tree(tmp_path)
    assert convert(tmp_path / "hf", tmp_path / "nemo", "nemo") == 0
    assert tree(tmp_path) == before
    assert convert(path, tmp_path / "nemo", "nemo") == 2
    assert "set overwrite=true" in capsys.readouterr().err


def test_a_hugging_face_folder_has_its_page_whatever_it_was_made_of(start, tmp_path):
    """Of a model artefact its making, of what others made its shape; the words of the source's card stay its own."""
    assert convert(start.path, tmp_path / "of_ours", "hf") == 0
    assert convert(start.path, tmp_path / "foreign", "nemo1_tar") == 0
    assert convert(tmp_path / "foreign", tmp_path / "of_nemo1", "hf") == 0
    (tmp_path / "of_nemo1" / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (tmp_path / "of_nemo1" / "manifest.json").unlink()
    assert convert(tmp_path / "of_nemo1", tmp_path / "of_hf", "hf") == 0
    ours, foreign = ((tmp_path / name / "README.md").read_text() for name in ("of_ours", "of_hf"))
    assert "## How it was made" in ours
    assert "## How it was made" not in foreign
    assert "license: llama3.1" in foreign
    for text in (ours, foreign):
        assert f"| hidden | {start.arch.hidden_size} |" in text
        assert 'AutoModelForCausalLM.from_pretrained(".")' in text
    assert "Llama 3.1 Community License" in (tmp_path / "of_hf" / "NOTICE").read_text()


def test_from_python_a_name_is_enough(start, tmp_path):
    minitron_nemo.convert(start.path, tmp_path / "run", format="megatron", layout=Layout(tp=2))
    minitron_nemo.convert(tmp_path / "run", tmp_path / "back.nemo", format="nemo")
    minitron_nemo.convert(minitron_nemo.open_checkpoint(tmp_path / "run"), tmp_path / "again.nemo", format="nemo")
    back = open_nemo(tmp_path / "back.nemo", verify=True)
    assert torch.equal(back.weights.read(NORM), start.weights.read(NORM))
    assert back.manifest.extra["lineage"][0]["name"] == "run"
    assert open_nemo(tmp_path / "again.nemo").manifest.fingerprint != back.manifest.fingerprint
    for format in ("gguf", "nemo_state_dict"):
        with pytest.raises(UserError, match=f"format='{format}': not one that is written; those are nemo, nemo_tar, "):
            minitron_nemo.convert(start.path, tmp_path / "no", format=format)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["convert.source=null"], "convert.source is not set"),
        (["convert.source=nowhere"], "no such checkpoint"),
        (["convert.format=hf", "convert.tensor_model_parallel_size=2"], "its files follow no layout"),
        (
            ["convert.format=nemo", "convert.tensor_model_parallel_size=3"],
            "convert.tensor_model_parallel_size=3: must divide",
        ),
        (["convert.format=gguf"], "convert.format"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(start, tmp_path, capsys, overrides, says):
    assert convert(start.path, tmp_path / "out", "nemo", *overrides) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_audit_says_what_every_format_is(start, tmp_path):
    for format in WRITTEN:
        assert convert(start.path, tmp_path / format, format) == 0
        found = audit(tmp_path / format, values=True)
        assert (found.is_sound, found.format, found.finite) == (True, format.removesuffix("_019"), True), in_lines(
            found
        )
        assert (found.parameters, found.precision) == (start.arch.num_params(), "float32")
        assert found.tensors == len(start.weights.names())
        assert found.hashes
        assert f"{tmp_path / format}: sound" in in_lines(found)


def test_an_audit_names_the_first_fault(start, tmp_path, capsys):
    assert convert(start.path, tmp_path / "x.nemo", "nemo") == 0
    (shard,) = (tmp_path / "x.nemo" / "model_weights").glob("*.distcp")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 64
    shard.write_bytes(raw)
    assert run_audit([str(tmp_path / "x.nemo"), "--json"]) == 2
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["sound"], told["format"], told["hashes"]) == (False, "nemo", None)
    assert told["fault"] == f"{shard}: damaged: its SHA-256 is not that of manifest.json"
    assert printed.err == f"error: {told['fault']}\n"
    assert audit(tmp_path / "x.nemo", hashes=False).is_sound
    for path in (tmp_path / "nowhere", ROOT / "README.md", ROOT / "conf"):
        assert not audit(path).is_sound


def test_a_weight_that_is_no_number_is_found_when_values_are_asked_for(start, tmp_path):
    spoiled = start.weights.read("decoder.final_layernorm.weight").clone()
    spoiled[3] = torch.inf

    class Spoiled(type(start.weights)):
        def read(self, name, box=None):
            return spoiled if name == "decoder.final_layernorm.weight" else super().read(name, box)

    source = Spoiled(start.path / "model_weights", start.arch, source="test")
    write_nemo(tmp_path / "x.nemo", start.arch, stream(source), dtype=start.dtype, tokenizer=None, origin=Origin("f"))
    assert audit(tmp_path / "x.nemo").is_sound
    assert audit(tmp_path / "x.nemo", values=True).fault.endswith(
        "tensor decoder.final_layernorm.weight is not all finite numbers"
    )


def test_the_scripts_start_alone(start):
    command = [sys.executable, str(ROOT / "recipes" / "audit.py"), str(start.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"{start.path}: sound")


def test_a_foreign_checkpoint_is_known_again_by_its_content(start, tmp_path):
    assert convert(start.path, tmp_path / "hf", "hf") == 0
    (tmp_path / "hf" / "manifest.json").unlink()
    before = facts_of_source(tmp_path / "hf")
    assert {"config.json", "model.safetensors"} <= set(before)
    text = (tmp_path / "hf" / "config.json").read_text()
    (tmp_path / "hf" / "config.json").write_text(text.replace("1", "2", 1))
    after = facts_of_source(tmp_path / "hf")
    assert [name for name in before if before[name] != after[name]] == ["config.json"]
