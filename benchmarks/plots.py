"""The figures as pictures: time and memory of the loss as sizes grow, and every op's alternatives as bars."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from .harness import Row
from .report import digits
from .results import Figures, by_case, is_ours, ratios
from .shapes import Rows

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Colours that colour-blind eyes can tell apart; ours stands out, methods that are not a loss are grey.
STYLES = {
    "ours (cpu)": ("#d55e00", "o", "-"),
    "ours (cuda)": ("#d55e00", "o", "-"),
    "ours (triton)": ("#cc79a7", "D", "-"),
    "dense": ("#0072b2", "s", "-"),
    "dense, torch.compile": ("#56b4e9", "^", "-"),
    "chunked loop": ("#009e73", "v", "-"),
    "Inf-CL": ("#e69f00", "P", "-"),
    "Liger cross-entropy": ("#f0e442", "X", "-"),
    "FlexAttention, values = keys": ("#999999", "<", "--"),
    "flash attention, values = keys": ("#777777", "d", "--"),
    "two bare products": ("#000000", "", ":"),
}
AXES = {"K": "keys K", "A": "anchors A", "D": "channels D"}
RESTORED: dict[RcKeyType, object] = {"svg.hashsalt": "pixcontrast", "svg.fonttype": "none", "font.size": 9}


def sweep(rows: list[Row], letter: str, dtype: str, metric: str) -> dict[str, list[tuple[int, float]]]:
    """By method: (size, figure of fwd+bwd), of the bank's shapes that differ in `letter` only."""
    cases = {
        (Rows.parse(shape), name): Figures(of_case)
        for (op, name, shape, of_dtype), of_case in by_case(rows).items()
        if op == "infonce" and of_dtype == dtype
    }
    centres = [shape for shape, name in cases if name.startswith(f"sweep-{letter}-")]
    if not centres:
        return {}
    fixed = replace(centres[0], **{letter: 1})
    points: dict[str, dict[int, float]] = {}  # the newest where a shape has two names
    for (shape, _), figures in cases.items():
        if shape.K == 0 or replace(shape, **{letter: 1}) != fixed:  # no keys: anchors with anchors
            continue
        for method in figures.methods:
            if method in STYLES and (value := figures.get(method, "fwd+bwd", metric)) is not None:
                points.setdefault(method, {})[getattr(shape, letter)] = value
    return {method: sorted(series.items()) for method, series in points.items()}


def draw_sweep(axes: Axes, series: dict[str, list[tuple[int, float]]], letter: str, label: str) -> None:
    for method in STYLES:
        if method in series:
            colour, marker, line = STYLES[method]
            sizes, values = zip(*series[method], strict=True)
            width = 2.2 if is_ours(method) else 1.2
            axes.plot(sizes, values, line, color=colour, marker=marker, ms=4, lw=width, label=method)
    axes.set(xscale="log", yscale="log", xlabel=AXES[letter], ylabel=label)
    axes.grid(True, which="major", alpha=0.3)
    axes.minorticks_off()
    named: list[int] = []
    for size in sorted({size for points in series.values() for size, _ in points}):
        if not named or size > 1.3 * named[-1]:  # names of nearer ones would overlap
            named.append(size)
    axes.set_xticks(named, [short(size) for size in named])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: digits(value)))


def short(size: int) -> str:
    if size >= 1_000_000:
        return f"{size / 1e6:g}M"
    return f"{size / 1000:.3g}k" if size >= 10_000 else str(size)


def scaling(rows: list[Row], dtype: str, title: str, path: Path) -> bool:
    """Time and memory of loss + gradient against K, A and D. False if there is nothing to draw."""
    letters = [letter for letter in AXES if sweep(rows, letter, dtype, "min ms")]
    if not letters:
        return False
    with plt.rc_context(RESTORED):
        figure, grid = plt.subplots(2, len(letters), figsize=(4 * len(letters), 6.4), squeeze=False)
        for column, letter in enumerate(letters):
            draw_sweep(grid[0][column], sweep(rows, letter, dtype, "min ms"), letter, "loss + gradient, ms")
            memory = {
                method: [(size, max(value, 0.1)) for size, value in points]
                for method, points in sweep(rows, letter, dtype, "extra MiB").items()
                if method != "two bare products"
            }
            if memory:
                draw_sweep(grid[1][column], memory, letter, "extra memory, MiB")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.suptitle(title)
        figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.09, 1, 0.98))
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True


def ratio_bars(rows: list[Row], title: str, path: Path) -> bool:
    """How many times as long as ours each alternative takes, op by op, at the sizes of Cityscapes."""
    wanted = ("infonce", "sampling", "gather", "enqueue", "training_step")
    first = next((ratio.method for ratio in ratios(rows)), None)
    bars = [
        (f"{ratio.op.replace('_', ' ')}, {ratio.dtype}: {ratio.against}", ratio.value)
        for ratio in ratios(rows)
        if ratio.op in wanted
        and ratio.name == "cityscapes"
        and ratio.quantity == "time"
        and ratio.method == first
        and ratio.part == ("fwd" if ratio.op in ("sampling", "enqueue") else "fwd+bwd")
    ]
    if not bars:
        return False
    with plt.rc_context(RESTORED):
        figure, axes = plt.subplots(figsize=(9, 1 + 0.26 * len(bars)))
        labels, values = zip(*reversed(bars), strict=True)
        colours = ["#0072b2" if value >= 1 else "#999999" for value in values]
        drawn = axes.barh(range(len(values)), [value - 1 for value in values], left=1, color=colours)
        axes.bar_label(drawn, [f" {digits(value)}x " for value in values])
        axes.axvline(1, color="#d55e00", lw=2)
        axes.set(xscale="log", xlabel="time / ours (left of the line: faster than ours)", title=title)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(min(0.2, min(values) / 3), max(values) * 2)  # room for the numbers
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True
