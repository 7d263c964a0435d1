"""From a sensor to a step: frames (as read), scenes (voxelised, one camera's view), batches (packed).

`Dataset` is the contract of everything that has frames.

Dims legend, used in every shape comment of the project:

    D  data shards (one a device)          F  input features (5: intensity, x, y, z, radius)
    S  scenes a shard (capacity)           K  neighbours of a point (16; 0 for a MinkUNet)
    P  points a shard (capacity)           C  channels
    N  points of one scene or scan         M  occupied cells of a plane (capacity a shard)
    H  halo cells of a plane (capacity)    h, w  image rows and columns
    T  occupied pillars (capacity a shard) V  views of a scene, one a camera
    R  pairs of a point, each in a view

Padding: a padded point has `scene == S`, `cell == M` (or T) and label 255; tap tables point to row M (or H), the zero
row.
This module imports NumPy only, so that data workers never start a JAX backend.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from scalr_jax.ops.voxels import Sizes

A = TypeVar("A")  # np.ndarray or jax.Array

IGNORE = 255  # the label of a point without a class

# Planes in the order the layers use them: the two point axes that span each (drop z, then y, then x).
PLANE_AXES = ((0, 1), (0, 2), (1, 2))
FEATURES = ("intensity", "x", "y", "z", "radius")  # of a point, the F of the legend

RANDOM = "random"  # `frame(camera=RANDOM)`: one of the frame's cameras, drawn with `rng`


class Dataset(Protocol):
    """Frames by number, 0 to len - 1: raw files, records, generated streets, and what joins or changes other datasets.

    A new dataset inherits from it, for its defaults; a reader of files inherits from `readers.raw.RawDataset`.
    """

    class_names: tuple[str, ...]
    cameras: tuple[str, ...] = ()  # that `frame` can be asked for; (): a frame has its one image, or none
    warnings: tuple[str, ...] = ()  # sentences about what looks wrong but may be meant
    decode: bool = True  # False: images may be zeros of the right shape, as nobody looks at them

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of a frame in errors and logs: "pandaset/002/45", the dataset first."""

    @abstractmethod
    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        """Reads one frame. Raises BadFrameError: one of its files is missing or damaged; InputError: no such camera.

        camera: one of `cameras`; None for no image; "random" draws one with `rng`, uniformly among the frame's, where
        there is one. Without that, or where there is one at most, no `rng` is needed.
        """

    @abstractmethod
    def intensity(self, index: int) -> tuple[float, float]:
        """Mean and standard deviation of the raw intensity of the sensor that made a frame."""

    @abstractmethod
    def describe(self) -> str:
        """A short table of what was found."""

    def sensor(self, index: int) -> str:
        """The sensor that made a frame, where a dataset has several; else the dataset."""
        return self.name(index).split("/")[0]

    def scan_file(self, index: int) -> str:
        """The path of a frame's scan below the raw dataset's root; "" where it is not known."""
        return ""

    def cameras_of(self, index: int) -> tuple[str, ...]:
        """The cameras that `frame` draws from; (): the frame has its one image, or none."""
        return ()


@runtime_checkable
class FinishedScenes(Protocol):
    """Scenes by number that need neither frames nor transforms: cached features."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def scene(self, record: int, position: int) -> SceneView:
        """Scene `record` as number `position` of a stream. Raises `BadFrameError`."""
        ...


class Mix(Protocol):
    """Mixes training scans for segmentation. All randomness comes from the generators."""

    def __call__(self, frame: Frame, record: int, dataset: Dataset, rng: np.random.Generator) -> Frame:
        """Frame `record` of a dataset with what is mixed into a raw scan. Raises `BadFrameError`."""
        ...

    def others(self, record: int, num_frames: int, rng: np.random.Generator) -> list[int]:
        """The frames whose clouds are mixed with that of frame `record`."""
        ...

    def clouds(self, clouds: Sequence[Cloud], rng: np.random.Generator) -> Cloud:
        """The first cloud, mixed with the others."""
        ...


FieldOfView = tuple[tuple[float, float, float], tuple[float, float, float]]  # min and max corner, metres
WHOLE_VIEW: FieldOfView = ((-1e4, -1e4, -1e4), (1e4, 1e4, 1e4))  # cuts no point that a lidar can have seen

RAW_INTENSITY = (0.0, 1.0)  # the mean and deviation of a model that reads intensities as they are


class SceneNeeds(NamedTuple):
    """A backbone's needs of a scene, beside its points' features."""

    field_of_view: FieldOfView
    num_neighbors: int = 0  # K
    grids: tuple[tuple[int, int], ...] = ()  # rows and columns of each plane; (): no planes
    voxel_size: float | None = None  # metres; None: no voxels
    pillar_size: float | None = None  # metres; None: no pillars


class Frame(NamedTuple):
    """One scan, paired with one camera image when there is one, as a reader returns it.

    Points stay in the reader's native frame (the world for PandaSet, the lidar for the others), where the published
    distillation voxelises, and `to_ego` moves them to the frame the student sees, where segmentation does. Pairing is
    done by the reader, on every point of the scan, because each dataset has its own chain of frames and its own
    visibility rule.
    """

    name: str  # "pandaset/002/45/front_camera": what errors and logs call it
    points: np.ndarray  # [N, 4] float32 or float64: x, y, z (metres, native frame), raw intensity
    to_ego: np.ndarray  # [4, 4] float64: native frame -> student's frame
    image: np.ndarray | None = None  # [h, w, 3] uint8
    pixels: np.ndarray | None = None  # [N, 2] float64: row, column in `image`; any value where not visible
    visible: np.ndarray | None = None  # [N] bool: the point projects inside the image by the dataset's rule
    labels: np.ndarray | None = None  # [N] uint8: class, or 255
    voxels: Voxels | None = None  # of a camera's view, found when the frame was prepared; None: not yet
    image_shape: tuple[int, int] | None = None  # rows, columns that `pixels` count in; None: those of `image`
    instances: np.ndarray | None = None  # [N] integers: the object of each point; None: not numbered
    to_sensor: np.ndarray | None = None  # [4, 4] float64: native frame -> the lidar, z up its axis; None: `to_ego`
    beams: np.ndarray | None = None  # [N] uint8: the beam of each point, 0 the lowest; None: see its elevation
    num_dropped: int = 0  # rows of the scan's file that were no usable point
    tokens: tuple[Tokens, ...] = ()  # of teachers with a cache, of the image


class Tokens(NamedTuple):
    """A teacher's th x tw tokens of one image, as `ops.tokens` stores them."""

    values: np.ndarray  # [th, tw, C] uint16 (bfloat16's bits), int8 or float32
    scale: np.ndarray | None = None  # [th, tw] float32, of int8


class PackedTokens(NamedTuple, Generic[A]):
    """The same of the images of a batch."""

    values: A  # [D, S, th, tw, C]
    scale: A | None = None  # [D, S, th, tw]


class Cloud(NamedTuple):
    """A scan as the student sees it: one point a voxel, in training augmented."""

    xyz: np.ndarray  # [N, 3] float32, metres
    feats: np.ndarray  # [N, F] float32
    labels: np.ndarray  # [N] uint8


class Voxels(NamedTuple):
    """The points of each occupied voxel of a scan, voxels in lexicographic order, points in order within each."""

    size: float  # metres
    order: np.ndarray  # [N] int32: points sorted by voxel
    start: np.ndarray  # [v + 1] int32: where each voxel's run begins in `order`


class SceneView(NamedTuple):
    """One scene ready to be packed: indices are local to the scene. Built by `transforms.make_scene`."""

    name: str
    stream_index: int  # position in the stream: exact resume is stated with it
    feats: np.ndarray  # [N, F] float32
    neighbors: np.ndarray  # [N, K] int32
    planes: tuple[ScenePlane, ...]
    image: np.ndarray | None  # [h, w, 3] uint8, or float32 in 0..255, resized; of several views [V, h, w, 3]
    pixels: np.ndarray | None  # [N, 2] int32 in the resized image; of several views [N, R, 2]
    labels: np.ndarray | None  # [N] uint8
    error: str | None = None  # why the frame is bad; everything else is then empty
    upsample: np.ndarray | None = None  # [N_raw] int32: for each raw point its nearest kept point (evaluation only)
    raw_labels: np.ndarray | None = None  # [N_raw] uint8
    raw_ranges: np.ndarray | None = None  # [N_raw] float32: metres from the origin of the student's frame
    voxels: SceneVoxels | None = None  # for a MinkUNet, which needs no planes
    pillars: ScenePillars | None = None  # for a VaViT, likewise
    tokens: tuple[Tokens, ...] = ()  # of several views [V, ...]
    views: np.ndarray | None = None  # [N, R] int32: of several views, those that see a point; -1: no more


class SceneVoxels(NamedTuple):
    """Where one scene's points are in the grid of voxels, and what its tables need (`ops.voxels`)."""

    coordinates: np.ndarray  # [N, 3] float32: in voxels, from the lower corner of the field of view
    counts: np.ndarray  # [levels, 2] int64: occupied voxels and pairs of neighbours


class ScenePillars(NamedTuple):
    """The occupied pillars of one scene, whose points stand in the order of their pillars. t pillars."""

    cell: np.ndarray  # [N] int32: row of the point's pillar among the t occupied, ascending
    coordinates: np.ndarray  # [t, 2] float32: x, y of each centre in metres


class ScenePlane(NamedTuple):
    """Cell tables of one scene in one plane, before packing. m occupied cells, u halo cells."""

    cell: np.ndarray  # [N] int32: row of the point's cell among the m occupied
    order: np.ndarray  # [N] int32: points sorted by cell
    position: np.ndarray  # [m] int32: i * W + j of each occupied cell, ascending
    halo_position: np.ndarray  # [u] int32: i * W + j of each halo cell, ascending
    halo_taps: np.ndarray  # [u, 9] int32: rows of the 3x3 neighbours in the occupied table, -1 for none
    cell_taps: np.ndarray  # [m, 9] int32: rows of the 3x3 neighbours in the halo table, -1 for none


class Plane(NamedTuple, Generic[A]):
    """Packed cell tables of one plane; see the legend of `docs/design.md`."""

    cell: A  # [D, P] int32
    grid_index: A  # [D, M] int32: scene * H * W + i * W + j; S * H * W for unused rows
    order: A  # [D, P] int32: points sorted by cell
    start: A  # [D, M + 1] int32: where each cell's run begins in `order`
    inverse_count: A  # [D, M] float32: 1 / points in the cell, 0 for unused rows
    halo_index: A  # [D, H] int32: as grid_index, of the halo cells
    halo_taps: A  # [D, H, 9] int32
    cell_taps: A  # [D, M, 9] int32


@dataclasses.dataclass(frozen=True)
class PackedVoxels(Generic[A]):
    """Voxels, from which a device makes a MinkUNet's tables. For JAX the sizes are static (`models.minkunet`)."""

    coordinates: A  # [D, P, 3] float32, as in `SceneVoxels`; 0 for padding
    sizes: tuple[Sizes, ...]  # of the tables of each level


class Pillars(NamedTuple, Generic[A]):
    """Packed pillars: those of the shard's first scene, those of the second, ..., padding."""

    cell: A  # [D, P] int32: row of the point's pillar, ascending; T for padding
    coordinates: A  # [D, T, 2] float32: x, y of each centre in metres; 0 for padding
    counts: A  # [D, S] int32: pillars of each scene


class Batch(NamedTuple, Generic[A]):
    """The input of a step: NumPy's arrays, on a device JAX's. `None` for a field that the task does not need."""

    feats: A  # [D, P, F] float32
    scene: A  # [D, P] int32, S marks padding
    scene_points: A  # [D, S] int32: points of each scene, 0 for an empty slot
    neighbors: A  # [D, P, K] int32
    planes: tuple[Plane[A], ...]
    images: A | None = None  # [D, S, h, w, 3] uint8, or float32 in 0..255; of several views [D, S, V, h, w, 3]
    pixels: A | None = None  # [D, P, 2] int32; of several views [D, P, R, 2]
    labels: A | None = None  # [D, P] int32
    voxels: PackedVoxels[A] | None = None  # for a MinkUNet; `planes` is then ()
    pillars: Pillars[A] | None = None  # for a VaViT, likewise
    tokens: tuple[PackedTokens[A], ...] = ()  # of each teacher with a cache; of several views [D, S, V, ...]
    views: A | None = None  # [D, P, R] int32: of several views, scene * V + view of each pair; S * V for none
