"""`export --push` uploads the folder, with a head on its card that the hub reads. A stand-in is the library."""

import json
import sys
import types

import pytest
import yaml

from scalr_jax.export import card
from scalr_jax.runtime import hub
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions


@pytest.fixture
def uploads(monkeypatch):
    """Calls of the hub's API; a repository called "forbidden" is one."""
    calls: list = []

    class HfHubHTTPError(OSError):
        pass

    class HfApi:
        def create_repo(self, name, **options):
            if name.endswith("forbidden"):
                raise HfHubHTTPError("403 Client Error:\n no access")
            calls.append((name, options))

        def upload_folder(self, **options):
            calls.append(options)

    library, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    vars(library)["HfApi"], vars(errors)["HfHubHTTPError"] = HfApi, HfHubHTTPError
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return calls


def test_a_pushed_folder_has_results_in_its_head_and_goes_to_a_private_repository(tmp_path, uploads):
    results = {"miou": 0.4375, "iou": {"car": 0.5}, "scans": 4, "train/loss": 0.25}
    content = {"settings": {"name": "waffleiron", "head": "segment"}, "results": results, "licence": "Apache-2.0"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "README.md").write_text("# A student\n")
    card.add_front_matter(tmp_path)
    _, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert text.strip() == "# A student"
    said = yaml.safe_load(head)
    assert (said["library_name"], said["license"]) == ("scalr_jax", "apache-2.0")
    (model,) = said["model-index"]
    (found,) = model["results"]
    assert found["metrics"] == [{"type": "miou", "value": 0.4375}, {"type": "train_loss", "value": 0.25}]
    assert hub.push(tmp_path, "hf://me/student", "why") == "hf://me/student"
    assert uploads[0] == ("me/student", {"private": True, "exist_ok": True})
    assert uploads[1] == {"repo_id": "me/student", "folder_path": str(tmp_path), "commit_message": "why"}


def test_a_push_that_is_refused_is_one_sentence(tmp_path, uploads):
    with pytest.raises(InputError, match=mentions("hf://me/forbidden", "403", "--overwrite")) as caught:
        hub.push(tmp_path, "hf://me/forbidden", "why")
    assert "\n" not in str(caught.value)
    assert not uploads


def test_without_the_library_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for ask in (lambda: hub.push(tmp_path, "hf://me/a", ""), lambda: hub.fetched("hf://me/a")):
        with pytest.raises(InputError, match=mentions("huggingface_hub", "scalr_jax[hub]")):
            ask()
