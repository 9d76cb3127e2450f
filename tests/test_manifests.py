"""Manifests: the shipped ones say what the papers say, a wrong one is refused with all its problems."""

import numpy as np
import pytest
import yaml

from compdiff import attributes, paths, phantoms
from compdiff.manifests import load_manifest, parse_manifest
from compdiff.problems import MAX_LINES, DataError, ManifestError, Problems


def _edited(name="chest", **changes):
    """A shipped manifest's text with keys replaced, or removed where the value is `...`."""
    raw = yaml.safe_load((paths.MANIFESTS / f"{name}.yaml").read_text())
    raw = {k: v for k, v in {**raw, **changes}.items() if v is not ...}
    return yaml.safe_dump(raw, sort_keys=False)


def _problems(text):
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "x", "x.yaml")
    return caught.value.problems


REAL = {"nih": "nih", "mimic": "chest", "chexpert": "chest", "folder": "chest", "fairgenmed": "fundus_ethnicity",
        "fairgenmed_jpg": "fundus_ethnicity"}  # fmt: skip


@pytest.mark.parametrize("name, schema", [("chest", "chest"), ("fundus", "fundus"), *REAL.items()])
def test_shipped_manifests(name, schema):
    manifest = load_manifest(name)
    assert manifest.schema is attributes.SCHEMAS[schema] and manifest.name == name
    assert load_manifest(paths.MANIFESTS / f"{name}.yaml") == manifest
    assert parse_manifest("# a remark\n" + manifest.text, name, "x").sha256 == manifest.sha256
    subsets = {frozenset(s) for s in ((), manifest.schema.names[:1], manifest.schema.names[1:], manifest.schema.names)}
    for named in subsets:  # every attribute can stay out of the text
        row = {a.name: a.categories[0] for a in manifest.schema.attributes} | {"age_years": 5, "findings": "F"}
        assert attributes.prompt(manifest.prompts, row, named, manifest.schema).endswith(("F", "F."))


def test_fairgenmed_differs_from_its_jpg_manifest_in_the_kind_alone():
    files = (paths.MANIFESTS / f"{name}.yaml" for name in ("fairgenmed", "fairgenmed_jpg"))
    npz, jpg = (yaml.safe_load(file.read_text()) for file in files)
    assert npz["files"].pop("kinds") == ["npz"] and jpg["files"].pop("kinds") == ["jpg"] and npz == jpg


def test_phantom_manifests_fit_the_phantoms_and_the_published_shares():
    cell = {n: load_manifest(n).schema for n in ("chest", "fundus")}
    published = {  # design/method.md, section 8
        "chest": {"60-80 Male White": 0.16, "40-60 Male White": 0.14, "18-40 Male White": 0.04,
                  "40-60 Female Hispanic": 0.02, "40-60 Male Hispanic": 0.015, "40-60 Male Asian": 0.005,
                  "40-60 Female Asian": 0.005},
        "fundus": {"60-80 Female White": 0.245, "60-80 Male White": 0.17, "18-40 Female White": 0.05,
                   "80+ Female White": 0.04, "80+ Male White": 0.03, "40-60 Male Asian": 0.015,
                   "80+ Male Black": 0.005},
    }  # fmt: skip
    held = {
        "chest": {"18-40 Female Asian", "18-40 Male Asian", "80+ Female Asian", "80+ Male Asian", "80+ Male Hispanic"},
        "fundus": {"18-40 Female Asian", "80+ Male Asian", "80+ Female Black"},
    }
    for name, schema in cell.items():
        manifest = load_manifest(name)
        shares = {schema.cell_name(c): p for c, p in manifest.joint.items()}
        assert len(shares) == np.prod(schema.sizes) and sum(shares.values()) == pytest.approx(1)
        assert published[name].items() <= shares.items()
        assert {schema.cell_name(c) for c in manifest.held_out} == held[name]
        assert {k: len(v) for k, v in manifest.labels.items()} == {k: len(v) for k, v in phantoms.LABELS[name].items()}


def test_prompt_styles():
    chest, fundus, cxr = (load_manifest(n) for n in ("chest", "fundus", "nih"))

    def say(manifest, named, who, **labels):
        values = dict.fromkeys(manifest.labels, 0) | labels
        row = dict(zip(manifest.schema.names, who, strict=True)) | {"findings": manifest.describe(values)}
        return attributes.prompt(manifest.prompts, row | {"age_years": 52}, named, manifest.schema)

    who = ("40-60", "Female", "White")
    assert say(chest, chest.schema.names, who) == "52 year old White female. No acute cardiopulmonary abnormality."
    assert say(chest, ["age"], who) == "52 year old. No acute cardiopulmonary abnormality."
    assert say(chest, [], who) == "No acute cardiopulmonary abnormality."
    sick = say(chest, [], who, Cardiomegaly=1, Pneumothorax=1)
    assert sick == "The heart is enlarged. There is a pneumothorax."
    eye = "glaucoma, mild vision loss, normal cup-disc ratio, emmetropia"
    asked = "SLO fundus image of a White, Female, 52 years old patient with the following conditions: " + eye
    assert say(fundus, fundus.schema.names, who, glaucoma=1, vision_loss=1) == asked
    assert say(fundus, ["age"], who, glaucoma=1, vision_loss=1) == "52 years old. " + eye
    assert say(fundus, [], who, glaucoma=1, vision_loss=1) == eye
    man = ("40-60", "Male", "PA")
    assert (
        say(cxr, cxr.schema.names, man, Effusion=1, Cardiomegaly=1)
        == "52 year old male, PA view. Cardiomegaly, Effusion."
    )
    assert say(cxr, [], man) == "No finding."


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": "red"}, "key colour: unknown"),
        ({"licence": ...}, "key licence: missing"),
        ({"title": " "}, "key title: empty"),
        ({"layout": "dicom"}, "key layout: 'dicom' is not known -> use one of: phantom, nih"),
        ({"schema": ["chest"]}, "key schema"),
        ({"held_out": [["18-40", "Female", "Martian"]]}, "key held_out, cell 1: race: unknown category 'Martian'"),
        ({"held_out": [["18-40", "Female"]]}, "key held_out, cell 1"),
        ({"held_out": None}, "key held_out"),
        ({"prompts": ["{name}. {findings}", "{findings}"]}, "template 1: unknown fields ['name']"),
        ({"prompts": ["{age_years} {sex} {race} {findings}"]}, "no template names exactly []"),
        ({"prompts": ["{age_years} {sex} {race} {findings}", "{findings}", "no"]}, "template 3: says no findings"),
        ({"prompts": ["{age_years {findings}", "{findings}"]}, "template 1"),
        ({"labels": {"No Finding": "none"}}, "key labels: No Finding"),
        ({"findings": {"none": "x"}}, "key findings"),
        ({"split": {"rule": "official_lists"}}, "key split"),
        ({"checksum": "md5"}, "key checksum"),
        ({"access": "secret"}, "key access: 'secret' is not known -> use one of: generated, open, credentialed"),
        ({"joint": {"0-18": {"Male": {"White": 1.5}}}}, "key joint: 0-18 Male White: 1.5 is not a share"),
        ({"joint": {"0-18": {"Male": {"Martian": 1.0}}}}, "unknown race 'Martian'"),
        ({"joint": {"0-18": {"Male": {"White": 1.0}}}}, "key joint: 0-18 Male Black: missing"),
        ({"columns": {}}, "key columns: unknown"),
    ],
)
def test_hostile_manifest(changes, says):
    assert any(says in line and " -> " in line for line in _problems(_edited(**changes)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"age": {"header": ["Patient Age"], "bins": [20, 40]}}, "columns: age: bins [20, 40] are not the project's"),
        ({"sex": {"header": ["Patient Sex"], "values": {"M": "man"}}}, "columns: sex: values are not known"),
        ({"sex": {"header": ["Patient Sex"]}}, "columns: sex: values are not known"),
        ({"sex": {"header": "Patient Sex"}}, "columns: sex: is not a mapping with a list"),
        ({"race": {"header": ["Race"]}}, "key columns: does not fit the schema"),
    ],
)
def test_hostile_columns(change, says):
    columns = yaml.safe_load((paths.MANIFESTS / "nih.yaml").read_text())["columns"] | change
    assert any(says in line for line in _problems(_edited("nih", columns=columns)))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("mimic", {"split": {"rule": "by_patient", "val_share": 0.1, "test_share": 0.1}}, "give exactly rule: column"),
        ("folder", {"split": {"rule": "by_patient", "val_share": 0.1}}, "rule: by_patient, test_share, val_share"),
        ("folder", {"split": {"rule": "by_patient", "val_share": 0.1, "test_share": 2.0}}, "test_share: 2.0 is not"),
        ("folder", {"split": {"rule": "column"}}, "key columns: has no split"),
        ("folder", {"split": ["column"]}, "key split"),
        ("mimic", {"image_errors": "ignore"}, "key image_errors: 'ignore' is not known"),
        ("mimic", {"files": {"table": ["../x.csv"], "kinds": ["jpg"]}}, "'../x.csv' is not a path below"),
        ("mimic", {"files": {"table": ["x.csv"], "kinds": ["gif"]}}, "kinds: ['gif'] are not known"),
        ("mimic", {"files": {"table": "x.csv", "kinds": ["jpg"]}}, "key files: does not fit"),
        ("mimic", {"label_columns": {"Edema": {"values": {"1": 1}}}}, "key label_columns: does not fit the labels"),
        ("fairgenmed", {"npz": {"race": {"attribute": "race", "values": {0: "Martian"}}}}, "key npz: race"),
        ("fairgenmed", {"npz": 3}, "key npz"),
        ("mimic", {"cost": ...}, "key cost: missing"),
    ],
)
def test_hostile_manifests_of_real_data(name, change, says):
    assert any(says in line and " -> " in line for line in _problems(_edited(name, **change)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"race": {"header": ["race"], "values": {"White": "White"}, "none": ["WHITE"]}}, "lists ['white'] twice"),
        ({"race": {"header": ["race"], "values": {"White": "White"}, "none": "Other"}}, "race: none: is not a list"),
        ({"race": {"header": ["race"], "values": {"W": "White"}, "first": {"header": ["e"], "values": {"H": "Latin"}}}},
         "race: first: values are not known"),
        ({"split": {"header": ["split"], "values": {"dev": "dev"}}}, "columns: split: values are not known"),
        ({"colour": {"header": ["colour"]}}, "key columns: does not fit the schema"),
    ],
)  # fmt: skip
def test_hostile_columns_of_real_data(change, says):
    columns = yaml.safe_load((paths.MANIFESTS / "folder.yaml").read_text())["columns"] | change
    assert any(says in line for line in _problems(_edited("folder", columns=columns)))


def test_labels_of_real_data_need_a_phrase_for_each_value():
    raw = yaml.safe_load((paths.MANIFESTS / "folder.yaml").read_text())["label_columns"]
    values = ({"1": 2}, {}, {1: 1})
    for wrong in (*({"values": v} for v in values), "positive", {"header": "x", "values": {"1": 1}}):
        lines = _problems(_edited("folder", label_columns=raw | {"Cardiomegaly": wrong}))
        assert any("label_columns: Cardiomegaly" in line for line in lines)


def test_a_whole_text_is_compared_and_not_a_part_of_it():
    race, first = (load_manifest(n).columns["race"] for n in ("mimic", "chexpert"))
    assert race.meaning(" hispanic/latino - cuban ") == "Hispanic" and race.meaning("white - russian") == "White"
    for text in ("Non-Hispanic", "NOT HISPANIC", "CAUCASIAN", "HISPANIC/LATINO - OTHER PLANET", ""):
        assert race.meaning(text) is None, "never guessed"
    assert race.is_none("other") and race.is_none("") and not race.is_none("Non-Hispanic")
    assert first.first.meaning("Non-Hispanic/Non-Latino") == "" and first.first.meaning("Hispanic/Latino") == "Hispanic"
    eye = load_manifest("fairgenmed")
    codes = {k: attributes.RACE_FUNDUS.index(v) for k, v in eye.npz["race"][1].items()}
    assert codes == {0: 2, 1: 1, 2: 0}, "FairGenMed counts Asian, Black, White; we count White, Black, Asian"


def test_manifest_reports_all_problems_at_once():
    assert len(_problems(_edited(licence=..., title="", colour=1, checksum="md5"))) == 4
    assert len(_problems(_edited(held_out=[["x"]], labels={}, prompts=3))) == 3


def test_manifest_that_is_no_manifest(tmp_path):
    assert "key 'title' stands twice" in _problems("title: a\ntitle: b\n")[0]
    assert "not readable as YAML" in _problems("title: [")[0]
    assert "not readable as YAML" in _problems("title: !!python/object/apply:os.getcwd []")[0]
    assert "holds no keys" in _problems("- 1")[0]
    (tmp_path / "x.yaml").write_bytes(b"title: \xff")
    with pytest.raises(ManifestError, match="UTF-8"):
        load_manifest(tmp_path / "x.yaml")
    with pytest.raises(ManifestError, match="use one of: chest, chexpert, fairgenmed, fairgenmed_jpg, folder, fundus"):
        load_manifest("chst")


def test_report_is_capped():
    problems = Problems("data")
    for i in range(MAX_LINES + 7):
        problems.add(f"row {i}", "bad", "mend")
    with pytest.raises(DataError) as caught:
        problems.check()
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_LINES + 2 and "... and 7 more" in lines[-1] and f"{MAX_LINES + 7} problems" in lines[0]
