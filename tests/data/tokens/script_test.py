"""The script of docs/tokens.md: 30 lines of PyTorch, without JAX, that write a cache."""

import importlib.util
import re
import sys
import types

import numpy as np
import pytest

from scalr_jax.data.readers.records import Records
from scalr_jax.data.tokens.dataset import WithTokens, images_of
from scalr_jax.data.tokens.store import TokenStore
from tests.support import raw_datasets as raw
from tests.support.paths import ROOT
from tests.support.prepared_datasets import make

SCRIPT = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tokens.md").read_text(), re.DOTALL)


def test_it_is_one_of_30_lines_that_names_nothing_of_ours():
    (script,) = SCRIPT
    assert sum(bool(line.strip()) for line in script.splitlines()) <= 30
    assert "jax" not in script
    compile(script, "write_tokens.py", "exec")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="without PyTorch")
def test_what_it_writes_trains(tmp_path, monkeypatch):
    """With a model of one convolution, of stride 16, whose features come after five other tokens."""
    import torch  # pyright: ignore[reportMissingImports]

    raw.write_semantic_kitti(tmp_path / "semantic_kitti", num_scans=3)
    records = make("semantic_kitti", tmp_path, tmp_path / "out", "--labels")
    convolution = torch.nn.Conv2d(3, 4, 16, 16)

    def model(pixel_values):
        tokens = convolution(pixel_values).flatten(2).transpose(1, 2)
        return types.SimpleNamespace(last_hidden_state=torch.cat([torch.ones(1, 5, 4), tokens], 1))

    loaded = types.SimpleNamespace(eval=lambda: model)
    fake = types.SimpleNamespace(AutoModel=types.SimpleNamespace(from_pretrained=lambda name: loaded))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setattr(sys, "argv", ["write_tokens.py", str(records), str(tmp_path / "tokens")])
    exec(compile(SCRIPT[0], "write_tokens.py", "exec"), {})
    store, dataset = TokenStore(tmp_path / "tokens"), Records(records)
    assert set(store.rows) == {name for _, _, name in images_of(dataset)}
    assert (store.dtype, store.grid, store.channels) == ("bfloat16", (14, 28), 4)
    tokens = WithTokens(dataset, store).frame(0, np.random.default_rng(0)).tokens
    assert tokens[0].values.any()
