"""Each fuzz target takes its own seeds, and whole documents among them are what they claim to be."""

import pytest

pytest.importorskip("opentimestamps")

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "records"))

from targets import _VALUES, AUDIT, PLAN, PROOF, SIGNED_PLAN, SMALL, TARGETS, Choices, edited, run

from records import audit, keys
from repro.workflow import audit as workflow_audit
from repro.workflow import bundle, prove, signed


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds(name):
    assert TARGETS[name].seeds
    for seed in TARGETS[name].seeds[:6]:
        run(TARGETS[name], seed)


def test_the_seeds_are_whole():
    trusted = keys.pinned()
    assert bundle.verify(SMALL, target="x", trusted=trusted).state == "valid"
    assert prove.verify(PROOF, trusted=trusted).state == "valid"
    assert audit.verify_audit(AUDIT, trusted=trusted).state == "valid"
    assert [c.status for c in workflow_audit.check_draw(PLAN, SMALL, audit.read_audit(AUDIT))] == ["pass"]
    assert signed.verify_signed(SIGNED_PLAN, trusted=trusted).state == "valid"


def test_edits_change_documents_and_leave_the_original_alone():
    before = repr(PLAN)
    changed = [edited(PLAN, Choices(bytes(range(n, n + 24)))) for n in range(0, 200, 10)]
    assert repr(PLAN) == before
    assert sum(repr(value) != before for value in changed) > 15


def test_edits_leave_the_values_alone_that_they_put_in():
    """A list that was put in as it is could be put into itself by the next edit, and had parts without end."""
    before, generator = repr(_VALUES), random.Random(0)
    for _ in range(200):
        edited({"a": {}, "b": []}, Choices(generator.randbytes(24)))
        assert repr(_VALUES) == before
