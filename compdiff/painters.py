"""How a phantom's parameters become a picture: chest radiograph, fundus picture, and the detector that both pass.

A painter draws in anatomical coordinates (`place`); `acquire` adds what belongs to the detector: grid, border,
exposure, noise. `compdiff/phantoms.py` decides the parameters and says their units. Inputs of a painter: x, y float32
[size, size]; p, the parameters; u and z, the subject's uniform and normal numbers; mottle coarse noise [size, size].
"""
from functools import lru_cache

import numpy as np

from compdiff.raster import blob, edge, grid

GRIDS = {"grid_vertical": (6, 0), "grid_horizontal": (0, 6), "grid_rising": (4, 4), "grid_falling": (4, -4)}  # cycles per image


@lru_cache(maxsize=8)
def grid_waves(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every grid in GRIDS, each float32 [4, size * size]."""
    x, y = grid(size)
    phase = np.stack([np.pi * (kx * x + ky * y).ravel() for kx, ky in GRIDS.values()])
    return np.cos(phase), np.sin(phase)


@lru_cache(maxsize=8)
def _frame(size: int) -> np.ndarray:
    """Collimation border: 1 at the image's edge, 0 further than 0.14 from it; float32 [size, size]."""
    x, y = grid(size)
    return np.clip((np.maximum(abs(x), abs(y)) - .86) / .07, 0, 1)


@lru_cache(maxsize=8)
def _roundness(size: int) -> np.ndarray:
    """Distance from the centre in the norm whose unit disc is a round-cornered square; float32 [size, size]."""
    x, y = grid(size)
    return (x ** 8 + y ** 8) ** (1 / 8)


def place(truth: dict, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates -> anatomical coordinates: shift, rotation and the subject's size."""
    x, y = grid(size)
    scale = 1 / truth.get("body_size", truth.get("magnification"))
    c, s = (np.float32(f(np.deg2rad(truth["rotation"])) * scale) for f in (np.cos, np.sin))
    x, y = x - np.float32(truth["shift_x"]), y - np.float32(truth["shift_y"])
    return c * x + s * y, c * y - s * x


def _chest(x: np.ndarray, y: np.ndarray, p: dict, u: np.ndarray, z: np.ndarray, mottle: np.ndarray) -> np.ndarray:
    """Frontal chest radiograph, float32 [size, size]. The image's right is the patient's left, as usual."""
    thorax = .72
    a, left = abs(x), x < 0
    body = edge(p["shoulder_width"] - .06 * edge(y + .25, .5) - a, .06)
    body *= edge(y + .96 - .34 * np.maximum(a - .24, 0), .05)                  # neck and shoulders
    out = (1 - (a / thorax) ** 2 - (np.maximum(.15 - y, 0) / .97) ** 4) * .36   # > 0 inside the rib cage, about a distance
    dome = p["diaphragm"] - .05 * left + .95 * (a - .32) ** 2
    chest = edge(out + .03)
    lung = edge(out) * edge(dome - y)
    image = .06 + body * (.50 + .14 * edge(y - .2, 1.5))
    image += .20 * edge(y - dome) * chest                                       # abdomen under the diaphragm
    image -= .12 * blob(x, y, .36, .80, .13, .07)                              # gastric bubble
    air = p["lung_darkness"] - .10 * blob(a, y, .20, .02, .12, .22) + .035 * mottle   # hila and vessels are brighter
    if p["pneumothorax_side"]:
        inset = out - p["pneumothorax"] * (.45 + .9 * edge(-y, 1.2))
        mine = x * p["pneumothorax_side"] > 0
        air = np.where(mine, air * edge(inset) + (p["lung_darkness"] + .13) * edge(-inset), air)
        image += .16 * mine * lung * np.maximum(0, 1 - abs(inset) / .035)      # visceral pleural line
    if p["consolidation_side"]:
        patch = blob(x, y, .42 * p["consolidation_side"], p["consolidation_y"], .16, .15)
        air = air - p["consolidation"] * patch * (1 + .3 * mottle)
    if p["effusion_side"]:
        meniscus = p["diaphragm"] + .14 - p["effusion_height"] * (.55 + 1.6 * np.maximum(a - .25, 0) ** 2)
        air = air - (air + .12) * edge(y - meniscus, .06) * (x * p["effusion_side"] > 0)
    image -= lung * air
    rib = np.cos((y - .55 * a + .75 * a * a) * (2 * np.pi / .19) + .6 * z[0])
    front = np.cos((y + .55 * a) * (2 * np.pi / .23) + .6 * z[1])
    bones = np.maximum(rib, 0) + .5 * np.maximum(front, 0) * edge(a - .38, .2) - .35
    image += p["rib_contrast"] * chest * edge(.62 - y, .2) * bones
    bone = abs(y + .58 + .22 * a - .035 * np.sin(8 * a)) + .5 * np.maximum(a - .66, 0)         # clavicles
    image += .16 * np.minimum(np.maximum(1.6 - bone / .03, 0), 1) * edge(a - .06) * body
    image += p["breast_shadow"] * _breast(a, y) * edge(dome - y + .04, .12)
    centre = edge(.13 + .05 * edge(-y - .45, .3) + .07 * edge(y + .05, .5) * ~left - a, .05)  # mediastinum, pulmonary trunk
    centre = np.maximum(centre, edge(p["aortic_knob"] - np.sqrt((x - .10) ** 2 + .8 * (y + .27) ** 2), .05))
    centre = np.maximum(centre, _heart(x, y, p["heart_thorax_ratio"] * thorax)) * body
    image += centre * (.76 + .05 * edge(y, 1.) - image)
    image += .05 * edge(.075 - a, .04) * body * (1 + .6 * np.cos(y * (2 * np.pi / .17)))      # spine
    image -= .20 * edge(.05 - abs(x + .012), .04) * edge(-.12 - y, .1) * body                # trachea
    return image


def _breast(a: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Soft-tissue shadow over the lower lung fields: denser towards its sharp lower edge."""
    r2 = ((a - .42) / .33) ** 2 + ((y - .24) / .32) ** 2
    return edge((1 - r2) * .16) * (.65 + .5 * edge(y - .30, .5))


def _heart(x: np.ndarray, y: np.ndarray, half_width: float) -> np.ndarray:
    """Tilted ellipse, exactly 2 * half_width wide, displaced to the patient's left, apex on the diaphragm."""
    height, tilt = .24 + .35 * half_width, .35
    dx, dy = x - .28 * half_width, y - .72 + height * .9
    inner = np.sqrt(half_width ** 2 - (tilt * height) ** 2)
    return edge((1 - ((dx - tilt * dy) / inner) ** 2 - (dy / height) ** 2) * (half_width / 2), .05)


def _fundus(x: np.ndarray, y: np.ndarray, p: dict, u: np.ndarray, z: np.ndarray, mottle: np.ndarray) -> np.ndarray:
    """SLO-like fundus picture, float32 [size, size]: bright disc, dark vessels and macula in a round-cornered grey field."""
    x_disc, y_disc = .50 + .02 * z[0], .02 * z[1]
    e = x * p["eye"]
    r2 = e * e + y * y
    image = .46 - .09 * r2 + p["gradient"] * y + .022 * mottle
    image -= p["macula"] * (blob(e, y, -.14, .06, .20, .18) + .5 * blob(e, y, -.14, .06, .06, .06))   # and fovea
    streaks = 1 + .5 * np.cos(34 * (abs(y) + .35 * e))
    image += p["nerve_fibre"] * (blob(e, y, .22, -.40, .26, .17) + blob(e, y, .22, .40, .26, .17)) * streaks
    image *= 1 - p["peripheral_darkening"] * edge(np.sqrt(r2) - .62, .45)
    rx, ry = e - x_disc, (y - y_disc) / 1.08
    r = np.sqrt(rx * rx + ry * ry)
    if p["crescent"]:
        image += .25 * edge(p["disc_radius"] + p["crescent"] * .5 - np.hypot(rx + p["crescent"] * .6, ry))
    disc = edge(p["disc_radius"] - r, .04)
    image += disc * (.70 - image)
    cup = edge(p["disc_radius"] * p["cup_disc_ratio"] - r, .04)
    image *= 1 - (.62 - .30 * disc - .22 * cup) * _vessels(p, u, z, x_disc, y_disc, len(x))   # fainter where they dive in
    image += .26 * cup
    image += p["haze"] * (.56 - image)
    return .04 + (image - .04) * edge(p["pupil"] - _roundness(len(x)), .04)   # the field of view, dark outside


def _vessels(p: dict, u: np.ndarray, z: np.ndarray, x_disc: float, y_disc: float, size: int) -> np.ndarray:
    """Coverage [0, 1] by vessels, float32 [size, size]: eight Bezier trunks, three branches each, splatted by area."""
    t = np.linspace(0, 1, max(40, int(1.5 * size) - 52), dtype=np.float32)
    side = np.repeat([-1., 1.], 4)                                              # superior, inferior
    end = np.tile([[-.75, .55], [-.45, .85], [.75, .98], [.98, .55]], (2, 1)) + .06 * z[8:24].reshape(8, 2)
    bend = np.tile([[.25, .62], [.38, .80], [.55, .45], [.72, .18]], (2, 1)) + .04 * z[24:40].reshape(8, 2)
    start = np.stack([np.full(8, x_disc + .03), np.full(8, y_disc)], 1)
    end[:, 1] *= side
    bend[:, 1] *= side
    trunk = _bezier(start, bend, end, t)                                        # [8, n, 2]
    fork = (len(t) * np.array([.30, .50, .70])).astype(int)
    root = trunk[:, fork].reshape(-1, 2)
    ahead = (trunk[:, fork + 2] - trunk[:, fork]).reshape(-1, 2)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    turn = np.tile([1., -1., 1.], 8) * np.repeat(side, 3) * (.75 + .2 * np.resize(z[2:8], 24))
    c, s = np.cos(turn), np.sin(turn)
    way = np.stack([c * ahead[:, 0] - s * ahead[:, 1], s * ahead[:, 0] + c * ahead[:, 1]], 1)
    branch = _bezier(root, root + .22 * ahead + .10 * way, root + .25 * ahead + .42 * way, t)
    path = np.concatenate([trunk, branch])                                      # [32, n, 2]
    along = np.diff(path, axis=1)
    middle, step = (path[:, 1:] + path[:, :-1]) / 2, np.sqrt((along ** 2).sum(-1))
    normal = np.stack([-along[..., 1], along[..., 0]], -1) / step[..., None]
    phase = 6.3 * np.resize(u, 32)[:, None].astype(np.float32)
    wave = (np.sin(11 * t[1:] + phase) + .5 * np.sin(23 * t[1:] + 2 * phase)) * np.minimum(1, 4 * t[1:])
    wave *= np.float32(p["tortuosity"])
    width = np.repeat(np.float32(p["vessel_width"]) * np.array([1, .55], np.float32), [8, 24])[:, None] * (1 - .5 * t[1:])
    across = max(3, size // 24)
    offset = ((np.arange(across) + .5) / across - .5).astype(np.float32)
    points = middle[..., None, :] + normal[..., None, :] * (wave[..., None] + width[..., None] * offset)[..., None]
    area = np.broadcast_to((step * width)[..., None] / len(offset), points.shape[:-1])
    return _splat(points.reshape(-1, 2), area.ravel(), p, size)


def _bezier(p0: np.ndarray, p1: np.ndarray, p2: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Quadratic Bezier curves, [v, 2] control points and [n] parameters -> [v, n, 2]."""
    t = t[:, None]
    return ((1 - t) ** 2 * p0[:, None] + 2 * t * (1 - t) * p1[:, None] + t * t * p2[:, None]).astype(np.float32)


def _splat(points: np.ndarray, area: np.ndarray, p: dict, size: int) -> np.ndarray:
    """Anatomical points [m, 2] carrying an area [m] -> covered fraction of every pixel, by bilinear weights."""
    angle, scale = np.deg2rad(p["rotation"]), p["magnification"]
    c, s = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    e, y = points[:, 0] * np.float32(p["eye"]), points[:, 1]
    col = (c * e - s * y + np.float32(p["shift_x"]) + 1) * (size / 2) + .5      # a margin of one pixel all round
    row = (s * e + c * y + np.float32(p["shift_y"]) + 1) * (size / 2) + .5
    keep = (col > 0) & (row > 0) & (col < size + 1) & (row < size + 1)
    col, row, mass = col[keep], row[keep], area[keep] * (scale * scale * size * size / 4)
    i, j = row.astype(np.intp), col.astype(np.intp)
    fi, fj = row - i, col - j
    n = size + 2
    at = np.concatenate([i * n + j, i * n + j + 1, (i + 1) * n + j, (i + 1) * n + j + 1])
    weight = np.concatenate([(1 - fi) * (1 - fj), (1 - fi) * fj, fi * (1 - fj), fi * fj]) * np.tile(mass, 4)
    return np.minimum(np.bincount(at, weight, n * n).reshape(n, n)[1:-1, 1:-1], 1).astype(np.float32)


PAINTERS = {"chest": _chest, "fundus": _fundus}


def acquire(image: np.ndarray, p: dict, u: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """The detector: anti-scatter grid (fixed to it, within an eighth of a period), collimation border, exposure, noise -> uint8."""
    size = len(image)
    cos, sin = grid_waves(size)
    amplitude = np.array([p.get(k, 0.) for k in GRIDS], dtype=np.float32)
    phase = (2 * np.pi / 8 * u).astype(np.float32)
    texture = (amplitude * np.cos(phase)) @ cos - (amplitude * np.sin(phase)) @ sin
    image = image + texture.reshape(size, size) + p["border"] * _frame(size)
    image = p["exposure"] * image + p["offset"] + .003 * grain
    return (np.minimum(np.maximum(image, 0), 1) * 255 + .5).astype(np.uint8)
