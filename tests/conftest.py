"""Settings of the whole suite."""

from minitron_nemo.distributed import launch

# Every rank that a test starts imports what started it; the fork server does that once for all of them.
launch.PRELOADED += [name for name in ("pytest", "safetensors.torch", "yaml") if name not in launch.PRELOADED]
