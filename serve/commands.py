"""What the commands of ``loom`` do that start or ask a service. ``cli.py`` only says how they are called."""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_runtime.folder import FILES
from serve.config import ConfigurationError, Settings
from serve.console import print_findings, stop
from serve.loading import load_settings
from serve.ray_environment import prepare

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Service:
    """A running service, and the key it is asked with."""

    url: str
    api_key: str | None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


def serve(console: Console, config: Path | None, *, host: str | None, port: int | None, address: str | None) -> None:
    try:
        settings = load_settings(config)
    except ConfigurationError as error:
        stop(console, str(error))
    listening = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update={"server": settings.server.model_copy(update=listening)})
    prepare(is_local=address is None)
    from serve.launch import StartFailed, running, wait_for_signal

    with console.status("Starting Ray Serve…"):
        context = running(settings, address=address)
        try:
            url = context.__enter__()
        except (StartFailed, ConfigurationError) as error:
            stop(console, escape(str(error)))
    try:
        console.print(f"[bold green]Ready[/] at {url}  (API: {url}/docs, Ctrl-C stops)")
        if not settings.auth.required and not _is_loopback(settings.server.host):
            console.print("[yellow]Anyone who reaches this port may do everything[/] (setting auth.required).")
        for line in _sample_lines(settings, url):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        wait_for_signal()
        console.print("Stopping…")
    finally:
        context.__exit__(None, None, None)


def chat(
    console: Console,
    service: Service,
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
        path = f"{service.url}/v1/chat/completions"
        with httpx.stream("POST", path, json=body, timeout=TIMEOUT_S, headers=service.headers) as response:
            if response.status_code != 200:
                response.read()
                stop(console, _message(response))
            for line in response.iter_lines():
                _print_chunk(console, line)
    except httpx.HTTPError as error:
        _unreachable(console, service.url, error)
    console.print()


def list_adapters(console: Console, service: Service) -> None:
    found = request(console, service, "GET", "/v1/adapters")["data"]
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


def add_adapter(console: Console, service: Service, name: str, path: Path, *, activate: bool = True) -> None:
    body = {"name": name, "path": str(path.expanduser().absolute()), "activate": activate}
    _report_added(console, request(console, service, "POST", "/v1/adapters", json=body))


def upload_adapter(console: Console, service: Service, name: str, folder: Path, *, activate: bool = True) -> None:
    with ExitStack() as opened:
        try:
            files = [
                ("files", (file, opened.enter_context(open(folder / file, "rb"))))
                for file in FILES
                if (folder / file).is_file()
            ]
        except OSError as error:
            stop(console, f"{folder} cannot be read: {error.strerror}.")
        data = {"activate": str(activate).lower()}
        path = f"/v1/adapters/{name}/versions"
        _report_added(console, request(console, service, "POST", path, files=files, data=data))


def _report_added(console: Console, added: dict[str, Any]) -> None:
    if findings := added["info"].get("findings"):
        print_findings(console, findings)
    console.print(f"Registered [bold]{added['id']}[/]; its name means {added['version'][:12]}.")


def list_versions(console: Console, service: Service, name: str) -> None:
    table = Table("number", "version", "aliases", "method", "MB", "registered")
    for version in request(console, service, "GET", f"/v1/adapters/{name}/versions")["data"]:
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


def set_alias(console: Console, service: Service, name: str, alias: str, version: str, pin: bool | None) -> None:
    moved = request(
        console, service, "PUT", f"/v1/adapters/{name}/aliases/{alias}", json={"version": version, "pinned": pin}
    )
    console.print(f"[bold]{name}@{alias}[/] means {moved['aliases'][alias][:12]}.")


def remove_adapter(console: Console, service: Service, name: str) -> None:
    request(console, service, "DELETE", f"/v1/adapters/{name}")
    console.print(f"Removed [bold]{name}[/].")


def collect(console: Console, service: Service) -> None:
    versions = request(console, service, "POST", "/v1/store/collect")["versions"]
    for version in versions:
        console.print(version)
    console.print(f"Took {len(versions)} versions out of the store.")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sample_lines(settings: Settings, url: str) -> list[str]:
    """Three requests that are ready to run; their bodies, with a picture, are written to files."""
    from lora_runtime.zoo.tasks import examples

    state_dir = settings.state_dir
    state_dir.mkdir(parents=True, exist_ok=True)
    key = ' -H "Authorization: Bearer $LOOM_API_KEY"' if settings.auth.required else ""
    lines = []
    for model, task in ((settings.base.name, "colour"), ("shape", "shape"), ("shape:1+french:1", "french")):
        example = examples(task, "heldout", 1)[0]
        file = state_dir / f"ask-{task}.json"
        picture = state_dir / f"{task}.png"
        example.image.save(picture, "PNG")
        content = [_data_part(picture.read_bytes(), "image/png"), {"type": "text", "text": example.question}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32}
        file.write_text(json.dumps(body))
        lines.append(f"\n# {model}: {example.question}  (right answer: {example.answer})")
        lines.append(f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d @{file}")
    return lines


def _image_part(console: Console, image: Path) -> dict[str, Any]:
    kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    try:
        return _data_part(image.read_bytes(), kind)
    except OSError as error:
        stop(console, f"{image} cannot be read: {error.strerror}.")


def _data_part(data: bytes, kind: str) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded}"}}


def _weighted(console: Console, text: str) -> dict[str, Any]:
    name, colon, weight = text.partition(":")
    try:
        return {"id": name, "weight": float(weight) if colon else 1.0}
    except ValueError:
        stop(console, f"'{text}' is no adapter with a weight; write NAME or NAME:0.7.")


def _print_chunk(console: Console, line: str) -> None:
    data = line.removeprefix("data: ")
    if not line.startswith("data: ") or data == "[DONE]":
        return
    chunk = json.loads(data)
    if "error" in chunk:
        stop(console, chunk["error"]["message"])
    for choice in chunk["choices"]:
        console.print(choice["delta"].get("content") or "", end="", markup=False, highlight=False)


def request(console: Console, service: Service, method: str, path: str, **options: Any) -> Any:
    try:
        response = httpx.request(method, service.url + path, timeout=TIMEOUT_S, headers=service.headers, **options)
    except httpx.HTTPError as error:
        _unreachable(console, service.url, error)
    if response.is_error:
        stop(console, _message(response))
    return response.json()


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The service answered {response.status_code}."


def _unreachable(console: Console, url: str, error: httpx.HTTPError) -> NoReturn:
    stop(console, f"No answer from {url} ({type(error).__name__}). Is 'loom serve' running there?")
