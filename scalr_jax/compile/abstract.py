"""A training step of shapes alone: what `compile/run.py` lowers, by the functions that train, without data.

A run derives from its data what is assumed here: sizes of the cell tables that the config leaves open are the published
mixture's for so many points (`recipes.PACK_CELLS`), the number of classes is the label map's, and the teacher's
architecture follows from its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scalr_jax import recipes, tasks
from scalr_jax.config import DataSettings, Settings
from scalr_jax.data.build import scene_settings
from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.data.readers.files import read_label_map
from scalr_jax.data.scenes import FEATURES, Batch, SceneNeeds, Tokens
from scalr_jax.data.transforms import SceneSettings
from scalr_jax.interop.model import empty_scene
from scalr_jax.models import vit
from scalr_jax.models.student import Student
from scalr_jax.models.vit import TEACHERS, ViTConfig
from scalr_jax.runtime import sharding
from scalr_jax.runtime.chips import Chip
from scalr_jax.runtime.errors import InputError
from scalr_jax.train import loop as train

HOPPER_CAPABILITY = 9.0
MOST_CAMERAS = 6  # of a scan of the four datasets
SIZES = {"s": "vits14", "b": "vitb14", "l": "vitl14", "g": "vitg14", "7": "vit7b16"}  # by what follows "vit" in names


class AbstractRun(NamedTuple):
    """A step and its arguments, all as shapes with shardings."""

    student: Student
    program: train.Program
    teacher: Any
    batch: Batch
    capacities: Capacities
    teacher_config: ViTConfig | None

    def lower(self) -> Any:
        return self.program.step.lower(self.program.state, self.teacher, self.batch)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the student's parameters, counted once for all devices."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.program.state.params))


def make_run(settings: Settings, mesh: Mesh, teacher: str | None = None, *, cached: bool = False) -> AbstractRun:
    """The step of a config on `mesh`, in bfloat16 unless `model.dtype` says float32.

    cached: the teacher's tokens come with the batch, as with `teacher.cache`, in bfloat16.
    `teacher` names one of `TEACHERS` or its width, or "demo"; None: what `teacher.checkpoint` is called, else ViT-L.
    Raises `InputError` for a config that trains nothing or does not divide among the devices.
    """
    if settings.model.dtype == "auto":  # it asks the machine that compiles, which is no accelerator
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype="bfloat16"))
    check_divides(settings.data.scenes_per_step, mesh.size)
    task, teacher_config = make_task(settings, teacher, cached=cached)
    needs = task.student.needs
    capacities = choose_capacities(settings.data, needs)
    scenes = scene_settings(settings.data, needs, task=task.scene_task, train=True)
    if task.scene_task == "distill":
        views = settings.data.cameras_per_scan or MOST_CAMERAS
        scenes = dataclasses.replace(scenes, views=views, pairs=settings.data.pairs_per_point)
    batch = make_batch(scenes, capacities, mesh, teacher_config if cached else None)
    expected = settings.data.scenes_per_step or capacities.scenes * mesh.size  # a constant of the schedule
    program = train.make_program(settings.training, task, batch, mesh, float(expected))
    teachers = placed(task.teachers, sharding.parameter_shardings(task.teachers, mesh))
    return AbstractRun(task.student, program, teachers, batch, capacities, None if cached else teacher_config)


@contextlib.contextmanager
def compiling_for(chip: Chip) -> Iterator[dict[str, Any]]:
    """The compiler's options for a chip that is not there.

    On a GPU kernels cannot be tried out, so that products are cuBLAS's. JAX asks the GPU of this machine what cuDNN can
    do; here it is told of the chip's (a private function: JAX has no public way).
    """
    if not chip.gpu:
        yield {}
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    told: dict = {"check_compute_capability": lambda wanted: float(wanted) <= HOPPER_CAPABILITY}
    told["is_cuda_compute_capability_equal"] = lambda asked: float(asked) == HOPPER_CAPABILITY
    told["check_cudnn_version"] = lambda: 91000
    before = {name: getattr(cudnn, name) for name in told}
    try:
        for name, function in told.items():
            setattr(cudnn, name, function)
        yield {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    finally:
        for name, function in before.items():
            setattr(cudnn, name, function)


def check_divides(scenes: int, num_devices: int) -> None:
    """Raises `InputError` when the scenes of a step do not divide among the devices."""
    if scenes % num_devices:
        raise InputError(
            f"data.scenes_per_step = {scenes} does not divide among {num_devices} devices; pack as many as fit, as "
            f"configs/pretrain/scalr_packed_wi48_768.py:{num_devices} does, or use fewer devices"
        )


def make_task(settings: Settings, teacher: str | None, *, cached: bool = False) -> tuple[train.Task, ViTConfig | None]:
    """The task of a config with the teacher's shapes, and the teacher's architecture (None without one)."""
    task = settings.run.task
    if task == "distill":
        checkpoint, interpolation = settings.teacher.checkpoint, settings.teacher.position_interpolation
        vit_config = choose_teacher(checkpoint if teacher is None else teacher, given=teacher is not None)
        if interpolation != "auto":
            vit_config = dataclasses.replace(vit_config, position_interpolation=interpolation)
        params = teacher_shapes(settings.data.image_size, vit_config)
        if cached:
            return tasks.distillation(settings, [vit_config.width]), vit_config
        return tasks.distillation(settings, [(vit_config, params)]), vit_config
    if cached:
        raise InputError(
            f"--cached_teacher is for task distill, and config.task = {task!r} has no teacher; leave it out"
        )
    if task not in ("probe", "finetune"):
        raise InputError(f"config.task = {task!r} trains no student in one step; distill, probe and finetune do")
    number = settings.model.num_classes or num_classes(settings.data.dataset)
    return tasks.segmentation(settings, number, label=task, frozen=task == "probe", initial=None), None


def choose_teacher(name: str, *, given: bool) -> ViTConfig:
    """The architecture behind a name, a width or a file's name. Raises `InputError` that lists the known ones."""
    if name == "demo":
        from scalr_jax.interop.teacher import load_demo_teacher

        return load_demo_teacher()[0]
    by_width = {str(vit_config.width): key for key, vit_config in TEACHERS.items()}
    named = re.search(r"vit[-_]?(small|base|large|giant|[sblg7])", name.rsplit("/", 1)[-1].lower())
    key = by_width.get(name) or (SIZES[named[1][0]] if named else None)
    if key is None and (given or name):
        what = f"--teacher={name}" if given else f"teacher.checkpoint = {name!r}"
        widths = ", ".join(f"{key} ({vit_config.width} wide)" for key, vit_config in TEACHERS.items())
        raise InputError(f"{what} names no known teacher; give --teacher as one of {widths} or demo")
    return TEACHERS[key or "vitl14"]


def teacher_shapes(image_size: tuple[int, int], vit_config: ViTConfig) -> Any:
    """Parameters in bfloat16. Raises `InputError` when images are no whole number of patches."""
    try:
        vit.patch_grid(vit_config, image_size)
    except ValueError as error:
        raise InputError(f"data.image_size: {error}") from error
    params = jax.eval_shape(lambda: vit.init(vit_config, jax.random.key(0), image_size))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)


def num_classes(dataset: str) -> int:
    """Number of a dataset's classes, without the dataset. Raises `InputError` when only its files contain it."""
    if dataset in ("nuscenes", "semantic_kitti", "pandaset"):
        return len(read_label_map(dataset).class_names)
    raise InputError(f"the classes of {dataset!r} are in its data; give their number, --config.model.num_classes=N")


def choose_capacities(data: DataSettings, needs: SceneNeeds) -> Capacities:
    """From the config where it gives them, else tables as full as those of the published mixture, or, where every step
    holds so many scenes, as of its largest."""

    def tables(given: tuple[int, ...], packed: tuple[int, ...], of_points: int = recipes.PACK_POINTS) -> tuple:
        return given or tuple(-(-data.points_per_shard * n // of_points // 128) * 128 for n in packed)

    points, scenes = data.points_per_shard, data.scenes_per_shard
    if needs.voxel_size is not None:
        voxels, pairs, of_points = recipes.PACK_VOXELS, recipes.PACK_PAIRS, recipes.PACK_POINTS
        if data.scenes_per_step:
            voxels, pairs, of_points = recipes.SCENE_VOXELS, recipes.SCENE_PAIRS, recipes.MAX_POINTS
        voxels, pairs = tables(data.voxels_per_shard, voxels, of_points), tables(data.pairs_per_shard, pairs, of_points)
        return Capacities(points, scenes, (), (), voxels, pairs)
    if needs.pillar_size is not None:
        pillars, of_points = (recipes.PACK_PILLARS,), recipes.PACK_POINTS
        if data.scenes_per_step:
            pillars, of_points = (recipes.TURN_PILLARS,), recipes.MAX_POINTS
        return Capacities(points, scenes, (), (), pillars=tables(data.pillars_per_shard, pillars, of_points))
    cells, halo = tables(data.cells_per_shard, recipes.PACK_CELLS), tables(data.halo_per_shard, recipes.PACK_HALO)
    return Capacities(points, scenes, cells, halo)


def make_batch(settings: SceneSettings, capacities: Capacities, mesh: Mesh, cached: ViTConfig | None = None) -> Batch:
    """Shapes of a batch, by packing no scene at all as a run packs its first; with tokens of the teacher `cached`."""
    nothing, views = empty_scene(len(FEATURES), settings.needs), ()
    if settings.task == "distill":
        nothing = nothing._replace(pixels=np.zeros((0, 2), np.int32))
    if settings.views > 1:
        views, pairs = (settings.views,), np.zeros((0, settings.pairs), np.int32)
        nothing = nothing._replace(pixels=np.zeros((*pairs.shape, 2), np.int32), views=pairs)
    if cached is not None:
        values = np.zeros((*views, *vit.patch_grid(cached, settings.image_size), cached.width), np.uint16)
        nothing = nothing._replace(tokens=(Tokens(values),))
    elif settings.task == "distill":
        nothing = nothing._replace(image=np.zeros((*views, *settings.image_size, 3), settings.image_dtype))
    else:
        nothing = nothing._replace(labels=np.zeros(0, np.uint8))
    place = sharding.batch_sharding(mesh)
    shard = pack_shard((), capacities, nothing, settings.needs.grids)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype, sharding=place), shard)


def placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)
