"""Opens a bundle in ONNX Runtime and runs it.

    model = edgec_runtime.load("ocr.arm64.edgec")
    outputs = model(image=batch)

``load`` checks the file and the machine before ONNX Runtime is started, and sets up the
session as the manifest says. ``Model`` checks what it is called with and is thread safe.
Nothing is printed and nothing leaves the machine: telemetry and logs are off.

A bundle with an encoder runs as one model: the encoder, and then the graph main on what it gave.

Left out on purpose: retries on another
execution provider (a slower one is never taken silently; ONNX Runtime itself does so when
a provider is absent or fails to start).
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from edgec_runtime.adapters import SLOT, Adapter, Slot, open_adapter
from edgec_runtime.bundle import Bundle, Check, read_bundle
from edgec_runtime.errors import EdgecError, InputError
from edgec_runtime.feeds import Array, check_feeds
from edgec_runtime.generate import generate as generate_text
from edgec_runtime.generation import ENCODER
from edgec_runtime.integer_cache import (
    cache_values,
    check_scales,
    dequantized,
    quantized,
    session_scales,
)
from edgec_runtime.machine import this_machine
from edgec_runtime.manifest import Manifest, Value
from edgec_runtime.open_session import (
    check_signature,
    check_target,
    dtype_name,
    from_onnxruntime,
    one_line,
    open_session,
    thread_count,
)
from edgec_runtime.stream import open_stream
from edgec_runtime.text import Text, open_text

if TYPE_CHECKING:
    import onnxruntime

    from edgec_runtime.golden import SelfTest

_Result = TypeVar("_Result")


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    mapped: bool = False,
    check: Check = "auto",
    any_target: bool = False,
    provider_options: Mapping[str, Mapping[str, str]] | None = None,
    huge_pages: bool = True,
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
    huge_pages: move repacked weights to pages of 2 MiB where Linux has them: faster runs of some
    models, and opening takes longer (docs/runtime.md); ``mapped`` weights stay where they are.
    Raises BundleError for the file, TargetMismatchError for the machine.
    """
    bundle = read_bundle(path, check)
    manifest, machine = bundle.manifest, this_machine()
    if not any_target:
        check_target(bundle, machine)
    count = thread_count(threads, manifest.session)
    chosen = provider_options or {}
    session = open_session(bundle, machine, count, mapped, any_target, chosen, huge_pages)
    check_signature(bundle, session)
    encoder = None
    if ENCODER in manifest.graphs:
        encoder = open_session(
            bundle, machine, count, mapped, any_target, chosen, huge_pages, ENCODER
        )
        check_signature(bundle, encoder, ENCODER)
    return Model(bundle, session, count, encoder)


class Model:
    """A loaded model; ``load`` makes one. Calls may come from several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        session: onnxruntime.InferenceSession,
        threads: int,
        encoder: onnxruntime.InferenceSession | None = None,
    ) -> None:
        """Take over open sessions of the bundle's main graph, and of its encoder if it has one."""
        self._bundle = bundle
        self._session = session
        self._encoder = encoder
        self._threads = threads
        self._process = os.getpid()
        self._names = [value.name for value in self.outputs]
        self._scales = session_scales(session)
        check_scales(self._scales, cache_values(bundle.manifest))
        self._adapter: Adapter | None = None

    def __call__(self, /, *arrays: Any, **feeds: Any) -> dict[str, Array]:
        """Run the model; arrays by position or by input name (``model(**{"any name": x})``).

        Returns the outputs by name. Raises InputError for a wrong name, dtype or shape.
        """
        return self.run(check_feeds(self.inputs, arrays, feeds))

    generate = generate_text
    stream = open_stream

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run feeds that ``check_feeds`` passed; the part of a call that is worth timing."""
        names, arrays = self._names, dict(feeds)
        if self._encoder is not None:
            read = [value.name for value in self.manifest.graphs[ENCODER].inputs]
            arrays |= self.encode({name: arrays.pop(name) for name in read})
        arrays = quantized(arrays, self._scales) if self._scales else arrays
        outputs = self._guarded(lambda options: self._session.run(names, arrays, options))
        outputs = dequantized(names, outputs, self._scales) if self._scales else outputs
        return dict(zip(names, outputs, strict=True))

    def encode(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What the encoder hands to every step: inputs of the graph main, by name.

        feeds: those of the encoder, checked. Raises InputError if the bundle has none.
        """
        encoder = self._encoder
        if encoder is None:
            raise InputError(f"model {self.path}: its bundle has no graph 'encoder'")
        names = [value.name for value in self.manifest.graphs[ENCODER].outputs]
        arrays = dict(feeds)
        outputs = self._guarded(lambda options: encoder.run(names, arrays, options))
        return dict(zip(names, outputs, strict=True))

    def run_bound(self, binding: onnxruntime.IOBinding) -> None:
        """Run with inputs and outputs bound to tensors; see ``session.io_binding()``."""
        self._guarded(lambda options: self._session.run_with_iobinding(binding, options))

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
        """Names, dtypes and shapes of the inputs; those of an encoder come first."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Names, dtypes and shapes of the outputs."""
        return self.manifest.outputs

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The inputs with defaults that an adapter fills; empty if the bundle has none."""
        return tuple(
            Slot(value.name, dtype_name(value.type), tuple(value.shape))
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
    def session(self) -> onnxruntime.InferenceSession:
        """The open session of the graph ``main``."""
        return self._session

    @functools.cached_property
    def text(self) -> Text:
        """The tokenizer and chat template of a language model.

        Raises InputError if the bundle has none, EdgecError if ``tokenizers`` is not installed.
        """
        return open_text(self._bundle)

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

    def _guarded(self, run: Callable[[onnxruntime.RunOptions | None], _Result]) -> _Result:
        """A run with the adapter in use; what ONNX Runtime refuses becomes an InputError."""
        if os.getpid() != self._process:
            raise EdgecError(
                f"model {self.path}: it was loaded before this process was forked and its "
                "threads are gone; load it in the child, or use the start method 'spawn'"
            )
        adapter = self._adapter  # read once: another thread may swap it
        try:
            return run(None if adapter is None else adapter.options())
        except Exception as error:  # onnxruntime's errors derive from Exception alone
            # a run with bound tensors raises plain RuntimeErrors
            if not from_onnxruntime(error) and type(error) is not RuntimeError:
                raise
            raise InputError(
                f"model {self.path}: cannot run these inputs: {one_line(error)}"
            ) from error

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
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._encoder))
