"""Target files: shipped ones are complete, own ones work the same, mistakes are told."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from edgec.passes import PASSES
from edgec.targets import Target, TargetError, load_target, target_names

FOLDER = pathlib.Path(__file__).parents[2] / "targets"
SHIPPED = ("android", "arm64", "arm64-dotprod", "web", "x86-64", "x86-64-avx2", "x86-64-openvino")
OPERATING_SYSTEMS = {"linux", "windows", "macos", "android", "ios", "browser"}


def changed(tmp_path: pathlib.Path, old: str, new: str) -> pathlib.Path:
    """arm64's file with one place changed."""
    text = (FOLDER / "arm64.toml").read_text()
    assert text.count(old) == 1, old
    path = tmp_path / "board.toml"
    path.write_text(text.replace(old, new))
    return path


def test_the_shipped_targets_are_there() -> None:
    assert set(SHIPPED) <= set(target_names())
    assert target_names() == sorted(target_names())


@pytest.mark.parametrize("name", target_names())
def test_a_shipped_target_is_sound(name: str) -> None:
    target = load_target(name)
    assert target.name == name == load_target(FOLDER / f"{name}.toml").name
    assert target.description and target.os and set(target.os) <= OPERATING_SYSTEMS
    assert 18 <= target.opset <= 25  # what torch exports
    known = {cls.name for cls in PASSES}
    for recipe in dataclasses.astuple(target.recipe):
        assert set(recipe) <= known
    assert "quantize-static" not in target.recipe.uncalibrated
    assert target.int4.block_size in (16, 32, 64, 128, 256)


@pytest.mark.parametrize("name", target_names())
def test_the_session_options_are_ones_that_a_bundle_may_set(name: str) -> None:
    from edgec_runtime.manifest import SESSION_CONFIG

    session = load_target(name).session
    keys = set(session.config) | {k for extra in session.without.values() for k in extra}
    assert keys <= set(SESSION_CONFIG)


def test_no_two_targets_have_the_same_capabilities() -> None:
    seen: dict[str, str] = {}
    for name in target_names():
        target = dataclasses.replace(load_target(name), name="", description="")
        assert repr(target) not in seen, (name, seen.get(repr(target)))
        seen[repr(target)] = name


def test_a_target_cannot_be_changed() -> None:
    target = load_target("x86-64")
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.opset = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        target.session.without["vnni"] = {}  # type: ignore[index]


def test_an_own_file_works_like_a_shipped_one(tmp_path: pathlib.Path) -> None:
    path = changed(tmp_path, 'name = "arm64"', 'name = "my-board"')
    mine = load_target(str(path))
    assert isinstance(mine, Target)
    assert dataclasses.replace(mine, name="arm64") == load_target("arm64")


def test_a_shipped_name_wins_over_a_file_of_that_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arm64").mkdir()
    assert load_target("arm64").name == "arm64"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("opset = 21", "oppset = 21", r"unknown key 'oppset', did you mean 'opset'\?; the keys"),
        ("opset = 21", "", "missing key 'opset'"),
        ("opset = 21", 'opset = "21"', "'opset' is '21', expected a whole number"),
        ("opset = 21", "opset = true", "'opset' is True, expected a whole number"),
        ('arch = "arm64"', 'arch = "arm"', "'arch' is 'arm', expected one of 'x86_64', 'arm64'"),
        ('features = ["neon"]', 'features = "neon"', "'features' must be a list of strings"),
        ('features = ["neon"]', "features = [1]", "'features' must be a list of strings"),
        ("pays = false", "pas = false", r"\[int4\]: unknown key 'pas', did you mean 'pays'"),
        ("[session]\nthreads = 4", "session = 4", "'session' must be a table"),
        ("threads = 4", "threads = 4\nconfig = 3", "'config' must be a table"),
        ("threads = 4", "threads = 4\nconfig = {a = 1}", "'config.a' is 1, expected text"),
        ('name = "arm64"', 'name = "../arm64"', "becomes part of a file name"),
        ('name = "arm64"', 'name = ""', "becomes part of a file name"),
        ('name = "arm64"', "name = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_is_told(
    old: str, new: str, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        load_target(changed(tmp_path, old, new))
    assert "board.toml" in str(caught.value)


def test_an_unknown_target_is_told_with_the_known_ones(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TargetError, match="'arm-64', did you mean 'arm64'") as caught:
        load_target("arm-64")
    assert all(name in str(caught.value) for name in SHIPPED)
    with pytest.raises(TargetError, match="No such file"):
        load_target(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe4"')
    with pytest.raises(TargetError, match="not valid TOML"):
        load_target(tmp_path / "latin.toml")
