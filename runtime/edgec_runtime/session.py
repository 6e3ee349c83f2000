"""Opens a bundle in ONNX Runtime and runs it.

    model = edgec_runtime.load("ocr.arm64.edgec")
    outputs = model(image=batch)

``load`` checks the file and the machine before ONNX Runtime is started, and sets up the
session as the manifest says. ``Model`` checks what it is called with and is thread safe.
Nothing is printed and nothing leaves the machine: telemetry and logs are off.

Left out on purpose: io_binding, streaming, several graphs at once, retries on another
execution provider (a slower one is never taken silently; ONNX Runtime itself does so when
a provider is absent or fails to start).
"""

from __future__ import annotations

import copy
import ctypes
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgec_runtime import plugins
from edgec_runtime.adapters import SLOT, Adapter, Slot, open_adapter
from edgec_runtime.bundle import Bundle, Check, read_bundle
from edgec_runtime.errors import BundleError, EdgecError, InputError, TargetMismatchError
from edgec_runtime.feeds import Array, check_feeds
from edgec_runtime.machine import Machine, this_machine
from edgec_runtime.manifest import Manifest, Session, Value
from edgec_runtime.versions import version_matches

if TYPE_CHECKING:
    import onnxruntime

    from edgec_runtime.golden import SelfTest

_MAX_THREADS = 1024
_SILENT = 4  # ONNX Runtime's severity "fatal"
_ORT_DTYPES = {"float": "float32", "double": "float64"}
# provider -> its option for the number of threads; the others follow the session's
_THREAD_OPTIONS = {"OpenVINOExecutionProvider": "num_of_threads"}
# provider -> options without which it takes fewer nodes
_OPTIONS = {"CoreMLExecutionProvider": {"ModelFormat": "MLProgram"}}
_ASSIGNMENT = "session.record_ep_graph_assignment_info"


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    mapped: bool = False,
    check: Check = "auto",
    any_target: bool = False,
    provider_options: Mapping[str, Mapping[str, str]] | None = None,
) -> Model:
    """Open a bundle.

    threads: intra-op threads, 0 lets ONNX Runtime choose; by default the environment
    variable EDGEC_THREADS, else what the manifest says.
    mapped: use the weights from the file instead of repacking them: little memory and a
    fast start, slower inference for some models.
    check: "auto" compares all digests below 64 MiB, else all but the weights'; "full" all.
    any_target: run a bundle that was built for another instruction set or system, and
    leave out execution providers that this onnxruntime lacks (see ``Model.providers``).
    provider_options: options of execution providers, by the provider's name, as its
    documentation states them.
    Raises BundleError for the file, TargetMismatchError for the machine.
    """
    bundle = read_bundle(path, check)
    manifest, machine = bundle.manifest, this_machine()
    if not any_target:
        _check_target(bundle, machine)
    count = _threads(threads, manifest.session)
    chosen = provider_options or {}
    session = _open(bundle, machine, count, mapped, any_target, chosen)
    _check_signature(bundle, session)
    return Model(bundle, session, count)


class Model:
    """A loaded model; ``load`` makes one. Calls may come from several threads at once."""

    def __init__(self, bundle: Bundle, session: onnxruntime.InferenceSession, threads: int) -> None:
        """Take over an open session of the bundle's main graph."""
        self._bundle = bundle
        self._session = session
        self._threads = threads
        self._process = os.getpid()
        self._names = [value.name for value in self.outputs]
        self._adapter: Adapter | None = None

    def __call__(self, /, *arrays: Any, **feeds: Any) -> dict[str, Array]:
        """Run the model; arrays by position or by input name (``model(**{"any name": x})``).

        Returns the outputs by name. Raises InputError for a wrong name, dtype or shape.
        """
        return self.run(check_feeds(self.inputs, arrays, feeds))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run feeds that ``check_feeds`` passed; the part of a call that is worth timing."""
        if os.getpid() != self._process:
            raise EdgecError(
                f"model {self.path}: it was loaded before this process was forked and its "
                "threads are gone; load it in the child, or use the start method 'spawn'"
            )
        adapter = self._adapter  # read once: another thread may swap it
        options = None if adapter is None else adapter.options()
        try:
            outputs = self._session.run(self._names, dict(feeds), options)
        except Exception as error:  # onnxruntime's errors derive from Exception alone
            if not _from_onnxruntime(error):
                raise
            raise InputError(
                f"model {self.path}: cannot run these inputs: {_line(error)}"
            ) from error
        return dict(zip(self._names, outputs, strict=True))

    def use_adapter(self, path: str | os.PathLike[str] | None) -> None:
        """Answer with an adapter from the next call on; None: as the bundle itself does.

        Calls that run in other threads end with what they began with. The file stays mapped
        while it is in use: replace it by a rename, never write into it. Raises AdapterError, and
        changes nothing, if the file is damaged or was made for another model.
        """
        name = f"model {self.manifest.name}"
        self._adapter = None if path is None else open_adapter(path, self.slots, name)

    def golden_inputs(self) -> dict[str, Array]:
        """The inputs of the bundle's golden sample. Raises BundleError if there is none."""
        from edgec_runtime.golden import golden_inputs

        return golden_inputs(self._bundle)

    def self_test(self) -> SelfTest:
        """Run the bundle's golden sample here and compare with the expected outputs.

        Without the adapter in use. Raises BundleError if the bundle carries no sample.
        """
        from edgec_runtime.golden import self_test

        plain = copy.copy(self)
        plain._adapter = None
        return self_test(self._bundle, plain)

    def prepare_image(self, pixels: Array) -> dict[str, Array]:
        """The feed for one photograph, as the model's author preprocessed it.

        pixels: uint8 [height, width, 3], RGB. Raises InputError for another array, and if
        the bundle states no preprocessing.
        """
        from edgec_runtime.image import prepare_image

        if self.manifest.image is None:
            raise InputError(f"model {self.path}: its bundle does not say how to prepare images")
        return {self.manifest.image.input: prepare_image(pixels, self.manifest.image)}

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Names, dtypes and shapes of the inputs."""
        return self.manifest.graphs["main"].inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Names, dtypes and shapes of the outputs."""
        return self.manifest.graphs["main"].outputs

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The inputs with defaults that an adapter fills; empty if the bundle has none."""
        return tuple(
            Slot(value.name, _dtype(value.type), tuple(value.shape))
            for value in self._session.get_overridable_initializers()
            if value.name.startswith(SLOT)
        )

    @property
    def adapter(self) -> Adapter | None:
        """The adapter in use."""
        return self._adapter

    @property
    def manifest(self) -> Manifest:
        """Everything that the bundle says about itself."""
        return self._bundle.manifest

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, if the model is a classifier that has them."""
        return self.manifest.labels

    @property
    def threads(self) -> int:
        """Intra-op threads of the session; 0: ONNX Runtime chose."""
        return self._threads

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that run the graph, in order of preference."""
        return tuple(self._session.get_providers())

    @property
    def nodes(self) -> dict[str, int]:
        """How many nodes of the graph each execution provider took.

        Empty if there is but one provider, or if this onnxruntime does not tell.
        """
        if len(self.providers) < 2 or not hasattr(
            self._session, "get_provider_graph_assignment_info"
        ):
            return {}
        counts: dict[str, int] = {}
        for part in self._session.get_provider_graph_assignment_info():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
        return counts

    @property
    def path(self) -> pathlib.Path:
        """The bundle, links resolved."""
        return self._bundle.path

    def __repr__(self) -> str:
        """Name, version, target and file."""
        m = self.manifest
        return f"<Model {m.name} version {m.version} for {m.target.name} from {self.path}>"

    def __del__(self) -> None:
        """Keep the session in a forked child: destroying it there crashes.

        Its threads exist in the parent only.
        """
        if os is not None and os.getpid() != getattr(self, "_process", os.getpid()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))


def _check_target(bundle: Bundle, machine: Machine) -> None:
    target = bundle.manifest.target
    if target.arch == machine.arch and machine.os in target.os:
        return
    raise TargetMismatchError(
        f"bundle {bundle.path}: built for {target.name} ({target.arch}; {', '.join(target.os)}), "
        f"this is {machine.arch} on {machine.os}; build it for this device, or load it with "
        "any_target=True to run it slower or less exactly"
    )


def _threads(given: int | None, session: Session) -> int:
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


def _open(
    bundle: Bundle,
    machine: Machine,
    threads: int,
    mapped: bool,
    any_target: bool,
    chosen: Mapping[str, Mapping[str, str]],
) -> onnxruntime.InferenceSession:
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
    try:
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        added = [name for name in providers if plugins.add(options, name, named[name])]
        session = onnxruntime.InferenceSession(
            bundle.graph(),
            options,
            providers=None if added else list(named.items()),
            disabled_optimizers=list(settings.disabled_optimizers),
            enable_fallback=0,  # its fallback prints to stdout
        )
    except (RuntimeError, ValueError, NotImplementedError, UnicodeError) as error:
        raise BundleError(
            f"bundle {bundle.path}: ONNX Runtime refuses it: {_line(error)}"
        ) from error
    except Exception as error:  # onnxruntime's errors derive from Exception alone
        if not _from_onnxruntime(error):
            raise
        raise BundleError(
            f"bundle {bundle.path}: ONNX Runtime refuses it: {_line(error)}"
        ) from error
    failed = [name for name in providers if name not in session.get_providers()]
    if failed:  # ONNX Runtime only warns, and computes everything on the CPU provider
        raise EdgecError(
            f"bundle {bundle.path}: the execution provider '{failed[0]}' is installed but does "
            "not start on this machine; repair its installation, or build for another target"
        )
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


def _check_signature(bundle: Bundle, session: onnxruntime.InferenceSession) -> None:
    """The graph has the inputs and outputs that the manifest states."""
    graph = bundle.manifest.graphs["main"]
    sides = (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    )
    for side, stated, actual in sides:
        if [(v.name, v.dtype) for v in stated] != [(a.name, _dtype(a.type)) for a in actual]:
            raise BundleError(
                f"bundle {bundle.path}: the {side} of its graph are "
                f"{[(a.name, _dtype(a.type)) for a in actual]}, its manifest says "
                f"{[(v.name, v.dtype) for v in stated]}"
            )


def _dtype(kind: str) -> str:
    """``tensor(float)`` -> ``float32``."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return _ORT_DTYPES.get(name, name)


def _from_onnxruntime(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
