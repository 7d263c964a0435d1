"""Scenes for the benches: packed scenes of realistic sizes, real ones, generated ones or a saved batch.

mix:     scenes in the proportions of the published pretraining (nuScenes 28,130 : KITTI 19,130 : Pandar64 3,920 :
         PandarGT 3,920), of eight scenes four, three and one, packed without gaps.
padded:  the same scenes in a buffer of 20,000 points a scene, which is what a batch costs that is padded.

Packing is NumPy alone; readers and neighbour search are imported only when scenes are made, so that a saved batch can
be timed on a machine that has JAX and Flax and little else.
"""

from __future__ import annotations

import argparse
import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.bench.timing import positive, two_sizes
from scalr_jax.data.packing import Capacities, add, pack_shard, sizes, stack_shards
from scalr_jax.data.scenes import Batch, Frame, Pillars, Plane, SceneNeeds, SceneView
from scalr_jax.runtime.chips import check_room
from scalr_jax.runtime.errors import InputError

# One period of the mixture; half of it are eight scenes.
ORDER = ["nuscenes", "kitti", "nuscenes", "kitti", "nuscenes", "pandar64", "nuscenes", "kitti"]
ORDER += ["pandargt" if name == "pandar64" else name for name in ORDER]
MAX_POINTS = 20_000
NESTED = ("planes", "pillars")  # fields of `Batch` that are tuples of arrays
SCENES = ("mix", "padded")


class Scenes(NamedTuple):
    """A packed batch of one shard, D = 1, and what it is made of."""

    batch: Batch
    grids: tuple[tuple[int, int], ...]
    source: str  # "real", "generated"
    names: tuple[str, ...]

    @property
    def num_points(self) -> int:
        """Valid points."""
        return int(self.batch.scene_points.sum())

    @property
    def num_scenes(self) -> int:
        return int((self.batch.scene_points > 0).sum())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `get_scenes` reads."""
    parser.add_argument("--scenes", choices=SCENES, default="mix", help="mix: packed; padded: 20,000 points a scene")
    parser.add_argument(
        "--root", default="", help="folder that holds nuscenes, semantic_kitti, pandaset; none: generated"
    )
    parser.add_argument("--num_scenes", type=positive, default=8, help="scenes in the batch")
    parser.add_argument("--image_size", type=two_sizes, default=None, help="rows,columns (default 224,448)")
    parser.add_argument("--max_points", type=positive, default=MAX_POINTS, help="of a scene")
    parser.add_argument("--batch", default="", help="a batch that --save_batch wrote, instead of making scenes")
    parser.add_argument("--save_batch", default="", help="write the packed scenes to this .npz")


def get_scenes(arguments: argparse.Namespace) -> Scenes:
    """Makes or loads the scenes that the arguments ask for, and prints what they are."""
    if arguments.batch:
        if arguments.scenes != "mix" or arguments.root:
            raise InputError("--batch already holds packed scenes; give it without --scenes and --root")
        scenes = load(Path(arguments.batch))
        if arguments.image_size:
            scenes = scenes._replace(batch=resized(scenes.batch, arguments.image_size))
    else:
        scenes = make(arguments)
    if arguments.save_batch:
        save(Path(arguments.save_batch), scenes)
        print(f"saved as {arguments.save_batch}")
    points, room = scenes.num_points, scenes.batch.scene.size
    tables = [
        (int((plane.inverse_count > 0).sum()), int((plane.halo_taps.min(-1) < plane.cell_taps.shape[1]).sum()))
        for plane in scenes.batch.planes
    ]
    print(f"{scenes.num_scenes} {scenes.source} scenes, {points} points in room for {room}")
    print(f"occupied and halo cells by plane: {', '.join(f'{cells} and {halo}' for cells, halo in tables)}")
    if scenes.batch.pillars is not None:
        print(f"occupied pillars by scene: {', '.join(map(str, scenes.batch.pillars.counts[0]))}")
    return scenes


def make(arguments: argparse.Namespace) -> Scenes:
    """Reads or generates scenes and packs them."""
    from scalr_jax.data.sensors import PRETRAINING
    from scalr_jax.data.transforms import SceneSettings, make_scene

    settings = SceneSettings(
        task="distill",
        train=True,
        needs=SceneNeeds(PRETRAINING.field_of_view, 16, PRETRAINING.grids, pillar_size=0.5),
        max_points=arguments.max_points,
        image_size=arguments.image_size or (224, 448),
    )
    rows, columns = settings.image_size
    points = 100 * (arguments.max_points if arguments.scenes == "padded" else 1)
    check_room(arguments.num_scenes * (3 * rows * columns + points), "a batch of such scenes", "lower --num_scenes")
    if not arguments.root:
        print("no --root: these scenes are generated, of about the sizes of real ones")
    order = list(itertools.islice(itertools.cycle(ORDER), arguments.num_scenes))
    get_frame = _real_frame(Path(arguments.root)) if arguments.root else _generated_frame
    views = []
    for index, name in enumerate(order):
        frame, intensity = get_frame(name, order[:index].count(name), settings.image_size)
        views.append(make_scene(frame, index, intensity, settings, np.random.default_rng((0, index))))
    grids = settings.needs.grids
    batch = pack(views, grids, points_a_scene=arguments.max_points if arguments.scenes == "padded" else None)
    return Scenes(batch, grids, "real" if arguments.root else "generated", tuple(view.name for view in views))


def pack(views: list[SceneView], grids: tuple[tuple[int, int], ...], *, points_a_scene: int | None) -> Batch:
    """All scenes in one shard [1, ...]: capacities are what they need, rounded up to 128 rows, or so many points."""
    need = Capacities(0, 0, (0,) * len(grids), (0,) * len(grids), pillars=(0,) * len(sizes(views[0]).pillars))
    for view in views:
        need = add(need, sizes(view))

    def up(n: int) -> int:
        return -(-n // 128) * 128

    points = up(need.points) if points_a_scene is None else points_a_scene * len(views)
    tables = (tuple(map(up, table)) for table in need[2:])
    capacities = Capacities(points, len(views), *tables)
    return stack_shards([pack_shard(views, capacities, views[0], grids)])


def _real_frame(root: Path) -> Callable[[str, int, tuple[int, int]], tuple[Frame, tuple[float, float]]]:
    """A function (sensor, how many of it before, image size) -> (frame, intensity statistics) that reads below `root`.

    Datasets with several cameras show the next one each time; a folder of few frames begins again.
    """
    from scalr_jax.data.readers import nuscenes, pandaset, semantic_kitti

    version = "v1.0-trainval" if (root / "nuscenes" / "v1.0-trainval").is_dir() else "v1.0-mini"
    readers = {
        "nuscenes": lambda: nuscenes.NuScenes(root / "nuscenes", version=version, split="all"),
        "kitti": lambda: semantic_kitti.SemanticKITTI(root / "semantic_kitti", split="train"),
        "pandar64": lambda: pandaset.PandaSet(root / "pandaset", sensor="pandar64", split="all"),
        "pandargt": lambda: pandaset.PandaSet(root / "pandaset", sensor="pandargt", split="all"),
    }
    opened = {}

    def frame(name: str, count: int, image_size: tuple[int, int]) -> tuple[Frame, tuple[float, float]]:
        del image_size  # the image is resized with the scene
        if name not in opened:
            opened[name] = readers[name]()
        dataset = opened[name]
        camera = dataset.cameras[count % len(dataset.cameras)]
        return dataset.frame(count % len(dataset), camera=camera), dataset.intensity(0)

    return frame


def _generated_frame(name: str, count: int, image_size: tuple[int, int]) -> tuple[Frame, tuple[float, float]]:
    """A generated street seen by a lidar as dense as the real one, within one camera's field; the image is noise."""
    from scalr_jax.data.streets.sensors import project

    # Lowest and highest beam (degrees), beams, rays a beam inside 90 degrees, furthest return (metres).
    low, high, beams, rays, max_range = {
        "nuscenes": (-30.0, 10.0, 32, 272, 70.0),
        "kitti": (-24.8, 2.0, 64, 500, 80.0),
        "pandar64": (-25.0, 15.0, 64, 1_000, 120.0),
        "pandargt": (-10.0, 10.0, 150, 400, 120.0),
    }[name]
    seed = 1_000 * ORDER.index(name) + count
    rng = np.random.default_rng((seed, 2))
    points, labels, intensity = scan_street(seed, rng, (low, high), 90.0, beams, rays, max_range)
    pixels, visible = project(points[:, :3].astype(np.float64), 0, image_size)
    image = rng.integers(0, 256, (*image_size, 3), dtype=np.uint8)
    return Frame(f"generated/{name}/{count}", points, np.eye(4), image, pixels, visible, labels), intensity


def scan_street(
    seed: int, rng: np.random.Generator, elevation: tuple, azimuth: float, beams: int, rays: int, max_range: float
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """A generated street seen by such a lidar: points [N, 4], labels [N] and intensity statistics."""
    from scalr_jax.data.streets import sensors
    from scalr_jax.data.streets.builder import make_street

    sensor = sensors.SENSORS["beams64"]._replace(
        elevation=elevation, num_beams=beams, azimuth=azimuth, num_azimuths=rays, max_range=max_range
    )
    street = make_street(seed)
    return *sensors.scan(street, sensor, *sensors.pose(street, sensor, rng), rng), sensor.intensity


def resized(batch: Batch, size: tuple[int, int]) -> Batch:
    """The batch with images of another size (nearest pixel: only sizes matter to a bench) and their pixels."""
    if batch.images is None or batch.pixels is None:
        raise InputError("the batch has no images, so --image_size has nothing to resize")
    old = batch.images.shape[2:4]
    rows, columns = (np.arange(new) * was // new for new, was in zip(size, old, strict=True))
    pixels = (batch.pixels * np.array(size) // np.array(old)).astype(np.int32)
    return batch._replace(images=batch.images[:, :, rows][:, :, :, columns], pixels=pixels)


def save(path: Path, scenes: Scenes) -> None:
    """Writes a plain .npz: the fields of `Batch`, those of plane k as "planes.k.field", those of pillars as
    "pillars.field", grids, names and source."""
    arrays = {name: x for name, x in scenes.batch._asdict().items() if x is not None and name not in NESTED}
    if scenes.batch.pillars is not None:
        arrays |= {f"pillars.{name}": value for name, value in scenes.batch.pillars._asdict().items()}
    for k, plane in enumerate(scenes.batch.planes):
        arrays |= {f"planes.{k}.{name}": value for name, value in plane._asdict().items()}
    with path.open("wb") as file:
        np.savez_compressed(
            file, grids=np.array(scenes.grids), names=np.array(scenes.names), source=np.array(scenes.source), **arrays
        )


def load(path: Path) -> Scenes:
    """Reads what `save` wrote. Raises `InputError` when it is something else or of an older form."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        grids = tuple((int(h), int(w)) for h, w in arrays["grids"])
        planes = tuple(
            Plane(**{name: arrays[f"planes.{k}.{name}"] for name in Plane._fields}) for k in range(len(grids))
        )
        fields = {name: arrays.get(name) for name in Batch._fields if name not in NESTED}
        if "pillars.cell" in arrays:
            fields["pillars"] = Pillars(**{name: arrays[f"pillars.{name}"] for name in Pillars._fields})
        required = [name for name in Batch._fields if name not in Batch._field_defaults and name not in NESTED]
        if missing := [name for name in required if fields[name] is None]:
            raise KeyError(missing[0])
        source, names = str(arrays["source"]), tuple(str(name) for name in arrays["names"])
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; write it with --save_batch") from error
    except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:  # of an .npy, cut, ...
        raise InputError(f"{path} is not a batch that this version's --save_batch wrote ({error})") from error
    return Scenes(Batch(planes=planes, **fields), grids, source, names)  # type: ignore[arg-type]
