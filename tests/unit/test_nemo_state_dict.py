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
    files = {"0a1b_tokenizer.json": (words / "tokenizer.json").read_bytes()}
    config = {**CONFIG, "target": "os.system", "tokenizer": {"tokenizer_json": "nemo:0a1b_tokenizer.json"}}
    contents = write(tmp_path / "a.nemo", config=config, files=files)
    assert recognise(contents)
    opened = open_checkpoint(contents)
    assert (opened.arch, opened.dtype) == (ARCH, torch.float32)
    assert opened.notes == ("written by NeMo 3.0.0",)
    assert opened.weights.names() == [name.removeprefix("model.") for name in STATE]
    for name in opened.weights.names():
        assert torch.equal(opened.weights.read(name), STATE[f"model.{name}"])
    box = Box((3, 2), (4, 5))
    assert torch.equal(opened.weights.read("output_layer.weight", box), STATE["model.output_layer.weight"][3:7, 2:7])
    assert opened.tokenizer.names() == ["tokenizer.json"]
    assert opened.tokenizer.find("tokenizer.json").read() == files["0a1b_tokenizer.json"]
    assert opened.tokenizer.find("tokenizer.model") is None
    assert not opened.tokenizer.inside("more").names()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"state": {name: value for name, value in STATE.items() if name != ONE}}, f"{ONE} is missing"),
        ({"state": {**STATE, ONE: torch.ones(17)}}, "(17,); model_config.yaml says torch.float32 (16,)"),
        ({"state": {**STATE, ONE: torch.ones(16).half()}}, "is torch.float16"),
        ({"state": {**STATE, ONE: [1.0] * 16}}, "is no plain tensor but list"),
        ({"state": {**STATE, ONE: torch.ones(16).to_sparse()}}, "is no plain tensor"),
        ({"state": {**STATE, "model.more": torch.ones(1)}}, "'model.more' belongs to no parameter"),
        ({"state": list(STATE.values())}, "it holds list"),
        ({"state": {**STATE, 1: torch.ones(1)}}, "not a state dict"),
        ({"weights": b""}, "0 bytes; the model that model_config.yaml describes has more"),
        ({"weights": b"\x80\x02" + bytes(20_000)}, "not a zip archive of torch.save"),
        ({"weights": saved(STATE)[:-3000]}, "not a state dict of tensors alone"),
        ({"config": {**CONFIG, "_target_": "os.system"}}, "unknown field '_target_'"),
        ({"config": {**CONFIG, "hidden_size": 2**40}}, "has more"),
        ({"config": {**CONFIG, "tokenizer": ["tokenizer.json"]}}, "expected a mapping of files, got list"),
        *(
            ({"config": {**CONFIG, "tokenizer": {key: value}}}, says)
            for key, value, says in (
                ("tokenizer_json", "nemo:../words/tokenizer.json", "must be a file of the archive"),
                ("tokenizer_json", "/etc/passwd", "must be a file of the archive"),
                ("tokenizer_json", 3, "must be a file of the archive"),
                ("model", "nemo:model_config.yaml", "under one of tokenizer_json"),
                ("tokenizer_json", "nemo:absent.json", "there is no such file"),
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_such_model_is_refused_in_one_line(tmp_path, changed, says):
    with pytest.raises(UserError) as refused:
        open_checkpoint(write(tmp_path / "a.nemo", **changed))
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("place", ["value", "whole", "legacy"])
def test_a_payload_is_never_run(tmp_path, place):
    canary = tmp_path / "canary"
    pad = {"pad": torch.zeros(10_000)}
    made = {
        "value": lambda: {"state": {**STATE, ONE: Payload(canary), **pad}},
        "whole": lambda: {"state": [Payload(canary), pad]},
        "legacy": lambda: {"weights": pickle.dumps([Payload(canary), bytes(20_000)])},
    }[place]()
    with pytest.raises(UserError, match="only these are read" if place == "legacy" else "tensors alone"):
        open_checkpoint(write(tmp_path / "a.nemo", **made))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "or the payload would prove nothing"


def test_a_nemo_of_the_recipes_is_none_of_these(tmp_path):
    (tmp_path / "model_config.yaml").touch()
    (tmp_path / "model_weights.ckpt").touch()
    assert recognise(contents_of(tmp_path))
    (tmp_path / "manifest.json").touch()
    assert not recognise(contents_of(tmp_path))
    assert not recognise(contents_of(tmp_path / "nowhere"))
