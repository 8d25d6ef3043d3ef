"""A reader of the LaTeX that we write, where no TeX is at hand: it takes that and nothing else."""

import re
from collections import Counter

COMMANDS = frozenset(
    """begin end centering caption label small toprule midrule bottomrule multicolumn linewidth emph texttt pithnumber
    providecommand ifdefined href else fi textbackslash textasciitilde textasciicircum textless textgreater textbar
    textquotedbl textquotedblleft textquotedblright textquoteleft textquoteright textendash textemdash textasciigrave
    ldots times cdot leq geq pm to sigma eta lambda alpha beta""".split()  # noqa: SIM905
)
_TOKEN = re.compile(r"\\([a-zA-Z]+|.)|([{}$&#^_~%])|([^\\{}$&#^_~%]+)", re.DOTALL)


def faults(text: str) -> list[str]:
    """What a TeX would stumble over: unknown commands, braces and environments that do not match, bare specials, ragged rows."""
    found: list[str] = []
    body = re.sub(r"^%.*\n", "", text, flags=re.MULTILINE)
    body = re.sub(r"^\\providecommand.*\n", "", body, flags=re.MULTILINE)
    depth, mathematics, environments = 0, False, Counter[str]()
    for match in _TOKEN.finditer(body):
        command, special, _ = match.groups()
        if command and command.isalpha() and command not in COMMANDS:
            found.append(f"the command \\{command}")
        elif command in ("begin", "end"):
            name = re.match(r"\{([a-z]+)\}", body[match.end() :])
            environments[name[1] if name else "?"] += 1 if command == "begin" else -1
        elif special == "{":
            depth += 1
        elif special == "}":
            depth -= 1
            if depth < 0:
                found.append("a closing brace too many")
        elif special == "$":
            mathematics = not mathematics
        elif (special and special in "#_~%") or (special == "^" and not mathematics):
            found.append(f"a bare {special}")
    if depth or mathematics or any(environments.values()):
        found.append(f"unbalanced: depth {depth}, mathematics {mathematics}, environments {dict(environments)}")
    rows = re.findall(r"(?<=\\midrule\n)(.*)(?=\n\\bottomrule)", body, re.DOTALL)
    for row in rows[0].split("\n") if rows and rows[0] else ():
        if len(re.findall(r"(?<!\\)&", row)) != 5 or not row.endswith(r" \\"):
            found.append(f"a row that is not of six cells: {row}")
    if not body.isprintable() and re.search(r"[^\x20-\x7e\n\u00c0-\u017f]", body):
        found.append("a character that pdfLaTeX does not know")
    return found
