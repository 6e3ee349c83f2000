"""onnxruntime-web in Node.js: the JavaScript loader gives what Python gives, and refuses alike."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from typing import Any

import bundle_samples
import numpy as np
import pytest
from devices import bundles
from devices.test_check import require
from onnx import helper

import edgec_runtime
from edgec.devices.check import Samples, verify_on
from edgec.devices.connect import open_device
from edgec.devices.install import installed_folder, missing
from edgec.devices.job import Job
from edgec.devices.web import HOSTS, MODULES, WebDevice
from edgec.errors import DeviceError
from edgec.targets import load_profile
from edgec_runtime import golden, image, manifest
from edgec_runtime.bundle import read_bundle

# prints what load(BUNDLE, OPTIONS).run(FEEDS) says for each case: "no error", or the error
_RUN = """
import {{ readFile }} from "node:fs/promises";
import {{ createRequire }} from "node:module";
import {{ load }} from {loader};
const ort = createRequire({modules})("onnxruntime-web");
async function said([file, options, feeds]) {{
  try {{
    const model = await load(ort, new Blob([await readFile(file)]), {{ threads: 1, ...options }});
    const given = Object.entries(feeds).map(([name, {{ kind, size, dims }}]) => [
      name, {{ data: new globalThis[kind](size).fill(0.5), dims }}
    ]);
    await model.run(Object.fromEntries(given));
    return "no error";
  }} catch (error) {{
    return `${{error.constructor.name}}: ${{error.message}}`;
  }}
}}
const all = [];
for (const one of JSON.parse(process.argv[1])) all.push(await said(one));
console.log(JSON.stringify(all));
process.exit(0);
"""
X = {"kind": "Float32Array", "size": 1024, "dims": [4, 256]}
Case = tuple[pathlib.Path, dict[str, Any], dict[str, Any]]


def javascript(code: str, *arguments: str) -> str:
    command = ["node", "--input-type=module", "-e", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def said(*cases: Case) -> list[str]:
    """What JavaScript says to each (bundle, options of load, feeds)."""
    modules = installed_folder(load_profile("node-wasm")) / MODULES / "package.json"
    code = _RUN.format(
        loader=json.dumps((HOSTS / "edgec.mjs").as_uri()), modules=json.dumps(str(modules))
    )
    return json.loads(javascript(code, json.dumps([[str(b), *rest] for b, *rest in cases])))


def error_of(bundle: pathlib.Path, **options: Any) -> str:
    [message] = said((bundle, options, {"x": X}))
    return message


@pytest.fixture(autouse=True)
def _node() -> None:
    require("node-wasm")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return bundles.build("web", tmp_path_factory.mktemp("web"))


def test_a_bundle_gives_in_node_what_it_gives_in_python(bundle: pathlib.Path) -> None:
    [verdict] = verify_on(bundle, ["node-wasm"], Samples(tuple(bundles.samples()), 3))
    assert verdict.status == "passed", verdict.reason
    assert verdict.judgement is not None and verdict.outcome is not None
    model = edgec_runtime.load(bundle, any_target=True)
    for given, outputs in zip(bundles.samples(), verdict.outcome.outputs[1:], strict=True):
        # both compute int8 products exactly; float32 sums differ in their order
        assert golden.sqnr_db(model(**given)["y"], outputs["y"]) > 80
    assert verdict.outcome.features == ("wasm_simd",)


def test_every_dtype_makes_the_round_trip(tmp_path: pathlib.Path) -> None:
    dtypes = [dtype for dtype in manifest.DTYPES if dtype != "string"]
    values = tuple(manifest.Value(f"in {dtype}", dtype, (3,)) for dtype in dtypes)
    outputs = tuple(manifest.Value(f"out {dtype}", dtype, (3,)) for dtype in dtypes)
    infos = {
        v.name: helper.make_tensor_value_info(
            v.name, helper.np_dtype_to_tensor_dtype(np.dtype(v.dtype)), [3]
        )
        for v in (*values, *outputs)
    }
    graph = bundle_samples.onnx_bytes(
        [helper.make_node("Identity", [f"in {d}"], [f"out {d}"]) for d in dtypes],
        [infos[v.name] for v in values],
        [infos[v.name] for v in outputs],
        [],
    )
    bundle = bundle_samples.write_sample(
        tmp_path / "b.edgec",
        {"graph.onnx": graph},
        graphs={"main": manifest.Graph("graph.onnx", values, outputs)},
    )
    feeds = {f"in {d}": np.array([0, 1, 100]).astype(d) for d in dtypes}
    feeds["in int64"] = np.array([-(2**62), 2**53 + 1, 5])
    feeds["in float16"] = np.array([-0.1, 65504, 6e-8], np.float16)
    with open_device("node-wasm") as device:
        outcome = device.run(Job(bundle, [feeds], repeats=2))
    assert len(outcome.latency_ms) == 2 and outcome.load_ms > 0
    for dtype in dtypes:
        found = outcome.outputs[0][f"out {dtype}"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, feeds[f"in {dtype}"])


def test_two_samples_are_run_where_the_time_allows_no_more(bundle: pathlib.Path) -> None:
    with open_device("node-wasm") as device:
        short = device.run(Job(bundle, bundles.samples(4), seconds=0.0))
        enough = device.run(Job(bundle, bundles.samples(4), seconds=600.0))
    assert (len(short.outputs), len(enough.outputs)) == (2, 4)
    for given, output in zip(enough.outputs, short.outputs, strict=False):
        np.testing.assert_array_equal(given["y"], output["y"])


@pytest.mark.parametrize("kept", [10, 70_000, -1])
def test_a_truncated_bundle_is_refused(
    bundle: pathlib.Path, tmp_path: pathlib.Path, kept: int
) -> None:
    cut = tmp_path / "cut.edgec"
    cut.write_bytes(bundle.read_bytes()[:kept])
    assert error_of(cut) == ("BundleError: the bundle is truncated or has bytes added at its end")


def test_an_altered_byte_of_the_weights_is_refused(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = bytearray(bundle.read_bytes())
    data[65_536 + 100] ^= 1
    (tmp_path / "b.edgec").write_bytes(data)
    expected = "BundleError: the entry 'weights.bin' is altered: its checksum differs"
    assert error_of(tmp_path / "b.edgec") == expected


@pytest.mark.parametrize("name", ["graph.onnx", "manifest.json"])
def test_an_altered_byte_of_another_entry_is_refused(
    bundle: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    data = bytearray(bundle.read_bytes())
    entries = read_bundle(bundle).manifest.entries
    last = entries[-1]
    places = {e.name: e.offset for e in entries}
    places["manifest.json"] = last.offset + last.size + 30 + len("manifest.json")
    data[places[name] + 50] ^= 1
    (tmp_path / "b.edgec").write_bytes(data)
    assert error_of(tmp_path / "b.edgec") == (
        f"BundleError: the entry '{name}' is altered: its checksum differs"
    )


def test_a_bundle_for_another_target_is_refused_unless_asked_for(tmp_path: pathlib.Path) -> None:
    bundle = bundles.build("arm64", tmp_path)
    assert error_of(bundle) == (
        "TargetMismatchError: the bundle was built for arm64 (arm64; linux, windows, macos), this "
        "is wasm32 on browser; build it with --target web, or load it with anyTarget to run it "
        "slower or less exactly"
    )
    assert error_of(bundle, anyTarget=True) == "no error"


def test_wrong_feeds_are_refused(bundle: pathlib.Path) -> None:
    cases = {
        "no error": {"x": X},
        "InputError: the model has no input 'image'; it has 'x'": {"image": X},
        "InputError: input 'x' is missing; the model has 'x'": {},
        "InputError: input 'x' is a Float64Array, expected float32 in a Float32Array": {
            "x": {**X, "kind": "Float64Array"}
        },
        "InputError: input 'x' has the shape [1024], expected [4, 256]": {
            "x": {**X, "dims": [1024]}
        },
        "InputError: input 'x' has the shape [8, 128], expected [4, 256]": {
            "x": {**X, "dims": [8, 128]}
        },
        "InputError: input 'x' has 1 values, its shape [4, 256] needs 1024": {
            "x": {**X, "size": 1}
        },
    }
    assert said(*((bundle, {}, feeds) for feeds in cases.values())) == list(cases)


def test_another_onnxruntime_is_refused(tmp_path: pathlib.Path) -> None:
    bundle = bundle_samples.write_sample(tmp_path / "b.edgec", onnxruntime=">=1.27,<1.28")
    assert error_of(bundle, anyTarget=True).startswith(
        "BundleError: the bundle needs onnxruntime >=1.27,<1.28, this is onnxruntime-web 1."
    )


def test_a_newer_format_is_refused(tmp_path: pathlib.Path) -> None:
    bundle = bundle_samples.forge(
        tmp_path / "b.edgec", lambda table: table.update(format_version=2)
    )
    assert "the bundle has format version 2, this edgec.mjs reads 1" in error_of(bundle)


def test_what_onnxruntime_refuses_is_a_device_error(tmp_path: pathlib.Path) -> None:
    values = [helper.make_tensor_value_info(name, 1, ["batch", 8]) for name in "xy"]
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    graph = bundle_samples.onnx_bytes([node], values[:1], values[1:], [])
    bundle = bundle_samples.forge(tmp_path / "b.edgec", graph=graph)
    with open_device("node-wasm") as device, pytest.raises(DeviceError, match="NoSuchOperator"):
        device.run(Job(bundle, [{"x": np.zeros((1, 8), np.float32)}]))


def test_a_browser_that_does_not_start_is_a_device_error(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    profile = load_profile("chromium-wasm")
    options = {"browser": str(tmp_path / "nothing"), "flags": []}
    modules = installed_folder(profile) / MODULES
    device = WebDevice(profile, "chromium.mjs", modules, options)
    with pytest.raises(
        DeviceError, match="chromium-wasm: .* executable doesn't exist at .*nothing"
    ):
        device.run(Job(bundle, bundles.samples(1)))


def test_modules_that_are_gone_are_a_device_error(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    device = WebDevice(load_profile("node-wasm"), "node.mjs", tmp_path, {})
    with pytest.raises(DeviceError, match="Cannot find module 'onnxruntime-web'"):
        device.run(Job(bundle, bundles.samples(1)))


def test_chromium_is_missing_where_only_node_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def which(program: str) -> str | None:
        return None if program == "chromium" else f"/usr/bin/{program}"

    monkeypatch.setattr(shutil, "which", which)
    assert missing(load_profile("node-wasm")) is None
    assert "there is no chromium on this machine" in str(missing(load_profile("chromium-wasm")))


@pytest.mark.parametrize(
    "spec",
    [
        manifest.Image("x", (224, 224), crop=0.875, mean=(127.0,) * 3, std=(128.0,) * 3),
        manifest.Image("x", (48, 96), resize="bilinear", layout="NHWC", channels="BGR"),
        manifest.Image("x", (300, 200), dtype="uint8", std=(1.0,) * 3),
        # from 128 up, a sixteenth less is halfway between two float16
        manifest.Image("x", (64, 64), dtype="float16", mean=(1 / 16,) * 3, std=(1.0,) * 3),
    ],
    ids=lambda spec: f"{spec.resize}-{spec.layout}-{spec.dtype}",
)
@pytest.mark.parametrize("shape", [(480, 640), (37, 50)], ids=["smaller", "larger"])
def test_a_picture_becomes_the_input_that_python_makes(
    tmp_path: pathlib.Path, spec: manifest.Image, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (*(n // 8 + 1 for n in shape), 3)).repeat(8, 0).repeat(8, 1)
    noisy = coarse[: shape[0], : shape[1]] + rng.integers(-9, 9, (*shape, 3))
    pixels = noisy.clip(0, 255).astype(np.uint8)
    expected = image.prepare_image(pixels, spec)
    code = f"""
import {{ readFile, writeFile }} from "node:fs/promises";
import {{ prepareImage }} from {json.dumps((HOSTS / "image.mjs").as_uri())};
const [file, spec] = process.argv.slice(1);
const data = new Uint8ClampedArray(await readFile(file));
const {{ type, data: values, dims }} = prepareImage(
  {{ data, width: {shape[1]}, height: {shape[0]} }}, JSON.parse(spec));
await writeFile(file, new Uint8Array(values.buffer));
console.log(JSON.stringify([type, dims]));
"""
    rgba = np.concatenate([pixels, np.full((*shape, 1), 255, np.uint8)], axis=2)
    (tmp_path / "pixels").write_bytes(rgba.tobytes())
    facts = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    dtype, dims = json.loads(javascript(code, str(tmp_path / "pixels"), json.dumps(facts)))
    actual = np.frombuffer((tmp_path / "pixels").read_bytes(), dtype).reshape(dims)
    assert (dtype, dims) == (spec.dtype, list(expected.shape))
    levels = np.abs(actual.astype(np.float64) - expected) * np.float32(spec.std[0])
    # a half is rounded the other way where sums are made in another order
    assert levels.max() < 1.1 and (levels > 0).mean() < 1e-3
