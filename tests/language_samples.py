"""Small language models as bundles: one made of ONNX nodes, and exports of transformers.

The tokenizer has one token per byte, then the special tokens ``<s>``, ``</s>``, ``<user>`` and
``<model>``.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from typing import Any

import numpy as np
import onnx
from bundle_samples import external_tensor, onnx_bytes, sample_manifest
from onnx import helper, numpy_helper

from edgec_runtime import bundle, manifest
from edgec_runtime.generation import CachePair, Generation

Array = np.ndarray[Any, Any]

VOCABULARY, BOS, EOS, USER, MODEL = 260, 256, 257, 258, 259
HEADS, HEAD_SIZE, CONTEXT = 2, 16, 96
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<user>"
    "{% else %}<model>{% endif %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def tokenizer() -> Any:
    """Byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<user>", "<model>"])
    return made


def section(**changes: Any) -> Generation:
    """The manifest's section for the model of ``write_decoder``."""
    fields: dict[str, Any] = {
        "ids": "ids",
        "mask": "mask",
        "positions": None,
        "logits": "logits",
        "pairs": (CachePair("past.key", "key"), CachePair("past.value", "value")),
        "cache": "growing",
        "eos": (EOS,),
        "pad": 0,
        "bos": BOS,
        "context_length": CONTEXT,
        "tokenizer": "tokenizer.json",
        "chat_template": "chat_template.jinja",
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    return Generation(**fields | changes)


def text_files() -> dict[str, bytes]:
    """The entries of tokenizer and chat template."""
    return {
        "tokenizer.json": tokenizer().to_str().encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


def write_decoder(
    path: pathlib.Path,
    generation: Generation | None = None,
    *,
    capacity: int | str = "past",
    scale: float = 1.0,
    noise: float = 0.0,
    files: dict[str, bytes] | None = None,
) -> pathlib.Path:
    """A bundle of one attention layer between an embedding and a head.

    GroupQueryAttention reads growing past tensors as well as buffers that it writes in place.
    capacity: the past's length in the signature. scale: of the scores.
    noise: of its head, for a model that often, not always, takes the same token.
    """
    graph = decoder_graph(capacity, scale, noise)
    return write_onnx(path, graph, generation or section(), files)


def decoder_graph(
    capacity: int | str = "past", scale: float = 1.0, noise: float = 0.0
) -> onnx.ModelProto:
    """Embedding, GroupQueryAttention with rotary positions, and a head."""
    random, width = np.random.default_rng(0), HEADS * HEAD_SIZE
    half = HEAD_SIZE // 2
    angles = np.arange(2 * CONTEXT)[:, None] / 100.0 ** (np.arange(half) / half)
    table = random.standard_normal((VOCABULARY, width), dtype=np.float32)
    arrays = {
        "table": table,
        "head": random.standard_normal((width, VOCABULARY), dtype=np.float32) * np.float32(scale),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "one": np.array(1, np.int64),
        "axis": np.array([1], np.int64),
    }
    for name in "qkvo":
        arrays[f"w{name}"] = random.standard_normal((width, width), dtype=np.float32) / 2
    arrays["head"] += np.float32(noise) * random.standard_normal(arrays["head"].shape, "f4")
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["x"]),
        *(node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"),
        node("ReduceSum", ["mask", "axis"], ["tokens"], keepdims=0),
        node("Sub", ["tokens", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens"], to=onnx.TensorProto.INT32),
        node("Shape", ["mask"], ["mask_shape"]),
        node("Gather", ["mask_shape", "one"], ["length"]),
        node("Cast", ["length"], ["total"], to=onnx.TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["q", "k", "v", "past.key", "past.value", "seqlens", "total", "cos", "sin"],
            ["attended", "key", "value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=HEADS,
            do_rotary=1,
        ),
        node("MatMul", ["attended", "wo"], ["mixed"]),
        node("Add", ["x", "mixed"], ["hidden"]),
        node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    info, integer, real = helper.make_tensor_value_info, 7, 1
    past, present = ["batch", HEADS, capacity, HEAD_SIZE], ["batch", HEADS, "present", HEAD_SIZE]
    inputs = [
        info("ids", integer, ["batch", "new"]),
        info("mask", integer, ["batch", "total"]),
        info("past.key", real, past),
        info("past.value", real, past),
    ]
    outputs = [
        info("logits", real, ["batch", "new", VOCABULARY]),
        info("key", real, present),
        info("value", real, present),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = onnx.ModelProto.FromString(onnx_bytes(nodes, inputs, outputs, tensors))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def write_onnx(
    path: pathlib.Path,
    model: onnx.ModelProto,
    generation: Generation | None,
    files: dict[str, bytes] | None = None,
) -> pathlib.Path:
    """A bundle of any model; tensors from 1 KiB up lie outside of its graph."""
    large = [t for t in model.graph.initializer if len(t.raw_data) >= 1024]
    arrays = [numpy_helper.to_array(tensor) for tensor in large]
    offsets = bundle.weight_offsets(array.nbytes for array in arrays)
    for tensor, array, offset in zip(large, arrays, offsets, strict=True):
        outside = external_tensor(
            tensor.name, array.shape, bundle.WEIGHTS_OFFSET + offset, array.nbytes
        )
        outside.data_type = tensor.data_type
        tensor.CopyFrom(outside)
    graph = manifest.Graph("graph.onnx", _values(model.graph.input), _values(model.graph.output))
    bundle.write_bundle(
        path,
        sample_manifest(graphs={"main": graph}, generation=generation),
        weights=bundle.weight_chunks(array.tobytes() for array in arrays),
        files={"graph.onnx": model.SerializeToString()} | text_files() | (files or {}),
    )
    return path


def _values(infos: Any) -> tuple[manifest.Value, ...]:
    return tuple(
        manifest.Value(
            info.name,
            np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)).name,
            tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param
                for dim in info.type.tensor_type.shape.dim
            ),
        )
        for info in infos
    )


def tiny_transformers_model(kind: str) -> Any:
    """A random Llama- or GPT-2-like model whose scores differ clearly."""
    import torch
    import transformers

    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
            initializer_range=0.3, **ends,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT,
            initializer_range=0.3, **ends,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def write_export(path: pathlib.Path, model: Any) -> pathlib.Path:
    """A bundle of optimum's export of a causal language model, with a growing cache."""
    from optimum.exporters.onnx import onnx_export_from_model

    folder = path.with_suffix(".export")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        onnx_export_from_model(
            model, folder, opset=18, task="text-generation-with-past", do_validation=False,
            no_post_process=True,
        )  # fmt: skip
    exported = onnx.load(folder / "model.onnx")
    names = [value.name for value in exported.graph.input]
    past = [name for name in names if name.startswith("past_key_values")]
    generation = section(
        ids="input_ids",
        mask="attention_mask",
        positions="position_ids" if "position_ids" in names else None,
        pairs=tuple(CachePair(n, n.replace("past_key_values", "present")) for n in past),
        eos=(),
        bos=None,
    )
    return write_onnx(path, exported, generation)
