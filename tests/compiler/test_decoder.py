"""Causal language models, from a Hugging Face directory to a bundle that speaks."""

import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_language
import torch
from fixtures import language

import edgec
import edgec_runtime
from edgec.decoder import LOGITS, MASK
from edgec.decoder_parity import check_decoding
from edgec.errors import DataError, ExportError, SourceError
from edgec.export import Exported, export
from edgec.recipe import model_kind
from edgec.report import Report
from edgec.shapes import input_specs
from edgec.source import load_source
from edgec.targets import load_target
from edgec_runtime.bundle import read_bundle
from edgec_runtime.errors import BundleError

PROMPTS = ([7, 100, 42], [3], [200, 201, 202, 203, 9, 9, 9, 250, 31])


@dataclass(frozen=True)
class Built:
    """A directory, the transformers model in it, and what became of it."""

    directory: pathlib.Path
    model: Any
    text: pathlib.Path
    report: Report

    def load(self) -> edgec_runtime.Model:
        return edgec_runtime.load(self.report.bundle_path)


def build(directory: pathlib.Path, output: pathlib.Path, **rest: Any) -> Report:
    options = {"target": "x86-64", "recipe": "cleanup,lower", **rest}
    return edgec.build(directory, output=output, verify=False, keep_reference=False, **options)


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def built(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_language.save_language_model(folder / "model", request.param)
    text = folder / "text.txt"
    text.write_text(tiny_language.TEXT * 8, encoding="utf-8")
    report = build(folder / "model", folder / "model.edgec", evaluation=text)
    return Built(folder / "model", model, text, report)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny_language.save_language_model(folder)
    return folder


@pytest.fixture(scope="module")
def exported(llama: pathlib.Path) -> Exported:
    """Nobody changes it."""
    return export(load_source(llama), load_target("x86-64"))


# --- the graph ----------------------------------------------------------------------------


def test_the_bundle_answers_as_transformers_does(built: Built) -> None:
    model = built.load()
    answers = [model.generate(ids, max_new_tokens=40).tokens for ids in PROMPTS]
    assert [list(a) for a in answers] == [language.greedy(built.model, ids, 40) for ids in PROMPTS]
    assert max(map(len, answers)) > 10


def test_a_left_padded_batch_answers_as_its_rows_alone(built: Built) -> None:
    model = built.load()
    together = model.generate(list(PROMPTS), max_new_tokens=30)
    alone = [model.generate(ids, max_new_tokens=30) for ids in PROMPTS]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_decoding_is_compared_with_transformers_step_by_step(built: Built) -> None:
    assert built.report.parity is not None
    assert built.report.parity.samples > 40  # 21 steps of a prompt and of a batch, and samples
    assert built.report.parity.sqnr_db > 80


def test_the_embedding_table_is_stored_once(built: Built) -> None:
    graph = onnx.load_from_string(read_bundle(built.report.bundle_path).graph()).graph
    rows = built.model.config.vocab_size
    tables = [list(t.dims) for t in graph.initializer if rows in t.dims]
    assert tables == [[rows, 64]]


def test_positions_and_past_are_open_and_the_rest_is_fixed(built: Built) -> None:
    inputs = {value.name: value.shape for value in built.load().inputs}
    past = inputs["past_key_values.0.key"]
    assert [isinstance(size, str) for size in past] == [True, False, True, False]
    assert all(isinstance(size, str) for size in inputs["position_ids"])


def test_an_error_of_the_mask_is_found(exported: Exported) -> None:
    """Single prompts do not show it: the left-padded batch does."""
    eager, specs = exported.eager, input_specs(exported.model)
    sizes = {"vocabulary": 293, "context_length": 64, "min_db": 60.0}

    def blind(feeds: Any) -> Any:
        return eager({**feeds, MASK: np.ones_like(feeds[MASK])})

    check_decoding(eager, eager, specs, **sizes)
    with pytest.raises(ExportError, match="left-padded batch, step 0"):
        check_decoding(blind, eager, specs, **sizes)


def test_an_error_of_the_cache_is_found(exported: Exported) -> None:
    eager, specs = exported.eager, input_specs(exported.model)

    def forgetful(feeds: Any) -> Any:
        outputs = eager(feeds)
        return {name: a if name == LOGITS else np.zeros_like(a) for name, a in outputs.items()}

    with pytest.raises(ExportError, match="single prompt, step 1"):
        check_decoding(forgetful, eager, specs, vocabulary=293, context_length=64, min_db=60.0)


def test_a_small_error_that_chooses_another_token_is_found(exported: Exported) -> None:
    """The scores agree within the limit; the token does not."""
    eager, specs = exported.eager, input_specs(exported.model)

    def other(feeds: Any) -> Any:
        outputs = dict(eager(feeds))
        scores = outputs[LOGITS] = outputs[LOGITS].copy()
        second = np.argsort(scores[0, -1])[-2]
        scores[0, -1, second] = scores[0, -1].max() + 0.001
        return outputs

    with pytest.raises(ExportError, match="another token than transformers: a single prompt"):
        check_decoding(other, eager, specs, vocabulary=293, context_length=64, min_db=20.0)


def test_eager_takes_an_empty_cache_and_a_full_one_alike(exported: Exported) -> None:
    """The cache goes in as transformers' own class: two steps equal one prompt."""
    step, prompt, _ = exported.examples
    whole = {**prompt, "input_ids": np.concatenate([prompt["input_ids"], step["input_ids"]], 1)}
    for name in ("attention_mask", "position_ids"):
        length = whole["input_ids"].shape[1]
        whole[name] = np.ones((1, length), np.int64)
    whole["position_ids"] = np.cumsum(whole["position_ids"], 1) - 1
    expected = exported.eager(whole)[LOGITS][:, -1]
    np.testing.assert_allclose(exported.eager(step)[LOGITS][:, -1], expected, atol=1e-4)


# --- what the bundle says ---------------------------------------------------------------------


def test_the_bundle_carries_what_it_takes_to_speak(built: Built) -> None:
    bundle = read_bundle(built.report.bundle_path)
    generation = bundle.manifest.generation
    assert generation is not None
    assert (generation.pad, generation.bos, generation.eos) == (0, 1, (2,))
    assert generation.context_length == 512
    assert generation.sampling.temperature == 0
    assert [pair.past for pair in generation.pairs][:2] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert bundle.read("chat_template.jinja").decode() == tiny_language.TEMPLATE
    assert generation.special_tokens["eos_token"] == "<eos>"
    text = "The quick brown fox"
    assert built.load().text.encode(text) == _transformers_ids(built.directory, text)


def _transformers_ids(directory: pathlib.Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(directory)(text).input_ids)


def test_the_cache_is_one_buffer_where_the_kernel_alone_reads_it(
    built: Built, tmp_path: pathlib.Path
) -> None:
    fused = read_bundle(built.report.bundle_path).manifest
    assert "com.microsoft::GroupQueryAttention" in fused.ops
    assert fused.generation is not None and fused.generation.cache == "shared"
    plain = build(built.directory, tmp_path / "plain.edgec", recipe="cleanup")
    generation = read_bundle(plain.bundle_path).manifest.generation
    assert generation is not None and generation.cache == "growing"
    whole = [edgec_runtime.memory_needed(r.bundle_path, 64).cache for r in (built.report, plain)]
    assert whole[1] == 2 * whole[0]
    answers = [edgec_runtime.load(r.bundle_path).generate([7, 9]) for r in (built.report, plain)]
    assert answers[0].tokens == answers[1].tokens


def test_a_prompt_gets_the_logits_of_its_last_token_alone(
    built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    shapes = []
    real = edgec_runtime.Model.run_bound

    def spied(self: edgec_runtime.Model, binding: Any) -> None:
        real(self, binding)
        shapes.append(binding.get_outputs_as_ortvaluevector()[0].shape())

    monkeypatch.setattr(edgec_runtime.Model, "run_bound", spied)
    plain = build(built.directory, tmp_path / "plain.edgec", recipe="cleanup")
    models = [built.load(), edgec_runtime.load(plain.bundle_path)]
    answers = [model.generate(PROMPTS[2], max_new_tokens=1).tokens for model in models]
    assert answers[0] == answers[1]
    assert [shape[1] for shape in shapes] == [1, 9]


def test_a_bundle_without_the_input_that_it_names_is_refused(
    built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("edgec.emit._open_slots", lambda model: None)  # no input is made of it
    with pytest.raises(BundleError, match="logits_from is 'logits_from', and the graph main has"):
        edgec_runtime.load(build(built.directory, tmp_path / "closed.edgec").bundle_path)


def test_sampling_is_what_generation_config_states(
    llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 7, "eos_token_id": [2, 3]}
    model.generation_config.update(**settings)
    model.save_pretrained(tmp_path)
    language = export(load_source(tmp_path), load_target("x86-64")).language
    assert language is not None
    sampling, eos = language.generation.sampling, language.generation.eos
    assert (sampling.temperature, sampling.top_k, sampling.top_p, eos) == (0.6, 7, 1.0, (2, 3))


def test_a_directory_without_a_tokenizer_gives_a_model_of_ids(tmp_path: pathlib.Path) -> None:
    model = tiny_language.save_language_model(tmp_path / "bare", tokenizer=False)
    report = build(tmp_path / "bare", tmp_path / "bare.edgec")
    assert any("no tokenizer" in finding for finding in report.findings)
    answer = edgec_runtime.load(report.bundle_path).generate([5, 6, 7], max_new_tokens=12)
    assert list(answer.tokens) == language.greedy(model, [5, 6, 7], 12) and answer.text is None
    (tmp_path / "text.txt").write_text(tiny_language.TEXT, encoding="utf-8")
    with pytest.raises(DataError, match="language model with a tokenizer"):
        build(tmp_path / "bare", tmp_path / "x.edgec", evaluation=tmp_path / "text.txt")


def test_a_broken_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    tiny_language.save_language_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(SourceError, match="its tokenizer cannot be loaded"):
        export(load_source(tmp_path), load_target("x86-64"))


def test_a_target_with_fixed_shapes_is_refused(llama: pathlib.Path) -> None:
    with pytest.raises(ExportError, match="cache grows with every token"):
        export(load_source(llama), load_target("qualcomm-npu"))


@pytest.mark.slow
def test_the_same_directory_gives_the_same_bytes(llama: pathlib.Path, tmp_path: Any) -> None:
    digests = {build(llama, tmp_path / f"{i}.edgec").bundle_sha256 for i in range(2)}
    assert len(digests) == 1


# --- judging and recipes ----------------------------------------------------------------------


def test_perplexity_is_that_of_transformers_on_the_same_windows(built: Built) -> None:
    ids = _transformers_ids(built.directory, built.text.read_text(encoding="utf-8"))
    windows = [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]
    losses = []
    with torch.no_grad():
        for window in windows:
            given = torch.tensor([window])
            losses.append(float(built.model(given, labels=given).loss))
    metric = built.report.metric
    assert metric is not None and metric.name == "perplexity"
    expected = float(np.exp(np.mean(losses)))
    assert metric.reference == pytest.approx(expected, rel=1e-4)  # float noise of another runtime
    assert metric.bundle == pytest.approx(expected, rel=1e-4)
    judged = f"{len(windows)} windows of 256 tokens, {255 * len(windows)} of them judged"
    assert judged in built.report.judged_on
    assert built.report.agreement_rule == "same next token" and built.report.agreement == 1.0


def test_without_data_float32_loses_nothing(llama: pathlib.Path, tmp_path: Any) -> None:
    report = build(llama, tmp_path / "b.edgec", recipe="cleanup,fuse,lower")
    assert report.samples == 2  # a step and a prompt, no made-up past of a padded row
    assert report.sqnr_db > 80  # where the kernel rotates keys, such a row alone leaves 20 dB


@pytest.mark.slow
def test_by_default_a_decoder_has_weights_of_8_bits(built: Built, tmp_path: Any) -> None:
    report = build(
        built.directory, tmp_path / "a", target="arm64", recipe=None, evaluation=built.text
    )
    found = {step.name: step.parameters for step in report.steps}
    assert found["quantize-weights"]["bits"] == 8
    assert report.metric is not None
    # random weights predict nothing: int8 is as good; four bits are not
    assert report.metric.bundle == pytest.approx(report.metric.reference, rel=0.05)
    assert report.size_bytes < 0.8 * built.report.size_bytes
    smaller = build(
        built.directory,
        tmp_path / "b",
        target="arm64",
        recipe="cleanup,quantize-weights,lower",
        settings=("quantize-weights.bits=4", "quantize-weights.method=rtn"),
        evaluation=built.text,
    )
    assert smaller.size_bytes < report.size_bytes
    assert smaller.sqnr_db < report.sqnr_db and smaller.metric is not None


def test_a_decoder_is_a_kind_of_its_own(exported: Exported) -> None:
    assert model_kind(exported.model) == "decoder"


def test_eager_names_its_cache_as_the_graph_does(exported: Exported) -> None:
    assert set(exported.eager(exported.examples[0])) == {
        str(value.name) for value in exported.model.graph.outputs
    }
