"""Where things stand on a generated street: buildings, fences, vehicles, posts, trees, people, bushes. NumPy only.

Both sides of the road have a style (town, suburb, park) that decides what stands there and how wide the strips are.
Whatever is placed claims its footprint; what comes later and finds its place taken is left out.
"""

from __future__ import annotations

import numpy as np

from scalr_jax.data.streets import layout
from scalr_jax.data.streets.layout import BOX, CYLINDER, ELLIPSOID, KERB_HEIGHT, PAVEMENT, REACH, ROAD, TERRAIN, surface

PAINTS = np.array(
    [(0.8, 0.8, 0.8), (0.12, 0.12, 0.13), (0.45, 0.46, 0.48), (0.55, 0.1, 0.1), (0.12, 0.2, 0.45), (0.25, 0.3, 0.27)]
)
BUS_PAINTS = np.array([(0.85, 0.65, 0.1), (0.75, 0.12, 0.12), (0.15, 0.4, 0.7), (0.1, 0.5, 0.35), (0.85, 0.85, 0.85)])
WOODS = np.array([(0.5, 0.36, 0.22), (0.72, 0.7, 0.66), (0.3, 0.24, 0.2)])
WALLS = np.array([(0.7, 0.62, 0.5), (0.6, 0.35, 0.27), (0.75, 0.74, 0.7), (0.5, 0.5, 0.52), (0.72, 0.6, 0.35)])


def make_street(seed: int) -> layout.Street:
    """The street of `seed`: the same numbers on every machine."""
    builder = _Builder(np.random.default_rng((seed, 0)))
    builder.place_buildings()
    builder.place_vehicles()
    builder.place_posts()
    builder.place_trees()
    builder.place_people()
    builder.place_bushes()
    return builder.finish()


class _Builder:
    """Collects shapes and objects; refuses places that are taken."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.styles = [str(rng.choice(layout.STYLES, p=(0.4, 0.4, 0.2))) for _ in range(2)]
        self.ground = layout.make_ground(rng, self.styles)
        lane = rng.choice([-1, 1])
        self.ego = np.array([0.0, lane * self.ground.lane_width / 2, rng.normal(0, 0.05) + (lane > 0) * np.pi])
        self.rows: list[tuple] = []
        self.size: list[tuple] = []
        self.middle: list[tuple] = []
        self.taken: list[tuple] = []  # footprints: x, y, cos and sin of yaw, half length, half width
        self._take(self.ego[0], self.ego[1], self.ego[2], 5.0, 2.1)
        for width in (2 * self.ground.half_width, *self.ground.walk, 12.0, 12.0, max(*self.ground.verge, 0.1)):
            self.add_object((2 * REACH, width, KERB_HEIGHT), (0.0, 0.0, 0.0))

    # ---- bookkeeping

    def add_object(self, size: tuple, middle: tuple) -> int:
        """A new object of size (length, width, height) and centre, metres; returns its number."""
        self.size.append(size)
        self.middle.append(middle)
        return len(self.size) - 1

    def add(self, kind, middle, half, yaw, label, material, instance, color, ragged=0.0):
        """A new shape of an object."""
        self.rows.append((kind, middle, half, yaw, label, material, instance, np.clip(color, 0.02, 0.95), ragged))

    def claim(self, x, y, yaw, half_length, half_width, allowed=(ROAD, PAVEMENT, TERRAIN)) -> bool:
        """Takes the footprint when it is free, within reach and on `allowed` ground."""
        along, across = np.meshgrid(np.linspace(-1, 1, 7) * half_length, np.linspace(-1, 1, 3) * half_width)
        px = x + np.cos(yaw) * along - np.sin(yaw) * across
        py = y + np.sin(yaw) * along + np.cos(yaw) * across
        if np.hypot(x, y) > REACH or not np.isin(surface(self.ground, px, py)[0], allowed).all():
            return False
        ox, oy, cos, sin, olength, owidth = (column[:, None] for column in np.array(self.taken).T)
        dx, dy = px.ravel() - ox, py.ravel() - oy  # [taken, 21]
        if ((np.abs(cos * dx + sin * dy) < olength + 0.15) & (np.abs(cos * dy - sin * dx) < owidth + 0.15)).any():
            return False
        self._take(x, y, yaw, half_length, half_width)
        return True

    def _take(self, x, y, yaw, half_length, half_width):
        self.taken.append((x, y, np.cos(yaw), np.sin(yaw), half_length, half_width))

    def on_road(self, along: float, across: float) -> tuple[float, float, float]:
        """x, y (metres) and heading of a place beside the main road's axis."""
        bend = self.ground.curvature
        return along, across + 0.5 * bend * along**2, float(np.arctan(bend * along))

    def edge(self, side: int) -> float:
        """Distance from the main road's axis to the outer edge of the pavement, metres."""
        return float(self.ground.half_width + self.ground.verge[side] + self.ground.walk[side])

    def tint(self, palette: np.ndarray, spread: float = 0.06) -> np.ndarray:
        """[3] a colour of the palette [n, 3], jittered."""
        return palette[self.rng.integers(len(palette))] + self.rng.normal(0, spread, 3)

    def finish(self) -> layout.Street:
        """Sorts the shapes by kind and pads them."""
        rows = sorted(self.rows, key=lambda row: row[0])[: layout.CAPACITY]  # 150 streets had 379 at most
        kinds = np.array([row[0] for row in rows])
        boxes, cylinders, ellipsoids = (int((kinds <= kind).sum()) for kind in (BOX, CYLINDER, ELLIPSOID))
        columns = []
        for i in range(1, 9):
            values = np.array([row[i] for row in rows], np.int32 if i in (4, 5, 6) else np.float32)
            padding = np.ones((layout.CAPACITY - len(rows), *values.shape[1:]), values.dtype)
            columns.append(np.concatenate([values, padding]))
        as_floats = (np.array(values, np.float32) for values in (self.size, self.middle, self.ego))
        ground = layout.Ground._make(np.asarray(value, np.float32) for value in self.ground)
        geometry = layout.Geometry(ground, layout.Shapes(*columns), (boxes, cylinders, ellipsoids))
        return layout.Street(geometry, *as_floats)

    # ---- what stands there

    def place_buildings(self):
        """Rows of houses on both sides and along the crossing road; fences, walls and hedges between and before."""
        for side, sign in enumerate((-1, 1)):
            style = self.styles[side]
            setback = {"town": 0.0, "suburb": self.rng.uniform(3.0, 7.0), "park": self.rng.uniform(14, 22)}[style]
            self._row_of_houses(side, sign, style, setback)
            if setback > 0:
                self._fence_line(sign, self.edge(side) + 0.25, 0.7 if style == "suburb" else 0.45)
        if self.ground.cross_at != layout.NO_CROSSING:
            self._houses_on_crossing()

    def _row_of_houses(self, side, sign, style, setback):
        along = -REACH + self.rng.uniform(0, 8)
        while along < REACH:
            length = self.rng.uniform(9, 20) if style == "town" else self.rng.uniform(7, 13)
            height = self.rng.uniform(7, 18) if style == "town" else self.rng.uniform(4.5, 8)
            depth = self.rng.uniform(8, 11)
            front = self.edge(side) + setback + self.rng.uniform(0.1, 0.8)
            x, y, yaw = self.on_road(along + length / 2, sign * (front + depth / 2))
            if self.claim(x, y, yaw, length / 2, depth / 2, (TERRAIN,)):
                self._house(x, y, yaw, length, depth, height)
            gap = self.rng.uniform(0.4, 1.0) if style == "town" and self.rng.random() < 0.6 else self.rng.uniform(3, 8)
            if gap > 3:
                self._fence(*self.on_road(along + length + gap / 2, sign * (front + 1.0)), gap / 2)
            along += length + gap

    def _house(self, x, y, yaw, length, depth, height):
        instance = self.add_object((length, depth, height), (x, y, height / 2))
        half = (length / 2, depth / 2, height / 2)
        self.add(BOX, (x, y, height / 2), half, yaw, layout.BUILDING, layout.FACADE, instance, self.tint(WALLS))

    def _houses_on_crossing(self):
        for sign in (-1, 1):
            for direction in (-1, 1):
                across = self.rng.uniform(20, 26)
                while across < REACH - 5:
                    length, depth, height = self.rng.uniform(8, 15), self.rng.uniform(8, 10), self.rng.uniform(5, 12)
                    out = self.ground.cross_half_width + self.ground.cross_walk + self.rng.uniform(0.2, 3) + depth / 2
                    x, y = self.ground.cross_at + sign * out, direction * (across + length / 2)
                    if self.claim(x, y, np.pi / 2, length / 2, depth / 2, (TERRAIN,)):
                        self._house(x, y, np.pi / 2, length, depth, height)
                    across += length + self.rng.uniform(0.5, 5)

    def _fence_line(self, sign, distance, density):
        for along in np.arange(-50, 50, 6.0):
            if self.rng.random() < density:
                self._fence(*self.on_road(along, sign * distance), 2.95)
            if self.rng.random() < 0.25:  # between two gardens
                x, y, yaw = self.on_road(along + 3.0, sign * (distance + 2.4))
                self._fence(x, y, yaw + np.pi / 2, 2.1)

    def _fence(self, x, y, yaw, half_length):
        hedge = self.rng.random() < 0.25
        half = (half_length, self.rng.uniform(0.3, 0.6) if hedge else self.rng.uniform(0.04, 0.14),
                self.rng.uniform(0.45, 1.0))  # fmt: skip
        if not self.claim(x, y, yaw, half[0], half[1], (TERRAIN, PAVEMENT)):
            return
        middle = (x, y, half[2] + KERB_HEIGHT)
        instance = self.add_object(tuple(2 * h for h in half), middle)
        if hedge:
            self.add(BOX, middle, half, yaw, layout.VEGETATION, layout.LEAVES, instance, self._green())
            return
        material = layout.PLANKS if self.rng.random() < 0.6 else layout.BRICKS
        color = self.tint(WOODS if material == layout.PLANKS else WALLS)
        self.add(BOX, middle, half, yaw, layout.FENCE, material, instance, color)

    def _green(self) -> np.ndarray:
        return np.array([0.16, 0.3, 0.1]) * self.rng.uniform(0.7, 1.4) + self.rng.normal(0, 0.02, 3)

    def place_posts(self):
        """Lamps and signs near the kerb, bollards on the pavement. All are poles."""
        for sign in (-1, 1):
            for along in np.arange(-48, 48, 6.0) + self.rng.uniform(0, 6):
                kerb = self.ground.half_width + self.rng.uniform(0.4, 0.9)
                kind = self.rng.choice(["lamp", "sign", "bollard", "none"], p=(0.35, 0.3, 0.2, 0.15))
                radius, height = {
                    "lamp": (self.rng.uniform(0.13, 0.19), self.rng.uniform(5, 8)),
                    "sign": (self.rng.uniform(0.08, 0.12), self.rng.uniform(2.2, 3.2)),
                    "bollard": (self.rng.uniform(0.14, 0.2), self.rng.uniform(0.8, 1.2)),
                    "none": (0.0, 0.0),
                }[str(kind)]
                x, y, yaw = self.on_road(along + self.rng.uniform(-2, 2), sign * kerb)
                if radius and self.claim(x, y, yaw, 0.35, 0.35, (PAVEMENT, TERRAIN)):
                    self._post(x, y, yaw, radius, height, kind == "sign")

    def _post(self, x, y, yaw, radius, height, has_plate):
        middle = (x, y, height / 2)
        instance = self.add_object((2 * radius, 2 * radius, height), middle)
        color = np.full(3, self.rng.uniform(0.2, 0.6))
        self.add(CYLINDER, middle, (radius, radius, height / 2), 0.0, layout.POLE, layout.METAL, instance, color)
        if has_plate:
            palette = np.array([(0.8, 0.1, 0.1), (0.1, 0.2, 0.7), (0.85, 0.75, 0.1)])
            half = (0.03, self.rng.uniform(0.3, 0.45), self.rng.uniform(0.3, 0.45))
            self.add(BOX, (x, y, height), half, yaw, layout.POLE, layout.SIGN, instance, self.tint(palette, 0.03))

    def place_trees(self):
        """Trunks with crowns: on the verge or at the inner edge of the pavement, behind it, and many in parks."""
        for side, sign in enumerate((-1, 1)):
            verge = self.ground.verge[side]
            first = self.ground.half_width + (verge / 2 if verge else 0.7)
            for along in np.arange(-50, 50, 8.0) + self.rng.uniform(0, 8):
                if self.rng.random() < (0.65 if verge else 0.35):
                    self._tree(*self.on_road(along + self.rng.uniform(-1.5, 1.5), sign * first)[:2])
            number = {"town": 0, "suburb": 8, "park": 22}[self.styles[side]]
            for _ in range(number):
                across = self.edge(side) + self.rng.uniform(0.8, 12.0 if number > 8 else 4.0)
                self._tree(*self.on_road(self.rng.uniform(-45, 45), sign * across)[:2])

    def _tree(self, x, y):
        if not self.claim(x, y, 0.0, 0.5, 0.5, (PAVEMENT, TERRAIN)):
            return
        radius, height = self.rng.uniform(0.12, 0.32), self.rng.uniform(2.2, 3.6)
        spread = self.rng.uniform(1.1, 2.2)
        instance = self.add_object((2 * spread, 2 * spread, height + 2 * spread), (x, y, height / 2 + spread))
        bark = np.array([0.3, 0.23, 0.17]) * self.rng.uniform(0.7, 1.3)
        half = (radius, radius, height / 2 + 0.4)
        self.add(CYLINDER, (x, y, height / 2), half, 0.0, layout.TRUNK, layout.BARK, instance, bark)
        green = self._green()
        for _ in range(self.rng.integers(1, 3)):
            half = spread * self.rng.uniform(0.8, 1.1, 3)
            dx, dy = self.rng.uniform(-0.35, 0.35, 2) * spread
            middle = (x + dx, y + dy, height + 0.75 * half[2])
            self.add(ELLIPSOID, middle, half, 0.0, layout.VEGETATION, layout.LEAVES, instance, green, 0.6)

    def place_bushes(self):
        """Low ellipsoids of leaves on unpaved ground."""
        for _ in range(70):
            side = int(self.rng.integers(2))
            across = (2 * side - 1) * (self.edge(side) + self.rng.uniform(-3.0, 9.0))
            x, y, _ = self.on_road(self.rng.uniform(-40, 40), across)
            half = self.rng.uniform(0.35, 1.1, 3)
            if self.styles[side] != "town" and self.claim(x, y, 0.0, half[0], half[1], (TERRAIN,)):
                middle = (x, y, 0.6 * half[2])
                instance = self.add_object(tuple(2 * half), middle)
                self.add(ELLIPSOID, middle, half, 0.0, layout.VEGETATION, layout.LEAVES, instance, self._green(), 0.4)

    def place_people(self):
        """Singles and small groups: most on the pavement near the vehicle, some on the road and on the grass."""
        for _ in range(22):
            side = int(self.rng.integers(2))
            out = self.ground.half_width + self.ground.verge[side] + self.rng.uniform(0.3, 1.0) * self.ground.walk[side]
            across = self.rng.uniform(-1, 1) * out if self.rng.random() < 0.2 else (2 * side - 1) * out
            along = self.rng.normal(0, 14)
            for _ in range(self.rng.choice([1, 2, 3], p=(0.6, 0.3, 0.1))):
                x, y, _ = self.on_road(along + self.rng.uniform(-0.7, 0.7), across + self.rng.uniform(-0.7, 0.7))
                if self.claim(x, y, 0.0, 0.25, 0.25):
                    self._person(x, y)

    def _person(self, x, y):
        height, yaw = self.rng.uniform(1.45, 1.9), self.rng.uniform(-np.pi, np.pi)
        base = float(surface(self.ground, np.float64(x), np.float64(y))[0] != ROAD) * KERB_HEIGHT
        instance = self.add_object((0.45, 0.35, height), (x, y, base + height / 2))
        top, legs = self.rng.uniform(0.05, 0.8, 3), np.array([0.15, 0.17, 0.25]) * self.rng.uniform(0.4, 2)
        parts = (
            (CYLINDER, 0.23 * height, (0.11, 0.17, 0.23 * height), layout.CLOTHES, legs),
            (ELLIPSOID, 0.63 * height, (0.17, 0.27, 0.23 * height), layout.CLOTHES, top),
            (ELLIPSOID, 0.92 * height, (0.11, 0.1, 0.08 * height), layout.SKIN, np.array([0.7, 0.52, 0.42])),
        )
        for kind, z, half, material, color in parts:
            self.add(kind, (x, y, base + z), half, yaw, layout.PERSON, material, instance, color)

    def place_vehicles(self):
        """Parked at the kerb, driving in the lanes, and on the crossing road."""
        ground = self.ground
        for sign in (-1, 1):
            for lane in np.arange(0.5 * ground.lane_width, ground.half_width - 1.0, ground.lane_width):
                along = -REACH + self.rng.uniform(0, 15)
                while along < REACH:
                    self._vehicle(*self.on_road(along, sign * lane), (0.5, 0.25, 0.25), sign)
                    along += self.rng.uniform(11, 30)
            if ground.half_width > ground.lane_width:
                for along in np.arange(-45, 45, 6.3):
                    if self.rng.random() < 0.5:
                        self._vehicle(*self.on_road(along, sign * (ground.half_width - 1.15)), (0.7, 0.25, 0.05), sign)
        for across in np.arange(-54, 55, 13.0) if ground.cross_at != layout.NO_CROSSING else ():
            sign = self.rng.choice([-1, 1])
            x = ground.cross_at + sign * ground.cross_half_width / 2
            self._vehicle(x, across + self.rng.uniform(-3, 3), np.pi / 2, (0.5, 0.25, 0.25), -sign)

    def _vehicle(self, x, y, yaw, shares, sign):
        """A car, van or bus (`shares`: of each) whose front points along yaw, or backwards where sign > 0."""
        kind = str(self.rng.choice(["car", "van", "bus"], p=shares))
        yaw = yaw + np.pi * (sign > 0) + self.rng.normal(0, 0.03)
        low, high = {"car": ((3.8, 1.7, 1.4), (4.8, 1.9, 1.7)), "van": ((4.9, 1.9, 1.95), (6.2, 2.1, 2.6)),
                     "bus": ((9.5, 2.45, 2.9), (12.0, 2.6, 3.3))}[kind]  # fmt: skip
        length, width, height = self.rng.uniform(low, high)
        if not self.claim(x, y, yaw, length / 2 + 0.3, width / 2, (ROAD,)):
            return
        instance = self.add_object((length, width, height), (x, y, height / 2))

        def part(start, end, bottom, top, shrink, label, material, color):
            middle, direction = (start + end) / 2 - length / 2, np.array([np.cos(yaw), np.sin(yaw)])
            position = (*(np.array([x, y]) + middle * direction), (bottom + top) / 2)
            half = ((end - start) / 2, width / 2 - shrink, (top - bottom) / 2)
            self.add(BOX, position, half, yaw, label, material, instance, color)

        if kind == "car":
            paint, back, hood = self.tint(PAINTS), self.rng.uniform(0.02, 0.18), self.rng.uniform(0.25, 0.32)
            waist = height * self.rng.uniform(0.56, 0.62)
            part(0.0, length, 0.2, waist, 0.0, layout.CAR, layout.BODY, paint)
            part(back * length, (1 - hood) * length, waist, height, 0.1, layout.CAR, layout.CABIN, paint)
        elif kind == "van":
            paint, hood = self.tint(PAINTS[[0, 0, 1, 3, 4]]), self.rng.uniform(0.6, 1.0)
            part(0.0, length - hood, 0.25, height, 0.0, layout.VAN, layout.VAN_BODY, paint)
            part(length - hood, length, 0.25, 0.5 * height, 0.02, layout.VAN, layout.BODY, paint)
        else:
            part(0.0, length, 0.28, height, 0.0, layout.BUS, layout.BUS_BODY, self.tint(BUS_PAINTS))
