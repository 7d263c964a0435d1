"""From a model config to its student, and what its weights must be."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.data.scenes import Batch, SceneNeeds, ScenePillars, SceneView, SceneVoxels
from scalr_jax.models.build import make_student
from scalr_jax.models.student import Student, Variables
from scalr_jax.ops.voxels import LEVELS
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.keys import listed
from scalr_jax.settings import student_settings

NORM = (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("variance", "running_var"))  # ours, PyTorch's


# What DistributedDataParallel (also doubled), torch.compile, FSDP and checkpointing put into names.
WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Published(NamedTuple):
    """A published student, as far as its file says it."""

    model: dict  # keys of `config.model`, with `num_features`, `head` and `out_features`
    variables: dict  # {"params", "batch_stats"} of NumPy arrays
    data: Mapping = {}  # keys of `config.data` that the weights were trained with, where these are known
    unsaid: tuple[str, ...] = ()  # of intensity, field_of_view, grids, activation: what a user has to say
    training: Mapping = {}  # `updates` and `gpus`, where the file says them

    def model_with(self, activation: str | None, name: str) -> dict:
        """`model` with an activation. Raises `InputError` where neither the file nor the caller says it."""
        if activation not in (None, "relu", "gelu"):
            raise InputError(f"activation = {activation!r} is none of 'relu', 'gelu'")
        if activation is None and "activation" in self.unsaid:
            raise InputError(
                f"{name} does not say its activation: downstream ScaLR (relu) and ScaLR+ (gelu) files have the same "
                "names and shapes; give activation='relu' or activation='gelu'"
            )
        return self.model | ({"activation": activation} if activation else {})


def student_of(model: Mapping, **changes: object) -> Student:
    """The float32 student of a model config, as `load_torch_checkpoint` and `Model.config` have it, with `changes`."""
    settings = student_settings({**model, "dtype": "float32", **changes})
    return make_student(settings, head=model["head"], out_features=model["out_features"], platform="cpu")


def empty_scene(num_features: int, needs: SceneNeeds) -> SceneView:
    """A scene without points."""
    feats, neighbors = np.zeros((0, num_features), np.float32), np.zeros((0, needs.num_neighbors), np.int32)
    voxels = SceneVoxels(np.zeros((0, 3), np.float32), np.zeros((LEVELS, 2), np.int64))
    pillars = ScenePillars(np.zeros(0, np.int32), np.zeros((0, 2), np.float32))
    scene = SceneView("", 0, feats, neighbors, (), None, None, None)
    return scene._replace(
        voxels=None if needs.voxel_size is None else voxels, pillars=None if needs.pillar_size is None else pillars
    )


def empty_batch(num_features: int, needs: SceneNeeds) -> Batch:
    """The smallest batch, all padding: what shapes of parameters are derived from."""
    sizes, levels = (2,) * len(needs.grids), () if needs.voxel_size is None else (2,) * LEVELS
    capacities = Capacities(2, 1, sizes, sizes, levels, levels, () if needs.pillar_size is None else (2,))
    shard = pack_shard((), capacities, empty_scene(num_features, needs), needs.grids)
    return jax.tree.map(lambda x: x[None], shard)


def abstract_variables(student: Student, num_features: int) -> Variables:
    """A student's variables as `jax.ShapeDtypeStruct`. Kept, for tracing a student takes longer than reading a file."""
    key = (student, num_features)
    if key not in kept_variables:
        batch = empty_batch(num_features, student.needs)
        init = lambda batch: student.init(jax.random.key(0), batch, train=False)  # noqa: E731
        kept_variables[key] = jax.eval_shape(init, batch)
    return kept_variables[key]


kept_variables: dict[tuple[object, int], Variables] = {}  # of students and their numbers of features


def shapes_of(student: Student, num_features: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of a student's "params" and "batch_stats", by path."""
    variables = abstract_variables(student, num_features)
    return {kind: flat_shapes(variables.get(kind, {})) for kind in ("params", "batch_stats")}


def flat_shapes(tree: Mapping) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree of arrays or their shapes, by path."""
    return {keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in tree_leaves_with_path(tree)}


def unwrapped(content: Mapping, name: str) -> dict:
    """A file's content with the names that weights have in the model itself, at its top and in its containers.

    Raises `InputError` that begins with `name` when two weights become one.
    """

    def plain(part: Mapping, where: str = "") -> dict:
        found = {WRAPPERS.sub("", key) if isinstance(key, str) else key: value for key, value in part.items()}
        if len(found) != len(part):
            raise InputError(f"{name} holds weights{where} twice, with and without module. or _orig_mod.; keep one")
        return found

    inside = {key: plain(x, f" under {key}") if isinstance(x, Mapping) else x for key, x in content.items()}
    return plain(inside)


def extra_weights(weights: Mapping[str, np.ndarray], known: Collection[str]) -> list[str]:
    """A sentence for each weight of a PyTorch file that is not `known`; counters of batches apart."""
    extra = sorted(key for key in weights if key not in known and not key.endswith("num_batches_tracked"))
    return [f"{key} {weights[key].shape} is not part of this model" for key in extra]


def check_shapes(student: Student, num_features: int, variables: Variables, name: str) -> None:
    """Raises `InputError` that lists what of {"params", "batch_stats"} a student lacks or has otherwise."""
    problems = []
    for kind, expected in shapes_of(student, num_features).items():
        found = flat_shapes(variables.get(kind, {}))
        for path in sorted({*expected, *found}):
            if found.get(path) != expected.get(path):
                problems.append(f"{kind}/{path} has {found.get(path, 'no value')}, needs {expected.get(path, 'none')}")
    if problems:
        raise InputError(f"{name} does not fit its settings, nothing was loaded: {listed(problems)}")
