"""The command line: a command parses, calls one function and prints.

Heavy imports stand inside the commands, so that ``edgec --help`` costs no torch and no
onnx. Exit codes: 0 done, 1 failed, 2 usage, 3 a promise is broken.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

import edgec

if TYPE_CHECKING:
    from rich.console import Console

EXIT_BROKEN_PROMISE = 3


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


def _json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(function)


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
    help="Directory of .npz, one .npz or .npy, or file.py:function.",
)
@click.option("--evaluation", metavar="DATA", help="Data to judge the bundle on, with labels.")
@click.option(
    "--metric",
    metavar="M",
    help="top1, top5, spearman, pearson, cosine, mae, mse, or file.py:fn(outputs, labels).",
)
@click.option(
    "--recipe",
    metavar="FILE|PASSES",
    help="Recipe TOML, or pass names separated by commas; the target's own by default.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="PASS.PARAMETER=VALUE",
    help="Set a parameter of a pass. May be repeated.",
)
@click.option("--max-drop", type=float, help="Promise: largest loss of metric or agreement.")
@click.option("--max-size-mb", type=float, help="Promise: largest bundle, 1 MB = 1e6 bytes.")
@click.option("--min-speedup", type=float, help="Promise: least speed-up over float32.")
@click.option("--lock", type=click.Path(path_type=pathlib.Path), help="Replay a lock file.")
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
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of every random choice.",
)
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
    help="Time to look for a recipe and float layers that keep the promises.",
)
@click.option(
    "--reference/--no-reference",
    default=True,
    show_default=True,
    help="Keep the float32 reference beside the bundle, for `edgec bench`.",
)
@_json_option
def build(source: str | None, as_json: bool, **options: Any) -> None:
    """Build SOURCE for one or more targets, check the bundles and write their reports.

    SOURCE is file.py:function or pkg.mod:function (returns (module, example_inputs) or
    edgec.Source), an .onnx file, a .pt2 exported program or a local Hugging Face directory.
    Without SOURCE, edgec.toml says what to build.
    """
    from edgec.project import Job, jobs_from_options
    from edgec.report_terminal import print_report

    jobs: tuple[Job, ...] = jobs_from_options(source, options)
    reports = []
    for job in jobs:
        with _progress(quiet=as_json) as progress:
            reports.append(job.run(progress))
        if not as_json:
            print_report(reports[-1], _console())
    if as_json:
        texts = [report.to_json() for report in reports]
        click.echo(texts[0] if len(texts) == 1 else f"[{','.join(texts)}]", nl=False)
    if not all(report.kept for report in reports):
        _exit(EXIT_BROKEN_PROMISE)


@main.command()
@click.argument("name", required=False)
@_json_option
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

        _console().print(target_table(chosen[0]))
    else:
        from edgec.catalogue_tables import targets_table

        _console().print(targets_table(chosen))


@main.command()
@click.argument("name", required=False)
@_json_option
def passes(name: str | None, as_json: bool) -> None:
    """List the passes in the order of their stages, or show the parameters of one."""
    from edgec.catalogue import describe_passes
    from edgec.catalogue_tables import pass_table, passes_table

    found = describe_passes(name)
    if as_json:
        click.echo(json.dumps(found[0] if name else found, indent=2, sort_keys=True))
    else:
        _console().print(pass_table(found[0]) if name else passes_table(found))


@main.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@_json_option
def inspect(bundle: pathlib.Path, as_json: bool) -> None:
    """Show what is in a BUNDLE: signature, target, operators, size, results."""
    from edgec.inspect_bundle import inspect_bundle
    from edgec.report_terminal import print_facts

    facts = inspect_bundle(bundle)
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        print_facts(facts, _console())


@main.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@click.option("--against", metavar="SOURCE", help="Reference to compare with: .onnx or .edgec.")
@click.option("--evaluation", metavar="DATA", help="Data to compare on, as for build.")
@click.option("--metric", metavar="M", help="Task metric, as for build.")
@click.option("--max-drop", type=float, help="Promise: largest loss of metric or agreement.")
@click.option("--any-target", is_flag=True, help="Also run a bundle of another device class.")
@click.option(
    "--on",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help="Run it there instead of here: a profile of `edgec devices`, a profile's .toml, "
    "ssh://user@host or adb:. May be repeated; 'installed' means all that are.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="With --on: how many samples of the data to run, evenly spaced.",
)
@_json_option
def verify(
    bundle: pathlib.Path, as_json: bool, devices: tuple[str, ...], samples: int, **options: Any
) -> None:
    """Check every byte of BUNDLE, run its self-test, and compare it on data if given.

    With --on, the bundle runs on a device or on its emulation, and is judged there against the
    float32 reference and against this machine.
    """
    from edgec.report_terminal import print_facts
    from edgec.verify import verify_bundle

    if devices:
        _verify_on(bundle, as_json, devices, samples, options)
        return

    with _progress(quiet=as_json) as progress:
        verdict = verify_bundle(bundle, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(verdict.facts(), indent=2, sort_keys=True))
    else:
        print_facts(verdict.facts(), _console())
    if not verdict.passed:
        click.echo(f"edgec: {verdict.reason}", err=True)
        _exit(1)
    if not verdict.kept:
        _exit(EXIT_BROKEN_PROMISE)


def _verify_on(
    bundle: pathlib.Path,
    as_json: bool,
    devices: tuple[str, ...],
    samples: int,
    options: dict[str, Any],
) -> None:
    from edgec.devices.check import verify_on
    from edgec.devices.table import verdicts_table

    for name in ("metric", "max_drop"):
        if options.pop(name) is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} is judged here, not with --on")
    with _progress(quiet=as_json) as progress:
        verdicts = verify_on(bundle, devices, samples=samples, progress=progress, **options)
    if as_json:
        click.echo(json.dumps([v.facts() for v in verdicts], indent=2, sort_keys=True))
    else:
        _console().print(verdicts_table(verdicts))
    for verdict in verdicts:
        if verdict.reason:
            click.echo(f"edgec: {verdict.status}: {verdict.reason}", err=True)
    if not verdicts or any(verdict.status != "passed" for verdict in verdicts):
        _exit(1)


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
@click.option("--min-speedup", type=float, help="Promise: least speed-up over the reference.")
@_json_option
def bench(bundle: pathlib.Path, as_json: bool, min_speedup: float | None, **options: Any) -> None:
    """Time BUNDLE and its float32 reference side by side in the same runtime."""
    from edgec.bench_bundle import bench_bundle
    from edgec.report_terminal import print_bench

    with _progress(quiet=as_json) as progress:
        result = bench_bundle(bundle, min_speedup=min_speedup, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result.facts(), indent=2, sort_keys=True))
    else:
        print_bench(result, _console())
    if not result.kept:
        _exit(EXIT_BROKEN_PROMISE)


@main.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@click.option("--input", "data", metavar="DATA", help="Feeds, as for build; one run per sample.")
@click.option(
    "--image",
    type=click.Path(path_type=pathlib.Path),
    help="A picture, prepared as the bundle says (needs Pillow).",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=pathlib.Path),
    help="Write the outputs to this .npz file.",
)
@click.option("--threads", type=click.IntRange(0, 1024), help="Instead of the manifest's.")
@click.option("--any-target", is_flag=True, help="Also run a bundle of another device class.")
@_json_option
def run(bundle: pathlib.Path, as_json: bool, **options: Any) -> None:
    """Run BUNDLE on data or on a picture and print its outputs."""
    from edgec.report_terminal import print_facts
    from edgec.run_bundle import run_bundle

    facts = run_bundle(bundle, **options)
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        print_facts(facts, _console())


@main.group(invoke_without_command=True)
@_json_option
@click.pass_context
def devices(ctx: click.Context, as_json: bool) -> None:
    """List the devices that bundles can be verified on, and what each needs."""
    if ctx.invoked_subcommand is not None:
        return
    from edgec.devices.table import describe_devices, devices_table

    found = describe_devices()
    if as_json:
        click.echo(json.dumps(found, indent=2, sort_keys=True))
    else:
        _console().print(devices_table(found))


@devices.command(name="install")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def devices_install(names: tuple[str, ...]) -> None:
    """Fetch what devices need, through your own apt, pip and npm, into a cache.

    NAME is a device of `edgec devices`, or `all`. What was fetched works offline
    afterwards. EDGEC_DEVICES names another folder for the cache.
    """
    from edgec.devices.install import install, names_to_install
    from edgec_runtime.errors import EdgecError

    chosen, failed = names_to_install(names), []
    with _progress(quiet=False) as progress:
        for name in chosen:
            try:
                install(name, progress)
            except EdgecError as error:
                failed.append(error)
                click.echo(f"edgec: {' '.join(str(error).split())}", err=True)
            else:
                click.echo(f"{name} is installed")
    if failed:
        _exit(1)


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Say what this machine and its packages can do, and what is missing."""
    from edgec.doctor import examine
    from edgec.report_terminal import print_facts

    diagnosis = examine()
    if as_json:
        click.echo(json.dumps(diagnosis.facts, indent=2, sort_keys=True))
    else:
        print_facts(diagnosis.facts, _console())
    for problem in diagnosis.problems:
        click.echo(f"edgec: {problem}", err=True)
    if diagnosis.problems:
        _exit(1)


def _exit(code: int) -> None:
    click.get_current_context().exit(code)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for people; plain lines where stderr is no terminal."""
    if quiet and not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        seen: list[str] = []

        def line(what: str, done: int, total: int) -> None:
            if what not in seen[-1:]:
                seen.append(what)
                console.print(f"edgec: {what} …")

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=max(total, 1))
            bar.update(tasks[what], completed=done, total=max(total, 1))

        yield show


if __name__ == "__main__":
    main()
