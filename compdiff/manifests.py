"""Dataset manifests: `data_manifests/<name>.yaml` -> a validated, frozen `Manifest`.

The manifest is the one place that says where a dataset comes from, which columns hold which attribute, how prompts and
findings are worded, how patients are split, which cells are held out and (phantoms) the joint distribution. Adding a
dataset of a known layout means adding a file; every key is required and an unknown key is an error.
"""

from __future__ import annotations

import math
import string
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compdiff import columns, paths, record
from compdiff.attributes import FIELD_ATTRIBUTE, SCHEMAS, Schema
from compdiff.columns import Column
from compdiff.problems import ManifestError, Problems

COMMON_KEYS = (
    "title", "source", "licence", "access", "citation", "layout", "modality", "schema", "labels", "findings", "prompts",
    "split", "held_out", "checksum",
)  # fmt: skip
ERROR_KEYS = ("age_errors", "category_errors", "image_errors")
TREE_KEYS = ("files", "columns", "label_columns", "cost", *ERROR_KEYS)
LAYOUT_KEYS = {
    "phantom": ("joint",),
    "nih": ("files", "columns", "age_errors"),
    "mimic": TREE_KEYS,
    "fairgenmed": (*TREE_KEYS, "npz"),
    "chexpert": TREE_KEYS,
    "folder": TREE_KEYS,
}
ACCESS = ("generated", "open", "credentialed")
SPLIT_RULES = {  # layout -> its rules; a rule -> the shares of patients that it needs
    "phantom": ("generated",),
    "nih": ("official_lists",),
    "mimic": ("column",),
    "fairgenmed": ("column",),
    "chexpert": ("external",),  # everything is test
    "folder": ("column", "by_patient", "external"),
}
SHARES = {"official_lists": {"val_share"}, "by_patient": {"val_share", "test_share"}}


@dataclass(frozen=True)
class Manifest:
    """One dataset, as declared. Cells are tuples of category indices in schema order."""

    name: str
    title: str
    source: str
    licence: str
    access: str  # generated | open | credentialed
    citation: str
    layout: str  # phantom | nih | mimic | fairgenmed | chexpert | folder
    modality: str  # chest | fundus
    schema: Schema
    labels: Mapping[str, tuple[str, ...]]  # label -> phrase of each of its values
    findings: Mapping[str, str]  # none, join, end
    prompts: tuple[str, ...]
    split: Mapping[str, Any]
    held_out: tuple[tuple[int, ...], ...]
    joint: Mapping[tuple[int, ...], float]  # phantoms: cell -> share, sum 1
    files: Mapping[str, Any]  # real data: table, lists, image folders, relative to DATA_ROOT
    columns: Mapping[str, Column]  # real data
    label_columns: Mapping[str, Column | str]  # real data with a column per label: its texts, or the rule others_zero
    npz: Mapping[str, tuple[str, Mapping[int, str]]]  # FairGenMed: numbers in the NPZ, by name
    age_errors: str  # real data, an age outside 0-120: report | exclude
    category_errors: str  # a row without age or label, or in none of the categories: report | exclude
    image_errors: str  # a missing or unreadable image: report | exclude
    cost: str  # real data: hours and disk, in words
    checksum: str
    text: str  # the YAML itself
    sha256: str  # of its content; comments do not count

    def describe(self, values: Mapping[str, int]) -> str:
        """{label: index of its value} -> the findings as text, for prompts."""
        phrases = [self.labels[label][values[label]] for label in self.labels]
        text = self.findings["join"].join(p for p in phrases if p)
        return (text or self.findings["none"]) + self.findings["end"]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error instead of silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in seen:
            if seen.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice, line {node.start_mark.line + 1} ff.")
        return super().construct_mapping(node, deep)


def dataset_names() -> list[str]:
    """Names of the dataset manifests, sorted. The folder also holds weights.yaml, the list of judges."""
    return sorted(p.stem for p in paths.MANIFESTS.glob("*.yaml") if p.stem != "weights")


def load_manifest(name_or_path: str | Path) -> Manifest:
    """Read and validate `data_manifests/<name>.yaml`, or the file at a path that ends in .yaml; else ManifestError."""
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        path = paths.MANIFESTS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(dataset_names())
        raise ManifestError(
            f"dataset {str(name_or_path)!r}",
            [f"{path}: no such manifest -> use one of: {known}; or the path of a .yaml"],
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ManifestError(f"manifest {path}", [f"{path}: is not UTF-8 text -> save it as UTF-8"]) from None
    return parse_manifest(text, path.stem, str(path))


def parse_manifest(text: str, name: str, file: str) -> Manifest:
    """YAML text -> Manifest. `file` is named in errors."""
    problems = Problems(f"manifest {file}", ManifestError)
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ManifestError(problems.title, [f"{file}: not readable as YAML ({error}) -> correct that line"]) from None
    if not isinstance(raw, dict):
        raise ManifestError(problems.title, [f"{file}: holds no keys -> start from one of data_manifests/*.yaml"])
    _check_keys(raw, problems)
    problems.check()
    schema = SCHEMAS[raw["schema"]]
    parts = {
        "schema": schema,
        "labels": _labels(raw["labels"], problems),
        "findings": _texts(raw["findings"], ("none", "join", "end"), "findings", problems),
        "prompts": _prompts(raw["prompts"], schema, problems),
        "split": _split(raw["split"], raw["layout"], problems),
        "held_out": _held_out(raw["held_out"], schema, problems),
        "joint": _joint(raw["joint"], schema, problems) if "joint" in raw else {},
        "files": columns.parse_files(raw["files"], raw["layout"], problems) if "files" in raw else {},
        "columns": columns.parse_columns(raw["columns"], raw["layout"], schema, problems) if "columns" in raw else {},
        "npz": columns.parse_codes(raw["npz"], schema, problems) if "npz" in raw else {},
    }
    found = columns.parse_labels(raw["label_columns"], parts["labels"], problems) if "label_columns" in raw else {}
    if parts["split"].get("rule") == "column" and "split" not in parts["columns"]:
        problems.add("key columns", "has no split, which the rule `column` reads", "add it, or use another rule")
    problems.check()
    texts = {
        k: str(raw[k]) for k in ("title", "source", "licence", "access", "citation", "layout", "modality", "checksum")
    }
    return Manifest(
        name=name,
        **texts,
        **parts,
        label_columns=found,
        **{key: raw.get(key, "report") for key in ERROR_KEYS},
        cost=str(raw.get("cost", "")),
        text=text,
        sha256=record.sha256_json(raw),
    )


def _check_keys(raw: dict, problems: Problems) -> None:
    """All keys there, none unknown, and the keys with a fixed set of values hold one of them."""
    wanted = {*COMMON_KEYS, *LAYOUT_KEYS.get(str(raw.get("layout")), ())}
    for key in sorted(map(str, set(raw) - wanted)):
        problems.add(f"key {key}", "unknown", f"remove it; known keys: {', '.join(sorted(wanted))}")
    for key in sorted(wanted - set(raw)):
        problems.add(f"key {key}", "missing", "add it; data_manifests/chest.yaml and nih.yaml are examples")
    choices = {
        "layout": LAYOUT_KEYS,
        "schema": SCHEMAS,
        "modality": ("chest", "fundus"),
        "checksum": ("sha256",),
        "access": ACCESS,
        **dict.fromkeys(ERROR_KEYS, ("report", "exclude")),
    }
    for key, allowed in choices.items():
        if key in raw and raw[key] not in tuple(allowed):
            problems.add(f"key {key}", f"{raw[key]!r} is not known", f"use one of: {', '.join(allowed)}")
    for key in ("title", "source", "licence", "citation"):
        if key in raw and not (isinstance(raw[key], str) and raw[key].strip()):
            problems.add(f"key {key}", "empty or not a text", "say it in words")


def _texts(raw: object, keys: tuple[str, ...], where: str, problems: Problems) -> dict[str, str]:
    if not isinstance(raw, dict) or set(raw) != set(keys) or not all(isinstance(v, str) for v in raw.values()):
        problems.add(f"key {where}", "is not a mapping of texts", f"give exactly: {', '.join(keys)}")
        return {}
    return dict(raw)


def _labels(raw: object, problems: Problems) -> dict[str, tuple[str, ...]]:
    if not isinstance(raw, dict) or not raw:
        problems.add("key labels", "is not a mapping", "give each label the list of its values' phrases")
        return {}
    for label, phrases in raw.items():
        good = isinstance(phrases, list) and len(phrases) >= 2 and all(isinstance(p, str) for p in phrases)
        if not (good and isinstance(label, str)):
            problems.add(
                f"key labels: {label}",
                "is not a list of two or more phrases",
                'write ["", phrase], quoted where YAML needs it',
            )
    return {str(k): tuple(v) if isinstance(v, list) else () for k, v in raw.items()}


def _prompts(raw: object, schema: Schema, problems: Problems) -> tuple[str, ...]:
    """Templates: known fields, {findings} in each, one per set of attributes, all attributes and none among them."""
    if not isinstance(raw, list) or not all(isinstance(t, str) for t in raw):
        problems.add("key prompts", "is not a list of texts", "write one quoted template per line")
        return ()
    fields = {*schema.names, *FIELD_ATTRIBUTE, "findings"} - {"age"}  # a prompt says years, not the bin
    named: list[frozenset[str]] = []
    for n, template in enumerate(raw, 1):
        try:
            used = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        except ValueError as error:
            problems.add(f"key prompts, template {n}", str(error), "balance the braces")
            continue
        if unknown := used - fields:
            problems.add(
                f"key prompts, template {n}",
                f"unknown fields {sorted(unknown)}",
                f"use only: {', '.join(sorted(fields))}",
            )
        if "findings" not in used:
            problems.add(f"key prompts, template {n}", "says no findings", "add {findings}")
        named.append(frozenset(FIELD_ATTRIBUTE.get(f, f) for f in used - {"findings"}))
    for names in {n for n in named if named.count(n) > 1}:
        problems.add("key prompts", f"several templates name {sorted(names)}", "keep one of them")
    for names in (frozenset(schema.names), frozenset()):
        if names not in named:
            problems.add("key prompts", f"no template names exactly {sorted(names)}", "add one")
    return tuple(raw)


def _split(raw: object, layout: str, problems: Problems) -> dict[str, Any]:
    rules = SPLIT_RULES[layout]
    rule = raw.get("rule") if isinstance(raw, dict) else None
    wanted = {"rule", *SHARES.get(rule, ())} if isinstance(rule, str) else set()
    if rule not in rules or set(raw) != wanted:
        each = " or ".join(", ".join([f"rule: {name}", *sorted(SHARES.get(name, ()))]) for name in rules)
        problems.add("key split", "does not fit the layout", f"give exactly {each}")
        return {}
    for name in wanted - {"rule"}:
        if not (isinstance(raw[name], float) and 0 < raw[name] < 1):
            problems.add(f"key split: {name}", f"{raw[name]!r} is not between 0 and 1", "0.12 is usual")
    return raw


def _held_out(raw: object, schema: Schema, problems: Problems) -> tuple[tuple[int, ...], ...]:
    cells = []
    for n, names in enumerate(raw if isinstance(raw, list) else [raw], 1):
        if not isinstance(names, list) or len(names) != len(schema):
            problems.add(
                f"key held_out, cell {n}",
                "is not a list of one category per attribute",
                f"write [{', '.join(schema.names)}]",
            )
            continue
        try:
            cells.append(schema.encode(dict(zip(schema.names, map(str, names), strict=True))))
        except ValueError as error:
            problems.add(f"key held_out, cell {n}", str(error), "use the category's exact name")
    return tuple(cells)


def _joint(raw: object, schema: Schema, problems: Problems) -> dict[tuple[int, ...], float]:
    """Nested mapping in schema order -> {cell: share}; every cell must be declared, the shares must sum to 1."""
    shares: dict[tuple[int, ...], float] = {}
    _walk(raw, schema, (), shares, problems)
    for cell in schema.cells():
        if cell not in shares:
            problems.add(
                f"key joint: {schema.cell_name(cell)}", "missing", "declare the share of every cell, 0 included"
            )
    if not math.isclose(total := sum(shares.values()), 1, abs_tol=1e-6):
        problems.add("key joint", f"the shares sum to {total:.6g}", "make them sum to 1")
    return shares


def _walk(node: object, schema: Schema, cell: tuple[int, ...], shares: dict, problems: Problems) -> None:
    where = " ".join(["key joint:", *(a.categories[i] for a, i in zip(schema.attributes, cell, strict=False))])
    if len(cell) == len(schema):
        if isinstance(node, int | float) and 0 <= node <= 1:
            shares[cell] = float(node)
        else:
            problems.add(where, f"{node!r} is not a share", "give a number from 0 to 1")
    elif not isinstance(node, dict):
        problems.add(where, "is not a mapping", f"one entry per {schema.names[len(cell)]}")
    else:
        attribute = schema.attributes[len(cell)]
        for name, child in node.items():
            if name in attribute.categories:
                _walk(child, schema, (*cell, attribute.index(name)), shares, problems)
            else:
                problems.add(where, f"unknown {attribute.name} {name!r}", f"use: {', '.join(attribute.categories)}")
