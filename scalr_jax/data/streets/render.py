"""Ray casting of generated streets in JAX: what each ray meets, its colour, its shading.

Every shape is a unit shape under an affine map (scale, turn about z, move), which keeps the ray parameter t: a ray is
taken to the unit shape's frame, met there, and t is the distance in metres in the world. One loop over the shapes
updates the nearest hit of all rays at once. The ground follows from x and y (`layout.surface`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from scalr_jax.data.streets import layout
from scalr_jax.data.streets.layout import KERB_HEIGHT, ROAD, Geometry, Ground, Shapes
from scalr_jax.data.streets.texture import Hits, albedo

FAR = 1e6  # metres: the ray meets nothing
Vector = jax.Array | Sequence[jax.Array]  # x, y, z, each [R]


def _turn(vector: Vector, yaw: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, y, z [R] turned by `yaw` radians about z. Components stay apart, so that XLA fuses what follows."""
    x, y, z = vector
    cos, sin = jnp.cos(yaw), jnp.sin(yaw)
    return cos * x - sin * y, sin * x + cos * y, z


def _dot(a: Vector, b: Vector) -> jax.Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _meet_box(origin: Vector, direction: Vector, ragged: jax.Array) -> jax.Array:
    """[R] distance at which rays (x, y, z each [R]) enter the cube from -1 to 1, or FAR."""
    enter, leave = 0.0, FAR
    for start, step in zip(origin, direction, strict=True):
        inverse = 1.0 / jnp.where(jnp.abs(step) < 1e-7, 1e-7, step)
        middle, reach = -start * inverse, jnp.abs(inverse)
        enter, leave = jnp.maximum(enter, middle - reach), jnp.minimum(leave, middle + reach)
    return jnp.where((enter <= leave) & (enter > 0), enter, FAR)


def _meet_cylinder(origin: Vector, direction: Vector, ragged: jax.Array) -> jax.Array:
    """[R] distance at which rays (x, y, z each [R]) enter the upright unit cylinder by its side or its top."""
    x, y, z = origin
    a = direction[0] ** 2 + direction[1] ** 2 + 1e-12
    b = x * direction[0] + y * direction[1]
    root = b * b - a * (x * x + y * y - 1.0)
    side = (-b - jnp.sqrt(jnp.maximum(root, 0.0))) / a
    side = jnp.where((root > 0) & (side > 0) & (jnp.abs(z + side * direction[2]) < 1), side, FAR)
    top = (1.0 - z) / jnp.minimum(direction[2], -1e-7)
    inside = (x + top * direction[0]) ** 2 + (y + top * direction[1]) ** 2 < 1
    return jnp.minimum(side, jnp.where(inside & (top > 0) & (direction[2] < 0), top, FAR))


def _meet_ellipsoid(origin: Vector, direction: Vector, ragged: jax.Array) -> jax.Array:
    """[R] distance at which rays (x, y, z each [R]) enter the unit sphere, whose outline `ragged` tears in steps."""
    a, b = _dot(direction, direction), _dot(origin, direction)
    t = -b / a
    x, y, z = (o + t * d for o, d in zip(origin, direction, strict=True))  # where the ray passes the centre
    torn = jnp.floor(3.5 * x) * 0.37 + jnp.floor(3.5 * y) * 0.71 + jnp.floor(4.0 * z) * 0.53
    room = 1.0 - (x * x + y * y + z * z)
    enter = t - jnp.sqrt(jnp.maximum(room, 0.0) / a)
    return jnp.where((room > 0.5 * ragged * (torn - jnp.floor(torn))) & (enter > 0), enter, FAR)


def _nearest_shape(scene: Geometry, origin: Vector, direction: Vector) -> tuple[jax.Array, jax.Array]:
    """Distance [R] and row [R] of the nearest shape that rays from `origin` along `direction` (x, y, z [R]) meet."""
    shapes = scene.shapes

    def visit(meet):
        def body(i, best):
            distance, row = best
            moved = [o - shapes.center[i, axis] for axis, o in enumerate(origin)]
            start, step = (
                [value / shapes.half[i, axis] for axis, value in enumerate(_turn(vector, -shapes.yaw[i]))]
                for vector in (moved, direction)
            )
            new = meet(start, step, shapes.ragged[i])
            return jnp.minimum(distance, new), jnp.where(new < distance, i, row)

        return body

    best = jnp.full_like(direction[0], FAR), jnp.zeros(direction[0].shape, jnp.int32)
    meets = (_meet_box, _meet_cylinder, _meet_ellipsoid)
    for start, end, meet in zip((0, *scene.ends), scene.ends, meets, strict=False):
        best = jax.lax.fori_loop(start, end, visit(meet), best)
    return best


def _meet_ground(ground: Ground, origin: Vector, direction: Vector) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distance [R], class [R] and patch [R] of the ground each ray meets.

    A ray first meets the raised ground; where that is above the carriageway it goes on down, to the carriageway or,
    when the carriageway has ended by then, to the kerb's face.
    """
    down = jnp.minimum(direction[2], -1e-7)
    upper, lower = (KERB_HEIGHT - origin[2]) / down, -origin[2] / down
    (label_up, patch_up), (label_low, patch_low) = (
        layout.surface(ground, origin[0] + near * direction[0], origin[1] + near * direction[1], jnp)
        for near in (jnp.minimum(upper, 1e3), jnp.minimum(lower, 1e3))
    )
    raised = label_up != ROAD
    kerb = ~raised & (label_low != ROAD)
    distance = jnp.where(raised, upper, jnp.where(kerb, (upper + lower) / 2, lower))
    label = jnp.where(raised, label_up, jnp.where(kerb, layout.PAVEMENT, label_low))
    distance = jnp.where((direction[2] < 0) & (distance > 0) & (distance < 1e3), distance, FAR)
    return distance, label, jnp.where(raised, patch_up, patch_low)


def _normals(kind: jax.Array, unit: jax.Array, half: ArrayLike, yaw: ArrayLike) -> jax.Array:
    """[3, R] outward normals at the points `unit` of shapes of `kind` [R]."""
    size = jnp.abs(unit)
    flat = jnp.where(size == size.max(axis=0), jnp.sign(unit), 0.0)
    lying = jnp.array([0.0, 0.0, 1.0])[:, None]
    curved = unit / half
    upright = jnp.where(size[2] > 0.9999, lying, curved * jnp.array([1.0, 1.0, 0.0])[:, None])
    normal = jnp.where(kind == layout.BOX, flat, jnp.where(kind == layout.CYLINDER, upright, curved))
    return jnp.stack(_turn(normal / (jnp.linalg.norm(normal, axis=0) + 1e-9), yaw))


def cast(scene: Geometry, origin: jax.Array, direction: jax.Array) -> Hits:
    """The first hits of rays from `origin` [3, 1 or R] along the unit vectors `direction` [3, R] (world, metres)."""
    distance, row = _nearest_shape(scene, tuple(origin), tuple(direction))
    below, label, patch = _meet_ground(scene.ground, origin, direction)
    shape: Shapes = jax.tree.map(lambda column: jnp.asarray(column)[row], scene.shapes)
    on_ground = below < distance
    distance = jnp.minimum(distance, below)
    point = origin + jnp.minimum(distance, 1e3) * direction
    unit = jnp.stack(_turn(point - shape.center.T, -shape.yaw)) / shape.half.T
    kind = (row >= scene.ends[0]).astype(jnp.int32) + (row >= scene.ends[1])
    up = jnp.array([0.0, 0.0, 1.0])[:, None]
    return Hits(
        distance=distance,
        point=point,
        normal=jnp.where(on_ground, up, _normals(kind, unit, shape.half.T, shape.yaw)),
        unit=unit,
        half=jnp.asarray(shape.half).T,
        label=jnp.where(on_ground, label, shape.label),
        material=jnp.where(on_ground, label, shape.material),
        instance=jnp.where(on_ground, patch, shape.instance),
        color=jnp.where(on_ground, jnp.asarray(scene.ground.color).T[:, jnp.minimum(label, 2)], shape.color.T),
    )


@jax.jit
def trace_lidar(scene: Geometry, origin: jax.Array, direction: jax.Array) -> tuple[Hits, jax.Array]:
    """Hits of a scan's rays and the albedo [3, R] there. origin [3, 1] metres, direction [3, R] unit vectors."""
    hits = cast(scene, origin, direction)
    return hits, albedo(scene.ground, hits)


@jax.jit
def trace_camera(
    scene: Geometry, origin: jax.Array, direction: jax.Array, sun: jax.Array, sky: jax.Array
) -> tuple[Hits, jax.Array, jax.Array]:
    """Hits of an image's rays, their albedo [3, R] and their shaded colour [3, R].

    origin [3, 1] metres, direction [3, R] unit vectors, sun [4]: unit vector to the sun and its strength,
    sky [3] the colour of the sky overhead.
    """
    hits = cast(scene, origin, direction)
    base = albedo(scene.ground, hits)
    towards = sun[:3, None]
    start = hits.point + 0.02 * hits.normal
    shadow, _ = _nearest_shape(scene, tuple(start), tuple(jnp.broadcast_to(towards, start.shape)))
    lit = jnp.maximum((hits.normal * towards).sum(axis=0), 0.0) * (shadow >= FAR) * sun[3]
    ambient = 0.42 + 0.16 * hits.normal[2] + 0.06 * hits.normal[0]
    color = base * (ambient * (0.85 + 0.25 * sky[:, None]) + lit * jnp.array([1.05, 1.0, 0.9])[:, None])
    haze = 1.0 - jnp.exp(-jnp.minimum(hits.distance, 300.0) / 250.0)
    horizon = jnp.clip(1.0 - 2.2 * direction[2], 0.0, 1.0)
    overhead = sky[:, None] + (0.95 - sky[:, None]) * horizon**2 * 0.8
    color = color + haze * (0.8 - color)
    return hits, base, jnp.where(hits.distance >= FAR, overhead, color)


def keep_view(scene: Geometry, position: np.ndarray, heading: float, half_angle: float) -> Geometry:
    """The scene without the shapes outside a horizontal wedge: position [3] metres, angles in radians.

    Shapes within 12 m stay, so that what stands beside the camera still throws its shadow.
    """
    used = scene.ends[2]
    offset = scene.shapes.center[:used, :2] - position[:2]
    radius = np.linalg.norm(scene.shapes.half[:used, :2], axis=1)
    distance = np.linalg.norm(offset, axis=1)
    bearing = np.abs((np.arctan2(offset[:, 1], offset[:, 0]) - heading + np.pi) % (2 * np.pi) - np.pi)
    wedge = bearing < half_angle + np.arcsin(np.clip(radius / np.maximum(distance, 1e-3), 0.0, 1.0)) + 0.05
    keep = np.flatnonzero(wedge | (distance < radius + 12.0))
    ends = tuple(int(np.searchsorted(keep, end)) for end in scene.ends)
    rows = np.concatenate([keep, np.full(len(scene.shapes.yaw) - len(keep), len(scene.shapes.yaw) - 1)])
    return scene._replace(shapes=Shapes(*(column[rows] for column in scene.shapes)), ends=ends)
