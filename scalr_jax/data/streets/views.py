"""Images of generated streets with what some of their pixels see: what the demo's teacher is trained on.

No semantic label is in here: a pixel tells its depth, its surface's direction, height and colour, and the size and
centre of the object that it belongs to. Streets come from the split "teacher", which no other part uses.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.data.readers.files import UNREADABLE_ARRAYS
from scalr_jax.data.streets import streets
from scalr_jax.data.streets.builder import make_street
from scalr_jax.data.streets.sensors import SENSORS, photograph, pose
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import reason, write_arrays

CAMERAS_PER_STREET = 3


class Views(NamedTuple):
    """V images; Q pixels of each with their targets. Nothing of the sky is among the pixels."""

    images: np.ndarray  # [V, h, w, 3] uint8
    pixels: np.ndarray  # [V, Q, 2] int16: row, column
    depth: np.ndarray  # [V, Q] float32 metres along the camera's axis
    normal: np.ndarray  # [V, Q, 3] right, down, ahead
    height: np.ndarray  # [V, Q] metres above the road
    albedo: np.ndarray  # [V, Q, 3] 0 to 1
    size: np.ndarray  # [V, Q, 3] length, width, height of the object, metres
    offset: np.ndarray  # [V, Q, 3] from the point to the object's centre, metres: right, down, ahead


def render_views(root: Path, num_streets: int, image_size: tuple[int, int], num_pixels: int, seed: int) -> Views:
    """The views of `num_streets` streets, three cameras each; those that the cache `root` lacks are rendered."""
    root.mkdir(parents=True, exist_ok=True)
    h, w = image_size
    parts, said = [], time.monotonic()
    for index in range(num_streets):
        path = root / f"views-{h}x{w}-{num_pixels}-seed{seed}-v{streets.VERSION}-{index:05d}.npz"
        if not path.exists():
            write_arrays(path, _render_street(index, image_size, num_pixels, seed)._asdict())
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                parts.append(Views(*(arrays[field] for field in Views._fields)))
        except (KeyError, *UNREADABLE_ARRAYS) as error:
            raise InputError(f"{path} cannot be read ({reason(error)}); delete it to have it rendered again") from error
        if time.monotonic() - said > streets.PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"views: {index + 1}/{num_streets} streets", flush=True)
    return Views(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _render_street(index: int, image_size: tuple[int, int], num_pixels: int, seed: int) -> Views:
    """Every camera of a street has its own weather, and its lidar model decides how high it hangs."""
    street_seed = streets.split_seed("teacher", index, seed)
    rng = np.random.default_rng((street_seed, 2))
    street = make_street(street_seed)
    rotation, position = pose(street, list(SENSORS.values())[index % len(SENSORS)], rng)
    views = []
    for camera in rng.permutation(6)[:CAMERAS_PER_STREET]:
        image, see = photograph(street, int(camera), image_size, rotation, position, rng)
        views.append(_pick_pixels(image, see(), num_pixels, rng))
    return Views(*(np.stack(column) for column in zip(*views, strict=True)))


def _pick_pixels(image: np.ndarray, seen: dict[str, np.ndarray], num_pixels: int, rng: np.random.Generator) -> Views:
    """Pixels with replacement, so that an object weighs as the root of its area: small things count more."""
    instance = seen["instance"]
    area = np.bincount(np.maximum(instance, 0).ravel())
    weight = np.where(instance >= 0, 1 / np.sqrt(np.maximum(area[np.maximum(instance, 0)], 1)), 0.0).ravel()
    chosen = rng.choice(weight.size, num_pixels, p=weight / weight.sum())
    row, column = np.unravel_index(chosen, instance.shape)
    targets = (seen[field][row, column].astype(np.float32) for field in Views._fields[2:])
    return Views(image, np.stack([row, column], axis=1).astype(np.int16), *targets)
