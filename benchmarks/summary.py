"""What the figures of a device come to: where ours is ahead and where not, three sentences, and the README's lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import load
from .harness import Row
from .report import digits
from .results import CaseKey, Figures, Record, by_case, is_ours, ours_like
from .shapes import Images, Rows

OPS = {
    "infonce": "The loss and its gradient",
    "mining": "The loss of mined pairs",
    "training_step": "The criterion in a training step",
    "network_step": "A network's training step",
    "sampling": "Sampling",
    "gather": "Gather",
    "enqueue": "Enqueue",
}

WORK = {
    "infonce": "loss and gradient",
    "mining": "those of mined pairs",
    "training_step": "the criterion in a step",
    "sampling": "sampling",
    "enqueue": "enqueue",
}
"""What a sentence calls the ops that others do as well; what a network's step adds has a sentence of its own."""

RIVALS = ("dense", "chunked loop", "loops", "pytorch-metric-learning")
"""How the names of methods begin that do all of the work."""


@dataclass(frozen=True)
class Nearest:
    """The method that comes nearest to ours in a case, and how many times as long as ours it takes."""

    rival: str
    ratio: float


def nearest_rivals(cases: dict[CaseKey, list[Row]]) -> dict[CaseKey, Nearest]:
    """Of every case in which something else does the same work."""
    found: dict[CaseKey, Nearest] = {}
    for key, rows in cases.items():
        figures = Figures(rows)
        times = {method: figures.get(method, figures.whole(), "min ms") for method in figures.methods}
        for rival in filter(lambda method: method.startswith(RIVALS), figures.methods):
            ours = ours_like(rival, figures.methods)
            fastest = min((time for method in ours if (time := times[method])), default=None)
            if fastest is not None and (time := times[rival]):
                ratio = time / fastest
                if key not in found or ratio < found[key].ratio:
                    found[key] = Nearest(rival, ratio)
    return found


def verdict(cases: dict[CaseKey, list[Row]]) -> str:
    """Where ours is ahead of what does the same work, and where it is not; empty if nothing else does it."""
    nearest = nearest_rivals(cases)
    if not nearest:
        return ""
    ahead = [each.ratio for each in nearest.values() if each.ratio >= 1]
    behind = [
        f"{name} {dtype} ({each.rival} takes {each.ratio:.2f})"
        for (_, name, _, dtype), each in nearest.items()
        if each.ratio < 1
    ]
    text = f"Ours is ahead of all that do the same work in {len(ahead)} of {len(nearest)} cases"
    if ahead:
        text += f": the nearest takes {least_to_most(ahead)} times as long"
    return f"{text}. Behind at {', '.join(behind)}." if behind else f"{text}. It is behind in none."


def least_to_most(ratios: list[float]) -> str:
    least, most = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return least if least == most else f"{least} to {most}"


def spelled_out(key: CaseKey) -> str:
    """The case in words."""
    op, name, shape, dtype = key
    if op not in ("infonce", "mining"):
        return f"{name} ({op.replace('_', ' ')}, {dtype})"
    return f"{sizes_of(shape)} ({dtype})"


def sizes_of(shape: str) -> str:
    sizes = Rows.parse(shape)
    keys = f"x {sizes.K:,} keys" if sizes.K else "among themselves"
    return f"{sizes.A:,} anchors {keys}" + (f", D {sizes.D}" if sizes.D != Rows.D else "")


def conclusions(cases: dict[CaseKey, list[Row]]) -> Iterator[str]:
    """Three sentences of a device: what is won, what is lost, and from which size on the loss is ahead throughout."""
    nearest = nearest_rivals(cases)
    ahead = {key: each for key, each in nearest.items() if each.ratio >= 1}
    by_op = {op: [each.ratio for key, each in ahead.items() if key[0] == op] for op in WORK}
    margins = ", ".join(f"{least_to_most(ratios)} for {WORK[op]}" for op, ratios in by_op.items() if ratios)
    yield (
        f"**Won**: {len(ahead)} of {len(nearest)} cases. In units of our time the nearest of the methods that do the "
        f"same work takes {margins}."
    )
    behind: dict[str, list[str]] = {}
    for key, each in nearest.items():
        if each.ratio < 1:
            behind.setdefault(each.rival, []).append(f"{each.ratio:.2f} at {spelled_out(key)}")
    if behind:
        rivals = "; ".join(f"{rival} takes {', '.join(where)}" for rival, where in behind.items())
        yield f"**Lost**: in units of our time, {rivals}."
    else:
        key, each = min(nearest.items(), key=lambda item: item[1].ratio)
        yield f"**Lost**: none. {each.rival} came nearest, with {each.ratio:.2f} times our time at {spelled_out(key)}."
    yield f"**It pays** {'; '.join(payoffs(cases, nearest))}."


def fastest_of_ours(figures: Figures) -> str:
    times = {
        method: figures.get(method, figures.whole(), "min ms") for method in filter(is_ours, figures.methods)
    }
    return min(times, key=lambda method: times[method] or float("inf"))


def pairs(key: CaseKey) -> int:
    sizes = Rows.parse(key[2])
    return sizes.A * (sizes.K or sizes.A)


def payoffs(cases: dict[CaseKey, list[Row]], nearest: dict[CaseKey, Nearest]) -> Iterator[str]:
    """From which of the shapes of the loss on ours is ahead at every larger one, and what that means for a step."""
    losses = sorted((key for key in nearest if key[0] == "infonce"), key=pairs)
    lost = max((pairs(key) for key in losses if nearest[key].ratio < 1), default=0)
    won = [key for key in losses if pairs(key) > lost]
    if not won:
        yield "at no size that was timed"
    else:
        first = f"from {sizes_of(won[0][2])} on"
        yield (
            f"{first}, the smallest that was timed"
            if won[0] == losses[0]
            else f"{first}, of the sizes that were timed"
        )
        largest = Figures(cases[won[-1]])
        own, dense = (
            largest.get(method, "fwd+bwd", "extra MiB") for method in (fastest_of_ours(largest), "dense")
        )
        if own and dense:
            yield (
                f"at {spelled_out(won[-1])} it needs {digits(own)} MiB beside its inputs, and the dense loss "
                f"{digits(dense)}"
            )
    for step in steps(cases):
        text = f"a step of the {step.network} with {step.shape.A:,} anchors takes {step.used:.0%} longer than without"
        others = [
            f"{share:.0%} {how}"
            for how, share in (
                ("if it projects every pixel", step.all),
                ("by loops and the dense loss", step.loops),
            )
            if share is not None
        ]
        yield text + (f" ({', '.join(others)})" if others else "")


def loss_table(cases: dict[CaseKey, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the loss and its gradient at each shape that has a name, and times of the others over ours."""
    rivals = {"dense": "dense", "dense, torch.compile": "torch.compile", "chunked loop": "chunked loop"}
    lines = []
    for key, rows in cases.items():
        op, name, _, dtype = key
        if op != "infonce" or name.startswith("sweep-"):
            continue
        figures = Figures(rows)
        times = {
            method: time for method in figures.methods if (time := figures.get(method, "fwd+bwd", "min ms"))
        }
        ours = fastest_of_ours(figures)
        memory = [digits(figures.get(method, "fwd+bwd", "extra MiB")) or "-" for method in (ours, "dense")]
        lines.append(
            [
                f"`{name}`: {sizes_of(key[2])}",
                dtype,
                f"{digits(figures.get(ours, 'fwd+bwd', 'min ms'))}{ours.removeprefix('ours')}",
                *(f"{digits(times[rival] / times[ours])}x" if rival in times else "-" for rival in rivals),
                " / ".join(memory),
            ]
        )
    return ["loss and gradient of", "dtype", "ours, ms", *rivals.values(), "MiB, ours / dense"], lines


# Steps of networks


@dataclass(frozen=True)
class Step:
    """How much longer a network's training step takes with the contrast than without, as a share."""

    network: str
    shape: Images
    used: float
    all: float | None  # None where only one of the two was timed
    loops: float | None


def steps(cases: dict[CaseKey, list[Row]]) -> Iterator[Step]:
    for (op, _, sizes, _), rows in cases.items():
        if op != "network_step":
            continue
        figures = Figures(rows)
        ours = next(filter(is_ours, figures.methods))
        used = ours.replace(", all", ", used")
        off, own, of_used, loops = (
            figures.get(method, "fwd+bwd", "min ms")
            for method in ("contrast off", ours, used, "loops + dense")
        )
        if off and own and of_used:
            shape = Images.parse(sizes)
            yield Step(
                load(op).network_of(shape, "cpu" if "cpu" in ours else "cuda"),
                shape,
                of_used / off - 1,
                own / off - 1 if used != ours else None,
                loops / off - 1 if loops else None,
            )


# README


def telling(records: list[Record]) -> Iterator[list[str]]:
    """The figures of one device that a user would ask for first."""
    by_name = {
        (key[0], key[1], key[3]): Figures(rows) for key, rows in by_case(r.row for r in records).items()
    }
    device = records[0].environment.device

    def first(op: str, name: str, *dtypes: str) -> tuple[str, Figures] | None:
        return next(
            ((dtype, by_name[op, name, dtype]) for dtype in dtypes if (op, name, dtype) in by_name), None
        )

    if found := first("infonce", "cityscapes", "fp32", "tf32"):
        dtype, figures = found
        ours = fastest_of_ours(figures)
        own = figures.get(ours, "fwd+bwd", "min ms")
        dense, compiled = (
            figures.get(method, "fwd+bwd", "min ms") for method in ("dense", "dense, torch.compile")
        )
        memory, of_dense = (figures.get(method, "fwd+bwd", "extra MiB") for method in (ours, "dense"))
        if own and dense and compiled and memory and of_dense:
            yield [
                f"loss + gradient, 1024 anchors x 190,000 keys, D 256, {dtype}",
                device,
                f"{dense / own:.1f}x as fast as the dense PyTorch loss, {compiled / own:.1f}x as torch.compile of "
                f"it; {digits(memory)} MiB extra memory instead of {digits(of_dense)}",
            ]
    if found := first("training_step", "cityscapes", "fp32"):
        figures = found[1]
        ours = fastest_of_ours(figures)
        own, loops = (figures.get(method, "fwd+bwd", "min ms") for method in (ours, "loops + dense"))
        if own and loops:
            yield [
                "the criterion in a step: sample, gather, loss, backward, enqueue; 8x256x128x256, 190,000 keys, fp32",
                device,
                f"{loops / own:.1f}x as fast as loops and the dense loss ({digits(own)} ms instead of {digits(loops)})",
            ]
    for step in steps(by_case(record.row for record in records)):
        if step.loops is not None:
            shape = step.shape
            of_all = "" if step.all is None else f", {step.all:.0%} if it projects every pixel"
            yield [
                f"training step of the {step.network}: {shape.B} images of {shape.H}x{shape.W}, {shape.A} anchors "
                f"x {shape.K:,} keys, D {shape.D}",
                device,
                f"the contrast adds {step.used:.0%} to a step without it{of_all}; by loops and the dense loss it adds "
                f"{step.loops:.0%}",
            ]
            return  # BENCHMARKS.md has the others
