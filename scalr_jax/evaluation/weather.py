"""Fog, snow and wet ground in a clear scan, from the lidar equation.

A Lambertian surface of reflectivity rho at distance R returns, in units of what the sensor sends out and gathers,

    P_target = rho / (pi R^2) * (share of the light that comes there and back)

rho is the clear scan's intensity over that of a white surface. What the weather itself sends back competes with it:
the strongest return is the point, and one below the detection limit is no point. The limit is the weakest return of the
clear scan (its 0.5 % quantile). A return of the weather has the label 255. NumPy only: data workers run this.

What no paper gives is ours: the distance at which a receiver sees all of its beam (sensors differ), the reflectivity of
a flake, the patchiness of fog. Robo3D's severities of fog are numbers of its generator; here they are visibilities.
"""

from __future__ import annotations

import numpy as np

from scalr_jax.data.scenes import IGNORE

LabelledPoints = tuple[np.ndarray, np.ndarray]  # points [M, 4] and their labels [M]

LIMIT_QUANTILE = 0.005
WHITE = 100.0  # intensity of a white diffuse surface in 8 bits; above are retroreflectors (Velodyne, Hesai)
DARKEST = 0.02  # reflectivity of a point of intensity 0
FROM, FULL = 0.9, 5.0  # metres: where the receiver begins to see the beam, and where it sees all of it; sensors differ

# Fog
VISIBILITY = (1000.0, 300.0, 100.0)  # metres, light to heavy
PULSE_SECONDS = 1e-8  # half-power width
SPEED_OF_LIGHT = 2.998e8  # metres a second
PATCHINESS = 0.3  # logarithmic standard deviation of the backscatter from beam to beam

# Snow
SNOWFALL = (0.5, 1.0, 2.5)  # mm of water an hour
BEAM, DIVERGENCE = 0.011, 0.003  # width of a beam: metres at the sensor, and radians (Velodyne VLP-16)
FLAKE_REFLECTIVITY = 0.3  # an aggregate of crystals is thin and lets most of the light through
GROWTH = (1000.0 / 100.0) ** (1 / 3)  # diameter of a flake of 100 kg/m^3 over that of the drop it melts to
SAMPLED = 12.0  # metres; farther flakes never outshine a target, and only their mean shadow counts

# Wet ground
WATER = (0.2, 1.0, 1.2)  # mm of water
ROUGHNESS = 1.2  # mm of water that cover the ground wholly
REFRACTION = 1.328  # of water at 905 nm
ABSORPTION = 7.0  # of water at 905 nm, 1/m
GROUND_DISTANCE = 0.2  # metres from the plane


def full_scale(intensity: np.ndarray) -> float:
    """The intensity of a white surface: 1 where none is above 1, else 100."""
    return 1.0 if intensity.max(initial=0.0) <= 1.0 else WHITE


def reflectivity(intensity: np.ndarray) -> np.ndarray:
    """rho [N], 0.02 to 1, of raw intensities [N]."""
    return np.clip(intensity / full_scale(intensity), DARKEST, 1.0)


def detection_limit(rho: np.ndarray, distance: np.ndarray) -> float:
    """The weakest power that the clear scan still has."""
    return float(np.quantile(rho / (np.pi * distance**2), LIMIT_QUANTILE))


def overlap(r: np.ndarray) -> np.ndarray:
    """Share of the beam at distances r (metres) that the receiver sees: 0 at the sensor, 1 from `FULL` on."""
    return np.clip((r - FROM) / (FULL - FROM), 0.0, 1.0)


def fog(points: np.ndarray, labels: np.ndarray, level: int, rng: np.random.Generator) -> LabelledPoints:
    """Attenuation and backscatter by droplets (Rasshofer, Spies and Spies, Adv. Radio Sci. 2011).

    Extinction alpha = ln(20) / V of the visibility V (Koschmieder), backscatter beta = 0.046 / V per metre:

        P_target = rho / (pi R^2) exp(-2 alpha R)
        P_fog(R) = beta * integral over the pulse of sin^2(pi s / (c tau)) exp(-2 alpha r) overlap(r) / r^2 ds
        with r = R - s

    A beam whose P_fog exceeds P_target somewhere before its target returns from the fog, at a distance drawn in
    proportion to P_fog. points [N, 4], labels [N]; V = 1000, 300, 100 m.
    """
    alpha, beta = np.log(20.0) / VISIBILITY[level], 0.046 / VISIBILITY[level]
    distance, rho = np.linalg.norm(points[:, :3], axis=1), reflectivity(points[:, 3])
    limit = detection_limit(rho, distance)
    target = rho / (np.pi * distance**2) * np.exp(-2 * alpha * distance)

    grid = np.arange(FROM, 60.0, 0.1)  # [G] metres
    length = SPEED_OF_LIGHT * PULSE_SECONDS
    s = np.linspace(0.0, length, 61)
    r = grid[:, None] - s
    along = np.sin(np.pi * s / length) ** 2 * np.exp(-2 * alpha * r) * overlap(r) / np.maximum(r, FROM) ** 2
    profile = beta * along.sum(axis=1) * (s[1] - s[0])  # [G]
    before = np.searchsorted(grid, distance) - 1  # the last of the grid before the target
    peak = np.where(before >= 0, np.maximum.accumulate(profile)[before], 0.0)
    peak = peak * rng.lognormal(0, PATCHINESS, len(points))
    cumulative = np.cumsum(profile)
    drawn = np.interp(rng.random(len(points)) * cumulative[before], cumulative, grid)

    return _strongest(points, labels, target, peak, drawn, distance, np.exp(-2 * alpha * distance), limit)


def snow(points: np.ndarray, labels: np.ndarray, level: int, rng: np.random.Generator) -> LabelledPoints:
    """Flakes in every beam, that reflect and cast shadows (after Hahner et al., CVPR 2022).

    Melted diameters D are distributed as N(D) = N_0 exp(-L D) with N_0 = 3.8e3 S^-0.87 /(mm m^3) and
    L = 2.55 S^-0.48 /mm at S mm/h (Gunn and Marshall, J. Meteorol. 1958); a flake is 2.15 times as wide. Flakes lie
    uniformly in the beam, which is b(r) = 11 mm + 3 mrad * r wide; one of width d at r covers c = (d / b(r))^2 of it:

        P_flake = 0.3 c overlap(r) / (pi r^2) * product of (1 - c) of the flakes before it
        P_target = rho / (pi R^2) * product of (1 - c) of all flakes

    points [N, 4], labels [N]; S = 0.5, 1.0, 2.5.
    """
    rate = SNOWFALL[level]
    slope = 2.55 * rate**-0.48  # 1/mm
    density = 3.8e3 * rate**-0.87 / slope  # flakes in a cubic metre
    width = GROWTH / slope / 1000.0  # metres, mean
    distance, rho = np.linalg.norm(points[:, :3], axis=1), reflectivity(points[:, 3])
    limit = detection_limit(rho, distance)

    first = (BEAM + DIVERGENCE * FROM) ** 3
    cube = (BEAM + DIVERGENCE * np.clip(distance, FROM, SAMPLED)) ** 3 - first
    owner = np.repeat(np.arange(len(points)), rng.poisson(density * np.pi / 12 / DIVERGENCE * cube))
    r = ((first + rng.random(len(owner)) * cube[owner]) ** (1 / 3) - BEAM) / DIVERGENCE
    order = np.argsort(owner * (2 * SAMPLED) + r)
    owner, r = owner[order], r[order]
    covered = np.minimum((rng.exponential(width, len(owner)) / (BEAM + DIVERGENCE * r)) ** 2, 0.999)
    passed = np.concatenate([[0.0], np.cumsum(np.log1p(-covered))])  # logarithm of the light left, over all beams
    start = np.searchsorted(owner, np.arange(len(points) + 1))
    left = np.exp(passed[start[1:]] - passed[start[:-1]])  # [N]
    far = density * np.pi / 4 * 2 * width**2 * np.maximum(distance - SAMPLED, 0.0)
    target = rho / (np.pi * distance**2) * left * np.exp(-far)
    flake = FLAKE_REFLECTIVITY * covered * overlap(r) * np.exp(passed[:-1] - passed[start[owner]]) / (np.pi * r**2)
    peak, place = np.zeros(len(points)), np.zeros(len(points))
    by_power = np.argsort(flake)
    peak[owner[by_power]], place[owner[by_power]] = flake[by_power], r[by_power]  # the strongest is written last

    return _strongest(points, labels, target, peak, place, distance, left * np.exp(-far), limit)


def _strongest(
    points: np.ndarray,
    labels: np.ndarray,
    target: np.ndarray,
    weather: np.ndarray,
    place: np.ndarray,
    distance: np.ndarray,
    left: np.ndarray,
    limit: float,
) -> LabelledPoints:
    """The stronger return of each beam, where it reaches `limit`, and its label; all arrays [N] but the points [N, 4].

    The target's has power `target` and the share `left` of its intensity; the weather's has power `weather` and goes
    along the ray from `distance` to `place`.
    """
    scattered = weather > target
    out, labels = points.copy(), labels.copy()
    out[:, 3] *= left
    out[scattered, :3] *= (place / distance)[scattered, None]
    out[scattered, 3] = full_scale(points[:, 3]) * np.clip(np.pi * place**2 * weather, 0.0, 1.0)[scattered]
    labels[scattered] = IGNORE
    seen = np.maximum(weather, target) >= limit
    return out[seen], labels[seen]


def wet_ground(points: np.ndarray, labels: np.ndarray, level: int, rng: np.random.Generator) -> LabelledPoints:
    """A film of water on the ground: mirror-like losses, and the darkening of what is wet.

    Under a film with incidence theta in air and theta_t in water (Snell), F Fresnel's reflectance (mean of both
    polarisations) and p = 1 - (1 - 0.066) / n^2 the share of diffuse light that the film keeps (Lekner and Dorf,
    Applied Optics 1988):

        f = (1 - F)^2 / n^2 * exp(-2 kappa depth / cos theta_t) / (1 - p rho)
        P_target = rho / (pi R^2) * (w f + 1 - w),  w = min(depth / 1.2 mm, 1): the share of the ground that is covered

    The ground is the plane that RANSAC finds, and what lies within 0.2 m of it. points [N, 4], labels [N]; depths 0.2,
    1.0, 1.2 mm.
    """
    plane = find_ground(points[:, :3], rng)
    if plane is None:
        return points, labels
    distance, rho = np.linalg.norm(points[:, :3], axis=1), reflectivity(points[:, 3])
    limit = detection_limit(rho, distance)
    ground = np.abs(points[:, :3] @ plane[:3] + plane[3]) < GROUND_DISTANCE
    cosine = np.clip(np.abs(points[:, :3] @ plane[:3]) / distance, 1e-3, 1.0)
    inside = np.sqrt(1 - (1 - cosine**2) / REFRACTION**2)  # cos theta_t
    kept = 1 - (1 - 0.066) / REFRACTION**2
    under = (1 - fresnel(cosine, inside)) ** 2 / REFRACTION**2 / (1 - kept * rho)
    under *= np.exp(-2 * ABSORPTION * WATER[level] / 1000 / inside)
    wet = min(WATER[level] / ROUGHNESS, 1.0)
    factor = np.where(ground, wet * under + 1 - wet, 1.0)
    seen = ~ground | (rho * factor / (np.pi * distance**2) >= limit)
    out = points.copy()
    out[:, 3] *= factor
    return out[seen], labels[seen]


def fresnel(outside: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Reflectance of water for unpolarised light, from the cosines of the angles in air and in water."""
    n = REFRACTION
    across = (outside - n * inside) / (outside + n * inside)
    along = (n * outside - inside) / (n * outside + inside)
    return (across**2 + along**2) / 2


def find_ground(xyz: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """The ground's plane [4]: upward unit normal n and d with n . p + d = 0, metres; None when there is no such plane.

    RANSAC over the lower half of the points within 40 m: of 200 planes through three of them, tilted by 15 degrees at
    most, the one with the most points within 0.1 m, fitted to these by least squares.
    """
    near = xyz[np.hypot(xyz[:, 0], xyz[:, 1]) < 40.0]
    if len(near) < 50:
        return None
    low = near[near[:, 2] <= np.median(near[:, 2])]
    low = low[rng.choice(len(low), min(len(low), 3000), replace=False)]
    a, b, c = low[rng.integers(0, len(low), (3, 200))]
    normal = np.cross(b - a, c - a)
    normal *= np.where(normal[:, 2:] < 0, -1.0, 1.0) / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    upright = normal[:, 2] > np.cos(np.radians(15.0))
    away = np.abs(low @ normal.T - (normal * a).sum(axis=1))  # [n, 200]
    votes = np.where(upright, (away < 0.1).sum(axis=0), 0)
    best = int(votes.argmax())
    if votes[best] < 0.1 * len(low):
        return None
    on = low[away[:, best] < 0.1]
    center = on.mean(axis=0)
    fitted = np.linalg.svd(on - center, full_matrices=False)[2][2]
    fitted = fitted * np.sign(fitted[2])
    return np.append(fitted, -fitted @ center)
