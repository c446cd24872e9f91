"""The record of a run, which a resumed run continues."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pixcontrast_ext.trainer.logs import RunLog, read_rows


def board(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def write(folder, steps, start=0, value=1.0):
    log = RunLog(folder, start)
    for step in steps:
        log.add("train", {"step": step, "loss": value})
        if step % 2 == 0:
            log.add("val", {"step": step, "miou": value, "river": float("nan")})
    log.sync()
    return log


def test_resuming_drops_what_comes_after_and_repeats_nothing(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])  # not closed: killed
    with (tmp_path / "train.csv").open("a") as file:
        file.write("6,0.1")  # killed in the middle of a row
    write(tmp_path, [4, 5, 6], start=3, value=2.0).close()
    rows = read_rows(tmp_path / "train.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [row["step"] for row in read_rows(tmp_path / "val.csv")] == [2, 4, 6]
    scalars = board(tmp_path)
    assert scalars["train/loss"] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert max(Counter(step for step, _ in scalars["val/miou"]).values()) == 1


def test_a_kill_while_resuming_loses_no_row(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3, 4]).close()

    def die(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            RunLog(tmp_path, 3)
    assert [row["step"] for row in read_rows(tmp_path / "train.csv")] == [1, 2, 3, 4]


def test_resuming_with_nothing_to_drop_leaves_the_record_alone(tmp_path):
    write(tmp_path, [1, 2]).close()
    before = (tmp_path / "train.csv").stat()
    write(tmp_path, [], start=2).close()
    after = (tmp_path / "train.csv").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert board(tmp_path)["train/loss"] == [(1, 1), (2, 1)]


def test_a_row_cut_short_is_not_read(tmp_path):
    write(tmp_path, [1, 2]).close()
    path = tmp_path / "train.csv"
    whole = path.read_text()
    for length in range(len("step,loss\n1,1.0\n"), len(whole)):
        path.write_text(whole[:length])
        assert [row["step"] for row in read_rows(path)] == [1]
    assert read_rows(tmp_path / "absent.csv") == []


def test_a_record_with_other_columns_is_not_continued(tmp_path):
    """Another version of the trainer may have begun the run; its numbers would shift by a column."""
    log = RunLog(tmp_path)
    log.add("val", {"step": 1, "miou": 0.5})
    before = (tmp_path / "val.csv").read_text()
    with pytest.raises(
        ValueError, match=r"val\.csv has the columns step,miou, this run writes step,loss,miou"
    ):
        log.add("val", {"step": 2, "loss": 1.0, "miou": 0.5})
    log.close()
    assert (tmp_path / "val.csv").read_text() == before
