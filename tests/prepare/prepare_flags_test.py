"""The flags of the command that prepares: mistakes, help."""

import pytest

from scalr_jax.prepare import run as prepare
from tests.support.checks import assert_one_sentence


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--output=x"], "--dataset, --root and --output are required"),
        (["--dataset=kitti", "--root=x", "--output=y"], "dataset"),
        (["--dataset=nuscenes", "--root=/nowhere", "--output=y"], "/nowhere/v1.0-mini: no such folder"),
        (["--dataset=nuscenes", "--root=x", "--output=y", "--image_size=224"], "must be rows,columns, as in 224,448"),
        (["--dataset=nuscenes", "--root=x", "--output=y", "--image_size=a,b"], "must be rows,columns"),
        (["--dataset=streets", "--root=x", "--output=y", "--image_size=5", "--inspect"], "must be rows,columns"),
        (["--dataset=streets", "--root=x", "--output=y", "--image_size=100000,9"], "at most 8192"),
        (
            ["--dataset=nuscenes", "--root=x", "--output=y", "--image_size=1,2", "--image_format=original"],
            "leave out --image_size",
        ),
        (["--dataset=nuscenes", "--root=x", "--output=y", "--num_processes=0"], "num_processes"),
        (["--dataset=nuscenes", "--root=x", "--output=y", "--wrong=1"], "wrong"),
        (["nuscenes", "--root=x", "--output=y", "--dataset=folder"], "unexpected arguments: nuscenes"),
        (["--output=/nowhere", "--verify"], "/nowhere: not prepared"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_exit_code_2(given, match, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main(["prepare", *given])
    assert ended.value.code == 2
    assert_one_sentence(capsys.readouterr().err, match)


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main(["prepare", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "python -m scalr_jax.prepare --dataset=nuscenes" in out
    for name in prepare.FLAGS:
        assert f"--{name}" in out or name in ("help", "helpshort", "helpfull", "helpxml", "?", "flagfile", "undefok")
