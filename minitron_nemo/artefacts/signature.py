"""A signature of a manifest, and with it of every file that the manifest lists: who made an artefact.

It is ECDSA over P-256 and SHA-256 of the bytes of `manifest.json`, in base64: what `cosign sign-blob --key` makes and
`cosign verify-blob --key` and `openssl dgst -sha256 -verify` take. In a folder it is the file `manifest.json.sig`
beside the manifest, of a packed artefact the file `NAME.sig` beside it.
"""

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.contents import Contents, Place, TarContents, contents_of, has, read_small
from minitron_nemo.errors import UserError

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.json.sig"
KEY_LIMIT = 2**16  # bytes
SIGNATURE_LIMIT = 1024  # bytes; one has about a hundred

_trusted: ContextVar[Path | None] = ContextVar("trusted", default=None)


@contextmanager
def trusting(key: str | None) -> Iterator[None]:
    """While the block runs, `check_signature` asks for signatures that the public key in the file `key` verifies."""
    token = _trusted.set(None if key is None else Path(key))
    try:
        yield
    finally:
        _trusted.reset(token)


def is_asked_for() -> bool:
    """Whether a key is trusted, so that only what it signed may be opened."""
    return _trusted.get() is not None


def is_there(artefact: Place) -> bool:
    """Whether an artefact has a signature, by whatever key."""
    place = _place(contents_of(artefact))
    return has(contents_of(place.parent), place.name)


def check_signature(artefact: Place) -> None:
    """Refuse an artefact without a signature by the trusted key, when one is trusted."""
    if (key := _trusted.get()) is not None:
        verify(artefact, key)


def sign(artefact: Place, key: str | Path) -> Path:
    """Sign the manifest of an artefact with the private key in a PEM file; where the signature is."""
    ec, hashes, serialization, _ = _library()
    contents = contents_of(artefact)
    try:
        private = serialization.load_pem_private_key(_read(key), password=None)
    except TypeError:
        raise UserError(f"{key}: is encrypted; give it decrypted, as `openssl ec -in KEY -out PLAIN` does") from None
    except ValueError as error:
        raise UserError(f"{key}: no private key in PEM: {' '.join(str(error).split())[:100]}") from None
    _check_curve(private, ec.EllipticCurvePrivateKey, key)
    signature = private.sign(_manifest(contents), ec.ECDSA(hashes.SHA256()))
    place = _place(contents)
    write_text_atomically(place, base64.b64encode(signature).decode() + "\n")
    return place


def verify(artefact: Place, key: str | Path) -> None:
    """Refuse an artefact whose manifest the public key in a PEM file does not verify."""
    ec, hashes, serialization, InvalidSignature = _library()
    contents = contents_of(artefact)
    try:
        public = serialization.load_pem_public_key(_read(key))
    except ValueError as error:
        raise UserError(f"{key}: no public key in PEM: {' '.join(str(error).split())[:100]}") from None
    _check_curve(public, ec.EllipticCurvePublicKey, key)
    place = _place(contents)
    try:
        public.verify(_signature(contents, place), _manifest(contents), ec.ECDSA(hashes.SHA256()))
    except (binascii.Error, ValueError, InvalidSignature):
        raise UserError(
            f"{place}: does not verify with {key}: the artefact is not what its maker signed, or another key signed it"
        ) from None


def _library() -> tuple[Any, Any, Any, type[Exception]]:
    """The parts of the `cryptography` package that this needs."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise UserError("signatures need the package cryptography: pip install 'minitron-nemo[sign]'") from None
    return ec, hashes, serialization, InvalidSignature


def _read(key: str | Path) -> bytes:
    path = Path(key)
    if not path.is_file():
        raise UserError(f"{path}: no such key file; give the PEM file of a key on the curve P-256")
    if path.stat().st_size > KEY_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size} bytes; no key file has more than {KEY_LIMIT}")
    return path.read_bytes()


def _check_curve(key: Any, kind: type, path: str | Path) -> None:
    if not isinstance(key, kind) or key.curve.name != "secp256r1":  # type: ignore[attr-defined]
        raise UserError(f"{path}: no key on the curve P-256; `openssl ecparam -name prime256v1 -genkey` makes one")


def _manifest(contents: Contents) -> bytes:
    if not has(contents, MANIFEST_FILE):
        raise UserError(f"{contents.path}: no {MANIFEST_FILE}; only what a recipe published is signed")
    return read_small(contents, MANIFEST_FILE)


def beside(archive: Path) -> Path:
    """Where the signature of a packed artefact is."""
    return archive.with_name(f"{archive.name}.sig")


def _place(contents: Contents) -> Path:
    if isinstance(contents, TarContents):
        return beside(contents.archive)
    return contents.path / SIGNATURE_FILE


def _signature(contents: Contents, place: Path) -> bytes:
    beside = contents_of(place.parent)
    if not has(beside, place.name):
        raise UserError(f"{contents.path}: not signed: no {place}; a key was given, so a signature must be there")
    return base64.b64decode(read_small(beside, place.name, limit=SIGNATURE_LIMIT).strip(), validate=True)
