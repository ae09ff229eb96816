"""A signature says who made an artefact: openssl agrees with it, and whatever is not what was signed is refused."""

import shutil
import subprocess

import pytest
from hf_models import save_tiny_tokenizer
from hostile.case import write_sound

from minitron_nemo.artefacts.sign import main
from minitron_nemo.artefacts.signature import sign, trusting, verify
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.compose import compose
from minitron_nemo.errors import UserError
from minitron_nemo.steps.execute import execute
from minitron_nemo.steps.inputs import open_verified
from minitron_nemo.steps.step import Recipe

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
