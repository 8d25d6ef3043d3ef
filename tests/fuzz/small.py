"""A replication bundle of a few kilobytes that verifies: the plan of a published one made small, its evidence made up."""

import json

from command_line import ROOT

from records import canonical, keys
from records.inclusion import EVIDENCE_TREE, evidence_tree
from records.package import read_bundle
from records.replication import build_replication
from repro.judge import judge
from repro.trace import genesis, link
from repro.workflow.bundle import summary
from repro.workflow.evidence import load
from repro.workflow.jobs import jobs
from repro.workflow.plan import parse_plan, plan_digest

KEY = keys.private_key(bytes(range(32)))
PUBLISHED = ROOT / "papers/emoe/replications/emoe-nano.repro.zip"


def small_plan() -> dict:
    """Two arms of 40 steps, two seeds, one claim."""
    plan = json.loads(read_bundle(PUBLISHED)["plan.json"])
    arms = [arm for arm in plan["arms"] if arm["id"] in ("topk-lr0.003", "control-lr0.003")]
    for arm in arms:
        for segment in arm["segments"]:
            segment["train"] |= {"steps": 40, "warmup": 4, "trace_every": 10, "hash_every": 20, "checkpoint_every": 20}
    groups = [group | {"among": ["topk-lr0.003"]} for group in plan["groups"] if group["id"] == "topk"]
    claims = [claim for claim in plan["claims"] if claim["id"] == "A1"]
    return plan | {"arms": arms, "groups": groups, "claims": claims, "figures": [], "seeds": [0, 1], "deviations": []}


def evidence(plan: dict) -> dict[str, list[dict]]:
    """Entries by file, as a run would have traced them; the numbers are made up."""
    found: dict[str, list[dict]] = {}
    for job in jobs(plan):
        for segment in job.segments:
            entries = [
                {"type": "step", "step": step, "tokens": step * 1024, "loss": f"{5 - step / 20}", "grad_norm": "0.5"}
                for step in range(10, 50, 10)
            ]
            entries[1]["weights"] = canonical.digest([segment.digest, 20])
            final = canonical.digest([job.seed, "equal for both arms, as the control wants it"])
            found[f"{segment.folder}/trace.jsonl"] = [*entries, {"type": "end", "steps": 40, "weights": final}]
        metrics = [("tuning/loss", "2.9"), *((f"loss/k={k}", f"{3 + 0.01 * k + 0.001 * job.seed}") for k in (1, 2, 4))]
        found[job.file] = [{"type": "metric", "name": name, "value": value} for name, value in metrics]
        found[job.file].append({"type": "end", "metrics": len(metrics)})
    return found


def chained(entries: list, start: str) -> tuple[bytes, str]:
    """A trace of the entries, and its last chain value."""
    lines = []
    for entry in entries:
        start = link(start, entry)
        lines.append(canonical.dumps({"chain": start, "entry": entry}) + b"\n")
    return b"".join(lines), start


def traced(plan: dict, found: dict[str, list[dict]]) -> dict[str, bytes]:
    """The evidence as files, every chain made anew."""
    files: dict[str, bytes] = {}
    for job in jobs(plan):
        head = ""
        for segment in job.segments:
            name = f"{segment.folder}/trace.jsonl"
            files[name], head = chained(found[name], genesis(plan_digest(plan), segment.digest))
            files[f"{segment.folder}/timing.jsonl"] = b'{"step":10,"seconds":0.25}\n'
        files[job.file], _ = chained(found[job.file], genesis(head, job.digest))
    return files


def sealed(files: dict[str, bytes], *, verdicts: list) -> dict[str, bytes]:
    """The files as a bundle: manifest, statement and signature made anew."""
    plan = json.loads(files["plan.json"])
    paper = canonical.dumps({"arxiv": "2509.21892", "title": "A title"})
    files = files | {"paper.json": paper}
    predicate = {
        "schema": "repro.replication/v1",
        **{name: plan.get(name) for name in ("scale", "seeds", "corpora", "environment")},
        "paper": plan["paper"] | {"pith_number": None} if isinstance(plan.get("paper"), dict) else {},
        "plan_sha256": canonical.sha256_hex(files["plan.json"]),
        "outcome_sha256": canonical.sha256_hex(files["outcome.json"]),
        "verdicts": verdicts,
        "code": {"sha256": "0" * 64, "version": "0.1.0", "commit": None, "dirty": True},
        EVIDENCE_TREE: evidence_tree(files),
        "finished_at": "2026-11-21T22:00:00Z",
    }
    return build_replication(
        files,
        subject_name="arxiv:2509.21892",
        subject_sha256=canonical.sha256_hex(paper),
        predicate=predicate,
        key=KEY,
    )


def small_bundle() -> dict[str, bytes]:
    """The files of a bundle that verifies."""
    plan = small_plan()
    plan = plan | {"paper": plan["paper"] | {"pith_number": None}, "code": plan["code"] | {"sha256": "0" * 64}}
    plan = parse_plan(canonical.dumps(plan), name="plan")
    files = traced(plan, evidence(plan))
    outcome = {"plan_sha256": plan_digest(plan)} | judge(plan, load(plan, files).evidence)
    files |= {"plan.json": canonical.dumps(plan), "outcome.json": canonical.dumps(outcome)}
    return sealed(files, verdicts=summary(outcome))
