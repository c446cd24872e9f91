"""Banks of several ranks: processes of one gloo group, each compared with one bank that saw all their images."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
import torch.distributed as dist

from pixcontrast_ext.ops import exchange
from tests.support import distributed_worker as worker
from tools import processes


def run(ranks, *arguments):
    """Return code and output."""
    path = os.pathsep.join(filter(None, sys.path))  # the worker imports what the tests import
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", worker.__name__, ranks, *arguments]
    done = processes.run(command, one_stream=True, env=environment)
    return done.returncode, done.stdout


def results(folder, name, ranks):
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of results by number of ranks; 3 ranks resume from what 2 ranks wrote in "steps"."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (2, 3)}
    checkpoint = folders[2] / "checkpoint.pt"
    for ranks, arguments in ((2, []), (3, [checkpoint])):
        code, output = run(ranks, folders[ranks], *arguments)
        assert code == 0, output[-4000:]
        assert "FutureWarning" not in output, output[-4000:]
        if ranks == 2:
            torch.save(results(folders[2], "steps", 2)[1][-1], checkpoint)
    return folders


both = pytest.mark.parametrize("ranks", [2, 3])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def together(ranks, step, size=None):
    """The batches of all ranks as one batch, in rank order."""
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
    """Even if a rank has no valid class, fewer images than the others, or none."""
    expected = one_bank(range(ranks), range(len(worker.SIZES)))
    assert (expected[-1]["region_fill"] > 0).all()
    assert (expected[-1]["pixel_ptr"] != 0).any()
    for found in results(runs[ranks], "steps", ranks):
        check(found, expected)


@both
def test_regression_8_no_rank_overwrites_what_another_collected(runs, ranks):
    """Rank r has no pixel of class r, but its bank does; the published implementation gave all rank 0's bank."""
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
    assert (written <= per_step[:, None]).all()
    assert (fills[-1] == 9).any()


@both
def test_a_batch_may_have_any_size_on_any_rank_at_any_step(runs, ranks):
    """Even larger than ever before on one rank, which the first exchange used to forbid."""
    bank = worker.make_bank()
    expected = []
    for step, sizes in enumerate(worker.GROWING):
        maps = [worker.batch(rank, step, sizes[rank]) for rank in range(ranks)]
        expected.append(worker.enqueue(bank, *(torch.cat(of_all) for of_all in zip(*maps, strict=True))))
    for found in results(runs[ranks], "growing", ranks):
        check(found, expected)


@both
def test_rows_without_a_map_are_exchanged(runs, ranks):
    bank = worker.make_bank()
    for step in range(3):
        for rank in range(ranks):
            bank.enqueue_rows(*worker.batch_of_rows(rank, step))
    for found in results(runs[ranks], "rows", ranks):
        assert equal(found, worker.state(bank))
        assert (found["pixel_fill"] > 0).all()


@both
def test_banks_that_differ_are_named_on_every_rank(runs, ranks):
    for dtypes, slots in results(runs[ranks], "other_banks", ranks):
        assert "ranks must have the same banks" in dtypes
        assert "(4, 6, bfloat16, 4, 3) on rank 0, (4, 6, float16, 4, 3) on rank 1" in dtypes
        assert "(4, 6, float32, 4, 3) on rank 0, (4, 6, float32, 2, 3) on rank 1" in slots


@pytest.mark.parametrize("told", ["20s", "0", "-1", "nan", "inf"])
def test_a_patience_that_is_none_is_named(monkeypatch, told):
    monkeypatch.setenv(exchange.TIMEOUT_VARIABLE, told)
    with pytest.raises(ValueError, match=f"PIXCONTRAST_RANK_TIMEOUT is '{told}', must be a positive number"):
        exchange._patience()
    monkeypatch.setenv(exchange.TIMEOUT_VARIABLE, "2.5")
    assert exchange._patience().total_seconds() == 2.5


@both
def test_anchors_may_be_divided_by_the_ranks(runs, ranks):
    """Each has more pairs of image and class than it takes anchors, so all parts are full."""
    found = results(runs[ranks], "anchors_of_all_ranks", ranks)
    parts = {2: [4, 3], 3: [3, 2, 2]}[ranks]
    assert [anchors for anchors, _ in found] == [[part, part] for part in parts]
    for _, message in found:
        assert f"max_samples=1 over {ranks} ranks leaves some of them none" in message


@both
def test_a_rank_may_validate_alone_without_gradients(runs, ranks):
    """Such a call is neither enqueued nor counted, so it waits for no other rank."""
    for before, after in results(runs[ranks], "validating_alone", ranks):
        assert before["step"] == 0
        assert (before["bank.region_fill"] == 0).all()
        assert after["step"] == 1
        assert (after["bank.region_fill"] > 0).any()


@both
def test_compiled_ranks_stay_in_step(runs, ranks):
    first, *others = results(runs[ranks], "compiled", ranks)
    for other in others:
        check(other, first)
    assert (first[-1]["region_fill"] > 0).all()


@both
def test_what_the_first_rank_restored_and_ddp_sent_counts_on_every_rank(runs, ranks):
    """The warm-up is over on all ranks; otherwise only some of them would contribute gradients to the heads."""
    first, *others = results(runs[ranks], "restored_by_broadcast", ranks)
    for found in (first, *others):
        assert found["step"] == 3
        assert found["loss"] > 0
        assert torch.equal(found["gradient"], first["gradient"])
        assert found["gradient"].any()
        assert all(
            torch.equal(found[f"bank.{name}"], first[f"bank.{name}"]) for name in worker.make_bank()._buffers
        )


@both
def test_fully_sharded_from_meta(runs, ranks):
    found = results(runs[ranks], "fully_sharded", ranks)
    assert (found[0][1][0]["bank.key_labels"] == -1).all()
    assert found[0][1][0]["step"] == 0
    for losses, states, _ in found:
        assert all(equal(a, b) for a, b in zip(states, found[0][1], strict=True))
        assert [bool(loss > 0) for loss in losses] == [False, False, True, True]
    assert equal(found[0][2], found[0][1][-1])


@both
def test_the_guide_on_several_ranks(runs, ranks):
    """Heads, banks and warm-up agree after every step; a NaN during the warm-up stays out of the loss."""
    found = results(runs[ranks], "training loop", ranks)
    for losses, heads, criterion in found:
        assert all(equal(a, b) for a, b in zip(heads, found[0][1], strict=True))
        assert equal(criterion, found[0][2])
        assert criterion["contrast.step"] == 6
        assert all(step["loss"] == step["cross_entropy"] and step["contrast"] == 0 for step in losses[:6])
        assert all(step["contrast"] > 0 and step["anchors"] == 400 for step in losses[6:])
        assert all(
            step["loss"] == pytest.approx(step["cross_entropy"] + 0.1 * step["contrast"]) for step in losses
        )
    fill = found[0][2]["contrast.bank.region_fill"]
    assert fill[:2].sum() == 20 * 2 * 2 * ranks - ranks  # each rank had one NaN
    assert (fill[2:] == 0).all()


@both
def test_a_head_called_by_the_loss_is_trained_by_all_ranks(runs, ranks):
    """Gradients and banks are those of one process with the batches of all ranks."""
    expected = worker.projecting(range(ranks))
    assert expected[1]["head.project.0.weight"].any()
    for found in results(runs[ranks], "projecting", ranks):
        for ours, theirs in zip(found, expected, strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


@both
def test_groups_that_not_all_ranks_know_of(runs, ranks):
    for rank, found in enumerate(results(runs[ranks], "uneven_groups", ranks)):
        check(found[:2], one_bank([0, 1] if rank < 2 else [rank], range(2), [2, 2]))
        check(found[2:], one_bank(range(ranks), range(2), [2, 2]))


def test_a_job_that_is_ended_and_begun_anew(tmp_path):
    code, output = run(2, tmp_path, "begins_anew")
    assert code == 0, output[-4000:]
    for found in results(tmp_path, "begins_anew", 2):
        check(found, one_bank(range(2), range(len(worker.SIZES))))


@pytest.mark.parametrize(("missing", "step", "of"), [(0, 2, 0), (1, 2, 1), (1, 0, 0)])
def test_a_rank_that_leaves_out_a_step_is_named(tmp_path, missing, step, of):
    """Within the seconds set in the environment, even at the first call, and of several banks.

    The calls of each bank are counted apart, so what the ranks leave in the store may not be known by that count.
    """
    code, output = run(2, tmp_path, f"leaves_out_a_step.{missing}.{step}.{of}")
    assert code != 0
    waiting = rf"rank {1 - missing} waits in its call {step + 1} of MemoryBank.enqueue"
    expected = rf"{waiting}.*after 3 seconds: ranks \[{missing}\]"
    assert re.search(expected, output, re.DOTALL), output[-4000:]


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
