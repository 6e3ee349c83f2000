"""Encoder-decoders, from a Hugging Face directory to a bundle of two graphs that answers."""

import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_encoder_decoder as tiny

import edgec
import edgec_runtime
from edgec.cut import cut, run_parts
from edgec.data import open_data
from edgec.decoder import DECODER_IDS, IDS, LOGITS, MASK, PAST, completed
from edgec.decoder_parity import check_decoding
from edgec.errors import DataError, ExportError
from edgec.export import Exported, export
from edgec.export_encoder_decoder import eager_encoder_decoder, encoder_decoder_examples
from edgec.recipe import model_kind
from edgec.report import Report
from edgec.runners import reference_runner
from edgec.shapes import input_specs
from edgec.source import load_source
from edgec.targets import load_target
from edgec_runtime.bundle import read_bundle

pytestmark = pytest.mark.slow  # each model takes half a minute to export

TEXTS = ([7, 100, 42, 2], [3, 2], [200, 201, 202, 203, 9, 9, 9, 250, 31, 2])
PROMPTS: dict[str, Any] = {"whisper": tiny.features(3), "t5": list(TEXTS)}


@dataclass(frozen=True)
class Built:
    """A directory, the transformers model in it, and what became of it."""

    kind: str
    directory: pathlib.Path
    model: Any
    report: Report

    def load(self) -> edgec_runtime.Model:
        return edgec_runtime.load(self.report.bundle_path)


def build(directory: pathlib.Path, output: pathlib.Path, **rest: Any) -> Report:
    options = {"target": "x86-64", "recipe": "cleanup,fuse,lower", **rest}
    return edgec.build(directory, output=output, verify=False, **options)


def samples_of(kind: str) -> Any:
    """Four prompts and answers of random ids."""
    for row in range(4):
        random = np.random.default_rng(row)
        ids = {DECODER_IDS: random.integers(3, 290, (1, 6))}
        if kind == "whisper":
            yield {"input_features": tiny.features(1, row), **ids}
        else:
            yield {IDS: np.array([TEXTS[row % 3]]), **ids}


@pytest.fixture(scope="module")
def build_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """The bundle of a kind, built once, judged on ``samples_of``."""

    @functools.cache
    def built(kind: str) -> Built:
        folder = tmp_path_factory.mktemp(kind)
        model = {"whisper": tiny.save_whisper, "t5": tiny.save_t5}[kind](folder / "model")
        data = functools.partial(samples_of, kind)
        report = build(folder / "model", folder / "model.edgec", evaluation=data)
        return Built(kind, folder / "model", model, report)

    return built


@pytest.fixture(scope="module", params=["whisper", "t5"])
def built(request: pytest.FixtureRequest, build_of: Callable[[str], Built]) -> Built:
    return build_of(request.param)


@pytest.fixture(scope="module")
def exported(build_of: Callable[[str], Built]) -> Exported:
    """A T5, as the reference that its build left; nobody changes it."""
    t5 = build_of("t5")
    model = ir.load(pathlib.Path(t5.report.bundle_path).with_suffix(".reference.onnx"))
    eager = eager_encoder_decoder(t5.model)
    specs = input_specs(model)
    examples = encoder_decoder_examples(t5.model, eager, specs, vocabulary=320)
    return Exported(model, examples, eager)


# --- answers ------------------------------------------------------------------------------


def test_the_bundle_answers_as_transformers_does(built: Built) -> None:
    model, given = built.load(), PROMPTS[built.kind]
    answers = [list(model.generate(one, max_new_tokens=30).tokens) for one in given]
    expected = [
        tiny.greedy(built.model, one[None] if built.kind == "whisper" else [one], 30)[0]
        for one in given
    ]
    assert answers == expected
    assert max(map(len, answers)) > 10 and len(set(answers[0])) > 3


def test_a_batch_answers_as_its_rows_alone_and_as_transformers(built: Built) -> None:
    model, given = built.load(), PROMPTS[built.kind]
    together = model.generate(given, max_new_tokens=20)
    alone = [model.generate(one, max_new_tokens=20) for one in given]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [list(a.tokens) for a in together] == tiny.greedy(built.model, given, 20)


def test_a_quantized_bundle_answers_too(built: Built, tmp_path: pathlib.Path) -> None:
    """Both graphs go through the passes: their weights are integers."""
    report = build(built.directory, tmp_path / "q", recipe="cleanup,fuse,quantize-weights,lower")
    assert report.sqnr_db > 20
    bundle = read_bundle(report.bundle_path)
    for role in ("encoder", "main"):
        graph = onnx.load_from_string(bundle.graph(role)).graph
        assert any(t.data_type in (2, 3) and len(t.dims) > 1 for t in graph.initializer), role
    model = edgec_runtime.load(report.bundle_path)
    answer = model.generate(PROMPTS[built.kind][0], max_new_tokens=5)
    assert len(answer.tokens) > 0
    assert model.self_test().passed


def test_text_goes_in_and_comes_out(built: Built) -> None:
    model = built.load()
    if built.kind == "t5":
        prompt: Any = "The quick brown fox"
        ids = model.text.encode(prompt)
    else:
        prompt = ids = PROMPTS["whisper"][0]
    answer = model.generate(prompt, max_new_tokens=12)
    assert answer.text == model.text.decode(answer.tokens)
    assert answer.tokens == model.generate(ids, max_new_tokens=12).tokens
    assert "".join(model.generate(prompt, max_new_tokens=12, stream=True)) == answer.text


# --- the bundle ---------------------------------------------------------------------------


def test_both_graphs_are_compared_with_transformers_step_by_step(built: Built) -> None:
    assert built.report.parity is not None
    assert built.report.parity.samples > 40  # 21 steps of a prompt and of a batch, and samples
    assert built.report.parity.sqnr_db > 80


def test_a_step_computes_nothing_that_depends_on_the_prompt_alone(built: Built) -> None:
    """No weight of the cross-attention's keys and values is left in main."""
    bundle = read_bundle(built.report.bundle_path)
    graphs = bundle.manifest.graphs
    handed = [value.name for value in graphs["encoder"].outputs]
    assert handed and set(handed) <= {value.name for value in graphs["main"].inputs}
    assert all(name.startswith("memory.") for name in handed)
    main = onnx.load_from_string(bundle.graph()).graph
    depends = {value.name for value in main.input if not value.name.startswith("memory.")}
    for node in main.node:
        if set(node.input) & depends:
            depends |= set(node.output)
        else:
            assert not set(node.input) & set(handed), node.name


def test_the_embedding_table_is_stored_once(built: Built) -> None:
    bundle, rows = read_bundle(built.report.bundle_path), built.model.config.vocab_size
    tables = set()
    for role in ("encoder", "main"):
        graph = onnx.load_from_string(bundle.graph(role)).graph
        for tensor in graph.initializer:
            if rows in tensor.dims:
                tables |= {e.value for e in tensor.external_data if e.key == "offset"}
    assert len(tables) == 1


def test_the_model_as_a_whole_is_called_like_its_reference(built: Built) -> None:
    model = built.load()
    feeds = model.golden_inputs()
    assert list(feeds) == [value.name for value in model.inputs]
    assert DECODER_IDS in feeds and model.inputs[0].name in (IDS, "input_features")
    outputs = model(**feeds)
    assert outputs[LOGITS].shape[-1] == built.model.config.vocab_size
    assert model.self_test().passed


def test_the_bundle_says_how_answers_begin(tmp_path: pathlib.Path, built: Built) -> None:
    generation = built.load().manifest.generation
    assert generation is not None and generation.encoder is not None
    encoder = generation.encoder
    assert (generation.ids, generation.mask, generation.positions) == (DECODER_IDS, None, None)
    if built.kind == "t5":
        assert (encoder.input, encoder.mask, encoder.start) == (IDS, MASK, (0,))
        assert encoder.suppress == encoder.begin_suppress == ()
    else:
        assert (encoder.input, encoder.mask) == ("input_features", None)
        assert encoder.start == (tiny.START, tiny.SILENT)
        assert encoder.suppress == tiny.SUPPRESSED
        assert encoder.begin_suppress == tiny.SUPPRESSED_FIRST
        assert generation.context_length == 64


def test_the_same_directory_gives_the_same_bytes(built: Built, tmp_path: pathlib.Path) -> None:
    data = functools.partial(samples_of, built.kind)  # results of it are in the manifest
    again = build(built.directory, tmp_path / "model.edgec", evaluation=data)
    assert again.bundle_sha256 == built.report.bundle_sha256


# --- what generation_config states ----------------------------------------------------------


def start_of(folder: pathlib.Path, **settings: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    from transformers import WhisperForConditionalGeneration

    from edgec.language_encoder import encoder_section

    tiny.save_whisper(folder, **settings)
    module = WhisperForConditionalGeneration.from_pretrained(folder)
    section, findings = encoder_section(module, ("input_features",), 293)
    return section.start, findings


LANGUAGES = {"lang_to_id": {"<|en|>": 50, "<|de|>": 51}, "task_to_id": {"transcribe": 60}}


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, (3, 4)),
        ({"forced_decoder_ids": [[1, 4]]}, (3, 4)),
        ({"forced_decoder_ids": [[1, 50], [2, 60], [3, 4]]}, (3, 50, 60, 4)),
        ({"language": "<|de|>", "task": "transcribe", **LANGUAGES}, (3, 51, 60, 4)),
        ({"language": "en", **LANGUAGES}, (3, 50, 60, 4)),
        ({"return_timestamps": True}, (3,)),
        ({"forced_bos_token_id": 9}, (3, 4, 9)),
    ],
)
def test_an_answer_begins_as_generation_config_states(
    tmp_path: pathlib.Path, settings: dict[str, Any], start: tuple[int, ...]
) -> None:
    assert start_of(tmp_path, **settings)[0] == start


def test_an_unknown_language_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ExportError, match="language 'fr' is not among its tokens.*<|en|>"):
        start_of(tmp_path, language="fr", **LANGUAGES)


def test_what_bundles_do_not_have_is_told(tmp_path: pathlib.Path) -> None:
    _, findings = start_of(tmp_path, num_beams=4, **LANGUAGES)
    assert any("several languages" in finding for finding in findings)
    assert any("num_beams = 4" in finding for finding in findings)


def test_a_model_that_says_nowhere_how_to_begin_is_refused() -> None:
    from types import SimpleNamespace

    from edgec.language_encoder import encoder_section

    module = SimpleNamespace(generation_config=SimpleNamespace(), config=SimpleNamespace())
    with pytest.raises(ExportError, match="which token an answer begins with"):
        encoder_section(module, (IDS, MASK), 10)


# --- the cut --------------------------------------------------------------------------------


def test_the_parts_compute_what_the_whole_does(exported: Exported) -> None:
    whole, parts = reference_runner(exported.model), run_parts(cut(exported.model))
    for feeds in exported.examples:
        expected, actual = whole(feeds), parts(feeds)
        assert expected.keys() == actual.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(actual[name], array, atol=1e-4)  # scores of up to 30


def test_a_model_of_one_graph_is_not_cut() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    assert cut(model) == {"main": model}


def test_an_input_that_a_step_reads_itself_is_handed_over() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[b, n] input_features, int64[b, t] decoder_input_ids,
           float[b, 1, p, 1] past_key_values__0__key, float[b, 1, p, 1] past_key_values__0__value)
        => (float[b, n] logits, float[b, 1, p, 1] present__0__key) {
            twice = Add (input_features, input_features)
            ids = Cast <to = 1> (decoder_input_ids)
            first = ReduceSum (ids)
            sum = Mul (input_features, first)
            logits = Add (sum, twice)
            present__0__key = Add (past_key_values__0__key, past_key_values__0__value)
        }"""
    )
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = str(value.name).replace("__", ".")  # the text form has no dots
    with pytest.raises(
        ExportError, match="'twice' goes from the encoder to the decoder, and its dtype"
    ):
        cut(model)
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT
    parts = cut(model)
    assert [v.name for v in parts["encoder"].graph.outputs] == ["memory.0", "memory.1"]
    encoder = [node.op_type for node in parts["encoder"].graph]
    assert sorted(encoder) == ["Add", "Identity"]
    assert [v.name for v in parts["main"].graph.inputs][-2:] == ["memory.0", "memory.1"]
    assert "input_features" not in [v.name for v in parts["main"].graph.inputs]


def test_slots_of_adapters_are_refused(exported: Exported) -> None:
    from edgec_runtime.adapters import SLOT

    model = exported.model.clone()
    name = next(iter(model.graph.initializers))
    value = model.graph.initializers.pop(name)
    value.name = f"{SLOT}a"
    model.graph.initializers[value.name] = value
    with pytest.raises(ExportError, match="slots for adapters"):
        cut(model)


def test_an_error_of_the_encoders_mask_is_found(exported: Exported) -> None:
    eager, specs = exported.eager, input_specs(exported.model)
    sizes = {"vocabulary": 320, "context_length": 64, "min_db": 60.0}

    def blind(feeds: Any) -> Any:
        return eager({**feeds, MASK: np.ones_like(feeds[MASK])})

    check_decoding(eager, eager, specs, examples=exported.examples, **sizes)
    with pytest.raises(ExportError, match="batch of padded texts, step 0"):
        check_decoding(blind, eager, specs, examples=exported.examples, **sizes)


def test_an_error_of_the_decoders_cache_is_found(exported: Exported) -> None:
    eager, specs = exported.eager, input_specs(exported.model)

    def forgetful(feeds: Any) -> Any:
        outputs = eager(feeds)
        return {name: a if name == LOGITS else np.zeros_like(a) for name, a in outputs.items()}

    with pytest.raises(ExportError, match="single prompt, step 1"):
        check_decoding(
            forgetful,
            eager,
            specs,
            examples=exported.examples,
            vocabulary=320,
            context_length=64,
            min_db=60.0,
        )


# --- data and recipes -----------------------------------------------------------------------


def test_ids_of_prompt_and_answer_are_data_enough(exported: Exported) -> None:
    specs = input_specs(exported.model)
    sample = completed({IDS: np.ones((1, 5), int), DECODER_IDS: np.full((1, 4), 7)}, specs)
    assert sample[MASK].tolist() == [[1] * 5] and sample["label"].tolist() == [[7] * 4]
    pasts = [name for name in sample if name.startswith(PAST)]
    assert len(pasts) == 4 and all(sample[name].shape == (1, 4, 0, 16) for name in pasts)
    masked = completed(
        {IDS: np.ones((1, 2), int), MASK: np.array([[1, 0]]), DECODER_IDS: np.ones((1, 1))}, specs
    )
    assert masked[MASK].tolist() == [[1, 0]]


def test_perplexity_is_judged_on_answers(built: Built) -> None:
    report = built.report
    assert report.metric is not None and report.metric.name == "perplexity"
    assert report.metric.bundle == pytest.approx(report.metric.reference, rel=1e-4)
    assert report.agreement_rule == "same next token" and report.agreement == 1.0


def test_a_missing_half_of_the_data_is_named(exported: Exported) -> None:
    specs = input_specs(exported.model)
    for given, missing in ((DECODER_IDS, IDS), (IDS, DECODER_IDS)):
        item = {given: np.ones((1, 3), np.int64)}
        with pytest.raises(DataError, match=f"no array for input '{missing}'"):
            open_data(lambda item=item: iter([item]), specs, "evaluation")


def test_an_encoder_makes_a_decoder_a_transformer(exported: Exported) -> None:
    assert model_kind(exported.model) == "transformer"


# --- refusals -------------------------------------------------------------------------------


def test_a_target_with_fixed_shapes_is_refused(built: Built) -> None:
    with pytest.raises(ExportError, match="cache grows with every token"):
        export(load_source(built.directory), load_target("qualcomm-npu"))


def test_other_encoders_are_refused(tmp_path: pathlib.Path) -> None:
    import transformers

    config = transformers.Speech2TextConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        input_feat_per_channel=8, conv_channels=16, max_source_positions=20,
    )  # fmt: skip
    transformers.Speech2TextForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="reads 'input_features'; of encoder-decoders those"):
        export(load_source(tmp_path), load_target("x86-64"))
