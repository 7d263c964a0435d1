"""Laws of every command: help, mistakes, and how errors become exit codes."""

import errno
import importlib

import pytest
from absl import flags

from scalr_jax.runtime.command_line import exit_codes, numbers, parse_flags, require, sentence_of
from scalr_jax.runtime.errors import BadFrameError, InputError

COMMANDS = ("prepare", "predict", "export", "visualize", "compile")


def ended(capsys):
    """The one line that was said on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scalr_jax: error: ")
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag(name, capsys):
    command = importlib.import_module(f"scalr_jax.{name}.run")
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as stopped:
            command.main([name, flag, "--no_such_flag"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert f"python -m scalr_jax.{name} --" in text
        shared = set(flags.FlagValues())
        assert [flag for flag in command.FLAGS if f"--{flag} " not in text and flag not in shared] == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("arguments", [["--no_such_flag=1"], ["surplus"], []])
def test_mistakes_are_one_sentence_and_exit_code_2(name, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"scalr_jax.{name}.run").main([name, *arguments])
    assert stopped.value.code == 2
    line = ended(capsys)
    assert all(argument.strip("-").removesuffix("=1") in line for argument in arguments)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("give\n  another"), "give another"),
        (BadFrameError("scan.bin is cut"), "scan.bin is cut"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), "a.json"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
        (KeyboardInterrupt(), "interrupted; again"),
    ],
)
def test_what_is_no_defect_ends_with_2(error, words, capsys):
    with pytest.raises(SystemExit) as stopped, exit_codes(interrupted="again", full="make room"):
        raise error
    assert stopped.value.code == 2
    assert words in ended(capsys)


@pytest.mark.parametrize("error", [ValueError("shape"), OSError("of a library"), KeyError("x")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)), exit_codes():
        raise error


def test_flags_are_those_of_the_last_call():
    values = flags.FlagValues()
    flags.DEFINE_list("place", None, "", flag_values=values)
    flags.DEFINE_string("output", None, "", flag_values=values)
    parse_flags(values, ["x", "--place=1,-2.5", "--output=a"], __doc__)
    require(values, "place", "output", example="")
    assert numbers(values, "place", 2) == [1.0, -2.5]
    with pytest.raises(InputError, match=r"--place=1,-2\.5 .* 3 numbers"):
        numbers(values, "place", 3)
    parse_flags(values, ["x", "--place=1"], __doc__)
    assert values.output is None
    with pytest.raises(InputError, match=r"--place and --output .* like this"):
        require(values, "place", "output", example="like this")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 298. GiB for an array with shape (200000, 200000)"),
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes."),
    ],
)
def test_too_little_memory_is_one_sentence(error):
    sentence = sentence_of(error)
    assert sentence is not None
    assert sentence.startswith("not enough memory (")
    assert sentence_of(RuntimeError("a defect")) is None
