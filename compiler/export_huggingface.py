"""A local Hugging Face directory -> reference, through optimum's exporters.

optimum picks the task from the configuration and knows the inputs of every architecture.
Nothing is downloaded. A causal language model becomes one graph, a decoder with past that takes
prompts with an empty cache; tokenizer and chat template are read with it. So does an
encoder-decoder, which torch traces (``edgec.export_encoder_decoder``). A directory of
sentence-transformers becomes transformer, pooling and normalisation in one graph
(``edgec.sentence_embedding``).
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.decoder import MASK, is_decoder_graph
from edgec.errors import ExportError, SourceError
from edgec.export import Exported, _cause, _quiet
from edgec.export_decoder import decoder_examples, eager_decoder, share_tables
from edgec.export_encoder_decoder import (
    eager_encoder_decoder,
    encoder_decoder_examples,
    encoder_feeds,
    trace,
)
from edgec.language import Text, make_language, read_text
from edgec.sentence_embedding import (
    EMBEDDING,
    HIDDEN,
    add_head,
    read_head,
    torch_embedding,
)
from edgec.shapes import input_specs
from edgec.targets import Target

_EXPORT_OPSET = 18  # what optimum's exporter supports for every architecture
_FEATURES = "feature-extraction"
_GENERATION, _WITH_PAST = "text-generation", "text-generation-with-past"
_ENCODER_DECODER = ("text2text-generation", "automatic-speech-recognition")


def export_directory(path: pathlib.Path, target: Target) -> Exported:
    """The reference of the model in ``path``, with example feeds from optimum's generators."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    head = read_head(path)
    if head is not None:
        path = head.folder
    with _quiet(), tempfile.TemporaryDirectory(prefix="edgec-export-") as folder:
        try:
            from optimum.exporters.onnx import onnx_export_from_model
            from optimum.exporters.tasks import TasksManager

            task, encodes = _task(path) if head is None else (_FEATURES, False)
        except Exception as error:
            raise _not_loaded(path, error) from error
        decodes = encodes or task == _WITH_PAST
        if decodes and target.static_shapes:  # told before the minutes of an export
            raise ExportError(
                f"{path}: a decoder's cache grows with every token, and target {target.name} needs "
                "fixed shapes; choose a target that has none (`edgec targets`)"
            )
        text = read_text(path) if decodes else Text()
        try:
            module = TasksManager.get_model_from_task(
                task,
                str(path),
                framework="pt",
                library_name="transformers",
                local_files_only=True,
            ).eval()
        except Exception as error:
            raise _not_loaded(path, error) from error
        if encodes:
            return _encoder_decoder(path, module, text, target)
        try:
            onnx_export_from_model(
                module,
                folder,
                library_name="transformers",
                opset=min(_EXPORT_OPSET, target.opset),
                task=task,
                do_validation=False,
                no_post_process=True,
            )
        except Exception as error:
            raise ExportError(f"{path}: optimum cannot export it: {_cause(error)}") from error
        files = sorted(pathlib.Path(folder).rglob("*.onnx"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ExportError(
                f"{path}: the task '{task}' exports {len(files)} graphs ({names}); a bundle of "
                "this version holds one"
            )
        model = ir.load(files[0])
        _into_memory(model)
        if is_decoder_graph(model):
            return _decoder(module, model, text)
        feeds = _dummy_feeds(module, task, model)
        if head is not None:
            add_head(model, head)

    def eager(given: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        tensors = {k: torch.from_numpy(np.array(v)) for k, v in given.items()}
        with torch.no_grad():
            result = module(**tensors)
            if head is not None:
                result = {EMBEDDING: torch_embedding(head, result[HIDDEN], tensors[MASK])}
        return {
            str(o.name): result[str(o.name)].detach().numpy()
            for o in model.graph.outputs
            if o.name in result
        }

    can_compare = not any("past" in str(v.name) for v in model.graph.inputs)
    if can_compare:
        produced = eager(feeds)
        can_compare = all(str(o.name) in produced for o in model.graph.outputs)
    findings: tuple[str, ...] = (f"exported by optimum for the task '{task}'",)
    if head is not None:
        findings += (head.finding,)
    if not can_compare:
        findings += ("parity with eager transformers was not measured for this task",)
    return Exported(model, (feeds,), eager if can_compare else None, None, findings)


def _not_loaded(path: pathlib.Path, error: Exception) -> SourceError:
    return SourceError(
        f"{path}: not a Hugging Face model that transformers can load: {_cause(error)}"
    )


def _decoder(module: Any, model: ir.Model, text: Text) -> Exported:
    """The reference of a causal language model, with what makes it speak."""
    shared = share_tables(model)
    language = make_language(text, module, model)
    eager = eager_decoder(module)
    examples = decoder_examples(
        eager,
        input_specs(model),
        vocabulary=language.vocabulary,
        context_length=language.generation.context_length,
    )
    findings = (f"exported by optimum for the task '{_WITH_PAST}'", *language.findings)
    if shared:
        findings += ("the output layer shares the embedding table, which is stored once",)
    return Exported(model, examples, eager, None, findings, language)


def _encoder_decoder(path: pathlib.Path, module: Any, text: Text, target: Target) -> Exported:
    """The reference of an encoder-decoder, with what makes it speak."""
    encoder_feeds(module, 1, 1)  # refuses a model that reads something else
    module.set_attn_implementation("eager")
    try:
        model = trace(module, target.opset)
    except Exception as error:
        raise ExportError(f"{path}: torch cannot trace it: {_cause(error)}") from error
    shared = share_tables(model)
    language = make_language(text, module, model)
    eager = eager_encoder_decoder(module)
    examples = encoder_decoder_examples(
        module, eager, input_specs(model), vocabulary=language.vocabulary
    )
    findings = (
        "the bundle holds two graphs: the encoder, which runs once for a prompt, and the decoder "
        "with its cache; latencies are of the encoder and one step together",
        *language.findings,
    )
    if shared:
        findings += ("the output layer shares the embedding table, which is stored once",)
    return Exported(model, examples, eager, None, findings, language)


def _task(path: pathlib.Path) -> tuple[str, bool]:
    """The task of the class that config.json names, and whether it is an encoder-decoder's.

    A bare encoder gives features.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        return _FEATURES, False
    task = str(TasksManager.infer_task_from_model(architecture))
    encodes = bool(config.is_encoder_decoder) and task in _ENCODER_DECODER
    return _WITH_PAST if task == _GENERATION else task, encodes


def _dummy_feeds(module: Any, task: str, model: ir.Model) -> dict[str, np.ndarray[Any, Any]]:
    """Feeds of optimum's dummy input generators: right names, shapes and value ranges."""
    from optimum.exporters.tasks import TasksManager

    constructor = TasksManager.get_exporter_config_constructor(
        exporter="onnx", model=module, task=task, library_name="transformers"
    )
    dummies = constructor(module.config).generate_dummy_inputs(framework="np")
    feeds = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name not in dummies or value.dtype is None:
            raise ExportError(
                f"optimum has no example for input '{name}'; export it to .onnx first"
            )
        feeds[name] = np.asarray(dummies[name]).astype(value.dtype.numpy())
    return feeds


def _into_memory(model: ir.Model) -> None:
    """Load external tensors: their files are about to be removed."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)
