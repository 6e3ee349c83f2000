"""The whole story of a build, read top to bottom.

source -> reference -> search for the recipe -> bundle -> judged against the reference -> report
"""

from __future__ import annotations

import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import edgec
from edgec import recipe as recipes
from edgec.build_report import report_of, results_of, with_latency
from edgec.cache import user_cache
from edgec.coverage import measure_coverage
from edgec.cut import cut
from edgec.data import labels_of
from edgec.devices.after_build import devices_to_verify_on, verify_built
from edgec.drift import judge_stream
from edgec.emit import check_model, emit, lay_out, lay_out_roles, make_manifest, save_reference
from edgec.export import Exported, check_parity, export
from edgec.golden import make_golden, restore_golden
from edgec.hunt import Found
from edgec.inputs import Inputs, open_inputs
from edgec.journal import Journal, journal_key
from edgec.judging import judge_bundle, judge_robustness, settle, time_all
from edgec.lock import Lock, check_lock, read_lock
from edgec.metrics import load_metric
from edgec.outputs import Places, file_digest, staging
from edgec.outputs import plan as places_of
from edgec.passes import Context, Pass, Recover
from edgec.passes.workers import Workers
from edgec.pipeline import layer_noise, run_passes
from edgec.promise import Limits, judge
from edgec.pruning_plan import check_plan, read_plan
from edgec.report import Report
from edgec.report_html import render_html
from edgec.rounds import in_rounds
from edgec.scrutiny import Scrutiny, check_asked
from edgec.search import search
from edgec.search_ratio import check_demand
from edgec.source import Data, Source, load_source
from edgec.state import check_carried, with_state
from edgec.targets import Target, load_target
from edgec.trial import Judge

_CHECKS = 2  # samples on which every pass is checked

Progress = Callable[[str, int, int], None]


def build(
    source: Any,
    *,
    target: str | pathlib.Path | Target,
    output: str | pathlib.Path,
    calibration: Data | None = None,
    evaluation: Data | None = None,
    metric: str | Callable[..., float] | None = None,
    state: Mapping[str, str] | None = None,
    recipe: str | pathlib.Path | Sequence[str] | None = None,
    settings: Sequence[str] = (),
    limits: Limits | None = None,
    scrutiny: Scrutiny | None = None,
    lock: str | pathlib.Path | None = None,
    plan: str | pathlib.Path | None = None,
    threads: int = 1,
    seed: int = 0,
    version: int = 1,
    search_minutes: float = 10.0,
    keep_reference: bool = True,
    verify: bool | None = None,
    verify_seconds: float = 60.0,
    workers: Workers | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Build one bundle for one target, judge it, and write bundle, lock and report.

    source: what ``load_source`` understands. output: the bundle's path if it ends in
    ``.edgec``, else a directory. calibration, evaluation, metric: as on the command line,
    in place of those of the source. state: as ``Source.state``, in its place. recipe: a TOML
    file, pass names, or None for the target's own. settings: ``PASS.PARAMETER=VALUE``. scrutiny:
    what to judge besides the mean, and to hold ``limits`` against. lock: decisions to replay,
    with their recipe, seed and version. plan: a lock file or report of an earlier build of the same
    architecture, or a plan alone: what prune-structured and prune-blocks are to cut, whatever
    the weights are.
    threads: of the latency measurement. version: release counter in the manifest.
    search_minutes: time after which no further recipe, choice of float layers or share of
    units is tried for the limits; the best so far is built. verify: run the bundle on the
    target's devices; None: on those that are installed. verify_seconds: per device; the golden
    sample and one more are run in any case, others only while it is likely to suffice.
    workers: the processes that trainings are shared with.

    Returns the report; ``report.kept`` is False if a promise is broken. Raises EdgecError,
    and leaves nothing behind, if the bundle cannot be built.
    """
    started = time.perf_counter()
    device = target if isinstance(target, Target) else load_target(target)
    given = _with_data(load_source(source), calibration, evaluation, metric, state)
    task_metric = load_metric(given.metric) if given.metric is not None else None
    locked = read_lock(pathlib.Path(lock)) if lock is not None else None
    if locked is not None:
        check_lock(locked, pathlib.Path(str(lock)), target=device.name)
        seed, version = locked.seed, locked.version
    # mistakes are told before the minutes of an export
    demanded = limits or Limits()
    given_plan = read_plan(pathlib.Path(plan)) if plan is not None else None
    recipes.check_settings(settings)
    named: tuple[Pass, ...] = ()  # none for the target's own recipes
    if recipe is not None:
        named = recipes.with_settings(recipes.load_recipe(recipe), settings)
    in_rounds(named)
    if given_plan is not None:
        check_plan(given_plan, named, pathlib.Path(str(plan)), lock)
    elif locked is None:
        check_demand(named, demanded, held_out=given.calibration is not None)
    asked = scrutiny or Scrutiny()
    check_asked(asked, demanded)
    places = places_of(pathlib.Path(output), given.name, device.name)
    to_verify_on, not_verified = devices_to_verify_on(device, verify)

    progress("export", 0, 1)
    exported = with_state(export(given, device), given.state)
    check_model(exported.model)
    inputs = open_inputs(given, exported, device, seed)
    check_carried(exported, inputs.checks[0])
    task_metric = task_metric or inputs.metric
    examined = settle(asked, exported.model, given, inputs, task_metric)
    parity = check_parity(exported, inputs.checks)
    exported = exported.alone()
    reference = lay_out(exported.model)
    reference_digest = reference.digest()
    progress("export", 1, 1)

    context = Context(
        target=device,
        reference=exported.model,
        calibration=inputs.calibration,
        validation=inputs.validation,
        calibration_labels=labels_of(inputs.calibration),
        validation_labels=labels_of(inputs.validation),
        cache=user_cache(),
        workers=workers,
        context_length=exported.language.generation.context_length if exported.language else None,
        seed=seed,
        progress=progress,
    )
    checks = inputs.checks[:_CHECKS]
    announce = functools.partial(_announce, progress)
    if locked is not None:
        passes = (
            recipes.load_recipe(recipe)
            if recipe is not None
            else recipes.from_toml(locked.recipe, f"lock file {lock}")
        )
        passes = recipes.with_settings(passes, settings)
        check_lock(
            locked,
            pathlib.Path(str(lock)),
            reference=reference_digest,
            recipe=recipes.to_toml(passes),
            steps=len(in_rounds(passes)),
        )
        found = Found(passes, run_passes(passes, context, checks, locked.steps, announce), ())
    else:
        candidates = _candidates(recipe, settings, exported, inputs, device)
        held_against = Judge(
            reference=exported.model,
            target=device,
            inputs=inputs,
            limits=demanded,
            metric=task_metric,
            declared=given.labels is not None,
            threads=threads,
        )
        journal = Journal(
            places.bundle.with_name(f".{places.bundle.stem}.search.json"),
            _journal_key(reference_digest, candidates, held_against, given_plan, seed),
        )
        with journal:
            found = search(
                candidates,
                context,
                checks,
                held_against,
                journal=journal,
                seconds=60.0 * search_minutes,
                announce=announce,
                plan=given_plan,
            )
        if recipe is None and inputs.calibration is None:
            missed = recipes.missed_without_data(device, exported.model)
            found = replace(found, findings=found.findings + ((missed,) if missed else ()))
    steps, recipe_text = found.steps, recipes.to_toml(found.recipe)
    final = steps[-1].model if steps else exported.model
    check_model(final)
    layers = layer_noise(exported.model, steps, inputs.checks)

    with staging(places) as folder:
        file = folder / places.bundle.name
        parts = cut(final)
        layout = lay_out_roles(parts)
        golden = (
            restore_golden(locked.golden, f"lock file {lock}")
            if locked is not None
            else make_golden(final, device, inputs.checks[0], layout.size_bytes, seed)
        )
        manifest = make_manifest(
            parts,
            given,
            device,
            language=exported.language,
            state=exported.state,
            version=version,
            provenance={
                "reference": reference_digest,
                "recipe": recipes.to_toml(_without_folders(found.recipe)),
                "seed": seed,
            },
        )
        results = locked.results if locked is not None else {}
        manifest = replace(manifest, golden=(golden.manifest,), results=results)
        files = {**golden.files, **(exported.language.files if exported.language else {})}
        emit(layout, manifest, file, files)
        judgement = judge_bundle(
            exported.model, file, given, inputs, task_metric, examined.slices, progress
        )
        drift = judge_stream(exported, file, inputs)
        robustness = judge_robustness(
            examined.robustness, exported.model, steps, file, seed, progress
        )
        if locked is None:
            results = results_of(judgement, inputs, drift)
            emit(layout, replace(manifest, results=results), file, files)
        progress("latency", 0, 1)
        timings, machine = time_all(exported.model, steps, file, device, threads, inputs.checks[0])
        progress("latency", 1, 1)

        report = report_of(
            given, device, found, layers, judgement, inputs, parity, exported, robustness, drift
        )
        report = with_latency(report, timings, machine)
        if not_verified:
            report = replace(report, findings=(*report.findings, not_verified))
        coverage = measure_coverage(final, inputs.checks[0], device.session, threads)
        size_bytes = file.stat().st_size
        report = replace(
            report,
            size_bytes=size_bytes,
            reference=replace(report.reference, size_bytes=reference.size_bytes),
            bundle=replace(report.bundle, size_bytes=size_bytes),
            coverage=coverage,
            bundle_path=str(places.bundle),
            bundle_sha256=file_digest(file),
            promises=judge(
                demanded,
                size_bytes=size_bytes,
                metric=judgement.metric,
                agreement=judgement.agreement,
                speedup=report.speedup,
                latency_ms=report.bundle.latency_ms,
                measured_on=machine,
                real_data=inputs.real,
                slices=judgement.slices,
                robustness=robustness,
            ),
            build_seconds=round(time.perf_counter() - started, 2),
        )
        lock_file = Lock(
            reference=reference_digest,
            target=device.name,
            recipe=recipe_text,
            seed=seed,
            version=version,
            steps=tuple(step.result.decisions for step in steps),
            golden=golden.to_plain(),
            results=results,
        )
        if to_verify_on:
            ran, kept = verify_built(
                file, exported.model, to_verify_on, inputs, verify_seconds, progress
            )
            report = replace(report, devices=ran, promises=report.promises + kept)
        _write(folder, places, lock_file, report)
        if keep_reference:
            save_reference(exported.model, folder / places.reference.name)
    return report


def _announce(progress: Progress, name: str) -> None:
    progress(name, 0, 1)


def _candidates(
    recipe: str | pathlib.Path | Sequence[str] | None,
    settings: Sequence[str],
    exported: Exported,
    inputs: Inputs,
    target: Target,
) -> list[tuple[Pass, ...]]:
    """The recipes to try, in order; the one that was asked for is the only one."""
    if recipe is not None:
        return [recipes.with_settings(recipes.load_recipe(recipe), settings)]
    calibrated = inputs.calibration is not None
    first, *others = recipes.default_recipes(target, exported.model, calibrated)
    made = [recipes.with_settings(first, settings)]
    for other in others:
        names = {pass_.name for pass_ in other}
        fitting = [text for text in settings if text.partition(".")[0] in names]
        made.append(recipes.with_settings(other, fitting))
    return made


def _without_folders(recipe: Sequence[Pass]) -> tuple[Pass, ...]:
    """The recipe as it ships: files that passes read by their name alone."""
    return tuple(
        replace(p, teacher=pathlib.PurePath(p.teacher).name)
        if isinstance(p, Recover) and p.teacher
        else p
        for p in recipe
    )


def _journal_key(
    reference_digest: str,
    candidates: Sequence[tuple[Pass, ...]],
    asked: Judge,
    pruning: Mapping[str, Any] | None,
    seed: int,
) -> str:
    """What the outcomes of a search depend on."""
    calibration = asked.inputs.calibration
    data = sorted(calibration.kept_digests()) if calibration is not None else ()
    texts = [recipes.to_toml(candidate) for candidate in candidates]
    files = {p.teacher for c in candidates for p in c if isinstance(p, Recover) and p.teacher}
    texts += [file_digest(pathlib.Path(file)) for file in sorted(files) if os.path.isfile(file)]
    metric = None if asked.metric is None else asked.metric.name
    demands = (asked.target, asked.limits, metric, asked.declared, asked.threads, pruning)
    return journal_key(edgec.__version__, reference_digest, texts, *demands, data, seed)


def _with_data(
    source: Source,
    calibration: Data | None,
    evaluation: Data | None,
    metric: str | Callable[..., float] | None,
    state: Mapping[str, str] | None,
) -> Source:
    return replace(
        source,
        calibration=source.calibration if calibration is None else calibration,
        evaluation=source.evaluation if evaluation is None else evaluation,
        metric=source.metric if metric is None else metric,
        state=source.state if state is None else state,
    )


def _write(folder: pathlib.Path, places: Places, lock: Lock, report: Report) -> None:
    (folder / places.lock.name).write_text(lock.to_json(), encoding="utf-8")
    (folder / places.json.name).write_text(report.to_json(), encoding="utf-8")
    (folder / places.html.name).write_text(render_html(report), encoding="utf-8")
