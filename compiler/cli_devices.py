"""Commands that run bundles elsewhere: ``edgec verify`` and ``edgec devices``."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import click

from edgec.cli_console import (
    BROKEN_PROMISE,
    console,
    exit_with,
    json_option,
    progress_bar,
    scrutiny_options,
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@click.option("--against", metavar="SOURCE", help="Reference to compare with: .onnx or .edgec.")
@click.option("--evaluation", metavar="DATA", help="Data to compare on, as for build.")
@click.option("--metric", metavar="M", help="Task metric, as for build.")
@click.option("--max-drop", type=float, help="Promise: largest loss of metric or agreement.")
@scrutiny_options
@click.option("--any-target", is_flag=True, help="Also run a bundle of another device class.")
@click.option(
    "--on",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help="Run it there instead of here: a profile of `edgec devices`, a profile's .toml, native "
    "(this machine as a device), ssh://user@host or adb:. May be repeated; 'installed' means every "
    "installed one that the bundle fits.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="With --on: how many samples of the data to run, evenly spaced.",
)
@json_option
def verify(
    bundle: pathlib.Path, as_json: bool, devices: tuple[str, ...], samples: int, **options: Any
) -> None:
    """Check every byte of BUNDLE, run its self-test, and compare it on data if given.

    With --on, the bundle runs on a device or on its emulation, and is judged there against the
    float32 reference and against this machine.
    """
    from edgec.report_terminal import print_facts
    from edgec.scrutiny import SETTINGS, Scrutiny, with_options
    from edgec.verify import verify_bundle

    if devices:
        _verify_on(bundle, as_json, devices, samples, options)
        return

    scrutiny = with_options(Scrutiny(), options)
    given = {name: value for name, value in options.items() if name not in SETTINGS}
    with progress_bar(quiet=as_json) as progress:
        verdict = verify_bundle(bundle, scrutiny=scrutiny, progress=progress, **given)
    if as_json:
        click.echo(json.dumps(verdict.facts(), indent=2, sort_keys=True))
    else:
        print_facts(verdict.facts(), console())
    if not verdict.passed:
        click.echo(f"edgec: {verdict.reason}", err=True)
        exit_with(1)
    if not verdict.kept:
        exit_with(BROKEN_PROMISE)


def _verify_on(
    bundle: pathlib.Path,
    as_json: bool,
    devices: tuple[str, ...],
    samples: int,
    options: dict[str, Any],
) -> None:
    from edgec.devices.check import fits, open_samples, verify_on
    from edgec.devices.install import installed_names
    from edgec.devices.table import verdicts_table
    from edgec.errors import DeviceMissingError
    from edgec.scrutiny import SETTINGS
    from edgec_runtime.bundle import read_bundle

    drops = ("max_drop", "max_slice_drop", "max_robustness_drop")
    for name in ("metric", *drops, *SETTINGS):
        if options.pop(name) is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} is judged here, not with --on")
    if "installed" in devices:
        fitting = [name for name in installed_names() if fits(read_bundle(bundle), name)]
        named = [name for name in devices if name != "installed"]
        devices = tuple(dict.fromkeys([*fitting, *named]))
    if not devices:
        raise DeviceMissingError(
            f"bundle {bundle}: it fits none of the installed devices; `edgec devices` lists what "
            "can be installed"
        )
    data = open_samples(bundle, options.pop("evaluation"), samples)
    with progress_bar(quiet=as_json) as progress:
        verdicts = verify_on(bundle, devices, data, progress=progress, **options)
    if as_json:
        click.echo(json.dumps([v.facts() for v in verdicts], indent=2, sort_keys=True))
    else:
        console().print(verdicts_table(verdicts))
    for verdict in verdicts:
        if verdict.reason:
            click.echo(f"edgec: {verdict.status}: {verdict.reason}", err=True)
    if not verdicts or any(v.status not in ("passed", "checked") for v in verdicts):
        exit_with(1)


def bench_on(
    bundle: pathlib.Path,
    devices: tuple[str, ...],
    record: pathlib.Path | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Print what a bundle costs on devices. record: the file that it is added to."""
    from edgec.devices.cost import cost_on, records_of
    from edgec.devices.record import add_records, read_records
    from edgec.devices.table import print_costs

    if record is not None and record.exists():
        read_records(record)  # damage is told before the minutes of a run
    with progress_bar(quiet=as_json) as progress:
        costs = cost_on(bundle, devices, progress=progress, **options)
    if record is not None:
        add_records(record, records_of(costs))
    if as_json:
        click.echo(json.dumps([cost.facts() for cost in costs], indent=2, sort_keys=True))
    else:
        print_costs(costs, console())


@click.group(invoke_without_command=True)
@json_option
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
        console().print(devices_table(found))


@devices.command(name="install")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def devices_install(names: tuple[str, ...]) -> None:
    """Fetch what devices need, through your own apt, pip and npm, into a cache.

    NAME is a device of `edgec devices`, or `all`. What was fetched works offline
    afterwards. EDGEC_DEVICES names another folder for the cache.
    """
    from edgec.devices.install import install, missing, names_to_install
    from edgec.errors import DeviceMissingError
    from edgec.targets import load_profile
    from edgec_runtime.errors import EdgecError

    chosen, failed = names_to_install(names), []
    with progress_bar(quiet=False) as progress:
        for name in chosen:
            try:
                install(name, progress)
                if reason := missing(load_profile(name)):  # a program that edgec does not fetch
                    raise DeviceMissingError(f"device {name}: {reason}")
            except EdgecError as error:
                failed.append(error)
                click.echo(f"edgec: {' '.join(str(error).split())}", err=True)
            else:
                click.echo(f"{name} is installed")
    if failed:
        exit_with(1)


@click.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@click.option(
    "--library",
    "libraries",
    multiple=True,
    type=click.Path(path_type=pathlib.Path),
    help="Native library of the app, to be checked for pages of 16 KiB. May be repeated.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=pathlib.Path, file_okay=False),
    help="Folder for the .ort file and the operators of a reduced build.",
)
@json_option
def mobile(
    bundle: pathlib.Path,
    as_json: bool,
    libraries: tuple[pathlib.Path, ...],
    output: pathlib.Path | None,
) -> None:
    """Check BUNDLE for phones: ONNX Runtime's own format, accelerators, native libraries.

    The graph is converted as a reduced build of ONNX Runtime needs it, and must give the same
    outputs.
    """
    from edgec.devices.android import check_mobile
    from edgec.report_terminal import print_facts

    found = check_mobile(bundle, libraries, output)
    if as_json:
        click.echo(json.dumps(found.facts(), indent=2, sort_keys=True))
    else:
        print_facts(found.facts(), console())
    small = [lib for lib in found.libraries if not lib.loads_with_16k_pages]
    for lib in small:
        click.echo(
            f"edgec: library {lib.path}: its segments are aligned to {lib.align_bytes} bytes, "
            "phones with pages of 16 KiB do not load it; link it with "
            "-Wl,-z,max-page-size=16384",
            err=True,
        )
    if small:
        exit_with(1)
