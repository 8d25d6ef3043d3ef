"""Tasks: GSM8K, HumanEval and text from local files as lm-eval's inline configs, and lm-eval's own by name.

- `gsm8k=FILE[+EXAMPLES]`: exact match of the final number; with a second file its first five rows are shown before each question
- `humaneval=FILE`: completions of Python functions; they are run, for pass@1, only where that is allowed
- `text=PATH`: perplexity a byte of a file, or of each file of a folder; `held_out=CORPUS`: of a corpus' held-out documents
- any other name is lm-eval's, and needs the Hugging Face hub

The prompts, stop texts and filters of GSM8K and HumanEval are those of lm-eval's tasks of that name. Files are read and
checked here, row by row: the loader of `datasets` may answer from its cache for a file that was rewritten.
"""

import ast
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from records.errors import MalformedError, UsageError
from repro.evals.execute import passes

LOCAL = ("gsm8k", "humaneval", "text", "held_out")
_SHOTS = 5
_SECONDS = 10.0  # for one HumanEval test
_NUMBER = re.compile(r"#### -?[0-9.,]+\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as asked for: what lm-eval is given (a name, or a config), and the digest of its data where that is local."""

    name: str
    spec: str | Mapping[str, Any]
    sha256: str | None = None
    unsafe: bool = False


def parse(text: str, *, unsafe_code: bool) -> list[Task]:
    """Tasks of a comma-separated list.

    Raises:
        UsageError: an empty list, one twice, or a file that cannot be read.
        MalformedError: a file with a row that is not the task's.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    tasks = [_task(*word.partition("="), unsafe_code=unsafe_code) for word in words]
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise UsageError(f"--tasks: expected different tasks, separated by commas, found {text[:80]!a}")
    return tasks


def _task(name: str, given: str, where: str, *, unsafe_code: bool) -> Task:
    if not given:
        if name in ("text", "held_out"):
            raise UsageError(f"task {name}: expected {name}={'PATH' if name == 'text' else 'CORPUS'}")
        if name == "humaneval":
            raise UsageError("task humaneval: expected humaneval=FILE: lm-eval's own would run code to be loaded")
        return Task(name=name, spec=name)
    if name == "gsm8k":
        return _gsm8k(where)
    if name == "humaneval":
        return _humaneval(where, unsafe_code=unsafe_code)
    if name == "text":
        return _text("text", _texts(Path(where)))
    if name == "held_out":
        return _text("held_out", _held_out(where))
    raise UsageError(f"task {name}: only {', '.join(LOCAL)} take a file or corpus of your own")


def _gsm8k(where: str) -> Task:
    first, _, second = where.partition("+")
    rows, digest = _rows(Path(first), ("question", "answer"))
    for number, row in enumerate(rows, start=1):
        if not _NUMBER.search(row["answer"]):
            raise MalformedError(
                f"{first} row {number}: expected an answer that ends in '#### NUMBER', found {row['answer'][-40:]!a}"
            )
    data = {"test": rows}
    if second:
        examples, more = _rows(Path(second), ("question", "answer"))
        if len(examples) < _SHOTS:
            raise MalformedError(f"{second}: expected at least {_SHOTS} examples, found {len(examples)}")
        data["train"] = examples[:_SHOTS]
        digest = hashlib.sha256(f"{digest} {more}".encode()).hexdigest()
    spec = {
        **_base("gsm8k", data, 3.0),
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "max_gen_toks": 256},
        "filter_list": [
            _filtered("strict-match", "#### (\\-?[0-9\\.\\,]+)", {}),
            _filtered("flexible-extract", "(-?[$0-9.,]{2,})|(-?[0-9]+)", {"group_select": -1}),
        ],
        "num_fewshot": _SHOTS if second else 0,
        **({"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}} if second else {}),
    }
    return Task(name="gsm8k", spec=spec, sha256=digest)


def _filtered(name: str, pattern: str, more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "filter": [{"function": "regex", "regex_pattern": pattern, **more}, {"function": "take_first"}],
    }


def _humaneval(where: str, *, unsafe_code: bool) -> Task:
    rows, digest = _rows(Path(where), ("task_id", "prompt", "entry_point", "test"))
    names = ("pass@1", "parses") if unsafe_code else ("parses",)
    spec = {
        **_base("humaneval", {"test": rows}, 1.0),
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "process_results": partial(_code_results, run=unsafe_code),
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 1024, "do_sample": False,
        },
        "unsafe_code": unsafe_code,
        "num_fewshot": 0,
    }  # fmt: skip
    return Task(name="humaneval", spec=spec, sha256=digest, unsafe=unsafe_code)


def _code_results(doc: Mapping[str, str], results: Sequence[str], *, run: bool) -> dict[str, float]:
    """`parses`: whether prompt and completion are Python (parsed, never run); with `run`, `pass@1`: whether the test passes."""
    code = doc["prompt"] + results[0]
    found = {"parses": float(_parses(code))}
    if run:
        found["pass@1"] = float(passes(f"{code}\n{doc['test']}\ncheck({doc['entry_point']})\n", seconds=_SECONDS))
    return found


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _text(name: str, texts: list[str]) -> Task:
    if not texts:
        raise UsageError(f"task {name}: expected at least one text, found none")
    spec = {
        **_base(name, {"test": [{"text": text} for text in texts]}, 1.0),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "process_results": _text_results,
        "metric_list": [
            {"metric": metric, "aggregation": how, "higher_is_better": False}
            for metric, how in (("byte_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
        ],
    }
    digests = "".join(f"{hashlib.sha256(text.encode()).hexdigest()}\n" for text in texts)
    return Task(name=name, spec=spec, sha256=hashlib.sha256(digests.encode()).hexdigest())


def _text_results(doc: Mapping[str, str], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    weighted = (results[0], len(doc["text"].encode()))
    return {"byte_perplexity": weighted, "bits_per_byte": weighted}


def _base(name: str, data: Mapping[str, list[dict[str, str]]], version: float) -> dict[str, Any]:
    """What all our configs share; `version` is that of lm-eval's task of the name."""
    return {
        "task": name,
        "custom_dataset": _dataset(data),
        "test_split": "test",
        "metadata": {"version": version},
    }


def _dataset(data: Mapping[str, list[dict[str, str]]]) -> Callable[..., Any]:
    def build(**_: object) -> Any:
        import datasets

        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in data.items()})

    return build


def _rows(path: Path, fields: tuple[str, ...]) -> tuple[list[dict[str, str]], str]:
    """Rows of a JSONL file (gzipped or not) and the SHA-256 of its bytes as they lie."""
    data = _bytes(path)
    try:
        text = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise MalformedError(f"{path}: expected a whole gzip file, found {error}: fetch it again") from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"{path} line {number}: expected JSON, found {error}") from error
        missing = [
            f for f in fields if not isinstance(row, dict) or not isinstance(row.get(f), str) or not row[f].strip()
        ]
        if missing:
            raise MalformedError(f"{path} line {number}: expected a text under {', '.join(missing)}, found none")
        rows.append({field: row[field] for field in fields})
    if not rows:
        raise MalformedError(f"{path}: expected at least one row, found none")
    return rows, hashlib.sha256(data).hexdigest()


def _texts(path: Path) -> list[str]:
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [text for text in (_bytes(file).decode(errors="replace") for file in files) if text]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _held_out(name: str) -> list[str]:
    from repro.data import corpus
    from repro.data.prepare import read

    if name.startswith("data:"):
        found = read(name.removeprefix("data:").partition("@")[0])
        tokens, ends = found.tokens["held_out"], found.ends["held_out"].tolist()
        starts = [0, *ends[:-1]]
        return [found.tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)]
    documents = corpus.load(name).held_out.tobytes().split(b"\0")
    return [text for text in (document.decode(errors="replace") for document in documents) if text]
