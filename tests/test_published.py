"""Published numbers: those of the record and only those, beside ours, with the direction of each comparison."""

import csv

import numpy as np
import pandas as pd
import pytest
from test_tables import SCHEMA, made_up

from compdiff import frames, published, record, rendering, tables
from compdiff.attributes import SCHEMAS
from compdiff.frames import Item

RESULTS = frames.over_seeds(made_up())


def record_rows(**wanted):
    """Rows of the shared record, read here with the csv module."""
    with open(published.PUBLISHED) as file:
        return [r for r in csv.DictReader(file) if all(r[k] == v for k, v in wanted.items())]


def test_published_numbers_are_the_records_and_only_those():
    """Each published cell of Table 1 equals the row of the shared record."""
    rows = record_rows(table="1", modality="fundus", method="compdiff")
    fundus = SCHEMAS["fundus"]
    table = tables.table1(frames.over_seeds(made_up()), fundus, "fundus")
    ours = table[(table["key"] == "hcn") & table["column"].str.endswith("published") & table["value"].notna()]
    want = {("FID", "overall"), ("disease AUROC", "overall"), *(("ES-FID", a) for a in fundus.names)}
    assert sorted(ours["value"]) == sorted(float(r["value"]) for r in rows if (r["metric"], r["group"]) in want)
    other = tables.table1(frames.over_seeds(made_up()), fundus, "heart")
    assert other.loc[other["column"].str.endswith("published"), "value"].isna().all()


@pytest.mark.parametrize("modality", ["chest", "fundus"])
def test_every_published_number_has_its_row(modality):
    table = published.beside(RESULTS, SCHEMAS[modality], modality, "phantoms")
    rows = record_rows(modality=modality)
    assert set(table.loc[table["pairing"] != "", "metric"]) == {"MS-SSIM"}
    once = table[table["pairing"] != "intra-prompt"]
    assert len(once) == len(rows) > 40 and len(table) == len(rows) + sum(r["metric"] == "MS-SSIM" for r in rows)
    for printed, ours in zip(rows, once.to_dict("records"), strict=True):
        assert all(ours[k] == printed[k] for k in ("source", "table", "method", "group", "metric", "caution"))
        assert ours["published"] == float(printed["value"])
        assert pd.notna(ours["ours"]) or ours["note"].startswith("not available: "), "an empty number without a reason"
        assert pd.isna(ours["ours"]) or ours["differs"].startswith("phantoms; ")


def test_our_number_is_the_one_of_the_same_metric_and_group():
    table = published.beside(RESULTS, SCHEMA, "chest", "phantoms").set_index(["metric", "group", "method"])
    fid = table.loc[("FID", "overall", "compdiff")]
    found = fid[["ours", "lo", "hi", "n", "extractor", "seeds"]].to_list()
    assert found == [26.0, 24.0, 28.0, 480, "lite0@96", 1]
    assert table.loc[("ES-FID", "race", "baseline"), "ours"] == 23.0  # 20 + 3
    assert table.loc[("race accuracy", "overall", "baseline"), "ours"] == 0.6
    cell = table.loc[("FID", "60-80 Male White", "compdiff")]
    assert cell["ours"] == 0.04 and cell["differs"] == "phantoms; KID-lite0@96"
    assert cell["note"].startswith("ineligible")
    assert "RadImageNet" in table.loc[("FID-RadImageNet", "overall", "compdiff"), "note"]


def test_the_papers_own_extractor_comes_first_and_its_absence_names_the_remedy():
    rows, remedy = [], "not available: put ResNet50.pt into WEIGHTS"
    for method in ("text", "fairdiffusion", "hcn"):
        base = {"dataset": "chest", "seed": 0, "stage": "judges", "method": method, "setting": "test", "group": "",
                "group_kind": "overall", "n": 480, "n_ref": 480, "note": "", "metric": "FID"}  # fmt: skip
        rows += [base | {"extractor": "inception", "value": 70.0, "lo": 69, "hi": 71, "note": "weights unverified"},
                 base | {"extractor": "radimagenet", "value": np.nan, "note": remedy},
                 base | {"extractor": "biovil", "value": 0.4, "metric": "cosine paired"}]  # fmt: skip
    results = frames.over_seeds(pd.concat([made_up(), record.results(rows)]))
    table = published.beside(results, SCHEMA, "chest", "phantoms").set_index(["metric", "group", "method"])
    assert table.loc[("FID", "overall", "compdiff"), ["ours", "extractor"]].to_list() == [70.0, "inception"]
    assert table.loc[("BioViL", "overall", "compdiff"), "ours"] == 0.4
    assert table.loc[("FID-RadImageNet", "overall", "compdiff"), "note"] == remedy
    assert set(verdicts(results, "FID", "overall").values()) == {"within our noise"}, "the three are equal there"
    text = tables.table1(results, SCHEMA, "chest")
    page = rendering.wide(text, "Judges and extractors from outside")
    assert page.loc["HCN (CompDiff)", "FID-radimagenet (n = 480)"] == "not available", "the remedy stands once, below"
    assert f"FID-radimagenet: {remedy}." in rendering.footnotes(text)
    assert page.loc["HCN (CompDiff)", "cosine paired (biovil) (n = 480)"] == "0.4"


def test_what_is_missing_says_why():
    nih = published.beside(RESULTS, SCHEMAS["nih"], "chest", "real images").set_index(["metric", "group", "method"])
    assert nih.loc[("ES-FID", "race", "baseline"), "note"] == "not available: this dataset has no race"
    assert nih.loc[("FID", "60-80 Male White", "baseline"), "note"] == "not available: this dataset has no such cell"
    alone = published.beside(RESULTS[RESULTS["method"] != "hcn"], SCHEMA, "chest", "phantoms")
    assert alone.loc[alone["method"] == "compdiff", "note"].str.contains("HCN .CompDiff. was not run").any()
    assert published.beside(RESULTS, SCHEMA, "heart", "phantoms").empty


def test_ms_ssim_stands_under_both_readings_with_a_direction_each():
    """The record does not say between which images; intra-prompt has no row in these results, then one of every method."""
    here = published.beside(RESULTS, SCHEMA, "chest", "phantoms").set_index(["metric", "pairing", "method"])
    assert here.loc[("MS-SSIM", "paired", "baseline"), ["ours", "differs"]].to_list() == [0.3, "phantoms; MS-SSIM-3 paired"]
    assert here.loc[("MS-SSIM", "intra-prompt", "baseline"), "note"] == "not available: no MS-SSIM intra-prompt in these results"
    frame = made_up()
    paired = frame[frame["metric"] == "MS-SSIM-3 paired"]
    value = paired["method"].map({"text": 0.2, "fairdiffusion": 0.4, "hcn": 0.3})
    intra = paired.assign(metric="MS-SSIM-3 intra-prompt", value=value, lo=value - 0.01, hi=value + 0.01).dropna(subset="value")
    results = frames.over_seeds(pd.concat([frame, intra]))
    assert set(verdicts(results, "MS-SSIM", "overall", "MS-SSIM read as paired").values()) == {"within our noise"}, "all 0.3"
    found = verdicts(results, "MS-SSIM", "overall", "MS-SSIM read as intra-prompt")
    assert set(found.values()) == {"agrees"}, "printed 0.32, 0.36, 0.33: the same order"
    assert verdicts(results, "MS-SSIM", "overall") == {}
    numbers, pairs = published.beside(results, SCHEMA, "chest", "phantoms"), published.directions(results, SCHEMA, "chest")
    pages = rendering.published_pages(numbers, pairs)
    table = next(iter(pages.values()))
    assert table.loc["figure: MS-SSIM (reading: intra-prompt), overall", "ours"] == "0.2 [0.19, 0.21] / 0.4 [0.39, 0.41] / 0.3 [0.29, 0.31]"
    assert "Direction, MS-SSIM read as paired (published sign: what ours says)" in pages


# --- directions -------------------------------------------------------------------------------------------------------
def with_fid(values, half=1.0, group=("overall", "")):
    """Results in which FID of one group is as given, {method: value}; no controls say whether it can rank."""
    frame = made_up(cells=group[0] == "cell")
    frame = frame[~frame["method"].isin(["vae", "untrained"])]
    for method, value in values.items():
        where = (frame["metric"] == "FID") & (frame["method"] == method)
        where &= (frame["group_kind"] == group[0]) & (frame["group"] == group[1])
        frame.loc[where, ["value", "lo", "hi", "note"]] = [value, value - half, value + half, ""]
    return frames.over_seeds(frame)


def verdicts(results, metric, group, reading=published.EITHER):
    table = published.directions(results, SCHEMA, "chest")
    here = table[(table["metric"] == metric) & (table["group"] == group) & (table["reading"] == reading)]
    return here.set_index(["a", "b"])["verdict"].to_dict()


def test_directions_by_hand():
    """Printed: baseline 82.8 > FairDiffusion 75.1 > CompDiff 64.3."""
    found = verdicts(with_fid({"text": 30, "fairdiffusion": 29, "hcn": 40}), "FID", "overall")
    assert found == {
        ("text", "fairdiffusion"): "within our noise",  # [29, 31] and [28, 30] touch
        ("text", "hcn"): "disagrees",
        ("fairdiffusion", "hcn"): "disagrees",
    }
    same = verdicts(with_fid({"text": 30, "fairdiffusion": 20, "hcn": 10}), "FID", "overall")
    assert set(same.values()) == {"agrees"}
    bare = verdicts(with_fid({"text": 30, "fairdiffusion": 20, "hcn": 40}, half=np.nan), "FID", "overall")
    assert list(bare.values()) == ["agrees, no claim", "disagrees, no claim", "disagrees, no claim"]
    assert verdicts(RESULTS, "race accuracy", "overall")["text", "fairdiffusion"] == "equal in print"


def test_a_distance_that_cannot_rank_supports_no_claim():
    values = {"text": 30, "fairdiffusion": 20, "hcn": 10}
    rows = with_fid(values)
    end = Item("quality", "FID").of(rows, "text")
    ends = lambda vae, untrained: pd.DataFrame([end | {"method": m, "value": v, "lo": v - 1, "hi": v + 1}  # noqa: E731
                                                for m, v in (("vae", vae), ("untrained", untrained))])  # fmt: skip
    clear = verdicts(pd.concat([rows, ends(1, 99)]), "FID", "overall")
    assert set(clear.values()) == {"agrees"}
    unclear = pd.concat([rows, ends(15, 99)])  # the autoencoder's is above HCN's
    assert verdicts(unclear, "FID", "overall") == {
        ("text", "fairdiffusion"): "agrees", ("text", "hcn"): "agrees, no claim", ("fairdiffusion", "hcn"): "agrees, no claim"
    }  # fmt: skip
    table = published.directions(unclear, SCHEMA, "chest")
    here = table[(table["metric"] == "FID") & (table["group"] == "overall")]
    assert (here["rests on"].str.contains("FID cannot rank here") == here["b"].eq("hcn")).all()


def test_both_readings_of_the_sex_names():
    """Our order agrees for women only: the printed cell of men agrees when the names are swapped, and only then."""
    values = {"text": 30, "fairdiffusion": 20, "hcn": 10}
    here = with_fid(values, group=("cell", "60-80 Female White"))
    there = with_fid({k: 40 - v for k, v in values.items()}, group=("cell", "60-80 Male White"))
    both = pd.concat([here[here["group"] != "60-80 Male White"], there[there["group"] == "60-80 Male White"]])
    printed = verdicts(both, "FID", "60-80 Male White", published.AS_PRINTED)
    other = verdicts(both, "FID", "60-80 Male White", published.SWAPPED)
    assert set(printed.values()) == {"disagrees"} and set(other.values()) == {"agrees"}
    assert published.swapped("80+ Female Asian") == "80+ Male Asian"
    assert published.swapped("80+ Male Asian") == "80+ Female Asian"


def test_small_cells_support_no_claim():
    found = published.directions(RESULTS, SCHEMA, "chest")
    cells = found[found["group"] == "60-80 Male White"]
    assert set(cells["verdict"]) <= {"within our noise", "agrees, no claim", "disagrees, no claim"}
    assert cells["rests on"].str.contains("KID").all() and cells["rests on"].str.contains("ineligible").all()


def test_tallies_count_every_pair_once():
    pairs = published.directions(RESULTS, SCHEMA, "chest")
    total = sum(published.tally(pairs, r).to_numpy().sum() for r in pairs["reading"].unique())
    assert total == len(pairs) and set(pairs["verdict"]) <= set(published.VERDICTS)


def test_pages_hold_every_printed_number(tmp_path):
    numbers = published.beside(RESULTS, SCHEMA, "chest", "phantoms")
    pages = rendering.published_pages(numbers, published.directions(RESULTS, SCHEMA, "chest"))
    table = next(iter(pages.values()))
    assert table.loc["2: FID (ours: KID), 60-80 Male White", "ours"].startswith("KID 0.04 [")
    assert table.loc["1: FID, overall", "ours"].startswith("20.0 [") and "1: ES-FID, sex" in table.index
    assert any(p.endswith("(published sign: what ours says)") for p in pages)
    rendering.write_pages(numbers, pages, tmp_path, "published", "Published & ours", [published.SEX_NAMES])
    md, tex = (tmp_path / "published.md").read_text(), (tmp_path / "published.tex").read_text()
    assert "82.8 (2.20) / 75.1 (0.1) / 64.3 (0.3)" in md and "82.8 (2.20) / 75.1 (0.1) / 64.3 (0.3)" in tex
    assert len(next(iter(pages.values()))) == numbers.groupby(["table", "metric", "group", "pairing"]).ngroups
    assert tex.count(r"\begin{tabular}") == md.count("\n## ") == len(pages) and "may be swapped" in md
    again = pd.read_csv(tmp_path / "published.csv")
    assert np.allclose(again.loc[again["pairing"] != "intra-prompt", "published"], [float(r["value"]) for r in record_rows(modality="chest")])
    rendering.write_pages(numbers.iloc[:0], {}, tmp_path, "published", "")
    assert not list(tmp_path.iterdir())
