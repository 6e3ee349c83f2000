"""The command ``edgec adapt``."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import click

from edgec.cli_console import console, json_option, progress_bar


@click.command()
@click.argument("base")
@click.option("--data", required=True, metavar="DATA", help="Labelled samples, as for build.")
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=pathlib.Path),
    help="The adapted model, .onnx, or the adapter, .onnx_adapter.",
)
@click.option("--evaluation", metavar="DATA", help="Labelled samples to judge by.")
@click.option("--old-evaluation", metavar="DATA", help="The same, of what was learned before.")
@click.option(
    "--method",
    type=click.Choice(["head", "full", "lora"]),
    help="Train the last layer, every weight, or small matrices beside the layers.  "
    "[default: full; lora for a bundle]",
)
@click.option("--classes", type=click.IntRange(1), help="Classes of a head of another size.")
@click.option(
    "--head",
    type=click.Choice(["new", "grow"]),
    default="new",
    show_default=True,
    help="With --classes: forget the classes there were, or keep them as the first.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=400, show_default=True, help="Training steps."
)
@click.option(
    "--batch", type=click.IntRange(1), default=32, show_default=True, help="Samples a step."
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Learning rate of Adam at its peak.",
)
@click.option("--rank", type=click.IntRange(1), help="Of LoRA.  [default: 4; the bundle's own]")
@click.option(
    "--alpha",
    type=click.FloatRange(0, min_open=True),
    default=8.0,
    show_default=True,
    help="Of LoRA: alpha / rank scales what the matrices do.",
)
@click.option("--layer", "layers", multiple=True, help="Node to put LoRA beside. May be repeated.")
@click.option("--memory", metavar="FILE", help="What an earlier round remembered, .npz.")
@click.option(
    "--replay",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of a step's samples that come from the memory.",
)
@click.option(
    "--keep-weight",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of staying with the answers from before (learning without forgetting).",
)
@click.option(
    "--ewc-weight",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of staying with the weights from before where they matter to the memory.",
)
@click.option(
    "--remember",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Samples of each class to keep for the next round, beside the output.",
)
@click.option("--target", "-t", metavar="NAME|FILE", help="Whose opset it gets.  [default: x86-64]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of every random choice.",
)
@json_option
def adapt(base: str, as_json: bool, **options: Any) -> None:
    """Teach BASE the labels of your data: a new model, or an adapter for a bundle.

    BASE is a source, as for build, and gives an .onnx file to build; or a bundle with adapter
    slots and its reference beside it, and gives an adapter that the device swaps in.
    """
    from edgec.adaptation import adapt as teach
    from edgec.report_terminal import print_facts

    settings = {name: value for name, value in options.items() if value is not None}
    with progress_bar(quiet=as_json) as progress:
        adaptation = teach(base, progress=progress, **settings)
    if as_json:
        click.echo(json.dumps(adaptation.facts(), indent=2, sort_keys=True))
    else:
        print_facts(adaptation.facts(), console())
