"""What NeMo and these recipes must agree on, as plain functions: a process imports NeMo once and runs them all.

`test_nemo_model.py` starts it. Each takes the `World`, and its name is the claim.
"""

import tarfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hf_models import save_tiny_hf
from layouts import assert_same_weights

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats import nemo_state_dict
from minitron_nemo.checkpoint.formats.hf import export_hf, import_hf, open_hf
from minitron_nemo.checkpoint.formats.known import open_checkpoint
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.errors import UserError

TOKENS = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class World:
    """Two models from transformers: one with Llama-3's rotary scaling as a folder and packed, one tied."""

    folder: Path
    model: Path
    packed: Path
    tied: Path
    hf: Path
    logits: dict[str, torch.Tensor]

    @classmethod
    def made(cls, folder: Path) -> "World":
        from transformers import AutoModelForCausalLM

        made, logits = {}, {}
        for name, family, more in (("model", "llama", {}), ("tied", "mistral", {"tie_word_embeddings": True})):
            source = open_hf(save_tiny_hf(folder / f"{name}_source", family, **more))
            made[name] = folder / f"{name}.nemo"
            import_hf(source, made[name], tensors=stream(source.weights), origin=Origin(name))
            export_hf(open_nemo(made[name]), folder / f"{name}_hf", origin=Origin("export"))
            theirs = AutoModelForCausalLM.from_pretrained(folder / f"{name}_hf", dtype=torch.float32).eval()
            with torch.no_grad():
                logits[name] = theirs(TOKENS).logits
        opened, packed = open_nemo(made["model"]), folder / "packed.nemo"
        write_nemo(packed, opened.arch, stream(opened.weights), dtype=opened.dtype, tokenizer=opened.tokenizer,
                   origin=Origin("packed"), packed=True)  # fmt: skip
        return cls(folder, made["model"], packed, made["tied"], folder / "model_hf", logits)

    def place(self, name: str) -> Path:
        """A path in a new folder."""
        (self.folder / name).mkdir()
        return self.folder / name / "model.nemo"


def refusal(act) -> str:
    """The one line with which `act` is refused."""
    with pytest.raises(UserError) as refused:
        act()
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def logits_of_a_restored_model_are_those_of_transformers(world):
    from minitron_nemo import MinitronGPT

    paths = ((world.model, "model"), (world.packed, "model"), (world.hf, "model"), (world.tied, "tied"))
    for path, name in paths:
        model = MinitronGPT.restore_from(str(path))
        with torch.no_grad():
            same(model(TOKENS), world.logits[name])
        assert world.logits[name].std() > 0.05, "logits that are all alike would prove nothing"
        assert (model.cfg.hidden_size, model.cfg.precision) == (32, "fp32")


def greedy_tokens_are_those_of_transformers(world):
    from transformers import AutoModelForCausalLM

    from minitron_nemo import MinitronGPT

    model = MinitronGPT.restore_from(str(world.model))
    theirs = AutoModelForCausalLM.from_pretrained(world.hf, dtype=torch.float32).eval()
    for tokens in (TOKENS, TOKENS[:1, :1]):
        wanted = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=30, do_sample=False,
                                 pad_token_id=2)  # fmt: skip
        ours = model.generate(tokens, max_new_tokens=30)
        assert torch.equal(ours, wanted)
        assert len(set(ours[0, -30:].tolist())) > 2, "one word for ever would prove little"


def sampling_is_decided_by_its_seed(world):
    from minitron_nemo import MinitronGPT

    model = MinitronGPT.restore_from(str(world.model))
    said = [model.generate(TOKENS, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])
    greedy = model.generate(TOKENS, max_new_tokens=8)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=8, temperature=1e-4), greedy)
    assert not torch.equal(said[0], greedy)


def text_goes_in_and_out_by_its_tokenizer(world):
    from minitron_nemo import MinitronGPT

    model = MinitronGPT.restore_from(str(world.packed))
    names = open_nemo(world.packed).tokenizer.names()
    assert {"tokenizer.json", "tokenizer_config.json"} < set(names)
    assert set(model.cfg.tokenizer) == {name.replace(".", "_") for name in names}
    assert all(Path(file).is_file() for file in model.cfg.tokenizer.values())
    assert set(model.artifacts) == {f"tokenizer.{key}" for key in model.cfg.tokenizer}
    ids = torch.tensor([model.tokenizer.encode("w5 w6 w7")])
    wanted = model.tokenizer.decode(model.generate(ids, max_new_tokens=4)[0, 3:].tolist())
    assert model.generate_text("w5 w6 w7", max_new_tokens=4) == wanted.removesuffix(" </s>")


def nemos_connector_reads_the_config_of_both_forms(world):
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    from minitron_nemo import MinitronGPT

    of_a_folder = SaveRestoreConnector()
    of_a_folder.model_extracted_dir = str(world.model)
    read = [
        MinitronGPT.restore_from(str(path), return_config=True, save_restore_connector=connector)
        for path, connector in (
            (world.packed, SaveRestoreConnector()),
            (world.model, of_a_folder),
            (world.packed, None),
        )
    ]
    assert read[0] == read[1] == read[2]
    assert read[0].rope_scaling.original_max_position_embeddings == 32
    assert read[0].precision == "fp32"


def nemos_extraction_takes_a_packed_one_whole(world):
    from nemo.utils.tar_utils import safe_extract

    with tarfile.open(world.packed) as tar:
        safe_extract(tar, str(world.folder / "extracted"))
    assert_same_weights(open_nemo(world.folder / "extracted", verify=True), open_nemo(world.model))


def what_is_saved_is_the_model(world):
    from minitron_nemo import MinitronGPT
    from minitron_nemo.nemo_model import MinitronConnector

    model = MinitronGPT.restore_from(str(world.packed))
    into_a_folder = MinitronConnector()
    into_a_folder.pack_nemo_file = False
    for connector in (MinitronConnector(), into_a_folder):
        model._save_restore_connector = connector
        path = world.place(f"saved_{connector.pack_nemo_file}")
        model.save_to(str(path))
        assert path.is_file() == connector.pack_nemo_file
        saved, first = open_nemo(path, verify=True), open_nemo(world.packed)
        assert_same_weights(saved, first)
        assert saved.tokenizer.names() == first.tokenizer.names()
        assert saved.manifest.parents == {"model": first.sha256}
        assert [entry["name"] for entry in saved.manifest.extra["lineage"]] == ["packed.nemo"]
        assert "exists already" in refusal(lambda path=path: model.save_to(str(path)))
    with torch.no_grad():
        model.model.head_weight().mul_(2)
    model._save_restore_connector = MinitronConnector(overwrite=True)
    model.save_to(str(path))
    changed = open_nemo(path, verify=True).weights.read("output_layer.weight")
    assert torch.equal(changed, 2 * first.weights.read("output_layer.weight"))


def what_nemos_connector_writes_is_read(world):
    """By ours, by NeMo's own, and as a checkpoint like any other, without NeMo."""
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    from minitron_nemo import MinitronGPT

    for name, path in (("model", world.packed), ("tied", world.tied)):
        model = MinitronGPT.restore_from(str(path))
        model._save_restore_connector = SaveRestoreConnector()
        theirs = world.place(f"by_nemo_{name}")
        model.save_to(str(theirs))
        for connector in (None, SaveRestoreConnector()):
            again = MinitronGPT.restore_from(str(theirs), save_restore_connector=connector)
            with torch.no_grad():
                assert torch.equal(again(TOKENS), model(TOKENS))
            assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
            assert not again._is_model_being_restored()
        opened = open_checkpoint(theirs)
        assert opened.format == nemo_state_dict.NAME
        assert_same_weights(opened, open_nemo(path))
        assert opened.notes == ("NeMo 3.0.0",)
        assert opened.tokenizer.names() == open_nemo(path).tokenizer.names()


def a_state_dict_has_the_names_of_logical_tensors(world):
    from minitron_nemo import MinitronGPT

    state = MinitronGPT.extract_state_dict_from(str(world.packed), str(world.folder / "states"))
    alone = MinitronGPT.extract_state_dict_from(str(world.packed), str(world.folder / "states"), split_by_module=True)
    weights = open_nemo(world.model).weights
    assert list(state) == [f"model.{name}" for name in weights.names()]
    assert list(alone) == weights.names()
    model = MinitronGPT(MinitronGPT.restore_from(str(world.model), return_config=True))
    twin = MinitronGPT(MinitronGPT.restore_from(str(world.model), return_config=True))
    assert sorted(model.state_dict()) == sorted(state)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), twin(TOKENS)), "random, and the same each time"
        assert model(TOKENS).std() > 1e-3
        model.load_state_dict(torch.load(world.folder / "states" / "model_weights.ckpt", weights_only=True))
        same(model(TOKENS), world.logits["model"])
        holder = torch.nn.ModuleDict({"student": twin})
        holder.load_state_dict({f"student.{name}": tensor for name, tensor in state.items()})
        same(twin(TOKENS), world.logits["model"])
    assert set(holder.state_dict()) == {f"student.{name}" for name in state}
    state.pop("model.output_layer.weight")
    assert model.load_state_dict(state, strict=False).missing_keys == ["model.output_layer.weight"]
    assert "model.output_layer.weight is not in" in refusal(lambda: model.load_state_dict(state))
    holed = {**state, "model.output_layer.weight": torch.zeros(131, 31)}
    assert "is (131, 31); this model has (131, 32)" in refusal(lambda: model.load_state_dict(holed))
    too_much = {**model.state_dict(), "model.decoder.layers.2.mlp.linear_fc1.weight": torch.zeros(1)}
    assert "belongs to no parameter" in refusal(lambda: model.load_state_dict(too_much))


def gradients_flow(world):
    from minitron_nemo import MinitronGPT

    model = MinitronGPT.restore_from(str(world.tied))
    model(TOKENS).logsumexp(-1).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert MinitronGPT.__name__ == "MinitronGPT"
    assert MinitronGPT.list_available_models() == []


def another_precision_may_be_asked_for(world):
    from minitron_nemo import MinitronGPT

    config = MinitronGPT.restore_from(str(world.model), return_config=True)
    config.precision = "bf16"
    model = MinitronGPT.restore_from(str(world.model), override_config_path=config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_to(str(world.place("bf16")))
    saved = open_nemo(world.folder / "bf16" / "model.nemo")
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved.weights.read("output_layer.weight"),
                       open_nemo(world.model).weights.read("output_layer.weight").bfloat16())  # fmt: skip
    config.hidden_size = 64
    said = refusal(lambda: MinitronGPT.restore_from(str(world.model), override_config_path=config))
    assert "describes 2 layers, hidden 64" in said


def bad_input_is_refused_in_one_line(world):
    from omegaconf import OmegaConf

    from minitron_nemo import MinitronGPT

    model = MinitronGPT.restore_from(str(world.model))
    restore = MinitronGPT.restore_from
    config = dict(restore(str(world.model), return_config=True))
    cases = {
        "no such file or folder": lambda: restore("/nowhere.nemo"),
        "no checkpoint of a known format": lambda: restore(str(world.model / "tokenizer")),
        "this process runs models on cpu": lambda: restore(str(world.model), map_location="cuda"),
        "give a device": lambda: restore(str(world.model), map_location={"cpu": "cuda"}),
        "unknown field 'train_ds'": lambda: MinitronGPT(OmegaConf.create({**config, "train_ds": {}})),
        "precision=None": lambda: MinitronGPT(OmegaConf.create({**config, "precision": None})),
        "tokenizer.model: unknown": lambda: MinitronGPT(OmegaConf.create({**config, "tokenizer": {"model": "x"}})),
        "no such file": lambda: MinitronGPT(
            OmegaConf.create({**config, "tokenizer": {"tokenizer_json": "/nowhere/tokenizer.json"}})
        ),
        "token ids from 3 to 131: the model knows 0 to 130": lambda: model(torch.tensor([[3, 131]])),
        "token ids from -1": lambda: model(torch.tensor([[3, -1]])),
        "torch.float32": lambda: model(torch.ones(1, 4)),
        "65 tokens: the model was made for 64": lambda: model(torch.ones(1, 65, dtype=torch.long)),
        "must be from 1 to 40": lambda: model.generate(TOKENS, max_new_tokens=41),
        "max_new_tokens=0": lambda: model.generate(TOKENS, max_new_tokens=0),
        "temperature=nan": lambda: model.generate(TOKENS, max_new_tokens=1, temperature=float("nan")),
        "seed=-1": lambda: model.generate(TOKENS, max_new_tokens=1, seed=-1),
        "recipes/distill.py": lambda: model.setup_training_data({}),
        "recipes/evaluate.py": lambda: model.setup_validation_data({}),
        "Linear is no MinitronGPT": lambda: model._save_restore_connector.save_to(torch.nn.Linear(1, 1), "x.nemo"),
    }
    for words, act in cases.items():
        assert words in (said := refusal(act)), said
    assert not model._is_model_being_restored()


def megatrons_groups_are_formed_once_and_refused_where_they_split_models(world):
    from megatron.core import parallel_state

    from minitron_nemo import MinitronGPT

    formed = []
    for _ in range(2):
        MinitronGPT.restore_from(str(world.tied))
        formed.append(parallel_state.get_tensor_model_parallel_group())
    assert formed[0] is formed[1]
    with pytest.MonkeyPatch.context() as split:
        split.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
        said = refusal(lambda: MinitronGPT.restore_from(str(world.tied)))
    assert "Megatron splits models in this process (tensor 2 parallel)" in said


def damage_is_noticed(world):
    from minitron_nemo import MinitronGPT

    data = bytearray(world.packed.read_bytes())
    data[len(data) // 2] ^= 1
    (world.folder / "damaged.nemo").write_bytes(data)
    assert "damaged" in refusal(lambda: MinitronGPT.restore_from(str(world.folder / "damaged.nemo")))


CHECKS = {
    check.__name__: check
    for check in (
        logits_of_a_restored_model_are_those_of_transformers,
        greedy_tokens_are_those_of_transformers,
        sampling_is_decided_by_its_seed,
        text_goes_in_and_out_by_its_tokenizer,
        nemos_connector_reads_the_config_of_both_forms,
        nemos_extraction_takes_a_packed_one_whole,
        what_is_saved_is_the_model,
        what_nemos_connector_writes_is_read,
        a_state_dict_has_the_names_of_logical_tensors,
        gradients_flow,
        another_precision_may_be_asked_for,
        bad_input_is_refused_in_one_line,
        megatrons_groups_are_formed_once_and_refused_where_they_split_models,
        damage_is_noticed,
    )
}

# NeMo extracts with the filter "data", which Python has from 3.11.4 on.
EXTRACTING = {
    "nemos_connector_reads_the_config_of_both_forms",
    "nemos_extraction_takes_a_packed_one_whole",
    "what_nemos_connector_writes_is_read",
}


def check_all(rank: object, folder: Path) -> dict[str, str]:
    """What went wrong with each check, empty where nothing did."""
    found = {}
    world = World.made(folder)
    for name, check in CHECKS.items():
        try:
            check(world)
            found[name] = ""
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
    return found
