"""Export: a sharded `.nemo` model becomes a Hugging Face folder that `transformers` opens with the same logits."""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.contents import has
from minitron_nemo.artefacts.manifest import file_sha256
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.progress import watched
from minitron_nemo.steps.describe import model_lines, shapes
from minitron_nemo.steps.inputs import open_to_stream
from minitron_nemo.steps.step import Job, Recipe, logger

if TYPE_CHECKING:
    from minitron_nemo.checkpoint.formats.nemo import NemoFolder
    from minitron_nemo.reporting.model_card import HubPage


def page_of(config: Config, model: "NemoFolder") -> "HubPage":
    """The card and the notice that go with the model."""
    from minitron_nemo.reporting.model_card import Wishes, hub_page  # brings torch

    section = config.export_hf
    evaluation = None if section.evaluation is None else Path(section.evaluation)
    wishes = Wishes(section.model_name, section.base_model, section.license, evaluation)
    called = Path(str(section.output)).name.removesuffix("_hf")
    return hub_page(model.path, model.tokenizer, called=called, wishes=wishes)


def prepare(config: Config) -> Job:
    model = open_to_stream(config.export_hf.checkpoint)
    page_of(config, model)
    settings = identity(config.export_hf)
    if config.export_hf.evaluation is not None:
        settings["evaluation"] = file_sha256(config.export_hf.evaluation)
    return Job(Path(str(config.export_hf.output)), "hf", settings, {"model": model.path})


def run(config: Config, job: Job) -> None:
    # torch takes seconds to import: not before there is something to export.
    from minitron_nemo.checkpoint.formats.hf import SOURCE_CONFIG_FILE, export_hf
    from minitron_nemo.checkpoint.source import stream

    model = open_to_stream(config.export_hf.checkpoint)
    tensors = watched(stream(model.weights), len(model.weights.names()), "export", unit="tensor")
    from_scratch = not has(model.tokenizer, SOURCE_CONFIG_FILE)
    token_ids = load_tokenizer(model.tokenizer).special_ids() if from_scratch else None
    page = page_of(config, model)
    for note in page.notes:
        logger.info(f"export_hf: {note}")
    export_hf(model, job.output, origin=job.origin, tensors=tensors, token_ids=token_ids, files=page.files)


RECIPE = Recipe("export_hf", prepare, run, lines=lambda config: model_lines(config, shapes(config).student))

if __name__ == "__main__":
    main(RECIPE)
