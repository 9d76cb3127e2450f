"""Which code a notebook runs: its own cells and the package's modules that they import, as hashes blind to comments."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from compdiff import record

# These decide what runs, not what comes out of it: no notebook's inputs.
DOOR = ("run", "execute", "stages", "request", "sources")


def code_cells(notebook: Path) -> list[str]:
    """Sources of a notebook's code cells, but not the one that papermill injects. ValueError if it is no notebook."""
    try:
        cells = json.loads(Path(notebook).read_text())["cells"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{notebook} is not a notebook: {error}") from None
    code = [c for c in cells if c["cell_type"] == "code" and "injected-parameters" not in c["metadata"].get("tags", [])]
    return ["".join(c["source"]) for c in code]


def without_magics(cell: str) -> str:
    """A cell as Python: lines of IPython (`%matplotlib inline`, `!ls`) become `pass`, a `%%bash` cell becomes empty."""
    if cell.lstrip().startswith("%%"):
        return ""
    lines = [(line, line.lstrip()) for line in cell.splitlines()]
    return "\n".join(line[: -len(text)] + "pass" if text.startswith(("%", "!")) else line for line, text in lines)


def plain_cell(cell: str) -> str:
    """The cell without comments; one with IPython's own syntax stays as it is."""
    try:
        return record.plain_source(cell)
    except SyntaxError:
        return cell


def code_sha256(notebook: Path) -> str:
    return record.sha256_json([plain_cell(c) for c in code_cells(notebook)])


def imported(tree: ast.AST, package: str, inside: str = "") -> set[str]:
    """Dotted names below `package` that the code may import, also within functions.

    `inside`: the package that holds the code, for relative imports. `import_module` counts with a literal name only;
    modules that are chosen at run time stand in the stage table (Stage.loads).
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return {n for n in names if n == package or n.startswith(f"{package}.")}


def files_of(name: str, package: Path) -> Iterator[Path]:
    """The files that importing a dotted name runs: every package's `__init__.py` on the way and the module itself."""
    folder, parts = package.parent, name.split(".")
    for part in parts:
        if (folder / part).is_dir():
            folder = folder / part
            yield from [f for f in (folder / "__init__.py",) if f.is_file()]
        else:  # a module; whatever follows is an attribute
            yield from [f for f in (folder / f"{part}.py",) if f.is_file()]
            return


@cache
def _module(path: Path, package: Path, modified: int) -> tuple[str, frozenset[str]]:
    """(hash, dotted names imported) of one module's file as it was at time `modified`."""
    inside = ".".join(path.parent.relative_to(package.parent).parts)
    tree = record.parsed(path.read_text())
    return record.source_sha256(path), frozenset(imported(tree, package.name, inside))


def modules(notebook: Path, package: Path, also: Iterable[str] = ()) -> dict[str, str]:
    """{"pkg/module.py": hash} of every module of `package` (a folder) that a notebook imports, directly or not."""
    waiting = {f"{package.name}.{name}" for name in also}
    for number, cell in enumerate(code_cells(notebook), 1):
        try:
            waiting |= imported(record.parsed(without_magics(cell)), package.name)
        except SyntaxError as error:
            raise ValueError(f"{notebook}: code cell {number} is not Python: {error}") from None
    return closure(waiting, package)


def closure(names: Iterable[str], package: Path) -> dict[str, str]:
    """{"pkg/module.py": hash} of the modules with these dotted names and of all that they import from `package`."""
    skip = {package / f"{name}.py" for name in DOOR}
    waiting, found = set(names), {}
    while waiting:
        for path in files_of(waiting.pop(), package):
            if path not in found and path not in skip:
                found[path], more = _module(path, package, path.stat().st_mtime_ns)
                waiting |= more
    return {path.relative_to(package.parent).as_posix(): found[path] for path in sorted(found)}
