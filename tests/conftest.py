"""Settings of the whole suite."""

import gc

from minitron_nemo.distributed import launch
from minitron_nemo.garbage import collect_from_here

# Every rank that a test starts imports what started it; the fork server does that once for all of them.
launch.PRELOADED += [name for name in ("pytest", "safetensors.torch", "yaml") if name not in launch.PRELOADED]
gc.disable()  # until all tests are imported, with all that they need


def pytest_collection_finish(session):
    collect_from_here()
