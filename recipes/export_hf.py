"""Export: a sharded `.nemo` model becomes a Hugging Face folder that `transformers` opens with the same logits."""

from pathlib import Path

from minitron_nemo.checkpoint.formats.hf import KIND, export_hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.progress import watched
from minitron_nemo.steps.inputs import open_verified
from minitron_nemo.steps.step import Job, Recipe


def prepare(config: Config) -> Job:
    model = open_verified(config.export_hf.checkpoint)
    return Job(Path(str(config.export_hf.output)), KIND, identity(config.export_hf), {"model": model.path})


def run(config: Config, job: Job) -> None:
    model = open_nemo(str(config.export_hf.checkpoint))
    tensors = watched(stream(model.weights), len(model.weights.names()), "export", unit="tensor")
    export_hf(model, job.output, origin=job.origin, tensors=tensors)


RECIPE = Recipe("export_hf", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
