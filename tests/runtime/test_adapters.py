"""Adapters: swapped without a new session, checked against the model they were made for."""

import threading
import time

import bundle_samples
import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import edgec_runtime
from edgec_runtime import AdapterError, bundle, golden
from edgec_runtime.adapters import slot_names, write_adapter

DIGEST, OTHER = "0123456789abcdef", "fedcba9876543210"
RANK = 2
DOWN, UP = slot_names(DIGEST, "h")


def graph(digest: str = DIGEST) -> bytes:
    """y = x @ w + x @ down @ up, the last two inputs with zeros as defaults."""
    names = slot_names(digest, "h")
    shapes = ((8, RANK), (RANK, 4))
    inputs = [helper.make_tensor_value_info("x", 1, ["batch", 8])]
    inputs += [helper.make_tensor_value_info(n, 1, s) for n, s in zip(names, shapes, strict=True)]
    tensors = [numpy_helper.from_array(bundle_samples.WEIGHT, "w")]
    tensors += [
        numpy_helper.from_array(np.zeros(s, np.float32), n)
        for n, s in zip(names, shapes, strict=True)
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["x", names[0]], ["a"]),
        helper.make_node("MatMul", ["a", names[1]], ["b"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", 1, ["batch", 4])]
    return bundle_samples.onnx_bytes(nodes, inputs, outputs, tensors)


def load(folder, data: bytes | None = None) -> edgec_runtime.Model:
    path = folder / "slots.edgec"
    manifest = bundle_samples.sample_manifest(ops=("ai.onnx::Add", "ai.onnx::MatMul"))
    files = {"graph.onnx": graph() if data is None else data}
    bundle.write_bundle(path, manifest, weights=[b""], files=files)
    return edgec_runtime.load(path)


def matrices(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        DOWN: random.standard_normal((8, RANK), dtype=np.float32),
        UP: random.standard_normal((RANK, 4), dtype=np.float32),
    }


def written(folder, name: str = "a.onnx_adapter", given=None):
    write_adapter(folder / name, matrices() if given is None else given)
    return folder / name


X = np.random.default_rng(1).standard_normal((3, 8), dtype=np.float32)


def expected(given=None) -> np.ndarray:
    base = X @ bundle_samples.WEIGHT
    return base if given is None else base + X @ given[DOWN] @ given[UP]


def test_slots_are_no_inputs_of_the_user_and_do_nothing_by_themselves(tmp_path):
    model = load(tmp_path)
    assert [v.name for v in model.inputs] == ["x"]
    assert [s.name for s in model.slots] == [DOWN, UP]
    assert [s.shape for s in model.slots] == [(8, RANK), (RANK, 4)]
    # float32 products in another order
    np.testing.assert_allclose(model(X)["y"], expected(), rtol=1e-5, atol=1e-5)
    with pytest.raises(edgec_runtime.InputError):
        model(**{"x": X, DOWN: matrices()[DOWN]})


def test_an_adapter_is_used_swapped_and_left(tmp_path):
    model = load(tmp_path)
    plain = model(X)["y"]
    for seed in (0, 1):
        given = matrices(seed)
        model.use_adapter(written(tmp_path, f"{seed}.onnx_adapter", given))
        assert model.adapter.name == str(seed) and model.adapter.size > 0
        # float32 products in another order
        np.testing.assert_allclose(model(X)["y"], expected(given), rtol=1e-4, atol=1e-4)
    model.use_adapter(None)
    assert model.adapter is None
    np.testing.assert_array_equal(model(X)["y"], plain)


def test_a_swap_takes_far_less_than_loading(tmp_path):
    model, path = load(tmp_path), written(tmp_path)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        model.use_adapter(path)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.02  # the least: others use this machine too


def test_the_same_matrices_give_the_same_file(tmp_path):
    one, two = written(tmp_path, "1.onnx_adapter"), written(tmp_path, "2.onnx_adapter")
    assert one.read_bytes() == two.read_bytes()


def test_calls_of_other_threads_see_one_adapter_or_the_other_and_nothing_between(tmp_path):
    model = load(tmp_path)
    paths = [
        None,
        written(tmp_path, "0.onnx_adapter"),
        written(tmp_path, "1.onnx_adapter", matrices(1)),
    ]
    known = []
    for path in paths:
        model.use_adapter(path)
        known.append(model(X)["y"])
    wrong, stop = [], threading.Event()

    def call() -> None:
        while not stop.is_set():
            answer = model(X)["y"]
            if not any(np.array_equal(answer, k) for k in known):
                wrong.append(answer)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        model.use_adapter(paths[i % 3])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_file_may_be_removed_while_its_adapter_is_in_use(tmp_path):
    model, path = load(tmp_path), written(tmp_path)
    model.use_adapter(path)
    before = model(X)["y"]
    path.unlink()
    np.testing.assert_array_equal(model(X)["y"], before)


def refused(model: edgec_runtime.Model, path, reason: str) -> None:
    """The adapter is refused with a reason, and what was in use stays in use."""
    before, answer = model.adapter, model(X)["y"]
    with pytest.raises(AdapterError, match=reason):
        model.use_adapter(path)
    assert model.adapter is before
    np.testing.assert_array_equal(model(X)["y"], answer)


def test_refuses_an_adapter_of_another_model(tmp_path):
    model = load(tmp_path)
    model.use_adapter(written(tmp_path))
    names = slot_names(OTHER, "h")
    given = dict(zip(names, matrices().values(), strict=True))
    path = written(tmp_path, "other.onnx_adapter", given)
    refused(model, path, f"made for the model {OTHER}, model sample comes from {DIGEST}")
    foreign = written(tmp_path, "foreign.onnx_adapter", {"lora_A": np.zeros((2, 2), np.float32)})
    refused(model, foreign, "made for the model of another tool")


def test_refuses_matrices_that_do_not_fit_the_slots(tmp_path):
    model = load(tmp_path)
    wide = matrices() | {DOWN: np.zeros((8, 3), np.float32)}
    refused(model, written(tmp_path, "w.onnx_adapter", wide), r"\[8, 3\], the slot .*\[8, 2\]")
    double = matrices() | {DOWN: np.zeros((8, 2))}
    refused(model, written(tmp_path, "d.onnx_adapter", double), "is float64")
    half = {DOWN: matrices()[DOWN]}
    refused(model, written(tmp_path, "h.onnx_adapter", half), "without 'adapter.*up'")
    more = matrices() | dict(zip(slot_names(DIGEST, "z"), matrices().values(), strict=True))
    refused(model, written(tmp_path, "m.onnx_adapter", more), "no slot 'adapter.*z.down'")
    refused(model, written(tmp_path, "e.onnx_adapter", {}), "it is empty")


def test_refuses_a_bundle_without_slots(tmp_path):
    values = [helper.make_tensor_value_info(n, 1, ["batch", s]) for n, s in (("x", 8), ("y", 4))]
    tensors = [numpy_helper.from_array(bundle_samples.WEIGHT, "w")]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    data = bundle_samples.onnx_bytes([node], values[:1], values[1:], tensors)
    model = load(tmp_path, data)
    refused(model, written(tmp_path), "model sample has no slots.*'adapter-slots'")


def test_refuses_a_file_that_is_missing_or_no_adapter(tmp_path):
    model = load(tmp_path)
    refused(model, tmp_path / "none.onnx_adapter", "there is no such file")
    for data in (b"", b"no adapter at all", b"TORT" * 9):
        (tmp_path / "bad.onnx_adapter").write_bytes(data)
        refused(model, tmp_path / "bad.onnx_adapter", "damaged, or no adapter")


def test_no_damage_goes_unseen(tmp_path):
    model, path = load(tmp_path), written(tmp_path)
    good = path.read_bytes()
    model.use_adapter(path)
    answer = model(X)["y"]
    model.use_adapter(None)
    accepted = 0
    bad = tmp_path / "bad.onnx_adapter"
    for position in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        bad.write_bytes(flipped)
        try:
            model.use_adapter(bad)
        except AdapterError:
            continue
        accepted += 1  # bytes that mean nothing: padding, the model's version
        np.testing.assert_array_equal(model(X)["y"], answer)
    assert accepted < 0.2 * len(good) / 3
    for length in range(0, len(good), 7):
        bad.write_bytes(good[:length])
        with pytest.raises(AdapterError):
            model.use_adapter(bad)


def test_the_self_test_runs_without_the_adapter(tmp_path, monkeypatch):
    model, seen = load(tmp_path), []
    model.use_adapter(written(tmp_path))
    monkeypatch.setattr(golden, "self_test", lambda _, tested: seen.append(tested.adapter))
    model.self_test()
    assert seen == [None] and model.adapter is not None


def test_onnx_runtime_alone_runs_the_adapter(tmp_path):
    """Other hosts have no edgec: the file is ONNX Runtime's own."""
    session = onnxruntime.InferenceSession(graph(), providers=["CPUExecutionProvider"])
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(written(tmp_path)))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    # float32 products in another order
    np.testing.assert_allclose(
        session.run(None, {"x": X}, options)[0], expected(matrices()), rtol=1e-4, atol=1e-4
    )
