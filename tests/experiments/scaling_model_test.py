"""The model of scaling: one chip waits for nobody, more chips wait longer, and the command prints both tables."""

import pytest
import scaling_model
from scaling_model import Step

from scalr_jax.runtime.chips import parse_topology


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


def test_the_command(capsys, tmp_path):
    picture = tmp_path / "scaling.png"
    scaling_model.main(["--topologies=v6e:4x4", "--slices=1,4", f"--picture={picture}"])
    shown = capsys.readouterr().out
    assert "| 16 | v6e:4x4 |" in shown
    assert "| 64 | 4 x v6e:4x4 |" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    for arguments in (["--mfu=2"], ["--slices=0"], ["--topologies=v9:1"], ["--batch=many"]):
        with pytest.raises(SystemExit) as stopped:
            scaling_model.main(arguments)
        assert stopped.value.code == 2
        assert arguments[0].split("=")[1] in capsys.readouterr().err
