"""What commands print, and how they end when they cannot go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Url = Annotated[str, typer.Option("--url", envvar="LOOM_URL", help="Where the service answers.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="LOOM_API_KEY", help="Where one is asked for.")]
DEFAULT_URL = "http://127.0.0.1:8000"


def print_findings(console: Console, findings: Sequence[dict[str, Any]]) -> None:
    if not findings:
        return
    table = Table("", "finding", "what it means, and what to do", show_lines=True)
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in findings:
        advice = f"[dim]{escape(finding['advice'])}[/]" if finding["advice"] else ""
        said = "\n".join(filter(None, (escape(finding["message"]), advice)))
        table.add_row(f"[{colours[finding['severity']]}]{finding['severity']}[/]", finding["code"], said)
    console.print(table)


def stop(console: Console, message: str) -> NoReturn:
    console.print(f"[bold red]Error:[/] {message}", highlight=False)
    raise typer.Exit(1)


def read_mapping(console: Console, file: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds; the command ends where that is no mapping."""
    try:
        loaded = yaml.safe_load(file.read_text())
    except OSError as error:
        stop(console, f"{file} cannot be read: {error.strerror}.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        stop(console, f"{file} is no valid YAML: {error}")
    if not isinstance(loaded, dict):
        stop(console, f"{file} must hold a mapping, such as 'name: …'.")
    return loaded
