"""The command line: ``loom``. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve import commands, experiment_cli, merge_cli, offline
from serve.commands import Service
from serve.console import DEFAULT_URL, ApiKey, Url
from serve.identity import Scope

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
keys = typer.Typer(help="API keys, in the registry's database.", no_args_is_help=True)
store = typer.Typer(help="The store of a running service.", no_args_is_help=True)
app.add_typer(experiment_cli.experiments, name="experiments")
app.add_typer(experiment_cli.aliases, name="aliases")
app.command("merge")(merge_cli.merge)
app.add_typer(merge_cli.merges, name="merges")
app.add_typer(zoo, name="zoo")
app.add_typer(keys, name="keys")
app.add_typer(store, name="store")

console = Console()

Config = Annotated[Path | None, typer.Option(help="Configuration in YAML; LOOM_… variables override it.")]


@app.command()
def serve(
    config: Config = None,
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
    key: ApiKey = None,
) -> None:
    """Ask about an image, through the base, an adapter, or a combination."""
    commands.chat(console, Service(url, key), question, image or [], adapter or [], max_tokens, temperature)


@adapters.command("ls")
def list_adapters(url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """List what is registered."""
    commands.list_adapters(console, Service(url, key))


@adapters.command("add")
def add_adapter(
    name: Annotated[str, typer.Argument(help="The name requests will use.")],
    path: Annotated[Path, typer.Argument(help="A PEFT adapter folder on the serving machines.")],
    activate: Annotated[bool, typer.Option(help="Whether the bare name means it from now on.")] = True,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Examine an adapter and register it; other content under a known name is a further version."""
    commands.add_adapter(console, Service(url, key), name, path, activate=activate)


@adapters.command("upload")
def upload_adapter(
    name: Annotated[str, typer.Argument(help="The name requests will use.")],
    path: Annotated[Path, typer.Argument(help="A PEFT adapter folder on this machine.")],
    activate: Annotated[bool, typer.Option(help="Whether the bare name means it from now on.")] = True,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Send an adapter's files to the service and register them; other content is a further version."""
    commands.upload_adapter(console, Service(url, key), name, path, activate=activate)


@adapters.command("versions")
def list_versions(
    name: Annotated[str, typer.Argument(help="The adapter's name.")], url: Url = DEFAULT_URL, key: ApiKey = None
) -> None:
    """List an adapter's versions and what its aliases mean."""
    commands.list_versions(console, Service(url, key), name)


@adapters.command("alias")
def set_alias(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    alias: Annotated[str, typer.Argument(help="The alias; 'latest' is what the bare name means.")],
    version: Annotated[str, typer.Argument(help="A version, the beginning of one, or another alias.")],
    pin: Annotated[bool | None, typer.Option(help="Whether every engine keeps it in a slot.")] = None,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Let an alias mean a version from now on; requests that run end as they began."""
    commands.set_alias(console, Service(url, key), name, alias, version, pin)


@adapters.command("rm")
def remove_adapter(
    name: Annotated[str, typer.Argument(help="The adapter's name.")], url: Url = DEFAULT_URL, key: ApiKey = None
) -> None:
    """Forget an adapter, with its versions and aliases."""
    commands.remove_adapter(console, Service(url, key), name)


@store.command("collect")
def collect(url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Take out of the store what no version and no job names any more, and has not for a while."""
    commands.collect(console, Service(url, key))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is; the audit says so.")],
    scope: Annotated[list[Scope], typer.Option("--scope", "-s", help="What it is good for; repeat for several.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="Names it reaches, as support-*; repeat. All if none.")
    ] = None,
    per_minute: Annotated[int | None, typer.Option(help="Requests a minute.", min=1)] = None,
    concurrent: Annotated[int | None, typer.Option(help="Requests at once.", min=1)] = None,
    days: Annotated[float | None, typer.Option(help="How long it is valid; for ever if not given.", min=0)] = None,
    config: Config = None,
) -> None:
    """Make an API key and print it, this once. Needs the registry's database, not the service."""
    limits = offline.KeyLimits(adapters=adapter, per_minute=per_minute, concurrent=concurrent, days=days)
    offline.create_key(console, config, name, scope, limits)


@keys.command("ls")
def list_keys(config: Config = None) -> None:
    """List all keys there ever were."""
    offline.list_keys(console, config)


@keys.command("revoke")
def revoke_key(
    identifier: Annotated[str, typer.Argument(help="The key's id: its middle part.")], config: Config = None
) -> None:
    """End a key's validity; gateways know within a second."""
    offline.revoke_key(console, config, identifier)


@app.command()
def combine(
    adapter: Annotated[list[str], typer.Argument(help="FOLDER or FOLDER:WEIGHT, two or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the combined adapter; must not exist.")],
    base: Annotated[Path | None, typer.Option(help="The base's checkpoint folder; the demo's if not given.")] = None,
) -> None:
    """Write base + Σ weight·Δ of several adapters as one PEFT adapter. Exact; needs no service."""
    offline.combine(console, adapter, out, base)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="A PEFT adapter folder.")],
    base: Annotated[Path | None, typer.Option(help="The base's checkpoint folder; the demo's if not given.")] = None,
    fix: Annotated[Path | None, typer.Option(help="Write a repaired adapter to this folder; must not exist.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Run the base with and without it; loads the base.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Say what is wrong with an adapter, what is odd about it, and what to do. Exits with 1 if it cannot be served."""
    offline.doctor(console, path, base, fix=fix, probe=probe, as_json=as_json)


@zoo.command("build")
def build_zoo(
    out: Annotated[Path | None, typer.Option(help="Folder to build in; the installed zoo's if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
) -> None:
    """Train the base and its adapters anew: up to 15 minutes on two cores."""
    offline.build_zoo(console, out, seed)


@zoo.command("check")
def check_zoo(
    path: Annotated[Path | None, typer.Option(help="A built zoo; the installed one if not given.")] = None,
) -> None:
    """Measure the zoo's accuracy on held-out pictures."""
    offline.check_zoo(console, path)


@zoo.command("picture")
def zoo_picture(
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    task: Annotated[str, typer.Option(help="Whose question to print.")] = "colour",
    number: Annotated[int, typer.Option(help="Which held-out example.", min=0, max=9999)] = 0,
) -> None:
    """Draw a held-out picture, and print a question about it with its right answer."""
    offline.zoo_picture(console, out, task, number)


def main() -> None:
    """Entry point of the command ``loom``."""
    app()


if __name__ == "__main__":
    main()
