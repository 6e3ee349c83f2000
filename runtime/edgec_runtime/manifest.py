"""What a bundle says about itself: frozen dataclasses and their one JSON form.

The field names are the JSON keys. Reading is strict, since the file may come from anywhere:
an unknown key, a wrong type or a session option outside the known list is an error that
names its place. A new field raises FORMAT_VERSION, and an older runtime then says so;
but a section that is absent where it is None (``_OPTIONAL``) leaves other bundles as they were.

Left out on purpose: defaults for absent keys (the writer states every key), timings and
anything else that depends on the machine that built the bundle.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgec_runtime.errors import BundleError, suggestion
from edgec_runtime.generation import ENCODER, MAIN, Generation, check_generation
from edgec_runtime.integer_cache import as_called
from edgec_runtime.state import StatePair, check_state

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
_OPTIONAL = {"optional": True}  # metadata of a field whose key is absent where it is None

# Session options that a bundle may set. Others are refused: ONNX Runtime accepts a misspelt
# key silently, and some of its keys name files to read or to write.
SESSION_CONFIG = (
    "mlas.disable_kleidiai",
    "mlas.enable_gemm_fastmath_arm64_bfloat16",
    "mlas.qnbit.force_fp32",
    "mlas.use_lut_gemm",
    "optimization.disable_specified_optimizers",
    "optimization.enable_cast_chain_elimination",
    "optimization.enable_gelu_approximation",
    "session.disable_double_qdq_remover",
    "session.disable_prepacking",
    "session.disable_qdq_constant_folding",
    "session.disable_quant_qdq",
    "session.dynamic_block_base",
    "session.enable_dq_matmulnbits_fusion",
    "session.enable_quant_qdq_cleanup",
    "session.force_spinning_stop",
    "session.graph_optimizations_loop_level",
    "session.inter_op.allow_spinning",
    "session.intra_op.allow_spinning",
    "session.qdq_matmulnbits_accuracy_level",
    "session.qdq_matmulnbits_block_size",
    "session.qdqisint8allowed",
    "session.set_denormal_as_zero",
    "session.use_deterministic_compute",
    "session.use_device_allocator_for_initializers",
    "session.use_env_allocators",
    "session.x64quantprecision",
)

DTYPES = (
    "bool",
    "float16",
    "float32",
    "float64",
    "int16",
    "int32",
    "int64",
    "int8",
    "string",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
)


@dataclass(frozen=True)
class Target:
    """The device class that the bundle was built for."""

    name: str
    arch: str  # x86_64, arm64, armhf, riscv64, wasm32
    os: tuple[str, ...]  # linux, windows, macos, android, ios, browser
    features: tuple[str, ...] = ()  # CPU features that its kernels were chosen for


@dataclass(frozen=True)
class Session:
    """How the ONNX Runtime session is set up; the fields mirror ``edgec.targets.Session``."""

    threads: int = 1  # intra-op threads; 0 lets ONNX Runtime choose
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    prepacking: bool = True
    disabled_optimizers: tuple[str, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    # CPU feature -> config entries that a machine lacking the feature gets on top
    without: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """An input or output. shape: sizes, names of dynamic dimensions, None where unknown."""

    name: str
    dtype: str  # one of DTYPES
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of the bundle: its file and signature."""

    file: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Image:
    """How a photograph becomes the model's input; carried out by ``edgec_runtime.image``.

    The centre crop with the aspect ratio of ``size`` that covers ``crop`` of the image is
    resized to ``size`` and normalised: (pixel - mean) / std, in units of 0..255.
    """

    input: str  # name of the input
    size: tuple[int, int]  # height, width in pixels
    crop: float = 1.0  # share of the largest centre crop, e.g. 0.875 for 224 / 256
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # per channel, 0..255
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)  # per channel, 0..255
    channels: Literal["RGB", "BGR"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    resize: Literal["bilinear", "bicubic"] = "bicubic"
    dtype: Literal["float32", "float16", "uint8"] = "float32"


@dataclass(frozen=True)
class GoldenInput:
    """One stored input of the self-test; ``edgec_runtime.golden`` defines the encoding.

    The input is ``repeat(stored * scale + offset, repeats)`` cut to ``shape``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_dtype: str
    stored_shape: tuple[int, ...]
    repeats: tuple[int, ...]  # per axis
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class GoldenOutput:
    """One expected output of the self-test: ``count`` values of it, and its L2 norm."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_dtype: str
    count: int  # equal to the size of ``shape``: all values are stored
    seed: int  # of the sampled positions
    norm: float  # L2 norm over all finite values


@dataclass(frozen=True)
class Golden:
    """The self-test of one graph: a decoded sample and what it must give."""

    graph: str  # role of the graph
    inputs_file: str
    outputs_file: str
    inputs: tuple[GoldenInput, ...]
    outputs: tuple[GoldenOutput, ...]
    min_sqnr_db: float  # of every output that is not an exact integer


@dataclass(frozen=True)
class Entry:
    """A file inside the bundle. offset: of its data, from the start of the bundle."""

    name: str
    size: int
    sha256: str
    offset: int


@dataclass(frozen=True)
class Manifest:
    """Everything that the runtime knows about a model before it opens the graph."""

    name: str
    version: int  # counter of releases of this model, for updates and downgrades
    edgec: str  # version of the compiler
    target: Target
    onnxruntime: str  # version range, e.g. ">=1.27,<2"
    opset: int  # of the default ONNX domain
    ops: tuple[
        str, ...
    ]  # of every operator used, sorted: "ai.onnx::Conv", "com.microsoft::QAttention"
    graphs: Mapping[str, Graph]  # by role; a model that is one graph has the role "main"
    session: Session = field(default_factory=Session)
    image: Image | None = None
    labels: tuple[str, ...] | None = None
    golden: tuple[Golden, ...] = ()
    generation: Generation | None = field(default=None, metadata=_OPTIONAL)  # language models
    state: tuple[StatePair, ...] | None = field(default=None, metadata=_OPTIONAL)  # recurrent ones
    results: Mapping[str, Any] = field(default_factory=dict)  # agreement, sqnr_db, judged_on
    provenance: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()  # every file but the manifest, in file order
    format_version: int = FORMAT_VERSION

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Of the whole model, as it is called: the encoder's, if any, and main's that are left."""
        main = as_called(self.graphs[MAIN].inputs, self)
        encoder = self.graphs.get(ENCODER)
        if encoder is None:
            return main
        given = {value.name for value in encoder.outputs}
        return (*encoder.inputs, *(value for value in main if value.name not in given))

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Of the whole model, as a caller sees them."""
        return as_called(self.graphs[MAIN].outputs, self)

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8. Raises BundleError for a NaN."""
        try:
            text = json.dumps(
                _plain(self),
                sort_keys=True,
                separators=(",", ":"),
                ensure_ascii=False,
                allow_nan=False,
            )
            return text.encode("utf-8")
        except (TypeError, ValueError) as error:
            raise BundleError(f"the manifest is not plain JSON: {error}") from error

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The manifest, checked key by key. Raises BundleError that names the place."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"manifest.json has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are allowed"
            )
        try:
            table = json.loads(
                data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
            )
        except (ValueError, RecursionError) as error:
            raise BundleError(f"manifest.json is not valid JSON: {error}") from error
        if not isinstance(table, dict):
            raise BundleError("manifest.json must be a JSON object")
        version = table.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            raise BundleError(
                f"it has format version {version!r}, this runtime reads {FORMAT_VERSION}; "
                "upgrade edgec-runtime or build the bundle again"
            )
        manifest = _build(cls, table, "manifest.json")
        assert isinstance(manifest, cls)
        _check(manifest)
        return manifest


def _check(manifest: Manifest) -> None:
    """Rules that the types alone do not state."""
    if not manifest.graphs:
        raise BundleError("manifest.json: graphs is empty")
    for role, graph in manifest.graphs.items():
        for value in (*graph.inputs, *graph.outputs):
            where = f"manifest.json: graphs.{role}: '{value.name}'"
            if value.dtype not in DTYPES:
                raise BundleError(f"{where} has dtype {value.dtype!r}; known: {', '.join(DTYPES)}")
            if any(isinstance(size, int) and size < 0 for size in value.shape):
                raise BundleError(f"{where} has the negative shape {list(value.shape)}")
    for golden in manifest.golden:
        if golden.graph not in manifest.graphs:
            raise BundleError(f"manifest.json: golden is of an unknown graph '{golden.graph}'")
    session = manifest.session
    if not 0 <= session.threads <= 1024:
        raise BundleError(f"manifest.json: session.threads is {session.threads}, expected 0..1024")
    for config in (session.config, *session.without.values()):
        for key in config:
            if key not in SESSION_CONFIG:
                raise BundleError(
                    f"manifest.json: session option '{key}' is not allowed"
                    f"{suggestion(key, SESSION_CONFIG)}"
                )
    if manifest.generation is not None or ENCODER in manifest.graphs:
        check_generation(manifest.generation, manifest.graphs)
    if manifest.state is not None:
        check_state(manifest.state, manifest.graphs, cached=manifest.generation is not None)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get("optional") and getattr(value, f.name) is None)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is given twice")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _build(cls: type, table: Any, where: str) -> object:
    """An instance of the dataclass ``cls`` from a JSON object, checked key by key."""
    if not isinstance(table, dict):
        raise BundleError(f"{where} must be an object")
    hints = _hints(cls)
    optional = {f.name for f in dataclasses.fields(cls) if f.metadata.get("optional")}
    for key in table:
        if key not in hints:
            raise BundleError(f"{where}: unknown key '{key}'{suggestion(key, hints)}")
    for key in hints:
        if key not in table and key not in optional:
            raise BundleError(f"{where}: missing key '{key}'")
    known = ((key, table[key]) for key in hints if key in table)
    return cls(**{key: _convert(hints[key], item, f"{where}: {key}") for key, item in known})


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``; lists become tuples, objects become dataclasses."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(inner, value, where)
    if origin is Literal:
        if value not in inner:
            raise BundleError(f"{where} is {_short(value)}, expected one of {inner}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is tuple:
        return _convert_tuple(inner, value, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise BundleError(f"{where} must be an object")
        items = {k: _convert(inner[1], v, f"{where}.{k}") for k, v in value.items()}
        return types.MappingProxyType(items)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise BundleError(f"{where} is {_short(value)}, expected {hint.__name__}")
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    simple = [kind for kind in kinds if kind in (int, str) and type(value) is kind]
    rest = [kind for kind in kinds if kind not in (int, str, types.NoneType)]
    if simple:
        return value
    if len(rest) != 1:
        raise BundleError(f"{where} is {_short(value)}, expected a number or a name")
    return _convert(rest[0], value, where)


def _convert_tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise BundleError(f"{where} is {_short(value)}, expected a list")
    kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
    if len(kinds) != len(value):
        raise BundleError(f"{where} has {len(value)} items, expected {len(kinds)}")
    return tuple(_convert(kinds[i], item, f"{where}[{i}]") for i, item in enumerate(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
