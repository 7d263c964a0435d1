"""`scalr_jax.predict` on models that are damaged or of something else: workdirs, exported folders, published files."""

import gzip
import json

import numpy as np
import pytest

from tests.support import damages, hostile
from tests.support.hostile import Row

SCAN = "--input=THINGS/scan.bin"


def model(name, thing, damage, *words, given=()):
    """A row of a damaged model: a workdir, an exported folder, or a file."""
    arguments = ("--cache=none", SCAN, "--output=out.npz", "--sensor=semantic_kitti", "--activation=relu", *given)
    return Row(
        f"model: {thing}, {name}", (f"--model={thing}", *arguments), (thing, *words), uses=(thing,), damage=damage
    )


def header_of(name, change):
    """A safetensors file whose header is another one."""

    def write(folder):
        data = (folder / name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])

    return write


def first_tensor(**changes):
    def change(header):
        name = next(key for key in header if key != "__metadata__")
        return header | {name: header[name] | changes}

    return change


def not_finite(folder):
    header_of("probed.safetensors", lambda header: header)(folder)
    data = bytearray((folder / "probed.safetensors").read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    (folder / "probed.safetensors").write_bytes(data)


MODELS = [
    *(
        model(f"settings.json {name}", "run", damage, "settings.json")
        for name, damage in damages.every_way("run/settings.json").items()
    ),
    *(
        model(f"settings.json without {key}", "run", damages.keys("run/settings.json", **{key: ...}), "settings.json")
        for key in ("name", "head", "out_features", "num_features", "voxel_size", "intensities", "channels")
    ),
    *(
        model(
            f"settings.json {key} = {value!r}",
            "run",
            damages.keys("run/settings.json", **{key: value}),
            "settings.json" if key != "grids" else key,
        )
        for key, value in (
            ("channels", 9),
            ("channels", "x"),
            ("channels", -8),
            ("channels", 10**9),
            ("depth", 5),
            ("depth", None),
            ("depth", 10**9),
            ("head", "hat"),
            ("head", 3),
            ("out_features", 3),
            ("out_features", "7"),
            ("num_features", 9),
            ("voxel_size", 0),
            ("voxel_size", "x"),
            ("voxel_size", -1),
            ("grids", [[0, 1]]),
            ("grids", 3),
            ("field_of_view", [1, 2]),
            ("intensities", []),
            ("intensities", {"semantic_kitti": [1]}),
            ("intensities", {"semantic_kitti": "x"}),
            ("class_names", ["one"]),
            ("class_names", 3),
            ("class_names", [1, 2, 3, 4, 5, 6, 7]),
            ("activation", "tanh"),
            ("norm", []),
            ("num_neighbors", 0),
            ("name", "resnet"),
            ("minkunet", 3),
        )
    ),
    model("no weights", "run", damages.gone("run/checkpoints")),
    model("no step", "run", damages.gone("run/checkpoints/1")),
    model("a flipped bit", "run", damages.flipped("run/checkpoints/1/**/d/*")),
    model("a cut file", "run", damages.cut("run/checkpoints/1/state/_METADATA")),
    *(
        model(f"config.json {name}", "export", damage)
        for name, damage in damages.every_way("export/config.json").items()
    ),
    *(
        model(f"config.json {key} = {value!r}", "export", damages.keys("export/config.json", **{key: value}), *words)
        for key, value, words in (
            ("export", 99, (99,)),
            ("export", "x", ()),
            ("settings", 3, ()),
            ("settings__format", "tar", ()),
            ("settings__format", "onnx", ("program",)),
            ("settings__format", ["torch"], ()),
            ("files", 3, ()),
            ("files", {"x": "y"}, ("x",)),
            ("settings__voxel_size", "x", ("voxel_size",)),
            ("settings__num_neighbors", -1, ("num_neighbors",)),
            ("settings__class_names", ["car"], ("class_names",)),
            ("settings__grids", [[0, 1]], ("grids",)),
            ("settings__activation", "tanh", ("activation",)),
            ("settings__drop_path", "x", ("drop_path",)),
            ("settings__field_of_view", None, ("field_of_view",)),
        )
    ),
    model("weights are gone", "export", damages.gone("export/model.safetensors"), "model.safetensors"),
    model("weights are cut", "export", damages.cut("export/model.safetensors"), "model.safetensors"),
    model("a flipped bit", "export", damages.flipped("export/model.safetensors"), "model.safetensors"),
    *(
        model(name, "probed.pth", damage)
        for name, damage in {
            "cut": damages.cut("probed.pth"),
            "empty": damages.written("probed.pth", b""),
            "a pointer": damages.written("probed.pth", damages.LFS),
            "HTML": damages.written("probed.pth", b"<html>"),
            "gzip": damages.written("probed.pth", gzip.compress(b"x")),
            "zip of nothing": damages.written("probed.pth", b"PK\x05\x06" + bytes(18)),
            "a flipped bit": damages.flipped("probed.pth", 0.2),
            "zeros": damages.written("probed.pth", bytes(4096)),
            "a folder": damages.folder_there("probed.pth"),
            "JSON": damages.written("probed.pth", b"{}"),
            "another pickle": damages.written("probed.pth", b"\x80\x04K\x03."),
            "a pickle that runs": damages.written("probed.pth", b"cos\nsystem\n(S'touch hacked'\ntR."),
        }.items()
    ),
    *(
        model(name, "probed.safetensors", damage)
        for name, damage in {
            "cut": damages.cut("probed.safetensors"),
            "empty": damages.written("probed.safetensors", b""),
            "a pointer": damages.written("probed.safetensors", damages.LFS),
            "a header of 2^64 bytes": damages.written("probed.safetensors", b"\xff" * 64),
            "no header": damages.written("probed.safetensors", bytes(64)),
            "a header that is a list": damages.written("probed.safetensors", (2).to_bytes(8, "little") + b"[]"),
            "a deep header": damages.written("probed.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
            "float8": header_of("probed.safetensors", first_tensor(dtype="F8_E4M3")),
            "no dtype": header_of("probed.safetensors", first_tensor(dtype="Q7")),
            "a shape of 2^62": header_of("probed.safetensors", first_tensor(shape=[2**62, 4])),
            "a negative shape": header_of("probed.safetensors", first_tensor(shape=[-1])),
            "offsets beyond": header_of("probed.safetensors", first_tensor(data_offsets=[0, 10**9])),
            "offsets backwards": header_of("probed.safetensors", first_tensor(data_offsets=[8, 0])),
            "other names": header_of(
                "probed.safetensors", lambda header: {f"{key}x": value for key, value in header.items()}
            ),
            "one tensor": header_of("probed.safetensors", lambda header: dict(list(header.items())[:1])),
            "NaN": not_finite,
        }.items()
    ),
]


@pytest.mark.parametrize("row", hostile.rows_of(MODELS, fast=4))
def test_the_law(row, things, tmp_path, capfd):
    hostile.check(row, hostile.run("predict", row, things, tmp_path, capfd))
