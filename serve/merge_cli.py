"""``loom merge`` and ``loom merges``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve.commands import Service, request
from serve.config import ConfigurationError, Settings
from serve.console import DEFAULT_URL, ApiKey, Url, read_mapping, stop
from serve.loading import load_settings
from serve.ray_environment import prepare

merges = typer.Typer(help="Merges of a running service.", no_args_is_help=True)

console = Console()

Identifier = Annotated[str, typer.Argument(help="The merge's id.")]


def merge(
    recipe: Annotated[Path, typer.Argument(help="What to merge, how, and under which name, in YAML or JSON.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for the result; registered if not given.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base's checkpoint folder, if not the configuration's.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration in YAML; LOOM_… variables override it.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to merge on; a local one if not given.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and do nothing.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Have the service at URL do it.")] = False,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Merge adapters into one, or into a copy of the base. Cut off, the same command goes on where it was.

    Without --submit no service is needed: inputs are folders, or names in the configuration's registry.
    """
    said = read_mapping(console, recipe)
    if submit:
        _submit(Service(url, key), said, plan=plan)
        return
    prepare(is_local=address is None)
    from lora_runtime.errors import LoomError
    from lora_runtime.merge.job import JobRecipe
    from serve.jobs.local import merging_here, plan_here

    settings = _settings(config, base)
    if out is not None:
        said.setdefault("name", out.name)
    try:
        checked = JobRecipe.model_validate(said)
    except ValueError as error:
        stop(console, _problems(error))
    try:
        found = plan_here(checked, settings, out)
        _print_plan(found.model_dump(mode="json"), len(found.units))
        if plan:
            return
        job = None
        with merging_here(found, settings, out, address=address) as going, _progress() as bars:
            for job, units in going:
                _show(bars, job.state, [(unit.kind, unit.num_bytes, unit.done_bytes, unit.state) for unit in units])
    except LoomError as error:
        stop(console, escape(error.message))
    except KeyboardInterrupt:
        stop(console, "Interrupted. The same command goes on where this was.")
    if job is None or job.error is not None or job.report is None:
        stop(console, escape((job.error if job else None) or "The merge was cancelled."))
    where = f"[bold]{out}[/]" if out else f"[bold]{escape(job.report.get('registered', job.name))}[/]"
    console.print(f"Made {where}.", soft_wrap=True)
    _print_report(job.report)


@merges.command("ls")
def list_all(url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """List merges, newest first."""
    table = Table("id", "name", "method", "product", "state", "progress", "created")
    for one in request(console, Service(url, key), "GET", "/v1/merges")["data"]:
        done = "-" if one["ended"] else f"{100 * one['progress']:.0f} %"
        created = one["created"][:19].replace("T", " ")
        table.add_row(one["id"], one["name"], one["method"], one["product"], one["state"], done, created)
    console.print(table)


@merges.command("show")
def show(identifier: Identifier, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Show one merge: its tasks, and what was measured."""
    found = request(console, Service(url, key), "GET", f"/v1/merges/{identifier}")
    eta = "" if found["eta_s"] is None or found["ended"] else f", about {found['eta_s']:.0f} s to go"
    console.print(f"[bold]{found['name']}[/] by {found['method']} is {found['state']}{eta}.")
    table = Table("task", "state", "MB", "seconds", "peak MB", "node")
    for task in found["tasks"]:
        peak = "-" if task["peak_bytes"] is None else f"{task['peak_bytes'] / 1e6:.0f}"
        seconds = "-" if task["seconds"] is None else f"{task['seconds']:.1f}"
        size = f"{task['done_bytes'] / 1e6:.0f} / {task['num_bytes'] / 1e6:.0f}"
        table.add_row(task["id"], task["state"], size, seconds, peak, task["node"])
    console.print(table)
    if found["error"]:
        stop(console, escape(found["error"]))
    if found["report"]:
        _print_report(found["report"])


@merges.command("cancel")
def cancel(identifier: Identifier, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """End a merge; nothing of it is left."""
    request(console, Service(url, key), "POST", f"/v1/merges/{identifier}/cancel")
    console.print(f"{identifier} ends.")


@merges.command("logs")
def logs(identifier: Identifier, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Print what happened to a merge."""
    for line in request(console, Service(url, key), "GET", f"/v1/merges/{identifier}/logs")["data"]:
        console.print(f"{line['at'][:19].replace('T', ' ')} {escape(line['message'])}", highlight=False, soft_wrap=True)


@merges.command("checkpoints")
def checkpoints(url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """List merged bases."""
    table = Table("name", "version", "base", "parents", "GB", "where")
    for one in request(console, Service(url, key), "GET", "/v1/checkpoints")["data"]:
        parents = ", ".join(f"{name}@{version[:12]}" for name, version in one["parents"].items())
        size = f"{one['num_bytes'] / 1e9:.2f}"
        table.add_row(one["id"], one["version"][:12], one["base"], escape(parents), size, one["location"])
    console.print(table)


def _submit(service: Service, recipe: Mapping[str, Any], *, plan: bool) -> None:
    if plan:
        found = request(console, service, "POST", "/v1/merges/plan", json=recipe)
        _print_plan(found, found["num_tasks"])
        return
    job = request(console, service, "POST", "/v1/merges", json=recipe)
    console.print(f"{job['id']} is under way. [dim]loom merges show {job['id']}[/]")


def _settings(config: Path | None, base: Path | None) -> Settings:
    try:
        settings = load_settings(config)
    except ConfigurationError as error:
        stop(console, str(error))
    if base is None:
        return settings
    options = {name: value for name, value in settings.engine.options.items() if name != "base_path"}
    return settings.model_copy(
        update={
            "base": settings.base.model_copy(update={"path": base, "name": base.absolute().name}),
            "engine": settings.engine.model_copy(update={"options": options}),
        }
    )


def _problems(error: ValueError) -> str:
    found = error.errors() if hasattr(error, "errors") else []
    lines = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}".lstrip(": ") for one in found]
    return escape("The recipe cannot be used: " + "; ".join(lines or [str(error)]))


def _print_plan(plan: Mapping[str, Any], num_tasks: int) -> None:
    table = Table("input", "version", "method", "rank", "modules", "MB")
    for one in plan["inputs"]:
        counts = (str(one["max_rank"]), str(one["num_leaves"]), f"{one['num_bytes'] / 1e6:.2f}")
        table.add_row(escape(one["adapter"]), one["version"][:12], one["method"], *counts)
    console.print(table)
    console.print(
        f"{num_tasks} tasks of {plan['memory_bytes'] / 1e9:.1f} GB of memory at most; {plan['output_bytes'] / 1e6:.1f} "
        f"MB to write, {plan['disk_bytes'] / 1e6:.1f} MB of disk."
    )
    for warning in plan["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")


def _print_report(report: Mapping[str, Any]) -> None:
    if (kept := report["kept_energy"]) is not None and kept["least"] < 1 - 1e-6:
        console.print(f"Kept energy of the deltas: {kept['mean']:.1%} on average, {kept['least']:.1%} at least.")
    if (probe := report["verification"]["probe"]) is not None:
        console.print(
            f"Verified: KL to what was meant {probe['kl_to_expected']:.2g} nats, "
            f"{probe['agreement_with_expected']:.1%} of tokens the same; KL to the base {probe['kl_to_base']:.2g}."
        )
    if (search := report["search"]) is not None:
        for one in (search["winner"], *search["baselines"]):
            weights = ", ".join(f"{name} {weight:g}" for name, weight in one["weights"].items())
            scores = f"{one['held_out']:.3f} held out, {one['search']:.3f} searched"
            console.print(f"{one['name']:>12}: {scores} ({weights})")
    for warning in report["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")


def _progress() -> Progress:
    columns = (TextColumn("{task.description:12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _show(bars: Progress, state: str, units: Sequence[tuple[str, int, int, str]]) -> None:
    total = sum(size or 1 for _, size, _, _ in units) or 1
    done = sum((size or 1) if state == "done" else so_far for _, size, so_far, state in units)
    if not bars.tasks:
        bars.add_task(state, total=total)
    bars.update(bars.tasks[0].id, description=state, total=total, completed=done)
