"""WebAssembly: what a language model's bundles cost there, in CPU time and memory.

    edgec devices install node-wasm
    python benchmarks/decoder_web.py build/smollm2.web.edgec build/smollm2.x86-64.edgec

Each bundle answers one question in a process of Node.js of its own, with onnxruntime-web on one
thread. A bundle for another target is opened all the same: the web's weights in blocks become
float32 at load, those of x86-64 go to MatMulNBits, and this is where the two are compared. load,
first: from the file to the model, and from the question to the first token; step: from token to
token, median; all CPU time. peak: largest resident size of the process, the file included.

Left out on purpose: whether the tokens are right (decoder_devices.py), threads, WebGPU.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from edgec.devices.install import installed_folder, missing
from edgec.devices.web import MODULES
from edgec.targets import load_profile
from edgec_runtime.bundle import read_bundle
from edgec_runtime.text import open_text

RUNNER = pathlib.Path(__file__).with_name("decoder_web.mjs")
QUESTION = "Why is the sky blue?"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "bundles", nargs="+", type=pathlib.Path, help="of language models that chat"
    )
    parser.add_argument("--tokens", type=int, default=16, help="of the answer")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    if reason := missing(load_profile("node-wasm")):
        sys.exit(f"onnxruntime-web: {reason}")
    if not asked.json:
        print("| bundle | MB | load ms | first ms | step ms | peak MB |\n|---|---|---|---|---|---|")
    for bundle in asked.bundles:
        row = {
            "bundle": bundle.name,
            "mb": bundle.stat().st_size / 1e6,
            **told(bundle, asked.tokens),
        }
        if asked.json:
            print(json.dumps(row), flush=True)
            continue
        figures = [f"{row[name]:.0f}" for name in ("load_ms", "first_ms", "step_ms", "peak_mb")]
        print(f"| {' | '.join([row['bundle'], format(row['mb'], '.1f'), *figures])} |", flush=True)


def told(bundle: pathlib.Path, tokens: int) -> dict[str, float]:
    """What Node.js prints."""
    prompt = open_text(read_bundle(bundle)).encode_chat([{"role": "user", "content": QUESTION}])
    modules = installed_folder(load_profile("node-wasm")) / MODULES
    command = ["node", RUNNER, modules, json.dumps(prompt), tokens, bundle]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{bundle}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
