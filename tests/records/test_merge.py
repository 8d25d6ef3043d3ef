"""The merge: order, duplication and split leave no trace; conflicts are kept and counted; invalid events change nothing."""

import copy
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_cases import STORE, bundle_of

from records.errors import InvalidError, MalformedError
from records.merge import compare_with_served, merge_bundles

SIGNED: dict[str, Any] = json.loads((STORE / "X72AYRLPIFP2UVYVUQLNZSTJUW.json").read_bytes())
BUNDLE = bundle_of(SIGNED)
NUMBER = BUNDLE["pith_number"]


def event(time: str = "2026-06-01T00:00:00Z", **changes: Any) -> dict[str, Any]:
    value = {
        "event_type": "citation_signature",
        "subject_pith_number": NUMBER,
        "target": "record",
        "created_at": time,
        "signer": {"key_id": "somebody"},
        "payload": {"note": "a"},
    }
    return value | changes


EVENTS = st.builds(
    event,
    st.sampled_from(["2026-06-01T00:00:00Z", "2026-06-02T00:00:00.5Z", "2026-06-02T00:00:00+00:00"]),
    payload=st.dictionaries(st.sampled_from("ab"), st.integers(0, 2), max_size=2),
    signer=st.sampled_from([{"key_id": "x"}, {"key_id": "y"}]),
)
INVALID = st.sampled_from(
    [
        event(subject_pith_number="pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"),
        event(created_at="yesterday"),
        event(created_at=5),
        event(payload=[]),
        {"event_type": "x"},
        "not an object",
        event(event_type="record_created", payload={"canonical_sha256": "0" * 64}),
        event(event_type="record_created", payload={"canonical_record": {}}),
        event(event_type="record_created", payload={"receipt": SIGNED["receipt"] | {"signature_b64": "A" * 86 + "=="}}),
        event(event_type="record_created", payload={"receipt": SIGNED["receipt"] | {"canonical_sha256": "0" * 64}}),
    ]
)


def with_events(events: list[Any]) -> dict[str, Any]:
    return {**BUNDLE, "events": events}


@given(st.lists(EVENTS | INVALID, max_size=8), st.randoms(use_true_random=False), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_order_duplication_and_split_leave_no_trace(events: list[Any], chance: random.Random, parts: int) -> None:
    whole = merge_bundles([with_events(BUNDLE["events"] + events)])
    scattered = [[] for _ in range(parts)]  # type: list[list[Any]]
    for item in BUNDLE["events"] + events:
        for _ in range(chance.randint(1, 3)):
            scattered[chance.randrange(parts)].append(copy.deepcopy(item))
    bundles = []
    for part in scattered:
        chance.shuffle(part)
        aliases = copy.deepcopy(BUNDLE["source_aliases"])
        chance.shuffle(aliases)
        bundles.append({**with_events(part), "source_aliases": aliases * chance.randint(1, 2)})
    chance.shuffle(bundles)
    again = merge_bundles(bundles)
    assert again.to_bytes() == whole.to_bytes()
    assert again == whole
    assert merge_bundles([*bundles, *bundles]).to_bytes() == whole.to_bytes()


@given(st.lists(EVENTS, max_size=4), st.lists(INVALID, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_an_invalid_event_never_changes_the_state(events: list[Any], invalid: list[Any]) -> None:
    clean = merge_bundles([with_events(events)])
    dirty = merge_bundles([with_events([*invalid, *events, *invalid])])
    assert dirty.state["current"] == clean.state["current"]
    for count in ("valid_event_count", "equivocation_count"):
        assert dirty.state[count] == clean.state[count]
    assert clean.invalid_event_count == 0 and len(dirty.reasons) == dirty.invalid_event_count > 0


def test_equivocations_are_kept_and_counted_once_a_slot() -> None:
    snapshots = [
        event(event_type="graph_snapshot", target="graph", payload={"graph_snapshot": {"source": n}}) for n in range(3)
    ]
    merged = merge_bundles([with_events(snapshots)])
    assert merged.equivocation_count == 1 and merged.valid_event_count == 3
    assert len(merged.state["current"]["graph_snapshots"]) == 3
    merged = merge_bundles(
        [with_events([event(event_id="sha256:1"), event("2026-07-01T00:00:00Z", event_id="sha256:1")])]
    )
    assert merged.equivocation_count == 1
    assert merge_bundles([with_events([event(), event("2026-07-01T00:00:00Z")])]).equivocation_count == 0


def test_the_order_of_the_state_is_that_of_time() -> None:
    snapshots = [
        event(time, event_type="graph_snapshot", payload={"graph_snapshot": {"n": time}})
        for time in ("2026-06-03T00:00:00Z", "2026-06-01T00:00:00.5Z", "2026-06-01T00:00:00+00:00")
    ]
    listed = merge_bundles([with_events(snapshots)]).state["current"]["graph_snapshots"]
    times = [item["payload"]["graph_snapshot"]["n"] for item in listed]
    assert times == ["2026-06-01T00:00:00+00:00", "2026-06-01T00:00:00.5Z", "2026-06-03T00:00:00Z"]


def test_a_forged_alias_does_not_reach_the_state() -> None:
    forged = {"alias_kind": "arxiv", "alias_value": "2605.13247", "created_at": "2026-05-20T00:00:00Z"}
    merged = merge_bundles([{**BUNDLE, "source_aliases": [forged, *BUNDLE["source_aliases"]]}])
    assert merged.to_bytes() == merge_bundles([BUNDLE]).to_bytes()


def test_compared_with_a_served_state() -> None:
    merged = merge_bundles([BUNDLE])
    served = copy.deepcopy(merged.state) | {"merge_version": "pith-open-graph-merge-v1"}
    assert compare_with_served(merged, served) == []
    assert compare_with_served(merged, {}) and compare_with_served(merged, None)
    served["valid_event_count"] = 1
    del served["current"]["source_aliases"][0]
    served["current"]["canonical_record"] = {}
    assert len(compare_with_served(merged, served)) == 3


def test_bundles_that_do_not_belong_together() -> None:
    other = copy.deepcopy(BUNDLE)
    other["pith_number"] = "pith:2026:IV7VH3NCTL2M6JAD44FIMISHCY"
    with pytest.raises(InvalidError, match="holds the record of"):
        merge_bundles([other])
    older = {**BUNDLE, "pith_number": NUMBER.replace("2025", "2024")}
    with pytest.raises(InvalidError, match="one number"):
        merge_bundles([BUNDLE, older])
    for junk in ([], [{}], [None], [{**BUNDLE, "events": {}}], [{**BUNDLE, "canonical_record": 1}]):
        with pytest.raises(MalformedError):
            merge_bundles(junk)
