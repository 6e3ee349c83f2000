"""Fills the generated tables of README.md and docs/ from the code: python docs/generate.py

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; what is between is
replaced. tests/test_readme.py fails while a page and the code differ.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write every page with its tables."""
    for page in pages():
        page.write_text(filled(page), encoding="utf-8")


def pages() -> list[pathlib.Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: pathlib.Path) -> str:
    """The text of a page with its generated tables made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return _BLOCK.sub(replace, page.read_text(encoding="utf-8"))


def passes() -> str:
    """Every pass in the order of its stage."""
    from edgec.catalogue import describe_passes

    return _table(
        ("pass", "stage", "effect", "what it does"),
        [
            (
                f"`{p['name']}`",
                p["stage"],
                "lossless" if p["lossless"] else "lossy",
                p["summary"],
            )
            for p in describe_passes()
        ],
    )


def parameters() -> str:
    """Every parameter of every pass, with its type and default."""
    from edgec.catalogue import describe_passes

    return _table(
        ("parameter", "type", "default"),
        [
            (f"`{p['name']}.{q['name']}`", q["type"].replace("|", "\\|"), _value(q["default"]))
            for p in describe_passes()
            for q in p["parameters"]
        ],
    )


def targets() -> str:
    """The shipped targets."""
    from edgec.targets import load_target, target_names

    return _table(
        ("target", "devices", "convolutional models", "transformers"),
        [
            (
                f"`{t.name}`",
                t.description,
                _lossy(t.recipe.convolutional),
                _lossy(t.recipe.transformer),
            )
            for t in map(load_target, target_names())
        ],
    )


def devices() -> str:
    """The shipped device profiles."""
    from edgec.targets import load_profile, profile_names

    return _table(
        ("device", "isa", "run by", "what it is"),
        [
            (f"`{p.name}`", p.arch, p.runner, p.description)
            for p in map(load_profile, profile_names())
        ],
    )


def capabilities() -> str:
    """Every key of a target file, with its meaning."""
    from edgec.catalogue_tables import capabilities as capabilities_of
    from edgec.targets import load_target

    rows = capabilities_of(load_target("arm64"))
    return _table(("key", "in arm64.toml", "meaning"), [(f"`{k}`", v, c) for k, v, c in rows])


def twin() -> str:
    """The operators of the differentiable twin, by family."""
    from edgec.passes.torch_ops import FAMILIES

    return _table(
        ("family", "operators"),
        [(family, ", ".join(sorted(names))) for family, names in FAMILIES.items()],
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "passes": passes,
    "parameters": parameters,
    "targets": targets,
    "capabilities": capabilities,
    "devices": devices,
    "twin": twin,
}


def _lossy(names: tuple[str, ...]) -> str:
    from edgec.catalogue import describe_passes

    lossy = {p["name"] for p in describe_passes() if not p["lossless"]}
    return ", ".join(f"`{name}`" for name in names if name in lossy) or "float32"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value!r}`" if value in ("", []) else str(value)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
