"""Drives examples/web in Chromium; run as a program, takes the picture of the page for the docs.

python tests/devices/web_page.py BUNDLE PHOTOGRAPH docs/web.png
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from edgec.devices.install import installed_folder
from edgec.devices.web import MODULES
from edgec.targets import load_profile

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def served(bundle: pathlib.Path) -> Iterator[str]:
    """The address of the page while it is served for this bundle."""
    command = [sys.executable, str(ROOT / "examples/web/serve.py"), str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def classified(
    bundle: pathlib.Path, photograph: pathlib.Path, pictures: pathlib.Path | None = None
) -> dict[str, Any]:
    """What the page says of a photograph. pictures: a folder for light.png and dark.png."""
    return _driven("drive_page.mjs", bundle, str(photograph), pictures)


def chatted(
    bundle: pathlib.Path,
    prompts: Sequence[str],
    pictures: pathlib.Path | None = None,
    *,
    longest: int = 512,
) -> dict[str, Any]:
    """What the page of a language model answers to a user's words, one after another.

    longest: tokens of an answer.
    """
    query = f"?max_new_tokens={longest}"
    return _driven("drive_chat.mjs", bundle, json.dumps(list(prompts)), pictures, query)


def _driven(
    program: str,
    bundle: pathlib.Path,
    given: str,
    pictures: pathlib.Path | None,
    query: str = "",
) -> dict[str, Any]:
    modules = installed_folder(load_profile("chromium-wasm")) / MODULES
    browser = shutil.which("chromium")
    script = pathlib.Path(__file__).with_name(program)
    with served(bundle) as address:
        command = ["node", script, modules, browser, address + query, given]
        command += [pictures] if pictures is not None else []
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def draw(bundle: pathlib.Path, photograph: pathlib.Path, picture: pathlib.Path) -> None:
    """The page as a picture, its right half in dark colours."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        print(classified(bundle, photograph, place)["best"])
        light, dark = (Image.open(place / f"{name}.png") for name in ("light", "dark"))
        half = light.width // 2
        light.paste(dark.crop((half, 0, dark.width, dark.height)), (half, 0))
        light.convert("RGB").quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    draw(*map(pathlib.Path, sys.argv[1:4]))
