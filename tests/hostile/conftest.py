"""The little valid things that the tables damage, made once a session."""

import fcntl

import numpy as np
import pytest
import safetensors.numpy

from tests.support import raw_datasets as raw


@pytest.fixture(scope="session")
def things(shared_folder, street_cache):
    """run/ (a probe), pretrain/ (a distillation), export/, distilled.pth, probed.pth, folder/, kitti/, nuscenes/,
    pandaset/, records/ (prepared of folder/), scan.bin, scan.npy."""
    folder = shared_folder / "hostile"
    with (shared_folder / "hostile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            folder.mkdir()
            (folder / "streets").symlink_to(street_cache)
            _make(folder)
            (folder / "ready").touch()
    return folder


def _make(folder):
    from scalr_jax import api
    from scalr_jax.data.streets.layout import CLASSES
    from scalr_jax.export.run import export_model
    from scalr_jax.interop.model import student_of
    from scalr_jax.interop.published import published_state_dict
    from tests.support.predict_runs import make_points, write_bin, write_models
    from tests.support.prepared_datasets import make
    from tests.support.tiny_student import tiny_model, write_workdir

    write_models(folder)
    model, variables = tiny_model("segment", 7)
    student = student_of(model)
    safetensors.numpy.save_file(published_state_dict(student, variables), folder / "probed.safetensors")
    write_workdir(folder / "run", "probe", "segment", len(CLASSES), dataset="streets", class_names=CLASSES)
    write_workdir(folder / "pretrain", "distill", "distill", 128, dataset="streets")
    raw.write_folder(folder / "folder", classes=["car", "road"], validation=["b"], sensor_height=1.7)
    raw.write_semantic_kitti(folder / "kitti")
    raw.write_semantic_kitti(folder / "kitti", "08")
    raw.write_nuscenes(folder / "nuscenes")
    raw.write_pandaset(folder / "pandaset")
    points = make_points(301)
    write_bin(folder / "scan.bin", points)
    np.save(folder / "scan.npy", points)
    export_model(api.load(folder / "run"), "safetensors", folder / "export", source=folder / "run")
    make("folder", folder, folder / "prepared", "--labels")
    (folder / "prepared" / "folder").rename(folder / "records")
    (folder / "prepared").rmdir()


@pytest.fixture(scope="session")
def loaded_once(things):
    """Models of `things` themselves, which no row changes, are loaded and compiled once."""
    from scalr_jax import api

    loaded, original = {}, api.load

    def load(path, **named):
        key = repr((path, named))
        if not str(path).startswith(str(things)):
            return original(path, **named)
        if key not in loaded:
            loaded[key] = original(path, **named)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "load", load)
        yield
