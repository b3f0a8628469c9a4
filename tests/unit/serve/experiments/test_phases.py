"""What may happen to an experiment, and what may not."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_runtime.errors import Conflict
from serve.experiments.analysis import results_of
from serve.experiments.definition import Allocation, Arm, Condition, Definition, Layer, Metric, Plan, Ramp
from serve.experiments.evidence import Evidence
from serve.experiments.guardrails import due
from serve.experiments.phases import Action, allotted, amended, moved, possible, redefined, stepped
from serve.experiments.records import COLLECTING, DIVIDING, LIVE, Experiment, State
from tests.unit.serve.experiments.worlds import NOW, experiment

DRAFT = replace(experiment("a", "b"), state=State.DRAFT)


def walk(*actions: Action, begun: Experiment = DRAFT) -> Experiment:
    for action in actions:
        begun = moved(begun, action, NOW, arm="b")
    return begun


def test_the_whole_life():
    A = Action
    path = [A.SHADOW, A.RAMP, A.PAUSE, A.RESUME, A.RUN, A.PAUSE, A.DECIDE, A.PROMOTE, A.ROLL_BACK, A.ARCHIVE]
    states, found = [], DRAFT
    for action in path:
        found = moved(found, action, NOW, arm="b")
        states.append(str(found.state))
    assert states == [
        *("shadow", "ramping", "paused", "ramping", "running", "paused", "decided", "promoted", "rolled_back"),
        "archived",
    ]
    assert found.winner == "b" and found.phase.closed_at == NOW and possible(found.state) == []


@given(st.lists(st.sampled_from(Action), max_size=12))
def test_no_road_leads_out_of_the_states(actions: list[Action]):
    """Whatever is tried: a live experiment can always be rolled back, an ended one never comes back to life."""
    found, has_ended = DRAFT, False
    for action in actions:
        try:
            found = moved(found, action, NOW, arm="b")
        except Conflict as error:
            assert action not in possible(found.state) and str(found.state) in error.message
            continue
        has_ended |= found.state in (State.PROMOTED, State.ROLLED_BACK, State.ARCHIVED)
        assert not (has_ended and found.is_live)
        assert (Action.ROLL_BACK in possible(found.state)) or not found.is_live
        assert COLLECTING <= DIVIDING <= LIVE
        assert (found.phase.closed_at is None) == (not has_ended and found.state is not State.DECIDED)


def test_it_goes_on_as_what_it_was():
    for action, state in ((Action.SHADOW, State.SHADOW), (Action.RAMP, State.RAMPING), (Action.RUN, State.RUNNING)):
        assert walk(action, Action.PAUSE, Action.RESUME).state is state


def test_a_ramp_climbs_step_by_step_and_ends_running():
    plan = DRAFT.plan.model_copy(update={"ramp": Ramp(steps=(0.1, 0.5, 1.0), every_s=60)})
    planned = DRAFT.phase.allocation.model_copy(update={"coverage": 0.8})
    found = moved(replace(DRAFT, plan=plan, phase=replace(DRAFT.phase, allocation=planned)), Action.RAMP, NOW)
    covered, now = [found.phase.coverage], NOW
    assert stepped(found, NOW + timedelta(seconds=59)) is None
    while found.state is State.RAMPING:
        now += timedelta(seconds=60)
        after = stepped(found, now)
        assert after is not None
        found = after
        covered.append(found.phase.coverage)
    assert covered == [0.1, 0.5, 0.8, 0.8] and found.phase.number == 1
    assert stepped(found, now + timedelta(days=1)) is None


RUNNING = walk(Action.RUN)


def change(
    plan: dict | None = None, *, new_phase: bool = False, redraw: bool = False, **allocation: object
) -> Experiment:
    said = RUNNING.phase.allocation.model_dump(exclude_unset=True) | allocation
    return amended(
        RUNNING,
        Plan.model_validate(RUNNING.plan.model_dump() | (plan or {})),
        Allocation.model_validate(said),
        NOW,
        new_phase=new_phase,
        redraw=redraw,
    )


OTHER_WEIGHTS = ({"name": "a", "target": "@base", "weight": 3}, {"name": "b", "target": "@base"})
FURTHER_ARM = (*({"name": n, "target": "@base"} for n in "abc"),)
OTHER_TARGET = ({"name": "a", "target": "@base"}, {"name": "b", "target": "x@" + "f" * 64})
CONDITION = {"attribute": "language", "any_of": ["de"]}


@pytest.mark.parametrize(
    ("allocation", "said"),
    [
        ({"arms": OTHER_WEIGHTS}, "weights"),
        ({"arms": FURTHER_ARM}, "arms"),
        ({"arms": OTHER_TARGET}, "targets"),
        ({"coverage": 0.5}, "Less coverage"),
        ({"conditions": (CONDITION,)}, "condition on 'language'"),
    ],
)
def test_who_gets_what_changes_in_a_new_phase_only(allocation: dict, said: str):
    with pytest.raises(Conflict, match=said):
        change(**allocation)
    kept, redrawn = change(new_phase=True, **allocation), change(new_phase=True, redraw=True, **allocation)
    assert (kept.phase.number, kept.phase.drawn) == (2, 1)
    assert (redrawn.phase.number, redrawn.phase.drawn) == (2, 2)


def test_what_moves_nobody_changes_in_place():
    half = replace(RUNNING, phase=replace(RUNNING.phase, coverage=0.5, allocation=Allocation(
        arms=RUNNING.phase.allocation.arms, coverage=0.5, conditions=(Condition.model_validate(CONDITION),)
    )))  # fmt: skip
    shadow = Arm(name="s", target="@base", shadow=True)
    more = Allocation(arms=(*RUNNING.phase.allocation.arms, shadow), coverage=0.9)
    found = amended(half, half.plan, more, NOW, new_phase=False, redraw=False)
    assert (found.phase.number, found.phase.coverage, found.phase.allocation.conditions) == (1, 0.9, ())


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"name": "y"}, "'name'"),
        ({"alias": "y"}, "'alias'"),
        ({"decision_metric": "error_rate"}, "'decision_metric'"),
        ({"analysis": {"alpha": 0.1}}, "'analysis'"),
        ({"metrics": [{"name": "solved", "direction": "down"}]}, "'solved'"),
        ({"layer": {"name": "l", "share": 0.5}}, "leave it, and join none"),
    ],
)
def test_the_question_is_not_changed_once_there_are_answers(plan: dict, said: str):
    for new_phase in (False, True):
        with pytest.raises(Conflict, match=said):
            change(plan, new_phase=new_phase)


def test_metrics_may_join_and_a_layer_may_be_left():
    more = change({"metrics": [{"name": "solved"}, {"name": "score", "kind": "float"}]})
    assert more.plan.metric("score") == Metric(name="score", kind="float") and more.phase.number == 1
    layered = replace(
        RUNNING, layer=(0.0, 0.5), plan=RUNNING.plan.model_copy(update={"layer": Layer(name="l", share=0.5)})
    )
    left = amended(layered, RUNNING.plan, RUNNING.phase.allocation, NOW, new_phase=False, redraw=False)
    assert left.layer is None


def test_what_is_over_does_not_change():
    for state in (State.DECIDED, State.PROMOTED, State.ARCHIVED):
        ended = replace(RUNNING, state=state)
        with pytest.raises(Conflict, match="nothing about it changes"):
            amended(ended, ended.plan, ended.phase.allocation, NOW, new_phase=True, redraw=False)
    with pytest.raises(Conflict, match="no draft"):
        redefined(RUNNING, RUNNING.plan, RUNNING.phase.allocation)


def test_nobody_can_ramp_to_control_alone():
    alone = Allocation(arms=(Arm(name="a", target="@base"), Arm(name="s", target="@base", shadow=True)))
    draft = replace(DRAFT, phase=replace(DRAFT.phase, allocation=alone))
    with pytest.raises(Conflict, match="Only control"):
        moved(draft, Action.RUN, NOW)
    assert [arm.name for arm in moved(draft, Action.SHADOW, NOW).shadows] == ["s"]


@given(st.lists(st.floats(0.01, 0.5), max_size=20))
def test_parts_of_a_layer_never_meet(shares: list[float]):
    taken: list[tuple[float, float]] = []
    for share in shares:
        try:
            start, end = allotted("l", taken, share)
        except Conflict:
            assert share > 1 - sum(end - start for start, end in taken) - 1e-9 or len(taken) > 1
            continue
        assert 0 <= start < end <= 1 and end - start == pytest.approx(share)
        assert all(end <= other_start + 1e-9 or start >= other_end - 1e-9 for other_start, other_end in taken)
        taken.append((start, end))
        if len(taken) % 3 == 0:
            taken.pop(0)


def test_control_is_the_first_arm_unless_it_is_said():
    arms = [{"name": "x", "target": "@base"}, {"name": "y", "target": "@base"}]
    said = {"name": "n", "alias": "n", "arms": arms}
    assert Definition.model_validate(said).control_name == "x"
    assert Definition.model_validate({**said, "control": "y"}).control_name == "y"
    with pytest.raises(ValidationError, match="must be an arm with a weight"):
        Definition.model_validate({**said, "control": "z"})


def test_nothing_is_due_without_a_breach():
    assert due(results_of(RUNNING, Evidence(arms={}), NOW)) is None
