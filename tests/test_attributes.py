"""The vocabulary: bins at their edges, unknown and missing values, and prompts that keep secrets."""

import math
import re
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compdiff import phantoms
from compdiff.attributes import AGE, AGE_BINS, RACE, SCHEMAS, SEX, Attribute, Schema, age_bin, prompt
from compdiff.manifests import dataset_names, load_manifest

MANIFESTS = {name: load_manifest(name) for name in dataset_names()}


@pytest.mark.parametrize(
    ("years", "expected"),
    [(0, "0-18"), (17, "0-18"), (17.99, "0-18"), (18, "18-40"), (39.9, "18-40"), (40, "40-60"), (59, "40-60"), (60, "60-80"),
     (79, "60-80"), (80, "80+"), (120, "80+")],
)  # fmt: skip
def test_bins_are_closed_below_and_open_above(years, expected):
    assert age_bin(years) == expected


@given(st.integers(0, 120))
def test_bins_agree_with_their_names(years):
    low, _, high = age_bin(years).rstrip("+").partition("-")
    assert int(low) <= years < int(high or 121)


@pytest.mark.parametrize("years", [None, math.nan, -1, -0.1, 120.5, 411, "52", ""])
def test_missing_and_impossible_ages_raise(years):
    with pytest.raises(ValueError, match="age "):
        age_bin(years)


@pytest.mark.parametrize("value", ["male", "M", "", " Male", None, math.nan, "Unknown", 0])
def test_unknown_categories_raise(value):
    with pytest.raises(ValueError, match="sex: unknown category"):
        SEX.index(value)
    with pytest.raises(ValueError, match="sex: unknown category"):
        SCHEMAS["chest"].encode({"age": "0-18", "sex": value, "race": "White"})


def test_a_missing_attribute_and_a_wrong_index_raise():
    with pytest.raises(KeyError):
        SCHEMAS["chest"].encode({"age": "0-18", "sex": "Male"})
    for indices in ((-1, 0, 0), (5, 0, 0), (0, 2, 0)):
        with pytest.raises(ValueError, match="is outside 0-"):
            SCHEMAS["chest"].decode(indices)
    with pytest.raises(ValueError, match="no attribute 'view'"):
        SCHEMAS["chest"]["view"]


def test_index_order_is_the_methods():
    assert AGE.categories == AGE_BINS == ("0-18", "18-40", "40-60", "60-80", "80+")
    assert SEX.categories == ("Male", "Female") and RACE.categories == ("White", "Black", "Asian", "Hispanic")


@pytest.mark.parametrize("name", SCHEMAS)
def test_encode_decode_and_cells_agree(name):
    schema = SCHEMAS[name]
    cells = schema.cells()
    assert len(cells) == math.prod(schema.sizes) == len(set(cells)) and cells == sorted(cells)
    assert all(schema.encode(schema.decode(cell)) == cell for cell in cells)
    assert len({schema.cell_name(cell) for cell in cells}) == len(cells)
    assert schema.subset(reversed(schema.names)) == schema


def test_schemas_need_two_different_attributes():
    with pytest.raises(ValueError, match="at least two"):
        Schema((AGE,))
    with pytest.raises(ValueError, match="names repeat"):
        Schema((AGE, Attribute("age", ("old",))))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_speak_the_same_vocabulary(name):
    manifest = MANIFESTS[name]
    schema = SCHEMAS[yaml.safe_load(manifest.text)["schema"]]
    assert manifest.schema == schema
    assert set(manifest.held_out) <= set(schema.cells())
    for attribute in schema.attributes:
        if manifest.layout == "phantom":
            seen = {schema.decode(cell)[attribute.name] for cell in manifest.joint}
            assert seen == set(attribute.categories)


@pytest.mark.parametrize("name", [n for n in MANIFESTS if MANIFESTS[n].layout == "phantom"])
def test_phantoms_draw_every_cell(name):
    manifest = MANIFESTS[name]
    for cell in manifest.schema.cells():
        who = manifest.schema.decode(cell)
        drawn = phantoms.draw(manifest.modality, "someone", who, seed=0, size=32, interaction=0.5)
        assert age_bin(drawn.age_years) == who["age"]


# --- prompts -------------------------------------------------------------------------------------------------------
def says(text, attribute, row):
    """Does a text reveal the value of an attribute? By words of the categories, or the number of years."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    if attribute.name == "age":
        return any(word.isdigit() for word in words) or "years" in words or "year" in words
    return any(category.lower() in words for category in attribute.categories)


@st.composite
def people(draw):
    manifest = MANIFESTS[draw(st.sampled_from(sorted(MANIFESTS)))]
    schema = manifest.schema
    row = {a.name: draw(st.sampled_from(a.categories)) for a in schema.attributes}
    row["age_years"] = draw(st.integers(0, 120).filter(lambda years: age_bin(years) == row["age"]))
    values = {label: draw(st.integers(0, len(phrases) - 1)) for label, phrases in manifest.labels.items()}
    return manifest, row | {"findings": manifest.describe(values)}, draw(st.sets(st.sampled_from(schema.names)))


@given(people())
def test_a_prompt_never_names_a_removed_attribute(person):
    manifest, row, named = person
    text = prompt(manifest.prompts, row, named, manifest.schema)
    for attribute in manifest.schema.attributes:
        assert says(text, attribute, row) <= (attribute.name in named), text
    assert row["findings"] in text
    everything = prompt(manifest.prompts, row, manifest.schema.names, manifest.schema)
    assert all(says(everything, attribute, row) for attribute in manifest.schema.attributes)


@given(people())
def test_a_prompt_names_as_much_as_its_templates_can(person):
    manifest, row, named = person
    text = prompt(manifest.prompts, row, named, manifest.schema)
    alias = {"age_years": "age", "sex_lower": "sex"}
    contents = [{alias.get(f, f) for _, f, _, _ in string.Formatter().parse(t) if f} - {"findings"} for t in manifest.prompts]
    most = max(len(content) for content in contents if content <= named)
    assert sum(says(text, attribute, row) for attribute in manifest.schema.attributes) == most


def test_the_papers_prompts():
    row = dict(age="40-60", sex="Female", race="White", age_years=52, findings="No acute cardiopulmonary abnormality.")
    chest = MANIFESTS["chest"]
    expected = "52 year old White female. No acute cardiopulmonary abnormality."
    assert prompt(chest.prompts, row, chest.schema.names, chest.schema) == expected
    fundus, row = MANIFESTS["fundus"], row | dict(age_years=37, age="18-40")
    row["findings"] = "glaucoma, mild vision loss, normal cup-disc ratio, emmetropia"
    expected = "SLO fundus image of a White, Female, 37 years old patient with the following conditions: " + row["findings"]
    assert prompt(fundus.prompts, row, fundus.schema.names, fundus.schema) == expected
    assert prompt(fundus.prompts, row, ("age",), fundus.schema) == "37 years old. " + row["findings"]


def test_prompts_without_a_fitting_template_or_value_raise():
    chest = SCHEMAS["chest"]
    with pytest.raises(ValueError, match="no prompt template names only \\['sex'\\]"):
        prompt(["{age_years} {findings}"], dict(age_years=3, findings="x"), ["sex"], chest)
    with pytest.raises(KeyError, match="sex_lower"):
        prompt(["{sex_lower}. {findings}"], dict(findings="x"), ["sex"], chest)
