"""``loom experiments`` and ``loom aliases``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve import offline
from serve.commands import Service, request
from serve.console import DEFAULT_URL, ApiKey, Url, read_mapping
from serve.experiments.phases import Action

experiments = typer.Typer(help="A/B experiments of a running service.", no_args_is_help=True)
aliases = typer.Typer(help="Model names of a running service that mean a target.", no_args_is_help=True)

console = Console()

Name = Annotated[str, typer.Argument(help="The experiment's name or id.")]
Alias = Annotated[str, typer.Argument(help="The model name that clients use.")]
File = Annotated[Path, typer.Argument(help="A definition, or a part of one, in YAML or JSON.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why; the history keeps it.")]


@experiments.command("create")
def create(file: File, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Describe an experiment; nothing is served by it before it is moved on."""
    made = request(console, Service(url, key), "POST", "/v1/experiments", json=read_mapping(console, file))
    console.print(f"[bold]{made['name']}[/] ({made['id']}) is a draft; it can {', '.join(made['actions'])}.")


@experiments.command("ls")
def list_all(url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """List experiments, newest first."""
    table = Table("name", "model name", "state", "phase", "coverage", "decided on")
    for one in request(console, Service(url, key), "GET", "/v1/experiments")["data"]:
        phase = one["phase"]
        table.add_row(
            one["name"],
            one["alias"],
            one["state"],
            str(phase["number"]),
            f"{100 * phase['coverage']:.3g} %",
            one["winner"] or "-",
        )
    console.print(table)


@experiments.command("move")
def move(
    name: Name,
    action: Annotated[Action, typer.Argument(help="What to do.")],
    arm: Annotated[str | None, typer.Option(help="What is decided on.")] = None,
    reason: Reason = "",
    despite_mismatch: Annotated[bool, typer.Option(help="Decide though shares are not as planned.")] = False,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Move an experiment on in its life."""
    body = {"reason": reason, "arm": arm, "despite_mismatch": despite_mismatch}
    moved = request(console, Service(url, key), "POST", f"/v1/experiments/{name}/{action}", json=body)
    actions = ", ".join(moved["actions"]) or "nothing any more"
    console.print(f"[bold]{moved['name']}[/] is {moved['state']}; it can {actions}.")


@experiments.command("change")
def change(
    name: Name,
    file: File,
    new_phase: Annotated[bool, typer.Option("--new-phase", help="Where evidence begins anew.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="And units are drawn anew.")] = False,
    reason: Reason = "",
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Say the fields of FILE anew, in place or in a new phase."""
    body = {**read_mapping(console, file), "new_phase": new_phase, "redraw": redraw, "reason": reason}
    changed = request(console, Service(url, key), "PATCH", f"/v1/experiments/{name}", json=body)
    console.print(f"[bold]{changed['name']}[/] is in phase {changed['phase']['number']}.")


@experiments.command("results")
def results(name: Name, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Show what the evidence says now. With pictures: URL/experiments/NAME."""
    found = request(console, Service(url, key), "GET", f"/v1/experiments/{name}/results")["results"]
    table = Table("metric", "arm", "units", "over", "mean", "effect", "relative", "interval", "p (family)", "verdict")
    arms = {arm["arm"]: arm for arm in found["arms"]}
    for metric in arms[found["control"]]["means"]:
        table.add_row(metric, found["control"], *_seen(arms[found["control"]], metric), "", "", "", "", "control")
        for one in (c for c in found["comparisons"] if c["metric"] == metric):
            interval = "" if one["low"] is None else f"{one['low']:+.4g} … {one['high']:+.4g}"
            relative = one["effect"] if one["measure"] == "relative" else one["relative"]
            table.add_row(
                "",
                one["arm"],
                *_seen(arms[one["arm"]], metric),
                "" if one["effect"] is None or one["measure"] == "relative" else f"{one['effect']:+.4g}",
                "" if relative is None else f"{100 * relative:+.3g} %",
                interval,
                _number(one["adjusted_p"]),
                one["verdict"].replace("_", " "),
            )
    console.print(table)
    decisive = next((c for c in found["comparisons"] if c["confidence"] is not None), None)
    if decisive is not None:
        console.print(
            f"Intervals of one metric hold together at {100 * (1 - found['alpha']):g} %"
            + (", at any time." if found["analysis"] == "sequential" else ".")
            + " Times: relative changes; all others: differences. Metrics beside the decision's are one family."
        )
    shares = ", ".join(f"{arm['arm']} {arm['units']} ({100 * arm['planned_share']:.3g} %)" for arm in found["arms"])
    console.print(f"Units, and the planned shares: {shares}; p {found['shares']['p_value']:.3g}.")
    for rail in found["guardrails"]:
        colour = {"breached": "red", "kept": "green"}.get(rail["state"], "yellow")
        bounds = (
            ""
            if rail["harm"] is None
            else f": harm {rail['at_least']:+.4g} … {rail['at_most']:+.4g}, tolerance {rail['tolerance']:g}"
        )
        console.print(
            f"[{colour}]Guardrail {rail['metric']}, {rail['arm']}: {rail['state'].replace('_', ' ')}{bounds}.[/]"
        )
    if found["later"]:
        console.print(f"These results are settled ({found['settled']}); {found['later']['units']} units are there now.")
    console.print(escape(found["note"]), style="bold")


@experiments.command("plan")
def plan(
    name: Name,
    effect: Annotated[str, typer.Argument(help="The smallest effect that matters: 0.02, or 5%. Put -- before -5%.")],
    power: Annotated[float, typer.Option(help="How often it is to be seen where it is there.")] = 0.8,
    metric: Annotated[str | None, typer.Option(help="Other than the one that decides.")] = None,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Say how many units and days an effect takes, from the users who come now."""
    is_relative = effect.strip().endswith("%")
    try:
        size = float(effect.strip().rstrip("%")) / (100 if is_relative else 1)
    except ValueError:
        raise typer.BadParameter("give a number, 0.02, or a share of control's mean, 5%", param_hint="EFFECT") from None
    asked = {"effect": size, "relative": is_relative, "power": power, **({"metric": metric} if metric else {})}
    found = request(console, Service(url, key), "GET", f"/v1/experiments/{name}/plan", params=asked)["plan"]
    table = Table("analysis", "units of all arms", "days from now", "analysis.units")
    for kind in ("sequential", "fixed"):
        one = found[kind]
        days = "no traffic" if one["days"] is None else f"{one['days']:.3g}"
        table.add_row(kind, str(one["units"]), days, str(one["analysis_units"]))
    console.print(table)
    console.print(
        f"To see {found['effect']:+.4g} of {found['metric']} (control: {found['mean']:.4g}) in {100 * power:g} % of "
        f"experiments, at {100 * found['alpha']:g} % errors. Until now {found['units']} units, "
        f"{found['units_per_day']:.4g} a day. A sequential analysis may end sooner."
    )


@experiments.command("history")
def history(name: Name, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """List what was done to an experiment, newest first."""
    table = Table("when", "who", "what", "why")
    for entry in request(console, Service(url, key), "GET", f"/v1/experiments/{name}/history")["data"]:
        action = entry["action"].removeprefix("experiment.")
        table.add_row(entry["at"][:19].replace("T", " "), entry["actor"], action, entry["details"].get("reason", ""))
    console.print(table)


@experiments.command("recount")
def recount(
    name: Name,
    mend: Annotated[bool, typer.Option("--mend", help="Replace the sums that disagree by the recount.")] = False,
    config: Annotated[Path | None, typer.Option(help="Configuration in YAML; LOOM_… variables override it.")] = None,
) -> None:
    """Compare an experiment's running sums with a recount of all rows. Needs the registry's database, no service."""
    offline.recount(console, config, name, mend=mend)


@experiments.command("rm")
def remove(name: Name, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Forget a draft."""
    request(console, Service(url, key), "DELETE", f"/v1/experiments/{name}")
    console.print(f"Removed [bold]{name}[/].")


@aliases.command("ls")
def list_aliases(url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """List model names that mean a target."""
    table = Table("model name", "means", "moved", "experiment")
    for alias in request(console, Service(url, key), "GET", "/v1/aliases")["data"]:
        table.add_row(alias["id"], alias["target"], alias["moved"][:19].replace("T", " "), alias["experiment"] or "-")
    console.print(table)


@aliases.command("set")
def set_alias(
    name: Alias,
    target: Annotated[str, typer.Argument(help="As a request would name it: shape@prod, a:0.7+b:0.3, the base.")],
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Let a model name mean a target from now on, exactly as the target is now."""
    alias = request(console, Service(url, key), "PUT", f"/v1/aliases/{name}", json={"target": target})
    console.print(f"[bold]{alias['id']}[/] means {alias['target']}.", soft_wrap=True)


@aliases.command("rm")
def remove_alias(name: Alias, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """Forget a model name."""
    request(console, Service(url, key), "DELETE", f"/v1/aliases/{name}")
    console.print(f"Removed [bold]{name}[/].")


def _seen(arm: dict[str, Any], metric: str) -> tuple[str, str, str]:
    """Units with data, what the mean is over, and the mean; results of earlier releases have the mean alone."""
    found = arm["metrics"].get(metric)
    mean = _number(arm["means"][metric])
    return ("", "", mean) if found is None else (str(found["units"]), f"{found['observations']:.6g}", mean)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
