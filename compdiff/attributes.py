"""The one vocabulary of demographic attributes: names, category order, age bins, cells and prompts.

A `Schema` is an ordered tuple of K >= 2 `Attribute`s. An image's attributes are a row of K category
indices (`[B, K]` long tensors elsewhere), always in schema order. Unknown or missing values raise: they
never become class 0.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

AGE_THRESHOLDS = (18, 40, 60, 80)  # years; bins [0,18) [18,40) [40,60) [60,80) [80,inf)
AGE_BINS = ("0-18", "18-40", "40-60", "60-80", "80+")
MAX_AGE = 120  # years; larger values are data errors


@dataclass(frozen=True)
class Attribute:
    """One attribute: its name and its categories, whose order is the index order everywhere."""

    name: str
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.categories)

    def index(self, category: str) -> int:
        """Index of `category`; ValueError for anything that is not exactly one of the categories."""
        if category not in self.categories:
            raise ValueError(f"{self.name}: unknown category {category!r}; expected one of {list(self.categories)}")
        return self.categories.index(category)


AGE = Attribute("age", AGE_BINS)
SEX = Attribute("sex", ("Male", "Female"))
RACE = Attribute("race", ("White", "Black", "Asian", "Hispanic"))
RACE_FUNDUS = Attribute("race", ("White", "Black", "Asian"))  # FairGenMed: ethnicity is a separate column
ETHNICITY = Attribute("ethnicity", ("Non-Hispanic", "Hispanic"))  # FairGenMed
VIEW = Attribute("view", ("PA", "AP"))


def age_bin(years: float) -> str:
    """Age in years -> name of its bin. ValueError when missing, not a number, negative or above MAX_AGE."""
    if years is None or isinstance(years, str) or math.isnan(years):
        raise ValueError(f"age {years!r} is not a number of years")
    if not 0 <= years <= MAX_AGE:
        raise ValueError(f"age {years:g} years is outside 0-{MAX_AGE}")
    return AGE_BINS[sum(years >= t for t in AGE_THRESHOLDS)]


@dataclass(frozen=True)
class Schema:
    """K >= 2 attributes in a fixed order."""

    attributes: tuple[Attribute, ...]

    def __post_init__(self) -> None:
        if len(self.attributes) < 2:
            raise ValueError("a schema needs at least two attributes")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"attribute names repeat: {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.attributes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(a) for a in self.attributes)

    def __len__(self) -> int:
        return len(self.attributes)

    def __getitem__(self, name: str) -> Attribute:
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        raise ValueError(f"no attribute {name!r}; this schema has {list(self.names)}")

    def encode(self, row: Mapping[str, str]) -> tuple[int, ...]:
        """{"age": "40-60", "sex": "Male", ...} -> category indices in schema order."""
        return tuple(a.index(row[a.name]) for a in self.attributes)

    def decode(self, indices: Sequence[int]) -> dict[str, str]:
        """Category indices -> {"age": "40-60", ...}; ValueError for an index that is none (-1 too)."""
        for a, i in zip(self.attributes, indices, strict=True):
            if not 0 <= int(i) < len(a):
                raise ValueError(f"{a.name}: index {int(i)} is outside 0-{len(a) - 1}")
        return {a.name: a.categories[int(i)] for a, i in zip(self.attributes, indices, strict=True)}

    def cells(self) -> list[tuple[int, ...]]:
        """All combinations of category indices, the last attribute running fastest."""
        return list(itertools.product(*(range(n) for n in self.sizes)))

    def cell_name(self, indices: Sequence[int]) -> str:
        """(2, 1, 0) -> "40-60 Female White"."""
        return " ".join(self.decode(indices).values())

    def subset(self, names: Iterable[str]) -> Schema:
        """The schema of only these attributes, in this schema's order."""
        wanted = set(names)
        for name in wanted:
            self[name]
        return Schema(tuple(a for a in self.attributes if a.name in wanted))


SCHEMAS = {
    "chest": Schema((AGE, SEX, RACE)),
    "fundus": Schema((AGE, SEX, RACE_FUNDUS)),
    "fundus_ethnicity": Schema((AGE, SEX, RACE_FUNDUS, ETHNICITY)),
    "nih": Schema((AGE, SEX, VIEW)),
}

# Which attribute a field of a prompt template reveals; other fields ({findings}) reveal none.
FIELD_ATTRIBUTE = {"age_years": "age", "sex_lower": "sex"}


def _named(template: str, names: Iterable[str]) -> frozenset[str]:
    fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
    return frozenset({FIELD_ATTRIBUTE.get(f, f) for f in fields} & set(names))


def prompt(templates: Sequence[str], row: Mapping[str, object], named: Iterable[str], schema: Schema) -> str:
    """Fill the template that names the most of the attributes in `named`, and no other attribute.

    `row` holds category names, `age_years` and `findings`. ValueError when no template fits, so that an
    attribute that must stay out of the text can never slip in; KeyError when `row` lacks what the template names.
    """
    allowed = set(named)
    fitting = [t for t in templates if _named(t, schema.names) <= allowed]
    if not fitting:
        raise ValueError(f"no prompt template names only {sorted(allowed)}")
    best = max(fitting, key=lambda t: len(_named(t, schema.names)))
    derived = {"sex_lower": str(row["sex"]).lower()} if "sex" in row else {}
    return best.format(**row, **derived)
