"""Published students of VaViT (valeo.ai), in and out, and the network on the published code's arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.data.scenes import RAW_INTENSITY, WHOLE_VIEW, Batch, ScenePillars, SceneView
from scalr_jax.interop.model import Published, student_of
from scalr_jax.interop.names import Weight, batch_norm, convert, head_weights, layer_norm, linear, state_dict
from scalr_jax.interop.waffleiron import published_weights
from scalr_jax.models.student import Student, Variables
from scalr_jax.models.vavit import ROTARY_BASE, SIZES, Size, VaViTBackbone
from scalr_jax.runtime.errors import InputError

FIRST = "embed.0.point_mlp.0.weight"


def _matrix(ours: str, theirs: str) -> Weight:
    return Weight(f"{ours}/kernel", f"{theirs}.weight", "matrix")


def _matrices(weights: list[Weight]) -> list[Weight]:
    """Linear layers, where WaffleIron has 1x1 convolutions."""
    return [weight._replace(layout=weight.layout.replace("linear", "matrix")) for weight in weights]


def weight_table(student: Student) -> list[Weight]:
    """Every weight of a student with a VaViT. The head of ours that is no plain linear layer has ScaLR's names."""
    backbone = student.backbone
    assert isinstance(backbone, VaViTBackbone)
    table = batch_norm("embedding/norm", "norm")
    for n in range(backbone.point_depth):
        ours, theirs = f"embedding/layer_{n}", f"embed.{n}"
        table += [
            _matrix(f"{ours}/point", f"{theirs}.point_mlp.0"),
            _matrix(f"{ours}/neighbor", f"{theirs}.neigh_mlp.0"),
        ]
        table += batch_norm(f"{ours}/point_norm", f"{theirs}.point_mlp.1")
        table += batch_norm(f"{ours}/neighbor_norm", f"{theirs}.neigh_mlp.1")
        table += [
            *_matrices(linear(f"{ours}/gate", f"{theirs}.neigh_gate.0")),
            _matrix(f"{ours}/final", f"{theirs}.final"),
        ]
    for d in range(backbone.depth):
        for n, theirs, matrices in (
            ("1", f"vit.spatial_mix.{d}", {"attention/qkv": "qkv", "attention/projection": "proj"}),
            ("2", f"vit.channel_mix.{d}", {"mlp/linear_1": "l1", "mlp/linear_2": "l2"}),
        ):
            rows = layer_norm(f"norm_{n}/layer", f"{theirs}.norm")
            rows += [_matrix(ours, f"{theirs}.{name}") for ours, name in matrices.items()]
            rows.append(Weight(f"scale_{n}", f"{theirs}.gamma", "same"))
            table += [row._replace(ours=f"backbone/blocks/{row.ours}", row=d) for row in rows]
    table.append(Weight("backbone/pad_token", "pad_token", "same"))
    for ours, theirs in (("point", "point_proj"), ("pillar", "bev_proj"), ("out", "merge")):
        table.append(_matrix(f"backbone/merge/{ours}", f"merge.{theirs}.0"))
        table += batch_norm(f"backbone/merge/{ours}_norm", f"merge.{theirs}.1")
    return [*table, *_matrices([*linear("backbone/merge/gate", "merge.gate.0"), *head_weights(student)])]


def published_state_dict(student: Student, variables: Variables) -> dict[str, np.ndarray]:
    """Our variables under the published names, complete for a strict `load_state_dict`."""
    return state_dict(weight_table(student), variables) | _frequencies(student)


def _frequencies(student: Student) -> dict[str, np.ndarray]:
    """The buffers of rotary positions."""
    backbone = student.backbone
    assert isinstance(backbone, VaViTBackbone)
    half = backbone.width // backbone.num_heads // 2
    frequencies = (1.0 / ROTARY_BASE ** (np.arange(0, half, 2, dtype=np.float32) / half)).astype(np.float32)
    return {f"vit.spatial_mix.{d}.inv_freq": frequencies for d in range(backbone.depth)}


def recognises(content: Mapping) -> bool:
    """Whether a file has the first matrix of a VaViT's point layers."""
    parts = [content, *(part for part in content.values() if isinstance(part, Mapping))]
    return any(str(key).endswith(FIRST) for part in parts for key in part)


def read(content: Mapping, name: str) -> Published:
    """The student in a file's content. Raises `InputError` that begins with `name`."""
    weights, container = published_weights(content, name, FIRST)
    model = infer_model(weights, name)
    if container.startswith("model_point") and model["head"] == "linear":
        model["head"] = "distill"  # `write_published` says so by the container
    try:
        student = student_of(model)
    except InputError as error:
        raise InputError(f"{name} holds no VaViT: {error}") from None
    buffers = _frequencies(student)
    for key in sorted(weights.keys() & buffers.keys()):
        if weights[key].shape != buffers[key].shape or not np.allclose(weights[key], buffers[key], rtol=1e-5):
            raise InputError(f"{name}: {key} is not 10000^(-2 i / h), as VaViT's are; it is another model")
    rest = {key: x for key, x in weights.items() if key not in buffers}
    variables = convert(rest, student, weight_table(student), model["num_features"], name)
    if model["head"] == "linear":  # as published; other heads are this package's, and normalise
        return Published(model, variables, {"intensity": RAW_INTENSITY})
    return Published(model, variables, unsaid=("intensity",))


def infer_model(weights: Mapping[str, np.ndarray], name: str) -> dict:
    """The keys of `config.model` that names and shapes say, with `num_features`, `head` and `out_features`."""

    def count(stem: str) -> int:
        found = (re.match(re.escape(stem) + r"(\d+)\.", key) for key in weights)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def rows(key: str, axis: int = 0) -> int:
        if key not in weights or weights[key].ndim <= axis or weights[key].shape[axis] == 0:
            raise InputError(f"{name} holds no whole VaViT: {key} is missing or has another shape; copy the file again")
        return int(weights[key].shape[axis])

    depth, point_depth = count("vit.spatial_mix."), count("embed.")
    width, half = rows("pad_token"), 2 * rows("vit.spatial_mix.0.inv_freq")
    size = Size(
        *(width, depth, width // max(2 * half, 1), rows("vit.channel_mix.0.l1.weight")),
        point_hidden=rows(FIRST),
        merge_hidden=rows("merge.point_proj.0.weight"),
        channels=rows("merge.merge.0.weight"),
    )
    last = max((key for key in weights if re.fullmatch(r"classif\.(\d\.)?weight", key)), default="")
    heads = {"": "none", "classif.weight": "linear", "classif.1.weight": "segment", "classif.3.weight": "mlp"}
    known = next((key for key, value in SIZES.items() if value[:4] == size[:4]), "vavit_b")
    of_name = SIZES[known]._asdict()  # 0: as the name says, which is how configs have it
    vavit = {key: 0 if value == of_name[key] else value for key, value in size._asdict().items()}
    model = {"name": known, "vavit": vavit | {"point_depth": point_depth}, "num_neighbors": 16}
    model |= {"head": heads.get(last, "distill"), "segmentation_head": "linear"}
    model |= {"field_of_view": WHOLE_VIEW, "num_features": rows(FIRST, 1)}  # the published code cuts no view
    hidden = rows("classif.0.weight") if last == "classif.2.weight" else 0
    return model | {"head_hidden": hidden, "out_features": rows(last) if last else 0}


def published_batch(
    feat: np.ndarray,
    neighbors: np.ndarray,
    xy_bev: np.ndarray,
    idx_bev: np.ndarray,
    splits_bev: np.ndarray,
    idx_pad: np.ndarray | None = None,
) -> tuple[Batch, np.ndarray]:
    """Published arrays as one packed shard, and where each of their points stands in it."""
    length = int(splits_bev[0])
    padding = np.zeros(length * len(splits_bev), bool)
    if idx_pad is not None:
        padding[idx_pad] = True
    counts = (~padding.reshape(-1, length)).sum(axis=1)  # pillars of each scene
    scenes, places, first, points = [], np.empty(len(feat), np.int64), 0, 0
    for b, count in enumerate(counts):
        mine = np.flatnonzero(idx_bev // length == b)
        order = mine[np.argsort(idx_bev[mine], kind="stable")]
        places[order] = points + np.arange(len(order))
        rank = np.empty(len(feat), np.int32)
        rank[order] = np.arange(len(order))
        pillars = ScenePillars((idx_bev[order] - b * length).astype(np.int32), xy_bev[first : first + count])
        near = rank[neighbors[order]]
        scenes.append(SceneView(str(b), b, feat[order], near, (), None, None, None, pillars=pillars))
        first, points = first + count, points + len(order)
    capacities = Capacities(len(feat), len(scenes), (), (), pillars=(int(counts.sum()),))
    shard = pack_shard(scenes, capacities, scenes[0], ())
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x)[None], shard)), places


def apply_published_vavit(
    model_config: Mapping,
    variables: Variables,
    feat: np.ndarray,
    neighbors: np.ndarray,
    xy_bev: np.ndarray,
    idx_bev: np.ndarray,
    splits_bev: np.ndarray,
    *,
    idx_pad: np.ndarray | None = None,
    train: bool = False,
) -> Any:
    """Run the student on the published code's arrays, with its padding tokens.

    feat [N, F], neighbors [N, K] and idx_bev [N] rows of the whole batch, xy_bev [pillars, 2], splits_bev [B] rows of
    each scene in the table of pillars, idx_pad the rows that hold the padding token. Returns out [N, classes], or, in
    training, (out, new variables). Stochastic depth is off.
    """
    batch, places = published_batch(feat, neighbors, xy_bev, idx_bev, splits_bev, idx_pad)
    vavit = {**model_config["vavit"], "padding_tokens": "published"}
    student = student_of(model_config, drop_path=0.0, vavit=vavit)
    mutable = ["batch_stats"] if train else False
    result = jax.jit(lambda v, b: student.apply(v, b, train=train, mutable=mutable))(variables, batch)
    rows, updated = result if train else (result, None)
    out = np.asarray(rows[0])[places]
    return (out, {**variables, **updated}) if train else out  # type: ignore[dict-item]
