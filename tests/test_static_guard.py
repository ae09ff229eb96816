"""No call in the tree can run code that a file brings: read off the syntax trees of everything that ships.

The rules are functions of a tree, and each is shown a line that it must find, so that none can pass by seeing nothing.
"""

import ast
from pathlib import Path

import pytest
from reach import parsed

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(file for room in ("minitron_nemo", "recipes", "launch", "benchmarks") for file in
                 (ROOT / room).rglob("*.py"))  # fmt: skip

# Modules that unpickle, or load what they are told to, and the only files that may import them.
MODULES = {
    "pickle": {"minitron_nemo/checkpoint/restricted_metadata.py"},  # writes `.metadata`; reading is `pickle_machine`'s
    **dict.fromkeys(
        ("_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "dbm", "imp", "ctypes", "code",
         "codeop", "pty", "runpy", "jsonpickle", "zarr", "h5py"), set[str]()
    ),
}  # fmt: skip
# Names of calls, by their end, that nothing may call, and the only files that may.
CALLS = {
    **dict.fromkeys(
        ("extract", "extractall", "unpack_archive", "unsafe_load", "full_load", "load_all", "safe_load",
         "os.system", "os.popen", "jit.load", "hub.load", "package.PackageImporter", "__import__",
         "instantiate", "get_class", "get_method", "get_object", "all_gather_object", "gather_object",
         "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list",
         "register_new_resolver", "register_resolver"), set[str]()
    ),
    # Texts of others go through `strict_json`: these read lines of a corpus, of which one string is used, what this
    # process or its own ranks wrote, and the log of a run.
    "json.loads": {
        "minitron_nemo/artefacts/strict_json.py", "minitron_nemo/data/text_files.py",
        "minitron_nemo/distributed/groups.py", "minitron_nemo/reporting/collect.py",
        "minitron_nemo/training/metrics.py", "benchmarks/",
    },
    # Of names that stand in the source: the public face, Transformer Engine, the recipes.
    "import_module": {
        "minitron_nemo/__init__.py", "minitron_nemo/engine/accelerations.py", "recipes/pipeline.py", "benchmarks/",
    },
    "json.load": {"minitron_nemo/data/tokenizer_trial.py", "benchmarks/"},
    "yaml.parse": {"minitron_nemo/artefacts/strict_yaml.py"},
}  # fmt: skip
BARE = ("eval", "exec", "compile", "execfile")
KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    return next((getattr(word.value, "value", ...) for word in call.keywords if word.arg == name), None)


def faults(tree: ast.AST, file: str) -> list[str]:
    """What a file must not do, a line each."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            taken = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if file not in MODULES.get(name.split(".")[0], {file}):
                    found.append(f"{file}:{node.lineno}: imports {name}")
            # `from yaml import load` would hide what a call is.
            for name in taken:
                if name.split(".")[0] in ("json", "yaml", "torch", "numpy") and name.endswith(("load", "loads")):
                    found.append(f"{file}:{node.lineno}: takes {name} without its module")
        if isinstance(node, ast.Call):
            found += [f"{file}:{node.lineno}: {fault}" for fault in call_faults(node, file)]
    return found


def call_faults(call: ast.Call, file: str) -> list[str]:
    name = dotted(call.func)
    found = [f"{key}={value}" for key, value in KEYWORDS.items() if keyword(call, key) is value]
    if isinstance(call.func, ast.Name) and name in BARE:
        found.append(name)
    for end, allowed in CALLS.items():
        if (name == end or name.endswith(f".{end}")) and not any(file.startswith(place) for place in allowed):
            found.append(name)
    if name in ("torch.load", "yaml.load") and keyword(call, "weights_only") is not True:
        found.append(f"{name} without weights_only=True")
    if name in ("np.load", "numpy.load", "np.lib.npyio.NpzFile") and keyword(call, "allow_pickle") is not False:
        found.append(f"{name} without allow_pickle=False")
    if name.endswith(("subprocess.run", "Popen", "check_output", "check_call")) and isinstance(
        call.args[0] if call.args else None, ast.Constant | ast.JoinedStr
    ):
        found.append(f"{name} of one text")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_ships_can_run_what_a_file_brings(path):
    assert not faults(parsed(path), path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import marshal, os", "import dill as json", "import joblib.x",
        "import shelve", "import ctypes", "eval(x)", "exec(x)", "compile(x, '', 'exec')", "torch.load(x)",
        "torch.load(x, weights_only=False)", "torch.load(x, weights_only=flag)", "np.load(x)",
        "numpy.load(x, allow_pickle=True)", "yaml.load(x, Loader=L)", "yaml.safe_load(x)", "yaml.full_load(x)",
        "yaml.unsafe_load(x)", "tar.extractall()", "tar.extract(m)", "shutil.unpack_archive(x)",
        "subprocess.run(x, shell=True)", "subprocess.run(f'ls {x}')", "os.system(x)", "os.popen(x)",
        "hydra.utils.instantiate(c)", "instantiate(c)", "dist.all_gather_object(a, b)", "json.loads(x)",
        "from json import loads", "from yaml import safe_load", "from torch import load", "importlib.import_module(x)",
        "__import__(x)", "torch.hub.load(x)", "torch.jit.load(x)", "M.from_pretrained(x, trust_remote_code=True)",
        "OmegaConf.register_new_resolver('eval', eval)", "import zarr",
    ],
)  # fmt: skip
def test_the_guard_sees(line):
    assert faults(ast.parse(line), "minitron_nemo/somewhere.py")


def test_the_guard_has_looked_at_the_tree():
    assert len(SHIPPED) > 200
    for allowed in [*MODULES.values(), *CALLS.values()]:
        for place in allowed:
            assert any(path.relative_to(ROOT).as_posix().startswith(place) for path in SHIPPED), f"{place}: unused"
