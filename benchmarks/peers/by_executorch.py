"""ExecuTorch's XNNPACK quantizer: static int8 for convolutions, dynamic for the rest."""

from __future__ import annotations

import pathlib

from peers import cases


def quantize(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """program.pt2 -> .pte in int8. Raises FileNotFoundError without a torch program."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    if not (folder / "program.pt2").exists():
        raise FileNotFoundError("no torch source: this converter starts from torch programs")
    torch.set_num_threads(1)
    static = cases.read_case(folder).calibrated
    module = torch.export.load(folder / "program.pt2").module()
    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_dynamic=not static)
    )
    prepared = prepare_pt2e(module, quantizer)
    arguments = ()
    for sample in cases.feeds(folder, "calibration", limit if static else 1):
        arguments = tuple(torch.from_numpy(array) for array in sample.values())
        with torch.no_grad():
            prepared(*arguments)
    program = torch.export.export(convert_pt2e(prepared), arguments)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    out.write_bytes(lowered.to_executorch().buffer)
