"""The Hugging Face Hub without a network: a folder in its cache's layout, and what is not there."""

import json

import numpy as np
import pytest
import safetensors.numpy

import scalr_jax
from scalr_jax.config import TeacherSettings
from scalr_jax.interop.teacher import make_teacher
from scalr_jax.runtime import hub
from scalr_jax.runtime.errors import InputError
from tests.support import numpy_vit
from tests.support.checks import mentions

REVISION = "0" * 40


def test_other_addresses_are_refused():
    assert hub.is_address("hf://a/b")
    assert not hub.is_address("runs/a")
    for address in ("hf://a", "hf://a/b c", "hf://a/b/../c", "hf://a/b@"):
        with pytest.raises(InputError, match=mentions(address, "hf://OWNER/NAME")):
            hub.fetched(address)
    for address in ("owner/name", "hf://a/b/file", "hf://a/b@main"):
        with pytest.raises(InputError, match=mentions(address, "hf://OWNER/NAME")):
            hub.check_repository(address)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that puts files into the cache, offline."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the hub extra")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository, files):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        for name, content in files.items():
            path = folder / "snapshots" / REVISION / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)

    return put


def test_a_teacher_from_the_cache_with_its_config_beside(cache):
    weights = {name: np.ascontiguousarray(x) for name, x in numpy_vit.random_weights("dino").items()}
    cache("facebook/tiny", {"model.safetensors": safetensors.numpy.save(weights), "config.json": b"{}"})
    cache("facebook/odd", {"weights/vit.safetensors": safetensors.numpy.save(weights)})
    for address in ("hf://facebook/tiny", "hf://facebook/tiny@main", "hf://facebook/odd/weights/vit.safetensors"):
        config, _ = make_teacher(TeacherSettings(checkpoint=address), (28, 28), "cpu")
        assert config.width == 128
    with pytest.raises(InputError, match=mentions("hf://facebook/odd", "weights/vit.safetensors", "name the file")):
        hub.weights_file("hf://facebook/odd")
    with pytest.raises(InputError, match=mentions("hf://facebook/tiny/vit.pth", "model.safetensors")):
        hub.fetched("hf://facebook/tiny/vit.pth")


def test_what_is_not_in_the_cache_is_one_sentence_offline(cache):
    cache("facebook/tiny", {"config.json": json.dumps({}).encode()})
    for address in ("hf://facebook/none", "hf://facebook/none/model.safetensors"):
        with pytest.raises(InputError, match=mentions(address, "HF_HUB_OFFLINE")) as caught:
            scalr_jax.load(address)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=mentions("hf://facebook/tiny", "config.json", "name the file")):
        scalr_jax.load("hf://facebook/tiny")
