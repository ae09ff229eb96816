"""Recipes asked one after another in one process, which says of each how it ended and what it imported.

Run as a script with questions as JSON on standard input: [[path of a recipe, arguments], ...]; the answers come out as
JSON, [exit code, standard output, standard error, heavy packages imported since the question before] each.
"""

import contextlib
import io
import json
import os
import runpy
import sys

HEAVY = {"torch", "megatron", "nemo", "lightning", "numpy", "pyarrow", "transformers", "safetensors", "matplotlib"}


def answer(recipe: str, arguments: list[str]) -> list:
    before = set(sys.modules)
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = [recipe, *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(recipe, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return [code, out.getvalue(), err.getvalue(), sorted((set(sys.modules) - before) & HEAVY)]


if __name__ == "__main__":
    answers = [answer(*question) for question in json.load(sys.stdin)]
    sys.stdout.write(json.dumps({"answers": answers, "ours": "minitron_nemo.cli" in sys.modules}))
    sys.stdout.flush()
    os._exit(0)  # logging and Hydra have nothing to say at the end
