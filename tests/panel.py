"""A test set of random cells whose features depend on the cell, and a generated set for it."""


import numpy as np
import pandas as pd

from compdiff import evaluate
from compdiff.attributes import AGE, SEX, Schema

SCHEMA = Schema((AGE, SEX))
CELLS = SCHEMA.cells()
HELD = (1, 1)


def people(n, seed, without=None, per_patient=1):
    """A table of n images with random cells, and features [n, 8] that depend on the cell."""
    rng = np.random.default_rng(seed)
    cells = rng.choice([i for i, c in enumerate(CELLS) if c != without], n)
    names = [SCHEMA.decode(CELLS[i]) for i in cells]
    table = pd.DataFrame(names).assign(
        id=[f"{seed}-{i}" for i in range(n)], cell=cells, age_years=rng.integers(2, 95, n),
        patient=[f"p{seed}-{i // per_patient}" for i in range(n)], y_spot=rng.integers(0, 2, n))  # fmt: skip
    shift = np.array([CELLS[i] for i in cells])
    features = rng.normal(size=(n, 8)) + np.pad(shift, ((0, 0), (0, 6)))
    images = rng.integers(0, 256, (n, 32, 32)).astype(np.uint8)
    return table, features, images


def make_reference(n=200, seed=0, per_patient=1):
    rows, features, images = people(n, seed, per_patient=per_patient)
    masks = {("overall", ""): np.ones(n, bool)}
    masks |= {("sex", s): (rows["sex"] == s).to_numpy() for s in SEX.categories}
    masks |= {("cell", SCHEMA.cell_name(c)): (rows["cell"] == i).to_numpy() for i, c in enumerate(CELLS)}
    return evaluate.Reference(rows, images, features, masks, SCHEMA, "lite0")


def value(rows, metric, key=("overall", "")):
    (found,) = [r for r in rows if r["metric"] == metric and (r["group_kind"], r["group"]) == key]
    return found


def fake(ref, method="hcn", seed=5):
    rng = np.random.default_rng(seed)
    features = ref.features + rng.normal(size=ref.features.shape)
    return evaluate.ImageSet(method, ref.images[::-1], features, ref.patients, np.arange(len(ref.rows)))


def oracle(rows, wrong=0):
    """A judge that reads the requests, and errs on the first `wrong` sexes; ages 10 years off."""
    sex = np.eye(2)[[SEX.index(s) for s in rows["sex"]]]
    sex[:wrong] = 1 - sex[:wrong]
    return {"age": np.eye(5)[[AGE.index(a) for a in rows["age"]]], "sex": sex,
            "age_years": rows["age_years"].to_numpy(float) + 10, "labels": rows[["y_spot"]].to_numpy(float)}  # fmt: skip
