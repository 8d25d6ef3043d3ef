"""Tasks from local files through lm-eval's machinery: known scores, no code run unasked, and files with something missing."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from records import canonical
from records.errors import MalformedError, UsageError
from repro.data.tokens import Tokenizer
from repro.evals import execute, harness, tasks
from repro.evals.lm import ModelLM
from repro.model import ModelConfig, Transformer

CONFIG = ModelConfig(d_model=16, num_layers=1, num_heads=2, context=64, d_expert=8, num_experts=4, top_k=2)
SUMS = [
    {"question": f"Ann has {n} pens and buys {n}. How many has she?", "answer": f"{n}+{n}={2 * n}.\n#### {2 * n}"}
    for n in range(600, 606)
]
PROBLEMS = [
    {
        "task_id": f"Own/{n}",
        "prompt": f"def add{n}(a):\n    'a and {n}'\n",
        "entry_point": f"add{n}",
        "canonical_solution": f"    return a + {n}\n",
        "test": f"def check(f):\n    assert f(1) == {n + 1}\n",
    }
    for n in range(4)
]


def lines(path: Path, rows: list[dict[str, str]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch):
    """Lets the model answer with what it is told, and keeps the prompts."""

    def install(*texts: str) -> list[str]:
        prompts: list[str] = []

        def generate(self, requests, disable_tqdm=False):
            prompts.extend(request.args[0] for request in requests)
            return list(texts)

        monkeypatch.setattr(ModelLM, "generate_until", generate)
        return prompts

    return install


def evaluate(text: str, *, unsafe_code: bool = False, **more) -> dict[str, object]:
    found = tasks.parse(text, unsafe_code=unsafe_code)
    return harness.evaluate(Transformer(CONFIG), Tokenizer(), found, **more)


def test_gsm8k_scores_the_final_number_as_lm_eval_does(tmp_path: Path, answers) -> None:
    prompts = answers("so 1200.\n#### 1200", "it is 1202", "#### 1,204", "no idea")
    test, train = lines(tmp_path / "test.jsonl", SUMS[:4]), lines(tmp_path / "train.jsonl", SUMS)
    found = evaluate(f"gsm8k={test}+{train}")
    (row,) = found["results"]
    assert row["metrics"] == {"exact_match,flexible-extract": "0.75", "exact_match,strict-match": "0.5"}
    assert (row["documents"], row["num_fewshot"], row["k"]) == (4, 5, None)
    assert prompts[0].count("Question:") == 6 and prompts[0].endswith("600. How many has she?\nAnswer:")
    assert "#### 1208" in prompts[0]
    text = canonical.dumps(found).decode()  # no floats
    assert str(tmp_path) not in text and "2026" not in text
    answers("#### 1200")
    assert evaluate(f"gsm8k={test}", limit=1)["results"][0]["metrics"]["exact_match,strict-match"] == "1.0"


COMPLETIONS = (
    "    return a + 0\n",
    "    return a + 2\n",
    "    import pathlib; pathlib.Path(MARK).touch(); return a + 2",
    "  )",
)


@pytest.mark.parametrize("unsafe_code", [False, True])
def test_humaneval_runs_no_code_unless_it_may(tmp_path: Path, answers, monkeypatch, unsafe_code: bool) -> None:
    mark = tmp_path / "ran"
    prompts = answers(*(text.replace("MARK", repr(str(mark))) for text in COMPLETIONS))
    if not unsafe_code:
        monkeypatch.setattr(tasks, "passes", lambda code, *, seconds: pytest.fail("code was run"))
    found = evaluate(f"humaneval={lines(tmp_path / 'h.jsonl.gz', PROBLEMS)}", unsafe_code=unsafe_code)
    (row,) = found["results"]
    assert row["metrics"] == {"parses": "0.75"} | ({"pass@1": "0.5"} if unsafe_code else {})
    assert mark.exists() == unsafe_code
    assert prompts == [problem["prompt"] for problem in PROBLEMS]


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import os; os._exit(0)", False),
        ("raise SystemExit(0)", False),
        ("while True: pass", False),
        ("x = bytearray(8 * 2**30)", False),
        ("import os; assert not os.environ.get('HOME')", True),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end(code: str, passed: bool) -> None:
    assert execute.passes(code, seconds=3.0 if passed or "while" not in code else 0.3) is passed


@torch.no_grad()
def test_text_and_held_out_text_at_every_k(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("naïve " * 100)
    uniform = Transformer(CONFIG)
    uniform.unembedding_VD.zero_()
    wanted = tasks.parse(f"text={path},held_out=synthetic", unsafe_code=False)
    found = harness.evaluate(uniform, Tokenizer(), wanted, ks=[1, 2], limit=1)
    assert [(row["task"], row["k"], row["documents"]) for row in found["results"]] == [
        ("text", 1, 1), ("held_out", 1, 1), ("text", 2, 1), ("held_out", 2, 1),
    ]  # fmt: skip
    for row in found["results"]:
        assert float(row["metrics"]["bits_per_byte"]) == pytest.approx(8.0, abs=1e-9)
        assert float(row["metrics"]["byte_perplexity"]) == pytest.approx(256.0, rel=1e-9)
    names = [name for name, _ in harness.metrics(found)]
    assert names[:2] == ["eval/text/bits_per_byte/k=1", "eval/text/byte_perplexity/k=1"]
    trained = harness.evaluate(Transformer(CONFIG), Tokenizer(), wanted[:1], ks=[None, 1, 2])
    own, one, two = (row["metrics"]["bits_per_byte"] for row in trained["results"])
    assert own == two != one


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "gsm8k",
            [{"question": "x", "answer": "five"}],
            "row 1: expected an answer that ends in '#### NUMBER', found 'five'",
        ),
        ("gsm8k", [SUMS[0], {"question": "x"}], "line 2: expected a text under answer, found none"),
        ("gsm8k", [], "at least one row"),
        ("humaneval", [{**PROBLEMS[0], "test": " "}], "line 1: expected a text under test, found none"),
    ],
)
def test_a_task_file_with_something_missing(tmp_path: Path, name: str, rows, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        tasks.parse(f"{name}={lines(tmp_path / 'x.jsonl', rows)}", unsafe_code=False)


def test_a_truncated_file_and_words_that_are_no_tasks(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl.gz", PROBLEMS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MalformedError, match="expected a whole gzip file"):
        tasks.parse(f"humaneval={path}", unsafe_code=False)
    short = lines(tmp_path / "short.jsonl", SUMS[:2])
    with pytest.raises(MalformedError, match="at least 5 examples, found 2"):
        tasks.parse(f"gsm8k={short}+{short}", unsafe_code=False)
    for text, message in (
        ("gsm8k=/nonexistent", "cannot read /nonexistent"),
        ("text", "expected text=PATH"),
        ("humaneval", "expected humaneval=FILE"),
        ("arc_easy=x", "only gsm8k, humaneval, text, held_out take"),
        (" , ", "expected different tasks"),
        ("arc_easy,arc_easy", "expected different tasks"),
    ):
        with pytest.raises(UsageError, match=message):
            tasks.parse(text, unsafe_code=False)
