"""The command line: ``loom``. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve import commands

app = typer.Typer(
    name="loom",
    help="Serve one Qwen2-VL base and many PEFT adapters, and weighted combinations of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
adapters = typer.Typer(help="Adapters of a running service.", no_args_is_help=True)
zoo = typer.Typer(help="The demo world: a tiny base and six adapters with skills.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")
app.add_typer(zoo, name="zoo")

console = Console()

Url = Annotated[str, typer.Option("--url", envvar="LOOM_URL", help="Where the service answers.")]
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="Configuration in YAML; LOOM_… variables override it.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to deploy to; a local one if not given.")] = None,
) -> None:
    """Start the service and keep it up until Ctrl-C. Without options it serves the demo world."""
    commands.serve(console, config, host=host, port=port, address=address)


@app.command()
def chat(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="An image file; repeat for several.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="NAME or NAME:WEIGHT; repeat to combine.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    url: Url = DEFAULT_URL,
) -> None:
    """Ask about an image, through the base, an adapter, or a combination."""
    commands.chat(console, url, question, image or [], adapter or [], max_tokens, temperature)


@adapters.command("ls")
def list_adapters(url: Url = DEFAULT_URL) -> None:
    """List what is registered."""
    commands.list_adapters(console, url)


@adapters.command("add")
def add_adapter(
    name: Annotated[str, typer.Argument(help="The name requests will use.")],
    path: Annotated[Path, typer.Argument(help="A PEFT adapter folder on the serving machines.")],
    activate: Annotated[bool, typer.Option(help="Whether the bare name means it from now on.")] = True,
    url: Url = DEFAULT_URL,
) -> None:
    """Examine an adapter and register it; other content under a known name is a further version."""
    commands.add_adapter(console, url, name, path, activate=activate)


@adapters.command("versions")
def list_versions(name: Annotated[str, typer.Argument(help="The adapter's name.")], url: Url = DEFAULT_URL) -> None:
    """List an adapter's versions and what its aliases mean."""
    commands.list_versions(console, url, name)


@adapters.command("alias")
def set_alias(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    alias: Annotated[str, typer.Argument(help="The alias; 'latest' is what the bare name means.")],
    version: Annotated[str, typer.Argument(help="A version, the beginning of one, or another alias.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Let an alias mean a version from now on; requests that run end as they began."""
    commands.set_alias(console, url, name, alias, version)


@adapters.command("rm")
def remove_adapter(name: Annotated[str, typer.Argument(help="The adapter's name.")], url: Url = DEFAULT_URL) -> None:
    """Forget an adapter; its files stay."""
    commands.remove_adapter(console, url, name)


@app.command()
def combine(
    adapter: Annotated[list[str], typer.Argument(help="FOLDER or FOLDER:WEIGHT, two or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the combined adapter; must not exist.")],
    base: Annotated[Path | None, typer.Option(help="The base's checkpoint folder; the demo's if not given.")] = None,
) -> None:
    """Write base + Σ weight·Δ of several adapters as one PEFT adapter. Exact; needs no service."""
    commands.combine(console, adapter, out, base)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="A PEFT adapter folder.")],
    base: Annotated[Path | None, typer.Option(help="The base's checkpoint folder; the demo's if not given.")] = None,
    fix: Annotated[Path | None, typer.Option(help="Write a repaired adapter to this folder; must not exist.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Run the base with and without it; loads the base.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Say what is wrong with an adapter, what is odd about it, and what to do. Exits with 1 if it cannot be served."""
    commands.doctor(console, path, base, fix=fix, probe=probe, as_json=as_json)


@zoo.command("build")
def build_zoo(
    out: Annotated[Path | None, typer.Option(help="Folder to build in; the installed zoo's if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
) -> None:
    """Train the base and its adapters anew: up to 15 minutes on two cores."""
    commands.build_zoo(console, out, seed)


@zoo.command("check")
def check_zoo(
    path: Annotated[Path | None, typer.Option(help="A built zoo; the installed one if not given.")] = None,
) -> None:
    """Measure the zoo's accuracy on held-out pictures."""
    commands.check_zoo(console, path)


@zoo.command("picture")
def zoo_picture(
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    task: Annotated[str, typer.Option(help="Whose question to print.")] = "colour",
    number: Annotated[int, typer.Option(help="Which held-out example.", min=0, max=9999)] = 0,
) -> None:
    """Draw a held-out picture, and print a question about it with its right answer."""
    commands.zoo_picture(console, out, task, number)


def main() -> None:
    """Entry point of the command ``loom``."""
    app()


if __name__ == "__main__":
    main()
