"""The HTML report of a run: one file, no external resource, the same bytes for the same input.

- `page.py`: plan, outcome and evidence to HTML; `page.html` and `base.html` are its templates
- `claims.py`: what the page shows of one claim
- `figures.py`: the plan's figures as SVG; `svg.py` makes one fit for a page
- `index.py`: several replications to one page
- `latex.py`: one replication to a LaTeX table
- `table.py`: published outcomes to the README's table
"""

from records.errors import UsageError


def require_report() -> None:
    """Raises UsageError, naming the extra that mends it, where a report cannot be made."""
    try:
        import jinja2
        import matplotlib

        del jinja2, matplotlib
    except ImportError as error:
        raise UsageError(f"the report needs the package {error.name!r}: pip install 'pith-repro[report]'") from error
