"""An XProf trace of some steps of training, for TensorBoard's profile plugin or xprof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Trace:
    """Written to `folder` from step START to before step STOP, counted from 0; nothing for no steps."""

    def __init__(self, steps: tuple[int, ...], folder: Path):
        self._steps, self._folder, self._running = steps, folder, False

    def before(self, step: int, made: Any) -> None:
        """Step number `step`, from 0, is about to run; `made` is what the one before returned."""
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(made)
            self.close()
        elif self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def close(self) -> None:
        """Ends the trace if it is running, also when the run ends before STOP."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(f"profile of steps {self._steps[0]} to {self._steps[1]}: {self._folder}", flush=True)
