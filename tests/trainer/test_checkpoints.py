"""The checkpoint store: what it keeps, and how it survives a damaged file or an interrupted write."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from pixcontrast_ext.trainer import checkpoints
from pixcontrast_ext.trainer.checkpoints import CheckpointError, CheckpointStore, read_checkpoint


def state(step: int) -> dict:
    return {"step": step, "model": {"weight": torch.full((400,), float(step))}, "config": {}}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        store.save(step, state(step))
    return store


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 30.0).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def test_the_last_ones_are_kept(store):
    assert [checkpoints.step_of(path) for path in store.paths()] == [20, 30]
    path, loaded = store.load_latest()
    assert path == store.paths()[-1]
    assert loaded["step"] == 30
    assert torch.equal(loaded["model"]["weight"], torch.full((400,), 30.0))
    assert torch.load(path, weights_only=True)["step"] == 30


def test_no_checkpoints_is_none(tmp_path):
    assert CheckpointStore(tmp_path / "nothing").load_latest() is None


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_used(store, damage, caplog):
    newest = store.paths()[-1]
    damage(newest)
    with pytest.raises(
        CheckpointError, match=f"{newest.name} is damaged: its content does not match the checksum"
    ):
        read_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        path, loaded = store.load_latest()
    assert loaded["step"] == 20
    assert path == store.paths()[0]
    assert newest.name in caplog.text
    assert "trying the one before it" in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(store):
    for path in store.paths():
        truncate(path)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        store.load_latest()


def test_saving_a_step_again_replaces_it(store):
    truncate(store.paths()[-1])
    store.save(30, {**state(30), "extra": 1})
    assert [checkpoints.step_of(path) for path in store.paths()] == [20, 30]
    assert store.load_latest()[1]["extra"] == 1


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_before_a_damaged_one_takes_its_place(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep)
    for step in (100, 200):
        store.save(step, state(step))
    truncate(store.paths()[-1])
    saved = store.save(150, state(150))
    assert [checkpoints.step_of(path) for path in store.paths()] == [100, 150][-keep:]
    assert store.load_latest()[0] == saved


def test_a_write_that_dies_leaves_the_last_one_whole(store, monkeypatch):
    def die(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            store.save(40, state(40))
    assert store.load_latest()[1]["step"] == 30
    assert list(store.folder.glob("*.tmp"))
    store.save(40, state(40))
    assert store.load_latest()[1]["step"] == 40
    assert not list(store.folder.glob("*.tmp"))


def test_other_files_are_refused(store, tmp_path):
    copy = shutil.copy(store.paths()[-1], tmp_path / "best.pt")
    assert read_checkpoint(copy)["step"] == 30
    truncate(copy)
    with pytest.raises(CheckpointError, match=r"best\.pt cannot be read"):
        read_checkpoint(copy)
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt is not one of this trainer"):
        read_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"absent\.pt does not exist"):
        read_checkpoint(tmp_path / "absent.pt")
