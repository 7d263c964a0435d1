"""Procedural textures of generated streets: from a material and a place to a colour. JAX, on all rays at once.

Every texture is the base colour of its shape times marks that follow from the place: world metres for the ground and
for noise, metres in the shape's own frame for facades, vehicles and fences.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.data.streets import layout
from scalr_jax.data.streets.layout import Ground

GLASS = np.array([0.1, 0.13, 0.17], np.float32)[:, None]


class Hits(NamedTuple):
    """The hits of R rays. Where `distance` is FAR (the sky) the rest has no meaning."""

    distance: jax.Array  # [R] metres
    point: jax.Array  # [3, R] metres, world
    normal: jax.Array  # [3, R] unit, world, outwards
    unit: jax.Array  # [3, R] the point in its shape's frame, -1 to 1
    half: jax.Array  # [3, R] half sizes of the shape, metres
    label: jax.Array  # [R] class
    material: jax.Array  # [R]
    instance: jax.Array  # [R] row of `Street.size`
    color: jax.Array  # [3, R] base colour, 0 to 1


def noise(point: jax.Array, cell: float) -> jax.Array:
    """[R] in 0 to 1: one pseudo-random number for each cube of `cell` metres that holds a point of [3, R]."""
    x, y, z = jnp.floor(point / cell).astype(jnp.int32).astype(jnp.uint32)
    value = x * 73856093 ^ y * 19349663 ^ z * 83492791
    value = (value ^ (value >> 13)) * jnp.uint32(1274126177)
    return ((value ^ (value >> 16)) & 0xFFFF).astype(jnp.float32) / 65535.0


def albedo(ground: Ground, hits: Hits) -> jax.Array:
    """[3, R] the colour under white light at `hits`, 0 to 1."""
    place = hits.unit * hits.half  # [3, R] metres in the shape's frame
    on_side = jnp.abs(hits.unit[1]) > 0.999
    on_end = jnp.abs(hits.unit[0]) > 0.999
    along = jnp.where(on_end, place[1], place[0])
    height = place[2] + hits.half[2]  # metres above the shape's foot
    vehicle = (hits, place, height, on_side, on_end)
    textures = [
        _asphalt(ground, hits),
        _paving(ground, hits),
        _grass(hits),
        _facade(hits, along, height),
        hits.color * (0.45 + 0.55 * (along % 0.22 > 0.035)) * (0.85 + 0.3 * noise(hits.point, 0.11)),  # planks
        hits.color * (0.6 + 0.4 * (height % 0.25 > 0.04)) * (0.8 + 0.4 * noise(hits.point, 0.2)),  # bricks
        hits.color * (0.45 + 1.1 * noise(hits.point, 0.16)) * (0.85 + 0.2 * hits.unit[2]),  # leaves
        hits.color * (0.6 + 0.8 * noise(hits.point * jnp.array([1.0, 1.0, 0.1])[:, None], 0.05)),  # bark
        hits.color * (0.9 + 0.2 * hits.normal[1]),  # metal
        jnp.where((jnp.abs(hits.unit[1:]) > 0.78).any(axis=0), 0.9, hits.color),  # sign
        hits.color * (0.85 + 0.3 * noise(hits.point, 0.1)),  # clothes
        jnp.where(hits.unit[2] > 0.25, 0.15, hits.color),  # skin, and hair
        _paint(*vehicle, jnp.zeros_like(on_side)),
        _cabin(hits, place, on_end),
        _van(*vehicle),
        _bus(*vehicle),
    ]
    out = textures[0]
    for material, texture in enumerate(textures[1:], 1):
        out = jnp.where(hits.material == material, texture, out)
    return jnp.clip(out, 0.02, 1.0)


def _asphalt(ground: Ground, hits: Hits) -> jax.Array:
    """Speckled; a dashed centre line, a line beside the parking lane, a zebra crossing before the crossing road."""
    x, y, _ = hits.point
    across = y - 0.5 * ground.curvature * x * x
    from_cross = jnp.abs(x - ground.cross_at) - ground.cross_half_width
    dashed = (jnp.abs(across) < 0.08) & (x % 6.0 < 3.0)
    lane = (jnp.abs(jnp.abs(across) - ground.lane_width) < 0.07) & (ground.half_width > ground.lane_width + 1.0)
    zebra = (from_cross > 0.6) & (from_cross < 3.4) & (across % 1.0 < 0.5)
    marked = ((dashed | lane) & (from_cross > 3.6)) | zebra
    speckled = hits.color * (0.86 + 0.14 * noise(hits.point, 0.09) + 0.12 * noise(hits.point, 1.7))
    return jnp.where(marked & (jnp.abs(across) < ground.half_width), 0.85, speckled)


def _paving(ground: Ground, hits: Hits) -> jax.Array:
    """Slabs of 0.6 m with joints; kerb stones are lighter."""
    x, y, _ = hits.point
    joint = (x % 0.6 < 0.05) | (y % 0.6 < 0.05)
    across = jnp.abs(y - 0.5 * ground.curvature * x * x) - ground.half_width
    kerb = (across > -0.3) & (across < 0.2)
    slab = hits.color * (0.85 + 0.3 * noise(hits.point, 0.6)) * jnp.where(joint, 0.72, 1.0)
    return jnp.where(kerb, hits.color * 1.25, slab)


def _grass(hits: Hits) -> jax.Array:
    fine, coarse = noise(hits.point, 0.07), noise(hits.point, 0.9)
    dry = jnp.array([0.12, 0.04, 0.0])[:, None] * coarse
    return (hits.color + dry) * (0.6 + 0.6 * fine + 0.2 * coarse)


def _facade(hits: Hits, along: jax.Array, height: jax.Array) -> jax.Array:
    """A grid of windows of 1.2 m by 1.5 m every 2.6 m by 3 m over a darker plinth; roofs are dark."""
    window = (along % 2.6 < 1.2) & ((height - 0.9) % 3.0 < 1.5) & (height > 0.9)
    frame = ((along + 0.1) % 2.6 < 1.4) & ((height - 0.8) % 3.0 < 1.7) & (height > 0.8)
    wall = hits.color * (0.9 + 0.15 * noise(hits.point, 0.3)) * jnp.where(height < 0.6, 0.65, 1.0)
    wall = jnp.where(frame, 0.5 * wall + 0.4, wall)
    pane = GLASS * (0.7 + 1.6 * noise(jnp.floor(hits.point / 3.0), 1.0))
    return jnp.where(hits.unit[2] > 0.999, 0.22, jnp.where(window, pane, wall))


def _paint(
    hits: Hits, place: jax.Array, height: jax.Array, on_side: jax.Array, on_end: jax.Array, glass: jax.Array
) -> jax.Array:
    """Paint, with windows where `glass`, wheels on the sides and lamps at the ends."""
    out = jnp.where(glass, GLASS, hits.color * (0.97 + 0.06 * noise(hits.point, 0.4)))
    from_axle = jnp.abs(place[0]) - (hits.half[0] - 0.85)
    wheels = on_side & (from_axle**2 + (height - 0.1) ** 2 < 0.36**2)
    out = jnp.where(wheels, 0.05, out)
    lamp = on_end & (jnp.abs(hits.unit[1]) > 0.62) & (height > 0.3) & (height < 0.62)
    front = jnp.array([0.95, 0.93, 0.85])[:, None]
    rear = jnp.array([0.7, 0.05, 0.05])[:, None]
    return jnp.where(lamp, jnp.where(hits.unit[0] > 0, front, rear), out)


def _cabin(hits: Hits, place: jax.Array, on_end: jax.Array) -> jax.Array:
    pillar = ~on_end & ((jnp.abs(place[0]) < 0.06) | (jnp.abs(hits.unit[0]) > 0.92))
    glass = (jnp.abs(hits.unit[2]) < 0.75) & ~pillar
    return jnp.where(glass, GLASS, hits.color)


def _van(hits: Hits, place: jax.Array, height: jax.Array, on_side: jax.Array, on_end: jax.Array) -> jax.Array:
    high = (hits.unit[2] > 0.2) & (hits.unit[2] < 0.75)
    glass = high & ((on_side & (hits.unit[0] > 0.55) & (hits.unit[0] < 0.93)) | (on_end & (hits.unit[0] > 0)))
    return _paint(hits, place, height, on_side, on_end, glass)


def _bus(hits: Hits, place: jax.Array, height: jax.Array, on_side: jax.Array, on_end: jax.Array) -> jax.Array:
    sides = on_side & (hits.unit[2] > -0.1) & (hits.unit[2] < 0.65) & (place[0] % 1.5 > 0.14)
    ends = on_end & (hits.unit[2] > -0.25) & (hits.unit[2] < 0.75) & (jnp.abs(hits.unit[1]) < 0.9)
    stripe = on_side & (hits.unit[2] > 0.7) & (hits.unit[2] < 0.88)
    return jnp.where(stripe, 0.8, _paint(hits, place, height, on_side, on_end, sides | ends))


assert len(layout.MATERIALS) == 16  # one texture each
