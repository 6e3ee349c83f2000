"""``edgec run``: a bundle on data, on a picture, or, if it is a language model, on a prompt."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import click

from edgec.cli_console import console, json_option

# options that need --prompt
_TALK = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "seed",
    "raw",
    "draft",
    "draft_tokens",
    "sinks",
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@click.option("--input", "data", metavar="DATA", help="Feeds, as for build; one run per sample.")
@click.option(
    "--image",
    type=click.Path(path_type=pathlib.Path),
    help="A picture, prepared as the bundle says (needs Pillow).",
)
@click.option(
    "--prompt",
    metavar="TEXT",
    help="Answer TEXT, printed as it comes, with a language model; - reads standard input.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt; leave the chat template out.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of the answer.")
@click.option("--temperature", type=float, help="0: the likeliest token; above: drawn by chance.")
@click.option("--top-k", type=int, help="Draw from this many tokens.  [0: all]")
@click.option("--top-p", type=float, help="Draw from the likeliest that have this share.")
@click.option("--min-p", type=float, help="Draw from those with this share of the likeliest one.")
@click.option("--repetition-penalty", type=float, help="Above 1: repeats become less likely.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the answer.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws.")
@click.option(
    "--draft",
    type=click.Path(path_type=pathlib.Path),
    metavar="BUNDLE",
    help="A smaller model of the same vocabulary that guesses what comes: the same answer, sooner.",
)
@click.option("--draft-tokens", type=click.IntRange(1), help="Guesses at once.  [default: 2]")
@click.option(
    "--sinks",
    type=click.IntRange(0),
    help="Go on where the context is full, with this many tokens of the beginning (such as 4); "
    "needs --max-new-tokens.",
)
@click.option(
    "--on",
    "device",
    metavar="DEVICE",
    help="Answer there: an emulated CPU of `edgec devices`, or native for a process of its own.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=pathlib.Path),
    help="Write the outputs to this .npz file.",
)
@click.option("--threads", type=click.IntRange(0, 1024), help="Instead of the manifest's.")
@click.option("--any-target", is_flag=True, help="Also run a bundle of another device class.")
@json_option
def run(bundle: pathlib.Path, as_json: bool, prompt: str | None, **options: Any) -> None:
    """Run BUNDLE on data or on a picture and print its outputs, or answer a prompt.

    What a prompt's answer is drawn from is the model maker's recommendation unless options say
    otherwise.
    """
    talk = {name: options.pop(name) for name in _TALK}
    device = options.pop("device")
    if prompt is not None:
        _answer(bundle, prompt, talk, options, device=device, as_json=as_json)
        return
    if device is not None:
        raise click.UsageError("--on needs --prompt; `edgec verify --on` runs samples on a device")
    ctx = click.get_current_context()
    for name in _TALK:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --prompt")
    from edgec.report_terminal import print_facts
    from edgec.run_bundle import run_bundle

    facts = run_bundle(bundle, **options)
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        print_facts(facts, console())


def _answer(
    bundle: pathlib.Path,
    prompt: str,
    talk: dict[str, Any],
    options: dict[str, Any],
    *,
    device: str | None,
    as_json: bool,
) -> None:
    """Print the answer piece by piece, or as JSON when it is whole."""
    from edgec.run_bundle import Opening, stream_answer, whole_answer

    for name in ("data", "image", "output"):
        if options[name] is not None:
            given = "input" if name == "data" else name
            raise click.UsageError(f"--prompt and --{given} exclude each other")
    draft = talk.pop("draft")
    if draft is None and talk["draft_tokens"] is not None:
        raise click.UsageError("--draft-tokens needs --draft")
    if draft is not None and device is not None:
        raise click.UsageError("--draft and --on exclude each other")
    if draft is not None and talk["sinks"] is not None:
        raise click.UsageError("--draft and --sinks exclude each other")
    if talk["sinks"] is not None and talk["max_new_tokens"] is None:
        raise click.UsageError("--sinks needs --max-new-tokens")
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    opening = Opening(options["threads"], options["any_target"], talk.pop("raw"), device, draft)
    settings: Any = {name: value for name, value in talk.items() if value is not None}
    if as_json:
        facts = whole_answer(bundle, prompt, settings=settings, opening=opening)
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    for piece in stream_answer(bundle, prompt, settings=settings, opening=opening):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
