"""Runs tasks through lm-eval's own machinery and keeps what is stable of its results.

- `evaluate`: model, tokenizer and tasks at each k' to the record `repro.eval/v1`: no paths, no dates, numbers as decimal strings
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from records.errors import MalformedError, NetworkError, UsageError
from repro.config import decimal_string
from repro.data.tokens import Tokenizer
from repro.evals.tasks import Task
from repro.model import Transformer

SCHEMA = "repro.eval/v1"
_SEED = 1234  # of lm-eval's few-shot sampler, its own default


def require_lm_eval() -> None:
    """Raises UsageError, naming the extra that mends it, where lm-eval is not installed."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when the library is loaded
    try:
        import datasets
        import lm_eval

        del datasets, lm_eval
    except ImportError as error:
        raise UsageError(f"evaluation needs the package {error.name!r}: pip install 'pith-repro[eval]'") from error


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    ks: Sequence[int | None] = (None,),
    limit: int | None = None,
) -> dict[str, Any]:
    """The record of `tasks` at each of `ks` experts a token (None: the model's own), on the first `limit` documents of each.

    Raises:
        UsageError: a k or a task that there is not.
        NetworkError: a task of the hub, and no hub.
    """
    require_lm_eval()
    import lm_eval
    from lm_eval.evaluator import evaluate as run
    from lm_eval.tasks import TaskManager

    from repro.evals.lm import ModelLM

    models = [ModelLM(model, tokenizer, k=k) for k in ks]  # first of all: a k that is none is said at once
    with _quiet():
        named = [task.name for task in tasks if isinstance(task.spec, str)]
        if named:
            _reach_hub(named)  # before lm-eval reads its thousands of configs
        manager = TaskManager(include_defaults=bool(named))
        unknown = [name for name in named if name not in manager.all_tasks]
        if unknown:
            raise UsageError(f"unknown task {', '.join(unknown)}: expected one of ours (see --help) or of lm-eval's")
        results = []
        for k, lm in zip(ks, models, strict=True):
            for task in tasks:
                loaded = _load(manager, task)
                for built in loaded["tasks"].values():
                    if built.get_config("num_fewshot") is None:
                        built.set_config(key="num_fewshot", value=0)
                    built.set_fewshot_seed(seed=_SEED)
                found = run(
                    lm=lm,
                    task_dict=loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    confirm_run_unsafe_code=task.unsafe,
                )
                results += _stable(found, task, k)
    return {"schema": SCHEMA, "lm_eval": lm_eval.__version__, "limit": limit, "results": results}


def _load(manager: Any, task: Task) -> Any:
    spec = dict(task.spec) if isinstance(task.spec, Mapping) else task.spec
    try:
        return manager.load([spec])
    except (OSError, RuntimeError) as error:
        raise NetworkError(f"task {task.name}: its data cannot be fetched ({str(error).splitlines()[0]})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"task {task.name}: lm-eval cannot load it ({str(error).splitlines()[0]})") from error


def _reach_hub(names: Sequence[str]) -> None:
    """One quick question, where `datasets` would try for half a minute; not asked where the user works from the cache."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        requests.head(constants.ENDPOINT, timeout=10)
    except requests.RequestException as error:
        raise NetworkError(
            f"task {', '.join(names)}: {constants.ENDPOINT} cannot be reached; without it there are gsm8k=FILE, "
            "humaneval=FILE, text=PATH and held_out=CORPUS"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves stderr to our own lines; bars are drawn on a terminal only."""
    before = {name: logging.getLogger(name).level for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub")}
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in before:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _stable(found: Mapping[str, Any], task: Task, k: int | None) -> list[dict[str, Any]]:
    """Of lm-eval's results: name, version, documents and metrics of every task, and of a group's members."""
    rows = []
    for name, values in sorted(found["results"].items()):
        metrics = {
            key.removesuffix(",none"): decimal_string(value)
            for key, value in sorted(values.items())
            if isinstance(value, float) and "_stderr" not in key
        }
        if name not in found["n-samples"] or not metrics:
            continue  # a group's own row
        rows.append(
            {
                "task": name,
                "k": k,
                "version": decimal_string(float(found["versions"].get(name) or 0)),
                "num_fewshot": found["n-shot"].get(name, 0),
                "documents": found["n-samples"][name]["effective"],
                "data_sha256": task.sha256,
                "metrics": metrics,
            }
        )
    return rows


def metrics(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The record's numbers as an arm's measures have them: `eval/TASK/METRIC` and, at another k than the model's, `/k=K`."""
    for row in record["results"]:
        for name, value in row["metrics"].items():
            yield f"eval/{row['task']}/{name}" + (f"/k={row['k']}" if row["k"] is not None else ""), float(value)
