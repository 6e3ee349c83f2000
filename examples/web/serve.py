"""Serves a page that runs a bundle: a classifier of pictures, in any browser.

    edgec devices install node-wasm      # fetches onnxruntime-web, once
    edgec build examples/efficientnet_lite0.py:build --target web -o build/
    python examples/web/serve.py build/efficientnet-lite0.web.edgec

Then open the address that is printed. The page is index.html, style.css and app.mjs; it needs
edgec.mjs and image.mjs (part of edgec), and onnxruntime-web. Any server of static files will
do for a page of your own. This one listens on this machine only, and sends the two headers
that let WebAssembly use threads.
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

PAGE = pathlib.Path(__file__).parent
TYPES = {
    ".css": "text/css",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".mjs": "text/javascript",
    ".png": "image/png",
    ".wasm": "application/wasm",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=pathlib.Path, help="a classifier, built for web")
    parser.add_argument("--sample", type=pathlib.Path, help="the sample picture")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    given = parser.parse_args()
    if not given.bundle.is_file():
        sys.exit(f"{given.bundle}: there is no such file; build it first, see --help")
    profile = load_profile("node-wasm")
    if reason := missing(profile):
        sys.exit(f"onnxruntime-web: {reason}")
    runtime = installed_folder(profile) / MODULES / "node_modules" / "onnxruntime-web" / "dist"
    files = routes(given.bundle, given.sample or demo_photograph(), runtime)
    with ThreadingHTTPServer(("127.0.0.1", given.port), handler(files)) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def routes(
    bundle: pathlib.Path, sample: pathlib.Path | None, runtime: pathlib.Path
) -> dict[str, pathlib.Path]:
    """Every address that is served, and its file. runtime: the folder of onnxruntime-web."""
    files = {"/": PAGE / "index.html", "/model.edgec": bundle}
    files |= {f"/{name}": PAGE / name for name in ("app.mjs", "style.css")}
    files |= {f"/{name}": HOSTS / name for name in ("edgec.mjs", "image.mjs")}
    files |= {f"/ort/{path.name}": path for path in runtime.iterdir()}
    return files | ({"/sample": sample} if sample is not None else {})


def handler(files: Mapping[str, pathlib.Path]) -> type[BaseHTTPRequestHandler]:
    """Answers GET and HEAD for these files, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802 - the name that http.server calls
            self._answer(body=False)

        def do_GET(self) -> None:  # noqa: N802
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = files.get(self.path)
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
