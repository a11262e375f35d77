"""Draws every column's portraits of the same triples and measures them; what has a record is not done again."""
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from caphuman_edge.quant.fidelity_bench import Bench, Pipes
from caphuman_edge.quant.fidelity_columns import Column
from caphuman_edge.quant.fidelity_pixels import picture_psnr, ssim
from caphuman_edge.quant.heldout import Pair
from caphuman_edge.quant.measures import ANGLES, expression_units
from caphuman_edge.quant.records import Record
from caphuman_edge.quant.tasks import Task
from caphuman_edge.runtime.cli.output import make_folder
from caphuman_edge.runtime.image import load_photo, save_png
from caphuman_edge.runtime.noise import cuda_normal
from caphuman_edge.runtime.perceive import Subject
from caphuman_edge.runtime.portrait import AI_GENERATED
from caphuman_edge.runtime.request import Settings
from caphuman_edge.runtime.selftest import psnr_db

CONDITIONING, INDEPENDENT = "conditioning", "independent"  # the face networks
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def record_column(bench: Bench, pipes: Pipes, column: Column, pairs: Sequence[Pair], progress: Progress) -> None:
    """Draw and measure what is missing of a column."""
    records = bench.records(column)
    make_folder(records.path.parent)
    done = records.read()
    for k, pair in enumerate(pairs):
        if pair.number not in done:
            records.add(_record(bench, pipes, column, pair))
        progress(column.title, k + 1, len(pairs))


def record_likeness(bench: Bench, column: Column, reference: Column, pairs: Sequence[Pair]) -> None:
    """Compare what is missing of a column's portraits with the reference's, pixel by pixel."""
    records = bench.against(column, reference)
    done, drawn = records.read(), bench.records(reference).read()
    for pair in pairs:
        if pair.number not in done and not drawn[pair.number].get("skipped"):
            found, wanted = (load_photo(bench.portrait_file(which, pair)) for which in (column, reference))
            records.add({"pair": pair.number, "psnr": picture_psnr(found, wanted), "ssim": ssim(found, wanted)})


def record_steps(bench: Bench, pipes: Pipes, column: Column, reference: Column, pairs: Sequence[Pair],
                 progress: Progress) -> None:
    """The error of eps at each step of the reference's trajectories, where the column's prediction is to be its own."""
    records = bench.steps(column, reference)
    done = records.read()
    for k, pair in enumerate(pairs):
        task = bench.tasks.task(pair) if pair.number not in done else None
        if task is not None:
            timesteps, latents, wanted = _trajectory(bench, pipes, reference, pair, task)
            eps = pipes.of(column).predictor(task.reference, task.head, _settings(reference, task, pair))
            found = [eps(latent, int(timestep)) for latent, timestep in zip(latents, timesteps, strict=True)]
            pairs_of_eps = list(zip(found, wanted, strict=True))
            records.add({"pair": pair.number, "timesteps": timesteps.tolist(),
                         "relative": [_relative(*both) for both in pairs_of_eps],
                         "psnr": [psnr_db(*both) for both in pairs_of_eps]})
        progress(f"{column.place}, eps by step", k + 1, len(pairs))


def record_trajectories(bench: Bench, pipes: Pipes, reference: Column, pairs: Sequence[Pair],
                        progress: Progress) -> None:
    """The reference's trajectories, while its pipeline is open."""
    make_folder(bench.folder(reference))
    for k, pair in enumerate(pairs):
        if not bench.trajectory_file(reference, pair).exists():
            task = bench.tasks.task(pair)
            if task is not None:
                _trajectory(bench, pipes, reference, pair, task)
        progress(f"{reference.title}, trajectories", k + 1, len(pairs))


def light_degrees(found: np.ndarray, wanted: np.ndarray) -> float:
    """The angle between two lights' main directions, of (9, 3) spherical harmonics."""
    one, other = (light[1:4].mean(axis=1).astype(np.float64) for light in (found, wanted))
    cosine = one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _record(bench: Bench, pipes: Pipes, column: Column, pair: Pair) -> Record:
    """One triple: what is asked for, and what the portrait shows of it."""
    task = bench.tasks.task(pair)
    if task is None:
        return {"pair": pair.number, "reference": pair.reference, "skipped": True}
    file = bench.portrait_file(column, pair)
    if not file.exists():
        *_, last = pipes.of(column).generate(task.reference, task.head, _settings(column, task, pair))
        save_png(file, last.image.pixels, AI_GENERATED)
    wanted = {"angles": dict(zip(ANGLES, task.head.angles, strict=True)), "units": expression_units(task.target.face),
              "attributes": task.attributes}
    return {"pair": pair.number, "reference": pair.reference, "target": task.target_name, "prompt": task.prompt,
            "wanted": wanted, "answer": _measured(bench, load_photo(file), task)}


def _measured(bench: Bench, picture: np.ndarray, task: Task) -> dict[str, Any]:
    """All that is measured of a portrait; only `found: false` where it shows no face."""
    seen = bench.measurer.see(picture)
    if seen is None:
        return {"found": False}
    vectors, photo = (_identities(bench, subject) for subject in (seen, task.reference))
    return {"found": True, **bench.measurer.head_figures(seen, task.head),
            "light": light_degrees(seen.head.light, task.head.light), "attributes": bench.measurer.attributes(seen),
            "own": {name: float(vector @ photo[name]) for name, vector in vectors.items()},
            "vectors": {name: np.round(vector.astype(np.float64), 6).tolist() for name, vector in vectors.items()}}


def _identities(bench: Bench, subject: Subject) -> dict[str, np.ndarray]:
    independent = {INDEPENDENT: bench.judge(subject.photo, subject.face)} if bench.judge else {}
    return {CONDITIONING: subject.identity, **independent}


def _trajectory(bench: Bench, pipes: Pipes, reference: Column, pair: Pair,
                task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps (n), latents that the reference's steps begin with and eps predicted there, both (n, 1, c, h, w)."""
    file = bench.trajectory_file(reference, pair)
    with suppress(OSError, ValueError, EOFError, KeyError), np.load(file) as kept:  # a damaged one is made again
        return kept["timesteps"], kept["latents"], kept["eps"]
    pipe, settings = pipes.of(reference), _settings(reference, task, pair)
    steps = list(pipe.generate(task.reference, task.head, settings))
    noise = cuda_normal(pair.seed, (1, *pipe.bundle.config.latent_shape))
    latents = [noise, *(step.latent for step in steps[:-1])]
    eps = pipe.predictor(task.reference, task.head, settings)
    timesteps = np.array([step.timestep for step in steps])
    predicted = [eps(latent, step.timestep) for latent, step in zip(latents, steps, strict=True)]
    scratch = file.with_suffix(".part.npz")
    np.savez(scratch, timesteps=timesteps, latents=np.stack(latents), eps=np.stack(predicted))
    scratch.replace(file)
    return timesteps, np.stack(latents), np.stack(predicted)


def _settings(column: Column, task: Task, pair: Pair) -> Settings:
    return replace(column.settings, prompt=task.prompt, seed=pair.seed)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """The error's size as a share of the prediction's."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
