"""Cardiac studies from folders, tables and Sunnybrook: three layouts by one reading path, bad input, manifests."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from compdiff import (
    cardiac,
    cardiac_cohorts,
    cardiac_files,
    cardiac_manifest,
    heart,
    paths,
)
from compdiff.problems import DataError, ManifestError

REAL = paths.ROOT.parent / "shared" / "data" / "sunnybrook"
SHAPES = {
    "cine": (12, 64, 64),
    "four_chamber": (12, 64, 64),
    "volume": (8, 64, 64),
    "slice": (64, 64),
    "frame": (64, 64),
    "stacked": (64, 64, 3),
}
SECRETS = ("Anna-", "Bob-", "Cleo-", "Dan-", "71000")


# --- invented folders -------------------------------------------------------------------------------------------------
class Tree:
    """Four patients, three short-axis slices at ED and ES, in the layout of data_manifests/cardiac/heart_folder.yaml."""

    HEADER = ("patient", "sex", "age", "bmi", "heart_failure", "phase", "view", "slice", "frame", "image", "mask")
    PEOPLE = (
        ("Anna-1", "F", "61", "31.5", 1),
        ("Bob-2", "M", "45", "24", 0),
        ("Cleo-3", "F", "33", "", 0),
        ("Dan-4", "M", "80", "27", 1),
    )

    def __init__(self, root):
        self.root, self.rows = Path(root), []
        for folder in ("images", "masks"):
            (self.root / folder).mkdir(parents=True)
        for who, sex, age, bmi, failing in self.PEOPLE:
            person = {"patient": who, "sex": sex, "age": age, "bmi": bmi, "heart_failure": str(failing)}
            drawn = self.drawn(who, failing)
            for phase, frame in (("ED", 0), ("ES", 7)):
                images, masks = heart.volume(drawn, phase, 3, 48)
                for n in range(3):
                    self.add(
                        person | {"phase": phase, "view": "", "slice": str(n), "frame": str(frame)}, images[n], masks[n]
                    )

    @staticmethod
    def drawn(who, failing):
        return heart.draw(who, {"age": "60-80", "sex": "Male", "bmi": "normal"}, {"heart failure": failing}, seed=0)

    def add(self, row, image, mask=None):
        name = f"{row['patient']}_{row['view']}{row['phase']}_{row['slice']}_{row['frame']}.png"
        Image.fromarray(image).save(self.root / "images" / name)
        if mask is not None:
            Image.fromarray(mask).save(self.root / "masks" / name)
        self.rows.append(row | {"image": f"images/{name}", "mask": f"masks/{name}" if mask is not None else ""})

    def file(self, row, column="image"):
        return self.root / self.rows[row - 2][column]

    def write(self):
        with open(self.root / "studies.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, self.HEADER)
            writer.writeheader()
            writer.writerows(self.rows)
        return self

    def read(self, **changes):
        self.write()
        return cardiac_files.read(manifest(self.root.parent, "heart_folder", **changes), str(self.root))


def manifest(folder, name, **changes):
    """A shipped manifest with some keys replaced."""
    raw = yaml.safe_load((cardiac_manifest.FOLDER / f"{name}.yaml").read_text()) | changes
    (folder / "changed.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return cardiac_manifest.load(folder / "changed.yaml")


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "release")


def test_folder_of_slices(tree):
    studies = tree.read()
    table = studies.table.sort_values("age_years")
    assert table["age_years"].tolist() == [33, 45, 61, 80] and table["bmi"].tolist() == [
        "unknown",
        "normal",
        "obese",
        "overweight",
    ]
    assert table["sex"].tolist() == ["Female", "Male", "Female", "Male"] and table["y_heart failure"].tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert (
        studies.schema.sizes == (5, 2, 4)
        and studies.prompts()[table.index[0]] == "Female, age in 30s, unknown BMI, healthy"
    )
    assert set(studies.missing) == {"cine", "four_chamber"}
    for name in ("slice", "frame", "stacked", "volume"):
        assert studies.images(name).shape == studies.masks(name).shape == (4, *SHAPES[name])
    with pytest.raises(cardiac.NotAvailable, match="input cine: not available: .* 2 frames .* -> choose another input"):
        studies.images("cine")


def test_folder_pictures_show_the_heart_and_masks_fit_them(tree):
    """The square is centred on the ED cavity; the ejection fraction of a study survives reading; blood stays bright."""
    studies = tree.read()
    true = {int(age): tree.drawn(who, failing).truth["ejection_fraction"] for who, _, age, _, failing in tree.PEOPLE}
    ages = studies.table["age_years"]
    for ed, es, image, age in zip(studies.masks("slice"), studies.masks("frame"), studies.images("slice"), ages, strict=True):
        assert np.abs(np.argwhere(ed == 1).mean(0) - 31.5).max() < 3
        assert image[ed == 1].mean() > image[ed == 2].mean() + 40
        assert heart.implied_ejection_fraction(ed, es) == pytest.approx(true[age], abs=0.04)


def test_the_window_is_the_percentile_of_a_patients_mid_slices(tree):
    white = [(image == 255).mean() for image in tree.read(crop=1.0, window=90).images("stacked", 48)[..., :2]]
    assert np.allclose(white, 0.1, atol=0.02), "at 48 pixels without a cut nothing is resampled"


def test_names_and_order_leak_nobody(tree):
    studies = tree.read()
    text = studies.table.to_csv() + studies.title + str(studies.missing)
    assert not any(s in text for s in SECRETS) and studies.table["id"].is_unique
    assert studies.table["id"].tolist() == sorted(studies.table["id"])
    first = set(studies.table["id"])
    assert set(tree.read().table["id"]) == first, "the same release gives the same names"
    tree.rows[0]["age"] = tree.rows[1]["age"] = "61.0"
    assert not set(tree.read().table["id"]) & first, "names are salted with the table"


def test_missing_bmi_is_a_group_or_refused_as_the_manifest_says(tree):
    reject = yaml.safe_load((cardiac_manifest.FOLDER / "heart_folder.yaml").read_text())["attributes"]
    reject["bmi"]["missing"] = "reject"
    with pytest.raises(DataError) as caught:
        tree.read(attributes=reject)
    rows = [n for n, row in enumerate(tree.rows, 2) if row["bmi"] == ""]
    assert [line.split(":")[0] for line in caught.value.problems] == [f"studies.csv, row {n}, column bmi" for n in rows]


def _mask(tree, row, value=None, shape=None):
    array = np.asarray(Image.open(tree.file(row, "mask"))).copy()
    array = array if shape is None else np.zeros(shape, np.uint8)
    array[0, 0] = value or 0
    Image.fromarray(array).save(tree.file(row, "mask"))


def _set(column, value, row=5):
    return lambda t: t.rows[row - 2].__setitem__(column, value)


def _drop(phase):
    return lambda t: setattr(t, "rows", [r for r in t.rows if (r["patient"], r["phase"]) != ("Bob-2", phase)])


DEFECTS = {
    "unknown mask value": (lambda t: _mask(t, 5, 7), "row 5, column mask: mask with unknown values"),
    "mask in colour": (
        lambda t: Image.new("RGB", (48, 48)).save(t.file(5, "mask")),
        "row 5, column mask: mask with unknown values",
    ),
    "other size": (lambda t: _mask(t, 5, shape=(40, 48)), "row 5, column mask: image and mask differ in size"),
    "image of other size": (
        lambda t: Image.new("L", (50, 50)).save(t.file(6)),
        "row 6, column image: size differs from row 2",
    ),
    "no ES": (_drop("ES"), "row 8: this patient has 0 mid slices at ES"),
    "no ED": (_drop("ED"), "row 8: this patient has 0 mid slices at ED"),
    "two patients with one id": (
        lambda t: [r.__setitem__("patient", "Bob-2") for r in t.rows[:6]],
        "row 8, column age: differs from row 2",
    ),
    "same frame twice": (
        lambda t: t.rows.append(t.rows[4]),
        "row 26, column phase: same patient, slice and phase as row 6",
    ),
    "age differs": (_set("age", "62"), "row 5, column age: differs from row 2, which has the same patient id"),
    "unknown sex": (_set("sex", "X"), "row 5, column sex: unknown category"),
    "no sex": (_set("sex", ""), "row 5, column sex: missing"),
    "no age": (_set("age", ""), "row 5, column age: missing"),
    "age 414": (_set("age", "414"), "row 5, column age: is not a number from 0 to 120"),
    "BMI in words": (_set("bmi", "heavy"), "row 5, column bmi: is not a number from 8 to 100"),
    "BMI infinite": (_set("bmi", "inf"), "row 5, column bmi: is not a number from 8 to 100"),
    "unknown label": (_set("heart_failure", "2"), "row 5, column heart_failure: unknown label"),
    "no label": (_set("heart_failure", ""), "row 5, column heart_failure: missing"),
    "unknown phase": (_set("phase", "diastole"), "row 5, column phase: unknown"),
    "unknown view": (_set("view", "2ch"), "row 5, column view: unknown"),
    "slice in words": (_set("slice", "mid"), "row 5, column slice: is not a whole number"),
    "no patient": (_set("patient", ""), "row 5, column patient: missing"),
    "no mask": (_set("mask", ""), "row 5, column mask: missing"),
    "file missing": (lambda t: t.file(5).unlink(), "row 5, column image: file missing"),
    "truncated": (
        lambda t: t.file(5).write_bytes(t.file(5).read_bytes()[:90]),
        "row 5, column image: truncated or not a PNG",
    ),
    "escaping": (_set("image", "../outside.png"), "row 5, column image: path leaves the data folder"),
    "absolute": (_set("mask", "/etc/passwd"), "row 5, column mask: path leaves the data folder"),
    "no column": (
        lambda t: [setattr(t, "HEADER", t.HEADER[1:]), [r.pop("patient") for r in t.rows]],
        "row 1, column patient: 0 such columns",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect(tree, defect):
    spoil, says = DEFECTS[defect]
    spoil(tree)
    with pytest.raises(DataError) as caught:
        tree.read()
    assert any(f"studies.csv, {says}" in line for line in caught.value.problems), caught.value.problems
    assert all(" -> " in line for line in caught.value.problems)
    assert not any(s in str(caught.value) for s in (*SECRETS, str(tree.root), "passwd"))


def test_a_link_that_leads_out_is_refused(tree):
    outside = tree.root.parent / "outside.png"
    shutil.move(tree.file(5), outside)
    tree.file(5).symlink_to(outside)
    with pytest.raises(DataError, match="row 5, column image: path leaves the data folder"):
        tree.read()


def test_all_defects_in_one_report(tree):
    for defect in ("unknown mask value", "file missing"):
        DEFECTS[defect][0](tree)
    tree.rows[7]["sex"] = "X"
    with pytest.raises(DataError) as caught:
        tree.read()
    assert {line.split(":")[0].split(", ", 1)[1] for line in caught.value.problems} >= {
        "row 9, column sex",
        "row 5, column image",
    }


@pytest.mark.parametrize("root", ["", "no/such/folder"])
def test_without_data_the_report_says_what_to_get(root):
    with pytest.raises(DataError, match="DATA_ROOT: .* get it from: .*Sunnybrook.*CC0"):
        cardiac_files.read(cardiac_manifest.load("sunnybrook"), root)


# --- a biobank's tables -----------------------------------------------------------------------------------------------
def biobank(root, people):
    """participants.csv with two ICD columns, images.csv with a cine of six frames in both views; no four-chamber
    masks."""
    tree = Tree(root)
    tree.rows = []
    for n, (eid, *_rest) in enumerate(people):
        drawn = heart.draw(f"b{n}", {"age": "60-80", "sex": "Male", "bmi": "normal"}, {"heart failure": 0}, seed=0)
        for view in heart.VIEWS:
            images, masks = heart.cine(drawn, 6, view, 48)
            for t in range(6):
                phase = {0: "ED", heart.systole(6): "ES"}.get(t, "") if view == "short_axis" else ""
                tree.add(
                    {"patient": eid, "phase": phase, "view": view, "slice": "0", "frame": str((t + 2) % 6)},
                    images[t],
                    masks[t] if view == "short_axis" else None,
                )
    pictures = pd.DataFrame(tree.rows).rename(columns={"patient": "f.eid"})
    pictures.to_csv(root / "images.csv", index=False)
    names = [
        "f.eid",
        "f.31.0.0",
        "f.21003.2.0",
        "f.21001.2.0",
        "f.189.0.0",
        "f.41270.0.0",
        "f.41270.0.1",
        "f.99999.0.0",
    ]
    pd.DataFrame([[*p, "spare"] for p in people], columns=names).to_csv(root / "participants.csv", index=False)


PEOPLE = [
    ("7100001", 0, 61, 31.5, -3.1, "I50.0", "E119"),
    ("7100002", 1, 45, 24, 0.5, "", ""),
    ("7100003", 0, 70, "NA", 6.2, "I21.9", "I10"),
]


def test_biobank_tables(tmp_path):
    biobank(tmp_path / "release", PEOPLE)
    studies = cardiac_files.read(cardiac_manifest.load("biobank"), str(tmp_path / "release"))
    table = studies.table.set_index("age_years").sort_index()
    assert table["sex"].tolist() == ["Male", "Female", "Female"] and table["bmi"].tolist() == [
        "normal",
        "obese",
        "unknown",
    ]
    assert table["townsend"].tolist() == ["middle", "low", "high"]
    assert table["findings"].tolist() == ["healthy", "heart failure, diabetes", "ischaemic heart disease, hypertension"]
    assert table.filter(like="y_").to_numpy().tolist() == [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]]
    assert set(studies.missing) == {"volume"} and not any(
        s in table.to_csv() + studies.title + str(studies.missing) for s in SECRETS
    )
    cine, four = studies.images("cine"), studies.images("four_chamber")
    assert cine.shape == four.shape == (3, 12, 64, 64) and np.array_equal(cine[:, 0], studies.images("slice")), (
        "a beat starts at ED"
    )
    with pytest.raises(cardiac.NotAvailable, match="masks of four_chamber: not drawn for 3 patients"):
        studies.masks("four_chamber")


@pytest.mark.parametrize(
    "row, column, value, says",
    [
        (1, 0, "7100001", "row 3, column f.eid: same patient as row 2"),
        (1, 5, "heart", "row 3, column f.41270.0.0: is not an ICD-10 code"),
        (1, 4, "99", "row 3, column f.189.0.0: is not a number from -10 to 15"),
        (1, 1, "2", "row 3, column f.31.0.0: unknown category"),
    ],
)
def test_biobank_defect(tmp_path, row, column, value, says):
    people = [list(p) for p in PEOPLE]
    biobank(tmp_path / "release", people)
    people[row][column] = value
    table = pd.read_csv(tmp_path / "release" / "participants.csv", dtype=str, keep_default_na=False)
    table.iloc[row, column] = value
    table.to_csv(tmp_path / "release" / "participants.csv", index=False)
    with pytest.raises(DataError) as caught:
        cardiac_files.read(cardiac_manifest.load("biobank"), str(tmp_path / "release"))
    assert any(f"participants.csv, {says}" in line for line in caught.value.problems)
    assert "71000" not in str(caught.value)


# --- manifests --------------------------------------------------------------------------------------------------------
FROM_FILES = [p for p in sorted(cardiac_manifest.FOLDER.glob("*.yaml")) if not cardiac_cohorts.generated(p.stem)]


@pytest.mark.parametrize("path", FROM_FILES, ids=lambda p: p.stem)
def test_shipped_manifests_load(path):
    loaded = cardiac_manifest.load(path.stem)
    assert "heart failure" in loaded.labels and {"age", "sex"} <= set(loaded.schema.names) <= {
        *cardiac.PHRASES,
        "pathology",
    }
    assert loaded.access == "credentialed" or "CC0" in loaded.licence


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"window": 20}, "key window"),
        ({"access": "leaked"}, "key access"),
        ({"tables": {"patients": "a.csv"}}, "key tables"),
        ({"columns": {"image": "image"}}, "key columns"),
        ({"labels": {}}, "key labels"),
        ({"spare": 1}, "keys: missing or unknown: spare"),
        ({"attributes": {"age": {"header": "age"}}}, "key attributes"),
        ({"labels": {"x": {"headers": ["a"]}}}, "key labels: x"),
        (
            {
                "attributes": {
                    "age": {"header": "age", "missing": "unknown"},
                    "sex": {"header": "s", "values": {"M": "Male"}},
                }
            },
            "key attributes: age",
        ),
        (
            {"attributes": {"age": {"header": "age"}, "sex": {"header": "s", "values": {"M": "man"}}}},
            "key attributes: sex",
        ),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(tmp_path, changes, says):
    with pytest.raises(ManifestError) as caught:
        manifest(tmp_path, "heart_folder", **changes)
    assert any(line.startswith(says) for line in caught.value.problems) and all(
        " -> " in line for line in caught.value.problems
    )


# --- the real part ----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not REAL.is_dir(), reason="skipped: no real data")
def test_sunnybrook():
    studies = cardiac_files.read(cardiac_manifest.load("sunnybrook"), str(REAL))
    raw = pd.read_csv(REAL / "metadata.csv")
    people = raw.drop_duplicates("patient_id")
    assert len(studies.table) == 45 and set(studies.missing) == {"cine", "four_chamber"}
    failing = people["finding"].str.startswith("Heart failure")
    assert studies.table["y_heart failure"].sum() == failing.sum() == 24
    women = studies.table[studies.table["sex"] == "Female"]
    assert women["y_heart failure"].sum() == (failing & (people["sex"] == "F")).sum() == 5
    assert sorted(studies.table["age_years"]) == sorted(people["age"]) and not studies.table.to_csv().count("SC-")
    full, plain = studies.prompts(), studies.prompts(("age", "sex"))
    assert any(p.endswith("s, hypertrophy") for p in full) and not any("healthy" in p for p in full + plain)
    assert {p.rpartition("s, ")[2] for p in plain} == {"heart failure", "no heart failure"}
    mid = raw[raw["is_mid"] == 1].pivot(index="patient_id", columns="phase", values="lv_area_px")
    masks = studies.masks("stacked", 128)
    assert set(np.unique(masks)) <= {0, 1, 2}
    found = sorted(heart.implied_ejection_fraction(m[..., 0], m[..., 1]) for m in masks)
    assert np.allclose(found, sorted(1 - mid["ES"] / mid["ED"]), atol=1e-6), (
        "128 of 256 pixels: no resampling, no mask is cut"
    )
    assert studies.images("volume", 32, [0, 1]).shape == (2, 8, 32, 32)
