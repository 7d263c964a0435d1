"""MinkUNets exported: tables made with NumPy are the convolutions', and a program has the student's outputs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

import scalr_jax
from scalr_jax.api import _checked
from scalr_jax.config import get_config
from scalr_jax.export import run as export
from scalr_jax.export.inputs import make_inputs, pad_inputs
from scalr_jax.export.voxel_tables import BLOCK, voxel_tables
from scalr_jax.interop.model import abstract_variables, student_of
from scalr_jax.ops.voxels import NEIGHBORS
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("few_blocks")

VIEW = ((-16.0, -16.0, -4.0), (16.0, 16.0, 4.0))


def make_model(head="distill", out_features=6, **minkunet):
    """A minkunet14 of 3 to 25 channels a stage, whose weights have both signs."""
    model = get_config().model.to_dict()
    model["minkunet"] |= {"width": 0.1, "voxel_size": 0.2, **minkunet}
    model |= {"name": "minkunet14", "head": head, "head_hidden": 0, "out_features": out_features, "num_features": 5}
    model |= {"intensity": (10.0, 5.0), "field_of_view": VIEW, "voxel_size": 0.1}
    shapes = abstract_variables(student_of(model), 5)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("variance", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.3
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return scalr_jax.Model(_checked(model), jax.tree_util.tree_map_with_path(draw, shapes))


def scan(number, seed=1):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-15, 15, (number, 3))
    xyz[:, 2] = np.sin(xyz[:, 0]) + rng.exponential(0.5, number) * (xyz[:, 1] > 3)
    return np.concatenate([xyz, rng.uniform(0, 20, (number, 1))], axis=1).astype(np.float32)


def test_the_tables_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    extent, coordinates = (20, 13, 9), rng.uniform(-2, 14, (700, 3))  # some outside
    tables = voxel_tables(coordinates, extent)
    ijk = np.clip(np.floor(coordinates).astype(int), 0, np.array(extent) - 1)
    voxels = sorted(set(map(tuple, ijk)))
    np.testing.assert_array_equal(np.array(voxels)[tables["cell"]], ijk)
    np.testing.assert_allclose(1 / tables["inverse_count"], [(ijk == v).all(axis=1).sum() for v in voxels], rtol=1e-6)
    assert (np.diff(tables["cell"][tables["order"]]) >= 0).all()
    for level in range(5):
        rows = {v: n for n, v in enumerate(voxels)}
        assert tables["number"][level] == len(rows)
        source, slots = tables[f"near_source_{level}"], tables[f"near_slots_{level}"]
        steps = [step for step in NEIGHBORS if step != (0, 0, 0)]
        for n, voxel in enumerate(voxels):
            for t, step in enumerate(steps):
                expected = rows.get(tuple(np.add(voxel, step)), -1)
                slot = slots[n, t]
                assert (source[slot] if slot >= 0 else -1) == expected
                assert slot < 0 or tables[f"near_element_{level}"][slot // BLOCK] == t
        if level == 4:
            break
        parents = sorted({tuple(np.array(v) // 2) for v in voxels})
        down, up = tables[f"down_slots_{level}"], tables[f"up_slots_{level}"][:, 0]
        assert (down >= 0).sum() == len(voxels) == len(up)
        for n, voxel in enumerate(voxels):
            octant = int(np.array(voxel) % 2 @ (4, 2, 1))
            parent = parents.index(tuple(np.array(voxel) // 2))
            assert down[parent, octant] == up[n]
            assert tables[f"down_source_{level}"][up[n]] == n
            assert tables[f"up_source_{level}"][up[n]] == parent
            assert tables[f"down_element_{level}"][up[n] // BLOCK] == octant
        voxels = parents


def outputs_of(folder, points):
    """By its features and its head, spread over all points as `Model` does."""
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    settings = json.loads((folder / "config.json").read_text())["settings"]
    inputs, nearest = make_inputs(points, settings)
    weights = dict(np.load(folder / "weights.npz"))
    found = jax.jit(program.call)(weights, pad_inputs(inputs, settings))
    return {name: np.asarray(rows)[nearest] for name, rows in found.items()}


def assert_close(found, expected):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=export.LARGEST_DIFFERENCE * np.abs(expected).max())


@pytest.mark.slow
def test_a_program_has_the_students_outputs_and_a_card_whose_code_runs(tmp_path):
    """On a scan of another size than the one that it is checked on."""
    model = make_model()
    assert export.export_model(model, "stablehlo", tmp_path / "program") <= export.LARGEST_DIFFERENCE
    assert_close(outputs_of(tmp_path / "program", scan(6_000))["distilled"], model.distilled(scan(6_000)))
    (code, more, *_) = (tmp_path / "program" / "README.md").read_text().split("```python\n")[1:]
    code, more = code.split("```")[0], more.split("```")[0]
    np.save(tmp_path / "points.npy", scan(300))
    check = "outputs = jax.jit(program.call)(weights, pad_inputs(inputs, settings))\nprint(outputs['features'].shape)\n"
    script = tmp_path / "program" / "as_printed.py"
    script.write_text(f"{code}\npoints = np.load('../points.npy')\n{more}\n{check}")
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "(4096, 9)" in result.stdout


@pytest.mark.slow
def test_a_program_that_reads_by_distance(tmp_path):
    """Also of a scan of one point."""
    model = make_model("segment", reading="trilinear", stem_convolutions=2)
    export.export_model(model, "stablehlo", tmp_path / "program")
    for points in (scan(1), scan(700)):
        found = outputs_of(tmp_path / "program", points)
        assert_close(found["features"], model.embed(points))
    np.testing.assert_array_equal(found["logits"].argmax(-1), model.segment(points))


@pytest.mark.slow
def test_an_orbax_export_is_loaded_again(tmp_path):
    model = make_model("segment")
    export.export_model(model, "orbax", tmp_path / "weights")
    again = scalr_jax.load(tmp_path / "weights")
    np.testing.assert_array_equal(again.embed(scan(500)), model.embed(scan(500)))
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "minkunet14, width 0.1, voxels of 0.2 metres, read by nearest" in card
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    config["settings"]["minkunet"]["width"] = 0.2
    (tmp_path / "weights" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=mentions("weights", "backbone/")):
        scalr_jax.load(tmp_path / "weights")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "folded"), [("onnx", False), ("torch", False), ("safetensors", False), ("orbax", True)]
)
def test_other_exports_are_refused(tmp_path, form, folded):
    with pytest.raises(InputError, match=mentions("minkunet14", "stablehlo", "orbax")):
        export.export_model(make_model(), form, tmp_path / "x", folded=folded)
    assert not Path(tmp_path / "x").exists()
