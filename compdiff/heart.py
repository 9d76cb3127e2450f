"""Generated cardiac MRI with known truth: short-axis and four-chamber cine pictures, exact masks, ejection fraction.

These are *phantoms*, drawn by formulas; they show no patient. Every link between sex, age, BMI or heart failure and the
picture (EFFECTS) is an arbitrary teaching signal WITHOUT MEDICAL MEANING; only the ranges are those of real hearts.

Lengths in mm; the picture shows 140 x 140 mm, x to the right, y down, origin in the middle; grey in [0, 1]. Masks:
0 background (atria and muscle of the right ventricle too), 1 left-ventricle cavity with its papillary muscles,
2 myocardium of the left ventricle, 3 right-ventricle cavity; 1 and 2 as in the Sunnybrook files. Geometry:
  - `level` l runs along the left ventricle: 0 the mid slice, 1 the apex, negative towards the base;
    radii scale with sqrt(1 - l^2);
  - the cavity's area falls from A_ED to A_ES = (1 - EF) A_ED in every slice and its length is constant, so the ejection
    fraction of the volume is the one of each slice's areas; the myocardium's area is constant, so it thickens;
  - `time` in [0, 1) of the heart beat: 0 is end-diastole (ED), SYSTOLE is end-systole (ES).
A subject's random numbers do not depend on its attributes or label: draws that differ only in those are
counterfactual pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from compdiff.attributes import AGE_BINS
from compdiff.phantoms import AGE_YEARS
from compdiff.raster import blob, edge, grid, resample

FIELD = 70.0  # mm, half the side of the picture
SYSTOLE = 0.35  # time of end-systole
TIMES = {"ED": 0.0, "ES": SYSTOLE}
BASE_LEVEL, APEX_LEVEL = -0.45, 0.90  # levels of a stack's first and last slice
VIEWS = ("short_axis", "four_chamber")
BACKGROUND, CAVITY, MYOCARDIUM, RIGHT = 0, 1, 2, 3  # mask values
CATEGORIES = {"age": AGE_BINS, "sex": ("Male", "Female"), "bmi": ("normal", "overweight", "obese")}
BMI_RANGE = {"normal": (18.5, 24.9), "overweight": (25.0, 29.9), "obese": (30.0, 39.9)}  # kg/m2, drawn uniformly

# The one table of effects. Rows:
#   base, scatter        value of a healthy 60-year-old man of BMI 25; individual standard deviation
#   age, sex, bmi        per decade above 60; Female minus Male; per 5 kg/m2 above 25
#   heart failure        added if present
#   sex x heart failure  added to women with heart failure, times the `interaction` dial
#   age x heart failure  added per decade above 60 to patients with heart failure, times that dial
# Units: radii and thicknesses in mm at ED, ejection_fraction a fraction, contrast (blood - muscle) and noise grey.
# Scatter is large beside heart failure's effects on purpose: the diagnosis shows in most pictures, not in all, so that a
# classifier of real phantoms has something left to gain from augmentation.
# fmt: off
EFFECTS = {
    "base": {"cavity_radius": 23.5, "wall_thickness": 9.0, "ejection_fraction": .62, "right_radius": 24.0,
             "contrast": .46, "chest_fat": 10.0, "noise": .020},
    "scatter": {"cavity_radius": 1.8, "wall_thickness": .6, "ejection_fraction": .07, "right_radius": 1.5,
                "contrast": .02, "chest_fat": 1.5, "noise": .002},
    "age": {"wall_thickness": .5, "contrast": -.035},
    "sex": {"cavity_radius": -2.5, "wall_thickness": -1.5, "chest_fat": 4.0},
    "bmi": {"wall_thickness": .4, "cavity_radius": .5, "chest_fat": 6.0, "noise": .006},
    "heart failure": {"cavity_radius": 2.5, "wall_thickness": -.4, "ejection_fraction": -.16, "contrast": -.015},
    "sex x heart failure": {"cavity_radius": -1.2, "wall_thickness": .6, "ejection_fraction": .06},
    "age x heart failure": {"cavity_radius": -.3, "ejection_fraction": .012},
}
# fmt: on
LIMITS = {
    "ejection_fraction": (0.08, 0.80),
    "wall_thickness": (4.0, 20.0),
    "cavity_radius": (14.0, 40.0),
    "contrast": (0.15, 0.7),
}


@dataclass(frozen=True)
class Heart:
    """One subject: who it is, its true parameters (names of EFFECTS, and position), and its random textures."""

    subject: str
    attributes: dict[str, str]  # {"age": "60-80", "sex": "Female", "bmi": "obese"}
    age_years: int
    bmi: float  # kg/m2
    labels: dict[str, int]  # {"heart failure": 0 or 1}
    truth: dict[str, float]
    seed: int


def draw(subject: str, attributes: dict, labels: dict, *, seed: int, interaction: float = 0.0) -> Heart:
    """The heart of one subject; deterministic in all its arguments.

    attributes: category names for age, sex and bmi; labels: {"heart failure": 0 or 1}.
    ValueError: unknown or missing attribute, category or label; interaction outside [0, 1].
    """
    if set(attributes) != set(CATEGORIES):
        raise ValueError(f"attributes must name {sorted(CATEGORIES)}, got {sorted(attributes)}")
    for name, value in attributes.items():
        if value not in CATEGORIES[name]:
            raise ValueError(f"unknown {name} {value!r}: one of {CATEGORIES[name]}")
    if set(labels) != {"heart failure"} or labels["heart failure"] not in (0, 1):
        raise ValueError(f"labels must be {{'heart failure': 0 or 1}}, got {labels}")
    if not 0 <= interaction <= 1:
        raise ValueError(f"interaction must be in [0, 1], got {interaction}")
    rng = _generator(seed, subject)
    uniform, normal = rng.random(8), rng.standard_normal(24)
    low, high = AGE_YEARS[AGE_BINS.index(attributes["age"])]
    age_years = low + int(uniform[0] * (high - low + 1))
    low, high = BMI_RANGE[attributes["bmi"]]
    bmi = round(low + uniform[1] * (high - low), 1)
    female, failing = int(attributes["sex"] == "Female"), labels["heart failure"]
    truth = parameters(age_years, female, bmi, failing, normal[:10], interaction)
    truth |= {
        "shift_x": 2.0 * normal[10],
        "shift_y": 2.0 * normal[11],
        "rotation": 6 * (2 * uniform[2] - 1),  # mm, degrees
        "oblong": 1 + 0.03 * normal[12],
        "exposure": 1 + 0.05 * normal[13],
        "dome": 2.5 * normal[14],
    }
    who = {name: attributes[name] for name in CATEGORIES}
    return Heart(subject, who, age_years, bmi, dict(labels), {k: float(v) for k, v in truth.items()}, seed)


def parameters(
    age_years: float, female: int, bmi: float, failing: int, normal: np.ndarray, interaction: float
) -> dict[str, float]:
    """Evaluate EFFECTS for one subject, within LIMITS. normal: [>= number of parameters] standard normal scatter."""
    decade = (age_years - 60) / 10
    rows = {
        "age": decade,
        "sex": female,
        "bmi": (bmi - 25) / 5,
        "heart failure": failing,
        "sex x heart failure": interaction * female * failing,
        "age x heart failure": interaction * decade * failing,
    }
    out = {k: v + EFFECTS["scatter"][k] * normal[i] for i, (k, v) in enumerate(EFFECTS["base"].items())}
    for row, factor in rows.items():
        for name, effect in EFFECTS[row].items():
            out[name] += factor * effect
    return {k: float(np.clip(v, *LIMITS.get(k, (0.005, np.inf)))) for k, v in out.items()}


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"heart/{name}".encode()).digest()
    return np.random.default_rng(np.random.SeedSequence([seed, *np.frombuffer(digest[:16], dtype="<u4").tolist()]))


# --- pictures ---------------------------------------------------------------------------------------------------------
def contraction(time: float) -> float:
    """Part of the stroke that has left the cavity at `time`: 0 at ED, 1 at ES, smooth in between."""
    t = time % 1.0
    return 0.5 - 0.5 * np.cos(np.pi * (t / SYSTOLE if t <= SYSTOLE else (1 - t) / (1 - SYSTOLE)))


def radii(truth: dict, time: float, level: float = 0.0) -> tuple[float, float]:
    """Radii in mm of the left ventricle's cavity and outer wall at a time and level; the wall's area is that of ED."""
    scale = np.sqrt(max(0.0, 1 - level**2))
    inner, wall = truth["cavity_radius"] * scale, truth["wall_thickness"] * (0.6 + 0.4 * scale)
    now = inner * np.sqrt(1 - truth["ejection_fraction"] * contraction(time))
    return now, np.sqrt(now**2 + (inner + wall) ** 2 - inner**2)


def render(
    heart: Heart, time: float = 0.0, level: float = 0.0, view: str = "short_axis", size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """One frame and its exact mask, both uint8 [size, size]. A four-chamber view has no level.

    ValueError: unknown view, size outside 32..512, level outside [BASE_LEVEL, 1).
    """
    if view not in VIEWS or not 32 <= size <= 512 or not BASE_LEVEL <= level < 1:
        raise ValueError(
            f"not possible: view {view!r} of {VIEWS}, size {size} (32..512) or level {level:g} ({BASE_LEVEL}..1)"
        )
    truth = heart.truth
    texture = _generator(heart.seed, f"{heart.subject}/{view}/{level:.3f}")  # the same through the heart beat
    mottle, fine = (resample(texture.standard_normal((n, n), dtype=np.float32), size) for n in (14, 40))
    x, y = (FIELD * v - np.float32(truth[k]) for v, k in zip(grid(size), ("shift_x", "shift_y"), strict=True))
    muscle = 0.27 + 0.02 * mottle
    image = _surroundings(x, y, truth, mottle, fine)
    at = _short_axis(x, y, truth, time, level) if view == "short_axis" else _four_chamber(x, y, truth, time)
    blood = muscle + truth["contrast"]
    layers = (
        (at.fat, 0.62 + 0.08 * mottle),
        (at.shell, muscle),
        (at.pool, blood + 0.03 * fine),
        (at.wall, muscle),
        (at.cavity, blood),
    )
    for distance, grey in layers:
        image = image + edge(distance / FIELD) * (grey - image)
    image = image - 0.75 * truth["contrast"] * at.papillary * edge(at.cavity / FIELD)
    mask = np.zeros((size, size), dtype=np.uint8)
    for value, distance in ((RIGHT, at.right), (MYOCARDIUM, at.wall), (CAVITY, at.cavity)):
        mask[distance > 0] = value
    noise = _generator(heart.seed, f"{heart.subject}/{view}/{level:.3f}/{time:.4f}").standard_normal(
        (2, 64, 64), dtype=np.float32
    )
    real, imaginary = (truth["noise"] * resample(v, size) for v in noise)
    image = np.hypot(truth["exposure"] * image + real, imaginary)  # the magnitude of a noisy complex signal: Rician
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), mask


@dataclass(frozen=True)
class _Anatomy:
    """Signed distances in mm, > 0 inside, each [size, size]; the wall's holds the cavity, too."""

    fat: np.ndarray
    shell: np.ndarray  # all muscle and what it encloses
    pool: np.ndarray  # blood outside of the left ventricle
    right: np.ndarray  # the right ventricle's cavity
    wall: np.ndarray
    cavity: np.ndarray
    papillary: np.ndarray | float  # darkness of the papillary muscles, 0 to 1


def _turned(x: np.ndarray, y: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = (np.float32(f(np.deg2rad(degrees))) for f in (np.cos, np.sin))
    return c * x + s * y, c * y - s * x


def _surroundings(x: np.ndarray, y: np.ndarray, p: dict, mottle: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Lung, descending aorta, liver and stomach below the diaphragm, and the chest wall with its fat; [size, size]."""
    image = 0.05 + 0.16 * np.maximum(fine - 1.1, 0)  # lung with vessels
    image = image + edge((9.5 - np.hypot(x - 47, y - 34)) / FIELD) * (0.62 - image)
    below = y - (43 + p["dome"] + 0.006 * (x + 12) ** 2)
    organ = 0.20 + 0.04 * mottle + 0.10 * edge((22 - x) / FIELD, 0.2) + 0.22 * np.maximum(fine - 1.4, 0)
    image = image + edge((below + 3) / FIELD) * (0.46 - image)
    image = image + edge(below / FIELD) * (organ - image)
    out = np.hypot(x - 25, y - 30) - 86  # > 0 in the chest wall
    ribs = 0.22 + 0.12 * np.cos(np.arctan2(y - 30, x - 25) * 14)
    image = image + edge(out / FIELD) * (ribs - image)
    image = image + edge((out - 9) / FIELD) * (0.86 + 0.05 * mottle - image)
    return image * (1 - 0.97 * edge((out - 9 - p["chest_fat"]) / FIELD))


def _short_axis(x: np.ndarray, y: np.ndarray, p: dict, time: float, level: float) -> _Anatomy:
    """The left ventricle as a ring, the right one as a crescent beside it, which ends above the apex."""
    x, y = _turned(x - 14, y + 4, p["rotation"])  # origin: the middle of the left ventricle
    inner, outer = radii(p, time, level)
    q = np.hypot(x * p["oblong"], y / p["oblong"])
    left = outer - q
    thin = 1 - 0.75 * p["ejection_fraction"] * contraction(time)  # the right ventricle moves with the left one
    scale = np.sqrt(max(0.0, 1 - (max(level, 0.0) / 0.8) ** 2))
    a, b = p["right_radius"] * scale * thin, 1.35 * p["right_radius"] * scale * np.sqrt(thin)
    right = -np.full_like(q, 2 * FIELD)
    if scale > 0:
        right = (1 - np.hypot((x + 0.92 * outer) / a, (y + 2) / b)) * a
    shell = np.maximum(left, right + 3)
    fat = shell + 2.5 + 2 * np.cos(3 * np.arctan2(y, x) + 1)
    spot = inner * 0.16 + 0.8
    papillary = sum(blob(x, y, *(0.66 * inner * np.array([np.cos(w), np.sin(w)])), spot, spot) for w in (0.75, 2.3))
    right = np.minimum(right, -left)
    return _Anatomy(fat, shell, right, right, left, inner - q, np.minimum(papillary, 1) * (level < 0.7))


def _four_chamber(x: np.ndarray, y: np.ndarray, p: dict, time: float) -> _Anatomy:
    """Half ellipsoids of constant length, the apex on top; the atria below are blood, but not in the mask."""
    x, y = _turned(x - 16, y - 14, p["rotation"])  # origin: the middle of the mitral valve
    inner, outer = radii(p, time)
    length = 33 + p["cavity_radius"]  # mm, from valve to apex
    width = p["right_radius"] * (1 - 0.6 * p["ejection_fraction"] * contraction(time))
    left, cavity = _half(x, y, outer, length + p["wall_thickness"]), _half(x, y, inner, length)
    right = np.minimum(_half(x + 0.95 * outer, y, width, 0.8 * length), -left)
    fill = 1 + 0.12 * contraction(time)  # the atria fill while the ventricles empty
    atria = np.maximum(*((1 - np.hypot((x - x0) / (16 * fill), (y - 20) / (14 * fill))) * 15 for x0 in (0, -outer - 6)))
    shell = np.maximum.reduce([left, right + 3, atria + 2])
    return _Anatomy(shell + 3, shell, np.maximum(right, np.minimum(atria, y - 3)), right, left, cavity, 0.0)


def _half(x: np.ndarray, y: np.ndarray, across: float, along: float) -> np.ndarray:
    """Signed distance of the upper half of an ellipse with these semi-axes."""
    return np.minimum((1 - np.hypot(x / across, y / along)) * across, -y)


# --- what a study holds -----------------------------------------------------------------------------------------------
def pair(heart: Heart, view: str = "short_axis", size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The ED and the ES frame of the mid slice and their masks, each uint8 [2, size, size]."""
    return _stack(render(heart, time, 0.0, view, size) for time in TIMES.values())


def cine(heart: Heart, frames: int = 12, view: str = "short_axis", size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """One beat of the mid slice (2D+t) and its masks, uint8 [frames, size, size]; 0 is ED, `systole(frames)` ES."""
    last = systole(frames)
    before, after = (
        np.arange(last) / last * SYSTOLE,
        SYSTOLE + np.arange(frames - last) / (frames - last) * (1 - SYSTOLE),
    )
    return _stack(render(heart, float(time), 0.0, view, size) for time in (*before, *after))


def systole(frames: int) -> int:
    """Number of the ES frame of a cine. ValueError below 4 frames."""
    if frames < 4:
        raise ValueError(f"a cine needs at least 4 frames, got {frames}")
    return round(SYSTOLE * frames)


def volume(heart: Heart, phase: str = "ED", slices: int = 8, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Short-axis stack (3D) of one phase, base to apex, and its masks, each uint8 [slices, size, size]."""
    return _stack(
        render(heart, TIMES[phase], float(level), "short_axis", size)
        for level in np.linspace(BASE_LEVEL, APEX_LEVEL, slices)
    )


def _stack(frames) -> tuple[np.ndarray, np.ndarray]:
    images, masks = zip(*frames, strict=True)
    return np.stack(images), np.stack(masks)


# --- measuring --------------------------------------------------------------------------------------------------------
def measure(mask: np.ndarray, field: float = 2 * FIELD) -> dict[str, float]:
    """From one short-axis mask [S, S] whose side is `field` mm: areas in mm2, and the mean thickness of the wall in mm.

    The thickness is that of a ring with the cavity's and the myocardium's area; 0 without myocardium.
    """
    pixel = (field / len(mask)) ** 2
    cavity, wall, right = (float((mask == v).sum() * pixel) for v in (CAVITY, MYOCARDIUM, RIGHT))
    thickness = (np.sqrt(cavity + wall) - np.sqrt(cavity)) / np.sqrt(np.pi)
    return {"cavity_area": cavity, "myocardium_area": wall, "right_area": right, "wall_thickness": float(thickness)}


def implied_ejection_fraction(ed: np.ndarray, es: np.ndarray, view: str = "short_axis") -> float:
    """Ejection fraction of ED and ES masks of equal shape, where the ventricle's length is constant.

    Short axis [S, S] or stack [D, S, S]: 1 - A_ES / A_ED. Four-chamber (area-length, V ~ A^2 / L): 1 - (A_ES / A_ED)^2.
    ValueError when the ED cavity is empty or the shapes differ.
    """
    if ed.shape != es.shape or not (ed == CAVITY).any():
        raise ValueError(
            f"no ejection fraction: the ED cavity is empty, or the shapes differ ({ed.shape} and {es.shape})"
        )
    share = (es == CAVITY).sum() / (ed == CAVITY).sum()
    return float(1 - share ** {"short_axis": 1, "four_chamber": 2}[view])
