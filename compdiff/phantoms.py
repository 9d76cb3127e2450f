"""Generated medical-looking images with known truth: frontal chest radiographs and SLO-like fundus pictures.

These are *phantoms*, drawn by formulas; they show no patient. Every link between an attribute and the picture (EFFECTS) is an
arbitrary teaching signal WITHOUT MEDICAL MEANING: it was chosen so that a small network can read age, sex and race from 64x64
pixels and so that we know the right answer. Race acts only on acquisition-like signals (a faint anti-scatter grid, the brightness
of the collimation border), never on anatomy or pigmentation; an `age x race` or `sex x race` interaction touches those only.

How a picture comes about (all lengths in half-widths of the image, x to the right, y down, both in [-1, 1]; grey in [0, 1]):
  1. one generator per subject, SeedSequence of (seed, SHA-256 of modality and subject): the same in any order, process, size;
  2. parameter = base + scatter*N(0,1) + age + sex + race + labels (+ interaction * pair terms), see `parameters`;
  3. anatomy drawn in normalised coordinates under the subject's shift and rotation, then grid, border, exposure and noise.
A subject's random numbers do not depend on its attributes or labels, so two draws that differ only in `attributes` are a true
counterfactual pair.
"""
import hashlib
from dataclasses import dataclass

import numpy as np

from compdiff import painters
from compdiff.raster import resample

AGES = ("0-18", "18-40", "40-60", "60-80", "80+")
CATEGORIES = {
    "chest": {"age": AGES, "sex": ("Male", "Female"), "race": ("White", "Black", "Asian", "Hispanic")},
    "fundus": {"age": AGES, "sex": ("Male", "Female"), "race": ("White", "Black", "Asian")},
}
AGE_YEARS = ((2, 17), (18, 39), (40, 59), (60, 79), (80, 95))         # drawn uniformly, both ends included

# fmt: off
LABELS = {
    "chest": {name: (0, 1) for name in ("No Finding", "Cardiomegaly", "Pleural Effusion", "Consolidation", "Pneumothorax")},
    "fundus": {"glaucoma": (0, 1),
               "vision_loss": ("normal vision", "mild vision loss", "moderate vision loss", "severe vision loss"),
               "cup_disc": ("normal cup-disc ratio", "abnormal cup-disc ratio"),
               "refraction": ("emmetropia", "mild myopia", "severe myopia", "hyperopia")},
}

# The one table of effects. Rows:
#   base, scatter   value at age position 2.5, Male, no texture; individual standard deviation
#   age             per age step (age position, see `age_position`, minus 2.5); "child" times max(0, 1 - age position)
#   sex             Female minus Male
#   race            one number per race category
#   age x sex       per age step, Female only       }
#   sex x race      Female only, one per category   }  multiplied by the `interaction` dial
#   age x race      per age step, one per category  }
#   label:<name>    added for each value of the label, in the order of LABELS
# Units: lengths in image half-widths; *_contrast, *_shadow, grid_*, border, haze ... in grey (1 = black to white); ratios have none.
EFFECTS = {
    "chest": {
        "base": {"heart_thorax_ratio": .455, "aortic_knob": .095, "rib_contrast": .085, "lung_darkness": .42, "diaphragm": .60,
                 "body_size": 1., "breast_shadow": .0, "shoulder_width": .98, "border": .10, "effusion_height": 0.,
                 "consolidation": 0., "pneumothorax": 0., "grid_vertical": .0, "grid_horizontal": .0,
                 "grid_rising": .0, "grid_falling": .0},
        "scatter": {"heart_thorax_ratio": .008, "aortic_knob": .004, "rib_contrast": .006, "lung_darkness": .012, "diaphragm": .010,
                    "body_size": .015, "breast_shadow": .015, "shoulder_width": .015, "border": .015},
        "age": {"heart_thorax_ratio": .026, "aortic_knob": .022, "rib_contrast": -.026, "lung_darkness": .060, "diaphragm": -.050},
        "child": {"body_size": -.22, "shoulder_width": -.05},
        "sex": {"breast_shadow": .15, "shoulder_width": -.07},
        "race": {"grid_vertical": (.06, 0, 0, 0), "grid_horizontal": (0, .06, 0, 0), "grid_rising": (0, 0, .06, 0),
                 "grid_falling": (0, 0, 0, .06), "border": (-.05, .05, -.05, .05)},
        "age x sex": {"heart_thorax_ratio": -.020, "rib_contrast": .012, "breast_shadow": -.030, "shoulder_width": .025},
        "sex x race": {"border": (.08, -.08, .08, -.08), "grid_vertical": (0, 0, .03, 0), "grid_horizontal": (0, 0, 0, .03)},
        "age x race": {"border": (.03, -.03, -.03, .03), "grid_vertical": (.010, 0, 0, 0), "grid_horizontal": (0, -.010, 0, 0),
                       "grid_rising": (0, 0, -.010, 0), "grid_falling": (0, 0, 0, .010)},
        "label:Cardiomegaly": {"heart_thorax_ratio": (0, .11)},
        "label:Pleural Effusion": {"effusion_height": (0, .34)},
        "label:Consolidation": {"consolidation": (0, .34)},
        "label:Pneumothorax": {"pneumothorax": (0, .16)},
    },
    "fundus": {
        "base": {"cup_disc_ratio": .34, "disc_radius": .185, "vessel_width": .044, "tortuosity": .024, "haze": .21,
                 "nerve_fibre": .13, "macula": .20, "gradient": -.08, "peripheral_darkening": .05, "crescent": 0.,
                 "magnification": 1., "pupil": .89, "border": .10, "grid_vertical": .0, "grid_rising": .0, "grid_falling": .0},
        "scatter": {"cup_disc_ratio": .03, "disc_radius": .006, "vessel_width": .002, "tortuosity": .002, "haze": .018,
                    "nerve_fibre": .012, "macula": .015, "gradient": .02, "peripheral_darkening": .02, "magnification": .01,
                    "pupil": .008, "border": .015},
        "age": {"vessel_width": -.008, "tortuosity": .008, "haze": .08, "nerve_fibre": -.045, "macula": -.070, "pupil": -.045},
        "sex": {"disc_radius": .035, "gradient": .16},
        "race": {"grid_vertical": (.048, 0, 0), "grid_rising": (0, .048, 0), "grid_falling": (0, 0, .048),
                 "border": (-.05, .05, 0)},
        "age x sex": {"vessel_width": .004, "haze": -.04, "gradient": -.04},
        "sex x race": {"border": (.08, -.08, .08), "grid_vertical": (0, 0, .03)},
        "age x race": {"border": (.03, -.03, -.03), "grid_vertical": (.010, 0, 0), "grid_rising": (0, -.010, 0),
                       "grid_falling": (0, 0, .010)},
        "label:glaucoma": {"cup_disc_ratio": (0, .18), "nerve_fibre": (0, -.03)},
        "label:cup_disc": {"cup_disc_ratio": (0, .18)},
        "label:vision_loss": {"peripheral_darkening": (0, .16, .32, .48)},
        "label:refraction": {"crescent": (0, .06, .12, 0), "magnification": (0, -.04, -.10, .10)},
    },
}
# fmt: on


@dataclass(frozen=True)
class Phantom:
    """One drawn image with everything that made it. In `truth`, a side is -1 (left half of the image), +1 (right), 0 (absent)."""
    image: np.ndarray                  # uint8 [size, size]
    attributes: dict[str, str]         # {"age": "40-60", "sex": "Female", "race": "White"}
    age_years: int
    labels: dict[str, int | str]
    truth: dict[str, float]


def draw(modality: str, subject: str, attributes: dict, *, seed: int, size: int = 64, interaction: float = 0.0,
         labels: dict | None = None) -> Phantom:
    """Draw the phantom of one subject; deterministic in all its arguments.

    attributes: category names for age, sex, race. labels: fixes some or all labels, the others are drawn.
    ValueError: unknown modality, category or label, size outside 32..512, interaction outside [0, 1].
    """
    if modality not in CATEGORIES:
        raise ValueError(f"unknown modality {modality!r}: one of {list(CATEGORIES)}")
    if not (32 <= size <= 512 and 0 <= interaction <= 1):
        raise ValueError(f"size must be in 32..512 and interaction in [0, 1], got {size} and {interaction}")
    index = _indices(modality, attributes)
    digest = hashlib.sha256(f"{modality}/{subject}".encode()).digest()
    rng = np.random.default_rng(np.random.SeedSequence([seed, *np.frombuffer(digest[:16], dtype="<u4").tolist()]))
    uniform, normal = rng.random(24), rng.standard_normal(64)
    low, high = AGE_YEARS[index["age"]]
    age_years = low + int(uniform[0] * (high - low + 1))
    labels = _draw_labels(modality, age_position(age_years) - 2.5, uniform[1:5], labels or {})
    truth = parameters(modality, index, age_years, labels, normal[:20], interaction)
    truth |= {"shift_x": .02 * normal[20], "shift_y": .02 * normal[21], "rotation": 3 * (2 * uniform[5] - 1),  # degrees
              "exposure": 1 + .03 * normal[22], "offset": .012 * normal[23]}
    truth |= _sides(modality, labels, uniform[6:12])
    x, y = painters.place(truth, size)
    mottle, grain = (resample(rng.standard_normal((n, n), dtype=np.float32), size) for n in (12, 64))
    image = painters.PAINTERS[modality](x, y, truth, uniform[12:], normal[24:], mottle)
    image = painters.acquire(image, truth, uniform[6:10], grain)
    return Phantom(image, {k: attributes[k] for k in ("age", "sex", "race")}, age_years, labels,
                   {k: float(v) for k, v in truth.items()})


def age_position(years: float) -> float:
    """Age in bins, continuous and increasing: k at the k-th threshold, steepest there and flattest in the middle of a bin."""
    t = np.interp(years, (0, 18, 40, 60, 80, 100), range(6))
    return float(t + .75 * np.sin(2 * np.pi * t) / (2 * np.pi))


def parameters(modality: str, index: dict[str, int], age_years: float, labels: dict, normal: np.ndarray,
               interaction: float) -> dict[str, float]:
    """Evaluate EFFECTS for one subject. normal: [>= number of parameters] standard normal scatter."""
    table, sex, race = EFFECTS[modality], index["sex"], index["race"]
    position = age_position(age_years)
    step, child = position - 2.5, max(0., 1 - position)
    out = {k: v + table["scatter"].get(k, 0.) * normal[i] for i, (k, v) in enumerate(table["base"].items())}
    rows = [("age", step, None), ("child", child, None), ("sex", sex, None), ("race", 1., race),
            ("age x sex", interaction * step * sex, None), ("sex x race", interaction * sex, race),
            ("age x race", interaction * step, race)]
    rows += [(f"label:{k}", 1., LABELS[modality][k].index(v)) for k, v in labels.items()]
    for row, factor, category in rows:
        for name, effect in table.get(row, {}).items():
            out[name] += factor * (effect if category is None else effect[category])
    return out


def _indices(modality: str, attributes: dict) -> dict[str, int]:
    """Category names -> indices; an unknown or missing one raises."""
    if set(attributes) != {"age", "sex", "race"}:
        raise ValueError(f"attributes must name age, sex and race, got {sorted(attributes)}")
    for name, value in attributes.items():
        if value not in CATEGORIES[modality][name]:
            raise ValueError(f"unknown {name} {value!r}: one of {CATEGORIES[modality][name]}")
    return {k: CATEGORIES[modality][k].index(v) for k, v in attributes.items()}


def _draw_labels(modality: str, step: float, u: np.ndarray, fixed: dict) -> dict:
    """Labels of one subject. step: age position - 2.5; u: [4] uniforms; fixed: values the caller prescribes."""
    for name, value in fixed.items():
        if value not in LABELS[modality].get(name, ()):
            raise ValueError(f"unknown label {name}={value!r}: one of {LABELS[modality]}")
    if modality == "chest":
        prevalence = {"Cardiomegaly": .16 + .03 * step, "Pleural Effusion": .15 + .03 * step,
                      "Consolidation": .12 + .01 * step, "Pneumothorax": .09 - .01 * step}
        normal = fixed.get("No Finding") == 1
        found = {k: fixed.get(k, 0 if normal else int(v < p)) for v, (k, p) in zip(u, prevalence.items())}
        out = {"No Finding": int(not any(found.values())), **found}
        if fixed.get("No Finding", out["No Finding"]) != out["No Finding"]:
            raise ValueError(f"No Finding={fixed['No Finding']} contradicts {found}")
        return out
    glaucoma = fixed.get("glaucoma", int(u[0] < .30 + .06 * step))
    shares = {"vision_loss": (.30, .30, .22, .18) if glaucoma else (.70, .18, .08, .04),
              "cup_disc": (.25, .75) if glaucoma else (.90, .10), "refraction": (.45, .25, .12, .18)}
    chosen = (int(np.searchsorted(np.cumsum(p)[:-1], v, side="right")) for v, p in zip(u[1:], shares.values()))
    drawn = {k: LABELS[modality][k][i] for k, i in zip(shares, chosen)}
    return {"glaucoma": glaucoma, **drawn, **fixed}


def _sides(modality: str, labels: dict, u: np.ndarray) -> dict[str, float]:
    """Where the findings are (chest), which eye it is (fundus: +1 = disc in the right half of the image)."""
    side = np.where(u < .5, -1., 1.)
    if modality == "fundus":
        return {"eye": side[0]}
    return {"effusion_side": side[0] * labels["Pleural Effusion"], "pneumothorax_side": side[1] * labels["Pneumothorax"],
            "consolidation_side": side[2] * labels["Consolidation"], "consolidation_y": -.30 + .6 * u[3]}
