"""One cut: a model and a plan in, a smaller model out. One process, no GPU needed, a few tensors in memory."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.artefacts.contents import has
from minitron_nemo.artefacts.lineage import ancestors
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import TOKENIZER, NemoFolder, open_nemo, write_nemo
from minitron_nemo.checkpoint.source import TensorSource, stream
from minitron_nemo.config.repairs import HeadResidual, RepairsConfig
from minitron_nemo.config.schema import Accelerator, Config
from minitron_nemo.data.prune_tokenizer import pruned_tokenizer
from minitron_nemo.data.vocabulary import read_vocabulary
from minitron_nemo.errors import UserError
from minitron_nemo.importance.calibration_text import read_text
from minitron_nemo.importance.scores import read_scores
from minitron_nemo.importance.second_moments import SecondMomentFile
from minitron_nemo.progress import watched
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.plan import PLAN_FILE, PruningPlan
from minitron_nemo.pruning.proof import RANDOM, Digests, prove_cut
from minitron_nemo.pruning.repairs.sources import Repairs, repaired
from minitron_nemo.steps.planning import needs_importance

logger = logging.getLogger(__name__)


def prune(
    model: NemoFolder,
    plan: PruningPlan,
    output: str | Path,
    *,
    origin: Origin | None = None,
    repairs: Repairs | None = None,
    importance: str | Path | None = None,
    text_from: str | Path | None = None,
    proof: bool = True,
    gpu: bool = False,
) -> NemoFolder:
    """Publish the model that `plan` leaves of `model` as the `.nemo` folder `output`, `plan.json` inside.

    `repairs` change the weights that stay, by what lies in the folder `importance` (docs/method.md).
    With `proof` the weights as they were written are first compared with the masked source, on the calibration text in
    the folder of scores `text_from` or else on random tokens, with `gpu` on a GPU where there is one, and the findings
    go into the manifest. `origin` is by default made of the plan and the model. Raises UserError when the plan is for
    another shape or `output` is there already, and ProofError, publishing nothing, when the model does not compute what
    it should.
    """
    plan.check_source(model.arch)
    if origin is None:
        settings = {"plan": plan.to_json()} | ({"repairs": dataclasses.asdict(repairs)} if repairs else {})
        parents, lineage = {"model": model.sha256}, ancestors({"model": model.path})
        origin = Origin.of("model", settings, parents=parents, lineage=lineage)
    cut = PrunedSource(model.weights, plan)
    source = cut if repairs is None else _repaired(model, plan, repairs, importance)
    text = read_text(text_from, vocab_size=model.arch.vocab_size) if proof and text_from is not None else None
    tensors, digests = stream(source), Digests()
    if proof and source is not cut:
        tensors = digests.noted(tensors)

    def prove(written: TensorSource) -> Mapping[str, Any]:
        device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        found = prove_cut(model.weights, written if source is cut else cut, plan, text_BS=text, device=device)
        if source is not cut:
            digests.check(written)
        if found.tokens == RANDOM:
            logger.info(f"proof: on random tokens: {text_from or 'a cut without scores'} has no calibration text")
        logger.info(found.describe())
        return {"proof": found.to_dict()}

    renamed = plan.target.vocab_size < plan.source.vocab_size and has(model.tokenizer, "tokenizer.json")
    write_nemo(
        output,
        plan.target,
        watched(tensors, len(source.names()), "prune", unit="tensor"),
        dtype=model.dtype,
        tokenizer=None if renamed else model.tokenizer,
        origin=origin,
        files={PLAN_FILE: plan.to_json().encode(), **(_tokenizer_files(model, plan) if renamed else {})},
        prove=prove if proof else None,
    )
    return open_nemo(output)


def options_of(config: Config) -> dict[str, Any]:
    """What a config says about how its cut is made, as arguments of `prune`."""
    section = config.prune
    return {
        "repairs": repairs_of(section.repairs),
        "importance": section.importance,
        "text_from": _scores_of(config),
        "proof": section.proof,
        "gpu": config.trainer.accelerator is not Accelerator.cpu,
    }


def _scores_of(config: Config) -> str | None:
    """The folder of the scores that a cut goes by, None for a cut by a plan or by words alone."""
    if needs_importance(config):
        return config.prune.importance
    by_blocks = config.prune.plan is None and config.prune.target.drop_by is not None
    return config.prune.blocks if by_blocks else None


def repairs_of(section: RepairsConfig) -> Repairs | None:
    """The repairs that a config asks for, None for none."""
    if not section.any:
        return None
    wanted = {known.name: getattr(section, known.name) for known in dataclasses.fields(section)}
    sign = section.head_residual.value
    return Repairs(**wanted | {"head_residual": None if sign == HeadResidual.none.value else sign})


def _repaired(model: NemoFolder, plan: PruningPlan, repairs: Repairs, importance: str | Path | None) -> TensorSource:
    """The pruned weights with repairs; refuses an importance folder that is another model's."""
    if importance is None:
        raise UserError("prune.repairs need the importance folder of this model; give prune.importance")
    scores = read_scores(importance)
    if scores.arch != model.arch:
        raise UserError(f"{importance} was estimated on another model than {model.path}; estimate it on this one")
    need = dataclasses.replace(repairs, head_residual=None, ridge=Repairs.ridge) != Repairs()
    moments = SecondMomentFile(importance, model.arch) if need else None
    return repaired(model.weights, plan, repairs, scores=scores, moments=moments)


def _tokenizer_files(model: NemoFolder, plan: PruningPlan) -> dict[str, bytes]:
    """The tokenizer of the words that stay, which are refused where a text could not be spelled with them."""
    words = plan.units("vocab_size")
    read_vocabulary(model.tokenizer, size=plan.source.vocab_size).check_kept(words, name="plan.json: vocab_size")
    pruned = pruned_tokenizer(model.tokenizer, words)
    return {f"{TOKENIZER}/{name}": content for name, content in pruned.items()}
