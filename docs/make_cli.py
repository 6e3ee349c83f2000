"""Writes docs/cli.md from the commands themselves: ``python docs/make_cli.py``.

tests/compiler/test_cli.py fails if the page is not what this makes.
"""

from __future__ import annotations

import inspect
import pathlib

import click

from edgec.cli import main

PAGE = pathlib.Path(__file__).with_name("cli.md")
INTRODUCTION = """# The command line

Made from the commands by `python docs/make_cli.py`; do not edit.

Results go to stdout, progress and errors to stderr, an error as one line. With `--json` a
command prints JSON for scripts. Exit codes: 0 done, 1 failed, 2 usage, 3 a promise is
broken (the report is written all the same).
"""


def page() -> str:
    """The whole page as Markdown."""
    root = click.Context(main, info_name="edgec", **main.context_settings)
    parts = [INTRODUCTION, _options(main, root)]
    for name, command in main.commands.items():
        context = click.Context(command, info_name=name, parent=root)
        usage = " ".join(command.collect_usage_pieces(context))
        text = inspect.cleandoc(command.help or "")
        parts.append(f"## edgec {name}\n\n    edgec {name} {usage}\n\n{text}\n")
        parts.append(_options(command, context))
    return "\n".join(parts)


def _options(command: click.Command, context: click.Context) -> str:
    lines = ["| option | what it does |", "|---|---|"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            option, text = (part.replace("|", "\\|") for part in record)
            lines.append(f"| `{option}` | {' '.join(text.split())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
