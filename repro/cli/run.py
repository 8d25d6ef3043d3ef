"""Commands of the replicator: papers, claims, plan, run, judge, bundle, env."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repro.cluster import Layout

Subparsers = Any  # argparse gives this type no public name

MAX_SEEDS = 10_000  # far beyond any run; what is more is a slip, and would fill the memory with its plan

# Imports lie inside the commands: `repro verify` builds this parser too, and must start in milliseconds.


def add_parser(commands: Subparsers) -> None:
    """Adds the commands to `commands`."""
    command = commands.add_parser("papers", help="what can be reproduced")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.set_defaults(func=_papers)

    command = commands.add_parser("claims", help="a paper's claims, each with its criterion and source")
    command.add_argument("paper", metavar="PAPER")
    command.add_argument("--json", action="store_true", help="one JSON object a claim")
    command.add_argument("--table", action="store_true", help="instead the table that the paper's claims are about")
    command.set_defaults(func=_claims)

    command = commands.add_parser("plan", help="the plan of a run, its digest, time and memory; runs nothing")
    _add_plan_arguments(command)
    command.add_argument("--json", action="store_true", help="the plan itself, canonical JSON")
    command.add_argument("--sign", type=Path, metavar="KEY", help="sign the plan with this private key, to FILE")
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="the signed plan, for repro run --plan")
    command.set_defaults(func=_plan)

    command = commands.add_parser("run", help="plan, train, measure, judge, report")
    _add_plan_arguments(command, optional=True)
    command.add_argument("--plan", type=Path, metavar="FILE", help="run this signed plan (repro plan --sign)")
    command.add_argument(
        "--deviate", metavar="WHY", help="run it although code, text or environment are not the plan's; recorded"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/PAPER-SCALE)")
    command.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    command.add_argument(
        "--parallel",
        metavar="HOW",
        help="under torchrun: ddp (default), fsdp, or either with +experts, which shares out the experts",
    )
    command.set_defaults(func=_run)

    command = commands.add_parser("judge", help="verdicts again, from the evidence of a run")
    command.add_argument("dir", type=Path, metavar="DIR")
    command.add_argument("--json", action="store_true", help="the outcome, canonical JSON")
    command.set_defaults(func=_judge)

    command = commands.add_parser("bundle", help="the replication bundle of a run, signed with --key")
    command.add_argument("dir", type=Path, metavar="DIR")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    command.add_argument("--key", type=Path, metavar="FILE", help="private key made by `repro keys new`")
    command.set_defaults(func=_bundle)

    command = commands.add_parser("env", help="versions, device and code that a run here would record")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.set_defaults(func=_env)


def _add_plan_arguments(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    command.add_argument("paper", metavar="PAPER", nargs="?" if optional else None)
    command.add_argument("--scale", default="nano", help="smoke, nano, small, base or paper (default: nano)")
    command.add_argument(
        "--seeds", type=_seeds, metavar="N", help="number of seeds (default: the paper's for the scale)"
    )
    command.add_argument(
        "--claims", metavar="IDS", help="comma-separated claims or suites, or all (default: the scale's own)"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)"
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="folder of a public checkpoint (OLMoE, Qwen3-MoE) to train further",
    )


def positive(text: str) -> int:
    """A whole number of at least 1, as an option gives it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def _seeds(text: str) -> int:
    if positive(text) > MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"expected a number of at most {MAX_SEEDS}, found {text!r}")
    return int(text)


def _papers(arguments: argparse.Namespace) -> int:
    from repro.experiment import SLUGS, load_claims

    for slug in SLUGS:
        info = load_claims(slug)
        paper = info.paper
        number = paper.pith_number or "Pith number not known"
        if arguments.json:
            print(
                json.dumps(
                    {
                        "slug": slug.replace("_", "-"),
                        "title": paper.title,
                        "arxiv": paper.arxiv,
                        "pith_number": paper.pith_number,
                        "claims": [claim.id for claim in info.claim],
                    }
                )
            )
        else:
            ids = ", ".join(claim.id for claim in info.claim)
            print(f"{slug.replace('_', '-')}\n  {paper.title}\n  arXiv {paper.arxiv} · {number}\n  claims: {ids}")
    return 0


def _claims(arguments: argparse.Namespace) -> int:
    from repro.config import encode
    from repro.experiment import load_claims

    info = load_claims(arguments.paper)
    if arguments.table:
        from records.errors import UsageError
        from repro.workflow.plan import paper_module

        table = getattr(paper_module(info.paper.slug), "table", None)
        if table is None:
            raise UsageError(f"{arguments.paper} has no table; leave --table out")
        print(table())
        return 0
    for claim in info.claim:
        if arguments.json:
            print(json.dumps(encode(claim), ensure_ascii=False))
            continue
        print(f"{claim.id}  {claim.title}")
        print(f"    “{claim.statement}” ({claim.source})")
        print(f"    metric: {claim.metric}; decided at: {', '.join(claim.scales)}; at least {claim.min_seeds} seeds")
        for role, tests in (("replicated if all of", claim.passes), ("not replicated if any of", claim.fails)):
            print(f"    {role}: " + "; ".join(str(test) for test in tests))
        print("    control: " + "; ".join(str(test) for test in claim.controls))
        if claim.only_named:
            name = f"{claim.id} or {claim.suite}" if claim.suite else claim.id
            print(f"    left out at {', '.join(claim.only_named)} unless named: --claims {name}")
        if claim.note:
            print(f"    {claim.note}")
    return 0


def _make_plan(arguments: argparse.Namespace, *, dry: bool = False, layout: str = "one process") -> dict[str, Any]:
    from repro.experiment import load_claims, select_claims
    from repro.workflow.plan import make_plan

    # an unknown paper or claim is said before a missing extra
    select_claims(load_claims(arguments.paper), arguments.claims, arguments.scale)
    return make_plan(
        arguments.paper,
        scale=arguments.scale,
        seeds=arguments.seeds,
        claims=arguments.claims,
        device=arguments.device,
        checkpoint=arguments.checkpoint,
        dry=dry,
        layout=layout,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from records import canonical, keys
    from records.errors import UsageError
    from records.package import write_atomically
    from repro.workflow.estimate import estimate
    from repro.workflow.plan import at_hand, plan_digest, reuse
    from repro.workflow.run import now
    from repro.workflow.signed import sign_plan

    if (arguments.sign is None) != (arguments.output is None):
        raise UsageError("plan: expected both --sign KEY and -o FILE, or neither")
    plan = _make_plan(arguments, dry=not arguments.json and not arguments.sign)
    if arguments.sign:
        key = keys.load(arguments.sign)
        write_atomically(arguments.output, sign_plan(plan, key=key, signed_at=now()))
        print(f"{arguments.output}: plan {plan_digest(plan)}, signed with {key.key_id}", file=sys.stderr)
    if arguments.json:
        sys.stdout.buffer.write(canonical.dumps(plan) + b"\n")
        return 0
    cost = estimate(plan, workers=arguments.workers)
    print(f"{plan['paper']['title']} (arXiv {plan['paper']['arxiv']})")
    print(f"plan      {plan_digest(plan) if at_hand(plan) else 'none yet: its text or checkpoint is not at hand'}")
    print(f"scale     {plan['scale']}, seeds {', '.join(map(str, plan['seeds']))}, {len(plan['arms'])} arms")
    for name, digest in plan["corpora"].items():
        print(f"corpus    {name} {digest}")
    for warning in plan["warnings"]:
        print(f"warning   {warning}")
    print(f"claims    {', '.join(claim['id'] for claim in plan['claims'])}")
    print(f"arms      {', '.join(arm['id'] for arm in plan['arms'])}")
    for arm, (unique, epochs) in reuse(plan).items():
        print(f"reuse     {arm}: {epochs:.2f} epochs of {unique:,} unique tokens")
    shared = f" ({cost.tokens_alone:,} if no arm shared a segment)" if cost.tokens_alone > cost.tokens else ""
    print(f"tokens    {cost.tokens:,}{shared}, {cost.flops:.3g} floating-point operations")
    print(f"estimate  {duration(cost.seconds)} with {cost.workers} workers, {cost.memory / 2**30:.1f} GiB of memory")
    if plan["scale"] in ("small", "base", "paper") and plan["environment"]["device"] == "cpu":
        gpu = estimate(plan, workers=1, device="cuda")
        print(f"          {duration(gpu.seconds)} of one GPU's time, at a rate that is assumed and was not measured")
    return 0


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _run(arguments: argparse.Namespace) -> int:
    from repro.cli.progress import reporter
    from repro.report import require_report
    from repro.workflow.run import execute, start

    if arguments.parallel or "WORLD_SIZE" in os.environ:
        from repro.cluster import layout

        if spread := layout(arguments.parallel):
            return _run_together(arguments, spread)
    plan, beside = _given_plan(arguments)
    require_report()
    folder = _folder(arguments, plan)
    with start(plan, folder, resume=arguments.resume, beside=beside):
        _announce(arguments, plan, folder)
        try:
            with reporter() as progress:
                execute(plan, folder, workers=arguments.workers, reporter=progress, checkpoint=arguments.checkpoint)
        except KeyboardInterrupt:
            print(f"repro: stopped; go on with the same command and --resume (kept in {folder})", file=sys.stderr)
            return 130
        return _conclude(plan, folder)


def _given_plan(
    arguments: argparse.Namespace, *, layout: str = "one process"
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The plan to run, made here or signed before, and the files that a new run directory gets beside it."""
    from records.errors import UsageError

    if (arguments.paper is None) == (arguments.plan is None):
        raise UsageError("run: expected either a paper or --plan FILE")
    if arguments.plan is None:
        if arguments.deviate is not None:
            raise UsageError("run: --deviate is from a signed plan; expected --plan FILE")
        return _make_plan(arguments, layout=layout), {}
    if arguments.seeds is not None or arguments.claims is not None:
        raise UsageError("run: seeds and claims are those of the signed plan; leave --seeds and --claims out")
    from records.keys import pinned
    from records.timestamps import proof_path
    from repro.workflow.signed import SIGNED_PLAN, adopt

    plan, data = adopt(arguments.plan, why=arguments.deviate, trusted=pinned(), layout=layout)
    beside = {SIGNED_PLAN: data}
    proof = proof_path(arguments.plan)
    if proof.exists():
        beside[proof_path(Path(SIGNED_PLAN)).name] = proof.read_bytes()
    return plan, beside


def _run_together(arguments: argparse.Namespace, layout: "Layout") -> int:
    """One of the processes of a torchrun; the first of them speaks and writes."""
    from repro.cli.progress import reporter
    from repro.cluster import Cluster
    from repro.environment import set_deterministic
    from repro.report import require_report
    from repro.workflow.run import execute_together, start

    require_report()
    set_deterministic()
    with Cluster(layout, arguments.device) as cluster:
        plan, beside = _given_plan(arguments, layout=str(layout))
        folder = _folder(arguments, plan)
        if not cluster.leads:
            cluster.wait()
            execute_together(plan, folder, cluster=cluster, reporter=None, checkpoint=arguments.checkpoint)
            return 0
        with start(plan, folder, resume=arguments.resume, beside=beside):
            _announce(arguments, plan, folder)
            cluster.wait()
            with reporter() as progress:
                execute_together(plan, folder, cluster=cluster, reporter=progress, checkpoint=arguments.checkpoint)
            _conclude(plan, folder)
            return 0  # torchrun takes any other code for a crash; `repro judge` gives the verdicts' own


def _folder(arguments: argparse.Namespace, plan: Mapping[str, Any]) -> Path:
    return arguments.out or Path("runs") / f"{plan['paper']['slug'].replace('_', '-')}-{plan['scale']}"


def _announce(arguments: argparse.Namespace, plan: Mapping[str, Any], folder: Path) -> None:
    from repro.workflow.estimate import estimate
    from repro.workflow.plan import plan_digest

    seconds = estimate(plan, workers=arguments.workers).seconds
    print(f"plan {plan_digest(plan)[:16]}…, about {duration(seconds)}, in {folder}", file=sys.stderr)
    for warning in plan["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _conclude(plan: Mapping[str, Any], folder: Path) -> int:
    from repro.judge import exit_code
    from repro.workflow.publish import write_report
    from repro.workflow.run import finish

    outcome = finish(plan, folder)
    write_report(folder)
    _print_outcome(plan, outcome)
    print(f"report: {folder / 'report.html'}")
    return exit_code(outcome)


def _judge(arguments: argparse.Namespace) -> int:
    from records import canonical
    from repro.judge import exit_code
    from repro.workflow.run import finish, read_plan

    plan = read_plan(arguments.dir)
    outcome = finish(plan, arguments.dir)
    if arguments.json:
        sys.stdout.buffer.write(canonical.dumps(outcome) + b"\n")
    else:
        _print_outcome(plan, outcome)
    return exit_code(outcome)


def _print_outcome(plan: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    titles = {claim["id"]: claim["title"] for claim in plan["claims"]}
    for group, arm in outcome["groups"].items():
        print(f"{group}: chosen {arm}")
    for verdict in outcome["verdicts"]:
        print(f"{verdict['claim']:8} {verdict['verdict']:15} {titles.get(verdict['claim'], '')} ({verdict['reason']})")
        for test in verdict["tests"]:
            numbers = ""
            if "effect" in test:
                low, high = test["interval"]
                p = f", p {test['p']}" if "p" in test else ""
                numbers = f"  [{test['effect']}, 95% {low} to {high}{p}, n {test['n']}]"
            print(f"         {test['role']:8} {test['result']:12} {test['test']}{numbers}")


def _bundle(arguments: argparse.Namespace) -> int:
    from records import keys
    from records.package import write_bundle
    from repro.workflow.bundle import make_bundle

    key = keys.load(arguments.key) if arguments.key else None
    files = make_bundle(arguments.dir, key=key)
    write_bundle(arguments.output, files)
    signed = f"signed with {key.key_id}" if key else "not signed (no --key)"
    print(f"{arguments.output}: {len(files)} files, {signed}")
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from repro.config import encode
    from repro.environment import code_state, numeric_environment

    print(json.dumps({"environment": encode(numeric_environment(arguments.device)), "code": code_state()}, indent=1))
    return 0
