"""`scalr_jax.predict` and what it is given wrong: exit code 2, one sentence, nothing half-written."""

import pytest

from scalr_jax.predict import run as predict
from scalr_jax.runtime.command_line import use_cache
from tests.support.predict_runs import EXPLICIT, command, make_points, write_bin, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(models, tmp_path):
    scan = write_bin(tmp_path / "scan.bin", make_points(20_000))
    done = command(
        f"--model={models}/probed.pth", f"--input={scan}", f"--output={tmp_path}/out.npz", *EXPLICIT, limit=16
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"File too large: '{tmp_path}/out.npz'" in done.stderr
    assert "run the same command again" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.bin"]


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert use_cache(tmp_path / "file" / "cache") is None
    assert "compiled programs are not kept" in capsys.readouterr().out


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main(["predict", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.count("python -m scalr_jax.predict --model=") == 3
    for name in predict.FLAGS:
        if name not in ("?", "help", "helpfull", "helpshort", "helpxml", "only_check_args", "flagfile", "undefok"):
            assert f"--{name} " in text, name
