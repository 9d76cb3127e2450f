"""Provenance: what run.json holds and what it never holds, and which code counts as an input."""

import ast
import json
import os
import subprocess
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from toy import run_file, write_notebook

from compdiff import paths, record, sources


# --- provenance -----------------------------------------------------------------------------------------------------
def test_run_json_tells_how_a_stage_was_made(finished):
    known = json.loads(run_file(finished, "02_hcn").read_text())
    assert known["seeds"] == [0] and known["parameters"]["methods"] == ["hcn"]
    assert known["inputs"]["setting steps"] == 6 and len(known["inputs"]["toy/hcn.py"]) == 64
    assert known["versions"]["papermill"] and known["machine"]["cores"] == os.cpu_count()
    assert 20 < known["peak_memory_mib"] < 4000 and known["minutes"] > 0
    output = finished.root / "runs/smoke/toy/seed0/hcn/out.txt"
    listed = known["outputs"]["seed0/hcn/out.txt"]["sha256"]
    assert listed == subprocess.run(["sha256sum", str(output)], capture_output=True, text=True).stdout.split()[0]


def test_run_json_holds_no_place_and_no_person(finished):
    text = run_file(finished, "02_hcn").read_text()
    for private in (str(finished.root), os.path.expanduser("~") + "/", os.uname().nodename):
        assert private not in text


def test_the_commit_says_whether_the_code_was_changed_and_passes_over_what_runs_write(tmp_path, monkeypatch):
    """Tables of the first dataset stand in figures/ before the second one's run is recorded."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert record.commit() == "unknown"
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)  # noqa: E731
    git("init", "-q")
    assert record.commit() == "unknown", "no commit yet"
    for name in ("code.py", "figures/table.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    head = record.commit()
    assert len(head) == 40
    (tmp_path / "figures/table.csv").write_text("2")
    (tmp_path / "figures/new.png").write_text("3")
    assert record.commit() == head
    (tmp_path / "code.py").write_text("2")
    assert record.commit() == head + "+changes"


def test_one_thread_at_a_time_parses_code(monkeypatch):
    """Python 3.11's parser fails now and then when two threads are in it; every hash of code comes from threads here."""
    inside, most, parse = [], [], ast.parse

    def slow(text):
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.01)  # here another thread would come in
        inside.remove(text)
        return parse(text)

    monkeypatch.setattr(ast, "parse", slow)
    notebook = paths.ROOT / "notebooks" / "01_data_prep.ipynb"
    sources._module.cache_clear()
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(sources.modules, notebook, paths.ROOT / "compdiff") for _ in range(2)]
        jobs.append(pool.submit(sources.code_sha256, notebook))
        assert len(jobs[0].result()) > 10 and jobs[0].result() == jobs[1].result() and jobs[2].result()
    assert set(most) == {1} and len(most) > 40


def test_a_failed_block_leaves_no_run_json(tmp_path):
    with record.run_json(tmp_path, {"a": 1}) as made:
        (tmp_path / "x.txt").write_text("x")
        made.outputs.append(tmp_path / "x.txt")
    assert record.is_current(tmp_path, {"a": 1}) and not record.is_current(tmp_path, {"a": 2})
    with pytest.raises(ZeroDivisionError), record.run_json(tmp_path, {"a": 1}):
        1 / 0
    assert not record.is_current(tmp_path, {"a": 1}) and not (tmp_path / "run.json").exists()


def test_an_output_is_compared_by_content_and_not_by_time(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("same")
    known = record.fingerprint(file)
    os.utime(file, ns=(1, 1))
    assert record.unchanged(file, known)
    file.write_text("else")
    assert not record.unchanged(file, known)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"123")
    known = record.fingerprint(tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"12")
    assert not record.unchanged(tmp_path / "images", known)


# --- imports ----------------------------------------------------------------------------------------------------------
def test_all_forms_of_import_are_found():
    code = textwrap.dedent("""
        import pkg.a, json
        from pkg import b as other
        from pkg.sub.c import thing
        from . import d
        from .e import x
        from ..f import y
        def later():
            import pkg.g
            from importlib import import_module
            import_module("pkg.h")
        from elsewhere import pkg
    """)
    found = sources.imported(ast.parse(code), "pkg", "pkg.sub")
    assert {"pkg.a", "pkg.b", "pkg.sub.c", "pkg.sub.d", "pkg.sub.e", "pkg.f", "pkg.g", "pkg.h"} <= found
    assert not any(name.startswith(("json", "elsewhere", "importlib")) for name in found)


def test_lines_of_ipython_do_not_hide_imports(tmp_path):
    write_notebook(
        tmp_path / "n.ipynb", ["x = 1", "%matplotlib inline\nif x:\n    !ls\nimport toy.ground", "%%bash\nls $HOME"]
    )
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "ground.py").write_text("A = 1")
    assert list(sources.modules(tmp_path / "n.ipynb", tmp_path / "toy")) == ["toy/ground.py"]


def test_docstrings_and_comments_do_not_change_a_hash(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text('"""One."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n')
    second.write_text('"""Two."""\n# more\ndef f(x):\n\n    return (x + 1)\n')
    assert record.source_sha256(first) == record.source_sha256(second)
    second.write_text("def f(x):\n    return x + 2\n")
    assert record.source_sha256(first) != record.source_sha256(second)
