"""Pieces of HTML that the report's page is made of; every outside text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgec import report_format as words


@dataclass(frozen=True)
class Cell:
    """A cell of a table; content is HTML. kind: its class, ``lead`` names the row."""

    content: str
    kind: str = ""


def section(title: str, note: str, content: str, *, long: bool = False) -> str:
    """A titled part of the page; note is a line of HTML under the title."""
    kind = ' class="long"' if long else ""
    lead = f'<p class="quiet">{note}</p>' if note else ""
    return f"<section{kind}>\n<h2>{title}</h2>\n{lead}{content}\n</section>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, kind: str = "") -> str:
    """A table whose cells know their column's name, for narrow screens.

    kind: ``dense`` lets a row's short cells share a line there.
    """
    body = []
    rows = list(rows)
    for row in rows:
        cells = "".join(
            f'<td data-label="{column}"'
            + (f' class="{cell.kind}"' if cell.kind else "")
            + f">{cell.content}</td>"
            for column, cell in zip(columns, row, strict=True)
        )
        body.append(f"<tr>{cells}</tr>")
    kinds = [cell.kind if cell.kind == "right" else "" for cell in rows[0]]
    head = "".join(
        f'<th scope="col" class="{kind}">{column}</th>'
        if kind
        else f'<th scope="col">{column}</th>'
        for column, kind in zip(columns, kinds, strict=True)
    )
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"{opening}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def details(summary: str, content: str) -> str:
    """Content that opens with a click on its summary; both are HTML."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def rest(amount: int, noun: str) -> str:
    """A line for what a list leaves out; empty if it leaves out nothing."""
    return (
        f'<p class="quiet">{words.count(amount, noun)} more in report.json.</p>'
        if amount > 0
        else ""
    )


def bar(share: float, kind: str = "") -> str:
    """A horizontal bar; share: 0..1."""
    return f'<div class="bar {kind}" style="--share: {share:.1%}"></div>'


def text(given: str) -> str:
    """Outside text as HTML."""
    return html.escape(words.printable(given))


def code(given: str) -> str:
    """Outside text as a piece of code."""
    return f"<code>{text(given)}</code>"


def signs(text: str) -> str:
    """ASCII signs of our own figures as typographic ones, escaped."""
    text = text.replace("<=", "\u2264").replace(">=", "\u2265").replace("x ", "\u00d7 ")
    return html.escape(text)
