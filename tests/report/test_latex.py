"""The LaTeX table: what it says, that no text of a plan is a command in it, and that a TeX sets it, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_page import HOSTILE, poisoned
from tex_reader import faults

from records import canonical
from records.package import read_bundle
from repro.report.latex import _value, escape, table

BUNDLE = ROOT / "tests/fixtures/formats/v1/emo-smoke.repro.zip"
DIGESTS = {"plan_sha256": "1" * 64, "manifest_sha256": "2" * 64}
ALL = "".join(map(chr, range(32, 127))) + "“”‘’–—…−×≤≥±→σηλ éŁ ß 漢 \u202e -- --- '' ,, `` << ?` \\input{x} \\\\ %%"


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    files = read_bundle(BUNDLE)
    return {name: canonical.loads(files[f"{name}.json"]) for name in ("plan", "outcome", "run")} | {"evidence": {}}


def test_the_table_says_what_the_outcome_does(run: dict[str, Any]) -> None:
    text = table(run["plan"], run["outcome"], **DIGESTS)
    assert faults(text) == []
    assert r"\pithnumber{2026}{IV7VH3NCTL2M6JAD44FIMISHCY}, arXiv:2605.13247v2" in text
    assert r"E2 & It saves wall-clock time & inconclusive & $-0.601$ & $-8.79$ to $7.59$ &" in text
    rows = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0].splitlines()
    assert [row.split(" & ")[0] for row in rows] == [item["claim"] for item in run["outcome"]["verdicts"]]
    unnumbered = run["plan"] | {"paper": run["plan"]["paper"] | {"pith_number": None}}
    assert "pithnumber{2" not in table(unnumbered, run["outcome"], **DIGESTS)


@pytest.mark.parametrize("text", [HOSTILE, ALL, r"\input{/etc/passwd} \write18{x} $\undefined$ # & ^^5c"])
def test_no_text_is_a_command(run: dict[str, Any], text: str) -> None:
    bad = poisoned(run, text)
    assert faults(table(bad["plan"], bad["outcome"], **DIGESTS)) == []


@settings(max_examples=200)
@given(st.text())
def test_any_text_is_only_text(text: str) -> None:
    safe = escape(text)
    assert faults(safe) == []
    assert not re.search(r"--|''|,,|<<|>>|``", safe)


def test_numbers() -> None:
    assert [_value(x) for x in ("0.0253377", "-147.482", "0.00000123", None, "infinite")] == [
        "$0.0253$", "$-147$", r"$1.23\cdot10^{-6}$", "", "infinite",
    ]  # fmt: skip


def test_the_reader_of_these_tests_finds_faults() -> None:
    good = table_of("a & b & c & d & e & f \\\\")
    assert faults(good) == []
    for bad in (
        "a & b \\\\",
        "a & b & c & d & e & f_g \\\\",
        "\\input & b & c & d & e & f \\\\",
        "{ & b & c & d & e & f \\\\",
    ):
        assert faults(table_of(bad)) != []


def table_of(row: str) -> str:
    return f"\\begin{{tabular}}\n\\midrule\n{row}\n\\bottomrule\n\\end{{tabular}}"


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="no pdflatex here: apt-get install texlive-latex-recommended"
)
def test_a_tex_sets_it(run: dict[str, Any], tmp_path: Path) -> None:
    bad = poisoned(run, ALL)
    tables = [table(run["plan"], run["outcome"], **DIGESTS), table(bad["plan"], bad["outcome"], **DIGESTS)]
    head = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\\usepackage{hyperref}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(head + "\n\\clearpage\n".join(tables) + "\\end{document}\n", encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "t.tex"],
        cwd=tmp_path, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")
