"""Result frames: what is told from several rows of one seed, seeds combined, and one number looked up. No torch.

In: rows of record.RESULT_COLUMNS. Out of `over_seeds`: one row per number, with its mean, deviation and interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from compdiff import config, record

NOT_AVAILABLE = "not available"
CONTROLS = {
    "real_test": "Real test images (the judge's own score)",
    "real_train": "Real training images (floor)",
    "vae": "Autoencoder only",
    "untrained": "Untrained",
    "shuffled": "Shuffled attributes",
    "copy": "Copy of the training set",
}
TITLES = {key: method.title for key, method in config.METHODS.items()} | CONTROLS
REAL_TEST = {  # titles of real_test in stages where no judge scores it
    "memorisation": "Real test images (no copies: the control)",
    "measured": "Real test images (measured against themselves)",
    "probe": "Real test images (the probe's own score)",
}
IDENTITY = [c for c in record.RESULT_COLUMNS if c not in ("seed", "value", "lo", "hi", "n", "n_ref", "note")]
COLUMNS = [*IDENTITY, "value", "lo", "hi", "std", "seeds", "n", "n_ref", "note"]  # of `over_seeds`
COMPARED = ("quality", "alignment", "judges")  # stages whose numbers are also told as differences between methods


# --- one seed: rows told from other rows --------------------------------------------------------------------------
def with_differences(frame: pd.DataFrame) -> pd.DataFrame:
    """The results and "<metric> minus <method>" of every pair of methods and seed, where no row of that name exists.

    Methods of one seed share data, requests and judges, so their difference varies less than either of them. These
    rows have no interval of their own: only several seeds give them one, which counts other trainings, not other patients
    (notebook 06 brings differences of FID, KID and accuracies whose interval counts patients).
    """
    here = frame[frame["stage"].isin(COMPARED) & (frame["setting"] == "test") & frame["value"].notna()]
    same = ["dataset", "seed", "stage", "setting", "group_kind", "group", "metric", "extractor"]
    parts = [frame]
    for a, b in combinations([m for m in config.METHODS if (here["method"] == m).any()], 2):
        pair = here[here["method"] == a].merge(here[here["method"] == b], on=same, suffixes=("", "_b"))
        there = frame[(frame["stage"] == "difference") & frame["method"].isin((a, b))]
        which = ["metric", "group_kind", "group", "extractor"]
        known = set(there[which].itertuples(index=False, name=None))
        names = pair[which].itertuples(index=False, name=None)
        pair = pair[[not {(f"{m} minus {x}", *where) for x in (a, b)} & known for m, *where in names]]
        if len(pair):
            pair = pair.assign(value=pair["value"] - pair["value_b"], metric=pair["metric"] + f" minus {b}", lo=np.nan,
                               hi=np.nan, stage="difference", n=pair[["n", "n_b"]].min(axis=1), note="")  # fmt: skip
            parts.append(pair[list(record.RESULT_COLUMNS)])
    return pd.concat(parts, ignore_index=True)


# --- several seeds --------------------------------------------------------------------------------------------------
def is_p_value(metric: pd.Series) -> pd.Series:
    """Which metrics are p-values, named as "p (bootstrap, Holm) macro AUROC minus 1a"?"""
    return metric.str.startswith("p (")


def with_unseen(frame: pd.DataFrame) -> pd.DataFrame:
    """The results and, of every seed, accuracy and KID of held-out cells minus those of seen ones: stage "unseen".

    Of one training both, so over several seeds they are paired. Held-out and seen cells are of different patients: the
    interval of one seed's difference is that of independent numbers (square-and-add, as `unseen.apart_by`).
    """
    here = frame[(frame["group_kind"] == "held_out") & frame["value"].notna()]
    here = here[(here["stage"] + " " + here["metric"]).isin(["alignment accuracy", "quality KID"])]
    same = ["dataset", "seed", "method", "setting", "metric", "extractor"]
    held, seen = (here[here["group"] == group] for group in ("held_out", "seen"))
    pair = held.merge(seen[[*same, "value", "lo", "hi", "n"]], on=same, suffixes=("", "_b"))
    value = pair["value"] - pair["value_b"]
    down = np.hypot(pair["value"] - pair["lo"], pair["hi_b"] - pair["value_b"])
    up = np.hypot(pair["hi"] - pair["value"], pair["value_b"] - pair["lo_b"])
    pair = pair.assign(value=value, lo=value - down, hi=value + up, stage="unseen", note="", group_kind="overall",
                       group="", n=pair[["n", "n_b"]].min(axis=1))  # fmt: skip
    return pd.concat([frame, pair[list(record.RESULT_COLUMNS)]], ignore_index=True) if len(pair) else frame


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per number (COLUMNS): mean, standard deviation (n - 1), number of seeds, 95 % interval, smallest n.

    The interval of one seed is the one that its row brought (resampled patients). Of two or more it counts other
    trainings, by Student's interval of the seeds' values, +- t(n - 1) std / sqrt(n), and other patients, by the mean of
    the seeds' own: all are judged on the same test patients, whose luck no further seed averages out. The two are
    independent, so their half-widths add in squares; rows without an interval count trainings alone. Where all
    seeds give one value the rows' own interval stays. p-values
    of several seeds give twice their mean, at most 1, which is a p-value whatever their dependence (Rueschendorf
    1982). For several seeds differences between methods, and of held-out from seen cells, are added. Notes that differ:
    `note_of_one_seed`. ValueError when a seed holds a number twice.
    """
    frame = with_unseen(with_differences(frame)) if frame["seed"].nunique() > 1 else frame
    twice = frame.duplicated([*IDENTITY, "seed"])
    if twice.any():
        raise ValueError(f"the results hold a number twice: {frame.loc[twice.idxmax(), IDENTITY].to_dict()}")
    frame = frame.assign(below=frame["value"] - frame["lo"], above=frame["hi"] - frame["value"])
    groups = frame.groupby(IDENTITY, sort=False, dropna=False)
    table = groups.agg(below=("below", "mean"), above=("above", "mean"),
                       value=("value", "mean"), std=("value", "std"), seeds=("value", "count"), lo=("lo", "min"),
                       hi=("hi", "max"), n=("n", "min"), n_ref=("n_ref", "min"), notes=("note", "nunique"))  # fmt: skip
    table = table.reset_index()
    table["note"] = note_of_one_seed(frame.assign(number=groups.ngroup()), table["notes"].to_numpy() > 1)
    many = table["seeds"] > 1
    p = many & is_p_value(table["metric"])
    half = stats.t.ppf(0.975, (table["seeds"] - 1).where(many)) * table["std"] / np.sqrt(table["seeds"])
    vary = many & (table["std"] > 1e-9 * table["value"].abs())
    table["lo"] = table["lo"].where(~vary, table["value"] - np.hypot(half, table["below"].fillna(0)))
    table["hi"] = table["hi"].where(~vary, table["value"] + np.hypot(half, table["above"].fillna(0)))
    table.loc[p, "value"] = np.minimum(2 * table.loc[p, "value"], 1)
    table.loc[p, ["std", "lo", "hi"]] = np.nan
    return table[COLUMNS]


def note_of_one_seed(frame: pd.DataFrame, differ: np.ndarray) -> np.ndarray:
    """The note of each number: the first seed's that has one, an ineligible one's before all others. Where the seeds'
    notes differ, it ends with its seed: "s = 0.09 (seed 0)".

    frame: rows of all seeds with the column `number`, 0 to N - 1; differ: bool [N].
    """
    rank = np.where(frame["note"].str.startswith("ineligible"), 0, np.where(frame["note"] != "", 1, 2))
    first = frame.assign(rank=rank).sort_values(["number", "rank", "seed"]).drop_duplicates("number")
    return np.where(differ, first["note"] + " (seed " + first["seed"].astype(str) + ")", first["note"])


# --- one number -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Item:
    """Which number of the results a column shows, and which published number stands beside it."""

    stage: str
    metric: str
    kind: str = "overall"
    group: str = ""
    setting: str = "test"
    paper: tuple[str, str] | None = None  # metric and group in published_results.csv; None = no published column
    extractor: str = ""  # "" = the first that the results hold

    def rows(self, results: pd.DataFrame) -> pd.DataFrame:
        """The rows of `over_seeds` of all methods."""
        found = results
        for column, wanted in (("metric", self.metric), ("group", self.group), ("group_kind", self.kind),
                               ("stage", self.stage), ("setting", self.setting)):  # fmt: skip
            found = found[found[column] == wanted]
        return found[found["extractor"] == self.extractor] if self.extractor else found

    def of(self, results: pd.DataFrame, method: str) -> dict[str, object] | None:
        """The row of `over_seeds` for one method, None where there is none."""
        found = self.rows(results)
        found = found[found["method"] == method]
        return found.iloc[0].to_dict() if len(found) else None

    def label(self, results: pd.DataFrame) -> str:
        """FID-lite0@96, ES-FID-lite0@96 sex, sex accuracy, cosine paired (biovil) ..."""
        here = results[(results["stage"] == self.stage) & (results["metric"] == self.metric)]
        known = [e for e in here["extractor"].unique() if e and e != "pixels"] if self.stage == "quality" else []
        extractor = self.extractor or "".join(known[:1])
        metric = " ".join(reversed(self.metric.split(":", 1)))  # accuracy:sex -> sex accuracy
        kind = "" if self.kind in ("overall", "cell") else self.kind
        if extractor and self.stage == "judges" and metric not in ("FID", "KID"):
            metric = f"{metric} ({extractor})"
        elif extractor:
            metric = f"{metric}-{extractor}"
        return " ".join(filter(None, [metric, kind]))


def methods_in(results: pd.DataFrame, stages: Sequence[str]) -> list[str]:
    """Methods, then controls, that the results of these stages hold, in the order of TITLES."""
    held = set(results.loc[results["stage"].isin(stages), "method"])
    return [m for m in TITLES if m in held]


def trained(results: pd.DataFrame, stages: Sequence[str] = COMPARED) -> list[str]:
    """The methods among `methods_in`, without controls."""
    return [m for m in methods_in(results, stages) if m in config.METHODS]


def known(*rows: dict | None) -> bool:
    """Is there a value in every row?"""
    return all(r is not None and pd.notna(r["value"]) for r in rows)


def title(key: str, stage: str) -> str:
    """A method's or control's title, in the words of a stage."""
    return REAL_TEST.get(stage, TITLES[key]) if key == "real_test" else TITLES[key]


def incomparable(results: pd.DataFrame, item: Item, row: dict | None) -> str:
    """ "at n = 43: not comparable" of a size-matched number that no method has at that n, else "".

    FID's bias hangs on n: a control with fewer images in its smallest group is compared at fewer.
    """
    if "matched" not in item.metric or not known(row):
        return ""
    ours = item.rows(results)
    ours = ours[ours["method"].isin(config.METHODS) & ours["value"].notna()]
    return "" if ours.empty or row["n"] in set(ours["n"]) else f"at n = {row['n']:.0f}: not comparable"


def has_interval(row: dict | None) -> bool:
    return row is not None and pd.notna(row["lo"]) and pd.notna(row["hi"])


# --- which side is better --------------------------------------------------------------------------------------------
LOWER = ("FID", "KID", "RMSE", "MAE", "ECE", "gap", "std ", "range ", "underdiagnosis", "difference:",
         "suspected copies")  # fmt: skip
HIGHER = ("accuracy", "AUROC", "AUPRC", "F1", "precision", "recall", "density", "coverage", "cosine")


def better_is(metric: str) -> str:
    """lower | higher, by a metric's or its label's name; "" where neither is better in itself."""
    name = metric.split(" by ")[0]
    if any(word in name for word in LOWER):
        return "lower"
    return "higher" if any(word in name for word in HIGHER) else ""


def beside(metric: str) -> str:
    """" (lower is better)", or "" where nobody can say."""
    return f" ({better_is(metric)} is better)" if better_is(metric) else ""


def worth(word: str, metric: str) -> str:
    """above -> "above (worse)", where lower is better; other words as they are."""
    good = {"lower": "below", "higher": "above"}.get(better_is(metric), "")
    return f"{word} ({'better' if word == good else 'worse'})" if good and word in ("above", "below") else word


# --- differences between two methods ----------------------------------------------------------------------------------
def word_of(difference: dict) -> str:
    """above | below | within noise (its interval holds 0) | cannot be said (it has none)."""
    if not has_interval(difference):
        return "cannot be said"
    if difference["lo"] <= 0 <= difference["hi"]:
        return "within noise"
    return "above" if difference["value"] > 0 else "below"


def difference(results: pd.DataFrame, item: Item, a: str, b: str) -> dict[str, object] | None:
    """The row "item of a minus item of b", whichever way round the results hold it; None where they hold neither."""
    own = item.of(results, a) or {}
    there = {"kind": item.kind, "group": item.group, "setting": item.setting, "extractor": own.get("extractor", "")}
    for first, second, sign in ((a, b, 1), (b, a, -1)):
        row = Item("difference", f"{item.metric} minus {second}", **there).of(results, first)
        if row is not None and pd.notna(row["value"]):
            ends = sorted((sign * row["lo"], sign * row["hi"])) if has_interval(row) else (np.nan, np.nan)
            return row | {"value": sign * row["value"], "lo": ends[0], "hi": ends[1], "method": a}
    return None


def apart(x: dict, y: dict) -> bool:
    """Do two intervals not touch? A number without interval is a point; equal values are never apart."""
    (x_lo, x_hi), (y_lo, y_hi) = ((r["lo"], r["hi"]) if has_interval(r) else (r["value"],) * 2 for r in (x, y))
    return bool(x_lo > y_hi or y_lo > x_hi)


def ranks(results: pd.DataFrame, metric: str, method: str) -> bool | None:
    """Can a distance of stage "quality" rank a method? Only between clear ends: the autoencoder's clearly below it, the
    untrained model's clearly above; None where one of the three is missing."""
    ours, vae, untrained = (Item("quality", metric).of(results, m) for m in (method, "vae", "untrained"))
    if not known(ours, vae, untrained):
        return None
    between = vae["value"] < ours["value"] < untrained["value"]
    return bool(between and apart(ours, vae) and apart(ours, untrained))


def reads(judge: dict, chance: dict) -> bool:
    """Does a judge see anything: is its interval on real test images wholly above that of shuffled attributes?"""
    return judge["value"] > chance["value"] and apart(judge, chance)


@dataclass(frozen=True)
class Verdict:
    """A pair of methods in one number. word: above | below | within noise | cannot be said; sign: of a minus b."""

    word: str
    sign: int
    rests_on: str
    paired: dict | None = None


def verdict(results: pd.DataFrame, item: Item, a: str, b: str) -> Verdict:
    """Is a's number above b's? A difference with an interval decides (within noise: it holds 0); else two intervals
    that touch are within noise, the more cautious rule; without intervals only the sign is known."""
    x, y = item.of(results, a), item.of(results, b)
    if not known(x, y):
        return Verdict("cannot be said", 0, NOT_AVAILABLE)
    pair = difference(results, item, a, b)
    sign = int(np.sign(x["value"] - y["value"]))
    side = "above" if sign > 0 else "below"
    if has_interval(pair):
        return Verdict(word_of(pair), sign, "difference", pair)
    if not (has_interval(x) and has_interval(y)):
        return Verdict("cannot be said", sign, "no interval: sign only")
    if apart(x, y):
        return Verdict(side, sign, "intervals do not touch")
    return Verdict("within noise", sign, "intervals touch")
