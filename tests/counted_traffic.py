"""Every collective that torch dispatches, counted by group and kind."""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.steps.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND, Traffic, sent

NAMES = {  # of torch's operators, and which argument is whole: what is gathered into, or what is reduced
    "_allgather_base_": (ALL_GATHER, 0), "allgather_": (ALL_GATHER, 0), "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "allgather_into_tensor_coalesced_": (ALL_GATHER, 0), "reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1),
    "allreduce_": (ALL_REDUCE, 0), "allreduce_coalesced_": (ALL_REDUCE, 0), "send": (SEND, 0),
    "broadcast_": ("broadcast", 0),
}  # fmt: skip
LOCAL = {"recv_", "recv_any_source_", "monitored_barrier_", "barrier"}
SMALL = 300  # bytes: sums of the log, norms


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, list | tuple) else []


class Counting(TorchDispatchMode):
    """Adds up the bytes that each collective over named groups sends; those up to `small` bytes are left out.

    Of several names for the same ranks the first counts.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup | None], *, small: int = SMALL) -> None:
        super().__init__()
        self.small = small
        self.ranks = {name: tuple(dist.get_process_group_ranks(g)) for name, g in groups.items() if g is not None}
        self.bytes: Traffic = Counter()

    @classmethod
    def of(cls, groups: Groups) -> "Counting":
        """Of the groups of a layout."""
        return cls({"tp": groups.tp, "pp": groups.pp, "batch": groups.batch, "cp": groups.cp})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.note(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, args) -> None:
        if name in LOCAL:
            return
        collective, whole = NAMES[name]  # KeyError: an operator that nobody thought of
        size = sum(tensor.numel() * tensor.element_size() for tensor in flat(args[whole]))
        if size <= self.small:
            return
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        members = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))
        if len(members) == 1:
            return
        group = "pp" if collective == SEND else str(members)
        self.bytes[self.named(group, members), collective] += sent(collective, size, len(members))

    def named(self, name: str, members: tuple[int, ...] | None = None) -> str:
        """The name under which a group is counted, itself where it has none."""
        members = members or self.ranks.get(name)
        return next((known for known, ranks in self.ranks.items() if ranks == members), name)
