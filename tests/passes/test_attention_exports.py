"""Attention as real exporters write it is found, proven and computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgec.passes import Cleanup, Context, Fuse
from edgec.passes.equivalence import largest_error, padded_variants
from edgec.passes.lower_attention import lower_attention
from edgec.targets import load_target

FLOAT_NOISE = 1e-5  # the kernel sums in another order
WIDTH, HEADS, LAYERS = 32, 4, 2


class Masked(nn.Module):
    """An encoder that is told by a boolean mask what to ignore."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=padding_mask)


class Packed(nn.Module):
    """Queries, keys and values from one product, as timm's vision transformers make them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        scores = (q * (width // HEADS) ** -0.5) @ k.transpose(-2, -1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


def encoder(**options: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, activation="gelu", **options)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def inputs(batch: int, length: int, *, masked: bool) -> tuple[torch.Tensor, ...]:
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[-1, length - 2 :] = True
    return (x, mask) if masked else (x,)


def exported(module: nn.Module, *, masked: bool, tmp_path) -> ir.Model:
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1:  # zero biases would be folded away
            nn.init.normal_(parameter, 1.0, 0.2)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    example = inputs(2, 9, masked=masked)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        module.eval(),
        example,
        path,
        dynamo=True,
        external_data=False,
        input_names=["x", "padding_mask"][: len(example)],
        dynamic_shapes=[dims] * len(example),
        verbose=False,
    )
    return ir.load(path)


CASES = {
    "sequence first": (lambda: encoder(), False, LAYERS),
    "batch first": (lambda: encoder(batch_first=True), False, LAYERS),
    "pre-norm, padding mask": (
        lambda: Masked(encoder(batch_first=True, norm_first=True)),
        True,
        LAYERS,
    ),
    "packed projection": (Packed, False, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_attention_of_an_exported_encoder_is_rewritten(case, tmp_path):
    make, masked, count = CASES[case]
    torch.manual_seed(0)
    reference = exported(make(), masked=masked, tmp_path=tmp_path)
    context = Context(load_target("x86-64"), reference.clone())
    model = Fuse().run(Cleanup().run(reference.clone(), context).model, context).model
    result = lower_attention(model, context)
    assert result.changed == count, result.skipped
    assert "Softmax" not in {node.op_type for node in result.model.graph}
    names = [value.name for value in reference.graph.inputs]
    for batch, length in ((1, 5), (3, 12)):  # other sizes than those of the proof
        arrays = [t.numpy() for t in inputs(batch, length, masked=masked)]
        feeds = dict(zip(names, arrays, strict=True))
        assert np.isfinite(arrays[0]).all()
        assert largest_error(reference, result.model, [feeds]) < FLOAT_NOISE


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_a_hugging_face_directory_is_rewritten(attention, tmp_path):
    """optimum's TorchScript export: the scale comes out of Shape, the mask from Where."""
    pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed")
    from transformers import BertConfig, BertModel

    from edgec.export_huggingface import export_directory

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=64,
        attn_implementation=attention,
    )
    BertModel(config).save_pretrained(tmp_path)
    target = load_target("x86-64")
    found = export_directory(tmp_path, target)
    context = Context(target, found.model.clone())
    model = Fuse().run(Cleanup().run(found.model.clone(), context).model, context).model
    result = lower_attention(model, context)
    assert result.changed == LAYERS, result.skipped
    samples = padded_variants(found.model, found.examples[0])
    assert len(samples) == 3
    assert largest_error(found.model, result.model, samples) < FLOAT_NOISE
