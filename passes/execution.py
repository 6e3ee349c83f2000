"""Runs an ``onnx_ir.Model`` in ONNX Runtime: the one door from a graph in memory to numbers.

Used by passes that measure (ranges, SQNR, latency) and by the compiler's checks. Weights
of large models go through a temporary folder: protobuf ends at 2 GB and is slow before.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds, PassError
from edgec.targets import Session
from edgec_runtime.golden import sqnr_db
from edgec_runtime.integer_cache import dequantized, quantized, session_scales

if TYPE_CHECKING:
    import onnxruntime

_PROTOBUF_LIMIT = 1_500_000_000  # bytes of weights above which protobuf may not hold a model
# Bytes of weights above which a model is handed to ONNX Runtime as files: BERT-base opens in
# 1.0 CPU s instead of 3.4. Windows cannot delete a file that a session has mapped.
_FILES_ABOVE = 50_000_000 if os.name == "posix" else _PROTOBUF_LIMIT


def graph_bytes(model: ir.Model) -> bytes:
    """The model as deterministic protobuf bytes, weights inside.

    Raises PassError above the 2 GB that protobuf can hold.
    """
    if weights_size_bytes(model) > _PROTOBUF_LIMIT:
        raise PassError("the model is larger than a protobuf file can hold (2 GB)")
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def weights_size_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def open_session(
    model: ir.Model,
    *,
    outputs: Sequence[str] | None = None,
    settings: Session | None = None,
    threads: int = 1,
    optimized: bool = True,
    profile: str = "",
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session of the model on this machine's CPU.

    outputs: names of values to return instead of the graph's outputs; unknown names and
    values inside subgraphs are an error. settings: session options of a target, whose execution
    providers are used as far as this onnxruntime has them. profile:
    prefix of the file that ONNX Runtime's profiler writes; empty for none.
    Raises PassError with ONNX Runtime's reason if the model cannot be loaded.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    if outputs is not None:
        model = _with_outputs(model, outputs)
    options = _options(settings, threads)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    arguments = _arguments(settings)
    try:
        if weights_size_bytes(model) <= _FILES_ABOVE:
            return onnxruntime.InferenceSession(graph_bytes(model), options, **arguments)
        with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
            path = pathlib.Path(folder) / "model.onnx"
            ir.save(model.clone(), path, external_data="weights.bin")
            return onnxruntime.InferenceSession(str(path), options, **arguments)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise PassError(f"ONNX Runtime cannot load the model: {_one_line(error)}") from error
    except Exception as error:
        # onnxruntime's own exceptions (Fail, InvalidGraph, ...) derive from Exception alone
        if type(error).__module__.startswith("onnxruntime"):
            raise PassError(f"ONNX Runtime cannot load the model: {_one_line(error)}") from error
        raise


def run_feeds(session: onnxruntime.InferenceSession, feeds: Feeds) -> list[Any]:
    """The outputs of a session in order; feeds that are no inputs of it are left out.

    Caches of integers are fed and given as float32 (``edgec_runtime.integer_cache``).
    Raises PassError with ONNX Runtime's reason: feeds of the right shape can still be
    refused, an index out of range for example.
    """
    wanted = {i.name for i in session.get_inputs()}
    scales = session_scales(session)
    feeds = quantized(feeds, scales) if scales else feeds
    try:
        outputs: list[Any] = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
    except Exception as error:
        # onnxruntime's own exceptions (Fail, InvalidArgument, ...) derive from Exception alone
        if isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
            raise PassError(
                f"ONNX Runtime cannot run the model on these inputs: {_one_line(error)}"
            ) from error
        raise
    names = [output.name for output in session.get_outputs()] if scales else []
    return dequantized(names, outputs, scales) if scales else outputs


def optimized_graph(model: ir.Model) -> ir.Model:
    """The graph that ONNX Runtime makes of a model for this machine's CPU, to be read only.

    At the extended level: fusions are done, layouts of one CPU tier (nchwc) are not.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
        given, made = pathlib.Path(folder) / "given.onnx", pathlib.Path(folder) / "made.onnx"
        external = "weights.bin" if weights_size_bytes(model) > _FILES_ABOVE else None
        ir.save(model.clone(), given, external_data=external)
        options.optimized_model_filepath = str(made)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "made.bin"
        )
        try:
            onnxruntime.InferenceSession(str(given), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                reason = _one_line(error)
                raise PassError(f"ONNX Runtime cannot load the model: {reason}") from error
            raise
        return ir.load(made)


def compiled_graph(model: ir.Model, *, settings: Session, threads: int = 1) -> ir.Model:
    """The graph that a session of these settings executes here: kernels, and layouts of weights.

    For small models, whose weights it holds. It runs as it is with ``optimized=False``.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = _options(settings, threads)
    with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
        made = pathlib.Path(folder) / "made.onnx"
        options.optimized_model_filepath = str(made)
        try:
            onnxruntime.InferenceSession(graph_bytes(model), options, **_arguments(settings))
        except Exception as error:
            # onnxruntime's own exceptions (Fail, InvalidGraph, ...) derive from Exception alone
            if isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
                reason = _one_line(error)
                raise PassError(f"ONNX Runtime cannot load the model: {reason}") from error
            raise
        return ir.load(made)


def run_values(
    model: ir.Model, names: Sequence[str], samples: Iterable[Feeds], *, optimized: bool = False
) -> Iterable[dict[str, np.ndarray[Any, Any]]]:
    """Values of the graph by name, sample after sample; a generator, one sample in memory."""
    session = open_session(model, outputs=names, optimized=optimized)
    for feeds in samples:
        yield dict(zip(names, run_feeds(session, feeds), strict=True))


def _options(settings: Session | None, threads: int) -> onnxruntime.SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if settings is not None:
        for key, value in settings.config.items():
            options.add_session_config_entry(key, value)
        if not settings.prepacking:
            options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _arguments(settings: Session | None) -> dict[str, Any]:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    wanted = () if settings is None else settings.providers
    return {
        "providers": [name for name in wanted if name in available] or ["CPUExecutionProvider"],
        "disabled_optimizers": [] if settings is None else list(settings.disabled_optimizers),
    }


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    clone = model.clone()
    graph = clone.graph
    values = {v.name: v for v in graph.inputs}
    values |= {v.name: v for node in graph for v in node.outputs}
    missing = [n for n in names if n not in values]
    if missing:
        raise PassError(f"the graph has no value named '{missing[0]}'")
    graph.outputs.clear()
    # an input cannot be an output of the graph: ORT wants a node in between
    for name in names:
        value = values[name]
        if value in graph.inputs:
            node = ir.node("Identity", [value])
            graph.append(node)
            node.outputs[0].name = f"{name}__as_output"
            value = node.outputs[0]
        graph.outputs.append(value)
    return clone


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


__all__ = [
    "compiled_graph",
    "graph_bytes",
    "open_session",
    "optimized_graph",
    "run_feeds",
    "run_values",
    "sqnr_db",
    "weights_size_bytes",
]
