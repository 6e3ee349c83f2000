"""README.md and docs/ tell the truth: snippets run, links lead somewhere, tables are current.

A fenced block after ``<!-- file: NAME -->`` is written to that file, one after ``<!-- run -->``
is executed: sh and python as they are, yaml step by step. ``<!-- run, exit 3 -->`` states
another exit code than 0. The pages of docs/ go on in the folder that README.md leaves.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import typing

import pytest

from edgec import cli, report

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"<!-- (?P<what>file|run)(?:: (?P<name>\S+))?(?:, exit (?P<code>\d+))? -->\n"
    r"```(?P<language>\w+)\n(?P<text>.*?)```",
    re.DOTALL,
)
MARKER = re.compile(r"<!-- (?:file|run)\b")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_snippet_runs_in_the_order_of_the_pages(tmp_path: pathlib.Path) -> None:
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if block["what"] == "file":
                (tmp_path / block["name"]).write_text(block["text"], encoding="utf-8")
            else:
                run(block, tmp_path, f"{page.name}:\n{block['text']}")
    app = execute(["python", "app.py"], tmp_path)
    assert app.stdout == "upright\n"


def run(block: re.Match[str], folder: pathlib.Path, where: str) -> None:
    text = block["text"]
    if block["language"] == "yaml":
        steps = re.findall(r"^( *)run: \|\n((?:\1 +.*\n)+)", text, re.MULTILINE)
        text = "".join(textwrap.dedent(lines) for _, lines in steps)
        assert text, where
    command = ["python", "-c", text]
    if block["language"] != "python":
        command = ["bash", "-euo", "pipefail", "-c", text]
    done = execute(command, folder)
    assert done.returncode == int(block["code"] or 0), f"{where}\n{done.stdout}\n{done.stderr}"


def execute(command: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run with this environment's programs first on the path, in ``folder``."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_marker_stands_before_a_block(page: pathlib.Path) -> None:
    text = re.sub(r"`<!--.*?-->`", "", page.read_text(encoding="utf-8"))
    assert len(MARKER.findall(text)) == len(BLOCK.findall(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_to_a_file(page: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    inside = [link for link in links if "://" not in link]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_those_of_the_code(page: pathlib.Path) -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert page.read_text(encoding="utf-8") == generate.filled(page), "run: make docs"


@pytest.mark.parametrize("command", sorted(cli.main.commands))
def test_every_command_is_explained_on_a_page_of_a_task(command: str) -> None:
    pages = [page for page in PAGES if page.name != "cli.md"]
    assert any(f"edgec {command}" in page.read_text(encoding="utf-8") for page in pages)


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in PAGES if p.parent.name == "docs" and f"docs/{p.name}" not in readme]
    assert missing == []


def test_every_field_of_the_report_is_explained() -> None:
    page = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    missing = [field for field in report_fields(report.Report, "") if f"`{field}`" not in page]
    assert missing == []


def report_fields(cls: type, prefix: str) -> typing.Iterator[str]:
    """Dotted names of report.json: ``size_bytes``, ``steps[].name``."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        many = "[]" if typing.get_origin(hint) is tuple else ""
        if inner:
            for one in inner:
                yield from report_fields(one, f"{prefix}{field.name}{many}.")
        else:
            yield f"{prefix}{field.name}"
