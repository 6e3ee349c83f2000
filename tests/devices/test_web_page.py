"""Chromium: the page of examples/web finds in a photograph what Python finds; and the devices."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tiny_language
import torch
from devices import bundles, web_page
from devices.test_check import require
from PIL import Image

import edgec
import edgec_runtime
from edgec.devices.check import Samples, verify_on
from edgec.errors import SourceError
from edgec_runtime.bundle import read_bundle
from edgec_runtime.golden import sqnr_db

sys.path.append(str(web_page.ROOT / "examples"))

pytestmark = pytest.mark.slow  # a browser starts for each, and a real model is built


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require("chromium-wasm")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """EfficientNet-Lite0 for web, as edgec builds it by default."""
    import efficientnet_lite0

    bundle = tmp_path_factory.mktemp("page") / "classifier.edgec"
    try:
        source = replace(efficientnet_lite0.build(), metric=None, evaluation=None)
        edgec.build(source, target="web", output=bundle, verify=False, keep_reference=False)
    except SourceError as error:
        pytest.skip(str(error))
    return bundle


@pytest.mark.parametrize("name", ["puppy", "Strawberry.512"])
def test_the_page_finds_what_python_finds(classifier: pathlib.Path, name: str) -> None:
    import photographs

    [path] = [p.path for p in photographs.labelled() if p.path.stem == name]
    found = web_page.classified(classifier, path)
    assert found["problems"] == [] and found["state"] == "ready"
    assert found["isolated"]  # threads are allowed
    model = edgec_runtime.load(classifier, threads=1, any_target=True)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    expected = model(**model.prepare_image(pixels))["logits"][0]
    best = np.argsort(-expected)[:5]
    assert [row["label"] for row in found["best"]] == [model.labels[i] for i in best]
    # the same pixels but for a few values that round the other way
    assert sqnr_db(expected, np.array(found["logits"])) > 45


def test_the_page_says_why_a_bundle_is_refused(tmp_path: pathlib.Path) -> None:
    found = web_page.classified(bundles.build("arm64", tmp_path), pathlib.Path("unused"))
    assert found["state"] == "failed"
    assert found["status"].startswith("the bundle was built for arm64 (arm64; linux, windows")


def test_the_page_writes_what_python_writes(tmp_path: pathlib.Path) -> None:
    tiny_language.save_language_model(tmp_path / "tiny")
    bundle = tmp_path / "tiny.web.edgec"
    edgec.build(
        tmp_path / "tiny", target="web", output=bundle, recipe="cleanup,fuse,lower", verify=False
    )
    model = edgec_runtime.load(bundle, threads=1, any_target=True)
    said = ["The quick brown fox", "What comes next?", "jumps " * 400]
    found = web_page.chatted(bundle, said, longest=60)
    assert found["problems"] == [] and found["state"] == "ready"
    assert found["isolated"]  # threads are allowed
    *answers, too_long = found["answers"]
    assert "the model has room for 512 together: shorten the prompt" in too_long["error"]
    messages: list[dict[str, str]] = []
    for words, answer in zip(said[:2], answers, strict=True):
        messages.append({"role": "user", "content": words})
        expected = model.generate(messages, max_new_tokens=60)
        assert answer["tokens"] == list(expected.tokens) and len(expected.tokens) > 20
        assert expected.text is not None and answer["reason"] == expected.reason == "length"
        # half a character at the end waits for the token that the page does not ask for
        assert answer["text"] == expected.text.removesuffix("\N{REPLACEMENT CHARACTER}")
        # the words came one after another: the page showed at least a third of the pieces alone
        assert answer["pieces"] > 20 and len(answer["shown"]) > answer["pieces"] / 3
        messages.append({"role": "assistant", "content": answer["text"]})


def test_a_bundle_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    serve = web_page.ROOT / "examples/web/serve.py"
    command = [sys.executable, str(serve), str(tmp_path / "no.edgec")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no.edgec: there is no such file" in done.stderr


@pytest.mark.parametrize("device", ["chromium-wasm", "chromium-webgpu"])
def test_a_bundle_passes_in_the_browser(device: str, tmp_path: pathlib.Path) -> None:
    bundle = bundles.build("web", tmp_path)
    [verdict] = verify_on(bundle, [device], Samples(tuple(bundles.samples()), 3))
    assert verdict.status == "passed", verdict.reason
    assert verdict.outcome is not None
    assert ("wasm_threads" in verdict.outcome.features) == (device == "chromium-wasm")


class Attention(torch.nn.Module):
    """Self-attention of two heads, 32 numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in "qkv")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [layer(x).view(1, -1, 2, 32).transpose(1, 2) for layer in self.project]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
        return mixed.transpose(1, 2).reshape(1, -1, 64)


def test_attention_is_right_on_webgpu(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    bundle = tmp_path / "attention.edgec"
    source = edgec.Source(Attention().eval(), (torch.randn(1, 32, 64),), input_names=("x",))
    edgec.build(source, target="web", output=bundle, recipe="cleanup,fuse,lower", verify=False)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 32, 64), np.float32)}
    [verdict] = verify_on(bundle, ["chromium-webgpu"], Samples((feeds,), 1))
    assert verdict.status == "passed", verdict.reason
    assert verdict.judgement is not None
    assert verdict.judgement.sqnr_db > 60  # 2 dB with the kernel MultiHeadAttention


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_quantized_rows_are_right_on_webgpu(tmp_path: pathlib.Path, scheme: str) -> None:
    torch.manual_seed(0)
    ids, bundle = torch.arange(0, 320, 5).reshape(4, 16), tmp_path / "table.edgec"
    edgec.build(
        edgec.Source(torch.nn.Embedding(320, 64).eval(), (ids,), input_names=("ids",)),
        target="web",
        output=bundle,
        recipe="cleanup,quantize-weights,lower",
        settings=[
            f"quantize-weights.{one}" for one in ("bits=4", "embedding_bits=4", f"scheme={scheme}")
        ],
        verify=False,
        keep_reference=False,  # compared with the bundle on this machine
    )
    graph = onnx.load_from_string(read_bundle(bundle).graph()).graph
    assert "GatherBlockQuantized" in {node.op_type for node in graph.node}
    [verdict] = verify_on(bundle, ["chromium-webgpu"], Samples(({"ids": ids.numpy()},), 1))
    assert verdict.status == "passed", verdict.reason
    assert verdict.judgement is not None
    assert verdict.judgement.sqnr_db > 100  # a product and a sum a number: nothing to round apart
