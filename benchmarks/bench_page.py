"""The page of `make bench`: its table as Markdown, with what the numbers mean."""

from __future__ import annotations

import pandas as pd

from compdiff.datasheet import markdown

RESAMPLES = 1000  # patient bootstraps of a KID


def page(table: pd.DataFrame) -> str:
    """The table as Markdown, with what its numbers mean."""
    first = table.iloc[0]
    told = []
    for _, r in table.iterrows():
        numbers = cell(r, "ours"), cell(r, "theirs"), compared(r), judgement(r)
        told.append((r["what"], r["baseline"], r["unit"], *numbers, r["images"], r["repeats"]))
    header = ("what", "against", "unit", "ours", "theirs", "ratio or difference", "goal", "images", "repeats")
    return "\n".join([
        "# Speed of the steps of a run, beside plain baselines", "",
        f"Written by `make bench` from `bench.csv`: {first['cpu']}, {first['cores']} cores, {first['threads']} threads,"
        f" torch {first['torch']}, diffusers {first['diffusers']}; the shipped tiny base, 64 x 64 pixels, chest "
        "phantoms. All on the CPU, also where there is a GPU.", "",
        "The two of a row ran in turn, in one process. images/s: the median call [the slowest, the fastest], and their "
        "ratio [over all turns]; a goal is one of the ratio of the medians. Without brackets: not recorded.", "",
        "Training: our loop clips gradients, averages weights, and draws noise that neither processes nor restarts "
        "change; the diffusers-style step does none of this, but for the row that says clip + EMA, and it never has an "
        "HCN. Only the first batch is judged, as a rule the demo's.", "",
        "KID: images for test prompts against the real images of these prompts "
        f"[95 % by {RESAMPLES:,} patient bootstraps], and the difference; lower is better, and the goal is only that the "
        "difference's interval reaches down to 0: ours is not shown to be worse, and the upper end says how much worse it "
        "may be. Both samplers have the weights of one training of "
        f"{first['trained_steps']:,} steps: they are judged, not the model.", "",
        *markdown(header, told), *ceiling(table), *hours(table),
    ])  # fmt: skip


def ceiling(table: pd.DataFrame) -> list[str]:
    """What the goals of a training step leave room for: how much faster than each baseline the bare UNet is, in lines."""
    text = table[table["what"] == "training step, text"].set_index("baseline")
    floor = text[text.index.str.startswith("the UNet alone")]["theirs"]
    if floor.empty:
        return []
    goals = text["theirs"][text["goal"].notna()]
    most = ", ".join(f"{floor.iloc[0] / theirs:.2f} against {name}" for name, theirs in goals.items())
    return [
        "The UNet's passes alone, without which no step learns, bound the ratio that a loop around the same UNet can "
        f"reach: {most}. Only a faster UNet goes beyond.\n"
    ]  # fmt: skip


def hours(table: pd.DataFrame) -> list[str]:
    """What the preparation of many images takes at the rate of its row, in lines."""
    rates = table["ours"][table["what"].str.startswith("preparing")]
    return [
        f"At {rate:.3g} images/s one core prepares 60,000 such files in {60_000 / rate / 3600:.2g} hours and 10 "
        f"million in {10_000_000 / rate / 3600:.3g}; n cores take an n-th of it, as long as the disk keeps up.\n"
        for rate in rates
    ]  # fmt: skip


def compared(r: pd.Series) -> str:
    """Ratio, difference, or why there is none."""
    if pd.notna(r.get("note")):
        return r["note"]
    return cell(r, "ratio") if pd.notna(r.get("ratio")) else cell(r, "difference")


def judgement(r: pd.Series) -> str:
    return f"{r['goal']}: {r['met']}" if pd.notna(r.get("goal")) else ""


def cell(r: pd.Series, name: str) -> str:
    text = ["-" if pd.isna(v) else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"
            for v in (r.get(f"{name}{end}") for end in ("", "_lo", "_hi"))]  # fmt: skip
    return text[0] if text[1] == "-" else f"{text[0]} [{text[1]}, {text[2]}]"
