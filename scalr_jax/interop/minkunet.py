"""Published MinkUNets to `scalr_jax.models.minkunet`: MinkowskiEngine's layout and torchsparse's.

A kernel is [elements, C_in, C_out] in both, and element i takes the input at `output + offset i`, of a strided
convolution at `2 * output + offset i`; a transposed one uses the offsets of the strided one it undoes. Their order:

    MinkowskiEngine   3x3x3 and 2x2x2: x runs fastest (`kernel_region::coordinate_at` of 0.5, the same in 0.4)
    torchsparse       3x3x3: x runs fastest; 2x2x2: z does (`get_kernel_offsets` of 1.4 and 2.0, `KernelRegion` before,
                      the CUDA kernels of 2.1: the same)
    ours              z runs fastest

with offsets -1, 0, 1 and 0, 1 along each axis of the voxels' coordinates. Both concatenate [up, skip] as we do, and
their norms are PyTorch's, epsilon 1e-5. Names are those of MinkowskiEngine's `examples/minkunet.py` (SLidR's are the
same) and of SPVNAS (MIT) and OpenPCSeg.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from scalr_jax.data.scenes import FEATURES, RAW_INTENSITY
from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.model import NORM, Published, extra_weights
from scalr_jax.models.minkunet import BLOCKS, scaled_widths
from scalr_jax.ops.voxels import NEIGHBORS
from scalr_jax.runtime.errors import InputError

CHILDREN = tuple(itertools.product((0, 1), repeat=3))
PUBLISHED_FEATURES = {  # by layout and number
    ("minkowski", 1): ("intensity",),  # SLidR
    ("torchsparse", 3): ("x", "y", "z"),  # OpenPCSeg, the one of coordinates alone
    ("torchsparse", 4): ("x", "y", "z", "intensity"),  # SPVNAS and OpenPCSeg on SemanticKITTI
}
_HEADS = ("final.", "classifier.")
CONTAINERS = ("model_points", "model_point", "state_dict", "model_state", "model")


class Names(NamedTuple):
    """The names of one layout: pairs are those of a convolution's kernel and its norm. Stages count from 0 to 7."""

    head: str
    stem: tuple[tuple[str, str], ...]
    between: tuple[tuple[str, str], ...]  # of the convolution to each stage's voxels
    blocks: tuple[tuple[str, int], ...]  # what names of each stage's blocks begin with, and the number of the first
    parts: tuple[tuple[str, str], ...]  # of a block: the first and second convolution, the shortcut

    def block(self, stage: int, number: int) -> list[tuple[str, str]]:
        start, first = self.blocks[stage]
        return [(f"{start}{first + number}.{kernel}", f"{start}{first + number}.{norm}") for kernel, norm in self.parts]


NAMES = {
    "minkowski": Names(
        "final.kernel",
        (("conv0p1s1.kernel", "bn0.bn"),),
        (
            *((f"conv{k + 1}p{2**k}s2.kernel", f"bn{k + 1}.bn") for k in range(4)),
            *((f"convtr{k}p{2 ** (8 - k)}s2.kernel", f"bntr{k}.bn") for k in range(4, 8)),
        ),
        tuple((f"block{k + 1}.", 0) for k in range(8)),
        (("conv1.kernel", "norm1.bn"), ("conv2.kernel", "norm2.bn"), ("downsample.0.kernel", "downsample.1.bn")),
    ),
    "torchsparse": Names(
        "classifier.0.weight",
        (("stem.0.kernel", "stem.1"), ("stem.3.kernel", "stem.4")),
        tuple((f"{name}{k}.0.net.0.kernel", f"{name}{k}.0.net.1") for name in ("stage", "up") for k in range(1, 5)),
        (*((f"stage{k}.", 1) for k in range(1, 5)), *((f"up{k}.1.", 0) for k in range(1, 5))),
        (("net.0.kernel", "net.1"), ("net.3.kernel", "net.4"), ("downsample.0.kernel", "downsample.1")),
    ),
}
STEMS = {layout: names.stem[0][0] for layout, names in NAMES.items()}


class Weight(NamedTuple):
    """One array of the file and where it goes."""

    theirs: str
    ours: str  # path, beginning with "params" or "batch_stats"
    shape: tuple[int, ...]  # ours
    kind: str  # "kernel", "vector", "linear"


class Network(NamedTuple):
    """Settings read off the names and shapes of a published MinkUNet."""

    layout: str  # "minkowski" or "torchsparse"
    name: str  # "minkunet14", "minkunet18", "minkunet34", or "" for other numbers of blocks
    blocks: tuple[int, ...]  # of the eight stages; with the next three the fields of `models.minkunet.MinkUNet`
    widths: tuple[int, ...]
    stem: int  # channels
    stem_convolutions: int  # 1, or 2 as SPVNAS's
    num_features: int  # of a point
    features: tuple[str, ...]  # their names, of `FEATURES`, intensity raw; () where not known
    head: str  # "linear", "distill" (SLidR's pretraining, which keeps its image model in the file) or "none"
    out_features: int  # of the head, 0 for none
    unused: tuple[str, ...]  # names that are not converted: of other models, SPVNAS's `point_transforms`, OpenPCSeg's
    # classifier, which reads three levels at once


def recognises(content: Mapping) -> bool:
    """Whether a file has the first convolution of a MinkUNet."""
    parts = [content, *(part for part in content.values() if isinstance(part, Mapping))]
    return any(str(key).endswith(tuple(STEMS.values())) for part in parts for key in part)


def read(content: Mapping, name: str) -> Published:
    """The student in a file's content: voxels of 0.05 m as SPVNAS and OpenPCSeg train, or 0.1 m, and raw intensities.

    Raises:
      InputError: begins with `name`; as `find_network`, `convert` and `with_our_features`, or channels that are no
        multiple of the published ones.
    """
    network, weights = find_network(content, name)
    channels = (network.stem, *network.widths)
    width = next((k / 100 for k in range(1, 1001) if scaled_widths(k / 100) == channels), None)
    if width is None or not network.name:
        blocks = ", ".join(map(str, network.blocks))
        raise InputError(
            f"{name}: a MinkUNet of {', '.join(map(str, channels))} channels and {blocks} residual blocks, and those "
            f"known are {', '.join(BLOCKS)}, with channels times one factor"
        )
    variables = with_our_features(convert(weights, network, name), network, name)
    voxel_size = 0.05 if network.layout == "torchsparse" else 0.1
    minkunet = {"width": width, "stem_convolutions": network.stem_convolutions, "voxel_size": voxel_size}
    model = {"name": network.name, "minkunet": minkunet, "num_features": len(FEATURES)}
    model |= {"head": network.head, "head_hidden": 0, "out_features": network.out_features}
    return Published(model, variables, {"intensity": RAW_INTENSITY, "voxel_size": voxel_size})


def find_network(content: Mapping, name: str) -> tuple[Network, dict[str, np.ndarray]]:
    """The MinkUNet in a file's content, and its weights by their names there, without the prefix that they have inside
    a larger model.

    Raises:
      InputError: no MinkUNet, or one of bottlenecks (50, 101) or with a stem of 5x5x5.
    """
    container = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
    weights, layout, outside = _weights(content[container] if container else content, name)
    names = NAMES[layout]
    _check_kinds(weights, names, name)
    stem = weights[STEMS[layout]].shape
    widths = tuple(weights[names.block(stage, 0)[0][0]].shape[-1] for stage in range(8))
    blocks = tuple(_count_blocks(weights, *names.blocks[stage]) for stage in range(8))
    unused = list(outside)
    in_head = [key for key in weights if key.startswith(_HEADS)]
    matrix = weights.get(names.head, np.zeros(()))
    if layout == "torchsparse":
        unused += [key for key in weights if key.startswith("point_transforms.")]
        if matrix.shape[1:] == (widths[3] + widths[5] + widths[7],):
            unused, in_head = unused + in_head, []
    distilled = isinstance(content.get("model_images"), Mapping)
    rows_first = layout == "torchsparse"  # [out, in], the others [in, out]
    network = Network(
        layout=layout,
        name=next((known for known, numbers in BLOCKS.items() if numbers == blocks), ""),
        blocks=blocks,
        widths=widths,
        stem=stem[2],
        stem_convolutions=sum(kernel in weights for kernel, _ in names.stem),
        num_features=stem[1],
        features=PUBLISHED_FEATURES.get((layout, stem[1]), ()),
        head=("distill" if distilled else "linear") if in_head else "none",
        out_features=matrix.shape[0 if rows_first else -1] if in_head and matrix.ndim >= 2 else 0,
        unused=tuple(sorted(unused)),
    )
    return network, weights


def convert(weights: Mapping[str, np.ndarray], network: Network, name: str) -> dict:
    """{"params", "batch_stats"} of float32 arrays, in the student's tree: the MinkUNet is "backbone", its last layer
    "head" as `network.head` says.

    Raises:
      InputError: begins with `name` and lists every weight that is missing, extra, of another shape or not finite.
    """
    unused = set(network.unused)
    if network.head == "none":
        unused |= {key for key in weights if key.startswith(_HEADS)}
    table = weight_table(network)
    known = {row.theirs for row in table}
    check_weights({key: weights[key] for key in known & weights.keys()}, name)
    problems, flat = [], {}
    for row in table:
        array, shapes = weights.get(row.theirs), _theirs_shapes(row, network.layout)
        if array is None:
            problems.append(f"{row.theirs} is missing, needs {shapes[0]}")
        elif array.shape not in shapes:
            problems.append(f"{row.theirs} has {array.shape}, needs {shapes[0]}")
        else:
            flat[row.ours] = _to_ours(array, row, network.layout)
    problems += extra_weights(weights, known | unused)
    if problems:
        model = network.name or "a MinkUNet"
        raise InputError(f"{name} does not fit {model}, nothing was loaded: {'; '.join(problems)}")
    return unflatten_dict(flat, sep="/")


def with_our_features(variables: Mapping, network: Network, name: str) -> dict:
    """`convert`'s variables, with a stem that takes `FEATURES`: those the network was not trained with get zeros. It
    was trained with raw intensities, so the student's statistics must be (0, 1).

    Raises:
      InputError: which features the network was trained with is not known.
    """
    if not network.features:
        known = "; ".join(", ".join(names) for names in PUBLISHED_FEATURES.values())
        raise InputError(
            f"{name} takes {network.num_features} features a point and does not say which; known are those of "
            f"published files, {known}"
        )
    params = variables["params"]
    kernel = params["backbone"]["stem"]["kernel"]
    wide = np.zeros((len(kernel), len(FEATURES), kernel.shape[2]), np.float32)
    wide[:, [FEATURES.index(feature) for feature in network.features]] = kernel
    backbone = {**params["backbone"], "stem": {"kernel": wide}}
    return {**variables, "params": {**params, "backbone": backbone}}


def weight_table(network: Network) -> list[Weight]:
    """Every array that the network's file must hold."""
    names, widths, width = NAMES[network.layout], network.widths, network.stem
    rows = []

    def convolution(ours: str, theirs: tuple[str, str], elements: int, fan_in: int, fan_out: int) -> None:
        kernel, norm = theirs
        rows.append(Weight(kernel, f"params/backbone/{ours}/kernel", (elements, fan_in, fan_out), "kernel"))
        norm_path = ours.replace("conv_", "norm_") if "conv_" in ours else f"{ours}_norm"
        for leaf, their_leaf in NORM:
            kind = "batch_stats" if their_leaf.startswith("running") else "params"
            rows.append(
                Weight(f"{norm}.{their_leaf}", f"{kind}/backbone/{norm_path}/norm/{leaf}", (fan_out,), "vector")
            )

    fan_in = network.num_features
    for number in range(network.stem_convolutions):
        ours = f"stem_{number}" if number else "stem"
        convolution(ours, names.stem[number], 27, fan_in, width)
        fan_in = width
    skips = []
    for stage in range(8):
        if stage < 4:
            skips.append(width)
            convolution(f"down_{stage}", names.between[stage], 8, width, width)
        else:
            convolution(f"up_{stage}", names.between[stage], 8, width, widths[stage])
            width = widths[stage] + skips[7 - stage]
        for number in range(network.blocks[stage]):
            ours, (first, second, shortcut) = f"stage_{stage}_{number}", names.block(stage, number)
            convolution(f"{ours}/conv_1", first, 27, width, widths[stage])
            convolution(f"{ours}/conv_2", second, 27, widths[stage], widths[stage])
            if width != widths[stage]:
                convolution(f"{ours}/shortcut", shortcut, 1, width, widths[stage])
            width = widths[stage]
    if network.head != "none":
        path = "params/head/out" if network.head == "distill" else "params/head"
        shape = (width, network.out_features)
        kind = "linear" if network.layout == "torchsparse" else "kernel"
        rows.append(Weight(names.head, f"{path}/kernel", shape, kind))
        rows.append(Weight(re.sub(r"\w+$", "bias", names.head), f"{path}/bias", shape[1:], "vector"))
    return rows


def _count_blocks(weights: Mapping[str, np.ndarray], start: str, first: int) -> int:
    """The number of a stage's blocks, whose names begin with `start` and then a number from `first` on."""
    found = (re.match(r"(\d+)\.", name.removeprefix(start)) for name in weights if name.startswith(start))
    return len({match[1] for match in found if match} - ({"0"} if first else set()))


def _weights(content: Mapping, path: str) -> tuple[dict[str, np.ndarray], str, list[str]]:
    """The MinkUNet's arrays by name without a prefix, the layout, and the names of other arrays beside them."""
    arrays = {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}
    stems = [(layout, name) for layout, stem in STEMS.items() for name in arrays if f".{name}".endswith(f".{stem}")]
    if len(stems) != 1:
        raise InputError(
            f"{path} holds no MinkUNet in MinkowskiEngine's or torchsparse's layout: it has {len(stems)} weights named "
            f"{' or '.join(STEMS.values())} among {len(arrays)}; docs/minkunets.md says whose names are known"
        )
    [(layout, name)] = stems
    prefix = name.removesuffix(STEMS[layout])
    weights = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    return weights, layout, [name for name in arrays if not name.startswith(prefix)]


def _check_kinds(weights: Mapping[str, np.ndarray], names: Names, path: str) -> None:
    """Raises InputError unless the arrays that give the settings exist: kernels [elements, C_in, C_out] of 3x3x3."""
    first, stem = [names.block(stage, 0)[0][0] for stage in range(8)], names.stem[0][0]
    wrong = [name for name in (stem, *first) if name not in weights or weights[name].ndim not in (2, 3)]
    if wrong:
        raise InputError(f"{path} holds no MinkUNet that is known here: {', '.join(wrong)} missing or of another kind")
    if weights[first[0]].ndim == 2 or weights[first[0]].shape[0] == 1:
        raise InputError(f"{path} is a MinkUNet of bottleneck blocks (50 or 101), which are not implemented")
    if weights[stem].shape[0] == 125:
        raise InputError(
            f"{path} has a stem of 5x5x5, as in MinkowskiEngine's example, and only stems of 3x3x3 (SLidR's, "
            "torchsparse's) can be computed here"
        )
    wrong = [name for name in (stem, *first) if weights[name].ndim != 3 or weights[name].shape[0] != 27]
    if wrong:
        found = ", ".join(f"{name} {weights[name].shape}" for name in wrong)
        raise InputError(f"{path} holds no MinkUNet that is known here: {found} is no kernel of 3x3x3")


def _theirs_shapes(row: Weight, layout: str) -> tuple[tuple[int, ...], ...]:
    """The shapes an array may have in the file; the first is the usual one."""
    if row.kind == "linear":
        return (row.shape[::-1],)
    if row.kind == "kernel" and (len(row.shape) == 2 or row.shape[0] == 1):  # 1x1x1, with or without its axis
        return row.shape[-2:], (1, *row.shape[-2:])
    if row.theirs == "final.bias" and layout == "minkowski":
        return (1, *row.shape), row.shape
    return (row.shape,)


def _to_ours(array: np.ndarray, row: Weight, layout: str) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if row.kind == "linear":
        array = array.T
    elif row.kind == "kernel" and row.shape[0] in (27, 8) and len(row.shape) == 3:
        array = array[element_order(layout, row.shape[0])]
    return np.ascontiguousarray(array.reshape(row.shape))


def element_order(layout: str, elements: int) -> list[int]:
    """For each of our 27 or 8 kernel elements, the published element with the same offset."""
    ours = NEIGHBORS if elements == 27 else CHILDREN
    x_fastest = sorted(ours, key=lambda offset: offset[::-1])
    theirs = ours if (layout, elements) == ("torchsparse", 8) else x_fastest
    return [theirs.index(offset) for offset in ours]
