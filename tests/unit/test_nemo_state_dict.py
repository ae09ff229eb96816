"""What NeMo's connector writes is read without NeMo; anything else under its name is refused, and never run.

That NeMo writes what is made here is held by `nemo_checks.py`.
"""

import io
import os
import pickle
import tarfile

import pytest
import torch
import yaml
from hf_models import save_tiny_tokenizer

from minitron_nemo.artefacts.contents import contents_of
from minitron_nemo.checkpoint.formats.nemo import config_values
from minitron_nemo.checkpoint.formats.nemo_state_dict import open_checkpoint, recognise
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

ARCH = ModelArch(2, 16, 24, 4, 2, 4, 19, 32)
STATE = {f"model.{name}": RandomWeights(ARCH, seed=0).read(name) for name in RandomWeights(ARCH, seed=0).names()}
CONFIG = {**config_values(ARCH, torch.float32), "nemo_version": "3.0.0"}
HEX = "0a1b" * 8
ONE = "model.decoder.final_layernorm.weight"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def saved(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def write(path, *, config=CONFIG, state=STATE, weights=None, files=None):
    members = {"model_config.yaml": yaml.safe_dump(config).encode(),
               "model_weights.ckpt": saved(state) if weights is None else weights, **(files or {})}  # fmt: skip
    with tarfile.open(path, "w:") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return contents_of(path)


def test_weights_shape_and_tokenizer_come_back(tmp_path):
    words = save_tiny_tokenizer(tmp_path / "words", vocab_size=19)
    files = {f"{HEX}_tokenizer.json": (words / "tokenizer.json").read_bytes()}
    config = {**CONFIG, "target": "os.system", "tokenizer": {"tokenizer_json": f"nemo:{HEX}_tokenizer.json"}}
    contents = write(tmp_path / "a.nemo", config=config, files=files)
    assert recognise(contents)
    opened = open_checkpoint(contents)
    assert (opened.arch, opened.dtype) == (ARCH, torch.float32)
    assert opened.notes == ("NeMo 3.0.0",)
    assert opened.weights.names() == [name.removeprefix("model.") for name in STATE]
    for name in opened.weights.names():
        assert torch.equal(opened.weights.read(name), STATE[f"model.{name}"])
    box = Box((3, 2), (4, 5))
    assert torch.equal(opened.weights.read("output_layer.weight", box), STATE["model.output_layer.weight"][3:7, 2:7])
    assert opened.tokenizer.names() == ["tokenizer.json"]
    assert opened.tokenizer.find("tokenizer.json").read() == files[f"{HEX}_tokenizer.json"]
    assert opened.tokenizer.find("tokenizer.model") is None
    assert not opened.tokenizer.inside("more").names()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"state": {name: value for name, value in STATE.items() if name != ONE}}, "final_layernorm.weight is missing"),
        ({"state": {**STATE, ONE: torch.ones(17)}}, "is (17,)"),
        ({"state": {**STATE, "model.more": torch.ones(1)}}, "model.more: belongs to no part of the model"),
        ({"state": {name: value.half() for name, value in STATE.items()}}, "are torch.float16; model_config.yaml says"),
        ({"weights": b""}, "not a readable file of torch.save"),
        ({"config": {**CONFIG, "_target_": "os.system"}}, "unknown field '_target_'"),
        ({"config": {**CONFIG, "tokenizer": {"tokenizer_json": f"nemo:{HEX}_tokenizer.json"}}}, "not there, and"),
    ],
)
def test_what_is_no_such_model_is_refused_in_one_line(tmp_path, changed, says):
    with pytest.raises(UserError) as refused:
        open_checkpoint(write(tmp_path / "a.nemo", **changed))
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("named", ["nemo:../words/tokenizer.json", "{}/words/tokenizer.json", "nemo:{}/tokenizer.json"])
def test_a_config_names_no_file_outside_of_the_archive(tmp_path, named):
    save_tiny_tokenizer(tmp_path / "words", vocab_size=19)
    config = {**CONFIG, "tokenizer": {"tokenizer_json": named.format(tmp_path)}}
    assert open_checkpoint(write(tmp_path / "a.nemo", config=config)).tokenizer is None


def test_a_payload_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    for state in ({**STATE, ONE: Payload(canary)}, [Payload(canary)]):
        with pytest.raises(UserError, match="it names posix.mkdir, which no checkpoint needs"):
            open_checkpoint(write(tmp_path / "a.nemo", state=state))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "or the payload would prove nothing"


def test_its_files_are_told_from_those_of_other_writers(tmp_path):
    assert recognise(write(tmp_path / "a.nemo"))
    of_nemo_1 = {"encoder_seq_length": 32, **{name: value for name, value in CONFIG.items() if name != "seq_length"}}
    assert not recognise(write(tmp_path / "b.nemo", config=of_nemo_1))
    assert not recognise(write(tmp_path / "c.nemo", files={"manifest.json": b"{}"}))
    assert not recognise(contents_of(tmp_path / "nowhere"))
