"""Sensors of generated streets: lidar models, a rig of cameras, and one rendered scene. JAX is imported on use only.

Frames: the lidar's (x forward, y left, z up, metres, origin at the sensor) hangs in the world at the vehicle's place
with its heading and a small pitch and roll. Cameras sit 0.35 m ahead of the lidar along their heading and 0.25 m
below it. A pixel's centre has integer coordinates: column = f * right / depth + (w - 1) / 2, rows alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scalr_jax.data.streets import layout
from scalr_jax.data.streets.builder import make_street


class Sensor(NamedTuple):
    """A lidar. Rays lie on a grid of elevations and azimuths; angles in degrees, lengths in metres."""

    elevation: tuple[float, float]  # lowest and highest beam
    num_beams: int
    azimuth: float  # total field, centred ahead
    num_azimuths: int  # rays a beam
    height: float  # above the ground
    max_range: float
    range_noise: float  # standard deviation
    dropout: float  # share of the rays lost at random
    full_scale: float  # intensity of a white surface met head-on nearby
    exponent: float  # intensity = full_scale * reflectance ** exponent
    num_cameras: int  # headings at equal steps of 60 degrees
    intensity: tuple[float, float]  # mean and standard deviation, measured over 40 streets


SENSORS = {
    "beams32": Sensor((-30.0, 10.0), 32, 360.0, 480, 1.84, 60.0, 0.02, 0.04, 180.0, 1.3, 6, (16.7, 17.0)),
    "beams64": Sensor((-24.8, 2.5), 64, 360.0, 600, 1.73, 60.0, 0.015, 0.03, 1.0, 0.8, 6, (0.2, 0.125)),
    "solid": Sensor((-10.0, 10.0), 100, 60.0, 160, 1.9, 60.0, 0.025, 0.06, 255.0, 1.0, 1, (39.6, 28.9)),
}

# How much of the light at 905 nm comes back from each material (`layout.MATERIALS`) of albedo 0.5, before incidence.
REFLECTANCE = np.array(
    [0.16, 0.24, 0.42, 0.34, 0.36, 0.3, 0.55, 0.3, 0.5, 0.7, 0.35, 0.4, 0.36, 0.3, 0.38, 0.38], np.float32
)
CAMERA_FIELD = 80.0  # degrees, horizontal
CAMERA_AHEAD, CAMERA_BELOW = 0.35, 0.25  # metres from the lidar
SUPERSAMPLE = 2  # rays along each side of a pixel


class Rendered(NamedTuple):
    """One scan and one image of the same street."""

    points: np.ndarray  # [N, 4] float32: x, y, z (metres, lidar frame), raw intensity
    labels: np.ndarray  # [N] uint8, classes of `layout.CLASSES`
    image: np.ndarray  # [h, w, 3] uint8
    pixels: np.ndarray  # [N, 2] float32 row, column
    visible: np.ndarray  # [N] bool
    camera: int
    targets: dict[str, np.ndarray] | None = None  # see `_targets`


def pose(street: layout.Street, sensor: Sensor, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The lidar's rotation [3, 3] (lidar frame to world) and position [3] (metres)."""
    pitch, roll = rng.normal(0, np.radians(0.6), 2)
    yaw = street.ego[2]
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    about_y = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]])
    height = sensor.height + rng.normal(0, 0.04)
    return about_z @ about_y @ about_x, np.array([street.ego[0], street.ego[1], height])


def lidar_rays(sensor: Sensor, rng: np.random.Generator) -> np.ndarray:
    """[R, 3] unit vectors in the lidar frame, beam by beam."""
    step = sensor.azimuth / sensor.num_azimuths
    azimuth = (np.arange(sensor.num_azimuths) + rng.uniform()) * step - sensor.azimuth / 2
    elevation = np.linspace(*sensor.elevation, sensor.num_beams)
    elevation, azimuth = np.meshgrid(np.radians(elevation), np.radians(azimuth), indexing="ij")
    xyz = (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation))
    return np.stack(xyz, axis=-1).reshape(-1, 3)


def scan(street, sensor, rotation, position, rng) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 4] (lidar frame, metres, intensity) and labels [N] of one turn of the sensor."""
    from scalr_jax.data.streets import render as street_render

    rays = lidar_rays(sensor, rng)
    directions = (rays @ rotation.T).astype(np.float32)
    hits, albedo = street_render.trace_lidar(street.geometry, position.astype(np.float32)[:, None], directions.T)
    values = (hits.distance, hits.normal, hits.material, hits.label, albedo)
    distance, normal, material, labels, albedo = map(np.asarray, values)
    number = len(rays)
    facing = np.abs((normal.T * directions).sum(axis=1))
    reflectance = REFLECTANCE[material] * (0.3 + 1.4 * albedo.mean(axis=0))
    reflectance = reflectance * (0.25 + 0.75 * facing) * rng.lognormal(0, 0.15, number)
    reflectance = reflectance / (1.0 + (distance / 45.0) ** 2)
    distance = distance + rng.normal(0, sensor.range_noise, number)
    distance = distance + (material == layout.LEAVES) * rng.exponential(0.15, number)
    lost = rng.random(number) < sensor.dropout + 0.5 * np.exp(-reflectance / 0.012)
    keep = (distance > 0.9) & (distance < sensor.max_range) & ~lost
    xyz = rays * distance[:, None]
    xyz[:, 2] += (material == layout.GRASS) * rng.uniform(-0.05, 0.06, number)  # blades of unequal length
    intensity = np.minimum(sensor.full_scale * reflectance**sensor.exponent, 255.0)
    intensity = np.round(intensity) if sensor.full_scale > 1 else np.round(np.minimum(intensity, 1.0), 2)
    points = np.concatenate([xyz, intensity[:, None]], axis=1)[keep]
    return points.astype(np.float32), labels[keep].astype(np.uint8)


def camera_pose(camera: int) -> tuple[np.ndarray, np.ndarray]:
    """Axes [3, 3] (rows right, down, forward) and position [3] (metres) of a camera in the lidar frame."""
    heading = np.radians(60.0 * camera)
    forward = np.array([np.cos(heading), np.sin(heading), 0.0])
    axes = np.stack([[forward[1], -forward[0], 0.0], [0.0, 0.0, -1.0], forward])
    return axes, CAMERA_AHEAD * forward - np.array([0.0, 0.0, CAMERA_BELOW])


def focal_length(image_size: tuple[int, int]) -> float:
    """Pixels."""
    return image_size[1] / 2 / np.tan(np.radians(CAMERA_FIELD / 2))


def project(xyz: np.ndarray, camera: int, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 2] (row, column) of points [N, 3] (lidar frame, metres), and which lie strictly inside the image.

    Inside: more than 1 m ahead and 0 < row < h - 1, 0 < column < w - 1.
    """
    axes, position = camera_pose(camera)
    right, down, depth = ((xyz - position) @ axes.T).T
    scale = focal_length(image_size) / np.where(depth > 1.0, depth, 1.0)
    h, w = image_size
    pixels = np.stack([down * scale + (h - 1) / 2, right * scale + (w - 1) / 2], axis=1)
    inside = (depth > 1.0) & (pixels > 0).all(axis=1) & (pixels < np.array([h - 1, w - 1])).all(axis=1)
    return pixels, inside


def photograph(street, camera, image_size, rotation, position, rng) -> tuple[np.ndarray, Callable[[], dict]]:
    """The image [h, w, 3] uint8 of one camera, and a function that says what each pixel sees (`_targets`)."""
    from scalr_jax.data.streets import render as street_render

    h, w = image_size
    axes, offset = camera_pose(camera)
    steps = (np.arange(SUPERSAMPLE) + 0.5) / SUPERSAMPLE - 0.5
    rows, columns = ((steps[:, None] + np.arange(n) - (n - 1) / 2).ravel() for n in (h, w))  # [2 * h], [2 * w]
    down, right = np.meshgrid(rows, columns, indexing="ij")
    rays = np.stack([right, down, np.full_like(down, focal_length(image_size))], axis=-1).reshape(-1, 3)
    rays = (rays / np.linalg.norm(rays, axis=1, keepdims=True)) @ axes @ rotation.T
    eye = position + rotation @ offset
    heading = np.arctan2(*(rotation @ axes[2])[1::-1])
    view = street_render.keep_view(street.geometry, eye, heading, np.radians(CAMERA_FIELD / 2))
    sun, sky = _weather(rng)
    origin, directions = eye.astype(np.float32)[:, None], rays.T.astype(np.float32)
    hits, base, color = street_render.trace_camera(view, origin, directions, sun, sky)
    color = np.asarray(color).reshape(3, SUPERSAMPLE, h, SUPERSAMPLE, w).mean(axis=(1, 3)).transpose(1, 2, 0)
    color = color * rng.uniform(1.05, 1.4) * rng.normal(1.0, 0.02, 3) + rng.normal(0, 0.012, color.shape)
    image = (np.clip(color, 0, 1) * 255).round().astype(np.uint8)
    return image, lambda: _targets(street, hits, base, image_size, axes @ rotation.T, eye)


def _weather(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The sun [4] (direction, strength) and the sky's colour overhead [3]."""
    azimuth, elevation, cloud = rng.uniform(-np.pi, np.pi), rng.uniform(0.4, 1.2), rng.random()
    toward = (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation))
    blue, grey = np.array([0.35, 0.55, 0.85]), np.array([0.75, 0.77, 0.8])
    return np.array([*toward, 0.75 - 0.4 * cloud], np.float32), (blue + (grey - blue) * cloud).astype(np.float32)


def _targets(street, hits, base, image_size, world_to_camera, eye) -> dict[str, np.ndarray]:
    """The surface that each pixel sees, without its class: for training the demo's teacher. Arrays [h, w, ...] float32.

    depth (metres along the axis; 0 for the sky), normal (camera frame), height (metres above the road), albedo,
    size (length, width, height of the object, metres), offset (from the point to the object's centre, metres, camera
    frame), instance (int32; -1 for the sky). `labels` (uint8) serves tests and figures only.
    """
    h, w = image_size

    def pick(values):  # [..., R] -> [h, w, ...]: one of the pixel's rays
        values = np.asarray(values)
        values = values.reshape(*values.shape[:-1], SUPERSAMPLE, h, SUPERSAMPLE, w)[..., 0, :, 0, :]
        return np.moveaxis(values, (-2, -1), (0, 1))

    seen = pick(hits.distance) < 1e5
    instance = np.where(seen, pick(hits.instance), 0)
    point = pick(hits.point)
    return {
        "depth": np.where(seen, (point - eye) @ world_to_camera[2], 0.0),
        "normal": pick(hits.normal) @ world_to_camera.T,
        "height": point[..., 2],
        "albedo": pick(base),
        "size": street.size[instance],
        "offset": (street.middle[instance] - point) @ world_to_camera.T,
        "instance": np.where(seen, instance, -1),
        "labels": np.where(seen, pick(hits.label), 255).astype(np.uint8),
    }


def render(seed: int, sensor: str, image_size: tuple[int, int], *, targets: bool = False) -> Rendered:
    """The street of `seed` as `sensor` (a key of `SENSORS`) and one of its cameras, drawn from the seed, see it.

    A pure function of its arguments. `targets` adds what each pixel sees (`_targets`).
    """
    model = SENSORS[sensor]
    street = make_street(seed)
    rng = np.random.default_rng((seed, 1, list(SENSORS).index(sensor)))
    rotation, position = pose(street, model, rng)
    camera = int(rng.integers(model.num_cameras))
    image, see = photograph(street, camera, image_size, rotation, position, rng)
    points, labels = scan(street, model, rotation, position, rng)
    pixels, visible = project(points[:, :3].astype(np.float64), camera, image_size)
    return Rendered(points, labels, image, pixels.astype(np.float32), visible, camera, see() if targets else None)
