"""Where edgec keeps what may be deleted at any time."""

import pathlib

from edgec.cache import user_cache
from edgec.devices.install import cache_folder


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEC_CACHE", str(tmp_path))
    monkeypatch.delenv("EDGEC_DEVICES", raising=False)
    assert user_cache() == tmp_path
    assert cache_folder() == tmp_path / "devices"
    monkeypatch.setenv("EDGEC_DEVICES", "/elsewhere")
    assert cache_folder() == pathlib.Path("/elsewhere")


def test_else_it_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEC_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "edgec"
