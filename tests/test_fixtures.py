"""The fixtures are what they say: known figures of the real models on the real data."""

import os

import numpy as np
import pytest
import torch
from fixtures import language, locate, models, photographs, similarity, speech, text_lines


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_missing_package_says_how_to_install_it():
    with pytest.raises(locate.FixtureMissing, match="install.py --test"):
        locate.python_package("edgec_no_such_package")
    with pytest.raises(locate.FixtureMissing, match="install.py --debian"):
        locate.debian_package("no-such-package", "usr/share/no-such-file")


def test_missing_fixture_skips_the_test():
    def load():
        raise locate.FixtureMissing("package 'x' is not installed")

    with pytest.raises(pytest.skip.Exception, match="package 'x' is not installed"):
        locate.required(load)()


def test_photographs_to_judge_with_are_not_those_to_calibrate_with():
    judged = {item.image.tobytes() for item in photographs.require_labelled()}
    calibrating = {image.tobytes() for image in photographs.require_unlabelled()}
    assert not judged & calibrating
    assert len(judged) in (40, 201)
    assert len(calibrating) >= 34


@pytest.mark.slow
def test_efficientnet_lite0_is_right_on_the_labelled_photographs():
    model = models.require_efficientnet_lite0()
    labelled = photographs.require_labelled()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    right = 0
    for batch in (labelled[i : i + 8] for i in range(0, len(labelled), 8)):
        images = np.concatenate([photographs.tensor(item.image) for item in batch])
        with torch.no_grad():
            guesses = model(torch.from_numpy(images)).argmax(1).tolist()
        right += sum(guess in item.classes for guess, item in zip(guesses, batch, strict=True))
    # One photograph of play: other versions of Pillow resize with other roundings.
    assert abs(right - {201: 162, 40: 34}[len(labelled)]) <= 1


@pytest.mark.slow
def test_minilm_agrees_with_human_judgements_of_similarity():
    tokenizer, model = models.require_minilm()
    pairs = similarity.require_pairs("wordsim353")
    assert len(pairs.judgement) == 353
    score = similarity.score(tokenizer, similarity.torch_encoder(model), pairs)
    # Float noise moves near ties by a rank or two: under 1e-4 of the correlation.
    assert score == pytest.approx(0.729, abs=0.001)


def test_spearman_shares_the_rank_of_equal_values():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: r = 4.5 / sqrt(4.5 * 5).
    assert similarity.spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(
        4.5 / np.sqrt(4.5 * 5)
    )


def test_austen_is_six_novels_in_paragraphs():
    text = language.require_austen()
    opening = "It is a truth universally acknowledged, that a single man in possession of a good "
    assert f"\n{opening}fortune, must be in want of a wife.\n" in text
    assert text.startswith("EMMA\nBy Jane Austen\n") and text.count("\n\n") == 5
    assert len(text) > 3_900_000


def test_words_come_in_pairs_of_one_relation():
    pairs = language.require_word_pairs()
    assert len(pairs) == 14 and sum(map(len, pairs.values())) == 573
    assert ("Athens", "Greece") in pairs["capital-common-countries"]
    assert ("thinking", "thought") in pairs["gram7-past-tense"]


def test_ocr_recogniser_reads_rendered_lines():
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    path = models.require_ocr_recogniser_path()
    lines = text_lines.require_lines(24, seed=7)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [name] = [given.name for given in session.get_inputs()]
    read = []
    for start in range(0, 24, 8):
        read += text_lines.decode(
            session.run(None, {name: lines.images[start : start + 8]})[0],
            text_lines.characters(path),
        )
    exact = sum(a == b for a, b in zip(read, lines.texts, strict=True))
    # About 0.95 of many lines are exact; a wrong channel order or scale reads under half of them.
    assert exact >= 21


def test_lines_of_one_seed_are_the_same_pixels():
    first, again = text_lines.require_lines(3, seed=1), text_lines.require_lines(3, seed=1)
    other = text_lines.require_lines(3, seed=2)
    assert first.texts == again.texts != other.texts
    assert np.array_equal(first.images, again.images)


def test_third_party_files_are_there():
    assert len(models.require_silero_paths()) == 6
    assert models.require_magika_path().stat().st_size > 1_000_000


def test_small_cnn_has_the_parameters_of_the_documents():
    assert sum(p.numel() for p in models.small_cnn().parameters()) == 19_714


def test_training_learns_and_repeats():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 256)
    images = rng.integers(0, 60, (256, 14, 14), dtype=np.uint8)
    images[labels == 1, 4:10, 4:10] += 120  # a bright patch is the whole difference
    torch.manual_seed(0)
    module = models.small_cnn(8)
    twin = models.small_cnn(8)
    twin.load_state_dict(module.state_dict())
    models.train(module, images, labels, epochs=20)
    models.train(twin, images, labels, epochs=20)
    with torch.no_grad():
        guesses = module(models.image_tensor(images)).argmax(1).numpy()
    assert (guesses == labels).mean() > 0.95
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True)
    )


def test_fashion_mnist_has_ten_equal_classes():
    images, classes = photographs.require_fashion_mnist("test")
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(classes).tolist() == [1_000] * 10


def test_speech_clips_have_transcripts():
    clips = speech.require_clips()
    assert len(clips) > 300
    samples, rate = clips[0].samples()
    assert rate == 8_000 and samples.dtype == np.float32 and np.abs(samples).max() <= 1
