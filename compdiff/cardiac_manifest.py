"""Manifests of cardiac sources: `data_manifests/cardiac/<name>.yaml` -> a validated, frozen `CardiacManifest`.

A source is one table of patients, one table of pictures (may be the same file) and PNG files below one root. The
manifest
says which columns hold what; a new source of that kind is a new file. Every key is required, an unknown one is an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from compdiff import paths
from compdiff.attributes import AGE, SEX, Attribute, Schema
from compdiff.cardiac import BMI, UNKNOWN
from compdiff.manifests import ACCESS, _Loader
from compdiff.problems import ManifestError, Problems

FOLDER = paths.MANIFESTS / "cardiac"
TEXTS = ("title", "source", "licence", "access", "citation", "masks")
KEYS = {*TEXTS, "tables", "columns", "attributes", "labels", "window", "crop"}
COLUMNS = {"patient", "image", "mask", "phase", "view", "slice", "frame", "mid"}
NEEDED = {"patient", "image", "mask", "phase", "slice"}
TOWNSEND = Attribute("townsend", ("low", "middle", "high"))  # tertiles of the source's own patients; high = deprived
NUMBERS = {
    "age": AGE,
    "bmi": BMI,
    "townsend": TOWNSEND,
}  # read as numbers and binned; the others are texts with `values`


@dataclass(frozen=True)
class AttributeColumn:
    """Where an attribute stands in the patients' table."""

    attribute: Attribute
    header: str
    values: Mapping[str, str]  # text -> category; empty for numbers
    missing: str  # reject, or unknown = a group of its own


@dataclass(frozen=True)
class LabelColumns:
    """Which texts of which columns mean that a disease is present."""

    headers: tuple[str, ...]  # fnmatch patterns
    positive: tuple[str, ...]
    negative: tuple[str, ...]  # every other text is an error; empty together with `codes`
    codes: tuple[str, ...]  # beginnings of ICD-10 codes without dots; any other code counts as absent


@dataclass(frozen=True)
class CardiacManifest:
    """One source, as declared."""

    title: str
    source: str
    licence: str
    access: str  # open | credentialed
    citation: str
    masks: str  # required | optional
    patients: str  # table, relative to the root
    images: str
    columns: Mapping[str, str]  # of the pictures' table
    attributes: Mapping[str, AttributeColumn]
    labels: Mapping[str, LabelColumns]
    window: float  # percentile of a patient's ED and ES mid slices that becomes white
    crop: float  # side of the square around the heart, as a share of the picture's shorter side

    @property
    def schema(self) -> Schema:
        return Schema(tuple(a.attribute for a in self.attributes.values()))


def load(name_or_path: str | Path) -> CardiacManifest:
    """Read and validate `data_manifests/cardiac/<name>.yaml`, or the file at a path that ends in .yaml; else
    ManifestError."""
    path = Path(name_or_path)
    path = path if path.suffix == ".yaml" else FOLDER / f"{name_or_path}.yaml"
    problems = Problems(f"manifest {path}", ManifestError)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        problems.add(str(path), "no such manifest", f"use one of: {known}; or the path of a .yaml")
        problems.check()
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(problems.title, [f"{path}: not readable as YAML ({error}) -> correct that line"]) from None
    if not isinstance(raw, dict) or set(raw) != KEYS:
        odd = sorted(map(str, KEYS ^ set(raw if isinstance(raw, dict) else ())))
        raise ManifestError(
            problems.title, [f"keys: missing or unknown: {', '.join(odd)} -> give exactly {', '.join(sorted(KEYS))}"]
        )
    _check_values(raw, problems)
    tables, columns = _texts(raw, "tables", {"patients", "images"}, {"patients", "images"}, problems), _texts(
        raw, "columns", COLUMNS, NEEDED, problems)  # fmt: skip
    attributes, labels = _attributes(raw["attributes"], problems), _labels(raw["labels"], problems)
    problems.check()
    texts = {k: str(raw[k]).strip() for k in TEXTS}
    return CardiacManifest(**texts, **tables, columns=columns, attributes=attributes, labels=labels,
                           window=float(raw["window"]), crop=float(raw["crop"]))  # fmt: skip


def _check_values(raw: dict, problems: Problems) -> None:
    for key in TEXTS:
        if not isinstance(raw[key], str) or not raw[key].strip():
            problems.add(f"key {key}", "empty or not a text", "say it in words")
    for key, allowed in (("access", ACCESS), ("masks", ("required", "optional"))):
        if raw[key] not in allowed:
            problems.add(f"key {key}", f"{raw[key]!r} is not known", f"use one of: {', '.join(allowed)}")
    for key, low, high in (("window", 50, 100), ("crop", 0.1, 1)):
        if not (isinstance(raw[key], int | float) and low < raw[key] <= high):
            problems.add(
                f"key {key}", f"{raw[key]!r} is not a number above {low}, up to {high}", "99 and 0.5 are usual"
            )


def _texts(raw: dict, key: str, known: set[str], needed: set[str], problems: Problems) -> dict[str, str]:
    given = raw[key]
    good = (
        isinstance(given, dict)
        and needed <= set(given) <= known
        and all(isinstance(v, str) and v for v in given.values())
    )
    if not good:
        problems.add(
            f"key {key}",
            "does not fit",
            f"give texts for: {', '.join(sorted(needed))}; possible: {', '.join(sorted(known))}",
        )
    return dict(given) if good else {}


def _attributes(raw: object, problems: Problems) -> dict[str, AttributeColumn]:
    """Two attributes at least, age among them; a category `unknown` is added where missing values form a group."""
    out = {}
    if not isinstance(raw, dict) or len(raw) < 2 or "age" not in raw:
        problems.add(
            "key attributes",
            "is not a mapping of age and at least one more",
            "see data_manifests/cardiac/heart_folder.yaml",
        )
        return {}
    for name, entry in raw.items():
        where = f"key attributes: {name}"
        if (
            not isinstance(entry, dict)
            or set(entry) - {"values", "missing"} != {"header"}
            or not isinstance(entry["header"], str)
        ):
            problems.add(where, "is not a mapping with a header", "keys: header, values, missing")
            continue
        values, missing = entry.get("values", {}), entry.get("missing", "reject")
        numeric = name in NUMBERS
        texts = isinstance(values, dict) and all(isinstance(t, str) for pair in values.items() for t in pair)
        if (
            not texts
            or numeric == bool(values)
            or missing not in ("reject", UNKNOWN)
            or (name == "age" and missing != "reject")
        ):
            remedy = f"numbers ({', '.join(NUMBERS)}) take no values, texts need quoted ones; "
            remedy += "missing: reject or unknown, for age only reject"
            problems.add(where, "values or missing do not fit", remedy)
            continue
        attribute = {"sex": SEX, **NUMBERS}.get(name) or Attribute(name, tuple(dict.fromkeys(values.values())))
        if odd := set(values.values()) - set(attribute.categories):
            problems.add(where, f"{sorted(odd)} are not categories", f"use: {', '.join(attribute.categories)}")
        if missing == UNKNOWN:
            attribute = Attribute(name, (*attribute.categories, UNKNOWN))
        out[name] = AttributeColumn(attribute, entry["header"], dict(values), missing)
    return out


def _labels(raw: object, problems: Problems) -> dict[str, LabelColumns]:
    out, kinds = {}, ({"headers", "positive", "negative"}, {"headers", "codes"})
    for name, entry in raw.items() if isinstance(raw, dict) else ():
        lists = isinstance(entry, dict) and set(entry) in kinds and all(
            isinstance(v, list) and v and all(isinstance(t, str) for t in v) for v in entry.values()
        )  # fmt: skip
        if not lists:
            problems.add(
                f"key labels: {name}",
                "does not fit",
                "give lists: headers with positive and negative, or headers with codes",
            )
            continue
        out[name] = LabelColumns(**{k: tuple(entry.get(k, ())) for k in ("headers", "positive", "negative", "codes")})
    if not out:
        problems.add("key labels", "names no disease", "see data_manifests/cardiac/heart_folder.yaml")
    return out
