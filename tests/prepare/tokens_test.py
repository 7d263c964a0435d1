"""`prepare --teacher`: the teacher's own tokens, kills, damage, refusals, bad images; and a training with them."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.data.readers.records import Records
from scalr_jax.data.tokens.dataset import image_of, images_of
from scalr_jax.data.tokens.store import TokenStore
from scalr_jax.data.transforms import resize_image
from scalr_jax.interop import teacher as teachers
from scalr_jax.models import vit
from scalr_jax.prepare import run as prepare
from scalr_jax.prepare import tokens as module
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import write_json
from tests.support import damages
from tests.support import raw_datasets as raw
from tests.support.checks import mentions
from tests.support.prepared_datasets import make

SIZE = (16, 24)
TINY = vit.ViTConfig(8, 8, 1, 2, 16, position_grid=(2, 3))


@pytest.fixture(scope="module", autouse=True)
def tiny_teacher():
    """A ViT of one block in place of the packaged one."""
    params = vit.init(TINY, jax.random.key(1), SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "load_demo_teacher", lambda: (TINY, params))
        yield params


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    raw.write_semantic_kitti(root / "semantic_kitti", num_scans=7)
    return make("semantic_kitti", root, root / "out")


def arguments(records, output, *more):
    return ["prepare", "--teacher=demo", "--image_size=16,24", f"--root={records}", f"--output={output}", *more]


def write(records, output, *more):
    prepare.run(arguments(records, output, "--frames_per_shard=3", *more))
    return output


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".npy", ".json")}


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    return write(records, tmp_path_factory.mktemp("whole") / "tokens")


def test_the_tokens_are_the_teachers_own(records, tiny_teacher, tmp_path, capsys):
    store = TokenStore(write(records, tmp_path / "exact", "--tokens=float32", "--feature=x", "--noantialias"))
    said = capsys.readouterr()
    assert "7 of 7 images" in said.out
    assert "MB are free" in said.out or "GB are free" in said.out
    assert "7/7" in said.err, "the progress bar reaches its end"
    dataset = Records(records)
    for index, camera, name in images_of(dataset):
        image = resize_image(image_of(dataset, index, camera), SIZE, antialias=False)
        tokens = vit.features(TINY, tiny_teacher, jnp.asarray(image[None], jnp.float32) / 255, which="x")
        file, row = store.rows[name]
        expected = vit.patch_tokens(tokens, TINY).reshape(2, 3, 8)
        np.testing.assert_allclose(store.files[file].read(row).values, expected, atol=2e-5)
    (header,) = store.headers.values()
    assert header["teacher"]["feature"] == "x"
    assert (header["image_size"], header["antialias"]) == ([16, 24], False)


def test_killed_it_goes_on_and_writes_the_same(records, whole, tmp_path, monkeypatch):
    """Killed while the second file is written, then with that file's part written and its content cut."""
    folder, original = tmp_path / "tokens", module.write_json

    def killed(path, content, indent=2):
        if path.name == "tokens-00001.npy.json":
            raise KeyboardInterrupt
        original(path, content, indent)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            write(records, folder)
    with pytest.raises(InputError, match=mentions("no finished token cache", "run that command again")):
        TokenStore(folder)
    with pytest.raises(InputError, match=mentions("other settings", "dtype", "int8", "bfloat16")):
        write(records, folder, "--tokens=int8")
    first = (folder / "tokens-00000.npy").stat().st_mtime_ns
    write(records, folder)
    assert (folder / "tokens-00000.npy").stat().st_mtime_ns == first
    assert contents(folder) == contents(whole)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*contents(whole), "prepare.lock"])


def test_a_complete_folder_is_verified_kept_and_mended(records, whole, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(whole, folder)
    prepare.run(["prepare", f"--output={folder}", "--verify"])
    with pytest.raises(InputError, match=mentions("is complete", 7)):
        write(records, folder)
    damages.flipped("tokens-00001.npy", 0.8)(folder)
    with pytest.raises(InputError, match=mentions("1 of 3 files", "tokens-00001.npy", "delete")):
        prepare.run(["prepare", f"--output={folder}", "--verify"])
    (folder / "tokens-00001.npy").unlink()
    write(records, folder)
    assert contents(folder) == contents(whole)


def test_a_bad_image_is_left_out_and_repaired_ones_are_computed(records, tmp_path, monkeypatch, capsys):
    original, bad = module.image_of, {2}

    def read(dataset, index, camera):
        if index in bad:
            raise module.BadFrameError(f"image {index} is cut")
        return original(dataset, index, camera)

    monkeypatch.setattr(module, "image_of", read)
    store = TokenStore(write(records, tmp_path / "one"))
    assert "left out an image: image 2 is cut" in capsys.readouterr().out
    names = [name for _, _, name in images_of(Records(records))]
    assert [name for name in names if store.rows[name] == (-1, -1)] == [names[2]]
    bad ^= {2, 6}  # the last one, alone in its file
    store = TokenStore(write(records, tmp_path / "last", "--tokens=int8"))
    assert [len(rows.crc32) for rows in store.files] == [3, 3, 0]
    bad |= {0}
    with pytest.raises(InputError, match=mentions("2 of 7 images are bad", "image 0 is cut", "1 %")):
        write(records, tmp_path / "many")
    bad.clear()
    repaired = TokenStore(write(records, tmp_path / "many"))
    assert all(place >= (0, 0) for place in repaired.rows.values())


def test_two_lidars_share_their_images(tmp_path):
    raw.write_pandaset(tmp_path / "pandaset", numbers=(2,), cameras=("front_camera",))
    for sensor in ("pandar64", "pandargt"):
        make("pandaset", tmp_path, tmp_path / "out", f"--sensor={sensor}")
    store = TokenStore(write(tmp_path / "out" / "pandaset", tmp_path / "tokens"))
    assert list(store.rows) == ["pandaset/001/02/front_camera"]


def full(path, content, indent=2):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_done_is_one_sentence(records, tmp_path, monkeypatch):
    refused = {
        ("--image_size=16,25",): ("image_size", "(16, 25)", "patch"),
        ("--teacher=none.pth",): ("none.pth", "is not a file"),
        ("--tokens=int4",): ("tokens", "int4", "bfloat16"),
        (f"--root={tmp_path}",): ("--dataset", "--root"),
        ("--root=none",): ("--dataset", "--root"),
        ("--split=validation",): ("no split 'validation'",),
    }
    for more, words in refused.items():
        with pytest.raises(InputError, match=mentions(*words)):
            write(records, tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--image_size=ROWS,COLUMNS"):
        prepare.run(["prepare", "--teacher=demo", f"--root={records}", f"--output={tmp_path / 'out'}"])
    with monkeypatch.context() as patch:
        patch.setattr(module.session.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 10))
        with pytest.raises(InputError, match=mentions("not enough space", "free some")):
            write(records, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with pytest.raises(InputError, match=mentions("No space left", "tokens-00000.npy", "same command again")):
            write(records, tmp_path / "out")
    params = jax.tree.map(lambda x: x * np.nan, vit.init(TINY, jax.random.key(1), SIZE))
    monkeypatch.setattr(teachers, "load_demo_teacher", lambda: (TINY, params))
    with pytest.raises(InputError, match=mentions("not finite", "semantic_kitti/00/000000")):
        write(records, tmp_path / "out")
    write_json(tmp_path / "mine" / "a.json", {})
    with pytest.raises(InputError, match=mentions("not empty", "a.json")):
        write(records, tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "a.json").read_text()) == {}
