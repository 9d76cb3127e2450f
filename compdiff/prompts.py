"""05. A file of one's own prompts: who is asked for, in which words, how often."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from compdiff.attributes import Schema


def read_prompts(file: Path, schema: Schema) -> tuple[pd.DataFrame, list[str]]:
    """A CSV (prompt, one column per attribute, repeats) -> rows with id and attributes, and their prompts.

    Line i repeated r times gives the ids prompt<i>-0 ... prompt<i>-(r-1). The prompt is used as written. ValueError
    names the line and column of what is missing, unknown or not a number of at least 1.
    """
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    if missing := [c for c in ("prompt", *schema.names, "repeats") if c not in table.columns]:
        raise ValueError(f"{Path(file).name} lacks the columns {', '.join(missing)}")
    if not len(table):
        raise ValueError(f"{Path(file).name} holds no line below its header")
    rows, prompts = [], []
    for line, entry in enumerate(table.to_dict("records"), start=2):
        try:
            cell = schema.encode(entry)
        except ValueError as error:
            raise ValueError(f"{Path(file).name}, line {line}: {error}") from None
        if not entry["repeats"].isdecimal() or int(entry["repeats"]) < 1:
            problem = f"repeats {entry['repeats']!r} is not a number of at least 1"
            raise ValueError(f"{Path(file).name}, line {line}: {problem}")
        for n in range(int(entry["repeats"])):
            who = {"cell": schema.cells().index(cell), **schema.decode(cell)}
            rows.append({"id": f"prompt{line - 1}-{n}", **who})
            prompts.append(entry["prompt"])
    return pd.DataFrame(rows), prompts
