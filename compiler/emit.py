"""Model + target -> bundle, through the runtime's own definition of the format.

Small tensors stay in the graph, where ONNX Runtime's shape inference needs them; the large
ones go to ``weights.bin`` and are mapped from the bundle itself. Same model, same bytes.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

import edgec
from edgec.errors import ExportError
from edgec.language import Language
from edgec.passes.execution import graph_bytes, weights_size_bytes
from edgec.passes.lower_decoder import can_share_cache
from edgec.source import Source
from edgec.targets import Target
from edgec_runtime import bundle as format_
from edgec_runtime import manifest as parts
from edgec_runtime.adapters import SLOT
from edgec_runtime.generation import ENCODER, LOGITS_FROM, MAIN, Generation
from edgec_runtime.state import StatePair

_INLINE_BYTES = 1024  # tensors below stay in the graph
_MANIFEST_BYTES = 4096  # about; with the container's directory
_PROTOBUF_LIMIT = 1_500_000_000
_FILES = {MAIN: "graph.onnx", ENCODER: "encoder.onnx"}
_FOREIGN = "ai.onnxruntime.standard"  # stands in for operators that ONNX has no schema of


@dataclass(frozen=True)
class Layout:
    """Models in two pieces: the bytes of each graph by role, and the tensors of weights.bin.

    A tensor that several graphs or initializers share is there once.
    """

    graphs: Mapping[str, bytes]
    tensors: tuple[ir.TensorProtocol, ...]

    @property
    def graph(self) -> bytes:
        """The bytes of the graph main."""
        return self.graphs[MAIN]

    def chunks(self) -> Iterator[bytes]:
        """The bytes of every tensor, one in memory at a time."""
        for tensor in self.tensors:
            yield tensor.tobytes()

    @property
    def size_bytes(self) -> int:
        """Bytes of graphs and tensors, without padding."""
        graphs = sum(len(graph) for graph in self.graphs.values())
        return graphs + sum(tensor.nbytes for tensor in self.tensors)

    def digest(self) -> str:
        """sha256 over graphs and tensors."""
        digest = hashlib.sha256(b"".join(self.graphs.values()))
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def lay_out(model: ir.Model) -> Layout:
    """Separate the large tensors from the graph; the model itself is not changed."""
    return lay_out_roles({MAIN: model})


def lay_out_roles(models: Mapping[str, ir.Model]) -> Layout:
    """Separate the large tensors from the graphs, by role; the models are not changed."""
    clones = {role: model.clone() for role, model in models.items()}
    large: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for clone in clones.values():
        _open_slots(clone)
        large += _large_tensors(clone)
    unique = {id(tensor): tensor for _, tensor in large}
    offsets = format_.weight_offsets(tensor.nbytes for tensor in unique.values())
    places = dict(zip(unique, offsets, strict=True))
    for value, tensor in large:
        value.const_value = ir.ExternalTensor(
            location=format_.LOCATION,
            offset=format_.WEIGHTS_OFFSET + places[id(tensor)],
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=tensor.shape,  # type: ignore[arg-type]
            name=str(value.name),
        )
    graphs = {
        role: ir.to_proto(clone).SerializeToString(deterministic=True)
        for role, clone in clones.items()
    }
    return Layout(graphs, tuple(unique.values()))


def bundle_size_bytes(model: ir.Model) -> int:
    """About how large the bundle of a model is: without the golden sample and padding."""
    return format_.WEIGHTS_OFFSET + _MANIFEST_BYTES + lay_out(model).size_bytes


def _large_tensors(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """The initializers that go to weights.bin. Raises ExportError for one without data."""
    large = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise ExportError(f"initializer '{value.name}' has no data")
            if tensor.nbytes >= _INLINE_BYTES and tensor.dtype != ir.DataType.STRING:
                large.append((value, tensor))
    return large


def _open_slots(model: ir.Model) -> None:
    """Make inputs with defaults of what a device may fill: slots of adapters, LOGITS_FROM."""
    graph = model.graph
    for name, value in graph.initializers.items():
        if (name.startswith(SLOT) or name == LOGITS_FROM) and value not in graph.inputs:
            graph.inputs.append(value)


def emit(
    layout: Layout,
    manifest: parts.Manifest,
    path: pathlib.Path,
    files: Mapping[str, bytes],
) -> parts.Manifest:
    """Write the bundle; ``files`` are the golden sample, a tokenizer and other entries."""
    weights = format_.weight_chunks(layout.chunks())
    graphs = {manifest.graphs[role].file: data for role, data in layout.graphs.items()}
    return format_.write_bundle(path, manifest, weights=weights, files={**graphs, **files})


def make_manifest(
    models: Mapping[str, ir.Model],
    source: Source,
    target: Target,
    *,
    version: int,
    provenance: Mapping[str, Any],
    language: Language | None = None,
    state: Mapping[str, str] | None = None,
) -> parts.Manifest:
    """The manifest of a bundle before its golden sample and results are known.

    models: by role. language: of a language model. state: input -> output of a recurrent one.
    """
    graphs = {role: graph_entry(model, _FILES[role]) for role, model in models.items()}
    graph, session = graphs[MAIN], target.session
    return parts.Manifest(
        name=source.name,
        version=version,
        edgec=edgec.__version__,
        target=parts.Target(target.name, target.arch, target.os, target.features),
        onnxruntime=target.onnxruntime,
        opset=models[MAIN].opset_imports.get("", 1),
        ops=tuple(sorted({op for model in models.values() for op in operators(model)})),
        graphs=graphs,
        session=parts.Session(
            threads=session.threads,
            providers=session.providers,
            prepacking=session.prepacking,
            disabled_optimizers=session.disabled_optimizers,
            config=session.config,
            without=session.without,
        ),
        image=_image(source, graph),
        labels=source.labels,
        generation=None if language is None else _generation(language, models[MAIN]),
        state=_state(graph, state) if state else None,
        provenance=provenance,
    )


def _generation(language: Language, model: ir.Model) -> Generation:
    """How the decoder ``model`` is spoken to, with the kind of cache that its kernels allow."""
    return replace(
        language.generation,
        cache="shared" if can_share_cache(model) else "growing",
        logits_from=LOGITS_FROM if LOGITS_FROM in model.graph.initializers else None,
    )


def graph_entry(model: ir.Model, file: str = "graph.onnx") -> parts.Graph:
    """What a manifest says about a graph: its file in the bundle and its signature."""
    return parts.Graph(
        file=file,
        inputs=tuple(_value(v) for v in model.graph.inputs),
        outputs=tuple(_value(v) for v in model.graph.outputs),
    )


def operators(model: ir.Model) -> tuple[str, ...]:
    """Every operator that the model uses, as sorted ``domain::Op``; functions included."""
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    for function in model.functions.values():
        nodes += list(ir.traversal.RecursiveGraphIterator(function.graph))
    return tuple(sorted({f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in nodes}))


def save_reference(model: ir.Model, path: pathlib.Path) -> None:
    """Write the reference as .onnx, its weights beside it where protobuf cannot hold them."""
    if weights_size_bytes(model) <= _PROTOBUF_LIMIT:
        path.write_bytes(graph_bytes(model))
    else:
        ir.save(model.clone(), path, external_data=f"{path.name}.data")


def check_model(model: ir.Model) -> None:
    """The full ONNX checker on the model. Raises ExportError with its reason.

    Operators of ONNX Runtime's own domains are unknown to the checker and pass; so does
    what ONNX Runtime registers in the standard domain (SimplifiedLayerNormalization).
    """
    import onnx

    if weights_size_bytes(model) > _PROTOBUF_LIMIT:
        return  # the checker needs one protobuf; ONNX Runtime checks larger graphs at load
    proto = ir.to_proto(model)
    foreign = [n for n in proto.graph.node if n.domain == "" and not onnx.defs.has(n.op_type)]
    for node in foreign:
        node.domain = _FOREIGN
    if foreign:
        proto.opset_import.append(onnx.helper.make_opsetid(_FOREIGN, 1))
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"the graph is not valid ONNX: {reason}") from error


def _value(value: ir.Value) -> parts.Value:
    if value.dtype is None or value.name is None:
        raise ExportError(f"'{value.name}' has no dtype in the graph")
    dtype = "string" if value.dtype == ir.DataType.STRING else str(value.dtype.numpy())
    shape: list[int | str | None] = []
    for dim in value.shape or ():
        shape.append(dim if isinstance(dim, int) else (dim.value and str(dim.value)))
    return parts.Value(value.name, dtype, tuple(shape))


def _state(graph: parts.Graph, state: Mapping[str, str]) -> tuple[StatePair, ...]:
    inputs = {value.name: value for value in graph.inputs}
    return tuple(
        StatePair(name, output, inputs[name].dtype, inputs[name].shape)
        for name, output in state.items()
    )


def _image(source: Source, graph: parts.Graph) -> parts.Image | None:
    spec = source.image
    if spec is None:
        return None
    name = spec.input or graph.inputs[0].name
    inputs = {value.name: value for value in graph.inputs}
    if name not in inputs:
        raise ExportError(f"image.input is '{name}'; the model has {', '.join(inputs)}")
    return parts.Image(
        input=name,
        size=spec.size,
        crop=spec.crop,
        mean=spec.mean,
        std=spec.std,
        channels=spec.channels,
        layout=spec.layout,
        resize=spec.resize,
        dtype=inputs[name].dtype,  # type: ignore[arg-type]
    )
