"""What model aliases mean now, and which arm a request gets: a snapshot in memory, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora_runtime.errors import InvalidRequest, NotFound
from serve.catalog import Catalog
from serve.experiments.assignment import Draw, Kind, Subject, unit_digest
from serve.experiments.records import COLLECTING, DIVIDING, Experiment, ModelAlias
from serve.follower import Follower
from serve.registry.experiments import Experiments
from serve.targets import Member, Target, exact_members, target_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """What a request for an alias gets. ``default`` is what the alias itself means.

    Without ``experiment`` nothing more is said. ``arm`` is None for who is not enrolled. ``counts``: whether what
    comes of it is evidence. ``unit``: as it is stored. ``shadows``: arms that may answer a copy.
    """

    target: Target
    default: Target
    experiment: Experiment | None = None
    arm: str | None = None
    kind: Kind = Kind.NOT_ENROLLED
    counts: bool = False
    unit: str | None = None
    shadows: Mapping[str, Target] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Live:
    """An experiment with everything that does not depend on the request made ready."""

    experiment: Experiment
    draw: Draw
    arms: Mapping[str, tuple[Member, ...]]


@dataclass(frozen=True, slots=True)
class _View:
    """Everything at one revision, replaced as a whole: it is read while the next one is being made."""

    aliases: Mapping[str, ModelAlias]
    members: Mapping[str, tuple[Member, ...]]
    live: Mapping[str, _Live]


class Assigner:
    """Used from one event loop; follows the registry, after the catalog, whose adapters its targets are."""

    def __init__(
        self, experiments: Experiments, catalog: Catalog, follower: Follower, *, base_name: str, unit_secret: str
    ) -> None:
        self._read = experiments.snapshot
        self._catalog = catalog
        self._base_name = base_name
        self._unit_secret = unit_secret
        self._view = _View({}, {}, {})
        follower.add(self._reload)

    @property
    def aliases(self) -> Mapping[str, ModelAlias]:
        return self._view.aliases

    @property
    def experiments(self) -> list[Experiment]:
        """Those that own an alias now."""
        return [live.experiment for live in self._view.live.values()]

    def owner(self, alias: str) -> Experiment | None:
        """The experiment that owns an alias."""
        live = self._view.live.get(alias)
        return None if live is None else live.experiment

    def assign(self, alias: str, subject: Subject, *, forced: str | None = None) -> Assigned | None:
        """What a request gets; None where ``alias`` is none. ``forced``: an arm that is asked for by name.

        Raises InvalidRequest for a forced arm that there is not, and NotFound where the alias means an adapter that is
        gone.
        """
        view = self._view
        if alias not in view.members:
            return None
        default = self._target(alias, view.members[alias])
        live = view.live.get(alias)
        if live is None:
            return Assigned(target=default, default=default)
        experiment = live.experiment
        plain = Assigned(
            target=default,
            default=default,
            experiment=experiment,
            unit=None if subject.unit is None else unit_digest(experiment.id, subject.unit, self._unit_secret),
        )
        if forced is not None:
            return self._given(plain, live, self._known(experiment, forced), Kind.FORCED)
        arm = live.draw.arm(subject) if experiment.state in DIVIDING else None
        shadows = {shadow.name: self._target(alias, live.arms[shadow.name]) for shadow in experiment.shadows}
        if arm is None:
            return replace(plain, shadows=shadows)
        kind = Kind.REQUEST if subject.unit is None else Kind.HASH
        given = self._given(plain, live, arm, kind)
        counts = experiment.state in COLLECTING and given.kind is Kind.HASH
        is_fallback = experiment.state in COLLECTING and given.kind is Kind.FALLBACK and subject.unit is not None
        return replace(given, counts=counts or is_fallback, shadows=shadows)

    def _given(self, plain: Assigned, live: _Live, arm: str, kind: Kind) -> Assigned:
        try:
            target = self._target(plain.target.label, live.arms[arm])
        except NotFound:  # this gateway knows the experiment, and not yet the adapter
            return replace(plain, arm=arm, kind=Kind.FALLBACK)
        return replace(plain, target=target, arm=arm, kind=kind)

    def _target(self, label: str, members: tuple[Member, ...]) -> Target:
        return target_of(members, label, self._base_name, self._catalog.registered)

    @staticmethod
    def _known(experiment: Experiment, name: str) -> str:
        arm = experiment.phase.allocation.arm(name)
        if arm is None:
            there = ", ".join(arm.name for arm in experiment.phase.allocation.arms)
            raise InvalidRequest(f"There is no arm '{name[:64]}'; there are {there}.", param="X-Force-Variant")
        return arm.name

    def _reload(self) -> None:
        snapshot = self._read()
        self._view = _View(
            snapshot.aliases,
            {name: exact_members(alias.target) for name, alias in snapshot.aliases.items()},
            {alias: _live(experiment) for alias, experiment in snapshot.experiments.items()},
        )


def draw_of(experiment: Experiment) -> Draw:
    """The draw of an experiment's phase."""
    phase, layer = experiment.phase, None
    if experiment.plan.layer is not None and experiment.layer is not None:
        layer = (experiment.plan.layer.name, *experiment.layer)
    return Draw(
        experiment.id,
        phase.drawn,
        arms=phase.allocation.answering,
        coverage=phase.coverage,
        conditions=phase.allocation.conditions,
        layer=layer,
    )


def _live(experiment: Experiment) -> _Live:
    arms = {arm.name: exact_members(arm.target) for arm in experiment.phase.allocation.arms}
    return _Live(experiment, draw_of(experiment), arms)
