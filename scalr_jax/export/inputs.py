"""Inputs of an exported program, made from points with NumPy alone (no JAX): the last step before the network.

    settings = json.loads(Path("EXPORT/config.json").read_text())["settings"]
    inputs, nearest = make_inputs(points, settings)          # for model.onnx
    inputs = pad_inputs(inputs, settings)                    # and for model.stablehlo also this
    rows = session.run(["features"], inputs)[0][nearest]     # a row for every point; nearest is -1 where there is none

Inputs, with N points that go through the network, K neighbours, and for each plane p of xy, xz, yz: M occupied cells,
H halo cells and Q partial sums. Index -1 reads a zero row.

    feats            [N, F] float32  normalised intensity, x, y, z, distance to the origin (metres)
    neighbors        [N, K] int32    nearest other points
    cell_p           [N] int32       the point's cell
    inverse_count_p  [M] float32     1 / (points in the cell + 1e-6)
    halo_taps_p      [H, 9] int32    cells of the 3x3 window around each halo cell, row by row
    cell_taps_p      [M, 9] int32    halo cells of the window around each cell
    order_p          [N] int32       points sorted by cell (stablehlo)
    sums_p           [Q, 8] int32    the tree of sums, see `sum_tree` (onnx)
    levels_p         [7] int64       where each of its six levels begins, and Q (onnx)
    roots_p          [M] int32       which of its sums is the cell's (onnx)

PyTorch's loader (torch) reads feats, neighbors and cell_p, there row * columns + column in the plane's grid.

A VaViT's are feats and neighbors, with N points sorted by floor(x / size), then floor(y / size), and for T occupied
pillars of `size` metres:

    pillar           [N] int32       the point's pillar, ascending
    coordinates      [T, 2] float32  x, y of each centre in metres
    maxima           [Q, 8] int32    a tree of maxima, as `sum_tree`, that repeats a row where fewer are left (onnx)
    levels, roots    [7], [T]        likewise (onnx)

A MinkUNet's (stablehlo) are feats, offset [N, 3] float32, where each point is in its voxel, -0.5 to 0.5 from the centre
in voxels, and the tables of `export.voxel_tables.voxel_tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from scalr_jax.data.packing import Capacities, round_up
from scalr_jax.data.scenes import SceneNeeds, SceneView
from scalr_jax.data.whole_scan import check_points, whole_scan
from scalr_jax.export.voxel_tables import BLOCK, voxel_tables
from scalr_jax.ops import voxels
from scalr_jax.ops.voxels import extent_of
from scalr_jax.runtime.errors import InputError

PLANES = ("xy", "xz", "yz")
LEVELS, PARTS = 6, 8  # a cell holds at most 8^6 points
HEADS = {"distill": "distilled", "segment": "logits", "mlp": "logits", "linear": "logits"}  # head -> its output


def make_inputs(points: ArrayLike, settings: Mapping) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The inputs by name, and for each input point [N] the row of its result (-1: none).

    Args:
      points: [N, 4], x, y, z in metres and raw intensity, in the frame of the training data.
      settings: `settings` of the export's config.json.

    Raises:
      InputError: points that are none, or too few of them in the field of view.
    """
    needs = needs_of(settings)
    scene, nearest = whole_scan(check_points(points), needs, settings["intensity"], settings["voxel_size"])
    return scene_inputs(scene, needs, settings["format"]), nearest


def needs_of(settings: Mapping) -> SceneNeeds:
    """The needs of an exported program's backbone. Exports made before settings had `needs` say it by their name."""
    low, high = settings["field_of_view"]
    needs = SceneNeeds((tuple(low), tuple(high)), **settings.get("needs", {}))
    if "needs" not in settings and settings.get("name", "waffleiron") == "waffleiron":
        needs = needs._replace(num_neighbors=settings["num_neighbors"], grids=settings["grids"])
    elif "needs" not in settings:
        needs = needs._replace(voxel_size=settings["minkunet"]["voxel_size"])
    return needs._replace(grids=tuple((rows, columns) for rows, columns in needs.grids))


def scene_inputs(scene: SceneView, needs: SceneNeeds, form: str) -> dict[str, np.ndarray]:
    """The inputs of an "onnx" or "stablehlo" program, or of a WaffleIron's `torch_loader`, of a prepared scene."""
    if scene.voxels is not None and needs.voxel_size is not None:
        coordinates = scene.voxels.coordinates
        tables = voxel_tables(coordinates, extent_of(needs.field_of_view, needs.voxel_size))
        return {"feats": scene.feats, "offset": coordinates % 1.0 - 0.5, **tables}
    inputs = {"feats": scene.feats, "neighbors": scene.neighbors}
    if scene.pillars is not None:
        inputs |= {"pillar": scene.pillars.cell, "coordinates": scene.pillars.coordinates}
        if form == "onnx":
            sums, levels, roots = sum_tree(np.arange(len(scene.feats)), np.bincount(scene.pillars.cell))
            inputs |= {"maxima": np.where(sums < 0, sums[:, :1], sums), "levels": levels, "roots": roots}
        return inputs
    for name, plane in zip(PLANES, scene.planes, strict=True):
        if form == "torch":
            inputs[f"cell_{name}"] = plane.position[plane.cell]
            continue
        count = np.bincount(plane.cell, minlength=len(plane.position))
        inputs[f"cell_{name}"] = plane.cell
        inputs[f"inverse_count_{name}"] = (1.0 / (count + 1e-6)).astype(np.float32)  # + 1e-6 as published
        inputs[f"halo_taps_{name}"] = plane.halo_taps
        inputs[f"cell_taps_{name}"] = plane.cell_taps
        if form == "onnx":
            tree = sum_tree(plane.order, count)
            inputs |= {f"{part}_{name}": array for part, array in zip(("sums", "levels", "roots"), tree, strict=True)}
        else:
            inputs[f"order_{name}"] = plane.order
    return inputs


def sum_tree(order: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How to add up the points of each cell, eight rows at a time, with gathers alone.

    A sum of level 0 is that of up to eight points of one cell, a sum of level l that of up to eight sums of level
    l - 1. A cell whose points fit one sum has no part in the levels above. (ONNX has no segment sum: onnxruntime 1.32
    loses additions when ScatterND(reduction="add") runs on several threads, ScatterElements needs an index an element,
    and a float32 cumulative sum is not exact.)

    Args:
      order: [N] points sorted by cell.
      count: [M] points of each cell, at least 1.

    Returns:
      sums [Q, 8] int32 rows of the level below (-1: none), levels [7] int64 where each level begins in `sums`, and
      roots [M] int32 the row in `sums` of each cell's sum.
    """
    roots, cells = np.empty(len(count), np.int64), np.arange(len(count))
    below, first = np.append(order, -1), np.cumsum(count) - count
    sums, begins = [], [0]
    for _ in range(LEVELS):
        parts = -(-count // PARTS)
        begin = np.cumsum(parts) - parts  # of each cell's sums in this level
        owner = np.repeat(np.arange(len(parts)), parts)
        rows = PARTS * (np.arange(len(owner)) - begin[owner])[:, None] + np.arange(PARTS)
        rows = np.where(rows < count[owner, None], first[owner, None] + rows, -1)
        sums.append(below[rows] if len(sums) == 0 else rows)
        roots[cells] = begins[-1] + begin
        begins.append(begins[-1] + len(owner))
        more = parts > 1
        cells, count, first = cells[more], parts[more], begin[more]
    if len(cells):
        raise InputError(f"a cell holds more than {PARTS**LEVELS} points; take a larger voxel_size or a finer grid")
    return np.concatenate(sums).astype(np.int32), np.array(begins, np.int64), roots.astype(np.int32)


class Input(NamedTuple):
    """One array that a program reads."""

    dtype: type
    shape: tuple[int | str, ...]  # names are counts that differ from scene to scene
    filler: int | None = 0  # of rows of padding; None: each row's own number


def input_table(needs: SceneNeeds, form: str, num_features: int) -> dict[str, Input]:
    """Every input of an "onnx" or "stablehlo" program, by name."""
    table = {"feats": Input(np.float32, ("N", num_features))}
    if needs.voxel_size is not None:
        return table | _voxel_inputs()
    table["neighbors"] = Input(np.int32, ("N", needs.num_neighbors))
    if needs.pillar_size is not None:
        table |= {"pillar": Input(np.int32, ("N",), -1), "coordinates": Input(np.float32, ("T", 2))}
        if form == "onnx":
            table |= {"maxima": Input(np.int32, ("Q", PARTS)), "levels": Input(np.int64, (LEVELS + 1,))}
            table["roots"] = Input(np.int32, ("T",))
        return table
    for p in PLANES:
        table[f"cell_{p}"] = Input(np.int32, ("N",), -1)
        table[f"inverse_count_{p}"] = Input(np.float32, (f"M_{p}",))
        table[f"halo_taps_{p}"] = Input(np.int32, (f"H_{p}", 9), -1)
        table[f"cell_taps_{p}"] = Input(np.int32, (f"M_{p}", 9), -1)
        if form == "onnx":
            table[f"sums_{p}"] = Input(np.int32, (f"Q_{p}", PARTS))
            table[f"levels_{p}"] = Input(np.int64, (LEVELS + 1,))
            table[f"roots_{p}"] = Input(np.int32, (f"M_{p}",))
        else:
            table[f"order_{p}"] = Input(np.int32, ("N",), None)
    return table


def _voxel_inputs() -> dict[str, Input]:
    """A MinkUNet's, but the features: B and D count the blocks of pairs of `near` and of `down` and `up`."""
    table = {
        "offset": Input(np.float32, ("N", 3)),
        "cell": Input(np.int32, ("N",), -1),
        "order": Input(np.int32, ("N",), None),
        "inverse_count": Input(np.float32, ("V_0",)),
        "number": Input(np.int32, (voxels.LEVELS,)),
        "neighbors": Input(np.int32, ("V_0", 27), -1),
    }
    for level in range(voxels.LEVELS):
        table[f"near_source_{level}"] = Input(np.int32, (f"{BLOCK}*B_{level}",), -1)
        table[f"near_element_{level}"] = Input(np.int32, (f"B_{level}",), 25)
        table[f"near_slots_{level}"] = Input(np.int32, (f"V_{level}", 26), -1)
        if level + 1 < voxels.LEVELS:
            for way in ("down", "up"):
                table[f"{way}_source_{level}"] = Input(np.int32, (f"{BLOCK}*D_{level}",), -1)
            table[f"down_element_{level}"] = Input(np.int32, (f"D_{level}",), 7)
            table[f"down_slots_{level}"] = Input(np.int32, (f"V_{level + 1}", 8), -1)
            table[f"up_slots_{level}"] = Input(np.int32, (f"V_{level}", 1), -1)
    return table


def pad_inputs(inputs: Mapping[str, np.ndarray], settings: Mapping) -> dict[str, np.ndarray]:
    """The same with rows of padding, to sizes of a short list, so that a program is compiled a few times only.

    Padded rows come last and nothing that is not padding reads them; the first N rows of a result are the points'.
    """
    needs, (num_points, num_features) = needs_of(settings), inputs["feats"].shape
    sizes: dict[int | str, int] = {}
    if needs.pillar_size is not None:
        capacities = round_up(Capacities(num_points, 1, (), (), pillars=(len(inputs["coordinates"]),)), ())
        sizes["T"] = capacities.pillars[0]
    elif needs.voxel_size is None:
        cells, halo = (tuple(len(inputs[f"{taps}_taps_{p}"]) for p in PLANES) for taps in ("cell", "halo"))
        capacities = round_up(Capacities(num_points, 1, cells, halo), needs.grids)
        for p, num_cells, num_halo in zip(PLANES, capacities.cells, capacities.halo, strict=True):
            sizes |= {f"M_{p}": num_cells, f"H_{p}": num_halo}
    else:
        pairs = tuple(int((inputs[f"near_source_{level}"] >= 0).sum()) for level in range(voxels.LEVELS))
        capacities = round_up(Capacities(num_points, 1, (), (), tuple(inputs["number"].tolist()), pairs), ())
        for level, (rows, room) in enumerate(zip(capacities.voxels, capacities.pairs, strict=True)):
            # 26 or 8 elements, each with a part of a block unused, and one block more: its last slot is the zero row.
            near, down = room // BLOCK + 27, rows // BLOCK + 9
            sizes |= {f"V_{level}": rows, f"B_{level}": near, f"D_{level}": down}
            sizes |= {f"{BLOCK}*B_{level}": BLOCK * near, f"{BLOCK}*D_{level}": BLOCK * down}
    sizes["N"] = capacities.points
    padded = {}
    for name, (_, shape, filler) in input_table(needs, "stablehlo", num_features).items():
        array, rows = inputs[name], sizes.get(shape[0], len(inputs[name]))
        pads = [(0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)]
        padded[name] = np.pad(array, pads, constant_values=filler or 0)
        if filler is None:
            padded[name][len(array) :] = np.arange(len(array), rows)
    return padded
