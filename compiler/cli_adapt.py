"""The command ``edgec adapt``."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import click

from edgec.cli_console import console, exit_with, json_option, progress_bar, seed_option


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
    help="With --classes: forget the classes there were, or keep them as the first.  "
    "[default: new]",
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
    help="Of LoRA: alpha / rank scales what the matrices do.  [default: 8]",
)
@click.option("--layer", "layers", multiple=True, help="Node to put LoRA beside. May be repeated.")
@click.option("--memory", metavar="FILE", help="What an earlier round remembered, .npz.")
@click.option(
    "--replay",
    type=click.FloatRange(0, 1, max_open=True),
    help="With --memory: share of a step's samples that come from it.  [default: 0.5]",
)
@click.option(
    "--keep-weight",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of staying with the answers from before (learning without forgetting).",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    help="With --keep-weight: softens the answers from before.  [default: 2]",
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
@click.option(
    "--warmup",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.3,
    show_default=True,
    help="Share of the steps in which the rate climbs; then it falls by a cosine.",
)
@click.option(
    "--judgements",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Times that held-out samples are judged.",
)
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Judgements without a better one after which it ends; 0: never early.",
)
@click.option(
    "--micro-batch",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Samples computed at once, gradients are summed; 0: the batch.",
)
@click.option(
    "--segments",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Parts of the graph that are computed again backwards, to save memory.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bf16"]),
    default="float32",
    show_default=True,
    help="Of products while training.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="The bytes of the result depend on it.",
)
@click.option(
    "--save-every",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Steps between two checkpoints, from which the same command goes on when killed.",
)
@click.option("--target", "-t", metavar="NAME|FILE", help="Whose opset it gets.  [default: x86-64]")
@seed_option
@json_option
def adapt(base: str, as_json: bool, **options: Any) -> None:
    """Teach BASE the labels of your data: a new model, or an adapter for a bundle.

    BASE is a source, as for build, and gives an .onnx file to build; or a bundle with adapter
    slots and its reference beside it, and gives an adapter that the device swaps in.
    """
    from edgec.adaptation import adapt as teach
    from edgec.adaptation import work_beside
    from edgec.report_terminal import print_facts

    # what is not given is not passed on: a setting without effect is refused
    settings = {name: value for name, value in options.items() if value not in (None, ())}
    try:
        with progress_bar(quiet=as_json) as progress:
            adaptation = teach(base, progress=progress, **settings)
    except KeyboardInterrupt:
        work = work_beside(options["output"])
        if not any(work.glob("*.safetensors")):
            raise  # nothing was learned that could be gone on with
        click.echo(
            f"edgec: interrupted; {options['output']} was not written; the same command goes on "
            f"from the checkpoint in {work}",
            err=True,
        )
        exit_with(1)
    if as_json:
        click.echo(json.dumps(adaptation.facts(), indent=2, sort_keys=True))
    else:
        print_facts(adaptation.facts(), console())
