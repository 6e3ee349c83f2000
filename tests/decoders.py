"""Tiny decoders of fixed random weights, as optimum exports them, and conversations with them."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes import Cleanup, Context, Fuse
from edgec.passes.execution import open_session, run_feeds
from edgec.targets import load_target

if TYPE_CHECKING:
    import torch

STEPS = 20
WORDS = 97


def llama(**options: object) -> torch.nn.Module:
    """Two layers, 4 query heads for 2 key heads of 16, tied embeddings, RMSNorm, gated FFN."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": WORDS,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "attention_bias": True,
            **options,
        }
    )
    return _random(LlamaForCausalLM, config)


def mistral(**options: object) -> torch.nn.Module:
    """The same with attention to the last ``sliding_window`` positions only."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **options,
    )
    return _random(MistralForCausalLM, config)


def qwen3() -> torch.nn.Module:
    """Llama's class with RMSNorm of the queries and keys of each head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    return _random(Qwen3ForCausalLM, config)


def gpt2() -> torch.nn.Module:
    """Two layers, 4 heads of 16, learned positions, LayerNorm, packed projections."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_positions=128, n_embd=64, n_layer=2, n_head=4, n_inner=96
    )
    return _random(GPT2LMHeadModel, config)


def _random(cls: type, config: object) -> torch.nn.Module:
    import torch

    torch.manual_seed(0)
    module = cls(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:  # biases of 0 and norms of 1 would hide mistakes
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
    return module.eval()


MODELS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen3": qwen3,
    "window of 5": lambda: mistral(sliding_window=5),
    "a key head for each": lambda: llama(num_key_value_heads=4, attention_bias=False),
    "stretched positions": lambda: llama(rope_scaling={"rope_type": "linear", "factor": 4.0}),
}


@functools.cache
def cleaned(kind: str) -> ir.Model:
    """One of ``MODELS``, exported, cleaned and fused. Not to be changed: clone it."""
    with tempfile.TemporaryDirectory() as folder:
        model = exported(MODELS[kind](), pathlib.Path(folder))
    for step in (Cleanup(), Fuse()):
        model = step.run(model, Context(load_target("x86-64"), model)).model
    return model


def exported(module: torch.nn.Module, folder: pathlib.Path) -> ir.Model:
    """The graph with past that optimum makes, weights in memory, tied ones stored once."""
    from optimum.exporters.onnx import onnx_export_from_model

    from edgec.export_decoder import share_tables

    onnx_export_from_model(
        module,
        folder,
        library_name="transformers",
        opset=18,
        task="text-generation-with-past",
        do_validation=False,
        no_post_process=True,
    )
    model = ir.load(folder / "model.onnx")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    share_tables(model)
    return model


def padded(kind: str, length: int = 9, words: int = WORDS) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask of a prompt: one row, or three of which two are padded."""
    random = np.random.default_rng(5)
    rows = 1 if kind == "single" else 3
    shown = np.ones((rows, length), np.int64)
    if kind == "left":
        shown[1, :1] = shown[2, :4] = 0
    elif kind == "right":
        shown[1, -1:] = shown[2, -4:] = 0
    return random.integers(0, words, (rows, length)), shown


def converse(
    model: ir.Model, ids: np.ndarray, shown: np.ndarray, *, steps: int = STEPS
) -> list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """A prompt and ``steps`` tokens of a fixed seed, each with the caches of the run before.

    Of each run: the shown positions bool [batch, new], the logits, the caches.
    """
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name: i.shape for i in session.get_inputs()}
    batch, random = len(ids), np.random.default_rng(6)
    past = {
        name: np.zeros((batch, shape[1], 0, shape[3]), np.float32)
        for name, shape in wanted.items()
        if name.startswith("past_key_values.")
    }
    found = []
    for step in range(steps + 1):
        if step:
            ids = random.integers(0, WORDS, (batch, 1))
            shown = np.concatenate([shown, np.ones((batch, 1), np.int64)], axis=1)
        new = ids.shape[1]
        positions = np.where(shown == 1, shown.cumsum(axis=1) - 1, 1)[:, -new:]
        feeds = {"input_ids": ids, "attention_mask": shown, "position_ids": positions, **past}
        values = dict(zip(names, run_feeds(session, feeds), strict=True))
        past = {name: values[name.replace("past_key_values", "present")] for name in past}
        found.append((shown[:, -new:] == 1, values["logits"], past))
    return found


def converse_shared(
    model: ir.Model, ids: np.ndarray, shown: np.ndarray, *, capacity: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same conversation with one buffer for past and present: shown positions, logits."""
    import onnxruntime

    session, random, batch = open_session(model), np.random.default_rng(6), len(ids)
    buffers = {
        i.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((batch, i.shape[1], capacity, i.shape[3]), np.float32)
        )
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    wanted = {i.name for i in session.get_inputs()} - set(buffers)
    found = []
    for step in range(STEPS + 1):
        if step:
            ids = random.integers(0, WORDS, (batch, 1))
            shown = np.concatenate([shown, np.ones((batch, 1), np.int64)], axis=1)
        new = ids.shape[1]
        positions = np.where(shown == 1, shown.cumsum(axis=1) - 1, 1)[:, -new:].copy()
        binding = session.io_binding()
        feeds = {"input_ids": ids, "attention_mask": shown, "position_ids": positions}
        for name in wanted:
            binding.bind_cpu_input(name, feeds[name])
        for name, value in buffers.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        found.append((shown[:, -new:] == 1, binding.get_outputs()[-1].numpy()))
    return found


def largest_difference(
    first: Sequence[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]],
    second: Sequence[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]],
) -> float:
    """Largest difference of logits and caches at shown positions of two conversations.

    Relative to the largest number of the first one's array.
    """
    worst, slots = 0.0, np.zeros((len(first[0][0]), 0), bool)
    for (shown, logits, cache), (_, other_logits, other_cache) in zip(first, second, strict=True):
        slots = np.concatenate([slots, shown], axis=1)
        pairs = [(logits[shown], other_logits[shown])]
        for name, array in cache.items():
            rows = array.transpose(0, 2, 1, 3)[slots]
            pairs.append((rows, other_cache[name].transpose(0, 2, 1, 3)[slots]))
        for a, b in pairs:
            assert a.shape == b.shape and np.isfinite(a).all()
            worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
    return worst
