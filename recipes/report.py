"""Report: one table and one page of plots for all models of a run."""

from pathlib import Path

from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config
from minitron_nemo.errors import UserError
from minitron_nemo.steps.step import Job, Recipe


def prepare(config: Config) -> Job:
    if not config.report.models:
        raise UserError("report.models is empty: name the models to compare, such as report.models=[teacher,student]")
    return Job(Path(str(config.report.output)), "report", {}, always=True)


def run(config: Config, job: Job) -> None:
    from minitron_nemo.reporting.table import format_table
    from minitron_nemo.reporting.verdict import verdict
    from minitron_nemo.reporting.write import write_report

    report = write_report(Path(config.run_dir), config.report.models, output=job.output)
    print(format_table(report.models))
    print(verdict(report.models, report.made, reference=report.reference))
    print(f"report: {job.output}")


RECIPE = Recipe("report", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
