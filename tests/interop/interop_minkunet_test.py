"""Published MinkUNets, in small: files of both layouts give what a plain interpreter of those networks gives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import scalr_jax
from scalr_jax import tasks
from scalr_jax.config import get_config
from scalr_jax.data.scenes import PackedVoxels
from scalr_jax.data.transforms import make_features
from scalr_jax.interop import torch_file
from scalr_jax.interop.minkunet import Network, convert, element_order, find_network, with_our_features
from scalr_jax.models import minkunet
from scalr_jax.ops import sparse_conv
from scalr_jax.ops.voxels import count_levels, extent_of, sizes_for
from scalr_jax.predict import run as predict
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from tests.support.checks import mentions

VIEW, SIZE = ((0.0, 0.0, 0.0), (12.0, 10.0, 6.0)), 0.5
STEM, WIDTHS, BLOCKS, FEATURES, CLASSES = 4, (4, 6, 8, 8, 8, 6, 6, 5), (1, 2, 1, 1, 1, 1, 1, 1), 3, 7
LAYOUTS = ("minkowski", "torchsparse")


# ------------------------------------------------------------ the published networks, voxel by voxel, in float64


def offsets(layout, kernel):
    """In the order of the kernel's elements; a line for each published order."""
    low, high = (-1, 2) if len(kernel) == 27 else (0, 2)
    steps = range(low, high)
    if layout == "torchsparse" and len(kernel) == 8:
        return [(x, y, z) for x in steps for y in steps for z in steps]
    return [(x, y, z) for z in steps for y in steps for x in steps]


def convolve(layout, kernel, scene, stride=1):
    """scene {voxel: features} -> the same of the output's voxels."""
    kernel, result = kernel.astype(np.float64), {}
    for voxel in {tuple(c // stride for c in voxel) for voxel in scene}:
        near = [tuple(stride * c + d for c, d in zip(voxel, step, strict=True)) for step in offsets(layout, kernel)]
        terms = [scene[other] @ matrix for other, matrix in zip(near, kernel, strict=True) if other in scene]
        result[voxel] = sum(terms)
    return result


def transpose(layout, kernel, scene, voxels):
    result = {}
    for voxel, features in scene.items():
        for step, matrix in zip(offsets(layout, kernel), kernel.astype(np.float64), strict=True):
            other = tuple(2 * c + d for c, d in zip(voxel, step, strict=True))
            if other in voxels:
                result[other] = features @ matrix
    return result


def each(function, *scenes):
    return {voxel: function(*(scene[voxel] for scene in scenes)) for voxel in scenes[0]}


def relu(scene):
    return each(lambda x: np.maximum(x, 0), scene)


class Interpreter:
    """Runs a state dict, whose names it is told: `norm` is what a layout puts between a norm's name and its leaf."""

    def __init__(self, layout, state):
        self.layout, self.state = layout, {name: np.asarray(array, np.float64) for name, array in state.items()}
        self.inner = ".bn" if layout == "minkowski" else ""

    def norm(self, scene, name):
        weight, bias, mean, variance = (
            self.state[f"{name}{self.inner}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return each(lambda x: (x - mean) / np.sqrt(variance + 1e-5) * weight + bias, scene)

    def layer(self, scene, kernel, norm, stride=1):
        return relu(self.norm(convolve(self.layout, self.state[kernel], scene, stride), norm))

    def up(self, scene, kernel, norm, skip):
        scene = relu(self.norm(transpose(self.layout, self.state[kernel], scene, skip), norm))
        return each(lambda a, b: np.concatenate([a, b]), scene, skip)

    def residual(self, scene, start, names):
        conv_1, norm_1, conv_2, norm_2 = (f"{start}.{name}" for name in names)
        x = self.layer(scene, f"{conv_1}.kernel", norm_1)
        x = self.norm(convolve(self.layout, self.state[f"{conv_2}.kernel"], x), norm_2)
        shortcut = self.state.get(f"{start}.downsample.0.kernel")
        if shortcut is not None:
            scene = self.norm(each(lambda x: x @ shortcut, scene), f"{start}.downsample.1")
        return relu(each(np.add, x, scene))

    def minkowski(self, scene):
        names = ("conv1", "norm1", "conv2", "norm2")

        def blocks(scene, stage):
            for number in range(BLOCKS[stage - 1]):
                scene = self.residual(scene, f"block{stage}.{number}", names)
            return scene

        p1 = self.layer(scene, "conv0p1s1.kernel", "bn0")
        p2 = blocks(self.layer(p1, "conv1p1s2.kernel", "bn1", 2), 1)
        p4 = blocks(self.layer(p2, "conv2p2s2.kernel", "bn2", 2), 2)
        p8 = blocks(self.layer(p4, "conv3p4s2.kernel", "bn3", 2), 3)
        x = blocks(self.layer(p8, "conv4p8s2.kernel", "bn4", 2), 4)
        x = blocks(self.up(x, "convtr4p16s2.kernel", "bntr4", p8), 5)
        x = blocks(self.up(x, "convtr5p8s2.kernel", "bntr5", p4), 6)
        x = blocks(self.up(x, "convtr6p4s2.kernel", "bntr6", p2), 7)
        x = blocks(self.up(x, "convtr7p2s2.kernel", "bntr7", p1), 8)
        return each(lambda x: x @ self.state["final.kernel"] + self.state["final.bias"][0], x)

    def torchsparse(self, scene):
        names = ("net.0", "net.1", "net.3", "net.4")

        def blocks(scene, start, numbers):
            for number in numbers:
                scene = self.residual(scene, f"{start}.{number}", names)
            return scene

        scene = self.layer(scene, "stem.0.kernel", "stem.1")
        levels = [self.layer(scene, "stem.3.kernel", "stem.4")]
        for stage in range(1, 5):
            x = self.layer(levels[-1], f"stage{stage}.0.net.0.kernel", f"stage{stage}.0.net.1", 2)
            levels.append(blocks(x, f"stage{stage}", range(1, 1 + BLOCKS[stage - 1])))
        x = levels[4]
        for stage in range(1, 5):
            x = self.up(x, f"up{stage}.0.net.0.kernel", f"up{stage}.0.net.1", levels[4 - stage])
            x = blocks(x, f"up{stage}.1", range(BLOCKS[3 + stage]))
        return each(lambda x: self.state["classifier.0.weight"] @ x + self.state["classifier.0.bias"], x)


# ------------------------------------------------------------------------------------------------ files of weights


def state_dict(layout, stem=STEM, widths=WIDTHS, blocks=BLOCKS):
    """Random weights under the published names, which are written out here once more, from the published modules."""
    rng, state = np.random.default_rng(LAYOUTS.index(layout)), {}
    minkowski = layout == "minkowski"

    def kernel(name, elements, fan_in, fan_out):
        shape = (elements, fan_in, fan_out) if elements > 1 else (fan_in, fan_out)
        state[f"{name}.kernel"] = rng.normal(0, (2 / (fan_in * min(elements, 9))) ** 0.5, shape)

    def norm(name, width):
        name += ".bn" if minkowski else ""
        for leaf, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.2, 0.2)):
            state[f"{name}.{leaf}"] = rng.uniform(low, high, width)
        state[f"{name}.running_var"] = rng.uniform(0.5, 2.0, width)
        state[f"{name}.num_batches_tracked"] = np.array(5)

    def block(start, fan_in, width):
        parts = ("conv1", "norm1", "conv2", "norm2") if minkowski else ("net.0", "net.1", "net.3", "net.4")
        kernel(f"{start}.{parts[0]}", 27, fan_in, width)
        norm(f"{start}.{parts[1]}", width)
        kernel(f"{start}.{parts[2]}", 27, width, width)
        norm(f"{start}.{parts[3]}", width)
        if fan_in != width:
            kernel(f"{start}.downsample.0", 1, fan_in, width)
            norm(f"{start}.downsample.1", width)

    for number in range(1 if minkowski else 2):
        kernel("conv0p1s1" if minkowski else f"stem.{3 * number}", 27, stem if number else FEATURES, stem)
        norm("bn0" if minkowski else f"stem.{3 * number + 1}", stem)
    width, skips = stem, []
    between = ["conv1p1s2", "conv2p2s2", "conv3p4s2", "conv4p8s2"]
    between += ["convtr4p16s2", "convtr5p8s2", "convtr6p4s2", "convtr7p2s2"]
    norms = ["bn1", "bn2", "bn3", "bn4", "bntr4", "bntr5", "bntr6", "bntr7"]
    for stage, out in enumerate(widths):
        down = stage < 4
        inside = f"stage{stage + 1}.0.net" if down else f"up{stage - 3}.0.net"
        skips += [width] if down else []
        new = width if down else out
        kernel(between[stage] if minkowski else f"{inside}.0", 8, width, new)
        norm(norms[stage] if minkowski else f"{inside}.1", new)
        width = new + (0 if down else skips[7 - stage])
        for number in range(blocks[stage]):
            start = f"stage{stage + 1}.{number + 1}" if down else f"up{stage - 3}.1.{number}"
            block(f"block{stage + 1}.{number}" if minkowski else start, width, out)
            width = out
    if minkowski:
        kernel("final", 1, width, CLASSES)
        state["final.bias"] = rng.normal(size=(1, CLASSES))
    else:
        state["classifier.0.weight"] = rng.normal(size=(CLASSES, width))
        state["classifier.0.bias"] = rng.normal(size=CLASSES)
        state["point_transforms.0.0.weight"] = rng.normal(size=(widths[3], stem))  # SPVNAS makes them, for SPVCNN
    return {name: array.astype(np.int64 if array.ndim == 0 else np.float32) for name, array in state.items()}


@functools.cache
def points():
    """feats [1, P, F] and xyz [1, P, 3] in a few clusters; some voxels have more than one point."""
    rng = np.random.default_rng(7)
    centres = rng.uniform((1, 1, 1), (11, 9, 5), (6, 3))
    xyz = (centres[rng.integers(0, 6, 90)] + rng.normal(0, 0.7, (90, 3))).clip(0.01, (11.9, 9.9, 5.9))
    return rng.normal(size=(1, 90, FEATURES)).astype(np.float32), xyz[None].astype(np.float32)


@functools.cache
def voxels():
    coordinates = points()[1] / SIZE
    packed = PackedVoxels(coordinates, sizes_for(count_levels(np.floor(coordinates[0]))))
    make = functools.partial(minkunet.tables_of, extent=extent_of(VIEW, SIZE), num_scenes=1)
    return jax.jit(make)(packed, np.zeros(coordinates.shape[:2], np.int32))


def find(path):
    """The network in a file, and its weights."""
    return find_network(torch_file.read_weights_file(path), str(path))


def ours(network):
    fields = {key: getattr(network, key) for key in ("blocks", "widths", "stem", "stem_convolutions")}
    return minkunet.MinkUNet(**fields)


def reading(path, state, **others):
    """The sentence about a file of `state`, read and converted."""
    torch_file.write_torch_file(path, {"state_dict": state, **others})
    with pytest.raises(InputError) as raised:
        network, weights = find(path)
        convert(weights, network, str(path))
    assert str(raised.value).startswith(str(path))
    return str(raised.value)


# ----------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_elements_are_those_of_the_same_offset(layout):
    """One layer each: 3x3x3, 2x2x2 with stride, and its transpose."""
    rng = np.random.default_rng(0)
    ijk = np.unique(rng.integers(0, (6, 5, 4), (40, 3)), axis=0)  # sorted by x, y, z, as a table's rows
    number = len(ijk)
    make = jax.jit(
        functools.partial(
            sparse_conv.make_levels, sizes=sizes_for(count_levels(ijk, 2)), num_scenes=1, extent=(6, 5, 4)
        )
    )
    level, following = make(ijk.astype(np.int32), np.zeros(number, np.int32)).levels
    x = rng.normal(size=(number, 3)).astype(np.float32)
    scene = {tuple(voxel): row.astype(np.float64) for voxel, row in zip(ijk.tolist(), x, strict=True)}

    def rows(result):
        return np.stack([result[voxel] for voxel in sorted(result)])

    near, down, up = (rng.normal(size=(elements, 3, 3)).astype(np.float32) for elements in (27, 8, 8))
    found = sparse_conv.submanifold(jnp.asarray(x), level, jnp.asarray(near[element_order(layout, 27)]))
    np.testing.assert_allclose(np.asarray(found), rows(convolve(layout, near, scene)), rtol=1e-5, atol=1e-5)
    coarse = convolve(layout, down, scene, 2)
    found = sparse_conv.convolve(jnp.asarray(x), level.down, jnp.asarray(down[element_order(layout, 8)]))
    assert following.number == len(coarse)
    np.testing.assert_allclose(np.asarray(found), rows(coarse), rtol=1e-5, atol=1e-5)
    x, kernel = jnp.asarray(rows(coarse), jnp.float32), jnp.asarray(up[element_order(layout, 8)])
    back = sparse_conv.convolve(x, sparse_conv.exchange(level.down), kernel)
    np.testing.assert_allclose(np.asarray(back), rows(transpose(layout, up, coarse, scene)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_gives_the_published_network(layout, tmp_path):
    """Names and shapes are those of our own parameters, and the outputs those of the interpreter."""
    state = state_dict(layout)
    torch_file.write_torch_file(tmp_path / "net.pt", {"model": {f"module.{name}": x for name, x in state.items()}})
    network, weights = find(tmp_path / "net.pt")
    assert network._asdict() == {
        "layout": layout,
        "name": "",
        "blocks": BLOCKS,
        "widths": WIDTHS,
        "stem": STEM,
        "stem_convolutions": 1 + LAYOUTS.index(layout),
        "num_features": FEATURES,
        "features": ("x", "y", "z") if layout == "torchsparse" else (),
        "head": "linear",
        "out_features": CLASSES,
        "unused": ("point_transforms.0.0.weight",) if layout == "torchsparse" else (),
    }
    variables = convert(weights, network, "net.pt")
    backbone = {kind: tree["backbone"] for kind, tree in variables.items()}
    model, (feats, xyz) = ours(network), points()
    wanted = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), feats, voxels())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), backbone) == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)

    program = jax.jit(functools.partial(model.apply, train=False))
    rows = program(backbone, feats, voxels())
    head = variables["params"]["head"]
    found = np.asarray(rows) @ head["kernel"] + head["bias"]
    cells = [tuple(voxel) for voxel in np.floor(xyz[0] / SIZE).astype(int).tolist()]
    scene = {
        cell: np.mean([row for row, other in zip(feats[0], cells, strict=True) if other == cell], axis=0, dtype=float)
        for cell in cells
    }
    assert len(scene) < len(cells)
    result = getattr(Interpreter(layout, state), layout)(scene)
    expected = np.stack([result[cell] for cell in cells])
    assert expected.std(axis=0).min() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_slidrs_pretraining_is_a_distilled_student(tmp_path):
    """Its file holds the image model too; a layer of 1x1x1 may keep the axis of its one element."""
    state = state_dict("minkowski")
    state["final.kernel"] = state["final.kernel"][None]
    content = {"model_points": state, "model_images": {"conv.weight": np.ones((2, 2), np.float32)}, "epoch": 50}
    torch_file.write_torch_file(tmp_path / "model.pt", content)
    network, weights = find(tmp_path / "model.pt")
    assert (network.head, network.out_features) == ("distill", CLASSES)
    head = convert(weights, network, "model.pt")["params"]["head"]["out"]
    np.testing.assert_array_equal(head["kernel"], state["final.kernel"][0])
    np.testing.assert_array_equal(head["bias"], state["final.bias"][0])
    assert "head" not in convert(weights, network._replace(head="none"), "model.pt")["params"]


def test_prefixes_and_other_models_in_a_safetensors(tmp_path):
    """As Lightning writes them; and OpenPCSeg's classifier reads three levels, which is none of our heads."""
    state = state_dict("torchsparse")
    state["classifier.0.weight"] = np.zeros((CLASSES, WIDTHS[3] + WIDTHS[5] + WIDTHS[7]), np.float32)
    content = {f"model_points.{name}": array for name, array in state.items()} | {"image.weight": np.ones(2)}
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    network, weights = find(tmp_path / "model.safetensors")
    assert network.head == "none"
    assert network.unused == (
        "classifier.0.bias",
        "classifier.0.weight",
        "image.weight",
        "point_transforms.0.0.weight",
    )
    assert convert(weights, network, "model.safetensors").keys() == {"params", "batch_stats"}


def test_published_sizes_are_recognised(tmp_path):
    """Sizes of MinkUNet-34, which a file of no width to speak of shows as well; and SLidR's one feature."""
    blocks = minkunet.BLOCKS["minkunet34"]
    state = {"conv0p1s1.kernel": np.zeros((27, 1, 1), np.float32)}
    state |= {f"block{k + 1}.{n}.conv1.kernel": state["conv0p1s1.kernel"] for k in range(8) for n in range(blocks[k])}
    torch_file.write_torch_file(tmp_path / "net.pt", state)
    network, _ = find(tmp_path / "net.pt")
    assert (network.name, network.blocks, network.head) == ("minkunet34", blocks, "none")
    assert network.features == ("intensity",)


def test_a_published_file_is_a_student(tmp_path):
    """By scalr_jax.load with its raw intensities, and as the start of a probe; another width is refused."""
    stem, *widths = minkunet.scaled_widths(0.1)
    state = state_dict("torchsparse", stem, tuple(widths), minkunet.BLOCKS["minkunet14"])
    torch_file.write_torch_file(tmp_path / "net.pt", {"model": state})
    model = scalr_jax.load(tmp_path / "net.pt")
    config = model.config
    assert (config.name, config.minkunet.width, config.minkunet.voxel_size) == ("minkunet14", 0.1, 0.05)
    assert (config.minkunet.stem_convolutions, config.intensity, config.head) == (2, (0.0, 1.0), "linear")
    assert model.class_names == tuple(f"class {k}" for k in range(CLASSES))
    predict.parse(["predict", "--model=net.pt", "--input=scans"])
    written = predict.settings_of(model, "features")  # other voxels of the same weights are other features
    assert (written["name"], written["minkunet"]["voxel_size"], written["minkunet"]["reading"]) == (
        "minkunet14",
        0.05,
        "nearest",
    )
    config = get_config()
    config.model.name, config.checkpoint = "minkunet14", str(tmp_path / "net.pt")
    config.model.minkunet.update(width=0.1, stem_convolutions=2)
    with pytest.raises(
        InputError,
        match=mentions("minkunet.voxel_size", "intensity", (0.0, 1.0), "; voxel_size", 0.05, 0.1),
    ):
        tasks.load_backbone(read_settings(config))  # it would be run on other inputs than load() gives it
    config.model.minkunet.voxel_size = config.data.voxel_size = model.config.voxel_size
    config.data.intensity = model.config.intensity
    jax.tree.map(
        np.testing.assert_array_equal,
        tasks.load_backbone(read_settings(config)).variables,
        jax.device_get(model.variables),
    )
    config.model.minkunet.update(width=0.2, stem_convolutions=1)
    with pytest.raises(InputError, match=mentions("minkunet.width", 0.1, 0.2, "minkunet.stem_convolutions", 2)):
        tasks.load_backbone(read_settings(config))
    torch_file.write_torch_file(tmp_path / "odd.pt", {"model": state_dict("torchsparse")})
    with pytest.raises(InputError, match=mentions("odd.pt", "4, 4, 6, ", "1, 2, 1, ")):
        scalr_jax.load(tmp_path / "odd.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stem_takes_our_features(layout):
    """SLidR's intensity, SPVNAS's coordinates and intensity, found among our five."""
    rng = np.random.default_rng(2)
    xyz, intensity = rng.normal(size=(10, 3)).astype(np.float32), rng.uniform(0, 1, 10).astype(np.float32)
    theirs = intensity[:, None] if layout == "minkowski" else np.concatenate([xyz, intensity[:, None]], axis=1)
    names = ("intensity",) if layout == "minkowski" else ("x", "y", "z", "intensity")
    kernel = rng.normal(size=(27, theirs.shape[1], STEM)).astype(np.float32)
    variables = {"params": {"backbone": {"stem": {"kernel": kernel}, "rest": 1}}, "batch_stats": {}}
    network = Network(layout, "", (), (), STEM, 1, len(names), names, "none", 0, ())
    wide = with_our_features(variables, network, "net.pt")["params"]["backbone"]
    feats = make_features(xyz, intensity, (0.0, 1.0))
    np.testing.assert_allclose(feats @ wide["stem"]["kernel"], theirs @ kernel, rtol=1e-5, atol=1e-5)
    assert wide["rest"] == 1
    with pytest.raises(InputError, match=mentions("net.pt", 6)):
        with_our_features(variables, network._replace(features=(), num_features=6), "net.pt")


@pytest.mark.parametrize(
    ("layout", "missing", "narrow", "transposed"),
    [
        ("minkowski", "block2.1.norm1.bn.running_var", "convtr4p16s2.kernel", "final.bias"),
        ("torchsparse", "stage2.2.net.1.running_var", "up1.0.net.0.kernel", "up1.1.0.downsample.0.kernel"),
    ],
)
def test_all_that_differs_is_listed(layout, missing, narrow, transposed, tmp_path):
    state = state_dict(layout)
    del state[missing]
    state[narrow], state[transposed] = state[narrow][:-1], state[transposed].T
    state["extra.kernel"] = np.zeros((8, 2, 2), np.float32)
    message = reading(tmp_path / "net.pth", state)
    for part in ((missing, (6,)), (narrow, (7, 8, 8), (8, 8, 8)), (transposed,), ("extra.kernel", (8, 2, 2))):
        assert re.search(mentions(*part), message)
    assert message.count(";") == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_not_finite_are_refused(layout):
    state = state_dict(layout)
    name = next(name for name in state if name.endswith("kernel"))
    state[name][0, 0, 0] = np.inf
    network, weights = find_network(state, "x.pth")
    with pytest.raises(InputError, match=mentions("x.pth", name, 1)):
        convert(weights, network, "x.pth")


def test_other_models_are_refused(tmp_path):
    state, path = state_dict("minkowski"), tmp_path / "net.pth"
    assert "5x5x5" in reading(path, state | {"conv0p1s1.kernel": np.zeros((125, 3, 4), np.float32)})
    bottleneck = {"block1.0.conv1.kernel": np.zeros((4, 4), np.float32)}
    assert "bottleneck" in reading(path, state | bottleneck)
    waffleiron = {"embed.conv1.weight": np.zeros((8, 5, 1), np.float32), "waffleiron.spatial_mix.0.a": np.zeros(3)}
    assert "no MinkUNet" in reading(path, waffleiron)
    assert "no MinkUNet" in reading(path, {})
    twice = state | {f"ema.{name}": array for name, array in state.items()}
    assert "2 weights" in reading(path, twice)
    unknown = {f"backbone.{name.replace('conv0p1s1', 'conv_input.0.0')}": array for name, array in state.items()}
    for content in (unknown, {"state_dict": unknown}):  # MMDetection3D names them like this
        torch_file.write_torch_file(path, content)
        with pytest.raises(InputError, match=mentions("net.pth", "MinkUNet", "names")):
            scalr_jax.load(path, sensor="nuscenes")
    del state["block6.0.conv1.kernel"]
    assert "block6.0.conv1.kernel" in reading(path, state)
    flat = state_dict("minkowski") | {"conv0p1s1.kernel": np.zeros(3, np.float32)}
    assert "conv0p1s1.kernel" in reading(path, flat)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=mentions("net.pth", "checkpoint")):
        find(path)
