"""One resumable training run: a folder, an optimiser, an exponential moving average, a clock.

The folder holds `state.pt` (everything needed to go on), `log.jsonl` and EMA weights in float16 (see `weights`).
"""
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.training.weights import read_metadata, read_weights, write_weights, write_whole
from caphuman_edge.runtime.errors import CapHumanError


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    minutes: float  # wall clock of this call; a later call goes on
    batch: int = 16
    learning_rate: float = 5e-4  # of AdamW; other optimisers keep their own, and all follow `factor`
    warmup: int = 200  # steps
    decay_steps: int = 20_000  # cosine decay to a twentieth over this many steps; 0: over the minutes
    ema: float = 0.998  # decay of the moving average, reached step by step
    seed: int = 0
    save_every: float = 120.0  # seconds

    def factor(self, step: int, minutes: float) -> float:
        """Share of the learning rate at a step, `minutes` after the start: warm-up, then a cosine to a twentieth."""
        progress = min(1.0, step / self.decay_steps if self.decay_steps else minutes / self.minutes)
        return min(1.0, (step + 1) / self.warmup) * (0.525 + 0.475 * math.cos(math.pi * progress))


class Run:
    """Trains `model` by a loss function until the clock, a signal or the end of the plan."""

    def __init__(self, folder: Path, model: nn.Module, plan: Plan, metadata: dict[str, Any],
                 optimizers: Sequence[torch.optim.Optimizer] = ()):
        """`optimizers`: none means AdamW for every parameter."""
        self.folder, self.model, self.plan, self.metadata = folder, model, plan, metadata
        self.optimizers = list(optimizers) or [
            torch.optim.AdamW(model.parameters(), plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)]
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.average = AveragedModel(model, multi_avg_fn=self._follow)
        self.step = self.samples = self.first_step = 0
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._resume()

    def train(self, loss_of: Callable[[int], dict[str, Tensor]]) -> None:
        """Repeat optimiser steps; `loss_of(step)` returns named terms, of which `loss` is minimised."""
        saved = time.monotonic()
        for _ in self._until_stopped():
            terms = loss_of(self.step)
            self.update(terms["loss"])
            if self.step % 50 == 0:
                self._log(terms)
            if time.monotonic() - saved > self.plan.save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write state and EMA weights; each file appears whole or not at all."""
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                 "average": self.average.state_dict(), "step": self.step, "samples": self.samples}
        write_whole(self.folder / "state.pt", lambda path: torch.save(state, path))
        write_weights(self.folder, self.average.module.state_dict(),
                      {**self.metadata, "step": self.step, "samples": self.samples})

    def start_from(self, folder: Path) -> None:
        """Begin with another run's EMA weights and a fresh optimiser; does nothing once this run has begun."""
        if self.step == 0:
            load_strictly(self.model, read_weights(folder), str(folder))
            self.average.module.load_state_dict(self.model.state_dict())
            self.samples = read_metadata(folder)["samples"]

    def update(self, loss: Tensor) -> None:
        """One optimiser step down this loss."""
        factor = self.plan.factor(self.step, (time.monotonic() - self.started) / 60)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        self.samples += self.plan.batch

    def _until_stopped(self) -> Iterator[None]:
        stopped = False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        self.started, self.first_step = time.monotonic(), self.step
        while not stopped and time.monotonic() - self.started < 60 * self.plan.minutes:
            yield

    def _log(self, terms: dict[str, Tensor]) -> None:
        speed = (self.step - self.first_step) * self.plan.batch / (time.monotonic() - self.started)
        line = {"step": self.step, "samples": self.samples, "samples_per_s": round(speed, 2),
                **{k: round(float(v.detach()), 5) for k, v in terms.items()}}
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, file=sys.stderr, flush=True)

    def _follow(self, averages: list[Tensor], weights: list[Tensor], _count: Tensor) -> None:
        """An exponential moving average that forgets its start: what was untrained would blur a short run's weights.

        It goes by the run's own count: torch's lives on the device, and reading it would wait for the whole step.
        """
        torch._foreach_lerp_(averages, weights, 1 - min(self.plan.ema, (1 + self.step) / (10 + self.step)))

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location=next(self.model.parameters()).device)
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.average.load_state_dict(state["average"])
        self.step, self.samples = state["step"], state["samples"]


def warmup(decay_steps: int, most: int) -> int:
    """Steps until the rates are full: a twentieth of the decay's, but no more than `most`."""
    return max(1, min(most, decay_steps // 20)) if decay_steps else most


def fastest_device() -> torch.device:
    """CUDA where there is one, its matrix units allowed for float32; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the hardware multiplies it fast; elsewhere on CPUs it costs ten times float32's time."""
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


def guarded(main: Callable[[], None]) -> None:
    """Run a command; a user's error is one line on stderr and exit code 2."""
    try:
        main()
    except CapHumanError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
