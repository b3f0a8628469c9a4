"""Changing aliases and experiments, and looking at what came of them. Requests never wait for any of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lora_runtime.errors import Conflict, InvalidRequest, LoomError, NotFound
from serve.assigner import Assigner, draw_of
from serve.catalog import Catalog
from serve.config import ExperimentSettings
from serve.engine_client import EngineClient
from serve.experiments.analysis import results_of
from serve.experiments.assignment import normal
from serve.experiments.definition import Allocation, Arm, Definition, Plan
from serve.experiments.events import Pair
from serve.experiments.phases import Action, amended, moved, redefined, stepped
from serve.experiments.recorder import FLUSH_S, Recorder
from serve.experiments.records import COLLECTING, Experiment, ModelAlias, Phase, State
from serve.experiments.results import Results
from serve.experiments.settling import SETTLING, is_complete, shown
from serve.follower import Follower
from serve.identity import Identity, Reachable
from serve.registry.evidence import EvidenceReader, Look
from serve.registry.experiments import Experiments
from serve.registry.records import AuditRecord
from serve.registry.repository import Repository
from serve.registry.trials import Noted, Trials
from serve.targets import NAME, Target, exact_members, resolve, target_of

MANAGER = Identity(id="", name="experiments", scopes=frozenset())
"""Who the audit names where an experiment acts by itself."""
BRINGING = frozenset({Action.SHADOW, Action.RAMP, Action.RUN, Action.RESUME, Action.PROMOTE})
"""Actions that send users to arms, which are brought near first; what stops them waits for nothing."""

log = logging.getLogger(__name__)

_KEPT = TypeAdapter(Results)


class Experimentation:
    """Used from one event loop. Methods raise as the registry's do; a change is known here when they return."""

    def __init__(
        self,
        experiments: Experiments,
        trials: Trials,
        evidence: EvidenceReader,
        repository: Repository,
        catalog: Catalog,
        assigner: Assigner,
        engines: EngineClient,
        follower: Follower,
        recorder: Recorder,
        settings: ExperimentSettings,
        *,
        base_name: str,
    ) -> None:
        self._experiments = experiments
        self._trials = trials
        self._evidence = evidence
        self._repository = repository
        self._catalog = catalog
        self._assigner = assigner
        self._engines = engines
        self._follower = follower
        self._recorder = recorder
        self._settings = settings
        self._base_name = base_name

    async def set_alias(self, name: str, target: str, identity: Identity) -> ModelAlias:
        """Let a model name mean ``target``, exactly as it is now. Raises InvalidRequest, NotFound, Conflict."""
        self._check_alias(name, identity)
        await self._follower.refresh()
        found = self._resolved(target, identity)
        await self._bring(found)
        alias = await asyncio.to_thread(self._experiments.set_alias, name, found.exact, actor=identity.actor)
        await self._follower.refresh()
        return alias

    async def remove_alias(self, name: str, identity: Identity) -> None:
        identity.check_adapter(name)
        await asyncio.to_thread(self._experiments.remove_alias, name, actor=identity.actor)
        await self._follower.refresh()

    async def aliases(self, identity: Identity) -> list[ModelAlias]:
        """Those that ``identity`` reaches."""
        await self._follower.catch_up()
        return [alias for name, alias in sorted(self._assigner.aliases.items()) if identity.may_use(name)]

    async def create(self, definition: Definition, identity: Identity) -> Experiment:
        """A draft. Raises Forbidden for names beyond the key's patterns, before it is looked at what is there."""
        self._check_alias(definition.alias, identity)
        _check_names(definition, identity)
        await self._follower.refresh()
        plan, allocation = self._exact(definition, identity)
        return await asyncio.to_thread(self._experiments.create, plan, allocation, actor=identity.actor)

    async def all(self, identity: Identity) -> list[Experiment]:
        found = await asyncio.to_thread(self._experiments.all)
        return [experiment for experiment in found if identity.may_use(experiment.plan.alias)]

    async def get(self, name: str, identity: Identity) -> Experiment:
        """By id or name. Raises NotFound, in the same words where there is none and where the key does not reach it."""
        found = await asyncio.to_thread(self._experiments.get, name)
        if not identity.may_use(found.plan.alias):
            raise NotFound(f"There is no experiment '{name[:64]}'.", near=[])
        return found

    async def change(
        self, name: str, changes: Mapping[str, Any], identity: Identity, *, reason: str, new_phase: bool, redraw: bool
    ) -> Experiment:
        """Say some things anew: of a draft anything, of a live experiment what ``phases.amended`` lets.

        ``changes``: fields of a Definition. Raises InvalidRequest, Conflict, NotFound.
        """
        before = await self.get(name, identity)
        await self._follower.refresh()
        definition = _merged(before, changes)
        self._check_alias(definition.alias, identity)
        _check_names(definition, identity, before)
        plan, allocation = self._exact(definition, identity)
        now = datetime.now(UTC)

        def decide(current: Experiment) -> Experiment:
            if (current.phase, current.plan) != (before.phase, before.plan):
                raise Conflict("The experiment was changed meanwhile; look at it again.")
            if current.state is State.DRAFT:
                return redefined(current, plan, allocation)
            return amended(current, plan, allocation, now, new_phase=new_phase, redraw=redraw)

        changed = await asyncio.to_thread(
            self._experiments.change, before.id, decide, actor=identity.actor, reason=reason
        )
        await self._bring_arms(changed)
        await self._follower.refresh()
        return changed

    async def act(
        self,
        name: str,
        action: Action,
        identity: Identity,
        *,
        reason: str,
        arm: str | None = None,
        despite_mismatch: bool = False,
    ) -> Experiment:
        """Move an experiment on. Raises Conflict that says why not, NotFound."""
        before = await self.get(name, identity)
        moved(before, action, datetime.now(UTC), arm=arm)
        found, details = None, dict[str, Any]()
        if action is Action.ARCHIVE and before.state is not State.DRAFT:
            await self._keep(await self.results(before))
        if action is Action.DECIDE:
            found = await self.results(before)
            if found.shares.is_mismatch and not despite_mismatch:
                raise Conflict(
                    f"{found.note} Decide with 'despite_mismatch': true if you know why.", p_value=found.shares.p_value
                )
            details = {"winner": found.winner, "mismatch": found.shares.is_mismatch, "units": found.units}
        if action in BRINGING:
            await self._bring_arms(before)
        after = await asyncio.to_thread(
            self._experiments.act, before.id, action, actor=identity.actor, reason=reason, arm=arm, **details
        )
        if action in SETTLING and before.state in COLLECTING | {State.PAUSED}:
            await self._settle(before, found)
        await self._follower.refresh()
        return after

    async def step(self, experiment: Experiment) -> None:
        """Raise a ramping experiment's coverage, if it is time."""
        if stepped(experiment, datetime.now(UTC)) is None:
            return

        def decide(current: Experiment) -> Experiment:
            return stepped(current, datetime.now(UTC)) or current

        await asyncio.to_thread(
            self._experiments.change, experiment.id, decide, actor=MANAGER.actor, reason="the ramp's next step"
        )
        await self._follower.refresh()

    async def remove(self, name: str, identity: Identity) -> Experiment:
        """Forget a draft. Raises NotFound, Conflict."""
        found = await self.get(name, identity)
        return await asyncio.to_thread(self._experiments.remove, found.id, actor=identity.actor)

    async def results(self, experiment: Experiment, phase: Phase | None = None) -> Results:
        """What the evidence says now, of the phase that runs, or of an earlier one."""
        if phase is not None:
            experiment = replace(experiment, phase=phase)
        await self._recorder.flush()
        return await asyncio.to_thread(self._results, experiment)

    async def phases(self, experiment: Experiment) -> list[Phase]:
        return await asyncio.to_thread(self._experiments.phases, experiment.id)

    async def looks(self, experiment: Experiment, phase: int) -> list[Look]:
        """Results as they were, oldest first."""
        return await asyncio.to_thread(self._evidence.looks, experiment.id, phase)

    async def look(self, experiment: Experiment, every_s: float) -> Results | None:
        """Results, remembered; None where another gateway looked within ``every_s``."""
        if not await asyncio.to_thread(self._experiments.claim, experiment.id, every_s):
            return None
        found = await self.results(experiment)
        await self._keep(found)
        return found

    async def history(self, experiment: Experiment, *, limit: int, before: int | None) -> list[AuditRecord]:
        """What was done to it, newest first."""
        return await asyncio.to_thread(self._repository.audit, limit=limit, before=before, subject=experiment.id)

    async def pairs(self, experiment: Experiment, *, limit: int, before: int | None) -> list[tuple[int, Pair]]:
        """Answers of shadow arms beside those that users got, newest first."""
        await self._recorder.flush()
        return await asyncio.to_thread(self._trials.pairs, experiment.id, limit=limit, before=before)

    async def feedback(
        self, request_id: str, metric: str, value: bool | float, *, key: str, identity: Identity, may_any: bool
    ) -> Noted:
        """Keep what was reported; it is on disk when this returns. ``may_any``: of other keys' requests too, as far
        as ``identity`` reaches the experiment's alias.

        The request may have been answered by another gateway a moment ago: its record is given the time to arrive.
        """
        tries = 3
        for number in range(tries):
            await self._recorder.flush()
            noted = await asyncio.to_thread(
                self._trials.feedback, request_id, metric, value, key=key, owner=identity.id, may_any=may_any,
                reaches=identity.may_use, is_last_try=number == tries - 1,
            )  # fmt: skip
            if noted is not None:
                return noted
            await asyncio.sleep(FLUSH_S)
        raise AssertionError("the last try raises or returns")

    async def forget(self) -> int:
        """Take away what was seen of experiments that were archived long ago; returns how many requests that were."""
        before, total = datetime.now(UTC) - timedelta(seconds=self._settings.keep_s), 0
        while found := await asyncio.to_thread(self._trials.forget, before):
            total += found
        return total

    async def keep_up(self) -> None:
        """Add up what waits of any experiment; the first time after an upgrade, all that there is."""
        await asyncio.to_thread(self._evidence.keep_up)

    def assignment(self, experiment: Experiment, unit: str) -> str | None:
        """The arm that a unit gets whose requests meet the conditions."""
        return draw_of(experiment).arm_of(normal(unit))

    def _results(self, experiment: Experiment) -> Results:
        number = experiment.phase.number
        if experiment.state is State.ARCHIVED and (last := self._evidence.last_look(experiment.id, number)):
            # What it was added up from may have gone since.
            return _KEPT.validate_python({**last.results, "state": str(experiment.state)})
        evidence = self._evidence.of(experiment.id, number, experiment.plan)
        lowest = self._evidence.lowest_p(experiment.id, number)
        live = results_of(experiment, evidence, datetime.now(UTC), lowest_p=lowest)
        settled = self._evidence.settled.of(experiment.id, number)
        if settled is None and is_complete(live):
            self._evidence.settled.settle(experiment.id, number, "complete", _plain(replace(live, settled="complete")))
            settled = self._evidence.settled.of(experiment.id, number)
        return live if settled is None else shown(_KEPT.validate_python(settled), live)

    async def _settle(self, experiment: Experiment, found: Results | None) -> None:
        """Keep what ``experiment`` was ended on; ``found``, where that is known. Ending it does not depend on it."""
        try:
            ground = found or await self.results(experiment)
            await self._keep(ground)
            kept = _plain(replace(ground, settled="decided", later=None))
            await asyncio.to_thread(
                self._evidence.settled.settle, experiment.id, experiment.phase.number, "decided", kept
            )
        except LoomError as error:
            log.warning("experiment %s: its results were not kept: %s", experiment.plan.name, error)

    async def _keep(self, found: Results) -> None:
        await asyncio.to_thread(self._evidence.keep, found.experiment, found.phase, found.as_of, _plain(found))

    async def _bring_arms(self, experiment: Experiment) -> None:
        """Both arms at hand at every engine, so that neither begins slower."""
        for arm in experiment.phase.allocation.arms:
            members = exact_members(arm.target)
            await self._bring(target_of(members, arm.target, self._base_name, self._catalog.registered))

    async def _bring(self, target: Target) -> None:
        await asyncio.gather(*(self._engines.prefetch(ref) for ref in target.adapters))

    def _exact(self, definition: Definition, identity: Identity) -> tuple[Plan, Allocation]:
        """The definition with every target spelled exactly."""
        self._check_conditions(definition)
        arms = tuple(self._exact_arm(arm, identity) for arm in definition.arms)
        fields = definition.model_dump(include=set(Plan.model_fields), exclude_unset=True)
        plan = Plan.model_validate({**fields, "control": definition.control_name})
        allocation = Allocation(arms=arms, coverage=definition.coverage, conditions=definition.conditions)
        return plan, allocation

    def _exact_arm(self, arm: Arm, identity: Identity) -> Arm:
        return arm.model_copy(update={"target": self._resolved(arm.target, identity).exact})

    def _resolved(self, target: str, identity: Identity) -> Target:
        return resolve(target, None, self._base_name, Reachable(self._catalog.registered, identity))

    def _check_conditions(self, definition: Definition) -> None:
        allowed = {"header": {h.lower() for h in self._settings.headers}, "metadata": set(self._settings.metadata)}
        for condition in definition.conditions:
            source, _, name = condition.attribute.partition(".")
            if source in allowed and (name.lower() if source == "header" else name) not in allowed[source]:
                raise InvalidRequest(
                    f"The configuration does not let conditions ask for '{condition.attribute}' (experiments."
                    f"{'headers' if source == 'header' else 'metadata'}).",
                    param="conditions",
                )

    def _check_alias(self, name: str, identity: Identity) -> None:
        if not NAME.fullmatch(name) or name == self._base_name:
            raise InvalidRequest(
                f"'{name[:128]}' cannot be an alias: use letters, digits, '.', '_' and '-', and not the base's name.",
                param="alias",
            )
        identity.check_adapter(name)


def _plain(results: Results) -> dict[str, Any]:
    """As JSON keeps it."""
    plain: dict[str, Any] = _KEPT.dump_python(results, mode="json")
    return plain


def _check_names(definition: Definition, identity: Identity, before: Experiment | None = None) -> None:
    """Refuse names, of the experiment and of its layer, that the key may not give; those of ``before`` may stay."""
    known = (None, None) if before is None else (before.plan.name, before.plan.layer and before.plan.layer.name)
    if definition.name != known[0]:
        identity.check_name(definition.name, "name")
    if definition.layer is not None and definition.layer.name != known[1]:
        identity.check_name(definition.layer.name, "layer")


def _merged(experiment: Experiment, changes: Mapping[str, Any]) -> Definition:
    """What the experiment is said to be after ``changes``. Raises InvalidRequest."""
    said = {
        **experiment.plan.model_dump(mode="json", exclude_unset=True),
        **experiment.phase.allocation.model_dump(mode="json", exclude_unset=True),
        **changes,
    }
    try:
        return Definition.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise InvalidRequest(f"{where}: {message}." if where else f"{message}.", param=where or None) from error
