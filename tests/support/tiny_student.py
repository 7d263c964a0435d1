"""A student of one layer, 8 wide, with random weights, as published files and workdirs are loaded."""

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.config import get_config
from scalr_jax.interop.model import abstract_variables, student_of
from scalr_jax.interop.saved import write_settings
from scalr_jax.runtime.checkpoint import Checkpoints
from scalr_jax.settings import read_settings
from tests.support.datasets import Frames


def tiny_model(head, out_features, **changes):
    """A model config and random variables."""
    model = get_config().model
    model.unlock()
    model.update({"channels": 8, "depth": 1, "head": head, "out_features": out_features, "num_features": 5, **changes})
    shapes = abstract_variables(student_of(model), 5)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: rng.uniform(0.1, 0.9, x.shape).astype(np.float32), shapes)


def write_workdir(path, task, head, out_features, *, class_names=(), **data):
    """A run's folder, as training leaves it. `class_names`: of its dataset; "class 0" and so on when it had none."""
    config = get_config()
    config.task, config.teacher.checkpoint = task, "demo"
    config.data.update(data)
    model, variables = tiny_model(head, out_features)
    config.model.update({key: model[key] for key in config.model if key in ("channels", "depth")})
    path.mkdir()
    (path / "config.json").write_text(config.to_json_best_effort())
    settings, dataset = read_settings(config), Frames()
    dataset.class_names = tuple(class_names)
    write_settings(path, settings.model, settings.data, student_of(model), dataset)
    checkpoints = Checkpoints(path / "checkpoints", every=1, keep=1)
    checkpoints.save(1, jax.device_put(variables), jnp.zeros(1), force=True)
    checkpoints.wait()
    checkpoints.close()
    return path
