"""A fair comparison: trainings that differ in their loss alone, seed by seed.

The runs of a seed start from the same weights and see the same images, augmented alike, in the same order. What a seed
decides is common to them, so the difference within a seed is what to look at, and its spread over the seeds says how
far to trust it.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shlex
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from pixcontrast_ext.trainer.balance import read_weights
from pixcontrast_ext.trainer.checkpoints import CheckpointStore, holds_run, step_of
from pixcontrast_ext.trainer.comparison import Comparison, draw_comparison, name_of, record
from pixcontrast_ext.trainer.config import TrainConfig, flags_of, flatten, load_config, parse_flags
from pixcontrast_ext.trainer.data import IGNORE, dataset_spec, eval_loader
from pixcontrast_ext.trainer.distributed import join_ranks
from pixcontrast_ext.trainer.evaluate import evaluate, load_model
from pixcontrast_ext.trainer.files import read_json, write_json
from pixcontrast_ext.trainer.logs import read_rows
from pixcontrast_ext.trainer.pictures import draw_panels, draw_tsne, pixel_features, spread
from pixcontrast_ext.trainer.train import Result, read_result, train

Method = Literal["off", "batch", "bank", "aa"]

_FLAGS: dict[str, str] = {
    "off": "--contrast off",
    "batch": "--contrast batch",
    "bank": "--contrast bank",
    "aa": "--contrast bank --weight 1e-9",
}

_HARMLESS = ("out", "root", "checkpoint_every", "keep_checkpoints", "pictures", "workers", "branch_from")
"""Options that may change between a comparison and its resumption: where things are, and what is kept."""

_RARE = 0.02


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Train each arm once with each of these seeds. --resume with more of them adds to a comparison."""
    methods: tuple[Method, ...] = ("off", "batch", "bank")
    """Arms. off: cross-entropy alone. batch: with contrast in the batch. bank: with the bank. aa: the bank at a weight
    of 1e-9, which shows what chance makes of equal losses. Differences are to the first."""
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """--arm NAME FLAGS: one more arm, with these flags of train, as in --arm region "--pixel-slots 0"; may be
    repeated."""
    split: str = "val"
    """Split to score at the last step; val is scored on the way too."""
    jobs: int = 1
    """Runs at a time, each in a process with its share of the threads."""
    shared_steps: int = 0
    """First steps that the runs of a seed have in common: they are trained once, without contrast. The banks are empty
    then."""
    rare: tuple[str, ...] = ()
    """Classes whose mean IoU is a secondary outcome; those below 2 % of the training pixels unless given."""
    run: TrainConfig = field(default_factory=lambda: TrainConfig(out=Path("runs/compare")))
    order: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Arms that come before all others: those of the comparison that goes on."""

    def arms(self) -> dict[str, list[str]]:
        """The flags of each arm, by its name. Raises ValueError for a name or flags that cannot be."""
        found: dict[str, list[str]] = {method: _FLAGS[method].split() for method in self.methods}
        for text in self.arm:
            name, _, flags = text.partition(" ")
            if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name[0] in "-.":
                raise ValueError(f"--arm is called {name!r}, must be of letters, digits, '-', '_' and '.'")
            if name in found or (name == "start" and self.shared_steps):
                raise ValueError(f"there are two arms called {name!r}")
            found[name] = shlex.split(flags)
            for flag in ("--seed", "--out", "--steps", "--stop-after", "--branch-from"):
                if any(each == flag or each.startswith(f"{flag}=") for each in found[name]):
                    raise ValueError(f"--arm {name} has {flag}, which all arms have in common")
        return {name: found[name] for name in dict.fromkeys((*self.order, *found))}

    def validate(self) -> None:
        """Raises ValueError that names the first option out of range and its value."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds is {self.seeds}, must be at least one and none twice")
        if min(self.seeds) < 0:
            raise ValueError(f"--seeds is {self.seeds}, must not be negative")
        if len(set(self.methods)) < len(self.methods) or not self.arms():
            raise ValueError(f"--methods is {self.methods}, must be at least one and none twice")
        spec = dataset_spec(self.run.data.dataset)
        if self.split not in spec.splits:
            raise ValueError(f"--split is {self.split!r}, must be one of {', '.join(spec.splits)}")
        if self.split in self.run.data.train_splits:
            raise ValueError(f"--split is {self.split!r}, which --train-splits has too")
        if unknown := [name for name in self.rare if name not in spec.classes]:
            raise ValueError(f"--rare names {', '.join(unknown)}; the classes are {', '.join(spec.classes)}")
        if self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}, must be at least 1")
        if self.jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"--jobs is {self.jobs}: under torchrun runs come one after the other")
        self.run.validate()
        if not 0 <= self.shared_steps < self.run.last_step:
            raise ValueError(
                f"--shared-steps is {self.shared_steps}, must be from 0 to below the last step {self.run.last_step}"
            )
        if self.run.branch_from is not None:
            raise ValueError(
                f"--branch-from is {self.run.branch_from}: a comparison shares steps by --shared-steps"
            )
        for (arm, _), run in self.runs().items():
            common, own = (flatten(each) for each in (self.run, run))
            for name in ("batch_size", *(each.name for each in fields(self.run.data))):
                if own[name] != common[name]:
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(
                        f"--arm {arm} has {flag} {own[name]!r}, but all arms train on the same: {common[name]!r}"
                    )
            if run.loss.class_weights not in ("off", "auto"):
                read_weights(Path(run.loss.class_weights), spec.classes)

    def runs(self) -> dict[tuple[str, int], TrainConfig]:
        """The training run of each arm and seed, seed by seed, in a folder of its own."""
        of_arm = {
            arm: parse_flags(
                TrainConfig, [*flags_of(flatten(self.run), self.run.out), *flags], prog=f"--arm {arm}"
            )
            for arm, flags in self.arms().items()
        }
        return {
            (arm, seed): self._of_seed(run, arm, seed) for seed in self.seeds for arm, run in of_arm.items()
        }

    def starts(self) -> dict[int, TrainConfig]:
        """The run that all those of a seed start from; none if they have no step in common."""
        if not self.shared_steps:
            return {}
        off = replace(self.run, stop_after=self.shared_steps, loss=replace(self.run.loss, contrast="off"))
        return {seed: replace(self._of_seed(off, "start", seed), branch_from=None) for seed in self.seeds}

    def _of_seed(self, run: TrainConfig, arm: str, seed: int) -> TrainConfig:
        start = self.run.out / f"start-seed{seed}" if self.shared_steps else None
        out = self.run.out / f"{arm}-seed{seed}"
        return replace(run, out=out, seed=seed, pictures=False, branch_from=start)


def compare(config: CompareConfig, *, resume: bool = False) -> Comparison:
    """Train all runs, seed by seed, and compare them.

    Leaves compare.json, compare.png, panels.png and, with `pictures`, tsne.png in `config.run.out`, with the options
    that the runs have in common. Under torchrun, every rank calls this.

    Args:
        config: what to compare.
        resume: go on where an earlier comparison was cut off, or add seeds and arms to it: what it has stays, and runs
            that it finished are not repeated.

    Raises:
        ValueError: an option is out of range, or `resume` finds a run that was trained with other options.
        FileExistsError: the folder holds a comparison or a run already and `resume` is not set, or another process
            is at it.
    """
    saved = config.run.out / "config.json"
    if saved.exists():
        if not resume:
            raise FileExistsError(
                f"{config.run.out} holds a comparison or a run already: --resume or choose another --out"
            )
        config = _with_saved(config, json.loads(saved.read_text()))
    config.validate()
    runs, starts = config.runs(), config.starts()
    for run in (*starts.values(), *runs.values()):
        run.validate()
        if holds_run(run.out):
            if not resume:
                raise FileExistsError(f"{run.out} holds a run already: --resume or choose another --out")
            _require_same_options(run)
    with join_ranks(config.run.device) as ranks:
        ranks.wait()  # all have looked at what is there
        with ranks.hold(config.run.out):
            if ranks.is_first:
                # To go on needs these too; they are no options of a training run, so they stand as comments.
                chosen = {f"_{name}": getattr(config, name) for name in COMPARE_OPTIONS}
                chosen["_order"] = list(config.arms())
                write_json(config.run.out / "config.json", {**chosen, **flatten(config.run)})
            finish_all(list(starts.values()), "val", config.jobs)
            found = dict(zip(runs, finish_all(list(runs.values()), config.split, config.jobs), strict=True))
            results = {arm: [found[arm, seed] for seed in config.seeds] for arm in config.arms()}
            rare = config.rare or rare_classes(config.run)
            looks = tuple(sorted({*_earlier_looks(config.run.out), len(config.seeds)}))
            comparison = Comparison(config.seeds, results, config.split, rare, looks)
            if ranks.is_first:
                _leave(config, comparison, ranks.device)
    return comparison


def _with_saved(config: CompareConfig, saved: dict[str, Any]) -> CompareConfig:
    """A comparison with the seeds and arms that it had, and those of `config` after them."""
    if "_seeds" not in saved:
        raise FileExistsError(f"{config.run.out} holds a run that is no comparison: choose another --out")
    before = replace(
        config,
        methods=tuple(saved["_methods"]),
        arm=tuple(saved["_arm"]),
        order=tuple(saved.get("_order", ())),
    )
    arms = {text.partition(" ")[0]: text for text in (*saved["_arm"], *config.arm)}
    return replace(
        config,
        order=tuple(before.arms()),
        seeds=tuple(dict.fromkeys((*saved["_seeds"], *config.seeds))),
        methods=tuple(dict.fromkeys((*saved["_methods"], *config.methods))),
        arm=tuple(arms.values()),
    )


def _earlier_looks(out: Path) -> list[int]:
    """After how many seeds a comparison has been looked at before."""
    if not (out / "compare.json").exists():
        return []
    told = read_json(out / "compare.json")
    looks: list[int] = told.get("looks", [len(told["seeds"])])
    return looks


COMPARE_OPTIONS = ("seeds", "methods", "arm", "split", "jobs", "shared_steps", "rare")
"""The options that are not those of a training run."""


def _leave(config: CompareConfig, comparison: Comparison, device: torch.device) -> None:
    out, spec = config.run.out, dataset_spec(config.run.data.dataset)
    write_json(out / "compare.json", record(comparison))
    draw_comparison(comparison, out / "compare.png")
    models = {
        name_of(arm): load_model(of_seed[0].out, device)[0] for arm, of_seed in comparison.results.items()
    }
    scenes = spec.build(config.run.data, config.split)
    draw_panels(models, scenes, spec, out / "panels.png", device, amp=config.run.amp)
    if config.run.pictures:
        clouds = {name: pixel_features(model, scenes, device) for name, model in models.items()}
        draw_tsne(clouds, spec, out / "tsne.png")


def rare_classes(run: TrainConfig) -> tuple[str, ...]:
    """The classes below 2 % of the labelled pixels of two hundred training images."""
    spec = dataset_spec(run.data.dataset)
    pixels = torch.zeros(256, dtype=torch.int64)
    for _, label in spread(spec.build(run.data, "train"), 200):
        pixels += torch.bincount(label.flatten(), minlength=256)
    pixels[IGNORE] = 0
    shares = pixels / pixels.sum().clamp(min=1)
    return tuple(name for name, share in zip(spec.classes, shares.tolist(), strict=False) if share < _RARE)


def finish_all(runs: list[TrainConfig], split: str, jobs: int) -> list[Result]:
    """Train what is not finished, `jobs` at a time, and read the results."""
    finished = [found for run in runs if (found := read_finished(run, split)) is not None]
    if len(finished) == len(runs):
        return finished
    if jobs == 1:
        return [finish(run, split) for run in runs]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    # Not a fork: torch's threads do not survive one.
    with (
        _environment(OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1"),
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
        ) as pool,
    ):
        waiting = [pool.submit(finish, run, split) for run in runs]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs goes on, and --resume finds it
            raise


def _end_with(parent: int) -> None:
    """Make this process end with its parent, so that nothing trains on in a folder that --resume may take up."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def finish(run: TrainConfig, split: str) -> Result:
    """The result of a run, trained to its end if it is not yet, with the scores of `split`."""
    spec = dataset_spec(run.data.dataset)
    if not _is_trained(run):
        train(run, resume=holds_run(run.out))
    with join_ranks(run.device) as ranks:
        if read_finished(run, split) is None:
            model, _, step = load_model(run.out, ranks.device)
            loader = eval_loader(
                spec.build(run.data, split), max(1, run.batch_size // ranks.world), rank=ranks.rank,
                world=ranks.world, workers=run.data.workers, pin_memory=ranks.device.type == "cuda",
            )  # fmt: skip
            scores = evaluate(model, loader, spec.classes, ranks, amp=run.amp)
            if ranks.is_first:
                found = {
                    "miou": scores.miou,
                    "pixel_accuracy": scores.pixel_accuracy,
                    "class_iou": scores.class_iou,
                }
                write_json(_scores_of(run, split), {"step": step, **found})
        ranks.wait()
    result = read_finished(run, split)
    assert result is not None
    return result


def read_finished(run: TrainConfig, split: str) -> Result | None:
    """The result of a run with the scores of `split`; None if it is not at its end, or not yet scored on that."""
    if not _is_trained(run):
        return None
    result = read_result(run.out, dataset_spec(run.data.dataset).classes)
    if split == "val":
        return result
    if not _scores_of(run, split).exists():
        return None
    scored = read_json(_scores_of(run, split))
    if scored["step"] != run.last_step or "confusion" in scored:  # `eval --out` once took this name
        return None
    return replace(result, **{name: scored[name] for name in ("miou", "pixel_accuracy", "class_iou")})


def _is_trained(run: TrainConfig) -> bool:
    rows, checkpoints = read_rows(run.out / "val.csv"), CheckpointStore(run.out / "checkpoints").paths()
    return bool(rows and checkpoints) and rows[-1]["step"] == step_of(checkpoints[-1]) == run.last_step


def _scores_of(run: TrainConfig, split: str) -> Path:
    return run.out / f"{split}.json"


def _require_same_options(run: TrainConfig) -> None:
    """Raises ValueError unless the run in the folder of `run` has the options of that which might change its result."""
    if not (run.out / "config.json").exists():
        raise ValueError(
            f"{run.out} has what is left of a run, and no config.json that tells its options: remove it or choose "
            "another --out"
        )
    before, now = flatten(load_config(run.out / "config.json")), flatten(run)
    changed = [
        f"--{name.replace('_', '-')} {before[name]!r}, now {now[name]!r}"
        for name in now
        if name not in _HARMLESS and before[name] != now[name]
    ]
    if (before["branch_from"] is None) != (now["branch_from"] is None):
        changed.append("--shared-steps" if now["branch_from"] is None else "no --shared-steps")
    if changed:
        raise ValueError(f"{run.out} was trained with {'; '.join(changed)}: choose another --out")
