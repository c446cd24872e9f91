"""The command line: `python -m pixcontrast_ext.trainer COMMAND --help`.

A command is a dataclass of its flags and a function that takes it, in `COMMANDS`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pixcontrast_ext.trainer.check import describe, take_census
from pixcontrast_ext.trainer.checkpoints import CheckpointError
from pixcontrast_ext.trainer.config import DataConfig, TrainConfig, flags_of_file, parse_flags
from pixcontrast_ext.trainer.data import dataset_spec
from pixcontrast_ext.trainer.demo import DemoConfig, demo
from pixcontrast_ext.trainer.distributed import join_ranks
from pixcontrast_ext.trainer.evaluate import evaluate, load_model
from pixcontrast_ext.trainer.pictures import draw_panels
from pixcontrast_ext.trainer.train import train


@dataclass(frozen=True)
class TrainCommand:
    """Train a model. Start it with torchrun to train on several ranks."""

    config: Path | None = None
    """JSON file of options, or the name of a recipe such as cityscapes_hrnet_w48; flags given here override it. Every
    run saves its own as config.json."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --out, with the options saved there unless given anew."""
    run: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a checkpoint: mean and per-class IoU, and pictures."""

    checkpoint: Path
    """A checkpoint file, or the folder of a run for its newest."""
    split: str = "val"
    """Split of the dataset."""
    root: Path | None = None
    """Folder of the dataset, if not where it was in training."""
    batch_size: int = 8
    """Images at a time."""
    device: str = "auto"
    """cuda, cpu, or auto for cuda where there is one."""
    out: Path | None = None
    """Folder for the scores (JSON) and panels (PNG); only printed unless given."""


@dataclass(frozen=True)
class CheckDataCommand:
    """Read a dataset through: count images and pixels of each class, and list every file that is not as expected."""

    dataset: str
    """Name of the dataset, as for train."""
    root: Path | None = None
    """Folder of a dataset that is read from files."""
    split: str | None = None
    """The split to read; all of them unless given."""
    train_ids: bool = False
    """Cityscapes: read the *_labelTrainIds.png."""
    workers: int = 0
    """Processes that read; 0 reads in this one."""


def run_train(args: Sequence[str]) -> None:
    command = parse_flags(TrainCommand, args, prog=_prog("train"))
    saved = command.run.out / "config.json"
    source = saved if command.resume and command.config is None and saved.exists() else command.config
    if source is not None:
        # A moved run goes on where it is now, not where its file says it was.
        here = ["--out", str(command.run.out)] if source == saved else []
        command = parse_flags(TrainCommand, [*flags_of_file(source), *here, *args], prog=_prog("train"))
    result = train(command.run, resume=command.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"mIoU {result.miou:.4f} on val, {result.seconds_per_step:.3f} s per step, all in {result.out}")


def run_eval(args: Sequence[str]) -> None:
    command = parse_flags(EvalCommand, args, prog=_prog("eval"))
    if command.batch_size < 1:
        raise ValueError(f"--batch-size is {command.batch_size}, must be at least 1")
    with join_ranks(command.device) as ranks:
        model, config, step = load_model(command.checkpoint, ranks.device)
        spec = dataset_spec(config.data.dataset)
        data = replace(config.data, root=command.root or config.data.root)
        dataset = spec.build(data, command.split)
        scores = evaluate(model, dataset, spec.classes, ranks, batch_size=command.batch_size, amp=config.amp)
        if not ranks.is_first:
            return
        width = max(map(len, spec.classes))
        for name, iou in scores.class_iou.items():
            print(f"{name:{width}}  {iou:.4f}")
        print(f"{'mIoU':{width}}  {scores.miou:.4f}   ({config.data.dataset} {command.split}, step {step})")
        if command.out is not None:
            command.out.mkdir(parents=True, exist_ok=True)
            record = {
                "step": step,
                "split": command.split,
                "miou": scores.miou,
                "class_iou": scores.class_iou,
            }
            (command.out / f"{command.split}.json").write_text(json.dumps(record, indent=2) + "\n")
            draw_panels(
                {"prediction": model}, dataset, spec, command.out / f"{command.split}.png", ranks.device
            )


def run_check_data(args: Sequence[str]) -> int:
    command = parse_flags(CheckDataCommand, args, prog=_prog("check-data"))
    if command.workers < 0:
        raise ValueError(f"--workers is {command.workers}, must be at least 0")
    data = DataConfig(
        dataset=command.dataset, root=command.root, train_ids=command.train_ids, workers=command.workers
    )
    splits = [command.split] if command.split is not None else dataset_spec(command.dataset).splits
    found = 0
    for split in splits:
        census = take_census(data, split)
        print(f"{command.dataset} {split}: {describe(census)}")
        found += len(census.problems)
    return 1 if found else 0


def run_demo(args: Sequence[str]) -> None:
    demo(parse_flags(DemoConfig, args, prog=_prog("demo")))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int | None], str]] = {
    "train": (run_train, "train a model, with or without the contrast"),
    "eval": (run_eval, "evaluate a checkpoint"),
    "check-data": (run_check_data, "read a dataset through and list what is wrong with its files"),
    "demo": (run_demo, "train without and with the contrast on synthetic scenes and show both"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for data with problems, 2 for bad input (told on stderr)."""
    given = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not given or given[0] not in COMMANDS:
        asked = bool(given) and given[0] in ("-h", "--help")
        usage = "\n".join(f"  {name:12}{text}" for name, (_, text) in COMMANDS.items())
        print(f"usage: {_prog('COMMAND')} [--help] ...\n\n{usage}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return COMMANDS[given[0]][0](given[1:]) or 0
    except (ValueError, OSError, ImportError, CheckpointError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _prog(command: str) -> str:
    return f"python -m pixcontrast_ext.trainer {command}"


if __name__ == "__main__":
    sys.exit(main())
