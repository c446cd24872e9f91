"""Banks of several ranks: gloo processes started by torchrun, each compared with one bank that saw all their images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist

WORKER = Path(worker.__file__)
TIMEOUT = 60  # seconds until a run counts as hung


def torchrun(ranks, *arguments):
    """Return code and output; the whole process group is killed if it hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join(filter(None, sys.path))  # the worker imports what the tests import
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, str(WORKER), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{ranks} ranks hang:\n{process.communicate()[0][-4000:]}")
    return process.returncode, output


def results(folder, name, ranks):
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of results by number of ranks; what 2 ranks wrote in "steps" is what 3 resume from."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (2, 3)}
    checkpoint = folders[2] / "checkpoint.pt"
    for ranks, arguments in ((2, []), (3, [checkpoint])):
        code, output = torchrun(ranks, folders[ranks], *arguments)
        assert code == 0, output[-4000:]
        if ranks == 2:
            torch.save(results(folders[2], "steps", 2)[1][-1], checkpoint)
    return folders


both = pytest.mark.parametrize("ranks", [2, 3])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def together(ranks, step, size=None):
    """The batches of all ranks as one, in rank order."""
    return [torch.cat(maps) for maps in zip(*(worker.batch(rank, step, size) for rank in ranks), strict=True)]


def one_bank(ranks, steps, sizes=None, bank=None):
    bank = worker.make_bank() if bank is None else bank
    return [
        worker.enqueue(bank, *together(ranks, step, None if sizes is None else sizes[i]))
        for i, step in enumerate(steps)
    ]


def check(found, expected):
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert equal(a, b), f"after step {step}"


@both
def test_every_rank_has_the_bank_of_one_process(runs, ranks):
    """Also where a rank has no valid class, fewer images than the others, or none."""
    expected = one_bank(range(ranks), range(len(worker.SIZES)))
    assert (expected[-1]["region_fill"] > 0).all() and (expected[-1]["pixel_ptr"] != 0).any()
    for found in results(runs[ranks], "steps", ranks):
        check(found, expected)


@both
def test_regression_8_no_rank_overwrites_what_another_collected(runs, ranks):
    """Rank r has no pixel of class r, yet its bank has; in the published implementation all had rank 0's bank."""
    first = [found[0] for found in results(runs[ranks], "steps", ranks)]
    for c in range(worker.CLASSES):
        offered = sum(2 for rank in range(ranks) if rank != c)  # every other image has the class
        assert [state["region_fill"][c] for state in first] == [offered] * ranks


@both
def test_a_rank_may_keep_to_itself(runs, ranks):
    for rank, found in enumerate(results(runs[ranks], "alone", ranks)):
        check(found, one_bank([rank], range(len(worker.SIZES))))


@both
def test_a_group_keeps_to_itself(runs, ranks):
    for rank, found in enumerate(results(runs[ranks], "pair", ranks)):
        check(found, one_bank([0, 1] if rank < 2 else [rank], range(len(worker.SIZES))))


@both
def test_no_rank_has_an_image_at_first(runs, ranks):
    sizes = (0, 2, 0, 2)
    for found in results(runs[ranks], "nothing_first", ranks):
        check(found, one_bank(range(ranks), range(4), sizes))


@both
@pytest.mark.parametrize("name", ["training", "training_in_ddp"])
def test_ranks_stay_in_step_through_training(runs, ranks, name):
    found = results(runs[ranks], name, ranks)
    for step in range(6):
        states = [rank[step] for rank in found]
        losses = [state.pop("loss") for state in states]
        assert all(equal(state, states[0]) for state in states), f"after step {step}"
        assert all(loss.isfinite() for loss in losses)
        assert (losses[0] > 0) == (step > 0)  # the first step meets an empty bank
    assert losses[0] != losses[1]
    per_step = torch.tensor([2 * ranks] * 5 + [2 * ranks - 1])
    fills = [rank["region_fill"] for rank in found[0]]
    written = torch.stack(fills).diff(dim=0, prepend=torch.zeros(1, worker.CLASSES, dtype=torch.int64))
    assert (written <= per_step[:, None]).all() and (fills[-1] == 9).any()


@both
def test_a_batch_larger_than_the_first_is_refused(runs, ranks):
    expected = one_bank(range(ranks), [0, 2], [2, 2])
    for message, after, next_step in results(runs[ranks], "too_large", ranks):
        assert message.startswith(
            "this batch has 3 images, the largest of the first exchange between ranks had 2"
        )
        check([after, next_step], expected)


def test_a_checkpoint_of_two_ranks_continues_on_one_and_on_three(runs):
    before, after = range(len(worker.SIZES)), range(len(worker.SIZES), 2 * len(worker.SIZES))
    checkpoint = torch.load(runs[2] / "checkpoint.pt")
    for ranks in (1, 3):
        unbroken = worker.make_bank()
        one_bank(range(2), before, bank=unbroken)
        expected = one_bank(range(ranks), after, bank=unbroken)
        if ranks == 1:
            loaded = worker.make_bank()
            loaded.load_state_dict(checkpoint)
            found = [one_bank([0], after, bank=loaded)]
        else:
            found = results(runs[3], "resumed", 3)
        for states in found:
            check(states, expected)
