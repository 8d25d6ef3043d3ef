"""A replication's verdicts as a LaTeX table in the manner of booktabs, with a macro for Pith numbers.

Every text of the plan is escaped: nothing in it can be a command.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from repro.report.table import deciding

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "“": r"\textquotedblleft{}", "”": r"\textquotedblright{}", "‘": r"\textquoteleft{}",
    "’": r"\textquoteright{}", "–": r"\textendash{}", "—": r"\textemdash{}", "…": r"\ldots{}",
    "−": r"$-$", "×": r"$\times$", "·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$", "±": r"$\pm$", "→": r"$\to$",
    "σ": r"$\sigma$", "η": r"$\eta$", "λ": r"$\lambda$", "α": r"$\alpha$", "β": r"$\beta$",
    "`": r"\textasciigrave{}",
}  # fmt: skip

_HEAD = r"""% Needs \usepackage[T1]{fontenc} and \usepackage{booktabs}; with hyperref, Pith numbers are links.
\providecommand{\pithnumber}[2]{\ifdefined\href\href{https://pith.science/pith/#2}{\texttt{pith:#1:#2}}\else\texttt{pith:#1:#2}\fi}
"""


def table(plan: Mapping[str, Any], outcome: Mapping[str, Any], *, plan_sha256: str, manifest_sha256: str) -> str:
    r"""A `table` environment, after the definition of `\pithnumber`; the same text for the same arguments.

    Args:
        plan, outcome: the contents of plan.json and outcome.json.
        plan_sha256, manifest_sha256: hexadecimal digests, named in comments.
    """
    paper, seeds = plan["paper"], len(plan["seeds"])
    titles = {claim["id"]: claim["title"] for claim in plan["claims"]}
    slug = "".join(c for c in paper["slug"] if c.isascii() and c.isalnum())
    number = rf"{_number(paper['pith_number'])}, " if paper["pith_number"] else ""
    caption = (
        rf"Replication of \emph{{{escape(paper['title'])}}} ({number}arXiv:{escape(paper['arxiv'])}) at the scale "
        rf"{escape(plan['scale'])}, {seeds} seeds, criteria fixed before the run in the plan \texttt{{{plan_sha256[:16]}}}. "
        r"Effects are paired differences of the test that decided, in the claim's own metric, with 95\% intervals."
    )
    rows = [_row(verdict, titles[verdict["claim"]]) for verdict in outcome["verdicts"] if verdict["claim"] in titles]
    return (
        f"% Made by `repro export latex` from the plan {plan_sha256}\n% and the bundle with the manifest {manifest_sha256}.\n"
        + _HEAD
        + "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption}}}",
                rf"\label{{tab:repro-{slug}-{''.join(c for c in plan['scale'] if c.isascii() and c.isalnum())}}}",
                r"\small",
                r"\begin{tabular}{lp{0.36\linewidth}lrlr}",
                r"\toprule",
                r"\multicolumn{2}{l}{Claim} & Verdict & Effect & 95\% interval & $p$ \\",
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )
        + "\n"
    )


def _row(verdict: Mapping[str, Any], title: str) -> str:
    test = deciding(verdict) or {}
    low, high = test.get("interval", (None, None))
    cells = [
        escape(verdict["claim"]),
        escape(title),
        escape(verdict["verdict"].replace("_", " ")),
        _value(test.get("effect")),
        f"{_value(low)} to {_value(high)}" if low is not None else "",
        _value(test.get("p"), digits=2),
    ]
    return " & ".join(cells) + r" \\"


def _value(text: object, *, digits: int = 3) -> str:
    """A number of the outcome as mathematics, with a power of ten where it is far from 1; nothing for none."""
    if text is None:
        return ""
    try:
        mantissa, _, exponent = f"{float(str(text)):.{digits}g}".partition("e")
    except ValueError:
        return escape(str(text))
    return rf"${mantissa}\cdot10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"


def _number(pith_number: str) -> str:
    """The macro for a full Pith number; anything else as it stands."""
    parts = pith_number.split(":")
    if len(parts) == 3 and parts[0] == "pith" and all(part.isascii() and part.isalnum() for part in parts[1:]):
        return rf"\pithnumber{{{parts[1]}}}{{{parts[2]}}}"
    return escape(pith_number)


def escape(text: str) -> str:
    """`text` so that LaTeX typesets it as it stands; a character that pdfLaTeX has no letter for, by its code point."""
    safe = "".join(_SPECIAL.get(c) or (c if _is_letter(c) else _code_point(c)) for c in " ".join(text.split()))
    return re.sub(r"([-',])(?=\1)", r"\1{}", safe)  # two of these are one sign to TeX


def _is_letter(c: str) -> bool:
    # Latin-1 and Latin Extended-A are what T1 and UTF-8 input give without further packages
    return c.isprintable() and (c.isascii() or (0xC0 <= ord(c) < 0x180 and unicodedata.category(c) in ("Lu", "Ll")))


def _code_point(c: str) -> str:
    return rf"\texttt{{U+{ord(c):04X}}}"
