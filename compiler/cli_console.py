"""What the commands share: tables for people, JSON for scripts, a progress bar, exit codes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

BROKEN_PROMISE = 3  # exit code


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the flag --json, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(function)


def seed_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option --seed."""
    return click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        show_default=True,
        help="Of every random choice.",
    )(function)


def speed_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the promises of speed."""
    function = click.option(
        "--max-latency-ms",
        type=float,
        help="Promise: largest median latency of the bundle, on a machine of the target's kind.",
    )(function)
    return click.option(
        "--min-speedup", type=float, help="Promise: least speed-up over the float32 reference."
    )(function)


def scrutiny_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of what is judged besides the mean, and their promises."""
    options = (
        click.option(
            "--slice",
            metavar="COLUMN",
            help="Judge each value of this label column of the evaluation data, too.",
        ),
        click.option(
            "--slice-min-samples",
            type=click.IntRange(1),
            metavar="N",
            help="Samples from which a slice is judged alone.  [default: 30]",
        ),
        click.option(
            "--max-slice-drop", type=float, help="Promise: largest loss in the worst slice."
        ),
        click.option(
            "--robustness-epsilon",
            type=float,
            metavar="SHARE",
            help="Judge under attacks that change values by this share of their range, and under "
            "corruptions.",
        ),
        click.option(
            "--robustness-samples",
            type=click.IntRange(2),
            metavar="N",
            help="Samples that are disturbed, evenly spaced.  [default: 500]",
        ),
        click.option(
            "--max-robustness-drop",
            type=float,
            help="Promise: largest loss under an attack or a corruption.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def exit_with(code: int) -> None:
    """End the command with this exit code."""
    click.get_current_context().exit(code)


def console() -> Console:
    """Standard output, for people."""
    from rich.console import Console

    return Console(highlight=False)


@contextlib.contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for people; plain lines where stderr is no terminal."""
    if quiet and not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True, highlight=False)
    if not errors.is_terminal:
        seen: list[str] = []

        def line(what: str, done: int, total: int) -> None:
            if what not in seen[-1:]:
                seen.append(what)
                errors.print(f"edgec: {what} …")

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=max(total, 1))
            bar.update(tasks[what], completed=done, total=max(total, 1))

        yield show
