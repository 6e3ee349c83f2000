"""Every wrong input: one clear line, the right exit code, no traceback, no file touched.

Each case runs in a folder of its own that holds a good bundle at the output path; afterwards
the folder has the same files with the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import save_feeds

from edgec.cli import main

Make = Callable[[pathlib.Path], object]
BUILD = "build cnn.onnx -t x86-64 -o out/cnn.x86-64.edgec"
BUNDLE = "out/cnn.x86-64.edgec"


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line, the files that it needs, and words that its error must have."""

    id: str
    command: str
    words: tuple[str, ...]
    make: Make = lambda folder: None
    code: int = 1


def text(name: str, content: str) -> Make:
    return lambda folder: (folder / name).write_text(content)


def data(name: str, **arrays: np.ndarray) -> Make:
    """A directory of one .npz file."""

    def make(folder: pathlib.Path) -> None:
        (folder / name).mkdir()
        np.savez(folder / name / "0.npz", **arrays)

    return make


def flip(offset: int) -> Make:
    def make(folder: pathlib.Path) -> None:
        content = bytearray((folder / BUNDLE).read_bytes())
        content[offset] ^= 4
        (folder / BUNDLE).write_bytes(content)

    return make


def cut(folder: pathlib.Path) -> None:
    (folder / BUNDLE).write_bytes((folder / BUNDLE).read_bytes()[:70_000])


def lock_of(**changes: object) -> Make:
    """The lock of the good bundle with other fields, digest included."""

    def make(folder: pathlib.Path) -> None:
        from edgec.lock import Lock

        table = json.loads((folder / "out/cnn.x86-64.lock.json").read_text())
        table.pop("sha256")
        lock = Lock(**{**table, "steps": tuple(table["steps"]), **changes})
        (folder / "other.lock.json").write_text(lock.to_json())

    return make


def altered_lock(folder: pathlib.Path) -> None:
    lock = (folder / "out/cnn.x86-64.lock.json").read_text()
    (folder / "other.lock.json").write_text(lock.replace('"seed": 0', '"seed": 1'))


def same_data(folder: pathlib.Path) -> None:
    save_feeds(folder / "c", count=4)
    save_feeds(folder / "e", count=4)


def arm64_bundle(folder: pathlib.Path) -> None:
    from edgec_runtime import manifest
    from edgec_runtime.bundle import read_bundle, write_bundle

    bundle = read_bundle(folder / BUNDLE)
    made = dataclasses.replace(bundle.manifest, target=manifest.Target("phone", "arm64", ("ios",)))
    files = {e.name: bundle.read(e.name) for e in made.entries}
    write_bundle(folder / "phone.edgec", made, weights=[files.pop("weights.bin")], files=files)


IMAGE = np.zeros((1, 3, 12, 12), np.float32)
NAN = np.full_like(IMAGE, np.nan)
TARGET = "import numpy as np\n"
# libraries log past the command's own streams, which only a process shows
SAID_BY_A_PROCESS = ("missing-name", "unknown-target", "syntax-error", "nan", "text-as-pt2")

CASES = [
    # what is no model
    Case("missing-onnx", "build nothing.onnx -t x86-64", ("nothing.onnx", "no such file")),
    Case("missing-name", "build nothing -t x86-64", ("no such model", "file.py:function")),
    Case(
        "text-as-onnx",
        "build m.onnx -t x86-64",
        ("m.onnx", "not an ONNX file"),
        text("m.onnx", "hello " * 50),
    ),
    Case("empty-onnx", "build m.onnx -t x86-64", ("m.onnx", "not an ONNX"), text("m.onnx", "")),
    Case("weights-alone", "build m.pt -t x86-64", ("m.pt", "weights alone"), text("m.pt", "x")),
    Case("text-as-pt2", "build m.pt2 -t x86-64", ("m.pt2", "not a torch exp"), text("m.pt2", "x")),
    Case(
        "plain-folder",
        "build folder -t x86-64",
        ("folder", "config.json"),
        lambda folder: (folder / "folder").mkdir(),
    ),
    Case(
        "foreign-config",
        "build folder -t x86-64",
        ("folder", "not a Hugging Face model"),
        lambda f: ((f / "folder").mkdir(), (f / "folder/config.json").write_text("{}")),
    ),
    Case("py-without-function", "build m.py -t x86-64", ("which function",), text("m.py", "")),
    # the user's code
    Case(
        "build-raises",
        "build m.py:build -t x86-64",
        ("build() raised ZeroDivisionError", "m.py:2"),
        text("m.py", "def build():\n    return 1 / 0\n"),
    ),
    Case(
        "build-exits",
        "build m.py:build -t x86-64",
        ("build() raised SystemExit",),
        text("m.py", "def build():\n    raise SystemExit(0)\n"),
    ),
    Case(
        "syntax-error",
        "build m.py:build -t x86-64",
        ("m.py", "SyntaxError", "line 2"),
        text("m.py", "x = 1\ndef build(:\n"),
    ),
    Case(
        "missing-function",
        "build m.py:biuld -t x86-64",
        ("no function 'biuld'", "did you mean 'build'?"),
        text("m.py", "def build():\n    pass\n"),
    ),
    Case(
        "missing-module",
        "build nowhere.model:build -t x86-64",
        ("no module named 'nowhere'", "nowhere.model.py:build"),
    ),
    Case(
        "build-returns-a-dict",
        "build m.py:build -t x86-64",
        ("m.py:build returned a dict", "edgec.Source"),
        text("m.py", "def build():\n    return {}\n"),
    ),
    Case(
        "source-without-a-module",
        "build m.py:build -t x86-64",
        ("Source.module is a int", "torch.nn.Module"),
        text("m.py", "import edgec\n\ndef build():\n    return edgec.Source(module=3)\n"),
    ),
    # targets
    Case("unknown-target", "build cnn.onnx -t arm65", ("unknown target 'arm65'", "'arm64'?")),
    Case("missing-target-file", "build cnn.onnx -t board.toml", ("board.toml", "No such file")),
    Case(
        "target-with-unknown-key",
        "build cnn.onnx -t board.toml",
        ("board.toml", "unknown key 'oppset'", "did you mean 'opset'?"),
        text("board.toml", 'name = "board"\noppset = 18\n'),
    ),
    Case("no-target", "build cnn.onnx", ("--target",), code=2),
    Case(
        "one-path-for-two-targets",
        f"build cnn.onnx -t arm64 -t x86-64 -o {BUNDLE}",
        ("one bundle", "2 targets"),
        code=2,
    ),
    Case("nothing-to-build", "build -t arm64", ("SOURCE", "edgec.toml"), code=2),
    Case("unknown-option", "build cnn.onnx --targget arm64", ("--targget",), code=2),
    # recipes
    Case(
        "unknown-pass",
        f"{BUILD} --recipe cleanup,fusse",
        ("unknown pass 'fusse'", "did you mean 'fuse'?"),
    ),
    Case(
        "unknown-parameter",
        f"{BUILD} --set quantize-weights.blok_size=32",
        ("no parameter 'blok_size'", "did you mean 'block_size'?"),
    ),
    Case(
        "parameter-of-a-wrong-type",
        f"{BUILD} --set quantize-weights.block_size=many",
        ("quantize-weights", "block_size", "'many'"),
    ),
    Case("setting-without-value", f"{BUILD} --set fuse", ("PASS.PARAMETER=VALUE",)),
    Case(
        "setting-of-an-absent-pass",
        f"{BUILD} --recipe cleanup --set quantize-weights.block_size=32",
        ("no pass 'quantize-weights' in this recipe",),
    ),
    Case(
        "recipe-file-with-unknown-parameter",
        f"{BUILD} --recipe r.toml",
        ("r.toml", "no parameter 'sparsty'", "did you mean 'sparsity'?"),
        text("r.toml", '[[pass]]\nname = "prune-magnitude"\nsparsty = 0.5\n'),
    ),
    Case("recipe-file-missing", f"{BUILD} --recipe r.toml", ("r.toml", "No such file")),
    Case("recipe-no-toml", f"{BUILD} --recipe r.toml", ("r.toml", "TOML"), text("r.toml", "[[")),
    Case(
        "wrong-order",
        f"{BUILD} --recipe lower,cleanup",
        ("'cleanup' (clean) stands after", "the order is clean, prune"),
    ),
    # data
    Case(
        "empty-calibration",
        f"{BUILD} --calibration c",
        ("calibration data c", "no .npz files"),
        lambda folder: (folder / "c").mkdir(),
    ),
    Case("missing-calibration", f"{BUILD} --calibration c", ("calibration data c", "no such")),
    Case(
        "zero-samples",
        f"{BUILD} --calibration c.npy",
        ("c.npy", "no samples"),
        lambda folder: np.save(folder / "c.npy", IMAGE[:0]),
    ),
    Case("nan", f"{BUILD} --calibration c", ("c/0.npz", "NaN"), data("c", image=NAN)),
    Case(
        "wrong-dtype",
        f"{BUILD} --calibration c",
        ("c/0.npz", "'image' is uint8", "expects float32"),
        data("c", image=IMAGE.astype(np.uint8)),
    ),
    Case(
        "wrong-shape",
        f"{BUILD} --calibration c",
        ("c/0.npz", "[1, 3, 9, 12]", "expects [1, 3, 12, 12]"),
        data("c", image=IMAGE[:, :, :9]),
    ),
    Case(
        "missing-input",
        f"{BUILD} --calibration c",
        ("c/0.npz", "no array for input 'image'", "it has a, b"),
        data("c", a=IMAGE, b=IMAGE),
    ),
    Case(
        "damaged-npz",
        f"{BUILD} --calibration c.npz",
        ("c.npz", "cannot be read as numpy data"),
        text("c.npz", "no zip"),
    ),
    Case(
        "calibration-raises",
        f"{BUILD} --calibration d.py:feeds",
        ("feeds() raised KeyError", "d.py:2"),
        text("d.py", "def feeds():\n    yield {}['x']\n"),
    ),
    Case(
        "judged-on-its-calibration",
        f"{BUILD} --calibration c --evaluation e",
        ("calibration and evaluation hold the same samples",),
        same_data,
    ),
    Case(
        "metric-without-labels",
        f"{BUILD} --evaluation e --metric top1",
        ("metric top1 needs labels", "'label'"),
        data("e", image=IMAGE),
    ),
    Case("metric-without-data", f"{BUILD} --metric top1", ("metric top1", "--evaluation")),
    Case(
        "unknown-metric",
        f"{BUILD} --evaluation e --metric top2",
        ("unknown metric 'top2'", "did you mean 'top"),
        data("e", image=IMAGE, label=np.array([1])),
    ),
    Case(
        "metric-raises",
        f"{BUILD} --evaluation e --metric m.py:score",
        ("score", "raised IndexError", "m.py:2"),
        lambda folder: (
            data("e", image=IMAGE, label=np.array([1]))(folder),
            text("m.py", "def score(outputs, labels):\n    return [][0]\n")(folder),
        ),
    ),
    Case(
        "metric-is-nan",
        f"{BUILD} --evaluation e --metric m.py:score",
        ("score is nan",),
        lambda folder: (
            data("e", image=IMAGE, label=np.array([1]))(folder),
            text("m.py", "def score(outputs, labels):\n    return float('nan')\n")(folder),
        ),
    ),
    # where it should go
    Case(
        "file-in-the-way",
        "build cnn.onnx -t x86-64 -o file/out",
        ("file: is a file", "-o"),
        text("file", ""),
    ),
    Case(
        "folder-in-the-way",
        "build cnn.onnx -t x86-64 -o out2",
        ("report.json", "is a directory"),
        lambda folder: (folder / "out2/report.json").mkdir(parents=True),
    ),
    Case("not-writable", "build cnn.onnx -t x86-64 -o /proc/edgec", ("/proc", "cannot write")),
    # promises, locks, projects
    Case("negative-promise", f"{BUILD} --max-drop -0.1", ("promise max_drop is -0.1",)),
    Case("zero-promise", f"{BUILD} --max-size-mb 0", ("promise max_size_mb is 0",)),
    Case("promise-no-number", f"{BUILD} --min-speedup fast", ("--min-speedup",), code=2),
    Case("missing-lock", f"{BUILD} --lock l.json", ("lock file l.json", "No such file")),
    Case("damaged-lock", f"{BUILD} --lock l.json", ("l.json", "not JSON"), text("l.json", "{")),
    Case("foreign-lock", f"{BUILD} --lock l.json", ("l.json", "not an"), text("l.json", "{}")),
    Case(
        "altered-lock",
        f"{BUILD} --lock other.lock.json",
        ("other.lock.json", "changed by hand"),
        altered_lock,
    ),
    Case(
        "lock-of-another-target",
        "build cnn.onnx -t arm64 -o out2 --lock out/cnn.x86-64.lock.json",
        ("made for another target", "'x86-64', now 'arm64'"),
    ),
    Case(
        "lock-of-another-model",
        f"{BUILD} --lock other.lock.json",
        ("made for another model",),
        lock_of(reference="0" * 64),
    ),
    Case(
        "lock-of-another-recipe",
        f"{BUILD} --recipe cleanup --lock out/cnn.x86-64.lock.json",
        ("made for another recipe",),
    ),
    Case(
        "lock-with-too-few-steps",
        f"{BUILD} --lock other.lock.json",
        ("other.lock.json", "1 step"),
        lock_of(steps=({},)),
    ),
    Case(
        "lock-without-golden",
        f"{BUILD} --lock other.lock.json",
        ("other.lock.json", "golden"),
        lock_of(golden={}),
    ),
    Case(
        "project-with-unknown-key",
        "build",
        ("edgec.toml", "unknown key 'modell'", "did you mean 'model'?"),
        text("edgec.toml", 'modell = "cnn.onnx"\n'),
    ),
    Case(
        "project-with-unknown-promise",
        "build",
        ("edgec.toml", "unknown promise 'max_dropp'"),
        text("edgec.toml", 'model = "cnn.onnx"\ntargets = ["arm64"]\n[promises]\nmax_dropp = 1\n'),
    ),
    Case("project-missing", "build --config p.toml", ("p.toml", "No such file")),
    # bundles
    Case("missing-bundle", "run no.edgec", ("no.edgec", "there is no such file")),
    Case("text-as-bundle", "inspect b.edgec", ("b.edgec",), text("b.edgec", "text " * 99)),
    Case("truncated-bundle", f"run {BUNDLE}", (BUNDLE,), cut),
    Case("flipped-weight", f"verify {BUNDLE}", ("weights.bin", "altered"), flip(65_600)),
    Case("flipped-header", f"verify {BUNDLE}", (BUNDLE,), flip(5)),
    Case("other-device", "run phone.edgec", ("phone.edgec", "arm64", "--any-target"), arm64_bundle),
    Case(
        "run-wrong-dtype",
        f"run {BUNDLE} --input c",
        ("'image' is int64", "expects float32"),
        data("c", image=IMAGE.astype(np.int64)),
    ),
    Case(
        "run-wrong-shape",
        f"run {BUNDLE} --input c",
        ("[1, 3, 4, 12]", "[1, 3, 12, 12]"),
        data("c", image=IMAGE[:, :, :4]),
    ),
    Case(
        "run-wrong-name",
        f"run {BUNDLE} --input c",
        ("no array for input 'image'",),
        data("c", x=IMAGE, y=IMAGE),
    ),
    Case("run-to-nowhere", f"run {BUNDLE} -o no/where.npz", ("no/where.npz", "no folder")),
    Case("run-to-txt", f"run {BUNDLE} -o out.txt", ("out.txt", ".npz")),
    Case("image-without-preprocessing", f"run {BUNDLE} --image i.png", ("i.png",)),
    Case("verify-metric-without-data", f"verify {BUNDLE} --metric top1", ("--evaluation",)),
    Case(
        "bench-against-text", f"bench {BUNDLE} --against t.onnx", ("t.onnx",), text("t.onnx", "x")
    ),
    Case("unknown-target-shown", "targets x87", ("unknown target 'x87'",)),
    Case("unknown-pass-shown", "passes fusse", ("unknown pass 'fusse'", "did you mean 'fuse'?")),
]


@pytest.fixture
def folder(
    tmp_path: pathlib.Path,
    cnn_onnx: pathlib.Path,
    cnn_bundle: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> pathlib.Path:
    """A working folder with a model and a good bundle."""
    shutil.copy(cnn_onnx, tmp_path / "cnn.onnx")
    shutil.copytree(cnn_bundle.parent, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_wrong_input_gives_one_clear_line_and_touches_nothing(
    case: Case, folder: pathlib.Path
) -> None:
    case.make(folder)
    before = digests(folder)
    result = CliRunner().invoke(main, case.command.split())
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    check(case, result.exit_code, result.stderr)
    assert digests(folder) == before


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.id in SAID_BY_A_PROCESS],
    ids=lambda case: case.id,
)
def test_the_installed_command_says_the_same(case: Case, folder: pathlib.Path) -> None:
    case.make(folder)
    before = digests(folder)
    command = [sys.executable, "-m", "edgec.cli", *case.command.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check(case, done.returncode, done.stderr)
    assert done.stdout == ""
    assert digests(folder) == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) > 60 and len({c.id for c in CASES}) == len(CASES)


def test_a_failure_in_the_last_step_leaves_the_old_files(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = digests(folder)
    monkeypatch.setattr("edgec.builder.render_html", full)
    result = CliRunner().invoke(main, [*BUILD.split(), "--recipe", "cleanup"])
    assert result.exit_code == 1 and "No space left on device" in result.stderr
    assert digests(folder) == before


def test_ctrl_c_leaves_the_old_files(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = digests(folder)
    monkeypatch.setattr("edgec.builder.time_all", interrupted)
    result = CliRunner().invoke(main, [*BUILD.split(), "--recipe", "cleanup"])
    assert result.exit_code == 1 and "interrupted" in result.stderr
    assert digests(folder) == before


def check(case: Case, code: int, stderr: str) -> None:
    assert code == case.code, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if not line.endswith("…")]  # … is progress
    if code == 1:
        assert len(lines) == 1 and lines[0].startswith("edgec: "), stderr
        assert len(lines[0]) < 700, "a line that nobody reads"
    else:
        assert lines[0].startswith("Usage: ") and lines[-1].startswith("Error: "), stderr
    for word in case.words:
        assert word in lines[-1]


def digests(folder: pathlib.Path) -> dict[str, str]:
    """sha256 of every file below the folder; folders too."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in sorted(folder.rglob("*"))
    }
