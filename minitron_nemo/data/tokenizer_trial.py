"""The parts of a tokenizer.json from standard input, tried on short texts under limits; a process of its own.

Exit code 0 when they got over all texts and none became much longer. What is wrong with the parts themselves is for the
library to say when it opens the whole file.
"""

import json
import resource
import signal
import sys

import tokenizers

SECONDS = 1  # of processor time for all texts
MEMORY = 2**30  # bytes of address space
LENGTH = 2000  # characters
LONGEST = 32  # times as long a text may become
ALPHABETS = ("a", " ", "1", "\n", "a ", "aA", "ab1 .,\n", "\u00e9\u4e00 ", "'s !?", "a\u0301\ufdfa", "_-_", "x=1; ")


def main() -> int:
    parts = json.load(sys.stdin)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, **parts}))
    except Exception:
        return 0
    for alphabet in ALPHABETS:
        text = (alphabet * LENGTH)[:LENGTH] + "!"
        pieces = tokenizer.encode(text, add_special_tokens=False).offsets
        normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        decoded = "" if tokenizer.decoder is None else tokenizer.decoder.decode([text])
        if max(len(pieces), len(normal), len(decoded)) > LONGEST * len(text):
            print(f"{len(text)} characters became {max(len(pieces), len(normal), len(decoded))}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
