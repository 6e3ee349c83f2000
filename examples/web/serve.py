"""Serves a page that runs a bundle: a classifier of pictures, or a chat with a language model.

    edgec devices install node-wasm      # fetches onnxruntime-web and tokenizers, once
    edgec build examples/efficientnet_lite0.py:build --target web -o build/
    python examples/web/serve.py build/efficientnet-lite0.web.edgec

Then open the address that is printed. The page of a classifier is index.html and app.mjs, that of
a language model chat.html, chat.mjs and chat_worker.mjs; both need modules that are part of edgec
(compiler/devices/hosts), and onnxruntime-web. Any server of static files will do for a page of
your own. This one listens on this machine only, and sends the two headers that let WebAssembly
use threads.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from edgec.devices.install import installed_folder, missing
from edgec.devices.web import HOSTS, MODULES
from edgec.errors import EdgecError
from edgec.targets import load_profile
from edgec_runtime.bundle import read_bundle

PAGE = pathlib.Path(__file__).parent
TYPES = {
    ".css": "text/css",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".png": "image/png",
    ".wasm": "application/wasm",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bundle", type=pathlib.Path, help="a classifier or a language model, built for web"
    )
    parser.add_argument("--sample", type=pathlib.Path, help="the sample picture")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    given = parser.parse_args()
    if not given.bundle.is_file():
        sys.exit(f"{given.bundle}: there is no such file; build it first, see --help")
    profile = load_profile("node-wasm")
    if reason := missing(profile):
        sys.exit(f"onnxruntime-web: {reason}")
    modules = installed_folder(profile) / MODULES / "node_modules"
    try:
        chat = read_bundle(given.bundle).manifest.generation is not None
    except EdgecError as error:
        sys.exit(str(error))
    files = chat_routes(modules) if chat else picture_routes(given.sample or demo_photograph())
    files |= routes(given.bundle, modules / "onnxruntime-web" / "dist")
    with ThreadingHTTPServer(("127.0.0.1", given.port), handler(files)) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def routes(bundle: pathlib.Path, runtime: pathlib.Path) -> dict[str, pathlib.Path]:
    """The addresses that both pages need, and their files. runtime: of onnxruntime-web."""
    files = {"/model.edgec": bundle, "/style.css": PAGE / "style.css"}
    files |= {f"/{name}": HOSTS / name for name in ("edgec.mjs", "image.mjs")}
    return files | {f"/ort/{path.name}": path for path in runtime.iterdir()}


def picture_routes(sample: pathlib.Path | None) -> dict[str, pathlib.Path]:
    """Those of the page for a classifier."""
    files = {"/": PAGE / "index.html", "/app.mjs": PAGE / "app.mjs"}
    return files | ({"/sample": sample} if sample is not None else {})


def chat_routes(modules: pathlib.Path) -> dict[str, pathlib.Path]:
    """Those of the page for a language model. modules: what npm installed."""
    files = {"/": PAGE / "chat.html"}
    files |= {f"/{name}": PAGE / name for name in ("chat.mjs", "chat_worker.mjs")}
    files |= {f"/{name}": HOSTS / name for name in ("generate.mjs", "sampling.mjs", "text.mjs")}
    packages = modules / "@huggingface"
    return files | {
        "/jinja.mjs": packages / "jinja" / "dist" / "index.js",
        "/tokenizers.mjs": packages / "tokenizers" / "dist" / "tokenizers.min.mjs",
    }


def handler(files: Mapping[str, pathlib.Path]) -> type[BaseHTTPRequestHandler]:
    """Answers GET and HEAD for these files, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802 - the name that http.server calls
            self._answer(body=False)

        def do_GET(self) -> None:  # noqa: N802
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = files.get(self.path.partition("?")[0])
            if path is None or not path.is_file():
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(path.stat().st_size))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            if body:
                with open(path, "rb") as stream:
                    shutil.copyfileobj(stream, self.wfile)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

    return Handler


def demo_photograph() -> pathlib.Path | None:
    """A photograph of the demo; None where its package is not installed."""
    sys.path.insert(0, str(PAGE.parent))
    import photographs

    try:
        return next(p.path for p in photographs.labelled() if p.path.stem == "puppy")
    except EdgecError:
        return None


if __name__ == "__main__":
    main()
