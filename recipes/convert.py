"""Convert: a checkpoint in another format, or in the files of another layout; bit for bit, without a GPU.

python recipes/convert.py convert.source=CHECKPOINT convert.output=PLACE convert.format=hf
"""

from pathlib import Path

from minitron_nemo.cli import main
from minitron_nemo.config.convert import CheckpointFormat
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.steps.step import Job, Recipe, logger


def layout_of(config: Config) -> Layout:
    section = config.convert
    return Layout(tp=section.tensor_model_parallel_size, pp=section.pipeline_model_parallel_size)


def prepare(config: Config) -> Job:
    section = config.convert
    for name in ("source", "output"):
        if getattr(section, name) is None:
            raise UserError(
                f"convert.{name} is not set: give a checkpoint as convert.source and a place as convert.output"
            )
    # torch takes seconds to import: not before there is something to read.
    from minitron_nemo.checkpoint.formats.known import open_checkpoint, written_format
    from minitron_nemo.steps.convert import check_layout, facts_of_source, is_ours

    target, source = written_format(section.format.value), Path(str(section.source))
    check_layout(target, layout_of(config))
    model = open_checkpoint(source)
    layout_of(config).check(model.arch, setting="convert.tensor_model_parallel_size")
    logger.info(f"convert: {source} is {model.format}: {model.arch.describe()}")
    settings, output = identity(section), Path(str(section.output))
    if is_ours(source):
        return Job(output, target.kind, settings, {"model": source})
    return Job(output, target.kind, {**settings, "files": facts_of_source(source)}, inputs=(source,))


def run(config: Config, job: Job) -> None:
    from minitron_nemo.checkpoint.formats.known import open_checkpoint
    from minitron_nemo.reporting.model_card import page_of_checkpoint
    from minitron_nemo.steps.convert import convert

    section = config.convert
    model, page = open_checkpoint(str(section.source)), None
    if section.format is CheckpointFormat.hf:
        page = page_of_checkpoint(model.path, model.arch, model.tokenizer, called=job.output.name)
        for note in page.notes:
            logger.info(f"convert: {note}")
    files, layout = page.files if page else {}, layout_of(config)
    convert(model, job.output, format=section.format.value, layout=layout, origin=job.origin, page=files)


RECIPE = Recipe("convert", prepare, run)

if __name__ == "__main__":
    main(RECIPE, config="convert")
