"""Exports: what is loaded gives the original's outputs, folding changes none, and nothing half-written stays."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scalr_jax
from scalr_jax.data.streets.layout import CLASSES
from scalr_jax.export import run as export
from scalr_jax.export.fold import fold
from scalr_jax.export.inputs import LEVELS, make_inputs, pad_inputs, sum_tree
from scalr_jax.interop import published as interop
from scalr_jax.interop.exported import READABLE
from scalr_jax.runtime.errors import InputError
from tests.support.checks import assert_one_sentence, mentions, present
from tests.support.tiny_student import tiny_model, write_workdir

SETTINGS = {
    "intensity": (10.0, 5.0),
    "field_of_view": ((-16.0, -16.0, -4.0), (16.0, 16.0, 4.0)),
    "grids": ((16, 16), (16, 8), (16, 8)),
    "voxel_size": 0.1,
}
STUDENTS = {  # every norm, activation and head; four layers are a group of three and a rest
    "distilled": ("distill", 6, {"head_hidden": 12, "norm": "layer", "activation": "gelu", "depth": 4}),
    "probed": ("segment", 7, {"norm": "layer", "activation": "relu", "depth": 3}),
    "mlp_probed": ("mlp", 5, {"depth": 3}),
    "waffleiron": ("linear", 5, {"norm": "batch", "activation": "relu", "depth": 4}),
}
ROUND_TRIPS = [
    ("torch", "waffleiron", True),
    ("torch", "mlp_probed", False),
    ("onnx", "mlp_probed", True),
    ("safetensors", "probed", False),
    ("stablehlo", "probed", False),
    ("stablehlo", "waffleiron", True),
    ("onnx", "distilled", False),
    ("onnx", "probed", True),
    ("onnx", "waffleiron", False),
    ("onnx", "waffleiron", True),
]


def make_model(name, seed=0):
    """A `Model` whose weights have both signs, and norms that are no identities."""
    head, out_features, changes = STUDENTS[name]
    config, variables = tiny_model(head, out_features, **changes)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        positive = path[-1].key in ("variance", "scale")
        return (rng.uniform(0.5, 1.5, leaf.shape) if positive else 0.4 * rng.normal(size=leaf.shape)).astype(np.float32)

    config.update(SETTINGS)
    return scalr_jax.Model(config, jax.tree_util.tree_map_with_path(draw, variables))


@pytest.fixture(scope="module")
def models():
    return {name: make_model(name) for name in STUDENTS}


def scan(num_points=900, seed=3):
    """[N, 4]: ground, walls, some points outside the field of view and one without a place."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform((-18, -18, -2), (18, 18, -1.5), (num_points, 3))
    xyz[: num_points // 4, 0] = 5.0
    xyz[: num_points // 4, 2] = rng.uniform(-2, 3, num_points // 4)
    xyz[7, 1] = np.nan
    return np.concatenate([xyz, rng.uniform(0, 20, (num_points, 1))], axis=1).astype(np.float32)


def expected(model, points):
    """Outputs of the original by name, a row for every point."""
    outputs = {"features": model.embed(points)}
    if model.config.head == "distill":
        outputs["distilled"] = model.distilled(points)
    else:
        outputs["classes"] = model.segment(points)
    return outputs


def served(folder, points):
    """The same by the exported folder, as its README says it."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    if settings["format"] in READABLE:
        return expected(scalr_jax.load(folder), points)
    inputs, nearest = make_inputs(points, settings)
    if settings["format"] == "onnx":
        from scalr_jax.export.onnx import open_session

        session = open_session(folder / "model.onnx")
        rows = dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))
    else:
        program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        rows = jax.jit(program.call)(dict(np.load(folder / "weights.npz")), pad_inputs(inputs, settings))
    outputs = {name: np.where(nearest[:, None] >= 0, np.asarray(row)[nearest], 0.0) for name, row in rows.items()}
    if "logits" in outputs:
        logits = outputs.pop("logits")
        outputs["classes"] = np.where(nearest >= 0, logits.argmax(-1), 255)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name", "folded"), ROUND_TRIPS)
def test_what_is_loaded_gives_the_same_outputs(models, tmp_path, form, name, folded):
    """On other scans than the one by which the export checked itself, and of two sizes."""
    model, output = models[name], tmp_path / "exports" / "one"
    assert export.export_model(model, form, output, folded=folded) < 1e-5
    for points in (scan(), scan(300, seed=4)):
        wanted, found = expected(model, points), served(output, points)
        assert found.keys() == wanted.keys()
        for kind, rows in wanted.items():
            assert np.abs(rows).max() > 0.5, "outputs that are nothing would agree with anything"
            if kind == "classes":
                np.testing.assert_array_equal(found[kind], rows)
            else:
                np.testing.assert_allclose(found[kind], rows, rtol=1e-4, atol=1e-4)
    assert [path.name for path in output.parent.iterdir()] == ["one"], "no temporary folder stays"


@pytest.mark.parametrize(("form", "name"), [("torch", "distilled"), ("safetensors", "waffleiron"), ("orbax", "probed")])
def test_weights_come_back_as_they_were(models, tmp_path, form, name):
    original = jax.device_get(models[name].variables)
    for folded, wanted in ((False, original), (True, fold(original))):
        export.export_model(models[name], form, tmp_path / str(folded), folded=folded)
        jax.tree.map(np.testing.assert_array_equal, scalr_jax.load(tmp_path / str(folded)).variables, wanted)


@pytest.mark.parametrize("form", READABLE)
def test_an_exported_folder_has_all_settings(models, tmp_path, form):
    """They are the original's, but for the form of spatial mixing, and a folder can be exported again."""
    model, output = models["probed"], tmp_path / "one"
    model.config.class_names = [f"kind {k}" for k in range(7)]
    export.export_model(model, form, output)
    loaded = scalr_jax.load(output).config.to_dict()
    wanted = {**model.config.to_dict(), "implementation": "cells", "format": form}
    assert json.dumps(loaded, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    assert scalr_jax.load(output, sensor="nuscenes", grids=((8, 8),) * 3).config.grids == ((8, 8),) * 3
    assert scalr_jax.load(output, sensor="nuscenes").config.intensity != SETTINGS["intensity"]
    assert "kind 6" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["waffleiron", *(pytest.param(n, marks=pytest.mark.slow) for n in ("distilled", "probed", "mlp_probed"))]
)
def test_folding_changes_no_output(models, name):
    model = models[name]
    original = jax.device_get(model.variables)
    folded = fold(original)
    wanted = expected(model, scan())
    same_programs = copy.copy(model)
    same_programs.variables = folded
    found = expected(same_programs, scan())
    assert np.abs(found["features"] - wanted["features"]).max() < 1e-6 * np.abs(wanted["features"]).max()
    layer = folded["params"]["backbone"]["groups"]["plane_1"]
    for ones in (layer["spatial"]["scale"], layer["channel"]["scale"], folded["params"]["embedding"]["norm"]["scale"]):
        assert (ones == 1).all()
    assert not np.array_equal(layer["channel"]["linear_1"]["kernel"], _layer(original)["channel"]["linear_1"]["kernel"])
    if name == "waffleiron":
        stats = folded["batch_stats"]["backbone"]["groups"]["plane_1"]["spatial"]["norm"]["batch"]
        assert (stats["mean"] == 0).all()
    jax.tree.map(np.testing.assert_array_equal, fold(folded), folded)


def _layer(variables):
    return variables["params"]["backbone"]["groups"]["plane_1"]


def test_a_folded_graph_has_no_norms_left(models):
    from scalr_jax.export.onnx import build_model

    model = models["waffleiron"]
    settings, variables = model.config.to_dict(), jax.device_get(model.variables)
    names = [
        {constant.name for constant in build_model(model.student, v, settings).graph.initializer}
        for v in (variables, fold(variables))
    ]
    gone = {f"layer_{d}/{part}" for d in range(4) for part in ("channel/scale", "spatial/scale")}
    gone |= {f"layer_{d}/channel/norm/{part}" for d in range(4) for part in ("multiplier", "shift")}
    assert gone | {"embedding/norm/multiplier", "embedding/norm/shift"} == names[0] - names[1]


@pytest.mark.parametrize("name", STUDENTS)
def test_nodes_have_names_of_their_own(models, name):
    """onnxruntime before 1.22 does not load a file whose nodes have none."""
    from scalr_jax.export.onnx import build_model

    model = models[name]
    nodes = build_model(model.student, jax.device_get(model.variables), model.config.to_dict()).graph.node
    assert all(node.name for node in nodes)
    assert len({node.name for node in nodes}) == len(nodes)


def test_a_runtime_that_cannot_load_the_file_is_one_sentence(workdir, tmp_path, capsys, monkeypatch):
    from scalr_jax.export import onnx as export_onnx

    monkeypatch.setattr(export_onnx.Graph, "add", unknown_operators(export_onnx.Graph.add))
    monkeypatch.setattr("onnx.checker.check_model", lambda _: None)
    match = f"onnxruntime {export_onnx.onnxruntime.__version__} cannot load"
    fails(capsys, match, f"--model={workdir}", "--format=onnx", f"--output={tmp_path / 'a'}")
    assert list(tmp_path.iterdir()) == []


def unknown_operators(add):
    return lambda graph, operator, *inputs, **kinds: add(graph, f"{operator}Of2099", *inputs, **kinds)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_the_stablehlo_program_compiles_for_a_tpu(models, tmp_path, topology):
    pytest.importorskip("libtpu", reason="needs the tpu extra: pip install 'scalr_jax[tpu]'")
    from scalr_jax.runtime.chips import devices_of

    export.export_model(models["waffleiron"], "stablehlo", tmp_path / "a")
    program = jax.export.deserialize(bytearray((tmp_path / "a" / "model.stablehlo").read_bytes()))
    weights, example = (dict(np.load(tmp_path / "a" / name)) for name in ("weights.npz", "example.npz"))
    inputs = {name: array for name, array in example.items() if not name.startswith("output/")}
    place = jax.sharding.SingleDeviceSharding(devices_of(topology)[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (weights, inputs))
    compiled = jax.jit(program.call).lower(*shapes).compile()
    assert "T(8,128)" in present(compiled.as_text()), "tiles are a TPU's"
    assert {name: rows.shape for name, rows in compiled.out_info.items()} == {
        "features": (len(inputs["feats"]), 8),
        "logits": (len(inputs["feats"]), 5),
    }


@given(st.lists(st.one_of(st.integers(1, 20), st.integers(1, 5_000)), min_size=1, max_size=30), st.integers(0, 9))
def test_the_tree_of_sums_adds_up_every_cell(counts, seed):
    rng = np.random.default_rng(seed)
    count = np.array(counts)
    values = rng.integers(-9, 9, count.sum())
    order = rng.permutation(len(values))
    sums, levels, roots = sum_tree(order, count)
    assert len(levels) == LEVELS + 1
    below, rows = values, []
    for level in range(LEVELS):
        below = np.append(below, 0)[sums[levels[level] : levels[level + 1]]].sum(axis=1)
        rows.append(below)
    starts = np.cumsum(count) - count
    np.testing.assert_array_equal(np.concatenate(rows)[roots], np.add.reduceat(values[order], starts))


# ------------------------------------------------------------------------------------------------------ the model card


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with results, whose field of view and start are no defaults."""
    path = tmp_path_factory.mktemp("export") / "run"
    write_workdir(path, "probe", "segment", 12, dataset="streets", sensors=("solid",), class_names=CLASSES)
    view = {key: SETTINGS[key] for key in ("field_of_view", "grids")}
    config, settings = (json.loads((path / name).read_text()) for name in ("config.json", "settings.json"))
    config["model"] |= view
    (path / "config.json").write_text(json.dumps({**config, "checkpoint": "/some/where/pretrain"}))
    (path / "settings.json").write_text(json.dumps({**settings, **view}))
    (path / "results.json").write_text(json.dumps({"miou": 0.4321}))
    return path


def run(*arguments):
    export.main(["export", "--cache=none", *map(str, arguments)])


def test_the_card_of_a_run(workdir, tmp_path, capsys):
    run(f"--model={workdir}", "--format=safetensors", f"--output={tmp_path / 'a'}")
    out = capsys.readouterr().out
    assert re.search(r"largest difference to the original: 0 ", out)
    card, config = (tmp_path / "a" / "README.md").read_text(), json.loads((tmp_path / "a" / "config.json").read_text())
    for text in ("probe on streets (solid)", "0.4321", "x -16 to 16", "xy 16 x 16", "Apache-2.0", "1 layers, 8 wide"):
        assert text in card, text
    assert config["training"]["data"]["sensors"] == ["solid"]
    assert config["training"]["checkpoint"] == "pretrain", "paths of this machine do not travel"
    assert config["results"] == {"miou": 0.4321}
    assert config["check"]["points"] > 500
    run(f"--model={tmp_path / 'a'}", "--format=torch", f"--output={tmp_path / 'b'}", "--licence=CC BY 4.0")
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (again["training"], again["results"]) == (config["training"], config["results"])
    assert "| licence of the weights | CC BY 4.0 |" in (tmp_path / "b" / "README.md").read_text()


def test_a_published_file_names_no_licence_that_it_does_not_know(tmp_path):
    interop.save_torch_checkpoint(tmp_path / "x.pth", *tiny_model("distill", 6))
    run(f"--model={tmp_path / 'x.pth'}", "--sensor=nuscenes", "--format=orbax", f"--output={tmp_path / 'a'}")
    assert "| licence of the weights | not stated; weights as" in (tmp_path / "a" / "README.md").read_text()
    assert "mean 18.7" in (tmp_path / "a" / "README.md").read_text()


def run_elsewhere(folder, *arguments, banned=(), check="", cwd="/"):
    """Runs run.py of an exported folder in a process of another folder, where imports of `banned` fail."""
    code = "import runpy, sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in banned)
    code += f"sys.argv = ['run.py', *{list(map(str, arguments))}]\n"
    code += f"globals().update(runpy.run_path({str(folder / 'run.py')!r}))\n{check}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "banned"), [("stablehlo", ("scalr_jax", "flax", "onnx")), ("onnx", ("scalr_jax", "jax"))]
)
def test_a_program_runs_from_any_folder_without_this_package(models, tmp_path, form, banned):
    """In a process where its imports fail; the outputs are those of the example that lies beside the program."""
    export.export_model(models["distilled"], form, tmp_path / "exported")
    check = (
        'for name in ("features", "distilled"):\n'
        "    row = outputs[name]\n"
        '    wanted = example["output/" + name]\n'
        "    assert np.abs(wanted).max() > 0.5\n"
        "    np.testing.assert_allclose(np.asarray(row)[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)\n"
    )
    run_elsewhere(tmp_path / "exported", banned=banned, check=check)
    assert (tmp_path / "exported" / "run.py").read_text() in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["distilled", "waffleiron"])
def test_weights_for_pytorch_bring_their_network(models, tmp_path, name):
    """In at most 70 lines, with PyTorch and NumPy alone."""
    pytest.importorskip("torch", reason="needs the torch extra: pip install 'scalr_jax[torch]'")
    folder = tmp_path / "exported"
    export.export_model(models[name], "torch", folder)
    head = "distilled" if name == "distilled" else "logits"
    check = f"for found, name in ((features, 'features'), (rows, '{head}')):\n"
    check += "    expected = example['output/' + name]\n    assert expected.abs().max() > 0.5\n"
    check += "    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)\n"
    run_elsewhere(folder, banned=("scalr_jax", "jax"), check=check)
    lines = [line for line in (folder / "run.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 70
    inputs, nearest = make_inputs(scan(), json.loads((folder / "config.json").read_text())["settings"])
    assert set(inputs) == {"feats", "neighbors", "cell_xy", "cell_xz", "cell_yz"}
    assert nearest.max() == len(inputs["feats"]) - 1


@pytest.mark.slow
def test_weights_are_read_from_any_folder(models, tmp_path):
    export.export_model(models["probed"], "safetensors", tmp_path / "exported")
    points = scan()
    points.tofile(tmp_path / "scan.bin")
    check = f"assert abs(features - np.load({str(tmp_path / 'wanted.npy')!r})).max() < 1e-4\n"
    np.save(tmp_path / "wanted.npy", models["probed"].embed(points))
    path = {"check": check, "cwd": Path(__file__).parents[2]}  # where the package is, when it is not installed
    run_elsewhere(tmp_path / "exported", tmp_path / "scan.bin", **path)


def test_preprocessing_needs_no_jax():
    code = "import sys, scalr_jax.export.inputs; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# ----------------------------------------------------------------------------------------------------------- bad input


def fails(capsys, match, *arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert_one_sentence(capsys.readouterr().err, match)


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("stablehlo", "flatbuffers")])
def test_a_missing_or_wrong_package_names_its_extra(workdir, tmp_path, capsys, monkeypatch, form, package):
    arguments = f"--model={workdir}", f"--format={form}", f"--output={tmp_path}/a"
    monkeypatch.setitem(sys.modules, package, None)
    fails(capsys, 'pip install "scalr_jax[export]"', *arguments)
    monkeypatch.delitem(sys.modules, package)
    (tmp_path / f"{package}.py").write_text("raise TypeError('Descriptors cannot be created directly.\\nMore.')")
    monkeypatch.syspath_prepend(tmp_path)
    fails(capsys, "Descriptors cannot be created directly", *arguments)


def test_another_model_is_refused(models, tmp_path, monkeypatch):
    """The written file is checked: one weight too large, or none a number, and nothing stays."""

    def spoiled(factor):
        def change(variables):
            variables = fold(variables)
            variables["params"]["embedding"]["final"]["bias"][0] *= factor
            return variables

        return change

    for form, factor, match in (
        ("safetensors", 1.05, "differ"),
        ("safetensors", np.nan, "embed.final.bias"),
        ("orbax", np.nan, "params/embedding/final/bias"),
    ):
        monkeypatch.setattr(export, "fold", spoiled(factor))
        with pytest.raises(InputError, match=match):
            export.export_model(models["probed"], form, tmp_path / "a" / "b", folded=True)
        assert list(tmp_path.iterdir()) == []


def test_a_model_without_finite_outputs_is_not_exported(models, tmp_path):
    large = copy.copy(models["probed"])
    large.variables = jax.tree.map(lambda leaf: leaf * 1e30, large.variables)
    with pytest.raises(InputError, match=mentions("features", "not finite")):
        export.export_model(large, "safetensors", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_an_export_and_an_interrupted_one(models, tmp_path):
    output = tmp_path / "a"
    export.export_model(models["probed"], "torch", output)
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "half").write_text("killed")
    with pytest.raises(InputError, match="exists"):
        export.export_model(models["probed"], "orbax", output)
    export.export_model(models["probed"], "orbax", output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "checkpoint", "config.json", "run.py"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "orbax"])
def test_a_full_disk_leaves_nothing(workdir, tmp_path, form):
    """No file may be larger than 20 KiB."""
    flags = ["--cache=none", f"--model={workdir}", f"--format={form}", f"--output={tmp_path / 'a' / 'b'}"]
    line = ["sh", "-c", 'trap "" XFSZ; ulimit -f 40; exec "$@"', "sh", sys.executable, "-m", "scalr_jax.export", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(line, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert_one_sentence(done.stderr, "cannot be written (File too large)")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """A folder of each kind that is read differently."""
    root = tmp_path_factory.mktemp("exported")
    for form in ("safetensors", "orbax", "stablehlo"):
        export.export_model(models["probed"], form, root / form)
    return root


def changed(folder, tmp_path, **settings):
    """A copy of an exported folder with other settings; None: without them."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    content = json.loads((other / "config.json").read_text())
    content["settings"].update(settings)
    content["settings"] = {key: value for key, value in content["settings"].items() if settings.get(key, 0) is not None}
    (other / "config.json").write_text(json.dumps(content))
    return other


@pytest.mark.parametrize(
    ("form", "settings", "match"),
    [
        ("safetensors", {"format": "tar"}, "config.json"),
        ("safetensors", {"voxel_size": None}, "config.json"),
        ("safetensors", {"num_neighbors": -1}, "num_neighbors is -1"),
        ("safetensors", {"class_names": ["car"]}, r"class_names are \['car'\] for 7 classes"),
        ("safetensors", {"grids": [[0, 1]]}, mentions("other", "config.json", "grids")),
        ("safetensors", {"activation": "tanh"}, mentions("activation", "tanh")),
        ("orbax", {"channels": 16}, mentions("params/backbone", (1, 8), (1, 16))),
        ("orbax", {"depth": 6}, "settings"),
        ("orbax", {"depth": "deep"}, "config.json"),
    ],
)
def test_folders_that_do_not_fit_are_one_sentence(exported, tmp_path, form, settings, match):
    with pytest.raises(InputError, match=match):
        scalr_jax.load(changed(exported / form, tmp_path, **settings))


def test_damaged_folders_are_one_sentence(exported, tmp_path):
    with pytest.raises(InputError, match=mentions("stablehlo", "README.md")):
        scalr_jax.load(exported / "stablehlo")
    other = changed(exported / "safetensors", tmp_path)
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=mentions("other", "model.safetensors", "damaged")):
        scalr_jax.load(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(InputError, match=mentions("other", "model.safetensors", "missing")):
        scalr_jax.load(other)
    (other / "config.json").write_text((exported / "safetensors" / "config.json").read_text()[:300])
    with pytest.raises(InputError, match=mentions("other", "exported")):
        scalr_jax.load(other)
    content = json.loads((exported / "safetensors" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**content, "export": 99}))
    with pytest.raises(InputError, match=mentions("other", 99)):
        scalr_jax.load(other)


def test_a_changed_byte_is_not_loaded(exported, tmp_path, capfd):
    """Orbax and safetensors would load it; of a cut file Orbax' tasks would print pages."""
    other = changed(exported / "orbax", tmp_path)
    largest = max(other.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    for damaged in (content[:-40] + bytes([content[-40] ^ 1]) + content[-39:], content[: len(content) // 2]):
        largest.write_bytes(damaged)
        with pytest.raises(InputError, match=mentions(largest.name, "damaged")):
            scalr_jax.load(other)
    assert capfd.readouterr().err == ""
    largest.write_bytes(content)
    assert scalr_jax.load(other).class_names


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        export.main(["export", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "python -m scalr_jax.export --model=runs/pretrain --format=onnx" in out
    for name in export.FLAGS:
        assert f"--{name}" in out or name in ("help", "helpshort", "helpfull", "helpxml", "?", "flagfile", "undefok")
