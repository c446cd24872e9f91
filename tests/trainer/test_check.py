"""`check-data`: the census of a dataset, and the list of problems."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.check import take_census
from pixcontrast_ext.trainer.config import DataConfig


def test_a_census_counts_every_pixel(camvid):
    census = take_census(DataConfig(dataset="camvid", root=camvid(count=3)), "val")
    assert census.images == 3
    assert not census.problems
    seen = {name: count for name, count in census.pixels.items() if count}
    assert seen == {"sky": 3 * 18 * 48, "road": 3 * (18 * 48 - 6 * 8)}
    assert census.ignored == 3 * 6 * 8
    assert len(census.pixels) == 11


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data_goes_on_after_a_problem_and_lists_them(cityscapes, capsys, monkeypatch, workers):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    args = ["check-data", "--dataset", "cityscapes", "--root", str(cityscapes), "--workers", str(workers)]
    assert main(args) == 0
    printed = capsys.readouterr()
    assert printed.out.count("4 images") == 2
    assert printed.out.count("0 problems") == 2
    assert "train: 100%" in printed.err  # the progress bars
    assert "val: 100%" in printed.err
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["traffic", "light", "24", "2.94%"] in lines
    assert ["ignored", "360", "44.12%"] in lines

    folder = cityscapes / "gtFine" / "train"
    (folder / "zurich" / "zurich_000000_000020_gtFine_labelIds.png").unlink()
    Image.fromarray(np.full((12, 17), 77, np.uint8)).save(
        folder / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    )
    broken = cityscapes / "leftImg8bit/train/aachen/aachen_000000_000020_leftImg8bit.png"
    broken.write_bytes(broken.read_bytes()[:70])
    assert main([*args, "--split", "train"]) == 1
    printed = capsys.readouterr().out
    assert "1 images" in printed
    assert "3 problems" in printed
    assert "cityscapes val" not in printed
    for problem in (
        "zurich_000000_000020_leftImg8bit.png has no label",
        "aachen_000000_000019_gtFine_labelIds.png has values [77] outside 0..33, 255",
        "aachen_000000_000020_leftImg8bit.png cannot be read as an image",
    ):
        assert problem in printed


def test_check_data_of_no_data_is_a_problem(tmp_path, capsys):
    assert main(["check-data", "--dataset", "coco_stuff", "--root", str(tmp_path), "--split", "val"]) == 1
    assert f"folder {tmp_path / 'images' / 'val2017'} does not exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "nope"], "error: --dataset is 'nope', must be one of"),
        (
            ["--dataset", "synthetic", "--split", "test"],
            "error: --split is 'test', must be one of train, val",
        ),
        (["--dataset", "synthetic", "--workers", "-1"], "error: --workers is -1"),
    ],
)
def test_bad_input_is_a_message(capsys, args, message):
    assert main(["check-data", *args]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_png_with_a_damaged_chunk_is_named(camvid, capsys):
    """Pillow raises SyntaxError for such a file, of all things."""
    root = camvid()
    path = root / "val" / "val1.png"
    noise = np.random.default_rng(0).integers(0, 255, (360, 480, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    path.write_bytes(content[:second] + b"\x01\x02\x03\x04" + content[second + 4 :])
    assert main(["check-data", "--dataset", "camvid", "--root", str(root), "--split", "val"]) == 1
    assert f"{path} cannot be read as an image: broken PNG file" in capsys.readouterr().out
