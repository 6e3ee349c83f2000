"""The command line: a command parses, calls one function and prints.

Heavy imports stand inside the commands, so that ``edgec --help`` costs no torch and no
onnx. Exit codes: 0 done, 1 failed, 2 usage, 3 a promise is broken.
"""

from __future__ import annotations

import io
import json
import pathlib
import sys
from typing import Any

import click

import edgec
from edgec.cli_adapt import adapt
from edgec.cli_console import (
    BROKEN_PROMISE,
    console,
    exit_with,
    json_option,
    progress_bar,
    scrutiny_options,
    seed_option,
    speed_options,
)
from edgec.cli_devices import devices, mobile, verify
from edgec.cli_run import run


class _Group(click.Group):
    """Prints an EdgecError as one line and exits with code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        from edgec_runtime.errors import EdgecError

        try:
            return super().invoke(ctx)
        except EdgecError as error:
            if ctx.params.get("traceback"):
                raise
            text = " ".join(str(error).split())
            text = text.replace("load it with any_target=True", "give --any-target")
            click.echo(f"edgec: {text}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("edgec: interrupted; nothing was written", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgec.__version__, prog_name="edgec")
@click.option("--traceback", is_flag=True, help="Show the full traceback of an error.")
def main(traceback: bool) -> None:
    """Turn a trained model into one small, fast, verified file per device."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in any script, any terminal


@main.command()
@click.argument("source", required=False)
@click.option(
    "--target",
    "-t",
    "targets",
    multiple=True,
    metavar="NAME|FILE",
    help="Device class; `edgec targets` lists them. May be repeated.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=pathlib.Path),
    help="Bundle path ending in .edgec, or a directory.  [default: build]",
)
@click.option(
    "--calibration",
    metavar="DATA",
    help="Directory of .npz, one .npz or .npy, file.py:function, or a .txt for a language model.",
)
@click.option("--evaluation", metavar="DATA", help="Data to judge the bundle on, with labels.")
@click.option(
    "--metric",
    metavar="M",
    help="top1, top5, spearman, pearson, cosine, mae, mse, perplexity, or "
    "file.py:fn(outputs, labels).",
)
@click.option(
    "--recipe",
    metavar="FILE|PASSES",
    help="Recipe TOML, or pass names separated by commas; the target's own by default.",
)
@click.option(
    "--state",
    multiple=True,
    metavar="INPUT=OUTPUT",
    help="The output is the next value of the input: recurrent state. May be repeated; none: no "
    "state.  [default: what the names tell]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="PASS.PARAMETER=VALUE",
    help="Set a parameter of a pass. May be repeated.",
)
@click.option("--max-drop", type=float, help="Promise: largest loss of metric or agreement.")
@scrutiny_options
@click.option("--max-size-mb", type=float, help="Promise: largest bundle, 1 MB = 1e6 bytes.")
@speed_options
@click.option("--lock", type=click.Path(path_type=pathlib.Path), help="Replay a lock file.")
@click.option(
    "--plan",
    type=click.Path(path_type=pathlib.Path),
    metavar="FILE",
    help="Prune what the build of this lock file or report.json pruned, whatever the weights are.",
)
@click.option(
    "--config",
    type=click.Path(path_type=pathlib.Path),
    help="Project file.  [default: edgec.toml, if there is no SOURCE]",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Threads of the latency measurement.",
)
@seed_option
@click.option(
    "--release",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Release counter in the bundle; a device refuses to go back.",
)
@click.option(
    "--search-minutes",
    type=click.FloatRange(0, 10_000),
    default=10.0,
    show_default=True,
    help="Time to look for a recipe, float layers and a pruning that keep the promises.",
)
@click.option(
    "--reference/--no-reference",
    default=True,
    show_default=True,
    help="Keep the float32 reference beside the bundle, for `edgec bench`.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Run the bundle on the target's devices (`edgec devices`).  [default: on those installed]",
)
@click.option(
    "--verify-seconds",
    type=click.FloatRange(0, 1_000_000),
    default=60.0,
    show_default=True,
    help="Time for a device to run samples; it runs the golden sample and one more in any case.",
)
@json_option
def build(source: str | None, as_json: bool, **options: Any) -> None:
    """Build SOURCE for one or more targets, check the bundles and write their reports.

    SOURCE is file.py:function or pkg.mod:function (returns (module, example_inputs) or
    edgec.Source), an .onnx file, a .pt2 exported program or a local Hugging Face directory.
    Without SOURCE, edgec.toml says what to build.
    """
    from edgec.project import Job, jobs_from_options
    from edgec.report_terminal import print_report
    from edgec.torchrun import other_processes

    reports = []
    with other_processes() as workers:
        if workers is not None and workers.rank:
            return  # it has taken its share of process 0's trainings
        jobs: tuple[Job, ...] = jobs_from_options(source, options)
        for job in jobs:
            with progress_bar(quiet=as_json) as progress:
                reports.append(job.run(progress, workers))
            if not as_json:
                print_report(reports[-1], console())
    if as_json:
        texts = [report.to_json() for report in reports]
        click.echo(texts[0] if len(texts) == 1 else f"[{','.join(texts)}]", nl=False)
    if not all(report.kept for report in reports):
        exit_with(BROKEN_PROMISE)


@main.command()
@click.argument("name", required=False)
@json_option
def targets(name: str | None, as_json: bool) -> None:
    """List the targets, or show the capabilities of one (NAME or a .toml file)."""
    from edgec.catalogue import describe_target
    from edgec.targets import load_target, target_names

    chosen = [load_target(name)] if name else [load_target(n) for n in target_names()]
    if as_json:
        tables = [describe_target(target) for target in chosen]
        click.echo(json.dumps(tables[0] if name else tables, indent=2, sort_keys=True))
    elif name:
        from edgec.catalogue_tables import target_table

        console().print(target_table(chosen[0]))
    else:
        from edgec.catalogue_tables import targets_table

        console().print(targets_table(chosen))


@main.command()
@click.argument("name", required=False)
@json_option
def passes(name: str | None, as_json: bool) -> None:
    """List the passes in the order of their stages, or show the parameters of one."""
    from edgec.catalogue import describe_passes
    from edgec.catalogue_tables import pass_table, passes_table

    found = describe_passes(name)
    if as_json:
        click.echo(json.dumps(found[0] if name else found, indent=2, sort_keys=True))
    else:
        console().print(pass_table(found[0]) if name else passes_table(found))


@main.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@json_option
def inspect(bundle: pathlib.Path, as_json: bool) -> None:
    """Show what is in a BUNDLE: signature, target, operators, size, results."""
    from edgec.inspect_bundle import inspect_bundle
    from edgec.report_terminal import print_facts

    facts = inspect_bundle(bundle)
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        print_facts(facts, console())


@main.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@click.option(
    "--against",
    multiple=True,
    metavar="MODEL",
    help="An .onnx file or another bundle; by default the reference beside BUNDLE.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Of every model that is timed.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=8.0,
    show_default=True,
    help="Time for all measurements together.",
)
@click.option("--data", metavar="DATA", help="Real inputs to time on; the golden sample otherwise.")
@speed_options
@click.option(
    "--on",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help="Say what it costs there instead: executed instructions on an emulated CPU of "
    "`edgec devices`, latency on native, ssh://user@host or adb:. May be repeated.",
)
@click.option(
    "--record",
    type=click.Path(path_type=pathlib.Path),
    metavar="FILE",
    help="With --on a real device: add its latencies, and the counts of a profile, to FILE.",
)
@click.option(
    "--estimate",
    type=click.Path(path_type=pathlib.Path),
    metavar="FILE",
    help="With --on a profile that counts: estimate the latency on the device recorded in FILE.",
)
@json_option
def bench(
    bundle: pathlib.Path,
    as_json: bool,
    min_speedup: float | None,
    max_latency_ms: float | None,
    devices: tuple[str, ...],
    record: pathlib.Path | None,
    estimate: pathlib.Path | None,
    **options: Any,
) -> None:
    """Time BUNDLE and its float32 reference side by side in the same runtime.

    With --on, say what they cost on other devices, one thread each.
    """
    if devices:
        from edgec.cli_devices import bench_on

        ctx = click.get_current_context()
        for name in ("threads", "seconds", "min_speedup", "max_latency_ms"):
            if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_', '-')} is for this machine, not --on")
        choice = {name: options[name] for name in ("against", "data")}
        bench_on(bundle, devices, record, as_json=as_json, estimate=estimate, **choice)
        return
    if record is not None or estimate is not None:
        raise click.UsageError("--record and --estimate need --on")
    from edgec.bench_bundle import bench_bundle
    from edgec.promise import Limits
    from edgec.report_terminal import print_bench

    limits = Limits(min_speedup=min_speedup, max_latency_ms=max_latency_ms)
    with progress_bar(quiet=as_json) as progress:
        result = bench_bundle(bundle, limits=limits, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result.facts(), indent=2, sort_keys=True))
    else:
        print_bench(result, console())
    if not result.kept:
        exit_with(BROKEN_PROMISE)


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine and its packages can do, and what is missing."""
    from edgec.doctor import examine
    from edgec.report_terminal import print_facts

    diagnosis = examine()
    if as_json:
        click.echo(json.dumps(diagnosis.facts, indent=2, sort_keys=True))
    else:
        print_facts(diagnosis.facts, console())
    for problem in diagnosis.problems:
        click.echo(f"edgec: {problem}", err=True)
    if diagnosis.problems:
        exit_with(1)


for command in (adapt, verify, devices, mobile, run):
    main.add_command(command)


if __name__ == "__main__":
    main()
