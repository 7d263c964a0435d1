"""Published ScaLR, ScaLR+ and WaffleIron checkpoints, in and out, and the published array layout.

One table maps names: ours on the left (scanned layers are stacked here, one entry a layer there), PyTorch's on the
right, and how an array changes. Whatever does not fit is listed, all of it, and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from scalr_jax.config import get_config
from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.data.scenes import Batch, InputError, SceneView
from scalr_jax.data.transforms import plane_tables
from scalr_jax.models.student import Student

NUM_PLANES = 3


class Weight(NamedTuple):
    """One row of the table."""

    ours: str  # path below "params" or "batch_stats"
    theirs: str
    layout: (
        str  # same, linear ([out, in, 1...] -> [in, out]), depthwise ([C, 1, 3, 3] -> [9, C]), flat ([C, 1, 1] -> [C])
    )
    stats: bool = False


def _batch_norm(ours: str, theirs: str) -> list[Weight]:
    return [
        Weight(f"{ours}/scale", f"{theirs}.weight", "same"),
        Weight(f"{ours}/bias", f"{theirs}.bias", "same"),
        Weight(f"{ours}/mean", f"{theirs}.running_mean", "same", stats=True),
        Weight(f"{ours}/variance", f"{theirs}.running_var", "same", stats=True),
    ]


def _linear(ours: str, theirs: str) -> list[Weight]:
    return [Weight(f"{ours}/kernel", f"{theirs}.weight", "linear"), Weight(f"{ours}/bias", f"{theirs}.bias", "same")]


EMBEDDING = [
    *_batch_norm("embedding/norm", "embed.norm"),
    *_linear("embedding/point", "embed.conv1"),
    *_batch_norm("embedding/neighbor_norm_0", "embed.conv2.0"),
    Weight("embedding/neighbor_in", "embed.conv2.1.weight", "linear"),
    *_batch_norm("embedding/neighbor_norm_1", "embed.conv2.2"),
    Weight("embedding/neighbor_out", "embed.conv2.4.weight", "linear"),
    *_linear("embedding/final", "embed.final"),
]


def _norm(kind: str, ours: str, theirs: str) -> list[Weight]:
    if kind == "batch":
        return _batch_norm(f"{ours}/batch", theirs)
    return [Weight(f"{ours}/layer/{x}", f"{theirs}.{y}", "same") for x, y in (("scale", "weight"), ("bias", "bias"))]


def _layer(kind: str, d: int) -> list[Weight]:
    spatial, channel = f"waffleiron.spatial_mix.{d}", f"waffleiron.channel_mix.{d}"
    return [
        *_norm(kind, "spatial/norm", f"{spatial}.norm"),
        Weight("spatial/kernel_1", f"{spatial}.ffn.0.weight", "depthwise"),
        Weight("spatial/bias_1", f"{spatial}.ffn.0.bias", "same"),
        Weight("spatial/kernel_2", f"{spatial}.ffn.2.weight", "depthwise"),
        Weight("spatial/bias_2", f"{spatial}.ffn.2.bias", "same"),
        Weight("spatial/scale", f"{spatial}.scale.weight", "flat"),
        *_norm(kind, "channel/norm", f"{channel}.norm"),
        *_linear("channel/linear_1", f"{channel}.mlp.0"),
        *_linear("channel/linear_2", f"{channel}.mlp.2"),
        Weight("channel/scale", f"{channel}.scale.weight", "flat"),
    ]


def _head(head: str) -> list[Weight]:
    if head == "segment":
        return [
            *_batch_norm("head/norm", "classif.0"),
            Weight("head/kernel", "classif.1.weight", "linear"),
            Weight("head/bias", "classif.1.bias", "same"),
        ]
    if head == "mlp":
        return [*_linear("head/hidden", "classif.0"), *_linear("head/out", "classif.2")]
    return _linear("head" if head == "linear" else "head/out", "classif")


class Entry(NamedTuple):
    """A weight of one model: where it lies in our tree and, for stacked layers, which row."""

    weight: Weight
    ours: str
    row: int | None


def weight_table(model: Mapping[str, Any]) -> list[Entry]:
    """Every weight of the model that `model` (a model config, see `load_torch_checkpoint`) describes."""
    depth, kind = model["depth"], model["norm"]
    head = "mlp" if model["head"] == "distill" and model["head_hidden"] else model["head"]
    entries = [Entry(weight, weight.ours, None) for weight in [*EMBEDDING, *(_head(head) if head != "none" else [])]]
    num_groups = depth // NUM_PLANES
    for d in range(depth):
        group, plane = divmod(d, NUM_PLANES)
        where, row = ("groups", group) if group < num_groups else ("rest", None)
        for weight in _layer(kind, d):
            entries.append(Entry(weight, f"backbone/{where}/plane_{plane}/{weight.ours}", row))
    return entries


def _to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if layout == "linear":
        return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
    if layout == "depthwise":
        return np.ascontiguousarray(array.reshape(len(array), 9).T)
    return array.reshape(-1) if layout == "flat" else array


def _to_theirs(array: np.ndarray, entry: Weight) -> np.ndarray:
    """PyTorch's shape: 1x1 convolutions keep one axis of size 1 for [B, C, N], two inside the neighbourhood branch."""
    array = np.asarray(array, np.float32)
    if entry.layout == "linear":
        ones = (1, 1) if entry.theirs.startswith("embed.conv2.") else (1,)
        return np.ascontiguousarray(array.T).reshape(*array.T.shape, *ones)
    if entry.layout == "depthwise":
        return np.ascontiguousarray(array.T).reshape(-1, 1, 3, 3)
    return array.reshape(-1, 1, 1) if entry.layout == "flat" else array


def infer_model(weights: Mapping[str, np.ndarray], activation: str | None, name: str) -> Any:
    """The model config (a ConfigDict) that names and shapes say; `InputError` when they do not say the activation."""
    if "embed.conv1.weight" not in weights:
        raise InputError(f"{name} holds no WaffleIron student (no embed.conv1.weight among its {len(weights)} weights)")
    model = get_config().model
    model.unlock()
    model.channels, model.num_features = (int(n) for n in weights["embed.conv1.weight"].shape[:2])
    layers = [re.match(r"waffleiron\.spatial_mix\.(\d+)\.", key) for key in weights]
    model.depth = 1 + max((int(match.group(1)) for match in layers if match), default=-1)
    batch_norm = "waffleiron.spatial_mix.0.norm.running_mean" in weights
    model.norm = "batch" if batch_norm else "layer"
    model.head_hidden = 0
    if "classif.2.weight" in weights:  # only ScaLR+'s distillation head has three layers, and ScaLR+ is GELU
        model.head, model.out_features = "distill", int(weights["classif.2.weight"].shape[0])
        model.head_hidden = int(weights["classif.0.weight"].shape[0])
        model.activation = activation or "gelu"
    elif "classif.1.weight" in weights:
        model.head, model.out_features = "segment", int(weights["classif.1.weight"].shape[0])
        model.activation = activation or ("relu" if batch_norm else "")
    elif "classif.weight" in weights:
        model.head = "linear" if batch_norm else "distill"
        model.out_features = int(weights["classif.weight"].shape[0])
        model.activation = activation or "relu"
    else:
        model.head, model.out_features = "none", 0
        model.activation = activation or ("relu" if batch_norm else "")
    if not model.activation:
        raise InputError(
            f"{name} does not say its activation: downstream ScaLR (relu) and ScaLR+ (gelu) files have the same "
            "names and shapes; give activation='relu' or activation='gelu'"
        )
    return model


def convert_weights(weights: Mapping[str, np.ndarray], model: Mapping[str, Any], name: str) -> dict:
    """PyTorch weights by name -> {"params", "batch_stats"}. All that is missing, extra or misshapen is listed."""
    entries = weight_table(model)
    shapes = _shapes(model)
    problems, rows = [], {}
    for entry in entries:
        array = weights.get(entry.weight.theirs)
        kind = "batch_stats" if entry.weight.stats else "params"
        wanted = shapes[kind][entry.ours] if entry.row is None else shapes[kind][entry.ours][1:]
        if array is None:
            problems.append(f"{entry.weight.theirs} is missing (wanted for {entry.ours} {wanted})")
            continue
        try:
            converted = _to_ours(array, entry.weight.layout)
        except ValueError:
            converted = np.asarray(array)
        if converted.shape != wanted:
            problems.append(f"{entry.weight.theirs} has shape {array.shape}, and {entry.ours} needs {wanted}")
        rows.setdefault((kind, entry.ours), []).append(converted)
    known = {entry.weight.theirs for entry in entries}
    extra = sorted(key for key in weights if key not in known and not key.endswith("num_batches_tracked"))
    problems += [f"{key} {tuple(weights[key].shape)} is not part of this model" for key in extra]
    if problems:
        raise InputError(f"{name} does not fit, nothing was loaded: {'; '.join(problems)}")
    variables: dict = {"params": {}, "batch_stats": {}}
    for (kind, path), arrays in rows.items():
        *folders, last = path.split("/")
        node = variables[kind]
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = np.stack(arrays) if "/groups/" in path else arrays[0]
    return variables


def _shapes(model: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of our own tree, by path, from the student itself."""
    grids = ((2, 2),) * NUM_PLANES
    batch = _empty_batch(int(model["num_features"]), grids)
    student = make_student(model, grids=grids)
    variables = jax.eval_shape(lambda batch: student.init(jax.random.key(0), batch, train=False), batch)
    flat: dict[str, dict[str, tuple[int, ...]]] = {"params": {}, "batch_stats": {}}
    for kind in flat:
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get(kind, {})):
            flat[kind]["/".join(str(key.key) for key in path)] = leaf.shape
    return flat


def make_student(model: Mapping[str, Any], *, grids: Any = None, implementation: str = "auto") -> Student:
    """The Linen module of a model config as `load_torch_checkpoint` returns it."""
    return Student(
        channels=model["channels"],
        depth=model["depth"],
        grids=tuple((int(h), int(w)) for h, w in (model["grids"] if grids is None else grids)),
        head=model["head"],
        out_features=model["out_features"],
        head_hidden=model["head_hidden"],
        norm=model["norm"],
        activation=model["activation"],
        drop_path=model["drop_path"],
        implementation=implementation,
    )


def published_weights(content: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The student's weights inside a published file: `model_point`, `model_points`, `net`, or the file itself."""
    for key in ("model_point", "model_points", "net"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, np.ndarray)}
    if not weights:
        raise InputError(f"{name} holds no weights under model_point, model_points or net")
    return weights


def load_torch_checkpoint(path: str | Path, *, activation: str | None = None) -> tuple[ml_collections.ConfigDict, dict]:
    """A published student: (model config, {"params", "batch_stats"} of NumPy arrays).

    The file does not say intensity statistics, field of view and grids; `scalr_jax.load` asks for those.
    Raises `InputError`, also when the activation is not said and not given.
    """
    from scalr_jax.torch_file import read_weights_file

    weights = published_weights(read_weights_file(path), str(path))
    model = infer_model(weights, activation, str(path))
    return model, convert_weights(weights, model, str(path))


def published_state_dict(model: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables under PyTorch's names and shapes, complete for a strict `load_state_dict`."""
    state: dict[str, np.ndarray] = {}
    for entry in weight_table(model):
        node: Any = variables["batch_stats" if entry.weight.stats else "params"]
        for folder in entry.ours.split("/"):
            node = node[folder]
        array = np.asarray(node) if entry.row is None else np.asarray(node)[entry.row]
        state[entry.weight.theirs] = _to_theirs(array, entry.weight)
        if entry.weight.theirs.endswith("running_var"):
            state[entry.weight.theirs.replace("running_var", "num_batches_tracked")] = np.asarray(0, np.int64)
    return state


def save_torch_checkpoint(path: str | Path, model: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Write the published layout: `model_point` for distilled models (with `module.`), `net` for segmentation."""
    from scalr_jax.torch_file import write_torch_file

    state = published_state_dict(model, variables)
    if model["head"] == "distill":
        write_torch_file(path, {"model_point": {f"module.{key}": value for key, value in state.items()}})
    else:
        write_torch_file(path, {"net": state})


def _empty_batch(num_features: int, grids: Any) -> Batch:
    scene = SceneView("", 0, np.zeros((0, num_features), np.float32), np.zeros((0, 1), np.int32), (), None, None, None)
    shard = pack_shard((), Capacities(2, 1, (2,) * NUM_PLANES, (2,) * NUM_PLANES), scene, grids)
    return jax.tree.map(lambda x: x[None], shard)


def published_batch(feat, cell_ind, occupied_cells, neighbors_emb, grids) -> Batch:
    """Published arrays (see `apply_published_layout`) as one packed shard of exactly their valid points."""
    grids = [(int(h), int(w)) for h, w in grids]
    scenes = []
    for b in range(len(feat)):
        count = int(occupied_cells[b].sum())
        planes = tuple(plane_tables(np.asarray(cell_ind[b, k, :count], np.int64), grids[k]) for k in range(len(grids)))
        feats = np.asarray(feat[b, :, :count].T, np.float32)
        neighbors = np.asarray(neighbors_emb[b, 1:, :count].T, np.int32)
        scenes.append(SceneView(str(b), b, feats, neighbors, planes, None, None, None))
    totals = [
        tuple(sum(len(getattr(scene.planes[k], name)) for scene in scenes) for k in range(len(grids)))
        for name in ("position", "halo_taps")
    ]
    points = sum(len(scene.feats) for scene in scenes)
    shard = pack_shard(scenes, Capacities(points, len(scenes), *totals), scenes[0], grids)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], shard)


def apply_published_layout(
    model_config: Mapping[str, Any],
    variables: Mapping[str, Any],
    feat: np.ndarray,
    cell_ind: np.ndarray,
    occupied_cells: np.ndarray,
    neighbors_emb: np.ndarray,
    grids: Any,
    *,
    train: bool = False,
    implementation: str = "auto",
) -> Any:
    """Run the student on the published code's arrays.

    feat [B, F, N], cell_ind [B, 3, N], occupied_cells [B, N] (1 valid, 0 padding, padding last),
    neighbors_emb [B, K + 1, N] (row 0 the point itself), grids [3, 2]. Returns out [B, C_out, N] (zero where padded),
    or, in training, (out, new variables). Stochastic depth is off.
    """
    batch = published_batch(feat, cell_ind, occupied_cells, neighbors_emb, grids)
    student = make_student({**model_config, "drop_path": 0.0}, grids=grids, implementation=implementation)
    mutable = ["batch_stats"] if train else False
    result = jax.jit(lambda v, b: student.apply(v, b, train=train, mutable=mutable))(variables, batch)
    rows, updated = result if train else (result, None)
    out = np.zeros((feat.shape[0], rows.shape[-1], feat.shape[2]), np.float32)
    start = 0
    for b in range(len(feat)):
        count = int(occupied_cells[b].sum())
        out[b, :, :count] = np.asarray(rows[0, start : start + count]).T
        start += count
    return (out, {**variables, **updated}) if train else out  # type: ignore[dict-item]
