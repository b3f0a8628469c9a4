"""What the commands of ``loom`` do that need no running service. ``cli.py`` only says how they are called."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from lora_runtime.errors import LoomError
from serve.config import ConfigurationError
from serve.console import print_findings, stop
from serve.identity import Scope
from serve.loading import load_settings

if TYPE_CHECKING:
    from serve.registry.database import Database
    from serve.registry.keys import Keys


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
        members = []
        for path, weight in map(_folder_and_weight, adapters):
            try:
                members.append((read_adapter(path, layout, own), weight))
            except LoomError as error:
                stop(console, f"{path}: {error.message}")
        weights = combined(members, parameters)
        name = paths.BASE_NAME if base is None else str(folder)
        write_adapter(weights, out, layout, base_name=name)
    except LoomError as error:
        stop(console, error.message)
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
        stop(console, error.message)
    if as_json:
        answer = {"servable": found.is_servable, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(answer, indent=2))
    else:
        print_findings(console, [asdict(finding) for finding in findings])
        console.print("It can be served." if found.is_servable else "[red]It cannot be served on this base.[/]")
        if fix is not None and found.is_servable:
            console.print(f"Wrote [bold]{fix}[/], the same function under today's names.")
    if not found.is_servable:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """How far a new key reaches; None is no limit."""

    adapters: Sequence[str] | None
    per_minute: int | None
    concurrent: int | None
    days: float | None


def create_key(console: Console, config: Path | None, name: str, scopes: Sequence[Scope], limits: KeyLimits) -> None:
    with _keys(console, config) as keys:
        key, record = keys.create(
            name,
            scopes,
            adapters=limits.adapters or None,
            requests_per_minute=limits.per_minute,
            max_concurrent=limits.concurrent,
            lifetime=None if limits.days is None else timedelta(days=limits.days),
            actor="command line",
        )
    Console(stderr=True).print(f"Key {record.identity.id} for {name}. It is not shown again:", highlight=False)
    typer.echo(key)


def list_keys(console: Console, config: Path | None) -> None:
    table = Table(Column("id", no_wrap=True), "name", "scopes", "adapters", "per minute", "at once", "created", "state")
    with _keys(console, config) as keys:
        for record in keys.all():
            who = record.identity
            state = "valid" if record.is_valid(datetime.now(UTC)) else "revoked" if record.revoked_at else "expired"
            table.add_row(
                who.id,
                escape(who.name),
                ", ".join(sorted(who.scopes)),
                "all" if who.adapters is None else escape(", ".join(who.adapters)),
                str(who.requests_per_minute or "-"),
                str(who.max_concurrent or "-"),
                f"{record.created_at:%Y-%m-%d %H:%M}",
                state,
            )
    console.print(table)


def revoke_key(console: Console, config: Path | None, identifier: str) -> None:
    with _keys(console, config) as keys:
        keys.revoke(identifier, actor="command line")
    console.print(f"Revoked {identifier}.")


@contextmanager
def _keys(console: Console, config: Path | None) -> Iterator[Keys]:
    """The keys of the configured registry; whatever keeps them from being read or changed ends the command."""
    from serve.registry.keys import Keys

    with _registry(console, config) as database:
        yield Keys(database)


@contextmanager
def _registry(console: Console, config: Path | None) -> Iterator[Database]:
    from sqlalchemy.exc import SQLAlchemyError

    from serve.registry.database import Database

    try:
        database = Database(load_settings(config).registry_url)
        yield database
        database.close()
    except LoomError as error:
        stop(console, error.message)
    except ConfigurationError as error:
        stop(console, str(error))
    except SQLAlchemyError as error:
        stop(console, f"The registry's database cannot be used ({type(error).__name__}).")


def recount(console: Console, config: Path | None, name: str, *, mend: bool) -> None:
    """Hold the sums of all phases of an experiment against a count of all rows."""
    from serve.registry.experiments import Experiments
    from serve.registry.recount import Recount

    with _registry(console, config) as database:
        found, recounting = Experiments(database), Recount(database)
        experiment = found.get(name)
        is_good = True
        for phase in found.phases(experiment.id):
            differences = recounting.check(experiment.id, phase.number)
            for one in differences:
                kept, counted = escape(str(one.kept)), escape(str(one.counted))
                console.print(f"phase {phase.number}, {escape(one.what)}: kept {kept}, counted {counted}")
            said = "agrees with its rows" if not differences else "[red]does not agree with its rows[/]"
            if differences and mend:
                if not recounting.rebuild(experiment.id, phase.number):
                    stop(console, "Another process is counting; try again when it is done.")
                said = "was counted anew"
            console.print(f"Phase {phase.number} of {escape(experiment.plan.name)} {said}.")
            is_good &= mend or not differences
    if not is_good:
        raise typer.Exit(1)


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
        stop(console, f"There is no task '{task}'; choose one of {', '.join(TASKS)}.")
    example = examples(task, "heldout", number + 1)[number]
    example.image.save(out, "PNG")
    console.print(f"{out}\nquestion: {example.question}\nanswer:   {example.answer}", highlight=False)


def _without_loading_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it without annotations


def _folder_and_weight(text: str) -> tuple[Path, float]:
    folder, colon, weight = text.rpartition(":")
    try:
        return (Path(folder), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
