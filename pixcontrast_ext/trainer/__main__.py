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

import tyro

from pixcontrast_ext.trainer.check import describe, take_census
from pixcontrast_ext.trainer.checkpoints import CheckpointError
from pixcontrast_ext.trainer.compare import COMPARE_OPTIONS, CompareConfig, compare
from pixcontrast_ext.trainer.comparison import table
from pixcontrast_ext.trainer.config import (
    DataConfig,
    InferenceConfig,
    TrainConfig,
    flags_of,
    flags_of_file,
    flatten,
    parse_flags,
)
from pixcontrast_ext.trainer.data import dataset_spec, eval_loader
from pixcontrast_ext.trainer.datasets.labelled import LabelledFiles
from pixcontrast_ext.trainer.demo import DemoConfig, demo
from pixcontrast_ext.trainer.distributed import join_ranks
from pixcontrast_ext.trainer.evaluate import evaluate, export_model, load_model
from pixcontrast_ext.trainer.files import write_json
from pixcontrast_ext.trainer.pictures import draw_confusion, draw_panels
from pixcontrast_ext.trainer.predict import predict_folder
from pixcontrast_ext.trainer.probe import ProbeConfig, probe
from pixcontrast_ext.trainer.probe import table as probe_table
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
    """Evaluate a checkpoint: mean and per-class IoU, pixel accuracy, and pictures."""

    checkpoint: Path
    """A checkpoint file, or the folder of a run for its newest."""
    split: str = "val"
    """Split of the dataset."""
    root: Path | None = None
    """Folder of the dataset, if not where it was in training."""
    batch_size: int = 8
    """Images at a time, per rank."""
    workers: int = 0
    """Processes that load data, per rank; 0 loads in this one."""
    device: str = "auto"
    """cuda, cpu, or auto for cuda where there is one."""
    out: Path | None = None
    """Folder for eval-SPLIT.json with the scores and the confusion matrix, its picture and panels (PNG); only printed
    unless given."""
    original_size: bool = False
    """Score labels as they are in their files, however the images were resized."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass(frozen=True)
class PredictCommand:
    """Write masks and overlays of a folder of images."""

    checkpoint: Path
    """A checkpoint file, an exported one, or the folder of a run for its newest."""
    images: Path
    """Folder of the images; those in it are read too."""
    out: Path
    """Folder for masks (palette PNG), overlays (PNG) and classes.json."""
    ids: bool = False
    """Masks hold the dataset's own ids, as for a test server (Cityscapes: labelIds)."""
    device: str = "auto"
    """cuda, cpu, or auto for cuda where there is one."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass(frozen=True)
class ExportCommand:
    """Write the model of a checkpoint alone: no projection head, no memory bank, no optimiser."""

    checkpoint: Path
    """A checkpoint file, or the folder of a run for its newest."""
    out: Path
    """File to write: a dictionary by torch.save, with the state dict under "model"."""


@dataclass(frozen=True)
class CompareCommand:
    """Train with cross-entropy, contrast in the batch, and contrast with the bank, and compare.

    All start from the same weights and see the same batches.
    """

    config: Path | None = None
    """JSON file of options or the name of a recipe, as for train. --methods and --seeds override those in it."""
    resume: bool = False
    """Go on where an earlier comparison in --out was cut off."""
    compare: CompareConfig = field(default_factory=CompareConfig)


@dataclass(frozen=True)
class ProbeCommand:
    """Say what the pixel features of runs are worth, apart from their classifiers."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or checkpoints, of one dataset."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)


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
    options = _options_before(command.config, command.resume, command.run.out)
    if options:
        command = parse_flags(TrainCommand, [*options, *args], prog=_prog("train"))
    elif command.resume and not {arg.partition("=")[0] for arg in args if arg[:2] == "--"} - {
        "--resume",
        "--out",
    }:
        raise ValueError(
            f"{command.run.out} has no run to resume, which has a config.json, and no option says what to train"
        )
    result = train(command.run, resume=command.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"mIoU {result.miou:.4f} on val, {result.seconds_per_step:.3f} s per step, all in {result.out}")


def run_eval(args: Sequence[str]) -> None:
    command = parse_flags(EvalCommand, args, prog=_prog("eval"))
    if command.batch_size < 1:
        raise ValueError(f"--batch-size is {command.batch_size}, must be at least 1")
    _check_workers(command.workers)
    with join_ranks(command.device) as ranks:
        model, config, step = load_model(command.checkpoint, ranks.device)
        command = parse_flags(EvalCommand, [*_usual(config, args), *args], prog=_prog("eval"))
        command.inference.validate()
        spec = dataset_spec(config.data.dataset)
        data = replace(config.data, root=command.root or config.data.root)
        dataset = spec.build(data, command.split)
        if command.original_size:
            if not isinstance(dataset, LabelledFiles):
                raise ValueError(
                    f"--original-size needs labels in files, and {config.data.dataset!r} has none"
                )
            dataset.resize = replace(dataset.resize, labels=False)
        loader = eval_loader(
            dataset,
            command.batch_size,
            rank=ranks.rank,
            world=ranks.world,
            workers=command.workers,
            pin_memory=ranks.device.type == "cuda",
        )
        scores = evaluate(model, loader, spec.classes, ranks, options=command.inference, amp=config.amp)
        if not ranks.is_first:
            return
        rows = {**scores.class_iou, "mIoU": scores.miou, "pixel accuracy": scores.pixel_accuracy}
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"{name:{width}}  {value:.4f}")
        print(f"{config.data.dataset} {command.split}, step {step}")
        if command.out is not None:
            command.out.mkdir(parents=True, exist_ok=True)
            record = {
                "step": step,
                "split": command.split,
                **flatten(command.inference),
                "miou": scores.miou,
                "pixel_accuracy": scores.pixel_accuracy,
                "class_iou": scores.class_iou,
                "confusion": scores.confusion.tolist(),
            }
            write_json(command.out / f"eval-{command.split}.json", record)
            draw_confusion(
                scores.confusion, spec.classes, command.out / f"eval-{command.split}-confusion.png"
            )
            draw_panels(
                {"prediction": model},
                dataset,
                spec,
                command.out / f"eval-{command.split}.png",
                ranks.device,
                options=command.inference,
                amp=config.amp,
            )


def run_predict(args: Sequence[str]) -> int:
    command = parse_flags(PredictCommand, args, prog=_prog("predict"))
    _require_one_process("predict")
    with join_ranks(command.device) as ranks:
        model, config, _ = load_model(command.checkpoint, ranks.device)
        command = parse_flags(PredictCommand, [*_usual(config, args), *args], prog=_prog("predict"))
        command.inference.validate()
        predicted = predict_folder(
            model,
            dataset_spec(config.data.dataset),
            config.data,
            command.images,
            command.out,
            ranks.device,
            options=command.inference,
            amp=config.amp,
            ids=command.ids,
        )
    print(f"{predicted.images} images predicted, masks and overlays in {command.out}")
    for problem in predicted.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if predicted.problems else 0


def run_export(args: Sequence[str]) -> None:
    command = parse_flags(ExportCommand, args, prog=_prog("export"))
    _require_one_process("export")
    parameters = export_model(command.checkpoint, command.out)
    print(f"{parameters:,} parameters in {command.out}")


def run_compare(args: Sequence[str]) -> None:
    args = joined_arms(args)
    for flag, instead in (("--seed", "--seeds"), ("--contrast", "--methods or --arm")):
        if any(arg == flag or arg.startswith(f"{flag}=") for arg in args):
            raise ValueError(f"compare takes {instead}, not {flag}")
    command = parse_flags(CompareCommand, args, prog=_prog("compare"))
    out = command.compare.run.out
    options = _options_before(command.config, command.resume, out)
    before = out / "config.json" if command.config is None else command.config
    if options and before.is_file():  # a recipe is of one run
        saved = json.loads(before.read_text())
        given = {arg.partition("=")[0] for arg in args}
        for name in COMPARE_OPTIONS:
            flag, value = f"--{name.replace('_', '-')}", saved.get(f"_{name}")
            if value is None or flag in given:  # given, it replaces the saved one: of --arm both would count
                continue
            if name == "arm":
                options += [word for text in value for word in (flag, text)]
            elif not isinstance(value, list):
                options += [flag, str(value)]
            else:
                options += [flag, *map(str, value)]
    if options:
        command = parse_flags(CompareCommand, [*options, *args], prog=_prog("compare"))
        out = command.compare.run.out
    comparison = compare(command.compare, resume=command.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{table(comparison)}\n\nAll in {out}: compare.json, compare.png, panels.png and the runs")


def joined_arms(args: Sequence[str]) -> list[str]:
    """`--arm NAME FLAGS` as one word after the flag, since a parser would take the flags for flags of its own."""
    joined, rest = [], iter(args)
    for arg in rest:
        joined.append(arg)
        if arg == "--arm":
            name, flags = next(rest, None), next(rest, None)
            if name is None or flags is None or name.startswith("-"):
                raise ValueError('--arm takes a name and flags in quotes: --arm region "--pixel-slots 0"')
            joined.append(f"{name} {flags}")
    return joined


def run_probe(args: Sequence[str]) -> None:
    command = parse_flags(ProbeCommand, args, prog=_prog("probe"))
    _require_one_process("probe")
    print(probe_table(probe(command.runs, command.probe)))
    if command.probe.out is not None:
        print(f"\nAll in {command.probe.out}: probe.json, probe.png and probe-tsne.png")


def run_check_data(args: Sequence[str]) -> int:
    command = parse_flags(CheckDataCommand, args, prog=_prog("check-data"))
    _check_workers(command.workers)
    _require_one_process("check-data")
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
    "predict": (run_predict, "write masks and overlays of a folder of images"),
    "export": (run_export, "write a checkpoint's model without what only training needs"),
    "compare": (
        run_compare,
        "train without contrast, with it in the batch and with the bank, over several seeds",
    ),
    "probe": (run_probe, "say what the pixel features of runs are worth, apart from their classifiers"),
    "check-data": (run_check_data, "read a dataset through and list what is wrong with its files"),
    "demo": (run_demo, "train without and with the contrast on synthetic scenes and show both"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for files with problems, 2 for bad input (told on stderr)."""
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
        print(f"error: {_told(error)}", file=sys.stderr)
        return 2


def _usual(config: TrainConfig, args: Sequence[str]) -> list[str]:
    """The flags of how a run's images are predicted unless `args` tells otherwise; a new window has its own stride."""
    views = config.inference
    if any(arg.partition("=")[0] == "--window" for arg in args):
        views = replace(views, stride=None)
    return flags_of(flatten(views), config.out)


def _options_before(config: Path | None, resume: bool, out: Path) -> list[str]:
    """The flags that go before those of the command line: of --config, or else of what is resumed in `out`."""
    saved = out / "config.json"
    if config is None and resume and saved.exists():
        # What was moved goes on where it is now, not where its file says it was.
        return [*flags_of_file(saved), "--out", str(out)]
    return flags_of_file(config) if config is not None else []


def _require_one_process(command: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ValueError(f"{command} runs in one process, not in {world}")


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise ValueError(f"--workers is {workers}, must be at least 0")


def _told(error: Exception) -> str:
    """What an error says; of one in a loading process, without the traceback that it is wrapped in."""
    said = str(error)
    if "in DataLoader worker process" in said:
        return said.rstrip().splitlines()[-1].partition(": ")[2] or said
    return said


def _prog(command: str) -> str:
    return f"python -m pixcontrast_ext.trainer {command}"


if __name__ == "__main__":
    sys.exit(main())
