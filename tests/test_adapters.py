"""Layouts of real data, on skeleton trees: what is read, refused and left out, and that nobody is named."""

import shutil

import numpy as np
import pandas as pd
import pytest
from layouts import LAYOUTS, SIZE, contents
from PIL import Image

from compdiff import pictures, skeleton
from compdiff.problems import DataError

KINDS = [*((d, "") for d in LAYOUTS), ("mimic", "dcm"), ("fairgenmed", "jpg")]


# --- what is read ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dataset, kind", KINDS)
def test_a_tree_in_the_layout_is_read(copy, dataset, kind, capfd):
    tree = copy(dataset, kind)
    data = tree.prepare()
    table, manifest = data.table, data.manifest
    reasons = [entry["reason"] for entry in data.index["excluded"]]
    assert len(table) + len(reasons) == len(tree.rows) == len(pd.read_csv(tree.file))
    assert set(table[table["held_out"] == 1]["split"]) == {"zero_shot"} == set(table["split"][table["held_out"] == 1])
    sides = table.assign(split=table["split"].replace({"zero_shot": "test"})).groupby("patient")["split"].nunique()
    assert sides.max() == 1
    wanted = {"test", "zero_shot"} if dataset == "chexpert" else {"train", "val", "test", "zero_shot"}
    assert set(table["split"]) == wanted
    assert sum(reason.endswith("missing, or none of the categories") for reason in reasons) == 1
    assert ("not a frontal view" in reasons) == (dataset in ("mimic", "chexpert"))
    rejects = pd.read_csv(data.folder / "rejects.csv")
    assert rejects[["id", "reason"]].to_dict("records") == data.index["excluded"]
    assert f"{tree.file.name}, row {len(tree.rows) + 1}" in set(rejects["row"]), "its last row names no category"
    # nobody is named: neither in bytes nor in names, nor on the screen
    everything = b"\n".join(contents(tree.root.parent / "out").values())
    said = "".join(capfd.readouterr()) + " ".join(str(p) for p in (tree.root.parent / "out").rglob("*"))
    assert tree.identifiers() and not [n for n in tree.identifiers() if n.encode() in everything or n in said]
    assert data.images().std(axis=(1, 2)).min() > 10 and manifest.access == "credentialed"


@pytest.mark.parametrize("dataset", ["mimic", "chexpert"])
def test_labels_are_what_the_table_says(copy, dataset):
    tree = copy(dataset)
    tree.set(2, "Fracture", "-1.0")
    tree.set(2, "Edema", "1.0")
    data = tree.prepare()
    raw = pd.read_csv(tree.file)
    frontal = raw[tree.head("frontal")] != {"mimic": "LATERAL", "chexpert": "Lateral"}[dataset]
    raw = raw[frontal & (np.arange(len(raw)) < len(raw) - 1)]  # the last one names no race
    others = [n for n in data.label_names if n != "No Finding"]
    wanted = (raw[others] == 1).astype(int)
    kept = data.table[[f"y_{n}" for n in others]].sum()
    assert (len(data.table) == len(raw)) and kept.tolist() == wanted.sum().tolist() and kept["y_Edema"] == 1
    assert kept["y_Fracture"] == 0, "-1 is uncertain, and counts as 0"
    assert data.table["y_No Finding"].sum() == (wanted.sum(axis=1) == 0).sum() > 0
    assert data.table["age_years"].sum() == raw[tree.head("age")].sum()


def test_dicom_and_jpg_show_the_same_picture(copy, tmp_path):
    jpg, dcm = copy("mimic").prepare(tmp_path / "jpg"), None
    shutil.rmtree(tmp_path / "mimic")
    dcm = copy("mimic", "dcm").prepare(tmp_path / "dcm")
    assert jpg.table.equals(dcm.table), "the same names under the same salt"
    assert np.abs(jpg.images().astype(int) - dcm.images()).mean(axis=(1, 2)).max() < 2, "MONOCHROME1 is inverted"


def test_fairgenmed_jpg_is_turned_upright_and_scaled(copy, tmp_path):
    npz = copy("fairgenmed").prepare(tmp_path / "npz")
    shutil.rmtree(tmp_path / "fairgenmed")
    jpg = copy("fairgenmed", "jpg").prepare(tmp_path / "jpg")
    assert npz.table["id"].tolist() == jpg.table["id"].tolist()
    narrow = round(SIZE * 512 / 664)
    left = (SIZE - narrow) // 2
    for wanted, found in zip(npz.images(), jpg.images(), strict=True):
        middle = np.asarray(Image.fromarray(found[:, left : left + narrow]).resize((SIZE, SIZE)))
        inner = slice(SIZE // 5, -SIZE // 5)  # without the dark frame, which looks the same whichever way it is turned
        turned = [np.rot90(middle, k)[inner, inner].ravel() for k in range(4)]
        likeness = [np.corrcoef(wanted[inner, inner].ravel(), picture)[0, 1] for picture in turned]
        assert likeness[0] > 0.85 > 0.7 > max(likeness[1:])
        assert not found[:, : left - 3].any() and found.max() > 200


def test_fairgenmed_codes_are_mapped_by_name_and_both_spellings_are_found(copy):
    tree = copy("fairgenmed")
    for old, new in (("Training", "train"), ("Validation", "val"), ("Test", "test")):
        (tree.root / old).rename(tree.root / new)
    for row in range(2, len(tree.rows) + 1):  # the code of each row's category, in FairGenMed's own order
        text = tree.rows[row - 2]["race"]
        code = {"Asian": "0", "Black": "1", "White": "2", "Black or African American": "1", "White or Caucasian": "2"}
        tree.set(row, "race", code.get(text, text))
    raw = pd.DataFrame(tree.rows[:-1])
    table = tree.prepare().table
    wanted = raw["race"].map({"0": "Asian", "1": "Black", "2": "White"}).value_counts().to_dict()
    assert table["race"].value_counts().to_dict() == wanted and table["language"].eq("English").all()


def test_the_language_of_a_jpg_is_that_of_the_npz_beside_it(copy, tmp_path):
    tree = copy("fairgenmed", "jpg")
    for row, code in ((2, 1), (3, 2), (4, -1)):
        with np.load(_npz(tree, row)) as arrays:
            content = dict(arrays)
        np.savez(_npz(tree, row), **content | {"language": np.array(code)})
    _npz(tree, 5).unlink()
    found = tree.prepare(tmp_path / "jpg").table
    assert found["language"].value_counts().to_dict() == {
        "English": len(found) - 4, "Spanish": 1, "Other": 1, "": 2}  # fmt: skip
    for path in tree.root.rglob("*.npz"):
        path.unlink()
    alone = tree.prepare(tmp_path / "alone").table
    assert alone["language"].eq("").all() and alone.drop(columns="language").equals(found.drop(columns="language"))


def test_non_hispanic_is_not_hispanic(copy):
    tree = copy("chexpert")
    for row in tree.rows:
        row["ETHNICITY"] = "Non-Hispanic/Non-Latino" if row["ETHNICITY"] != "Other" else "Other"
        row["PRIMARY_RACE"] = "White, non-Hispanic" if row["ETHNICITY"] != "Other" else "Other"
    assert set(tree.prepare().table["race"]) == {"White"}
    for row in tree.rows[:2]:  # one patient
        row["ETHNICITY"] = "hispanic/latino "
    assert "Hispanic" in set(tree.prepare().table["race"]), "of any race"


def test_mimic_sentences_become_prompts_and_may_not_name_anybody(copy):
    tree = copy("mimic")
    tree.set(2, "findings", " Large  left\npneumothorax. ")
    assert "Large left pneumothorax." in set(tree.prepare().table["findings"])
    shutil.rmtree(tree.root.parent / "out")
    tree.set(2, "findings", f"Patient {tree.rows[0]['subject_id']} has no finding.")
    assert any("row 2, column final_sentence: repeats an identifier" in line for line in tree.refused())


@pytest.mark.parametrize("text", [
    "Compared with {patient}.", "Seen as p{patient}", "Study {study}: clear.", "Study s{study}: clear.", "({image})",
    "File {image}.jpg.", "See p{patient}/s{study}."])  # fmt: skip
def test_a_sentence_may_not_name_mimics_bare_numbers_where_the_table_has_paths(copy, text):
    tree = copy("mimic")
    first = tree.rows[0]
    bare = {"patient": first["subject_id"].strip("p"), "study": first["study_id"].strip("s")}
    bare["image"] = tree.image(2).stem
    first[tree.head("image")] = str(tree.image(2).relative_to(tree.root))
    for row in tree.rows:
        row["subject_id"], row["study_id"] = f"p{row['subject_id'].strip('p')}", f"s{row['study_id'].strip('s')}"
    tree.set(2, "findings", text.format(**bare))
    tree.set(3, "findings", f"A part of one is none: 1{bare['patient']}, {bare['image']}0.")
    found = [line for line in tree.refused() if "repeats an identifier" in line]
    assert len(found) == 1 and "row 2, column final_sentence" in found[0], found


def test_a_small_number_in_a_sentence_is_no_identifier(copy):
    tree = copy("folder")
    patient, sentence = tree.rows[0][tree.head("patient")], "A 12 mm nodule."
    tree.raw["columns"]["findings"] = {"header": ["sentence"], "optional": True}
    tree.header.append("sentence")
    for row in tree.rows:
        row["sentence"] = ""
        if row[tree.head("patient")] == patient:
            row |= {tree.head("patient"): "12", "sentence": sentence}
    assert (tree.prepare().table["findings"] == sentence).any()
    shutil.rmtree(tree.root.parent / "out")
    for row in tree.rows:
        if row["sentence"]:
            row[tree.head("patient")] = "12-B"
    tree.rows[0]["sentence"] = "Nodule of 12-B."
    assert any("row 2, column sentence: repeats an identifier" in line for line in tree.refused())


def test_a_patient_of_two_races_is_left_out_or_keeps_one_per_image(copy, tmp_path):
    tree = copy("mimic")
    for row in (2, 3, 4):  # the first patient has two images, the second gets to be the same: three rows of one patient
        tree.set(row, "sex", "F")
        tree.set(row, "race", ("OTHER", "WHITE", "ASIAN")[row - 2])
    third, (patient, study) = tree.image(4), (tree.rows[0]["subject_id"], tree.rows[2]["study_id"])
    tree.set(4, "patient", patient)
    tree.set(4, "split", tree.rows[0][tree.head("split")])
    place = tree.root / f"files/p{patient[:2]}/p{patient}/s{study}"
    place.mkdir(parents=True)
    third.rename(place / third.name)
    data = tree.prepare(tmp_path / "strict")
    rejects = pd.read_csv(data.folder / "rejects.csv").set_index("row")["reason"]
    differs = "race differs between rows of the patient"
    assert [rejects.get(f"{tree.file.name}, row {n}") for n in (2, 3, 4)] == [
        "race missing, or none of the categories", differs, differs]  # fmt: skip
    tree.raw["columns"]["race"]["per_patient"] = False
    free = tree.prepare(tmp_path / "free")
    assert len(free.table) >= len(data.table) + 1 and differs not in {e["reason"] for e in free.index["excluded"]}
    tree.raw["columns"]["race"]["per_patient"] = True
    (line,) = [line for line in tree.refused() if "row 4, column ethnicity: differs from row 3, the same" in line]
    assert "per_patient: false" in line and "category_errors: exclude" in line
    tree.set(4, "sex", "M")
    tree.modes("exclude")
    with pytest.raises(DataError, match="row 4, column gender: differs from row 2, the same .* -> correct one of them"):
        tree.prepare()


# --- what is refused ------------------------------------------------------------------------------------------------
def _rename(tree, name):
    tree.header[tree.header.index(tree.head(name))] = "something else"


def _escape(tree):
    text = tree.rows[0][tree.head("image")]
    tree.set(2, "image", f"../tree/{text}")


def _truncate(tree):
    content = tree.image(2).read_bytes()
    tree.image(2).write_bytes(content[: len(content) // 2])


def _placeholder(tree):
    path = tree.image(2)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            content = dict(arrays) | {"slo_fundus": np.zeros((1, 1, 3), np.uint8)}
        np.savez(path, **content)
    elif path.suffix == ".dcm":
        skeleton.save_dicom(np.zeros((1, 1), np.uint16), path, "MONOCHROME2")
    else:
        Image.new("L", (1, 1)).save(path)


def _two_sexes(tree):
    if tree.dataset == "fairgenmed":  # one row per subject: the id stands twice
        tree.rows.insert(1, tree.rows[0] | {tree.head("sex"): "M" if tree.rows[0][tree.head("sex")] == "F" else "F"})
    else:
        texts = {"Male": "Female", "M": "F", "Female": "Male", "F": "M"}
        tree.set(3, "sex", texts[tree.rows[0][tree.head("sex")]])


def _which_differs(tree):
    if tree.dataset == "fairgenmed":
        return "row 3, column filename: same image as row 2"
    return f"row 3, column {tree.head('sex')}: differs from row 2, the same patient"


DEFECTS = {
    "wrong column": (lambda t: _rename(t, "age"), "row 1, column"),
    "age -3": (lambda t: t.set(2, "age", "-3"), "outside 0-120 years"),
    "age 217": (lambda t: t.set(2, "age", "217"), "outside 0-120 years"),
    "unknown race": (lambda t: t.set(2, "race", "Martian"), "unknown category"),
    "Non-Hispanic as race": (lambda t: t.set(2, "race", "Non-Hispanic"), "unknown category"),
    "OTHER": (lambda t: t.set(2, "race", "OTHER"), "missing, or none of the categories"),
    "no race": (lambda t: t.set(2, "race", ""), "missing"),
    "one id, two sexes": (_two_sexes, _which_differs),
    "path with ..": (_escape, "path leaves the data folder"),
    "truncated": (_truncate, "truncated or not"),
    "1x1": (_placeholder, "1x1 pixels: a placeholder"),
    "missing image": (lambda t: t.image(2).unlink(), "image missing"),
}
LET_GO = {
    "age -3": "age outside 0-120 years", "age 217": "age outside 0-120 years", "truncated": "image truncated",
    "OTHER": "race missing, or none of the categories", "no race": "race missing, or none of the categories",
    "1x1": "image 1x1 pixels: a placeholder", "missing image": "image missing",
}  # fmt: skip


@pytest.mark.parametrize("dataset, kind", KINDS)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_or_left_out(copy, capfd, recwarn, dataset, kind, defect):
    tree = copy(dataset, kind)
    names = tree.identifiers()
    if dataset == "chexpert":  # its race counts where the ethnicity does not decide
        tree.rows[0]["ETHNICITY"] = "Non-Hispanic/Non-Latino"
    spoil, says = DEFECTS[defect]
    if defect in LET_GO:
        tree.modes("exclude")
        whole = tree.prepare(tree.root.parent / "whole")
    spoil(tree)
    if defect in LET_GO:
        data = tree.prepare(tree.root.parent / "less")
        new = pd.Series([e["reason"] for e in data.index["excluded"]]).value_counts()
        old = pd.Series([e["reason"] for e in whole.index["excluded"]]).value_counts()
        found = (new.sub(old, fill_value=0)).loc[lambda s: s > 0]
        assert len(found) == 1 and found.index[0].startswith(LET_GO[defect]) and found.iloc[0] == 1
        assert len(data.table) == len(whole.table) - 1
        rejects = pd.read_csv(data.folder / "rejects.csv").set_index("row")["reason"]
        assert rejects[f"{tree.file.name}, row 2"].startswith(LET_GO[defect])
    lines = tree.refused()
    says = says if isinstance(says, str) else says(tree)
    wanted = {"wrong column": "row 1, ", "one id, two sexes": "row 3, "}.get(defect, "row 2, ")
    assert any(says in line and wanted in line and " -> " in line for line in lines), lines
    said = "".join(capfd.readouterr()) + " ".join(str(w.message) for w in recwarn)
    assert not [name for name in names if name in said]


@pytest.mark.parametrize("dataset, kind", [("mimic", ""), ("mimic", "dcm"), ("fairgenmed", "jpg")])
def test_an_image_cut_anywhere_is_noticed_and_not_named(copy, capfd, recwarn, caplog, dataset, kind):
    tree = copy(dataset, kind)
    path = tree.image(2)
    whole = path.read_bytes()
    assert pictures.image_problem(path, slo=dataset == "fairgenmed") is None
    for cut in [*range(0, 1000, 41), len(whole) // 2, len(whole) * 9 // 10]:
        path.write_bytes(whole[:cut])
        assert pictures.image_problem(path, slo=dataset == "fairgenmed"), cut
    said = "".join(capfd.readouterr()) + caplog.text + " ".join(str(w.message) for w in recwarn)
    assert path.stem not in said


@pytest.mark.parametrize("mode", ["exclude", "report"])
@pytest.mark.parametrize("dataset, folders, wanted", [
    ("mimic", "files", "files/pNN"), ("chexpert", "CheXpert-v1.0", "column Path"), ("fairgenmed", "[TV]*", "Training"),
    ("folder", "images", "image column")])  # fmt: skip
def test_images_elsewhere_are_one_line_that_says_what_the_folder_must_hold(copy, dataset, folders, wanted, mode):
    tree = copy(dataset)
    tree.modes(mode)
    for path in list(tree.root.glob(folders)):
        path.rename(tree.root / f"elsewhere-{path.name}")
    with pytest.raises(DataError) as caught:
        tree.prepare()
    first = caught.value.problems[0]
    assert first.startswith(f"files: none of the {len(tree.rows)} images of {tree.file.name} is there -> DATA_ROOT")
    assert wanted in first and not [name for name in tree.identifiers() if name in str(caught.value)]


def test_an_empty_split_says_what_became_of_its_images(copy):
    tree = copy("fairgenmed")
    tree.modes("exclude")
    n = len(list((tree.root / "Validation").glob("*.npz")))
    shutil.rmtree(tree.root / "Validation")
    with pytest.raises(DataError, match=rf"split val: no images left \(left out: {n} image missing, 1 race missing"):
        tree.prepare()


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_link_that_leads_out_is_refused(copy, dataset):
    tree = copy(dataset)
    path, outside = tree.image(2), tree.root.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    tree.raw["image_errors"] = "exclude"  # not even then
    with pytest.raises(DataError, match="link that leaves the data folder"):
        tree.prepare()


@pytest.mark.parametrize("dataset, folder", [("mimic", "files"), ("folder", "images")])
def test_a_top_folder_that_is_a_link_is_reported_once(copy, dataset, folder):
    tree = copy(dataset)
    (tree.root / folder).rename(tree.root.parent / "elsewhere")
    (tree.root / folder).symlink_to(tree.root.parent / "elsewhere")
    tree.raw["image_errors"] = "exclude"  # not even then
    with pytest.raises(DataError) as caught:
        tree.prepare()
    (line,) = caught.value.problems
    assert "row 2, column" in line and "top folder" in line and "bind mount" in line


def test_an_npz_is_never_unpickled(copy):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    tree = copy("fairgenmed")
    for number, name in enumerate(("slo_fundus", "race"), 2):
        with np.load(tree.image(number)) as arrays:
            content = dict(arrays) | {name: np.array([Boom()], dtype=object)}
        np.savez(tree.image(number), **content)
    lines = tree.refused()
    assert any("row 2" in line and "array slo_fundus holds objects" in line for line in lines), lines
    assert any("row 3" in line and "array race holds objects" in line for line in lines), lines


def _npz(tree, row):
    path = tree.image(row)
    return path.with_name(path.stem.replace("slo_fundus", "data") + ".npz")


@pytest.mark.parametrize("kind", ["", "jpg"])
def test_an_npz_that_contradicts_the_table_is_refused(copy, kind):
    tree = copy("fairgenmed", kind)
    with np.load(_npz(tree, 2)) as arrays:
        content = dict(arrays)
    np.savez(_npz(tree, 2), **content | {"race": (int(content["race"]) + 1) % 3})
    assert any("row 2, column race: contradicts race in the NPZ" in line for line in tree.refused())


def test_mimic_patients_and_paths_must_agree(copy):
    tree = copy("mimic")
    tree.set(3, "split", "test")  # the second image of the first patient
    tree.set(5, "image", f"files/p99/p99000000/s99000099/{tree.rows[3]['image']}.jpg")
    lines = tree.refused()
    assert any("row 3, column subject_id: patient in two splits; see row 2" in line for line in lines)
    assert any("row 5, column image: path is not that of its patient and study" in line for line in lines)


def test_mimic_takes_paths_for_ids_and_one_kind_of_image(copy):
    tree = copy("mimic")
    wanted = tree.prepare().table
    for n, row in enumerate(tree.rows, 2):
        row["image"] = f"2.1.0/{tree.image(n).relative_to(tree.root)}"
    found = tree.prepare().table
    assert len(found) == len(wanted) and sorted(found["age_years"]) == sorted(wanted["age_years"])
    path = tree.image(2)
    path.unlink()
    skeleton.save_dicom(np.full((32, 32), 99, np.uint16), path.with_suffix(".dcm"), "MONOCHROME2")
    shutil.rmtree(tree.root.parent / "out")
    assert any("JPG and DICOM are mixed" in line for line in tree.refused())


def test_an_unlisted_error_is_an_error_even_where_rows_are_let_go(copy):
    tree = copy("mimic")
    tree.modes("exclude")
    tree.set(2, "race", "Martian")
    with pytest.raises(DataError, match="row 2, column ethnicity: unknown category"):
        tree.prepare()


def test_all_defects_come_in_one_report(copy):
    tree = copy("folder")
    tree.set(2, "age", "217")
    tree.set(4, "race", "Martian")
    tree.image(6).unlink()
    Image.new("L", (1, 1)).save(tree.image(7))
    found = [next(n for n in (2, 4, 6, 7, 0) if f"row {n}," in line or n == 0) for line in tree.refused()]
    assert found[:2] == [2, 4] and set(found) >= {6, 7}
