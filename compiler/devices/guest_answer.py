"""Answers one prompt on a device: python guest_answer.py FOLDER. Needs edgec_runtime alone.

FOLDER holds the bundle and asked.json: its name, the tokens of the prompt, threads, and options of
``Model.generate``. Every token of the answer is printed as it comes, a line of JSON each:
{"token": 17}; then {"end": ""}, or why there are no more: {"end": "reason"}. No tokenizer is
needed here: whoever reads the lines has one.
"""

import json
import pathlib
import sys

ASKED = "asked.json"


def main(folder: pathlib.Path) -> None:
    """Answers what the folder asks."""
    import edgec_runtime

    asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    reason = ""
    try:
        model = edgec_runtime.load(
            folder / asked["bundle"], threads=asked["threads"], any_target=True
        )
        for token in model.generate(asked["tokens"], stream="tokens", **asked["options"]):
            print(json.dumps({"token": token}), flush=True)
    except edgec_runtime.EdgecError as error:
        reason = str(error)
    print(json.dumps({"end": reason}), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
