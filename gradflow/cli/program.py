"""The command line. Every command reads or runs, prints, and ends: 0 fine, 1 findings, 2 it could not be done."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import gradflow
from gradflow.cli import commands, console, factories
from gradflow.cli.commands import Severity
from gradflow.errors import GradflowError, UsageError

app = typer.Typer(
    name="gradflow",
    help="See how signal and gradient flow through the residual branches of a PyTorch model, while it trains.",
    epilog="Exit status: 0 fine, 1 findings (check, probe), 2 it could not be done. Start with: gradflow demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)


RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory (path or URL), such as logs/gradflow.")]
Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A function without arguments that returns a model, (model, args) or (model, args, kwargs), "
        "as train:make_model or train.py:make_model.",
    ),
]
Inputs = Annotated[
    str | None,
    typer.Option("--input", metavar="MODULE:FUNCTION", help="A function that returns the model's inputs."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
FailOn = Annotated[
    Severity, typer.Option("--fail-on", help="Exit with status 1 on a finding of this severity or a graver one.")
]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", metavar="CODE", help="Leave out a finding; repeatable.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"gradflow {gradflow.__version__}")  # noqa: T201
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Directory for runs and reports.")] = Path("gradflow-demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps a run.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of the Transformers.")] = None,
    force: Force = False,
) -> None:
    """Train small models, sound and broken, and write their reports.

    Needs no data and no network: the monitor watches small Transformers learn, and says what it saw.
    """
    from gradflow import demo as demonstration

    demonstration.run(out, steps=steps, depth=depth, force=force)


@app.command()
def branches(factory: Factory, *, inputs: Inputs = None, as_json: Json = False) -> None:
    """Show the residual branches of a model as a tree.

    One forward pass finds them, without training; what could not be followed is listed below the tree.
    """
    from gradflow import discovery
    from gradflow.cli import outline

    subject = factories.build(factory, inputs)
    _, structure = commands.run_model(factory, discovery.discover, subject)
    if as_json:
        console.print_json(
            {"branches": structure.branches, "streams": structure.streams, "problems": structure.problems}
        )
    else:
        console.say(outline.render_tree(structure))


@app.command()
def probe(
    factory: Factory,
    *,
    inputs: Inputs = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write a report as well; with --depths or --widths the picture (.svg, .png)."),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Build the model at these depths: FUNCTION(depth).")
    ] = None,
    widths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Build the model at these widths: FUNCTION(width).")
    ] = None,
    force: Force = False,
    fail_on: FailOn = Severity.warning,
    ignore: Ignore = None,
    as_json: Json = False,
) -> None:
    """Diagnose a model as it is initialised, without training.

    One forward and one backward pass; findings are printed as by check. With --depths 4,8,16,32 the model is built at
    each depth, and how signal and gradient scale with it is plotted, theory beside it.
    """
    if depths is not None or widths is not None:
        from gradflow.cli import series_command

        picture = commands.free(out or Path("gradflow-scaling.svg"), force=force)
        series_command.run(
            lambda size: commands.run_model(factory, gradflow.probe, factories.build(factory, inputs, size=size)),
            depths=depths, widths=widths, out=picture, as_json=as_json,
        )  # fmt: skip
        return
    target = None if out is None else commands.free(out, force=force)
    subject = factories.build(factory, inputs)
    run = commands.run_model(factory, gradflow.probe, subject)
    if target is not None:
        gradflow.report(run, target)
    commands.judge(run, fail_on=fail_on, ignore=ignore or [], as_json=as_json)


@app.command()
def report(
    run: RunPath,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write, or the folder of pictures. [default: report.html, or figures, in the run]",
        ),
    ] = None,
    form: Annotated[
        Literal["html", "pdf", "png", "svg"],
        typer.Option("--format", help="One page, or every picture as a file of its own."),
    ] = "html",
    force: Force = False,
) -> None:
    """Write the report of a run: one HTML file, no network.

    Or its pictures as files, for a paper: --format pdf, png or svg.
    """
    if out is None and "://" in run:
        raise UsageError(f"expected --out FILE for a run behind a URL, got none for {run}; name a local file")
    target = commands.free(out or Path(run) / ("report.html" if form == "html" else "figures"), force=force)
    with console.progress("report") as progress:
        progress(0.0, "reading")
        loaded = commands.load(run)
        if form == "html":
            gradflow.report(loaded, target, progress=progress)
        else:
            from gradflow.plotting import gallery

            found = gradflow.diagnose(loaded)
            written = gallery.export(loaded, target, format=form, findings=found, progress=progress)
    if form == "html":
        console.say(f"wrote {target}")
    else:
        console.say(f"wrote {len(written)} pictures into {target}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two or more run directories.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("gradflow-compare.html"),
    force: Force = False,
) -> None:
    """Write one page that sets runs side by side."""
    if len(runs) < 2:
        raise UsageError(f"expected two runs or more to compare, got {len(runs)}; for one run there is gradflow report")
    target = commands.free(out, force=force)
    gradflow.compare([commands.load(run) for run in runs], target)
    console.say(f"wrote {target}")


@app.command()
def check(run: RunPath, *, fail_on: FailOn = Severity.warning, ignore: Ignore = None, as_json: Json = False) -> None:
    """Print the findings of a run; exit status 1 if there are any.

    A test for continuous integration: --fail-on says how grave, --ignore which to leave out.
    """
    loaded = commands.load(run)
    if not loaded.steps:
        raise UsageError(f"expected a run with recorded steps, got none in {run}; nothing can be said of it")
    commands.judge(loaded, fail_on=fail_on, ignore=ignore or [], as_json=as_json)


@app.command()
def schema(*, as_json: Json = False) -> None:
    """Print the tables of a run: columns, units, formulas."""
    tables = console.schema_rows()
    if as_json:
        console.print_json(tables)
        return
    for table, columns in tables.items():
        rows = [[c["name"], c["type"], c["unit"], c["formula"] or c["merge"], c["doc"]] for c in columns]
        console.print_table(table, ["column", "type", "unit", "formula or merge", "meaning"], rows)


@app.command()
def rules(
    *,
    as_json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print them as the handbook of findings, in Markdown.")
    ] = False,
) -> None:
    """Print the rules behind the findings, and their record.

    With each: thresholds, sources, and how it did on labelled runs. Thresholds can be set per project:
    [tool.gradflow.thresholds] in pyproject.toml, by the keys printed here.
    """
    from gradflow.cli import handbook
    from gradflow.rules import RULES

    if markdown:
        typer.echo(handbook.page(), nl=False)
        return
    if as_json:
        console.print_json([console.rule_facts(rule) for rule in RULES.values()])
        return
    for rule in RULES.values():
        console.print_rule(rule)


def main() -> None:
    """Run the command line: what gradflow raises on purpose becomes one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app(prog_name="gradflow")
    except GradflowError as error:
        console.say(f"error: {' '.join(str(error).split())}", error=True, style="bold red")
        sys.exit(2)
    except BrokenPipeError:  # `gradflow schema | head`: nobody reads on, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
