"""What to build: the command line's options, or ``edgec.toml`` of the user's repository.

    model = "model.py:build"
    metric = "top1"
    targets = ["arm64", "x86-64"]
    [data]
    calibration = "data/calibration"
    evaluation = "data/evaluation.npz"
    [state]
    h0 = "hn"
    [promises]
    max_drop = 0.01
    [judge]
    slice = "group"

Paths are relative to the file. Options of the command line take precedence.
"""

from __future__ import annotations

import pathlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import click

from edgec_runtime.errors import EdgecError, suggestion

if TYPE_CHECKING:
    from edgec.passes.workers import Workers
    from edgec.promise import Limits
    from edgec.report import Report
    from edgec.scrutiny import Scrutiny

PROJECT_FILE = "edgec.toml"
_KEYS = (
    "model",
    "metric",
    "targets",
    "output",
    "recipe",
    "data",
    "state",
    "promises",
    "judge",
)
_DATA_KEYS = ("calibration", "evaluation")


@dataclass(frozen=True)
class Job:
    """One build: a source for one target."""

    source: str
    target: str
    output: pathlib.Path
    limits: Limits
    scrutiny: Scrutiny
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None
    recipe: str | None = None
    state: Mapping[str, str] | None = None
    settings: tuple[str, ...] = ()
    lock: pathlib.Path | None = None
    plan: pathlib.Path | None = None
    threads: int = 1
    seed: int = 0
    version: int = 1
    search_minutes: float = 10.0
    keep_reference: bool = True
    verify: bool | None = None
    verify_seconds: float = 60.0

    def run(
        self, progress: Callable[[str, int, int], None], workers: Workers | None = None
    ) -> Report:
        """Build it. workers: the processes that trainings are shared with."""
        from edgec.builder import build

        return build(
            self.source,
            target=self.target,
            output=self.output,
            calibration=self.calibration,
            evaluation=self.evaluation,
            metric=self.metric,
            state=self.state,
            recipe=self.recipe,
            settings=self.settings,
            limits=self.limits,
            scrutiny=self.scrutiny,
            lock=self.lock,
            plan=self.plan,
            threads=self.threads,
            seed=self.seed,
            version=self.version,
            search_minutes=self.search_minutes,
            keep_reference=self.keep_reference,
            verify=self.verify,
            verify_seconds=self.verify_seconds,
            workers=workers,
            progress=progress,
        )


@dataclass(frozen=True)
class Project:
    """The content of an ``edgec.toml``; None where a key is absent."""

    model: str | None = None
    metric: str | None = None
    targets: tuple[str, ...] = ()
    output: str | None = None
    recipe: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    state: Mapping[str, str] | None = None
    promises: Mapping[str, Any] | None = None
    judge: Mapping[str, Any] | None = None


def jobs_from_options(source: str | None, options: Mapping[str, Any]) -> tuple[Job, ...]:
    """The builds that a command line asks for, one per target.

    Raises click.UsageError if there is nothing to build, EdgecError for a wrong project file.
    """
    from edgec.promise import Limits, limits_from
    from edgec.scrutiny import scrutiny_from, with_options
    from edgec.state import parse_state

    project = Project()
    file = options["config"]
    if file is None and source is None:
        file = pathlib.Path(PROJECT_FILE)
        if not file.is_file():
            raise click.UsageError(f"give a SOURCE to build, or write {PROJECT_FILE} here")
    if file is not None:
        project = read_project(file)
    model = source or project.model
    targets = options["targets"] or project.targets
    if model is None:
        raise click.UsageError("give a SOURCE to build, or a model in the project file")
    if not targets:
        raise click.UsageError("give a --target; `edgec targets` lists them")
    output = options["output"] or pathlib.Path(project.output or "build")
    if len(targets) > 1 and output.suffix == ".edgec":
        raise click.UsageError(f"-o {output} is one bundle, but there are {len(targets)} targets")
    if len(targets) > 1 and options["lock"] is not None:
        raise click.UsageError("--lock belongs to one target; build the targets one by one")
    stated = {field.name: options[field.name] for field in fields(Limits)}
    limits = limits_from(project.promises or {}, str(file)) if project.promises else Limits()
    limits = replace(limits, **{k: v for k, v in stated.items() if v is not None})
    scrutiny = scrutiny_from(project.judge or {}, f"{file} [judge]")
    scrutiny = with_options(scrutiny, options)
    state = parse_state(options["state"])
    return tuple(
        Job(
            source=model,
            target=target,
            output=output if len(targets) == 1 else output / pathlib.Path(target).stem,
            limits=limits,
            scrutiny=scrutiny,
            calibration=options["calibration"] or project.calibration,
            evaluation=options["evaluation"] or project.evaluation,
            metric=options["metric"] or project.metric,
            state=project.state if state is None else state,
            recipe=options["recipe"] or project.recipe,
            settings=tuple(options["settings"]),
            lock=options["lock"],
            plan=options["plan"],
            threads=options["threads"],
            seed=options["seed"],
            version=options["release"],
            search_minutes=options["search_minutes"],
            keep_reference=options["reference"],
            verify=options["verify"],
            verify_seconds=options["verify_seconds"],
        )
        for target in targets
    )


def read_project(path: pathlib.Path) -> Project:
    """The project file, checked key by key. Raises EdgecError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgecError(f"project file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgecError(f"project file {path}: not valid TOML: {error}") from error
    _known(table, _KEYS, f"project file {path}")
    data = _table(table, "data", path)
    _known(data, _DATA_KEYS, f"project file {path} [data]")
    targets = table.get("targets", [])
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise EdgecError(f"project file {path}: targets must be a list of names")
    folder = path.parent
    return Project(
        model=_named(folder, _text(table, "model", path)),
        metric=_named(folder, _text(table, "metric", path)),
        targets=tuple(str(folder / t) if t.endswith(".toml") else t for t in targets),
        output=_path(folder, _text(table, "output", path)),
        recipe=_named(folder, _text(table, "recipe", path)),
        calibration=_path(folder, _text(data, "calibration", path)),
        evaluation=_path(folder, _text(data, "evaluation", path)),
        state=_state(table, path),
        promises=_table(table, "promises", path),
        judge=_table(table, "judge", path),
    )


def _known(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise EdgecError(
                f"{where}: unknown key '{key}'{suggestion(key, keys)}; the keys are "
                f"{', '.join(keys)}"
            )


def _table(table: Mapping[str, Any], key: str, path: pathlib.Path) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise EdgecError(f"project file {path}: [{key}] must be a table")
    return value


def _state(table: Mapping[str, Any], path: pathlib.Path) -> Mapping[str, str] | None:
    """Input -> output; None where there is no such table, empty for a model without state."""
    if "state" not in table:
        return None
    state = _table(table, "state", path)
    return {key: _text(state, key, path) or "" for key in state}


def _text(table: Mapping[str, Any], key: str, path: pathlib.Path) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise EdgecError(f"project file {path}: {key} is {value!r}, expected text")
    return value


def _named(folder: pathlib.Path, text: str | None) -> str | None:
    """``text`` relative to the folder if it is a path, as it is if it is a name."""
    if text is None:
        return None
    is_path = ".py:" in text or "/" in text or text.endswith((".onnx", ".pt2", ".toml"))
    return str(folder / text) if is_path or (folder / text / "config.json").is_file() else text


def _path(folder: pathlib.Path, text: str | None) -> str | None:
    """A path relative to the folder; a function of a module stays as it is."""
    if text is None or (":" in text and ".py:" not in text):
        return text
    return str(folder / text)
