"""A trained or published student as a function of point clouds: the content of `import scalr_jax`.

model = scalr_jax.load("runs/pretrain")                       # a workdir: its settings are in it
model = scalr_jax.load("scalr.pth", sensor="nuscenes")        # a published file: say the sensor
features, classes = model.embed(points), model.segment(points)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike
from tqdm import tqdm

from scalr_jax.config import get_config
from scalr_jax.data import sensors
from scalr_jax.data.packing import pack_shard, static_capacities
from scalr_jax.data.scan_checks import check_scan
from scalr_jax.data.scenes import FEATURES, IGNORE, Batch
from scalr_jax.data.sensors import known_classes
from scalr_jax.data.whole_scan import as_array, check_points, whole_scan
from scalr_jax.interop.exported import is_export
from scalr_jax.interop.finite import check_outputs
from scalr_jax.interop.published import read_published
from scalr_jax.interop.saved import choose_intensity, columns_of, read_saved
from scalr_jax.models.build import make_student
from scalr_jax.models.heads import SEGMENTATION_HEADS
from scalr_jax.models.student import Variables
from scalr_jax.runtime import hub
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import student_settings

Scans = list[np.ndarray] | tuple[np.ndarray, ...]  # each [N, 4]
MODELS = "a workdir of distill, probe or finetune, an exported folder, or a published .pth or .safetensors"


class Model:
    """A student with its settings. Every method takes points [N, 4]: x, y, z in metres and raw intensity.

    They may also be a tensor of PyTorch or a pandas frame (`whole_scan.as_array`). A list or tuple of scans gives a
    list of results; with `progress=True` a line tells how many are done.

    Points stand in the frame of the training data: the lidar's for nuScenes and SemanticKITTI, PandaSet's vehicle
    frame shifted down by 1.6 m. As in the published evaluation, the first point of each 0.1 m voxel inside the field
    of view goes through the network, and every input point gets the result of the nearest of those, also outside the
    field of view. A point whose intensity is not finite is treated like one outside; a point without finite
    coordinates has no nearest one and gets features 0 and class 255.

    Attributes:
      config: the model config, what `interop.save_torch_checkpoint` takes, with `intensity`, `voxel_size` and, where
        they are known, `class_names` and `training` (of a published file: `updates`, and `gpus` of a pretraining).
      variables: {"params", "batch_stats"}, on the default device.
      student: the Flax module, whose variables these are.
      class_names: of a segmentation model, "class 0", ... where they are not known; else ().
    """

    def __init__(self, config: Any, variables: Mapping[str, Any]):
        self.config: Any = config  # a ConfigDict
        self.variables = jax.device_put(dict(variables))
        unnamed = [f"class {k}" for k in range(config.out_features)] if config.head in SEGMENTATION_HEADS else []
        self.class_names = tuple(config.get("class_names") or unnamed)
        (device, *_) = jax.tree.leaves(self.variables)[0].devices()
        self.student = make_student(
            student_settings(config), head=config.head, out_features=config.out_features, platform=device.platform
        )
        backbone = self.student.clone(head="none")
        self._embed = jax.jit(lambda variables, batch: backbone.apply(variables, batch, train=False))
        self._head = jax.jit(self.apply)
        self._classes = jax.jit(lambda variables, batch: _classes(self.apply(variables, batch)))

    def __repr__(self) -> str:
        """One line: backbone, size, parameters, head, and the results it gives."""
        config, parameters = self.config, sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        classes = f" of {len(self.class_names)} classes" if self.class_names else ""
        return f"Model({config.name}, {parameters:,} parameters, head {config.head!r}{classes})"

    def apply(self, variables: Variables, batch: Batch) -> Any:
        """The pure function underneath: variables and a `scenes.Batch` -> the head's output [D, P, C_out] float32."""
        return self.student.apply(variables, batch, train=False)

    @overload
    def embed(self, points: Scans, *, progress: bool = False) -> list[np.ndarray]: ...
    @overload
    def embed(self, points: ArrayLike, *, progress: bool = False) -> np.ndarray: ...
    def embed(self, points: ArrayLike | Scans, *, progress: bool = False) -> np.ndarray | list[np.ndarray]:
        """The backbone's features [N, C] float32. Raises ValueError for anything but points, and for features that
        are not finite."""
        return self._run(self._embed, points, "features", 0.0, progress)

    @overload
    def distilled(self, points: Scans, *, teacher: str | None = None, progress: bool = False) -> list[np.ndarray]: ...
    @overload
    def distilled(self, points: ArrayLike, *, teacher: str | None = None, progress: bool = False) -> np.ndarray: ...
    def distilled(
        self, points: ArrayLike | Scans, *, teacher: str | None = None, progress: bool = False
    ) -> np.ndarray | list[np.ndarray]:
        """Features in the teacher's space [N, C_teacher] float32, normalised as in training (docs/teachers.md); with
        several teachers those of the named one, or of all, one after the other. ValueError for a segmentation model."""
        if self.config.head != "distill":
            raise InputError(f"this model has head {self.config.head!r} and no features in a teacher's space")
        columns = slice(None) if teacher is None else columns_of(self.config, teacher)
        found = self._run(self._head, points, "distilled features", 0.0, progress)
        return [rows[:, columns] for rows in found] if isinstance(found, list) else found[:, columns]

    @overload
    def segment(self, points: Scans, *, progress: bool = False) -> list[np.ndarray]: ...
    @overload
    def segment(self, points: ArrayLike, *, progress: bool = False) -> np.ndarray: ...
    def segment(self, points: ArrayLike | Scans, *, progress: bool = False) -> np.ndarray | list[np.ndarray]:
        """Class ids [N] int32; ValueError for a model that was only distilled."""
        if self.config.head not in SEGMENTATION_HEADS:
            raise InputError(
                f"this model has head {self.config.head!r} and no classes; load a probed or fine-tuned one"
            )
        return self._run(self._classes, points, "logits", IGNORE, progress)

    def check(self, points: ArrayLike) -> dict[str, str]:
        """Sentences, by kind, about points that do not fit the training data; see `scan_checks.check_scan`."""
        return check_scan(check_points(points), self.config)

    def _run(
        self, function: Callable, points: ArrayLike | Scans, what: str, fill: float, progress: bool
    ) -> np.ndarray | list[np.ndarray]:
        """The results of one scan, or of each of several. Raises InputError that names the scan."""
        given = points if isinstance(points, list | tuple) else ()
        several = len(given) > 0 and np.ndim(as_array(given[0])) == 2
        scans, results = given if several else (points,), []
        for number, scan in enumerate(tqdm(scans, unit="scan", disable=not progress)):
            try:
                results.append(self._run_one(function, scan, what, fill))
            except InputError as error:
                if not several:
                    raise
                raise InputError(f"scan {number} of {len(scans)} (from 0): {error}") from error
        return results if several else results[0]

    def _run_one(self, function: Callable, points: object, what: str, fill: float) -> np.ndarray:
        """`function`'s rows of the kept points, spread over all points. Raises InputError where they are not finite."""
        needs, config = self.student.needs, self.config
        scene, nearest = whole_scan(check_points(points), needs, config.intensity, config.voxel_size)
        shard = pack_shard([scene], static_capacities(scene, needs.grids), scene, needs.grids)
        # Not jnp.asarray, which compiles a program for each shape (JAX 0.10).
        batch = jax.device_put(jax.tree.map(lambda x: np.asarray(x)[None], shard))
        rows = np.asarray(function(self.variables, batch))[0]
        check_outputs(rows[: len(scene.feats)], what)
        out = rows[nearest]
        out[nearest < 0] = fill
        return out


def _classes(logits: jax.Array) -> jax.Array:
    """The class of each row, -1 where its logits [..., classes] are not finite (argmax of NaN would be the first)."""
    return jnp.where(jnp.isfinite(logits.max(-1)), logits.argmax(-1), -1)


def load(
    path: str | Path,
    *,
    sensor: str | None = None,
    intensity: tuple[float, float] | None = None,
    field_of_view: ArrayLike | None = None,
    grids: ArrayLike | None = None,
    activation: str | None = None,
) -> Model:
    """A trained or published student.

    Args:
      path: a workdir of distill, probe or finetune, a folder of `scalr_jax.export` (torch, safetensors or orbax), or a
        published `.pth` or `.safetensors` (ScaLR, ScaLR+, WaffleIron; distilled or downstream; a VaViT or a MinkUNet);
        or one of these on the Hugging Face Hub, "hf://OWNER/NAME" or "hf://OWNER/NAME/FILE" (extra `hub`).
      sensor: whose intensity statistics, and for a published file whose field of view and grids, apply: nuscenes,
        semantic_kitti, pandar64 or pandargt. Not needed for a workdir of one sensor. For segmentation on PandaSet it
        means 512 cells over +-128 m (but 384 over +-96 m in a model fine-tuned on PandarGT: give those). Of a
        published VaViT or MinkUNet, which take raw intensities, it only says the names of the classes.
      intensity: (mean, standard deviation) of the raw intensity, instead of the sensor's.
      field_of_view: ((x, y, z) min, (x, y, z) max) in metres, instead of the sensor's or the workdir's.
      grids: ((rows, columns) of the planes xy, xz, yz), likewise. Any grid goes with any weights.
      activation: "relu" or "gelu", for published downstream files that do not say it.

    Raises:
      ValueError: one sentence: what is wrong with the file (also weights that are not finite), or which argument is
        needed.
    """
    if hub.is_address(path):
        found = hub.fetched(str(path))
        path = found if found.is_file() or is_export(found) else hub.first_weights(found, str(path))
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give {MODELS}")
    if path.suffix in (".onnx", ".stablehlo"):
        raise InputError(f"{path} is a program, which the README.md beside it says how to run; give {MODELS}")
    given = {"intensity": intensity, "field_of_view": field_of_view, "grids": grids}
    given = {name: value for name, value in given.items() if value is not None}
    if path.is_dir():
        config, variables = read_saved(path)
        if "intensity" not in given and "intensities" in config:
            config["intensity"] = choose_intensity(config, path, sensor)
        elif "intensity" not in given and sensor is not None:
            config["intensity"] = sensors.intensity_of(sensor)
    else:
        config, variables = _load_published(path, sensor, given, activation)
    if config["num_features"] != len(FEATURES):
        raise InputError(f"{path} takes {config['num_features']} features a point, and only {FEATURES} are known")
    try:
        return Model(_checked({**config, **given}), variables)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _load_published(path: Path, sensor: str | None, given: Mapping, activation: str | None) -> tuple[dict, dict]:
    found, known = read_published(path), ", ".join(sensors.INTENSITY)
    model, defaults = found.model_with(activation, str(path)), get_config()
    settings = {**defaults.model.to_dict(), "voxel_size": defaults.data.voxel_size, **model, **found.data}
    for part in ("minkunet", "vavit"):
        settings[part] = {**defaults.model[part].to_dict(), **model.get(part, {})}
    missing = [name for name in ("intensity", "field_of_view", "grids") if name in found.unsaid and name not in given]
    if sensor is None and missing:
        arguments = ", ".join(f"{name}=" for name in missing)
        raise InputError(f"{path} does not say its sensor; give sensor= (one of {known}) or {arguments}")
    if sensor is not None and found.unsaid and sensor not in sensors.INTENSITY:
        raise InputError(f"sensor = {sensor!r} is none of {known}")
    segments = settings["head"] in SEGMENTATION_HEADS
    settings["class_names"] = known_classes(sensor or "", settings["out_features"]) if segments else ()
    if sensor is not None and "intensity" in missing:
        settings["intensity"] = sensors.INTENSITY[sensor]
    if sensor is not None and {"field_of_view", "grids"} & set(missing):
        settings["field_of_view"], settings["grids"] = sensors.published_view(sensor, settings)
    if found.training:
        settings["training"] = dict(found.training)
    return settings, found.variables


def _checked(settings: dict) -> ConfigDict:
    """The model config, intensity, field of view and grids as tuples of numbers; `InputError` for other values."""

    def numbers(name: str, rows: int, columns: int, kind: type) -> Any:
        try:
            array = np.asarray(settings[name], float).reshape(rows, columns)
            if kind is int:
                whole = array.clip(-1e9, 1e9).astype(int)  # limits as in config.py
                array = whole if (whole == array).all() else np.full_like(whole, -1)
        except (TypeError, ValueError, OverflowError):
            array = np.full((rows, columns), -1)  # which the checks below refuse
        return tuple(tuple(row) for row in array.tolist())

    (intensity,) = numbers("intensity", 1, 2, float)
    low, high = numbers("field_of_view", 2, 3, float)
    grids = numbers("grids", 3, 2, int)
    wrong = []
    if not (np.abs(intensity) < 1e9).all() or intensity[1] <= 1e-9:  # NaN neither
        wrong.append("intensity = (mean, standard deviation)")
    if not (np.isfinite(low + high).all() and all(a < b for a, b in zip(low, high, strict=True))):
        wrong.append("field_of_view = ((x, y, z) min, (x, y, z) max) in metres")
    if min(min(grid) for grid in grids) < 1:
        wrong.append("grids = ((rows, columns), ...) of the planes xy, xz, yz")
    if wrong:
        raise InputError(f"invalid settings: expected {', '.join(wrong)}")
    return ConfigDict({**settings, "intensity": intensity, "field_of_view": (low, high), "grids": grids})
