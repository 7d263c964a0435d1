"""Frames that are not as they must be, and code of others that fails: a sentence with the frame."""

import dataclasses
import os
import signal
import traceback

import numpy as np
import pytest

from scalr_jax.data.frame_checks import check_frame, read_frame
from scalr_jax.data.scenes import Frame
from scalr_jax.runtime.errors import BadFrameError, InputError
from tests.support.checks import mentions
from tests.support.clouds import CAPACITIES, Clouds, pipeline


def frame(**changes):
    return Clouds().frame(3)._replace(**changes)


def test_a_good_frame_passes():
    check_frame(frame())
    check_frame(Frame("a", np.zeros((0, 4)), np.eye(4)))


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("points", None, "NoneType"),
        ("points", np.zeros((5, 3)), "(5, 3)"),
        ("points", np.full((5, 4), np.nan), "finite"),
        ("points", np.zeros((5, 4), object), "object"),
        ("to_ego", np.full((4, 4), np.inf), "finite"),
        ("pixels", np.zeros((2, 2)), "(2, 2)"),
        ("visible", [True], "list"),
        ("labels", np.zeros(2, np.uint8), "(2,)"),
        ("image", np.zeros((4, 4), np.uint8), "(4, 4)"),
        ("image", np.zeros((4, 4, 3)), "float64"),
    ],
)
def test_a_field_of_another_shape_is_named(field, value, found):
    with pytest.raises(BadFrameError, match=mentions("clouds/3", field, found)):
        check_frame(frame(**{field: value}))


@dataclasses.dataclass(frozen=True)
class Own(Clouds):
    """Clouds whose eleventh frame goes wrong in its own way."""

    kind: str = ""

    def frame(self, index, rng=None, *, camera=None):
        if index == 11 and self.kind == "refused":
            raise InputError("clouds/11: no such camera; name another")
        if index == 11 and self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 11 and self.kind == "bug":
            return {}["points"]
        return super().frame(index, rng)


def test_an_error_in_the_code_of_others_says_the_frame_and_the_line():
    with pytest.raises(InputError, match=mentions("frame 11", "KeyError", "points", __file__, "line")):
        read_frame(Own(kind="bug"), 11, np.random.default_rng(0))


def read_all(kind, **changes):
    steps = pipeline(dataset=Own(kind=kind), **changes).steps(CAPACITIES, pipeline().sample(1)[0])
    return [next(steps) for _ in range(12)]


def test_a_sentence_comes_alone():
    with pytest.raises(InputError) as caught:
        read_all("refused")
    said = "".join(traceback.format_exception(caught.value))
    assert said.strip().endswith("clouds/11: no such camera; name another")
    assert "site-packages" not in said


@pytest.mark.slow
def test_a_killed_data_worker_is_a_sentence():
    with pytest.raises(InputError, match=mentions("data worker", -9, "data.num_workers")):
        read_all("killed", num_workers=1)
