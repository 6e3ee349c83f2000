"""A model and the user's labels -> another model, or an adapter for a bundle: ``edgec adapt``.

From a source comes an .onnx file, the source of the next build. From a bundle with slots comes
an adapter, trained on the float32 reference beside the bundle and judged in the bundle itself.
Both come with the accuracy on new and on old samples, before and after.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

import edgec_runtime
from edgec.adaptation_data import Judged, Lessons, Run
from edgec.emit import check_model, save_reference
from edgec.errors import OutputError, PassError, SourceError
from edgec.export import export
from edgec.passes import Context, Progress
from edgec.passes.adapt import Adapt, Adapted, check_used
from edgec.passes.adapter_slots import base_digest, trainable_form
from edgec.passes.continual import write_memory
from edgec.passes.execution import open_session, run_feeds, weights_size_bytes
from edgec.passes.head import find_head
from edgec.passes.lora import branches
from edgec.recipe import with_parameters
from edgec.runners import reference_beside
from edgec.source import Data, load_source
from edgec.targets import Target, load_target
from edgec_runtime.adapters import Slot, slot_digest, slot_names, write_adapter
from edgec_runtime.bundle import WEIGHTS

Array = np.ndarray[Any, Any]

_ADAPTER = ".onnx_adapter"
_SHARE_OF_BUNDLE = "bytes of the adapter file over those of the bundle's graph and weights"
_SHARE_OF_MODEL = "bytes of the weights over those of the weights before"


@dataclass(frozen=True)
class Adaptation:
    """What an adaptation wrote and what it is worth.

    new, old: accuracy on samples of this round and of earlier ones; old is None if there are
    none. held_out: cross-entropy before and after, in nats.
    size_bytes, base_bytes: of an adapter, its file and the graph and weights of the bundle
    that it was made for; of a model, its weights and those that it had before.
    """

    written: pathlib.Path
    size_bytes: int
    base_bytes: int
    method: str
    step: int
    held_out: tuple[float, float]
    new: Judged
    old: Judged | None
    memory: pathlib.Path | None
    findings: tuple[str, ...]

    @property
    def share_of_base(self) -> float:
        """``size_bytes`` over ``base_bytes``: what it needs beside, or instead of, the base."""
        return self.size_bytes / self.base_bytes

    def facts(self) -> dict[str, Any]:
        """JSON data, for people and scripts."""
        facts: dict[str, Any] = {
            "written": str(self.written),
            "method": self.method,
            "size_bytes": self.size_bytes,
            "share_of_base": round(self.share_of_base, 4),
            "share_is": _SHARE_OF_BUNDLE if self.written.suffix == _ADAPTER else _SHARE_OF_MODEL,
            "best_step": self.step,
            "held_out_cross_entropy": {
                "before": round(self.held_out[0], 4),
                "after": round(self.held_out[1], 4),
            },
            "accuracy_new": self.new.facts(),
        }
        if self.old is not None:
            facts["accuracy_old"] = self.old.facts()
        if self.memory is not None:
            facts["memory"] = str(self.memory)
        return facts | ({"findings": list(self.findings)} if self.findings else {})


def adapt(
    base: Any,
    data: Data,
    output: str | pathlib.Path,
    *,
    evaluation: Data | None = None,
    old_evaluation: Data | None = None,
    target: str | pathlib.Path | Target | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
    **settings: Any,
) -> Adaptation:
    """Teach a model the labels of data, and write it.

    base: what ``load_source`` understands, then output is an .onnx file; or a bundle with
    slots, then output is an adapter. data: labelled samples, a quarter of which is held out.
    evaluation, old_evaluation: labelled samples to judge by, of this task and of earlier ones.
    target: whose opset the model gets; "x86-64" by default, or the bundle's own, which has to be
    given where it is a file of yours.
    settings: fields of ``edgec.passes.adapt.Adapt``.

    Killed, or if the output cannot be written in the end, it leaves a hidden folder beside the
    output, from which the same call goes on to the same bytes. Raises EdgecError, and writes
    nothing, if it cannot be done.
    """
    path = pathlib.Path(output)
    if isinstance(base, (str, pathlib.Path)) and str(base).endswith(".edgec"):
        return _adapter(
            pathlib.Path(base),
            path,
            settings,
            data,
            evaluation,
            old_evaluation,
            target,
            seed,
            progress,
        )
    chosen = _chosen(settings)
    _check_output(path, ".onnx", "an adapted model")
    read = {"base": base, "data": data, "evaluation": evaluation, "old evaluation": old_evaluation}
    _check_apart(path, chosen, read)
    device = target if isinstance(target, Target) else load_target(target or "x86-64")
    source = load_source(base)
    exported = export(source, device).model
    plain = Context(target=device, reference=exported, seed=seed, progress=progress)
    form = trainable_form(plain)
    samples = Lessons.open(data, evaluation, old_evaluation, form, chosen, seed)
    context = samples.context(replace(plain, reference=form.clone()))
    before = samples.accuracies(_in_memory(context.reference))
    with _working(path) as work:
        adapted = chosen.train(form, replace(context, work=work))
        for branch in adapted.branches:
            branch.merge(form, *adapted.matrices[branch.layer])
        check_model(form)
        new, old = samples.judged(before, _in_memory(form))
        with _folder(path) as folder:
            save_reference(form, folder / path.name)
            memory = _remember(adapted, chosen, folder, path)
            size_bytes = weights_size_bytes(form)
    base_bytes = weights_size_bytes(exported)
    return _told(path, size_bytes, base_bytes, chosen, adapted, new, old, memory)


def _adapter(
    bundle: pathlib.Path,
    path: pathlib.Path,
    settings: Mapping[str, Any],
    data: Data,
    evaluation: Data | None,
    old_evaluation: Data | None,
    target: str | pathlib.Path | Target | None,
    seed: int,
    progress: Progress,
) -> Adaptation:
    """Train an adapter for a bundle on the reference beside it."""
    _check_output(path, _ADAPTER, "an adapter")
    if settings.get("method", "lora") != "lora" or settings.get("classes"):
        raise PassError(
            f"{bundle}: a bundle takes adapters of method 'lora' with its own classes; give the "
            "bundle's source instead, and build what comes out"
        )
    chosen = _chosen({"method": "lora", **settings})
    read = {"data": data, "evaluation": evaluation, "old evaluation": old_evaluation}
    _check_apart(path, chosen, read)
    model = edgec_runtime.load(bundle, any_target=True)
    if not model.slots:
        raise PassError(
            f"{bundle}: it has no slots for adapters; build it with the pass 'adapter-slots' at "
            "the end of the recipe"
        )
    reference_file = reference_beside(bundle)
    if reference_file is None:
        raise SourceError(
            f"{bundle}: an adapter is trained on {bundle.stem}.reference.onnx beside it, which is "
            "missing; build with --reference"
        )
    built_for = model.manifest.target.name
    device = target if isinstance(target, Target) else load_target(target or built_for)
    if device.name != built_for:
        raise PassError(
            f"{bundle}: it was built for target '{built_for}', not for '{device.name}'; leave "
            "--target out, or give the file of its target if it is one of your own"
        )
    reference = export(load_source(reference_file), device).model
    plain = Context(target=device, reference=reference, seed=seed, progress=progress)
    digest, wanted = base_digest(reference), slot_digest(model.slots[0].name)
    if digest != wanted:
        raise SourceError(
            f"{reference_file}: it is not the reference that {bundle.name} was built from "
            f"({digest}, expected {wanted}); build the bundle again"
        )
    form = trainable_form(plain)
    chosen = _for_slots(chosen, settings, form, model.slots)
    samples = Lessons.open(data, evaluation, old_evaluation, form, chosen, seed)
    context = samples.context(replace(plain, reference=form.clone()))
    output = samples.head.output
    before = samples.accuracies(lambda feeds: model(**feeds)[output])
    with _working(path) as work:
        adapted = chosen.train(form, replace(context, work=work))
        matrices: dict[str, Array] = {}
        for branch in adapted.branches:
            pair = adapted.matrices[branch.layer]
            matrices |= zip(slot_names(digest, branch.result), pair, strict=True)
        with _folder(path) as folder:
            write_adapter(folder / path.name, matrices)
            model.use_adapter(folder / path.name)
            new, old = samples.judged(before, lambda feeds: model(**feeds)[output])
            model.use_adapter(None)
            memory = _remember(adapted, chosen, folder, path)
            size_bytes = (folder / path.name).stat().st_size
    loaded = (e for e in model.manifest.entries if e.name == WEIGHTS or e.name.endswith(".onnx"))
    base_bytes = sum(entry.size for entry in loaded)
    return _told(path, size_bytes, base_bytes, chosen, adapted, new, old, memory)


def _chosen(given: Mapping[str, Any]) -> Adapt:
    """The settings. Raises EdgecError for one that is unknown or would have no effect."""
    plain = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in given.items()}
    chosen = with_parameters(Adapt, plain, "adapt")
    check_used(chosen, tuple(plain))
    return chosen


def _for_slots(
    chosen: Adapt, given: Mapping[str, Any], form: ir.Model, slots: Sequence[Slot]
) -> Adapt:
    """The settings with the rank and the layers of a bundle's slots."""
    shapes = {slot.name: slot.shape for slot in slots}
    digest = slot_digest(slots[0].name)
    rank = next(s[1] if len(s) == 2 else s[0] for n, s in shapes.items() if n.endswith(".down"))
    if given.get("rank", rank) != rank:
        raise PassError(
            f"adapt: rank is {given['rank']}, the slots of the bundle have {rank}; leave it out, "
            "or build the bundle with adapter-slots.rank"
        )
    found, _ = branches(form, rank)
    present = {b.layer: b for b in found if shapes.get(slot_names(digest, b.result)[0]) == b.down}
    layers = chosen.layers or tuple(present)
    for layer in layers:
        if layer not in present:
            raise PassError(
                f"adapt: the bundle has no slot beside layer '{layer}'; it has {', '.join(present)}"
            )
    return replace(chosen, rank=rank, layers=layers)


def _in_memory(model: ir.Model) -> Run:
    session = open_session(model, outputs=[find_head(model).output])
    return lambda feeds: np.asarray(run_feeds(session, feeds)[0])


def _remember(
    adapted: Adapted, chosen: Adapt, folder: pathlib.Path, path: pathlib.Path
) -> pathlib.Path | None:
    """Write the memory for the next round; where it will be."""
    if not chosen.remember:
        return None
    place = _memory_beside(path)
    write_memory(folder / place.name, adapted.memory)
    return place


def _told(
    path: pathlib.Path,
    size_bytes: int,
    base_bytes: int,
    chosen: Adapt,
    adapted: Adapted,
    new: Judged,
    old: Judged | None,
    memory: pathlib.Path | None,
) -> Adaptation:
    findings = list(adapted.outcome.findings)
    findings += [f"layer '{s.node}' has no branch: {s.reason}" for s in adapted.skipped]
    if not adapted.outcome.step:
        findings.append("training did not lower the held-out cross-entropy; nothing was learned")
    return Adaptation(
        written=path,
        size_bytes=size_bytes,
        base_bytes=base_bytes,
        method=chosen.method,
        step=adapted.outcome.step,
        held_out=(adapted.outcome.before, adapted.outcome.after),
        new=new,
        old=old,
        memory=memory,
        findings=tuple(findings),
    )


def _check_output(path: pathlib.Path, suffix: str, what: str) -> None:
    if path.suffix != suffix:
        raise OutputError(f"{path}: {what} is written as {suffix}; choose a name ending so")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot write into {path.parent}; choose another -o")


def _check_apart(path: pathlib.Path, chosen: Adapt, read: Mapping[str, Any]) -> None:
    """Raise OutputError if what is to be written is a folder, or a file that is read."""
    written = (path, _memory_beside(path)) if chosen.remember else (path,)
    for output in written:
        if output.is_dir():
            raise OutputError(f"{output}: this is a folder; choose another -o, or move it away")
    for what, given in {**read, "memory": chosen.memory}.items():
        if not isinstance(given, (str, os.PathLike)) or not os.path.exists(given):
            continue  # an object, a function, or nothing
        for output in written:
            if output.exists() and output.samefile(given):
                raise OutputError(
                    f"{output}: this file is the {what} that is read, and would be written over; "
                    "choose another -o"
                )


def _memory_beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.stem}.memory.npz")


def work_beside(path: pathlib.Path) -> pathlib.Path:
    """The hidden folder that holds the checkpoint of a training while there is one."""
    return path.with_name(f".{path.name}.work")


@contextlib.contextmanager
def _working(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """``work_beside``; it stays where what was trained was not written yet.

    That is: of an adaptation that was killed or interrupted, or whose output cannot be written.
    """
    work = work_beside(path)
    try:
        yield work
    except OutputError:
        raise
    except Exception:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder whose files are moved beside ``path`` if the block succeeds."""
    try:
        with tempfile.TemporaryDirectory(prefix=".edgec-", dir=path.parent) as hidden:
            yield pathlib.Path(hidden)
            for file in sorted(pathlib.Path(hidden).iterdir()):
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise OutputError(
            f"{path.parent}: cannot write there: {error.strerror or error}; mend that, and the "
            f"same command goes on from what was trained, in {work_beside(path)}"
        ) from error
