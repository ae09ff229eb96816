"""One cut: a model and a plan in, a smaller model out. One process, no GPU, a few tensors in memory."""

from pathlib import Path

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo, write_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.progress import watched
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.plan import PruningPlan


def prune(model: NemoFolder, plan: PruningPlan, output: str | Path, *, origin: Origin | None = None) -> NemoFolder:
    """Publish the model that `plan` leaves of `model` as the `.nemo` folder `output`, `plan.json` inside.

    Raises UserError when the plan is for another shape or `output` is there already. `origin` is made of the plan and
    the model when it is not given.
    """
    plan.check_source(model.arch)
    if origin is None:
        origin = Origin.of("model", {"plan": plan.to_json()}, parents={"model": model.sha256})
    source = PrunedSource(model.weights, plan)
    write_nemo(
        output,
        plan.target,
        watched(stream(source), len(source.names()), "prune", unit="tensor"),
        dtype=model.dtype,
        tokenizer=model.tokenizer,
        origin=origin,
        files={"plan.json": plan.to_json().encode()},
    )
    return open_nemo(output)
