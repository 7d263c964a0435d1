"""The model of scaling: one chip waits for nobody, more chips wait longer, and the command prints both tables."""

import pytest
import scaling_model
from scaling_model import Step

from scalr_jax.runtime.chips import parse_topology
from scalr_jax.runtime.errors import InputError


def test_chips_wait_for_each_other_only():
    step = Step()
    alone = scaling_model.weak(step, parse_topology("v5p:1x1x1"), 1, 0.25)
    assert alone.efficiency == 1
    assert alone.compute == pytest.approx(step.flops / (0.25 * 459e12))
    few, many = (scaling_model.weak(step, parse_topology(name), 1, 0.25) for name in ("v5p:4x4x4", "v5p:8x8x16"))
    assert few.compute == many.compute == alone.compute
    assert 1 > few.efficiency > many.efficiency > 0.9
    split = scaling_model.weak(step, parse_topology("v5p:4x4x4"), 4, 0.25)
    assert (split.num_chips, split.within) == (256, few.within)
    assert split.between > 0
    assert scaling_model.strong(step, parse_topology("v5p:4x4x4"), 32, 0.25) is None


def test_a_chips_mfu_and_its_loader_are_those_predicted():
    """More scenes a second need more cores; a chip without a prediction is refused in a sentence."""
    v5p, v6e = (parse_topology(name) for name in ("v5p:4x4x4", "v6e:8x8"))
    assert scaling_model.mfu_of(v5p, None) == 0.14
    assert scaling_model.mfu_of(v6e, 0.3) == 0.3
    with pytest.raises(InputError, match=r"v4.*--mfu"):
        scaling_model.mfu_of(parse_topology("v4:2x2x1"), None)
    rows = [scaling_model.weak_table(Step(), [v5p], [1], 0.14, a_core).splitlines()[-1] for a_core in (2.0, 4.0)]
    cores = [float(row.split("|")[-2]) for row in rows]
    assert cores[0] == pytest.approx(2 * cores[1], abs=0.1)
    assert cores[0] > 1


def test_the_command(capsys, tmp_path):
    picture = tmp_path / "scaling.png"
    scaling_model.main(["--topologies=v6e:4x4", "--slices=1,4", f"--picture={picture}"])
    shown = capsys.readouterr().out
    assert "| 16 | v6e:4x4 |" in shown
    assert "| 64 | 4 x v6e:4x4 |" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    for arguments in (["--mfu=2"], ["--scenes_per_core=0"], ["--slices=0"], ["--topologies=v9:1"], ["--batch=many"]):
        with pytest.raises(SystemExit) as stopped:
            scaling_model.main(arguments)
        assert stopped.value.code == 2
        assert arguments[0].split("=")[1] in capsys.readouterr().err
