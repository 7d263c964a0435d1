"""A published VaViT loaded, run on raw points, and exported: every form has the published outputs."""

import json

import jax
import jax.export
import numpy as np
import pytest

import scalr_jax
from scalr_jax.export import onnx as export_onnx
from scalr_jax.export import run as export
from scalr_jax.export.inputs import make_inputs, pad_inputs
from scalr_jax.interop.model import empty_batch, student_of
from scalr_jax.interop.published import read_published, write_published
from scalr_jax.interop.torch_file import write_torch_file
from scalr_jax.runtime.errors import InputError
from tests.support.paths import GOLDEN


@pytest.fixture(scope="module")
def published():
    with np.load(GOLDEN / "student_vavit.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(published, tmp_path_factory):
    """The published file, as it is written by several processes."""
    path = tmp_path_factory.mktemp("vavit") / "ckpt_last.pth"
    weights = {name.removeprefix("param/"): x for name, x in published.items() if name.startswith("param/")}
    write_torch_file(path, {"net": {f"module.{name}": x for name, x in weights.items()}})
    return scalr_jax.load(path, sensor="nuscenes")


def with_head(model, head, out_features, **changes):
    """The same backbone under another head, of random weights."""
    settings = {**model.config.to_dict(), "head": head, "out_features": out_features, "class_names": (), **changes}
    student, rng = student_of(settings), np.random.default_rng(0)
    batch = empty_batch(5, student.needs)
    shapes = jax.eval_shape(lambda batch: student.init(jax.random.key(0), batch, train=False), batch)
    variables = {kind: dict(tree) for kind, tree in model.variables.items()}
    for kind, tree in shapes.items():
        draw = lambda x: rng.uniform(0.2, 1, x.shape).astype(np.float32)  # noqa: E731
        variables[kind] |= {"head": jax.tree.map(draw, tree["head"])} if "head" in tree else {}
    return scalr_jax.Model(type(model.config)(settings), variables)


def column(number):
    """Points [N, 4] above each other, in one pillar."""
    rng = np.random.default_rng(1)
    return np.concatenate([rng.uniform((2, 2, -3), (2.5, 2.5, 9), (number, 3)), rng.uniform(size=(number, 1))], axis=1)


def test_a_raw_scan_has_the_published_classes(model, published):
    """The published voxels, features, neighbours, pillars and network: intensities stay raw, whatever the sensor."""
    logits = published["scene/out_eval"][published["scene/upsample"]]
    np.testing.assert_array_equal(model.segment(published["scene/raw"]), logits.argmax(-1))


def outputs_of(folder, points):
    """Outputs of a program, a row for every point."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    inputs, nearest = make_inputs(points, settings)
    if settings["format"] == "onnx":
        session = export_onnx.open_session(folder / "model.onnx")
        rows = dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))
    else:
        program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
        rows = jax.jit(program.call)(dict(np.load(folder / "weights.npz")), pad_inputs(inputs, settings))
    return {name: np.asarray(row)[nearest] for name, row in rows.items()}


def assert_close(found, expected, scale):
    assert np.abs(expected).max() > 0.1 * scale
    assert np.abs(found - expected).max() < 1e-5 * scale


@pytest.mark.parametrize("form", ["onnx", pytest.param("stablehlo", marks=pytest.mark.slow)])
def test_a_program_has_the_published_outputs(model, published, tmp_path, form):
    """Also of a scan in one pillar, whose maximum is of more points than a tree's level takes."""
    assert export.export_model(model, form, tmp_path / "program") < 1e-5
    logits, scan = published["scene/out_eval"], published["scene/raw"]
    scale = np.abs(logits).max()
    assert_close(outputs_of(tmp_path / "program", scan)["logits"], logits[published["scene/upsample"]], scale)
    features = model.embed(column(1_000))
    assert_close(outputs_of(tmp_path / "program", column(1_000))["features"], features, np.abs(features).max())


def test_an_onnx_graph_names_its_nodes_and_says_what_it_cannot_hold(model, monkeypatch):
    settings, variables = model.config.to_dict(), jax.device_get(model.variables)
    nodes = export_onnx.build_model(model.student, variables, settings).graph.node
    assert len({node.name for node in nodes}) == len(nodes)
    monkeypatch.setattr(export_onnx, "LARGEST_FILE", export_onnx.NODES + 1000)
    with pytest.raises(InputError, match="stablehlo"):
        export_onnx.build_model(model.student, variables, settings)


HEADS = [("linear", 0), ("distill", 0), ("distill", 12), ("segment", 0), ("mlp", 0)]


@pytest.mark.parametrize(("head", "hidden"), HEADS)
def test_every_head_comes_back_from_a_published_layout(model, tmp_path, head, hidden):
    """The published head takes raw intensities; others are this package's, and a file does not say their sensor."""
    of_head = with_head(model, head, 7, head_hidden=hidden)
    write_published(tmp_path / "x.pth", of_head.student, jax.device_get(of_head.variables))
    found = read_published(tmp_path / "x.pth")
    assert student_of({**of_head.config.to_dict(), **found.model}) == of_head.student
    assert (dict(found.data), found.unsaid) == (
        ({"intensity": (0.0, 1.0)}, ()) if head == "linear" else ({}, ("intensity",))
    )
    jax.tree.map(np.testing.assert_array_equal, found.variables, jax.device_get(of_head.variables))


def test_an_exported_folder_has_its_settings(model, tmp_path):
    of_head = with_head(model, "distill", 7, head_hidden=0, intensity=(9.0, 5.0), voxel_size=0.2)
    assert export.export_model(of_head, "safetensors", tmp_path / "a") == 0
    again = scalr_jax.load(tmp_path / "a")
    assert again.student == of_head.student
    assert (again.config.intensity, again.config.voxel_size) == ((9.0, 5.0), 0.2)
