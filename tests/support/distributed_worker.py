"""What the ranks do in `test_distributed.py`: scenarios in turn, the bank's state after each step saved to a file.

Arguments: the number of ranks, the folder for the results, and a checkpoint to resume from. Instead of a checkpoint,
"leaves_out_a_step.R.S" or "begins_anew" runs only that scenario.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pixcontrast_ext import MemoryBank, PixelContrastLoss, ProjectionHead
from pixcontrast_ext.ops import exchange
from tests.support.pages import ROOT, Block, blocks
from tools import processes

CLASSES, CHANNELS, PIXELS = 4, 6, (5, 7)
# Images per rank in each step: equal numbers, one rank with fewer, all but one with none.
SIZES = [
    lambda rank: 2,
    lambda rank: 2,
    lambda rank: 2 - (rank == 0),
    lambda rank: 2 * (rank == 0),
    lambda rank: 1,
]
VOID = (1, 1)  # the rank and step whose labels are all ignored


def batch(rank, step, size=None):
    """The embeddings, labels and priority of a rank at a step."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    size = SIZES[step % len(SIZES)](rank) if size is None else size
    embeddings = torch.randn(size, CHANNELS, *PIXELS, generator=generator)
    labels = torch.randint(0, CLASSES, (size, *PIXELS), generator=generator)
    labels[labels == rank % CLASSES] = 255  # ranks see different classes
    if (rank, step) == VOID:
        labels.fill_(255)
    return embeddings, labels, torch.randint(0, 9, labels.shape, dtype=torch.int32, generator=generator)


def make_bank(**settings):
    return MemoryBank(CLASSES, CHANNELS, region_slots=9, pixel_slots=23, pixels_per_image=3, **settings)


def state(bank):
    return {name: value.clone() for name, value in bank.state_dict().items()}


def enqueue(bank, *maps):
    bank.enqueue(*maps[:2], priority=maps[2])
    return state(bank)


def steps(rank, **settings):
    bank = make_bank(**settings)
    return [enqueue(bank, *batch(rank, step)) for step in range(len(SIZES))]


def nothing_first(rank):
    """No rank has an image in the first exchange, which therefore cannot tell how large an image is."""
    bank = make_bank()
    return [enqueue(bank, *batch(rank, step, size)) for step, size in enumerate((0, 2, 0, 2))]


def resumed(rank, checkpoint):
    bank = make_bank()
    bank.load_state_dict(torch.load(checkpoint))
    return [enqueue(bank, *batch(rank, step)) for step in range(len(SIZES), 2 * len(SIZES))]


# Images of each rank in each step: more than ever before on one rank, on another, on all; fewer; none.
GROWING = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (5, 5, 2), (0, 3, 0), (0, 0, 0), (1, 7, 3)]


def growing(rank):
    bank = make_bank()
    return [enqueue(bank, *batch(rank, step, sizes[rank])) for step, sizes in enumerate(GROWING)]


def rows(rank):
    """Rows without a map, a different number of them on each rank."""
    bank = make_bank()
    for step in range(3):
        bank.enqueue_rows(*batch_of_rows(rank, step))
    return state(bank)


def batch_of_rows(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    count = 3 + 2 * rank + step
    return torch.randn(count, CHANNELS, generator=generator), torch.randint(
        0, CLASSES, (count,), generator=generator
    )


def other_banks(rank):
    """Banks differ between the ranks, if not in the size of their elements; returns the error messages on each."""
    messages = []
    for settings in (
        dict(dtype=torch.bfloat16 if rank == 0 else torch.float16),
        dict(region_slots=4 if rank == 0 else 2),
    ):
        bank = MemoryBank(CLASSES, CHANNELS, **(dict(region_slots=4, pixel_slots=3) | settings))
        try:
            enqueue(bank, *batch(rank, 0, 2))
        except ValueError as error:
            messages.append(str(error))
    return messages


def validating_alone(rank):
    """Only the first rank validates, in training mode but without gradients."""
    torch.manual_seed(rank)
    loss = PixelContrastLoss(CLASSES, min_pixels=1, bank=make_bank(), warmup_steps=9)
    embeddings, labels, _ = batch(rank, 0, 2)
    if rank == 0:
        with torch.no_grad():
            loss(embeddings, labels, labels)
    before = state(loss)
    loss(embeddings, labels, labels)
    return before, state(loss)


def compiled(rank):
    """Batch sizes change within a compiled loss, and on one rank only."""
    torch.manual_seed(rank)
    loss = PixelContrastLoss(CLASSES, min_pixels=1, bank=make_bank())
    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    states = []
    for step in range(4):
        embeddings, labels, _ = batch(rank, step, 2 + step * (rank == 0))
        run(embeddings.requires_grad_(), labels, labels).backward()
        states.append(state(loss.bank))
    return states


def anchors_of_all_ranks(rank):
    """The anchors of a rank that takes its part of 7, eager and compiled; more ranks than anchors are an error."""
    embeddings, labels, _ = batch(rank, 0, 2)
    settings = dict(min_pixels=1, max_views=9, bank=make_bank(), max_samples_over="ranks")
    loss = PixelContrastLoss(CLASSES, max_samples=7, **settings)
    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = [call(embeddings, labels, labels, return_parts=True)[1]["anchors"].item() for call in (loss, run)]
    try:
        PixelContrastLoss(CLASSES, max_samples=1, **settings)(embeddings, labels, labels)
    except ValueError as error:
        return found, str(error)
    raise AssertionError("a rank went without anchors")


def restored_by_broadcast(rank):
    """Only the first rank loads a checkpoint, and DDP sends the buffers on. Returns the state, then a step's loss."""
    torch.manual_seed(0)
    head = ProjectionHead(CHANNELS, CHANNELS, "linear")
    loss = PixelContrastLoss(CLASSES, min_pixels=1, bank=make_bank(), warmup_steps=3)
    if rank == 0:
        other = PixelContrastLoss(CLASSES, min_pixels=1, bank=make_bank(process_group=None), warmup_steps=3)
        for step in range(3):
            other(*batch(0, step, 2)[:2], batch(0, step, 2)[1])
        loss.load_state_dict(other.state_dict())
    step_module = DistributedDataParallel(Step(head, loss))
    features, labels, _ = batch(rank, 5, 2)
    value = step_module(features, labels)
    value.backward()
    return {**state(loss), "loss": value.detach(), "gradient": head.project[0].weight.grad}


def fully_sharded(rank):
    """FSDP2, built on the meta device, through a warm-up: the state of every rank per step, and after a restore."""
    with torch.device("meta"):
        step_module = Step(
            ProjectionHead(CHANNELS, CHANNELS, "linear"),
            PixelContrastLoss(CLASSES, min_pixels=1, bank=make_bank(), warmup_steps=2),
        )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(step_module.head, mesh=mesh)
    fully_shard(step_module, mesh=mesh)
    step_module.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in step_module.head.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    states = [state(step_module.loss)]
    torch.manual_seed(1 + rank)
    losses = []
    for step in range(4):
        features, labels, _ = batch(rank, step, 2)
        value = step_module(features, labels)
        value.backward()
        states.append(state(step_module.loss))
        losses.append(value.detach())
    restored = PixelContrastLoss(CLASSES, bank=make_bank(), warmup_steps=2)
    whole = get_model_state_dict(step_module, options=StateDictOptions(full_state_dict=True))
    if rank == 0:  # the others get nothing
        of_loss = {
            name.removeprefix("loss."): value for name, value in whole.items() if name.startswith("loss.")
        }
        restored.load_state_dict(of_loss)
    return losses, states, state(restored)


def training_loop(rank, *, steps=20, warmup_steps=6):
    """The guide's own lines through a warm-up with a NaN in it. Returns losses, and what all ranks must agree on."""
    lines = plain_torch()
    names = {}
    torch.manual_seed(0)
    lines.data.run(names)
    lines.setup.run(names)
    lines.ranks.run(names)
    criterion = names["criterion"]
    criterion.contrast.warmup_steps = warmup_steps
    torch.manual_seed(1 + rank)
    losses, heads = [], []
    for step in range(steps):
        images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 32, 32))
        hook = None
        if step == 1:  # within the warm-up

            def spoil(module, inputs, output):
                output = output.clone()
                output[0, 0, 0, 0] = torch.nan
                return output

            hook = names["model"].module.head.register_forward_hook(spoil)
        lines.loop.run(found := {**names, "loader": [(images, labels)]})
        if hook is not None:
            hook.remove()
        losses.append({name: value.item() for name, value in found["parts"].items()})
        losses[-1]["loss"] = found["loss"].item()
        head = names["model"].module.head  # parameters only: running statistics differ by rank
        heads.append({name: weight.detach().clone() for name, weight in head.named_parameters()})
    return losses, heads, state(criterion)


class PlainTorch(NamedTuple):
    """The first blocks of docs/guide/plain-torch.md."""

    data: Block
    setup: Block
    loop: Block
    ranks: Block


def plain_torch():
    data, setup, loop, *others = blocks(ROOT / "docs" / "guide" / "plain-torch.md", "python")
    (ranks,) = [block for block in others if "DistributedDataParallel(" in block.text]
    return PlainTorch(data, setup, loop, ranks)


class Step(nn.Module):
    def __init__(self, head, loss):
        super().__init__()
        self.head, self.loss = head, loss

    def forward(self, features, labels):
        return self.loss(self.head(features), labels, labels * 0)


def training(rank, *, loss_in_ddp):
    """A training loop; each rank draws its own random numbers."""
    torch.manual_seed(0)
    head = ProjectionHead(CHANNELS, CHANNELS)
    loss = PixelContrastLoss(CLASSES, min_pixels=1, max_samples=64, bank=make_bank())
    step_module = (
        DistributedDataParallel(Step(head, loss))
        if loss_in_ddp
        else Step(DistributedDataParallel(head), loss)
    )
    optimizer = torch.optim.SGD(step_module.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    states = []
    for step in range(6):
        features, labels, _ = batch(rank, step, 1 if step == 5 and rank == 0 else 2)
        value = step_module(features, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        states.append(
            {**state(loss.bank), "loss": value.detach(), "weight": head.project[0].weight.detach().clone()}
        )
    return states


class Features(nn.Module):
    """A model that owns the head and returns what the loss is to project."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = ProjectionHead(CHANNELS, CHANNELS, "linear")

    def forward(self, images):
        return self.body(images)


def projecting(ranks, wrap=lambda model: model):
    """Two steps on the batches of some ranks, every pixel of which is an anchor and goes into the bank.

    Returns gradients and bank of each. `wrap` is what the model is called through, like DistributedDataParallel.
    """
    torch.manual_seed(0)
    model = Features()
    replica = wrap(model)
    bank = MemoryBank(CLASSES, CHANNELS, region_slots=99, pixel_slots=999, pixels_per_image=99)
    loss = PixelContrastLoss(
        CLASSES, min_pixels=1, max_samples=2000, bank=bank, head=lambda features: model.head(features)
    )
    found = []
    for step in range(2):
        images = torch.cat([batch(rank, step, 2)[0] for rank in ranks])
        labels = (torch.arange(PIXELS[0] * PIXELS[1]) % CLASSES).view(1, *PIXELS).expand(len(images), -1, -1)
        model.zero_grad()
        loss(replica(images), labels, labels).backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()} | state(bank))
    return found


def leaves_out_a_step(rank, missing, left_out, of):
    """One rank calls one of two losses once less than the other does and goes on with something else."""
    losses = [PixelContrastLoss(CLASSES, bank=make_bank()) for _ in range(2)]
    for step in range(3):
        embeddings, labels, _ = batch(rank, step, 2)
        for number, loss in enumerate(losses):
            if step == left_out:
                os.environ[exchange.TIMEOUT_VARIABLE] = "3"
                if (rank, number) == (missing, of):
                    time.sleep(processes.LIMIT)  # killed once the other rank has failed
                    return
            loss(embeddings, labels, labels)


def begins_anew(rank, out):
    """The job ends and begins anew with a store of its own, as torch does not always survive reusing the first."""
    steps(rank)
    dist.barrier()
    dist.destroy_process_group()
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    torch.save(steps(rank), out / f"begins_anew.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def uneven_groups(rank):
    """Groups that not all ranks know are made before the bank's group."""
    alone = dist.new_group([0])
    pair = dist.new_group([0, 1])
    del alone
    states = []
    for group in (pair, "default"):
        bank = make_bank(process_group=group)
        states += [enqueue(bank, *batch(rank, step, 2)) for step in range(2)]
    return states


def main(rank, out, checkpoint=None):
    if checkpoint is not None and checkpoint.startswith("leaves_out_a_step"):
        return leaves_out_a_step(rank, *map(int, checkpoint.split(".")[1:]))
    if checkpoint == "begins_anew":
        return begins_anew(rank, Path(out))
    pair = dist.new_group([0, 1])
    scenarios = {
        "steps": lambda: steps(rank),
        "alone": lambda: steps(rank, process_group=None),
        "pair": lambda: steps(rank, process_group=pair),
        "nothing_first": lambda: nothing_first(rank),
        "uneven_groups": lambda: uneven_groups(rank),
        "growing": lambda: growing(rank),
        "rows": lambda: rows(rank),
        "other_banks": lambda: other_banks(rank),
        "validating_alone": lambda: validating_alone(rank),
        "compiled": lambda: compiled(rank),
        "anchors_of_all_ranks": lambda: anchors_of_all_ranks(rank),
        "restored_by_broadcast": lambda: restored_by_broadcast(rank),
        "fully_sharded": lambda: fully_sharded(rank),
        "training loop": lambda: training_loop(rank),
        "projecting": lambda: projecting([rank], DistributedDataParallel),
        "training": lambda: training(rank, loss_in_ddp=False),
        "training_in_ddp": lambda: training(rank, loss_in_ddp=True),
    }
    if checkpoint is not None:
        scenarios["resumed"] = lambda: resumed(rank, checkpoint)
    for name, scenario in scenarios.items():
        torch.save(scenario(), Path(out) / f"{name}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def run(rank, ranks, listener, *arguments):
    """Runs one rank to its end in the environment that torchrun would give it. Returns the exit code."""
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        limit = datetime.timedelta(seconds=processes.LIMIT)
        store = dist.TCPStore(
            "localhost",
            listener.getsockname()[1],
            ranks,
            is_master=rank == 0,
            timeout=limit,
            master_listen_fd=listener.detach() if rank == 0 else None,
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
        main(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def start(ranks, *arguments):
    """Forks the ranks, so torch is imported once. The first that fails ends the others; returns its exit code."""
    if not arguments[-1].startswith(("leaves_out_a_step", "begins_anew")):
        import torch._dynamo  # noqa: F401  a scenario needs it
    listener = socket.create_server(("localhost", 0))
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os._exit(run(rank, ranks, listener, *arguments))
        running.add(child)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(start(int(sys.argv[1]), *sys.argv[2:]))
