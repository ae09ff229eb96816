"""The teacher's hidden states on their way between pipeline stages, before the student's schedule starts."""

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.routes import Route
from minitron_nemo.shape.taps import Tap

States = dict[Tap, Tensor]


def delivered(
    heard: Sequence[Mapping[Tap, Tensor]], routes: Sequence[Route], *, groups: Groups, empty: Callable[[], Tensor]
) -> list[States]:
    """Of every micro-batch the states that this stage compares with, [s, b, h] each. Collective over the stages.

    `heard` are the states that this stage has; `empty` makes a tensor of the shape and dtype of a state, to receive
    into. Both ends of a way go through micro-batches and routes in one order.
    """
    stage, ranks = groups.pp_rank, dist.get_process_group_ranks(groups.pp)
    taken: list[States] = [{} for _ in heard]
    operations = []
    for states, own in zip(heard, taken, strict=True):
        for route in routes:
            if route.source == route.target == stage:
                own[route.tap] = states[route.tap]
            elif route.source == stage:
                operations.append(dist.P2POp(dist.isend, states[route.tap], ranks[route.target], group=groups.pp))
            elif route.target == stage:
                own[route.tap] = empty()
                operations.append(dist.P2POp(dist.irecv, own[route.tap], ranks[route.source], group=groups.pp))
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    return taken
