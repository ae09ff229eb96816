"""Mutations of sound files, each given to its parser: a refusal in one line or what was there before, and nothing else.

    python tests/hostile/fuzz.py [--count N] [--seed S] [--only PARSER]

prints for each parser how many mutations were refused, read otherwise and read alike, and the slowest one; ends with 1
when one of them raised anything else. `make test` tries a few hundred of each (`test_fuzz.py`), `make fuzz` 10,000.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from hf_models import save_tiny_tokenizer
from hostile.case import write_sound

from minitron_nemo.artefacts.contents import contents_of, tar_members
from minitron_nemo.artefacts.foreign_json import read_json_object
from minitron_nemo.artefacts.manifest import read_manifest
from minitron_nemo.checkpoint.common_state import read_common_state
from minitron_nemo.checkpoint.formats.hf import HfWeights, arch_from_hf
from minitron_nemo.checkpoint.formats.nemo import read_config
from minitron_nemo.checkpoint.payload import find_tensor
from minitron_nemo.checkpoint.restricted_metadata import read_metadata
from minitron_nemo.checkpoint.safetensors_stream import read_header
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.plan import read_plan

TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 50, b"2147483648",
    b"*a", b"&a ", b"!!int ", b"<<: ", b"---\n", b"\n", b"\0", b"\xff", b"\x80\x04", b"(", b"\x93", b"R", b"b", b"t",
    b"../", b"/", b"\\u0000", b"\\ud800", b"PK\x01\x02", b"\xff\xff\xff\xff", b"\x00" * 8, b"_target_",
]  # fmt: skip


@dataclass(frozen=True)
class Parser:
    """A sound `file`, and what reads it: gives something that can be compared, or raises one of `refusals`."""

    file: Path
    read: Callable[[], Any]
    refusals: tuple[type[Exception], ...] = (UserError,)


@dataclass
class Tally:
    refused: int = 0
    alike: int = 0
    other: int = 0
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a token, a cut, a piece twice, two pieces exchanged."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, until = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        until = min(until, at + 64)
        match rng.randrange(7):
            case 0 if at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            case 1 if at < len(data):
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 2:
                data = data[:at] + rng.choice(TOKENS) + data[at:]
            case 3:
                token = rng.choice(TOKENS)
                data = data[:at] + token + data[at + len(token) :]
            case 4:
                data = data[:at] + data[until:]
            case 5:
                data = data[:until] + data[at:until] * rng.choice((1, 2, 9)) + data[until:]
            case 6:
                data = data[:at] if rng.random() < 0.2 else data[:at] + data[at:until][::-1] + data[until:]
    return data


def fuzz(parser: Parser, *, count: int, seed: int | str) -> Tally:
    """Give `count` mutations to a parser; the file is put back."""
    rng, tally, sound = random.Random(seed), Tally(), parser.file.read_bytes()
    expected = parser.read()
    for number in range(count):
        data = mutated(sound, rng)
        parser.file.write_bytes(data)
        began = time.process_time()
        try:
            found = parser.read()
        except parser.refusals as error:
            tally.refused += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                tally.faults.append(f"mutation {number}: not one line: {str(error)[:200]!r}")
        except Exception as error:
            tally.faults.append(f"mutation {number}: {type(error).__name__}: {str(error)[:200]!r}")
        else:
            tally.alike += found == expected
            tally.other += found != expected
        tally.slowest = max(tally.slowest, time.process_time() - began)
    parser.file.write_bytes(sound)
    return tally


def parsers(folder: Path) -> dict[str, Parser]:
    """Every parser of foreign files with a sound file of its own below `folder`."""
    sound = write_sound(folder, save_tiny_tokenizer)
    model, hf = sound["nemo"], sound["hf"]
    weights, shard = model / "model_weights", sorted(hf.glob("model-*.safetensors"))[0]
    payload, header, words = folder / "payload", folder / "header.safetensors", folder / "tokenizer"
    torch.save(torch.arange(12.0).view(3, 4), payload)
    header.write_bytes(shard.read_bytes())
    (folder / "common").mkdir()
    torch.save({"args": argparse.Namespace(num_layers=2), "iteration": 7}, folder / "common" / "common.pt")
    common = folder / "common" / "common.pt"

    def tensor() -> Any:
        with payload.open("rb", buffering=0) as file:
            return find_tensor(file, 0, payload.stat().st_size)

    def state() -> Any:
        values = read_common_state(common.read_bytes(), source="common.pt")
        return sorted(map(str, values))

    return {
        "metadata": Parser(weights / ".metadata", lambda: read_metadata(contents_of(weights))),
        "payload": Parser(payload, tensor, (ValueError,)),
        "common state": Parser(common, state),
        "safetensors header": Parser(header, lambda: read_header(header), (ValueError,)),
        "model_config.yaml": Parser(model / "model_config.yaml", lambda: read_config(contents_of(model))),
        "config.json": Parser(hf / "config.json", lambda: arch_from_hf(hf)),
        "index": Parser(hf / "model.safetensors.index.json", lambda: HfWeights(hf, arch_from_hf(hf)).names()),
        "manifest": Parser(model / "manifest.json", lambda: read_manifest(model, kind="model")),
        "plan": Parser(sound["plan"], lambda: read_plan(sound["plan"])),
        "tar headers": Parser(sound["tar"], lambda: tar_members(sound["tar"])),
        "tokenizer.json": Parser(words / "tokenizer.json", lambda: load_tokenizer(words).eod),
        "tokenizer_config.json": Parser(
            words / "tokenizer_config.json", lambda: read_json_object(words / "tokenizer_config.json")
        ),
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=10_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", default="")
    given = arguments.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, parser in parsers(Path(folder)).items():
            if given.only in name:
                tally = fuzz(parser, count=given.count, seed=f"{name} {given.seed}")
                print(f"{name:22} {tally.refused:7} refused {tally.alike:6} read alike {tally.other:6} read otherwise, "
                      f"slowest {tally.slowest:.2f} s, {len(tally.faults)} faults", flush=True)  # fmt: skip
                for fault in tally.faults[:5]:
                    print(f"    {fault}")
                faults += len(tally.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
