"""metrics.jsonl, TensorBoard when it is installed, Weights & Biases, and one line of progress a few seconds apart."""

from __future__ import annotations

import contextlib
import json
import math
import time
import zlib
from pathlib import Path
from typing import Any, Protocol

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import json_text, written_whole

PROGRESS_SECONDS = 3.0


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A line every few seconds of how much is done and how long the rest will take."""

    def __init__(self, *, active: bool):
        self._active, self._done, self._started, self._said = active, 0, 0.0, 0.0

    def add(self, text: str, remaining: float) -> None:
        """One more is done, and so many remain. The first is not timed: it waited for the compiler."""
        now = time.monotonic()
        if self._done == 0:
            self._started = self._said = now
        elif self._active and now - self._said > PROGRESS_SECONDS:
            self._said = now
            left = (now - self._started) / self._done * max(remaining, 0)
            print(f"{text}, {format_seconds(left)} left", flush=True)
        self._done += 1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for the half one that a killed process may have left at the end.

    Raises `InputError`, which names the line, for one that is no JSON object with a whole number as its step.
    """
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); move it away, or copy the workdir again") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):
                break
            line = None
        if not isinstance(line, dict) or type(line.get("step", 0)) is not int:
            raise InputError(f"{path}: line {number} is no JSON object with a whole step; remove the line")
        lines.append(line)
    return lines


class Tracked(Protocol):
    """A run of Weights & Biases."""

    def log(self, data: dict[str, float], step: int) -> object: ...

    def finish(self) -> object: ...


def open_tracked(project: str, workdir: Path) -> Tracked:
    """The run of a workdir in a project of Weights & Biases, which goes on where the same folder is trained again.

    Raises `InputError` when no run can begin there; that the package is installed was checked with the config.
    """
    place = workdir.resolve()
    name = "-".join(place.parts[-2:])
    config = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
    import wandb  # pyright: ignore[reportMissingImports]

    try:
        identity = f"{zlib.crc32(bytes(place)):08x}"
        return wandb.init(project=project, name=name, id=identity, resume="allow", dir=str(place), config=config)
    except Exception as error:  # no key, no network, and whatever else the package raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"wandb = {project!r}: no run can begin ({reason}); run `wandb login`, or set WANDB_MODE=offline"
        ) from error


class MetricWriter:
    """Appends to `workdir/metrics.jsonl`; `active=False` (all processes but one) writes nothing.

    project: of Weights & Biases, which gets the same values; "": none.
    """

    def __init__(self, workdir: Path, *, num_steps: int, active: bool = True, label: str = "", project: str = ""):
        self._path = workdir / "metrics.jsonl"
        self._num_steps, self._active, self._label = num_steps, active, label
        self._started, self._first_step, self._last_line = time.monotonic(), 0, 0.0
        self._board: Any = None
        self._tracked = open_tracked(project, workdir) if active and project else None
        if active:
            with contextlib.suppress(ImportError):  # of the extra "log"
                from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

                self._board = SummaryWriter(str(workdir / "tensorboard"))

    def compiled(self, step: int) -> None:
        """Notes that the first step of this start is made: from here on time is measured."""
        now = time.monotonic()
        if self._active:
            print(f"{self._label}: compiled in {now - self._started:.0f} s".removeprefix(": "), flush=True)
        self._started, self._first_step = now, step

    def _begin(self, text: str) -> None:
        if self._active:
            print(f"{self._label}: {text}".removeprefix(": "), flush=True)
        self._started = time.monotonic()

    def resume(self, step: int) -> None:
        """Cut the file to `step` (what came after it will be written again) and note the resume."""
        self._begin(f"resumed at step {step} of {self._num_steps}{', compiling' if step < self._num_steps else ''}")
        if not self._active:
            return
        lines = read_metrics(self._path) if self._path.exists() else []
        kept = [line for line in lines if line.get("step", 0) <= step] + [{"event": "resume", "step": step}]
        with written_whole(self._path) as file:
            file.write("".join(json_text(line) + "\n" for line in kept).encode())

    def restart(self) -> None:
        """Removes the lines of a run that was killed before its first checkpoint: its steps will be made again."""
        self._begin(f"compiling, then {self._num_steps} steps")
        if self._active:
            self._path.unlink(missing_ok=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One JSON object, {"step": ..., "train/loss": ...}, without the values that are not finite, and a line of
        progress when some seconds have passed."""
        if not self._active:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with self._path.open("a") as file:
            file.write(json_text({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._tracked is not None:
            self._tracked.log(values, step=step)
        now = time.monotonic()
        if now - self._last_line >= PROGRESS_SECONDS or step == self._num_steps:
            self._last_line = now
            print(self._line(step, values, now), flush=True)

    def _line(self, step: int, values: dict[str, float], now: float) -> str:
        done, rest = step - self._first_step, self._num_steps - step
        left = [f"{format_seconds((now - self._started) / done * rest)} left"] if done else []
        loss = f"loss {values['train/loss']:.4f}" if "train/loss" in values else "loss not finite"
        parts = [f"{self._label} step {step}/{self._num_steps}".strip(), loss]
        if "train/loss_constant" in values:
            parts.append(f"(constant {values['train/loss_constant']:.4f})")
        parts += [f"{values['train/points_per_s']:,.0f} points/s", f"fill {100 * values['train/point_fill']:.0f} %"]
        if "train/mfu" in values:
            parts.append(f"MFU {values['train/mfu']:.0%}")
        if values.get("train/skipped_steps"):
            parts.append(f"skipped {values['train/skipped_steps']:.0f}")
        return "  ".join([*parts, *left])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._tracked is not None:
            self._tracked.finish()
