"""Tiny language models with random weights and a tokenizer of their own, for the tests."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

import torch

TEXT = (
    "The quick brown fox jumps over the lazy dog. A model that was trained well says what comes "
    "next; this one was not trained, so that it says anything. Tokens are pieces of words. "
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>")
_SIZE = 64  # of the hidden states
_CONTEXT = 512


def save_language_model(
    into: pathlib.Path, kind: Literal["llama", "gpt2"] = "llama", *, tokenizer: bool = True
) -> Any:
    """Save a causal language model to a folder as transformers does; returns the model.

    Two layers, 320 tokens at most, embedding and head tied; biases are not zero. llama: two heads
    of keys for four of queries.
    """
    import transformers

    torch.manual_seed(0)
    trained = make_tokenizer()
    ids = {"bos_token_id": trained.bos_token_id, "eos_token_id": trained.eos_token_id}
    shared = {"vocab_size": len(trained), "tie_word_embeddings": True, "pad_token_id": 0, **ids}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=_SIZE,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=_CONTEXT,
            **shared,
        )
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            n_embd=_SIZE, n_layer=2, n_head=4, n_positions=_CONTEXT, **shared
        )
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if name.endswith("bias") else 0.3
            if parameter.ndim == 1 and not name.endswith("bias"):  # gains of norms
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, spread)
    model.eval().save_pretrained(into)
    if tokenizer:
        trained.save_pretrained(into)
    return model


def make_tokenizer() -> Any:
    """Byte-level pairs, trained on a sentence or two."""
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )
