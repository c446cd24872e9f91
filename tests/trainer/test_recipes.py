"""The recipes against their sources: the paper's settings and the configs of the authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixcontrast_ext import Mining
from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.config import RECIPES, TrainConfig, flags_of_file, load_config, parse_flags
from pixcontrast_ext.trainer.data import dataset_spec
from pixcontrast_ext.trainer.models import MODELS
from pixcontrast_ext.trainer.train import build_criterion

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in RECIPES.glob("*.json"))

# By data set: (height, width) of the crop, steps, batch, learning rate, weight decay, training images.
SCHEDULES = {
    "cityscapes": ((512, 1024), 40_000, 8, 0.01, 5e-4, 2975),
    "pascal_context": ((520, 520), 60_000, 16, 0.001, 1e-4, 4998),
    "coco_stuff": ((520, 520), 60_000, 16, 0.001, 1e-4, 9000),
    "camvid": ((360, 480), 30_000, 16, 0.001, 1e-4, 367),
    "camvid_bank": ((360, 480), 40_000, 16, 0.01, 5e-4, 367),
}
# Contrast, weight, temperature, views of a class in an image, warm-up steps.
LOSSES = {
    "cityscapes_deeplabv3_resnet101": ("batch", 0.1, 0.1, 100, 5000),
    "cityscapes_hrnet_w48": ("batch", 0.1, 0.1, 100, 5000),
    "cityscapes_hrnet_w48_bank": ("bank", 1.0, 0.07, 1, 5000),
    "cityscapes_hrnet_w48_ocr": ("batch", 0.1, 0.1, 100, 5000),
    "pascal_context_deeplabv3_resnet101": ("batch", 0.1, 0.07, 100, 5000),
    "pascal_context_hrnet_w48": ("batch", 0.1, 0.07, 100, 5000),
    "pascal_context_hrnet_w48_ocr": ("batch", 0.1, 0.07, 100, 5000),
    "coco_stuff_hrnet_w48": ("batch", 0.1, 0.07, 100, 5000),
    "coco_stuff_hrnet_w48_ocr": ("batch", 0.1, 0.07, 100, 5000),
    "camvid_hrnet_w48": ("batch", 0.1, 0.07, 100, 5000),
    "camvid_hrnet_w48_bank": ("bank", 0.1, 0.07, 100, 3000),
    "camvid_hrnet_w48_ocr": ("batch", 0.1, 0.07, 100, 5000),
    "camvid_hrnet_w48_paper": ("bank", 1.0, 0.1, 100, 3000),
    "cityscapes_hrnet_w48_paper": ("bank", 1.0, 0.1, 100, 5000),
}


def test_there_is_a_recipe_for_each_experiment():
    assert sorted(LOSSES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipes_hold_the_numbers_of_their_source(name):
    config = load_config(Path(name))
    config.validate()
    dataset, loss, optim = config.data.dataset.removesuffix("_10k"), config.loss, config.optim
    assert name.removeprefix(f"{dataset}_").removesuffix("_bank").removesuffix("_paper") == config.net.model
    assert config.net.model in MODELS
    bank, of_paper = loss.contrast == "bank", name.endswith("_paper")
    schedule = SCHEDULES.get(f"{dataset}_bank" if bank else "", SCHEDULES[dataset])
    crop, steps, batch, rate, decay, images = schedule
    assert (config.data.crop, config.steps, config.batch_size) == (crop, steps, batch)
    assert (optim.optimizer, optim.lr, optim.weight_decay) == ("sgd", rate, decay)
    assert (optim.momentum, optim.nesterov, optim.power) == (0.9, False, 0.9)
    assert (optim.clip, optim.lr_warmup) == (0, 0)
    resized = dataset in ("pascal_context", "coco_stuff")
    assert (config.data.size, config.data.scale) == (None, 1.0)
    assert config.data.short_side == (520 if resized else None)
    assert config.data.zoom == (0.5, 2.0)
    # The authors' scripts for these pass --nbb_mult 10.
    assert optim.head_lr == (10.0 if resized and config.net.model.startswith("hrnet") else 1.0)
    assert (loss.contrast, loss.weight, loss.temperature, loss.max_views, loss.warmup_steps) == LOSSES[name]
    base_temperature = None if of_paper else 0.07
    assert (loss.base_temperature, loss.min_pixels) == (base_temperature, None)
    # Theirs are 1,024 on each of four GPUs.
    anchors = (1024, "rank") if of_paper else (4096, "ranks")
    assert (loss.max_samples, loss.max_samples_over) == anchors
    assert loss.aux_weight == 0.4
    assert config.net.pretrained
    assert config.net.embed_dim == 256
    assert config.data.augment
    assert config.data.dataset == ("coco_stuff_10k" if dataset == "coco_stuff" else dataset)
    assert loss.class_weights == ("cityscapes" if dataset == "cityscapes" else "off")
    views = config.inference
    assert (views.scales, views.flip, views.average) == ((0.5, 0.75, 1, 1.25, 1.5, 1.75, 2), True, "logits")
    if bank:
        assert loss.region_slots == min(5000, images)
        assert loss.pixel_slots == (10 * images if of_paper else min(5000, 10 * images))
        assert loss.pixels_per_image == 10
    criterion = build_criterion(loss, len(dataset_spec(dataset).classes), 8)
    assert criterion.contrast.temperature == loss.temperature
    assert criterion.contrast.base_temperature == base_temperature
    assert criterion.contrast.mining == (Mining("semi-hard", 2048, 1024, 0.1) if of_paper else None)


def test_flags_that_steer_the_sampling_reach_the_loss():
    flags = [
        "--anchors",
        "random",
        "--hard-fraction",
        "0.8",
        "--min-purity",
        "0.9",
        "--max-samples-over",
        "ranks",
    ]
    for given, expected in (([], ("hard", 0.5, 0.0, "rank")), (flags, ("random", 0.8, 0.9, "ranks"))):
        config = parse_flags(TrainConfig, given)
        config.validate()
        loss = build_criterion(config.loss, 3, 8).contrast
        assert (loss.anchors, loss.hard_fraction, loss.min_purity, loss.max_samples_over) == expected


@pytest.mark.parametrize("contrast", ["batch", "bank"])
def test_mining_reaches_the_loss(contrast):
    flags = [
        "--mining",
        "hardest",
        "--mining-negatives",
        "9",
        "--mining-positives",
        "7",
        "--mining-fraction",
        "0.5",
    ]
    for given, expected in (([], None), (flags, Mining("hardest", 9, 7, 0.5))):
        config = parse_flags(TrainConfig, [*given, "--contrast", contrast])
        config.validate()
        assert build_criterion(config.loss, 3, 8).contrast.mining == expected


@pytest.mark.parametrize("name", NAMES)
def test_recipes_say_where_they_are_from_and_how_they_depart(name):
    options = json.loads((RECIPES / f"{name}.json").read_text())
    of_paper = name.endswith("_paper")
    source = "arXiv 2101.11939: " if of_paper else "github.com/tfzhou/ContrastiveSeg at 287e5d3: configs/"
    assert options["_source"].startswith(source)
    assert len(options["_departs"]) > 40


def test_the_manual_has_all_departures_in_one_table():
    """Each departure of a recipe is a row of docs/trainer.md with the recipes it is of, and there is no other."""
    of = {name: json.loads((RECIPES / f"{name}.json").read_text())["_departs"].split("; ") for name in NAMES}
    scripts = [name for name in NAMES if not name.endswith("_paper")]
    kinds = {
        "the authors'": scripts,
        "the authors' with HRNet": [name for name in scripts if "hrnet" in name],
        "the authors' without a bank": [name for name in scripts if not name.endswith("_bank")],
    }
    rows = []
    for departure in dict.fromkeys(each for departures in of.values() for each in departures):
        recipes = [name for name in NAMES if departure in of[name]]
        kind = next((kind for kind, names in kinds.items() if names == recipes), None)
        rows.append(
            (-len(recipes), f"| {departure} | {kind or ', '.join(f'`{name}`' for name in recipes)} |")
        )
    table = [row for _, row in sorted(rows, key=lambda row: row[0])]
    manual = (ROOT / "docs/trainer.md").read_text()
    start = manual.index("| departure | recipes |\n|---|---|\n")
    assert manual[start:].split("\n\n")[0].splitlines()[2:] == table, "\n".join(table)


def test_a_recipe_is_found_by_its_name_and_flags_override_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_flags(TrainConfig, [*flags_of_file(Path("camvid_hrnet_w48")), "--lr", "0.5"])
    assert config.optim.lr == 0.5
    assert config.steps == 30_000
    assert config.out == Path("runs/camvid_hrnet_w48")
    Path("camvid_hrnet_w48").write_text('{"steps": 3}')  # a file takes precedence over a recipe
    assert load_config(Path("camvid_hrnet_w48")).steps == 3


def test_a_recipe_that_there_is_not_is_told_with_those_there_are(tmp_path, capsys):
    assert main(["train", "--config", "cityscapes_hrnet", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "error: config file cityscapes_hrnet does not exist, nor is it a recipe; those are"
    )
    assert all(name in message for name in NAMES)


def test_a_recipe_trains(camvid, tmp_path):
    """All the way from the command line, with a smaller network and a shorter schedule."""
    args = (
        "--model compact --no-pretrained --steps 2 --batch-size 2 --crop 32 40 --warmup-steps 0 --workers 0"
    )
    paths = ["--root", str(camvid()), "--out", str(tmp_path / "run")]
    options = [*args.split(), *paths, "--device", "cpu", "--embed-dim", "8", "--no-pictures"]
    assert main(["train", "--config", "camvid_hrnet_w48_bank", *options]) == 0
    saved = load_config(tmp_path / "run" / "config.json")
    assert saved.loss.region_slots == 367
    assert saved.data.crop == (32, 40)
