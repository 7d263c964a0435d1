"""Published students of WaffleIron, in and out: ScaLR, ScaLR+ and WaffleIron itself.

What a file is made of is read off its names and shapes, by one table of names (`interop/names.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from scalr_jax.data.scenes import PLANE_AXES
from scalr_jax.interop.model import Published, student_of
from scalr_jax.interop.names import Weight, batch_norm, convert, head_weights, layer_norm, linear
from scalr_jax.models.student import Student
from scalr_jax.runtime.errors import InputError

CONTAINERS = ("model_point", "model_points", "net")  # of the published code
WRAPPED = ("state_dict", "model_state_dict", "model", "module")  # of Lightning and others
FIRST = "embed.conv1.weight"
UNSAID = ("intensity", "field_of_view", "grids")  # by any file


EMBEDDING = [
    *batch_norm("embedding/norm", "embed.norm"),
    *linear("embedding/point", "embed.conv1"),
    *batch_norm("embedding/neighbor_norm_0", "embed.conv2.0"),
    Weight("embedding/neighbor_in", "embed.conv2.1.weight", "linear"),
    *batch_norm("embedding/neighbor_norm_1", "embed.conv2.2"),
    Weight("embedding/neighbor_out", "embed.conv2.4.weight", "linear"),
    *linear("embedding/final", "embed.final"),
]


def _norm(kind: str, ours: str, theirs: str) -> list[Weight]:
    if kind == "batch":
        return batch_norm(f"{ours}/batch", theirs)
    return layer_norm(f"{ours}/layer", theirs)


def _layer(kind: str, d: int) -> list[Weight]:
    spatial, channel = f"waffleiron.spatial_mix.{d}", f"waffleiron.channel_mix.{d}"
    return [
        *_norm(kind, "spatial/norm", f"{spatial}.norm"),
        *(Weight(f"spatial/kernel_{k}", f"{spatial}.ffn.{2 * k - 2}.weight", "depthwise") for k in (1, 2)),
        *(Weight(f"spatial/bias_{k}", f"{spatial}.ffn.{2 * k - 2}.bias", "same") for k in (1, 2)),
        Weight("spatial/scale", f"{spatial}.scale.weight", "flat"),
        *_norm(kind, "channel/norm", f"{channel}.norm"),
        *linear("channel/linear_1", f"{channel}.mlp.0"),
        *linear("channel/linear_2", f"{channel}.mlp.2"),
        Weight("channel/scale", f"{channel}.scale.weight", "flat"),
    ]


def weight_table(student: Student) -> list[Weight]:
    """Every weight of a student with a WaffleIron."""
    backbone: Any = student.backbone
    table = [*EMBEDDING, *head_weights(student)]
    num_groups = backbone.depth // len(PLANE_AXES)
    for d in range(backbone.depth):
        group, plane = divmod(d, len(PLANE_AXES))
        where, row = ("groups", group) if group < num_groups else ("rest", None)
        for weight in _layer(backbone.norm, d):
            table.append(weight._replace(ours=f"backbone/{where}/plane_{plane}/{weight.ours}", row=row))
    return table


def read(content: Mapping, name: str) -> Published:
    """The student in a file's content. Raises `InputError` that begins with `name`."""
    weights, container = published_weights(content, name)
    model = infer_model(weights, name, container=container)
    unsaid = UNSAID if "activation" in model else (*UNSAID, "activation")
    return Published(model, convert_weights(weights, student_of(model), name), unsaid=unsaid)


def convert_weights(weights: Mapping[str, np.ndarray], student: Student, name: str) -> dict:
    """PyTorch weights by name -> {"params", "batch_stats"}. Raises `InputError`, see `names.convert`."""
    return convert(weights, student, weight_table(student), weights[FIRST].shape[1], name)


def published_weights(content: Mapping, name: str, first: str = FIRST) -> tuple[dict[str, np.ndarray], str]:
    """The student's weights inside a published file and the one of `CONTAINERS` they stood under ("" for none).

    `first`: the weight that tells such a student. Where names begin with a prefix ("model." in a file of Lightning),
    others belong to other models and are named.
    """
    container = next((key for key in (*CONTAINERS, *WRAPPED) if isinstance(content.get(key), Mapping)), "")
    content = content[container] if container else content
    arrays = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, np.ndarray)}
    if not arrays:
        hint = next(filter(None, (_hint(part) for part in content.values() if isinstance(part, Mapping))), "")
        raise InputError(f"{name} holds no weights, neither under {', '.join(CONTAINERS)} nor at its top{hint}")
    prefixes = [key.removesuffix(first) for key in arrays if f".{key}".endswith(f".{first}")]
    if len(prefixes) > 1:
        raise InputError(f"{name} holds {len(prefixes)} students, under {', '.join(prefixes)}; keep one of them")
    prefix = "".join(prefixes)
    weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    if others := sorted({key.split(".")[0] for key in arrays if not key.startswith(prefix)}):
        logging.warning("%s: weights of %s are no part of the student under %s", name, ", ".join(others), prefix)
    return weights, next((key for key in CONTAINERS if key in (container, *prefix.split("."))), "")


def infer_model(weights: Mapping[str, np.ndarray], name: str, *, container: str = "") -> dict:
    """The keys of `config.model` that names and shapes say, with `num_features`, `head` and `out_features`.

    `container` is the key the weights stood under: a plain convolution is a distillation head under `model_point`, and
    WaffleIron's segmentation head under `net`. There is no `activation` where the file does not say it.
    """
    first = weights.get(FIRST)
    layers = [re.match(r"waffleiron\.spatial_mix\.(\d+)\.", key) for key in weights]
    depth = 1 + max((int(match.group(1)) for match in layers if match), default=-1)
    if first is None or first.ndim < 2 or not 0 < depth <= len(weights):
        what = FIRST if first is None or first.ndim < 2 else "waffleiron.spatial_mix.N"
        raise InputError(
            f"{name} holds no WaffleIron student (no {what} among its {len(weights)} weights){_hint(weights)}"
        )
    channels, num_features = (int(n) for n in first.shape[:2])
    has_batch_norm = "waffleiron.spatial_mix.0.norm.running_mean" in weights
    head, hidden, out_features = "none", 0, 0
    activation = "relu" if has_batch_norm else ""  # the original WaffleIron is ReLU
    if "classif.2.weight" in weights:  # only ScaLR+'s distillation head has three layers, and ScaLR+ is GELU
        head, activation = "distill", "gelu"
        out_features, hidden = (len(weights[f"classif.{n}.weight"]) for n in (2, 0))
    elif "classif.3.weight" in weights:
        head, out_features = "mlp", len(weights["classif.3.weight"])
    elif "classif.1.weight" in weights:
        head, out_features = "segment", len(weights["classif.1.weight"])
    elif "classif.weight" in weights:
        distilled = container.startswith("model_point") or (not container and not has_batch_norm)
        head, out_features = "distill" if distilled else "linear", len(weights["classif.weight"])
        activation = "relu" if distilled else activation  # ScaLR
    model = {"name": "waffleiron", "channels": channels, "depth": depth, "norm": "batch" if has_batch_norm else "layer"}
    model |= {"num_neighbors": 16}  # of all that were published
    model |= {"num_features": num_features, "head": head, "head_hidden": hidden, "out_features": out_features}
    return model | ({"activation": activation} if activation else {})


def _hint(weights: Mapping) -> str:
    """A hint for files with kernels of 3x3x3, as a sparse network's are: a list of 27 matrices, or five axes."""
    shapes = [array.shape for array in weights.values() if isinstance(array, np.ndarray)]
    if not any(len(shape) == 5 or (len(shape) == 3 and shape[0] == 27) for shape in shapes):
        return ""
    return "; it looks like a MinkUNet whose names are not known here (docs/minkunets.md says which are)"
