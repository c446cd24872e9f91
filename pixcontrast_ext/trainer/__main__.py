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

from pixcontrast_ext.trainer.checkpoints import CheckpointError
from pixcontrast_ext.trainer.config import TrainConfig, flags_of_file, parse_flags
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
    """JSON file of options; flags given here override it. Every run saves its own as config.json."""
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


def run_demo(args: Sequence[str]) -> None:
    demo(parse_flags(DemoConfig, args, prog=_prog("demo")))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (run_train, "train a model, with or without the contrast"),
    "eval": (run_eval, "evaluate a checkpoint"),
    "demo": (run_demo, "train without and with the contrast on synthetic scenes and show both"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, or 2 for bad input, with its message on stderr."""
    given = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not given or given[0] not in COMMANDS:
        asked = bool(given) and given[0] in ("-h", "--help")
        usage = "\n".join(f"  {name:8}{text}" for name, (_, text) in COMMANDS.items())
        print(f"usage: {_prog('COMMAND')} [--help] ...\n\n{usage}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        COMMANDS[given[0]][0](given[1:])
    except (ValueError, OSError, CheckpointError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _prog(command: str) -> str:
    return f"python -m pixcontrast_ext.trainer {command}"


if __name__ == "__main__":
    sys.exit(main())
