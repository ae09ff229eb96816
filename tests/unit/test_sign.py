"""A signature says who made an artefact: openssl agrees with it, and whatever is not what was signed is refused."""

import json
import shutil
import subprocess
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import foreign_layouts
import pytest
import torch
import yaml
from hf_models import save_tiny_tokenizer
from hostile.case import ARCH, write_sound

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.artefacts.sign import main
from minitron_nemo.artefacts.signature import is_asked_for, sign, trusting, verify
from minitron_nemo.checkpoint.audit import audit
from minitron_nemo.checkpoint.formats.hf import open_hf
from minitron_nemo.checkpoint.formats.known import open_checkpoint
from minitron_nemo.checkpoint.formats.nemo import config_values, open_nemo, write_nemo
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.config.compose import compose
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps import on_ranks
from minitron_nemo.steps.convert import convert
from minitron_nemo.steps.execute import execute
from minitron_nemo.steps.inputs import open_verified
from minitron_nemo.steps.step import Recipe
from recipes.audit import main as run_audit

pytest.importorskip("cryptography", reason="signatures need the extra `sign`")
OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="the absolute is the command openssl")


def openssl(*arguments, check=True, **options):
    return subprocess.run([OPENSSL, *map(str, arguments)], capture_output=True, check=check, **options)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs on P-256, a pair on another curve, and an RSA pair: (private, public) by name."""
    folder, pairs = tmp_path_factory.mktemp("keys"), {}
    for name, curve in (("ours", "prime256v1"), ("theirs", "prime256v1"), ("other curve", "secp384r1"), ("rsa", None)):
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        if curve is None:
            openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", private)
        else:
            openssl("genpkey", "-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{curve}", "-out", private)
        openssl("pkey", "-in", private, "-pubout", "-out", public)
        pairs[name] = private, public
    return pairs


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_sound(tmp_path_factory.mktemp("sound"), save_tiny_tokenizer)


@pytest.fixture(params=["nemo", "tar"])
def model(request, sound, tmp_path):
    path = tmp_path / "model.nemo"
    (shutil.copytree if sound[request.param].is_dir() else shutil.copyfile)(sound[request.param], path)
    return path


def test_openssl_verifies_what_we_sign_and_we_what_openssl_signs(keys, sound, tmp_path):
    private, public = keys["ours"]
    path = tmp_path / "model.nemo"
    shutil.copytree(sound["nemo"], path)
    signature, manifest, der = sign(path, private), path / "manifest.json", tmp_path / "signature.der"
    assert signature == path / "manifest.json.sig"
    openssl("base64", "-d", "-A", "-in", signature, "-out", der)
    assert b"Verified OK" in openssl("dgst", "-sha256", "-verify", public, "-signature", der, manifest).stdout
    openssl("dgst", "-sha256", "-sign", private, "-out", der, manifest)
    openssl("base64", "-A", "-in", der, "-out", signature)
    verify(path, public)


def test_a_signed_model_opens_with_its_key_and_without_one(model, keys):
    private, public = keys["ours"]
    sign(model, private)
    open_nemo(model, verify=True)
    with trusting(str(public)):
        open_nemo(model, verify=True)


def test_a_key_asks_for_a_signature_by_it(model, keys):
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="model.nemo: not signed: no .*sig"):
        open_nemo(model)
    sign(model, keys["theirs"][0])
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="sig: does not verify with .*ours.pub"):
        open_nemo(model)
    open_nemo(model)


@pytest.mark.parametrize("content", [b"", b"\0", b"AAAA", b"not base64!", b"x" * 5000])
def test_a_signature_that_is_none_is_refused(content, model, keys):
    place = sign(model, keys["ours"][0])
    place.write_bytes(content)
    with pytest.raises(UserError, match=f"{place.name}: (does not verify|5000 bytes)"):
        verify(model, keys["ours"][1])


def test_a_manifest_that_was_changed_after_it_was_signed_is_refused(keys, sound, tmp_path):
    path = tmp_path / "model.nemo"
    shutil.copytree(sound["nemo"], path)
    sign(path, keys["ours"][0])
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"created"', '"created" '))
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="does not verify"):
        open_nemo(path)


@pytest.mark.parametrize("name", ["other curve", "rsa"])
def test_keys_of_another_kind_are_refused_by_their_file(name, model, keys):
    for use, key in zip((sign, verify), keys[name], strict=True):
        with pytest.raises(UserError, match=f"{key.name}: no key on the curve P-256"):
            use(model, key)


def test_what_is_no_key_is_refused_in_one_line(model, keys, tmp_path):
    encrypted = tmp_path / "encrypted.pem"
    openssl("pkey", "-in", keys["ours"][0], "-aes256", "-passout", "pass:x", "-out", encrypted)
    (tmp_path / "text.pem").write_text("hello")
    text, gone = tmp_path / "text.pem", tmp_path / "gone"
    for key, says in ((encrypted, "is encrypted"), (text, "no private key"), (gone, "no such key")):
        with pytest.raises(UserError, match=says) as caught:
            sign(model, key)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no public key"):
        verify(model, keys["ours"][0])


def test_every_recipe_that_opens_a_model_goes_by_verify_key(model, keys):
    opened = []
    recipe = Recipe("prune", lambda config: opened.append(open_verified(model)), lambda config, job: None)
    config = compose("quickstart", [f"verify_key={keys['ours'][1]}"])
    with pytest.raises(UserError, match="not signed"):
        execute(recipe, config)
    assert opened == []


def test_the_command_signs_and_verifies(model, keys, capsys):
    private, public = map(str, keys["ours"])
    assert main(["--verify", "--key", public, str(model)]) == 2
    assert "not signed" in capsys.readouterr().err
    assert main(["--key", private, str(model)]) == 0
    assert main(["--verify", "--key", public, str(model)]) == 0
    assert "verified" in capsys.readouterr().out


FOREIGN = ["hf", "nemo1", "nemo2", "megatron", "megatron_019"]


@pytest.fixture(scope="module")
def converted(sound, tmp_path_factory):
    """What `convert` wrote in every format that is not ours, by format."""
    folder = tmp_path_factory.mktemp("converted")
    for format in FOREIGN:
        convert(sound["nemo"], folder / format, format=format, origin=Origin("f"))
    return folder


@pytest.fixture(params=FOREIGN)
def foreign(request, converted, tmp_path):
    shutil.copytree(converted / request.param, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_key_asks_for_the_signature_of_a_checkpoint_of_any_format(foreign, keys):
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="checkpoint: not signed: no .*sig"):
        open_checkpoint(foreign)
    sign(foreign, keys["theirs"][0])
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="does not verify"):
        open_checkpoint(foreign)
    sign(foreign, keys["ours"][0])
    with trusting(str(keys["ours"][1])):
        assert open_checkpoint(foreign).arch == ARCH


def test_a_key_refuses_a_checkpoint_that_nobody_can_have_signed(foreign, keys):
    (foreign / "manifest.json").unlink()
    open_checkpoint(foreign)
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="not signed"):
        open_checkpoint(foreign)


@pytest.mark.parametrize("hashes", [True, False])
def test_a_signature_is_of_every_file_of_a_checkpoint(hashes, foreign, keys):
    """Also where hashes were not asked for: without them a signature says nothing of the weights."""
    sign(foreign, keys["ours"][0])
    largest = max((file for file in foreign.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-100] ^= 1
    largest.write_bytes(content)
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match=f"{largest.name}: damaged"):
        open_checkpoint(foreign, hashes=hashes)


def test_a_key_refuses_what_nemo_and_others_wrote(keys, tmp_path):
    arch = ModelArch(2, 16, 24, 2, 1, 8, 131, 32)
    source = RandomWeights(arch, seed=1)
    (tmp_path / "state").mkdir()
    config = {**config_values(arch, torch.float32), "nemo_version": "3.0.0"}
    (tmp_path / "state" / "model_config.yaml").write_text(yaml.safe_dump(config))
    torch.save({f"model.{n}": source.read(n) for n in source.names()}, tmp_path / "state" / "model_weights.ckpt")
    foreign_layouts.nemo1_ranks(tmp_path / "ranks", source, tp=1)
    foreign_layouts.megatron_run(tmp_path / "run", source)
    for name in ("state", "ranks", "run"):
        open_checkpoint(tmp_path / name)
        with trusting(str(keys["ours"][1])), pytest.raises(UserError, match=f"{name}.*: not signed"):
            open_checkpoint(tmp_path / name)


def test_what_was_signed_as_something_else_vouches_for_no_checkpoint(sound, keys, tmp_path):
    """Dot files pass unlisted: beside signed data they could be a whole checkpoint of Megatron."""
    data = tmp_path / "data"
    with publishing(data, kind="data", origin=Origin("f")) as draft:
        (draft.folder / "tokens.bin").write_bytes(b"tokens")
    sign(data, keys["ours"][0])
    shutil.copyfile(sound["nemo"] / "model_weights" / ".metadata", data / ".metadata")
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="is a data artefact; a megatron"):
        open_checkpoint(data)


def test_a_key_refuses_a_folder_that_is_imported(converted, keys, tmp_path):
    shutil.copytree(converted / "hf", tmp_path / "hf")
    places = [f"import_hf.source={tmp_path / 'hf'}", f"import_hf.output={tmp_path / 'm'}"]
    config = compose("convert", [f"verify_key={keys['ours'][1]}", *places])
    recipe = import_module("recipes.import_hf").RECIPE
    for files in (["manifest.json"], []):
        with pytest.raises(UserError, match="hf: not signed"):
            execute(recipe, config)
        for name in files:
            (tmp_path / "hf" / name).rename(tmp_path / name)
    (tmp_path / "manifest.json").rename(tmp_path / "hf" / "manifest.json")
    sign(tmp_path / "hf", keys["ours"][0])
    assert execute(recipe, config)
    (tmp_path / "hf" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text() + " ")
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="config.json"):
        open_hf(tmp_path / "hf")


def test_a_key_asks_for_the_signature_of_a_model_whose_tokenizer_is_taken(model, keys):
    load_tokenizer(model)
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="not signed"):
        load_tokenizer(model)
    sign(model, keys["ours"][0])
    with trusting(str(keys["ours"][1])):
        load_tokenizer(model)


def test_with_a_key_the_config_is_what_was_signed_though_nobody_asked_for_hashes(keys, sound, tmp_path):
    path = tmp_path / "model.nemo"
    shutil.copytree(sound["nemo"], path)
    sign(path, keys["ours"][0])
    config = path / "model_config.yaml"
    config.write_text(config.read_text().replace("norm_epsilon: 1.0e-05", "norm_epsilon: 2.0e-05"))
    open_nemo(path)
    with trusting(str(keys["ours"][1])), pytest.raises(UserError, match="model_config.yaml: damaged"):
        open_nemo(path)


def test_ranks_that_this_node_started_go_by_the_key_too(keys):
    seen = []
    config = SimpleNamespace(verify_key=str(keys["ours"][1]), layout=SimpleNamespace(world_size=1))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(on_ranks, "log_file", lambda *_: None)
        patched.setattr(on_ranks, "logging_to_file", lambda *_, **__: nullcontext())
        patched.setattr(on_ranks, "_run", lambda *_: seen.append(is_asked_for()))
        on_ranks._on_rank(Rank(0, 1, 0), None, config, SimpleNamespace(output=keys["ours"][1]))
    assert seen == [True]
    assert not is_asked_for()


def test_an_audit_tells_whether_an_artefact_is_signed(model, keys, capsys):
    private, public = map(str, keys["ours"])
    assert audit(model).signature == "none"
    assert run_audit([str(model), "--key", public]) == 2
    said = capsys.readouterr()
    assert "NOT SOUND" in said.out
    assert "not signed" in said.err
    sign(model, private)
    assert (audit(model).is_sound, audit(model).signature) == (True, "not verified")
    assert run_audit([str(model), "--key", public]) == 0
    assert "  signature  verified" in capsys.readouterr().out
    assert not audit(model, key=keys["theirs"][1]).is_sound
    with pytest.raises(SystemExit):
        run_audit([str(model), "--key", public, "--no-hashes"])


def test_an_audit_with_a_key_looks_at_all_hashes(foreign, keys):
    sign(foreign, keys["ours"][0])
    assert audit(foreign, key=keys["ours"][1], hashes=False).hashes
    next(foreign.rglob("tokenizer.json")).write_text("{}")
    assert not audit(foreign, key=keys["ours"][1], hashes=False).is_sound


def test_the_signature_of_a_model_that_was_replaced_goes_with_it(keys, sound, tmp_path):
    path, options = tmp_path / "m.nemo", {"dtype": torch.float32, "tokenizer": None}
    for packed_before, packed in ((True, True), (True, False), (False, True)):
        for was in (True, False):
            origin = Origin(f"{packed} {was}", overwrite=True)
            write_nemo(path, ARCH, stream(RandomWeights(ARCH, seed=1)), packed=packed_before if was else packed,
                       origin=origin, **options)  # fmt: skip
            if was:
                sign(path, keys["ours"][0])
        assert [file.name for file in tmp_path.iterdir()] == ["m.nemo"]
        assert audit(path).signature == "none"
    path.unlink()
    (tmp_path / "m.nemo.sig").write_text("of another")
    with pytest.raises(UserError, match="m.nemo.sig: the signature of what was"):
        write_nemo(path, ARCH, stream(RandomWeights(ARCH, seed=1)), packed=True, origin=Origin("f"), **options)


def test_a_manifest_of_another_kind_vouches_for_no_checkpoint_though_no_key_is_given(foreign):
    manifest = foreign / "manifest.json"
    values = json.loads(manifest.read_text())
    open_checkpoint(foreign)
    manifest.write_text(json.dumps({**values, "kind": "data"}))
    with pytest.raises(UserError, match="is a data artefact"):
        open_checkpoint(foreign)
