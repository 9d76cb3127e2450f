"""One report for everything that is wrong with a source: collect first, raise once.

A report says where (file, row, column), what, and the remedy. It never holds a patient's id or an image's name.
"""

from __future__ import annotations

MAX_LINES = 50  # of one report


class DataError(ValueError):
    """Everything that is wrong with a source, in one report; `.problems` holds all its lines."""

    def __init__(self, title: str, problems: list[str]):
        shown = problems[:MAX_LINES]
        rest = [f"... and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}; nothing was written"
        super().__init__("\n  ".join([f"{title}: {count}", *shown, *rest]))
        self.problems = problems


class ManifestError(DataError):
    """A manifest that cannot be used."""


class Problems:
    """Collects problems, so that one report names them all. `where` never holds a patient's id or an image's name."""

    def __init__(self, title: str, error: type[DataError] = DataError):
        self.title, self.error, self.lines = title, error, []

    def add(self, where: str, problem: str, remedy: str) -> None:
        self.lines.append(f"{where}: {problem} -> {remedy}")

    def check(self) -> None:
        """Raise one error with all problems so far, if there are any."""
        if self.lines:
            raise self.error(self.title, self.lines)
