"""What each hostile artefact costs to refuse, in processor time and in memory beyond what the process had.

    python tests/hostile/cost.py

prints the five slowest, the five largest, and how many took over one and two seconds.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from hf_models import save_tiny_tokenizer
from hostile.case import OPENERS, write_sound
from hostile.corpus import CASES
from hostile.test_hostile_corpus import copied, forget_the_peak, memory, seconds

from minitron_nemo.errors import UserError


def main() -> None:
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        sound = write_sound(Path(folder), save_tiny_tokenizer)
        for case in CASES.values():
            place = Path(folder) / "case"
            place.mkdir()
            path = copied(sound, case, place)
            case.poison(path)
            forget_the_peak()
            began, had = seconds(), memory("VmRSS")
            with contextlib.suppress(UserError):
                OPENERS[case.base](path)
            costs.append((seconds() - began, (memory("VmHWM") - had) >> 20, case.name))
            shutil.rmtree(place)
    for took, size, name in sorted(costs)[-5:] + sorted(costs, key=lambda cost: cost[1])[-5:]:
        print(f"{took:5.2f} s {size:4} MiB  {name}")
    for limit in (1, 2):
        print(f"{sum(took > limit for took, *_ in costs)} of {len(costs)} took over {limit} s")


if __name__ == "__main__":
    main()
