"""Makes an ONNX Runtime session for a bundle, as its manifest says.

Checks what the bundle needs first: the machine, the version of onnxruntime, the execution
providers; then that the graph has the signature that the manifest states.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgec_runtime import plugins
from edgec_runtime.bundle import Bundle
from edgec_runtime.errors import BundleError, EdgecError, TargetMismatchError
from edgec_runtime.generation import MAIN
from edgec_runtime.huge_pages import collapse, private_memory
from edgec_runtime.integer_cache import untiled
from edgec_runtime.machine import Machine
from edgec_runtime.manifest import Session
from edgec_runtime.versions import version_matches

if TYPE_CHECKING:
    import onnxruntime

_MAX_THREADS = 1024
_SILENT = 4  # ONNX Runtime's severity "fatal"
_ORT_DTYPES = {"float": "float32", "double": "float64"}
# provider -> its option for the number of threads; the others follow the session's
_THREAD_OPTIONS = {"OpenVINOExecutionProvider": "num_of_threads"}
# provider -> options without which it takes fewer nodes
_OPTIONS = {"CoreMLExecutionProvider": {"ModelFormat": "MLProgram"}}
_ASSIGNMENT = "session.record_ep_graph_assignment_info"


def check_target(bundle: Bundle, machine: Machine) -> None:
    """Raise TargetMismatchError unless the bundle was built for such a machine."""
    target = bundle.manifest.target
    if target.arch == machine.arch and machine.os in target.os:
        return
    raise TargetMismatchError(
        f"bundle {bundle.path}: built for {target.name} ({target.arch}; {', '.join(target.os)}), "
        f"this is {machine.arch} on {machine.os}; build it for this device, or load it with "
        "any_target=True to run it slower or less exactly"
    )


def thread_count(given: int | None, session: Session) -> int:
    """The number of threads: the argument, else EDGEC_THREADS, else the manifest."""
    text = os.environ.get("EDGEC_THREADS", "")
    where, value = "threads", given
    if given is None and text:
        where = "EDGEC_THREADS"
        value = int(text) if text.isascii() and text.isdigit() else -1
    if value is None:
        return session.threads
    if type(value) is not int or not 0 <= value <= _MAX_THREADS:
        shown = repr(text) if where == "EDGEC_THREADS" else repr(given)
        raise EdgecError(f"{where} is {shown}, expected a whole number from 0 to {_MAX_THREADS}")
    return value


def open_session(
    bundle: Bundle,
    machine: Machine,
    threads: int,
    mapped: bool,
    any_target: bool,
    chosen: Mapping[str, Mapping[str, str]],
    huge_pages: bool,
    role: str = MAIN,
) -> onnxruntime.InferenceSession:
    """The session of the graph of that role; ``load`` explains the other arguments.

    Raises BundleError for the file or its version, EdgecError for an execution provider.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
    import onnxruntime

    settings = bundle.manifest.session
    _check_version(bundle, onnxruntime.__version__)
    plugins.register(settings.providers)
    providers = _providers(bundle, onnxruntime.get_available_providers(), any_target)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    config = dict(settings.config)
    for feature, entries in settings.without.items():
        if feature not in machine.features:
            config |= entries
    if mapped or not settings.prepacking:
        config["session.disable_prepacking"] = "1"
    config["session.model_external_initializers_file_folder_path"] = str(bundle.path.parent)
    if len(providers) > 1:
        config[_ASSIGNMENT] = "1"
    named = {
        name: {**_provider_options(name, threads), **chosen.get(name, {})} for name in providers
    }
    before = private_memory() if huge_pages else ()
    try:
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        added = [name for name in providers if plugins.add(options, name, named[name])]
        with untiled(bundle.manifest, threads):
            session = onnxruntime.InferenceSession(
                bundle.graph(role),
                options,
                providers=None if added else list(named.items()),
                disabled_optimizers=list(settings.disabled_optimizers),
                enable_fallback=0,  # its fallback prints to stdout
            )
    except (RuntimeError, ValueError, NotImplementedError, UnicodeError) as error:
        raise BundleError(
            f"bundle {bundle.path}: ONNX Runtime refuses it: {one_line(error)}"
        ) from error
    except Exception as error:  # onnxruntime's errors derive from Exception alone
        if not from_onnxruntime(error):
            raise
        raise BundleError(
            f"bundle {bundle.path}: ONNX Runtime refuses it: {one_line(error)}"
        ) from error
    failed = [name for name in providers if name not in session.get_providers()]
    if failed:  # ONNX Runtime only warns, and computes everything on the CPU provider
        raise EdgecError(
            f"bundle {bundle.path}: the execution provider '{failed[0]}' is installed but does "
            "not start on this machine; repair its installation, or build for another target"
        )
    if huge_pages:
        collapse(before)
    return session


def _providers(bundle: Bundle, available: Sequence[str], any_target: bool) -> list[str]:
    """The manifest's execution providers; with any_target those of them that there are."""
    wanted = bundle.manifest.session.providers
    present = [name for name in wanted if name in available]
    if present == list(wanted) or (any_target and present):
        return present
    [missing, *_] = [name for name in wanted if name not in available]
    plugin = plugins.PLUGINS.get(missing)
    what = f"pip install {plugin.package}" if plugin else "install the onnxruntime package with it"
    raise EdgecError(
        f"bundle {bundle.path}: it needs the execution provider '{missing}'; this "
        f"onnxruntime has {', '.join(available)}; {what}, "
        "or load it with any_target=True to run it slower or less exactly"
    )


def _provider_options(name: str, threads: int) -> dict[str, str]:
    """Options that it needs, and its number of threads; 0 lets the provider choose."""
    option = _THREAD_OPTIONS.get(name)
    counted = {option: str(threads)} if option is not None and threads else {}
    return {**_OPTIONS.get(name, {}), **counted}


def _check_version(bundle: Bundle, installed: str) -> None:
    wanted = bundle.manifest.onnxruntime
    if not version_matches(installed, wanted):
        raise BundleError(
            f"bundle {bundle.path}: it needs onnxruntime {wanted}, installed is {installed}; "
            f"pip install 'onnxruntime{wanted}'"
        )


def check_signature(
    bundle: Bundle, session: onnxruntime.InferenceSession, role: str = MAIN
) -> None:
    """The graph of that role has the inputs and outputs that the manifest states."""
    graph = bundle.manifest.graphs[role]
    sides = (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    )
    for side, stated, actual in sides:
        if [(v.name, v.dtype) for v in stated] != [(a.name, dtype_name(a.type)) for a in actual]:
            raise BundleError(
                f"bundle {bundle.path}: the {side} of its graph are "
                f"{[(a.name, dtype_name(a.type)) for a in actual]}, its manifest says "
                f"{[(v.name, v.dtype) for v in stated]}"
            )
    generation = bundle.manifest.generation
    if role == MAIN and generation is not None and generation.logits_from is not None:
        found = {value.name: value.type for value in session.get_overridable_initializers()}
        if found.get(generation.logits_from) != "tensor(int64)":
            raise BundleError(
                f"bundle {bundle.path}: generation.logits_from is '{generation.logits_from}', and "
                "the graph main has no input int64 [1] of that name with a default"
            )


def dtype_name(kind: str) -> str:
    """``tensor(float)`` -> ``float32``."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return _ORT_DTYPES.get(name, name)


def from_onnxruntime(error: Exception) -> bool:
    """Whether ONNX Runtime raised it; its errors derive from Exception alone."""
    return type(error).__module__.startswith("onnxruntime")


def one_line(error: Exception) -> str:
    """The message of an error, shortened and without line breaks."""
    return " ".join(str(error).split())[:500]
