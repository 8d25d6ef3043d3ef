"""Evidence as an auditor handles it on the command line: one piece shown without the rest."""

import json

import pytest
from command_line import repro

from records import canonical
from records.package import read_bundle
from repro.trace import genesis, link
from repro.workflow.jobs import jobs
from repro.workflow.plan import parse_plan, plan_digest
from repro.workflow.prove import verify


def test_a_piece_of_a_real_run_is_shown_and_checked_alone(smoke_bundle, key_file, tmp_path):
    plan = parse_plan(read_bundle(smoke_bundle)["plan.json"], name="plan")
    arm = plan["arms"][0]["id"]
    for words, says in (
        (["--step", "1"], f"segment 1 of 1 of arm {arm}, seed 1"),
        ([], f"measures of arm {arm}, seed 1"),
    ):
        path = tmp_path / "piece.json"
        done = repro("prove", smoke_bundle, "--arm", arm, "--seed", "1", *words, "-o", path)
        assert done.returncode == 0, done.stderr.decode()
        assert says in done.stdout.decode()
        done = repro("verify", path, "--offline", "--json", "--trusted-keys", f"{key_file}.pub.json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["state"], found["kind"]) == (0, "trusted", "inclusion_proof")
        assert says in " ".join(check["detail"] for check in found["checks"])
    done = repro("prove", smoke_bundle, "--arm", "none", "--seed", "1", "-o", tmp_path / "x")
    assert done.returncode == 2
    assert b"no arm 'none' with seed 1 in the plan" in done.stderr
    done = repro("prove", smoke_bundle, "--arm", arm, "--seed", "1", "--step", "999", "-o", tmp_path / "x")
    assert done.returncode == 2
    assert b"expected a step from 1 to" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("what", ["start", "file", "junk"])
def test_a_piece_that_is_not_where_the_plan_puts_it(smoke_bundle, tmp_path, what):
    """Signed anew by a forger, so that only the plan can tell."""
    from test_workflow import resealed

    from records.inclusion import make_proof

    files = read_bundle(smoke_bundle)
    plan = parse_plan(files["plan.json"], name="plan")
    segment = jobs(plan)[0].segments[0]
    name = f"{segment.folder}/trace.jsonl"
    head = genesis(plan_digest(plan), segment.digest) if what != "start" else "00" * 32
    lines = []
    for line in files[name].splitlines():
        entry = json.loads(line)["entry"]
        head = link(head, entry)
        lines.append(canonical.dumps({"chain": head, "entry": entry}) + b"\n")
    if what == "file":
        name = "segments/0000/trace.jsonl"
    proof = make_proof(resealed(files | {name: b"".join(lines)}), file=name, line=1)
    if what == "junk":
        proof = proof[:-1]
    from records.keys import pinned

    found = verify(proof, trusted=pinned())
    assert found.exit_code == (3 if what == "junk" else 1)
    faults = [check.detail for check in found.checks if check.status == "fail"]
    assert len(faults) == 1
    assert {"start": "does not start from this plan", "file": "belongs to no arm", "junk": "strict JSON"}[
        what
    ] in faults[0]
