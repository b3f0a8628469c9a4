"""What the commands of ``loom`` do. ``cli.py`` only says how they are called."""

from __future__ import annotations

import base64
import json
import mimetypes
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_runtime.errors import LoomError
from serve.config import ConfigurationError, load_settings

TIMEOUT_S = 300.0


def serve(console: Console, config: Path | None, *, host: str | None, port: int | None, address: str | None) -> None:
    try:
        settings = load_settings(config)
    except ConfigurationError as error:
        _stop(console, str(error))
    listening = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update={"server": settings.server.model_copy(update=listening)})
    from serve.launch import running, wait_for_signal

    with console.status("Starting Ray Serve…"):
        context = running(settings, address=address)
        url = context.__enter__()
    try:
        console.print(f"[bold green]Ready[/] at {url}  (API: {url}/docs, Ctrl-C stops)")
        for line in _sample_lines(settings.state_dir, url, settings.base.name):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        wait_for_signal()
        console.print("Stopping…")
    finally:
        context.__exit__(None, None, None)


def chat(
    console: Console,
    url: str,
    question: str,
    images: Sequence[Path],
    adapters: Sequence[str],
    max_tokens: int,
    temperature: float,
) -> None:
    content: list[dict[str, Any]] = [_image_part(console, image) for image in images]
    content.append({"type": "text", "text": question})
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "adapters": [_weighted(console, text) for text in adapters],
    }
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S) as response:
            if response.status_code != 200:
                response.read()
                _stop(console, _message(response))
            for line in response.iter_lines():
                _print_chunk(console, line)
    except httpx.HTTPError as error:
        _unreachable(console, url, error)
    console.print()


def list_adapters(console: Console, url: str) -> None:
    found = _request(console, "GET", url, "/v1/adapters")["data"]
    table = Table("name", "version", "rank", "LoRA modules", "saved modules", "heads", "MB", "registered")
    for adapter in found:
        info = adapter["info"]
        table.add_row(
            adapter["id"],
            adapter["version"][:12],
            str(info["max_rank"]),
            str(info["lora_modules"]),
            ", ".join(info["saved_modules"]) or "-",
            ", ".join(info["heads"]) or "-",
            f"{info['num_bytes'] / 1e6:.2f}",
            adapter["created"][:19].replace("T", " "),
        )
    console.print(table)


def add_adapter(console: Console, url: str, name: str, path: Path, *, activate: bool = True) -> None:
    body = {"name": name, "path": str(path.expanduser().absolute()), "activate": activate}
    added = _request(console, "POST", url, "/v1/adapters", json=body)
    if findings := added["info"].get("findings"):
        _print_findings(console, findings)
    console.print(f"Registered [bold]{added['id']}[/]; its name means {added['version'][:12]}.")


def list_versions(console: Console, url: str, name: str) -> None:
    table = Table("number", "version", "aliases", "method", "MB", "registered")
    for version in _request(console, "GET", url, f"/v1/adapters/{name}/versions")["data"]:
        info = version["info"]
        table.add_row(
            str(version["number"]),
            version["id"][:12],
            ", ".join(version["aliases"]) or "-",
            info.get("method", "LORA"),
            f"{info['num_bytes'] / 1e6:.2f}",
            version["created"][:19].replace("T", " "),
        )
    console.print(table)


def set_alias(console: Console, url: str, name: str, alias: str, version: str) -> None:
    moved = _request(console, "PUT", url, f"/v1/adapters/{name}/aliases/{alias}", json={"version": version})
    console.print(f"[bold]{name}@{alias}[/] means {moved['aliases'][alias][:12]}.")


def remove_adapter(console: Console, url: str, name: str) -> None:
    _request(console, "DELETE", url, f"/v1/adapters/{name}")
    console.print(f"Removed [bold]{name}[/]; its files stay.")


def combine(console: Console, adapters: Sequence[str], out: Path, base: Path | None) -> None:
    from lora_runtime.checkpoint import read_adapter
    from lora_runtime.combine import combine as combined
    from lora_runtime.export import write_adapter
    from lora_runtime.layout import BaseLayout
    from lora_runtime.materialise import Materialiser
    from lora_runtime.parameters import BaseParameters
    from lora_runtime.zoo import paths

    folder = base or paths.BASE
    try:
        layout, parameters = BaseLayout.from_config(folder), BaseParameters(folder)
        own = Materialiser(parameters, sys.maxsize)
        members = [(read_adapter(path, layout, own), weight) for path, weight in map(_folder_and_weight, adapters)]
        weights = combined(members, parameters)
        name = paths.BASE_NAME if base is None else str(folder)
        write_adapter(weights, out, layout, base_name=name)
    except LoomError as error:
        _stop(console, error.message)
    console.print(f"Wrote [bold]{out}[/]: {len(weights.modules)} modules, {weights.num_bytes / 1e6:.2f} MB.")


def doctor(console: Console, path: Path, base: Path | None, *, fix: Path | None, probe: bool, as_json: bool) -> None:
    from lora_runtime.behaviour import behaviour
    from lora_runtime.doctor import diagnose, seen
    from lora_runtime.export import write_adapter
    from lora_runtime.layout import BaseLayout
    from lora_runtime.materialise import Materialiser
    from lora_runtime.parameters import BaseParameters
    from lora_runtime.zoo import paths

    _without_loading_bars()
    folder = base or paths.BASE
    try:
        layout = BaseLayout.from_config(folder)
        found = diagnose(path, layout, Materialiser(BaseParameters(folder), sys.maxsize))
        findings = list(found.findings)
        if probe and found.weights is not None:
            findings.append(seen(behaviour(str(folder), found.weights)))
        if fix is not None and found.weights is not None:
            name = paths.BASE_NAME if base is None else str(folder)
            write_adapter(found.weights, fix, layout, base_name=name)
    except LoomError as error:
        _stop(console, error.message)
    if as_json:
        answer = {"servable": found.is_servable, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print_findings(console, [asdict(finding) for finding in findings])
        console.print("It can be served." if found.is_servable else "[red]It cannot be served on this base.[/]")
        if fix is not None and found.is_servable:
            console.print(f"Wrote [bold]{fix}[/], the same function under today's names.")
    if not found.is_servable:
        raise typer.Exit(1)


def _print_findings(console: Console, findings: Sequence[dict[str, Any]]) -> None:
    if not findings:
        return
    table = Table("", "finding", "what it means, and what to do", show_lines=True)
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in findings:
        advice = f"[dim]{escape(finding['advice'])}[/]" if finding["advice"] else ""
        said = "\n".join(filter(None, (escape(finding["message"]), advice)))
        table.add_row(f"[{colours[finding['severity']]}]{finding['severity']}[/]", finding["code"], said)
    console.print(table)


def build_zoo(console: Console, out: Path | None, seed: int) -> None:
    from lora_runtime.zoo import paths
    from lora_runtime.zoo.build import build

    _without_loading_bars()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Any] = {}

        def report(stage: str, step: int, steps: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=steps)
            progress.update(bars[stage], completed=step)

        build(out or paths.ZOO, seed=seed, report=report)
    check_zoo(console, out)


def check_zoo(console: Console, path: Path | None) -> None:
    from lora_runtime.zoo import paths
    from lora_runtime.zoo.check import check

    _without_loading_bars()
    table = Table("model", "task", "accuracy", "chance", "base on it")
    is_good = True
    for row in check(path or paths.ZOO):
        is_good &= row.is_good
        colour = "green" if row.is_good else "red"
        base = "-" if row.base_accuracy is None else f"{row.base_accuracy:.1%}"
        table.add_row(row.model, row.task, f"[{colour}]{row.accuracy:.1%}[/]", f"{row.chance:.1%}", base)
    console.print(table)
    if not is_good:
        raise typer.Exit(1)


def zoo_picture(console: Console, out: Path, task: str, number: int) -> None:
    from lora_runtime.zoo.tasks import TASKS, examples

    if task not in TASKS:
        _stop(console, f"There is no task '{task}'; choose one of {', '.join(TASKS)}.")
    example = examples(task, "heldout", number + 1)[number]
    example.image.save(out, "PNG")
    console.print(f"{out}\nquestion: {example.question}\nanswer:   {example.answer}", highlight=False)


def _without_loading_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it without annotations


def _sample_lines(state_dir: Path, url: str, base_name: str) -> list[str]:
    """Three requests that are ready to run; their bodies, with a picture, are written to files."""
    from lora_runtime.zoo.tasks import examples

    state_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for model, task in ((base_name, "colour"), ("shape", "shape"), ("shape:1+french:1", "french")):
        example = examples(task, "heldout", 1)[0]
        file = state_dir / f"ask-{task}.json"
        picture = state_dir / f"{task}.png"
        example.image.save(picture, "PNG")
        content = [_data_part(picture.read_bytes(), "image/png"), {"type": "text", "text": example.question}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32}
        file.write_text(json.dumps(body))
        lines.append(f"\n# {model}: {example.question}  (right answer: {example.answer})")
        lines.append(f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d @{file}")
    return lines


def _image_part(console: Console, image: Path) -> dict[str, Any]:
    kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    try:
        return _data_part(image.read_bytes(), kind)
    except OSError as error:
        _stop(console, f"{image} cannot be read: {error.strerror}.")


def _data_part(data: bytes, kind: str) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded}"}}


def _weighted(console: Console, text: str) -> dict[str, Any]:
    name, colon, weight = text.partition(":")
    try:
        return {"id": name, "weight": float(weight) if colon else 1.0}
    except ValueError:
        _stop(console, f"'{text}' is no adapter with a weight; write NAME or NAME:0.7.")


def _folder_and_weight(text: str) -> tuple[Path, float]:
    folder, colon, weight = text.rpartition(":")
    try:
        return (Path(folder), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _print_chunk(console: Console, line: str) -> None:
    data = line.removeprefix("data: ")
    if not line.startswith("data: ") or data == "[DONE]":
        return
    chunk = json.loads(data)
    if "error" in chunk:
        _stop(console, chunk["error"]["message"])
    for choice in chunk["choices"]:
        console.print(choice["delta"].get("content") or "", end="", markup=False, highlight=False)


def _request(console: Console, method: str, url: str, path: str, **options: Any) -> Any:
    try:
        response = httpx.request(method, url + path, timeout=TIMEOUT_S, **options)
    except httpx.HTTPError as error:
        _unreachable(console, url, error)
    if response.is_error:
        _stop(console, _message(response))
    return response.json()


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The service answered {response.status_code}."


def _unreachable(console: Console, url: str, error: httpx.HTTPError) -> NoReturn:
    _stop(console, f"No answer from {url} ({type(error).__name__}). Is 'loom serve' running there?")


def _stop(console: Console, message: str) -> NoReturn:
    console.print(f"[bold red]Error:[/] {message}", highlight=False)
    raise typer.Exit(1)
