"""litert-torch and its quantizer: static int8 for convolutions, dynamic int8 for the rest.

The torch program is converted to a float32 .tflite file first; the quantizer works on that.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

from peers import cases


def quantize(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """program.pt2 -> .tflite in int8. Raises FileNotFoundError without a torch program."""
    import litert_torch
    import torch
    from ai_edge_quantizer import quantizer, recipe

    if not (folder / "program.pt2").exists():
        raise FileNotFoundError("no torch source: this converter starts from torch programs")
    torch.set_num_threads(1)
    module = torch.export.load(folder / "program.pt2").module()
    [example] = cases.feeds(folder, "calibration", 1)
    arguments = tuple(torch.from_numpy(array) for array in example.values())
    with tempfile.TemporaryDirectory() as scratch:
        plain = pathlib.Path(scratch) / "float32.tflite"
        litert_torch.convert(module, arguments).export(str(plain))
        maker = quantizer.Quantizer(str(plain))
        calibrated: Any = None
        if cases.read_case(folder).calibrated:
            maker.load_quantization_recipe(recipe.static_wi8_ai8())
            calibrated = maker.calibrate(
                {
                    "serving_default": [
                        {f"args_{i}": array for i, array in enumerate(sample.values())}
                        for sample in cases.feeds(folder, "calibration", limit)
                    ]
                }
            )
        else:
            maker.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        maker.quantize(calibrated).export_model(str(out), overwrite=True)
