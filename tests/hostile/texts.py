"""YAML and JSON: the config and the manifest of a model, a Hugging Face config, a plan."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hostile.case import ARCH, CANARY, Case, edit_json, put
from hostile.pickles import Canary, tower

CONFIG = "model_config.yaml"
VALUES = {**ARCH.to_dict(), "precision": "fp32"}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
TARGETS = ["_target_", "target", "cls", "_partial_", "_recursive_", "_args_", "_t\u0430rget_", "__class__"]


def config(**changes: Any) -> str:
    return yaml.safe_dump({**VALUES, **changes}, sort_keys=False)


def line(name: str, text: str) -> str:
    """The config with one value as it is written."""
    return config().replace(f"{name}: {yaml.safe_dump(VALUES[name]).splitlines()[0]}\n", f"{name}: {text}\n", 1)


YAML_TEXTS: dict[str, tuple[str | bytes, str]] = {
    "applies a function": (f"!!python/object/apply:os.mkdir ['{CANARY}']", "tag"),
    "makes an object": ("!!python/object:subprocess.Popen {args: [mkdir, canary]}", "tag"),
    "makes an object anew": ("!!python/object/new:os.system [mkdir canary]", "tag"),
    "names a function": (line("precision", "!!python/name:os.system"), "tag"),
    "names a module": (line("precision", "!!python/module:os"), "tag"),
    "has a tag of its own": (line("precision", "!danger fp32"), "tag"),
    "has a standard tag": (line("num_layers", "!!int '2'"), "tag"),
    "unfolds": (BOMB + config(), "anchors and aliases"),
    "unfolds as a precision": (BOMB + line("precision", "*j"), "anchors and aliases"),
    "unfolds as a number": (BOMB + line("num_layers", "*j"), "anchors and aliases"),
    "refers to itself": ("&a [*a]", "anchors and aliases"),
    "merges": (config() + "<<: {num_layers: 3}\n", "is no name"),
    "says something twice": (config() + "num_layers: 3\n", "comes twice"),
    "has a key that is a list": ("[1, 2]: 3\n" + config(), "is no name"),
    "has a key that is a number": ("1: 3\n" + config(), "is no name"),
    "is two documents": (config() + "---\n" + config(), "second document"),
    "is nested without end": ("[" * 500_000, "nested"),
    "is nested in blocks": ("".join(" " * i + f"a{i}:\n" for i in range(200)), "nested"),
    "is megabytes of nothing": ("- a\n" * 2_000_000, "bytes of YAML"),
    "has many parts": ("a: [" + "1, " * 100_000 + "1]", "more than 50000 parts"),
    "is a list": ("- 1\n- 2\n", "expected a mapping"),
    "is a text": ("hello", "expected a mapping"),
    "is empty": ("", "expected a mapping"),
    "is no UTF-8": (b"\xff\xfe\x00", "not readable YAML"),
    "has a NUL": (config() + "a: \0", "not readable YAML"),
    "is a pickle": (pickle.dumps(Canary(Path(CANARY))), "not readable YAML"),
    "has 5,000 digits": (line("num_layers", "9" * 5000), "digits"),
    "has a date": (line("num_layers", "2024-99-99"), "whole number"),
    "has an hour": (line("num_layers", "1:30:00"), "whole number"),
    "has an octal number": (line("num_layers", "010"), "whole number"),
    "has a number that is none": (line("norm_epsilon", ".nan"), "norm_epsilon='.nan'"),
    "has digits of another script": (line("num_layers", "\u0662"), "whole number"),
    "has a line that others do not see": (line("precision", "fp32\u2028num_layers: 3"), "comes twice"),
    "has a number too large": (line("norm_epsilon", "1e999"), "too large"),
    "asks the environment": (line("num_layers", "${oc.env:HOME}"), "whole number"),
}
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "a billion layers": ({"num_layers": 10**9}, "num_layers=1000000000"),
    "no layers": ({"num_layers": 0}, "num_layers=0"),
    "true layers": ({"num_layers": True}, "num_layers=True"),
    "2.5 layers": ({"num_layers": 2.5}, "num_layers=2.5"),
    "a vocabulary of 2^40": ({"vocab_size": 2**40}, "vocab_size="),
    "a negative width": ({"hidden_size": -16}, "hidden_size=-16"),
    "a width of 10^30": ({"hidden_size": 10**30}, "hidden_size="),
    "a sequence of 2^60": ({"seq_length": 2**60}, "seq_length="),
    "a text for an epsilon": ({"norm_epsilon": "small"}, "norm_epsilon='small'"),
    "a list for an epsilon": ({"norm_epsilon": [1e-5]}, "norm_epsilon="),
    "an epsilon of nothing": ({"norm_epsilon": None}, "norm_epsilon=None"),
    "a negative base": ({"rotary_base": -1.0}, "rotary_base=-1.0"),
    "a text for a base": ({"rotary_base": "x" * 5000}, "rotary_base="),
    "a rotated part of 7": ({"rotary_percent": 7.0}, "rotary_percent=7.0"),
    "a list for a scaling": ({"rope_scaling": [1, 2]}, "rope_scaling"),
    "a text for a scaling": ({"rope_scaling": "llama3"}, "rope_scaling"),
    "a scaling of other fields": ({"rope_scaling": {"_target_": "os.system"}}, "rope_scaling"),
    "a scaling of texts": (
        {"rope_scaling": {"factor": "8", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 32}}, "factor='8'",
    ),
    "a scaling that divides by nothing": (
        {"rope_scaling": {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 32}}, "low_freq_factor",
    ),
    "a text for tied": ({"share_embeddings_and_output_weights": "no way"}, "true or false"),
    "an unknown family": ({"family": "os.system"}, "family='os.system'"),
    "a list for a family": ({"family": [["x"] * 1000]}, "family="),
    "a mapping for a precision": ({"precision": {"_target_": "os.system"}}, "precision="),
}  # fmt: skip


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit_json("manifest.json", change)


def _file(name: str, entry: Any) -> Callable[[Path], None]:
    return _manifest(lambda m: m["files"].update({name: entry}))


def _beside(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: make(folder / "beside")


ENTRY = {"size": 1, "sha256": "0" * 64}
MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "names a file above": (_file("../x", ENTRY), "leaves the folder"),
    "names an absolute file": (_file("/etc/passwd", ENTRY), "leaves the folder"),
    "names a file with a backslash": (_file("a\\..\\b", ENTRY), "leaves the folder"),
    "names a file that is not there": (_file("gone", ENTRY), "not a regular file|no such"),
    "has a size that is a text": (_file("tokenizer/tokenizer.json", {**ENTRY, "size": "1"}), "has no size"),
    "has a name with a line break": (_file("a\nb", ENTRY), "not a regular file"),
    "has a name that turns the text around": (_file("a\u202eb", ENTRY), "not a regular file"),
    "has a name of 5,000 letters": (_file("a" * 5000, ENTRY), "not a regular|cannot be|too long"),
    "lists 30,000 files": (
        _manifest(lambda m: m["files"].update({f"{i}": ENTRY for i in range(30_000)})), "at most 20000",
    ),
    "has 17 MB": (lambda f: os.truncate(f / "manifest.json", 17 * 10**6 + 2**20), "no such file needs more"),
    "has -1 tokens": (_manifest(lambda m: m.update(tokens=-1)), "tokens must be"),
    "has true tokens": (_manifest(lambda m: m.update(tokens=True)), "tokens must be"),
    "has a list for a parent": (_manifest(lambda m: m.update(parents={"model": [1]})), "parents must"),
    "has no hash": (_file("tokenizer/tokenizer.json", {"size": 1}), "has no sha256"),
    "has an entry that is a list": (_file("tokenizer/tokenizer.json", [1]), "has no size"),
    "lists nothing": (_manifest(lambda m: m.update(files={})), "lists nothing"),
    "does not list the config": (_manifest(lambda m: m["files"].pop(CONFIG)), "does not list|not listed"),
    "has another field": (_manifest(lambda m: m.update(_target_="os.system")), "not a readable manifest"),
    "is of another kind": (_manifest(lambda m: m.update(kind="data")), "is a data artefact"),
    "has a number for a kind": (_manifest(lambda m: m.update(kind=7)), "kind must be"),
    "is a list": (lambda f: (f / "manifest.json").write_text("[]"), "not a readable manifest"),
    "is nested without end": (lambda f: (f / "manifest.json").write_text("[" * 10**6), "nested"),
    "says something twice": (lambda f: (f / "manifest.json").write_text('{"kind": "a", "kind": "model"}'), "twice"),
    "is a pickle": (lambda f: (f / "manifest.json").write_bytes(pickle.dumps(Canary(Path(CANARY)))), "manifest"),
    "is a folder": (lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()), "not a regular"),
    "is a pipe": (lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")), "not a regular"),
    "is a link to a device": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").symlink_to("/dev/zero")), "not a regular",
    ),
    "does not know a file": (_beside(lambda path: path.write_text("x")), "beside.*not listed"),
    "does not know a link": (_beside(lambda path: path.symlink_to("/etc/passwd")), "beside.*not listed"),
    "does not know a name with a line break": (_beside(lambda path: path.with_name("beside\n").touch()), "not listed"),
    "does not know a name that is no text": (
        _beside(lambda path: path.with_name("beside\udcff").touch()), "beside.*not listed",
    ),
    "does not know a pipe": (_beside(os.mkfifo), "beside.*not listed"),
}  # fmt: skip

JSON_TEXTS: dict[str, tuple[str | bytes, str]] = {
    "is nested without end": ('{"a":' * 100_000, "not JSON"),
    "is nested 65 deep": ('{"a":' + "[" * 65 + "]" * 65 + "}", "more than 64 deep"),
    "says something twice": ('{"model_type": "x", "model_type": "llama"}', "comes twice"),
    "is not a number": ('{"rms_norm_eps": NaN}', "NaN is no number"),
    "is infinite": ('{"rms_norm_eps": -Infinity}', "Infinity is no number"),
    "has 200 MB": ('{"model_type": "' + "x" * (2 * 10**8) + '"}', "no such file needs more"),
    "says something twice in other letters": ('{"model_type": "x", "model\\u005ftype": "llama"}', "comes twice"),
    "is too large a number": ('{"rms_norm_eps": 1e999}', "too large"),
    "has 5,000 digits": ('{"vocab_size": ' + "9" * 5000 + "}", "digits"),
    "has half a pair": ('{"model_type": "\\ud800"}', "half of a surrogate"),
    "has millions of lists": ('{"a": [' + "[]," * 2_000_000 + "1]}", "of memory"),
    "is a list": ("[1, 2]", "expected a JSON object"),
    "is no UTF-8": (b'{"a": "\xff"}', "not JSON"),
    "is cut short": ('{"model_type": "llama"', "not JSON"),
    "is a pickle": (pickle.dumps(Canary(Path(CANARY))), "not JSON"),
}
HF_FIELDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "wants its own code": ({"auto_map": {"AutoModel": "modeling_evil.Evil"}}, "auto_map"),
    "names another class": ({"architectures": ["os.system"]}, "architectures"),
    "names a million classes": ({"architectures": ["x"] * 10**6}, "architectures"),
    "is of an unknown type": ({"model_type": "../../evil"}, "model_type"),
    "has a billion layers": ({"num_hidden_layers": 10**9}, "num_layers|num_hidden_layers"),
    "has a vocabulary of 2^40": ({"vocab_size": 2**40}, "vocab_size"),
    "has layers of text": ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    "has an epsilon of text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "has a base of 10^40": ({"rope_theta": 10**39}, "rotary_base|rope_theta"),
    "has a scaling of text": ({"rope_scaling": "x"}, "rope"),
    "is quantized": ({"quantization_config": {"_target_": "os.system"}}, "quantization_config"),
    "has a _target_ nobody reads": ({"_target_": "os.system", "extra": {"_target_": "os.system"}}, None),
}


def cases() -> Iterator[Case]:
    for name, (text, says) in YAML_TEXTS.items():
        yield Case(f"model_config.yaml that {name}", "nemo", put(CONFIG, text), says)
    for key in TARGETS:
        text = config() + f"{key}: os.system\n"
        yield Case(f"model_config.yaml with {key!a}", "nemo", put(CONFIG, text), "unknown field")
    for name, (changes, says) in SHAPES.items():
        yield Case(f"model_config.yaml with {name}", "nemo", put(CONFIG, config(**changes)), says)
    for name, (poison, says) in MANIFESTS.items():
        yield Case(f"manifest.json that {name}", "nemo", poison, says)
    for name, (text, says) in JSON_TEXTS.items():
        data = text.encode() if isinstance(text, str) else text
        yield Case(f"config.json that {name}", "hf", lambda f, data=data: (f / "config.json").write_bytes(data), says)
    for name, (fields, says) in HF_FIELDS.items():
        change = edit_json("config.json", lambda values, fields=fields: values.update(fields))
        yield Case(f"config.json that {name}", "hf", change, says)
    for name, (change, says) in PLANS.items():
        yield Case(f"plan.json that {name}", "plan", edit_json("", change), says)


PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "has a _target_": (lambda p: p.update(_target_="os.system"), "exactly the fields"),
    "has a billion layers": (lambda p: p["source"].update(num_layers=10**9), "num_layers"),
    "keeps a unit of 2^70": (lambda p: p["keep"].update(hidden_size=[2**70]), "plan.json"),
    "keeps what is nested": (lambda p: p["keep"].update(hidden_size=json.loads(json.dumps(tower(8)))), "plan.json"),
    "keeps texts": (lambda p: p["keep"].update(ffn_hidden_size=[["a"], ["b"]]), "plan.json"),
}
