"""The harness itself: what it refuses to time, what it counts, what it keeps, and when it says that a ratio fell."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pixcontrast_ext

from . import OPS, clock, guard, infonce, load, network_step, pages, plots, results, summary
from . import __main__ as cli
from .baselines.dense import dense_infonce
from .clock import Call, Lap, count_launches, interleave
from .harness import Candidate, Case, Method, Row, Settings, Unavailable, Work, measure
from .memory import host_peaks_apart
from .report import table
from .results import Environment, Figures, Ratio, Record, ratios
from .shapes import IMAGES, MAPS, ROWS, Images, Rows, select
from .terminal import Terminal

FAST = Settings(seconds=0.0, rounds=(3, 3), memory=False)


def case_of(**candidates: Candidate) -> Case:
    return Case("op", "name", Rows(K=5), "fp32", "cpu", candidates, {"fwd": Work(flop=2e9)}, "", "floor")


def method(error: float = 0.0) -> Candidate:
    return Candidate(lambda: Method(lambda: torch.ones(3), verify=lambda: {"sum": (error, 1e-6)}))


def value(rows: list[Row], name: str, metric: str, part: str = "fwd") -> float:
    (found,) = [row.value for row in rows if (row.method, row.metric, row.part) == (name, metric, part)]
    return found


# Measuring


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_a_wrong_result_is_not_timed_and_the_other_backend_is(error: float) -> None:
    rows = measure(
        case_of(floor=method(), **{"ours (cpu)": method(error), "ours (reference)": method()}), FAST
    )
    (wrong,) = [row for row in rows if row.metric == "incorrect"]
    assert wrong.method == "ours (cpu)"
    assert re.search(r"ours \(cpu\): sum is off by .*, over 1e-06", wrong.note)
    assert {row.method for row in rows if row.metric == "p50 ms"} == {"floor", "ours (reference)"}


def test_a_wrong_alternative_is_named_and_not_timed() -> None:
    rows = measure(case_of(floor=method(), dense=method(1e-3)), FAST)
    (wrong,) = [row for row in rows if row.metric == "incorrect"]
    assert wrong.method == "dense"
    assert "sum is off by 0.001, over 1e-06" in wrong.note
    assert {row.method for row in rows if row.metric == "p50 ms"} == {"floor"}


def test_an_alternative_that_fails_is_absent_and_ours_is_not_excused() -> None:
    def failing() -> Method:
        raise RuntimeError("out of registers\nand a long trace")

    rows = measure(case_of(floor=method(), dense=Candidate(failing)), FAST)
    assert [row.note for row in rows if row.metric == "absent"] == ["RuntimeError: out of registers"]
    rows = measure(case_of(floor=method(), **{"ours (cpu)": Candidate(failing)}), FAST)
    (note,) = [row.note for row in rows if row.metric == "incorrect"]
    assert note.endswith(": ours (cpu): RuntimeError: out of registers")


def test_what_cannot_run_is_absent_with_its_reason() -> None:
    def unavailable() -> Method:
        raise Unavailable("no such package")

    candidates = {
        "floor": method(),
        "large": Candidate(method().build, 2**60),
        "gone": Candidate(unavailable),
    }
    rows = measure(case_of(**candidates), FAST)
    absent = {row.method: row.note for row in rows if row.metric == "absent"}
    assert absent["gone"] == "no such package"
    assert absent["large"].startswith("needs about 1,073,741,824 GiB, ")
    assert {row.method for row in rows if row.metric == "p50 ms"} == {"floor"}


def test_rates_and_shares_follow_from_the_fastest_round() -> None:
    rows = measure(case_of(floor=method(), ours=method()), FAST)
    own, floor = (value(rows, name, "min ms") for name in ("ours", "floor"))
    assert value(rows, "ours", "TFLOP/s") == pytest.approx(2.0 / own)  # 2e9 operations
    assert value(rows, "ours", "share of the floor") == pytest.approx(floor / own)
    p20, p50, p80 = (value(rows, "ours", f"p{at} ms") for at in (20, 50, 80))
    assert own <= p20 <= p50 <= p80
    assert value(rows, "ours", "rounds") == 3


def test_what_a_method_adds_is_counted_from_the_base() -> None:
    case = dataclasses.replace(case_of(off=method(), ours=method()), floor=None, base="off")
    rows = measure(case, FAST)
    own, off = (value(rows, name, "min ms") for name in ("ours", "off"))
    assert value(rows, "ours", "time added") == pytest.approx(own / off - 1)
    assert {row.method for row in rows if row.metric == "time added"} == {"ours"}


def test_a_single_round_is_every_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SLOW", 0.0)
    monkeypatch.setattr(clock, "SLOWEST", 0.0)
    rows = measure(case_of(floor=method()), FAST)
    assert value(rows, "floor", "rounds") == 1
    assert len({value(rows, "floor", metric) for metric in ("min ms", "p20 ms", "p50 ms", "p80 ms")}) == 1


def test_both_passes_hold_the_forward_and_the_backward() -> None:
    leaf = torch.ones(4, requires_grad=True)
    rows = measure(case_of(floor=Candidate(lambda: Method(lambda: (leaf * 2).sum(), [leaf]))), FAST)
    assert {row.part for row in rows if row.metric == "min ms"} == {"fwd", "bwd", "fwd+bwd"}
    assert value(rows, "floor", "min ms", "bwd") < value(rows, "floor", "min ms", "fwd+bwd")
    outputs = Method(lambda: (leaf * 2).sum(), [leaf]).train()
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[1], torch.full((4,), 2.0))


def test_rounds_are_interleaved_and_bounded() -> None:
    order: list[str] = []

    def call(name: str) -> Call:
        def timed(lap: Lap) -> None:
            order.append(name)
            lap()

        return timed

    calls = [call(name) for name in "ab"]
    times = interleave(calls, "cpu", seconds=1e9, rounds=(2, 4))
    assert order == list("ab") * 5  # one to see how long a round takes, then four
    assert [len(series) for series in times] == [4, 4]
    assert len(interleave(calls, "cpu", seconds=0, rounds=(2, 4))[0]) == 2


def test_a_slow_rival_takes_no_rounds_from_a_fast_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast one has half of the seconds for itself; the slow one's rounds are spread over its rounds."""
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float) -> Call:
        def timed(lap: Lap) -> None:
            order.append(name)
            now[0] += seconds
            lap()

        return timed

    times = interleave([call("s", 0.5), call("f", 0.1)], "cpu", seconds=2.01, rounds=(2, 20))
    assert [len(series) for series in times] == [3, 10]
    places = [place for place, name in enumerate(order[2:]) if name == "s"]
    assert places == [3, 7, 11]


def test_slow_calls_count_from_the_first_and_sit_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SLOW", 0.01)
    monkeypatch.setattr(clock, "SLOWEST", 0.1)
    called = {"slowest": 0, "slow": 0, "compiled": 0, "fast": 0}
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: Callable[[int], float]) -> Call:
        def timed(lap: Lap) -> None:
            called[name] += 1
            now[0] += seconds(called[name])
            lap()

        return timed

    calls = [
        call("slowest", lambda times: 0.2),
        call("slow", lambda times: 0.02),
        call("compiled", lambda times: 0.5 if times == 1 else 0.001),
        call("fast", lambda times: 0.001),
    ]
    times = interleave(calls, "cpu", seconds=1e9, rounds=(2, 5))
    assert [len(series) for series in times] == [1, 2, 5, 5]
    assert called == {"slowest": 2, "slow": 3, "compiled": 7, "fast": 6}
    assert max(parts[0] for parts in times[2]) < 2  # what it took to compile is not among its times


def test_launches_and_host_reads_are_counted() -> None:
    ones = torch.ones(10)
    counted = count_launches(lambda: [ones.sum().item() for _ in range(3)], "cpu")
    assert counted.syncs == 3
    assert counted.launches >= 6
    assert count_launches(lambda: torch.add(ones, ones), "cpu").launches == 1
    assert count_launches(lambda: (ones > 0).nonzero(), "cpu").syncs == 1
    assert count_launches(lambda: ones[ones > 0], "cpu").syncs == 1
    assert count_launches(lambda: ones.unique(), "cpu").syncs == 1


def test_memory_of_the_dense_loss_is_seen_and_ours_is_not_the_matrix() -> None:
    shape = Rows(A=512, K=9500, D=64)
    matrix = 4 * shape.A * shape.K
    peaks = host_peaks_apart("infonce", str(shape), "fp32", ["dense", "ours (cpu)"])
    assert peaks["dense"] > 4 * matrix
    assert peaks["ours (cpu)"] < matrix


def test_the_truth_of_many_pairs_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Rows(A=40, K=100, D=16, C=7)
    whole = infonce.Inputs(shape, torch.float32, "cpu").truth
    monkeypatch.setattr(infonce, "TRUTH_PAIRS", 900)
    inputs = infonce.Inputs(shape, torch.float32, "cpu")
    for found, expected in zip(inputs.truth, inputs.part.double().train(dense_infonce), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(inputs.truth, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_loss_that_is_wrong_for_many_anchors_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the anchors is verified against the truth, but it is all of them that are timed."""
    monkeypatch.setattr(infonce, "PAIRS", 2000)
    inputs = infonce.Inputs(Rows(A=40, K=190, D=16), torch.float32, "cpu")

    def blocked(
        anchors: Tensor,
        anchor_labels: Tensor,
        keys: Tensor,
        key_labels: Tensor,
        *,
        temperature: float,
    ) -> Tensor:
        if len(anchors) > 20:
            anchors = torch.cat((anchors[:20], anchors[20:] * 1.01))
        return pixcontrast_ext.infonce(anchors, anchor_labels, keys, key_labels, temperature=temperature)

    good = infonce.loss_method(pixcontrast_ext.infonce, inputs, infonce.OURS["fp32"]).verify()
    bad = infonce.loss_method(blocked, inputs, infonce.OURS["fp32"]).verify()
    assert all(error <= limit for error, limit in good.values())
    assert {name for name, (error, limit) in bad.items() if error > limit} == {"gradient of all"}


def test_one_case_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Row] = []

    def failing(case: Case, settings: Settings, progress: Callable[[str], None]) -> list[Row]:
        if case.op == "sampling":
            raise RuntimeError("out of registers")
        return [row("a", "ours (cpu)", "min ms", 2.0)]

    monkeypatch.setattr(cli, "measure", failing)
    monkeypatch.setattr(cli, "show", lambda *arguments: None)
    planned = cli.plan(["sampling", "enqueue"], "cpu", ["camvid"], [])
    rows, failures = cli.measure_all(planned, "cpu", [], FAST, Terminal(), kept.extend)
    assert failures == ["sampling camvid fp32: RuntimeError: out of registers"]
    assert rows == kept == [row("a", "ours (cpu)", "min ms", 2.0)]


def test_dtypes_that_an_op_does_not_know_are_not_labelled_so() -> None:
    planned = cli.plan(["training_step", "gather"], "cpu", ["quick"], ["bf16"])
    assert [(each.op, each.dtype) for each in planned] == [("gather", "bf16")]


def test_a_wrong_loss_is_caught_at_its_shape() -> None:
    inputs = infonce.Inputs(Rows(A=40, K=190, D=16), torch.float32, "cpu")

    def off(
        anchors: Tensor, anchor_labels: Tensor, keys: Tensor, key_labels: Tensor, *, temperature: float
    ) -> Tensor:
        loss = pixcontrast_ext.infonce(anchors, anchor_labels, keys, key_labels, temperature=temperature)
        return loss * 1.001

    good = infonce.loss_method(pixcontrast_ext.infonce, inputs, infonce.OURS["fp32"]).verify()
    bad = infonce.loss_method(off, inputs, infonce.OURS["fp32"]).verify()
    assert all(error <= limit for error, limit in good.values())
    assert all(error > limit for error, limit in bad.values())


def test_a_step_that_projects_what_is_used_has_the_head_read_rows_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[int, ...]] = []
    forward = pixcontrast_ext.ProjectionHead.forward

    def watched(head: pixcontrast_ext.ProjectionHead, features: Tensor) -> Tensor:
        read.append(tuple(features.shape))
        return forward(head, features)

    monkeypatch.setattr(pixcontrast_ext.ProjectionHead, "forward", watched)
    inputs = network_step.Inputs(Images(B=2, H=32, W=48, C=3, A=16, D=8, K=60), "cpu")
    inputs.off().train()
    assert read == []
    inputs.ours("reference", "all").train()
    inputs.ours("reference", "used").train()
    assert read == [(2, 128, 8, 12), (1, 128, 16 + 4096, 1)]


# Shapes


def test_shapes_are_read_as_they_are_written() -> None:
    for shape in (ROWS["coco-stuff"], ROWS["in-batch"], MAPS["camvid"], IMAGES["hrnet-w48"]):
        assert type(shape).parse(str(shape)) == shape
    with pytest.raises(ValueError, match="'H3' of shape 'A5-H3' is no size of Rows"):
        Rows.parse("A5-H3")


def test_patterns_select_shapes() -> None:
    assert list(select(ROWS, Rows, "cityscapes*")) == ["cityscapes", "cityscapes-95k", "cityscapes-one-view"]
    assert select(ROWS, Rows, "A5-K7") == {"A5-K7-D256-C19": Rows(A=5, K=7)}
    assert select(ROWS, Rows, "B2-H4") == {}


def test_every_op_plans_on_both_devices_and_names_its_cases() -> None:
    for device in ("cpu", "cuda"):
        for each in cli.plan(OPS, device, [], []):
            assert load(each.op).SHAPE.parse(str(each.shape)) == each.shape
    assert [each.dtype for each in cli.plan(["infonce"], "cuda", ["quick"], [])] == ["bf16", "tf32", "fp32"]
    with pytest.raises(ValueError, match="no shape is called quik; there are quick, "):
        cli.plan(OPS, "cpu", ["quick", "quik"], [])


def test_backends_are_those_named_or_ready() -> None:
    assert cli.backends_of("infonce", "cpu", []) == ["cpu"]
    assert cli.backends_of("infonce", "cpu", ["reference"]) == ["reference"]


# Results

ABOUT = Environment("a device", 2, "3.11", "2.13", "", "0.1.0", "abc1234", "2026-01-31")


def row(name: str, method: str, metric: str, figure: float, part: str = "fwd", note: str = "") -> Row:
    return Row("infonce", name, "A1024-K5-D256-C19", "fp32", method, part, metric, figure, note)


def test_results_survive_the_disk_and_newer_ones_replace_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    old = [row("a", "dense", "min ms", 7.5), row("b", "dense", "absent", math.nan, note='a "reason", quoted')]
    results.write(path, [Record(each, ABOUT) for each in old])
    newer = dataclasses.replace(ABOUT, commit="def5678")
    results.write(path, [Record(row("a", "ours (cpu)", "min ms", 2.5), newer)])
    kept, added = results.read(path)
    assert kept.row.note == 'a "reason", quoted'
    assert math.isnan(kept.row.value)
    assert kept.environment == ABOUT
    assert added == Record(row("a", "ours (cpu)", "min ms", 2.5), newer)


def test_ratios_compare_what_does_the_same_work() -> None:
    rows = [
        row("a", "ours (cpu)", "min ms", 2.0),
        row("a", "ours (cpu) + gather", "min ms", 4.0),
        row("a", "loops", "min ms", 30.0),
        row("a", "ours (cpu)", "extra MiB", 0.5),  # counts as one
        row("a", "loops", "extra MiB", 64.0),
        row("a", "ours (cpu) + gather", "extra MiB", 0.0),
    ]
    found = {(each.method, each.against, each.quantity): each.value for each in ratios(rows)}
    assert found == {
        ("ours (cpu)", "loops", "time"): 15.0,
        ("ours (cpu)", "loops", "memory"): 64.0,
        ("ours (cpu) + gather", "loops", "memory"): 64.0,
        ("ours (cpu) + gather", "loops", "time"): 7.5,
    }


def test_a_ratio_falls_below_its_slack(tmp_path: Path) -> None:
    ratio = Ratio("infonce", "quick", "fp32", "ours (cpu)", "dense", "fwd+bwd", "time", 8.0)
    committed = guard.Committed("cpu AVX2", ratio, 5.0)
    assert not committed.fell(6.1)
    assert committed.fell(5.9)
    assert committed.fell(math.nan)
    path = tmp_path / "ratios.csv"
    guard.save("cpu AVX2", [ratio], path)
    path.write_text(path.read_text().replace(",8,\n", ",8,5\n"))
    guard.save("cpu AVX2", [dataclasses.replace(ratio, value=9.0)], path)
    guard.save("cpu AVX512", [ratio], path)
    assert guard.read(path) == [
        guard.Committed("cpu AVX2", dataclasses.replace(ratio, value=9.0), 5.0),
        guard.Committed("cpu AVX512", ratio, None),
    ]


def test_the_committed_ratios_are_of_cases_that_exist() -> None:
    committed = guard.read()
    assert committed
    for each in committed:
        device = "cpu" if each.device.startswith("cpu") else "cuda"
        shape, dtypes = load(each.ratio.op).plan(device)[each.ratio.name]
        assert each.ratio.dtype in dtypes, each
        names = (
            load(each.ratio.op).case(shape, each.ratio.dtype, device, ["cpu", "cuda", "triton"]).candidates
        )
        assert {each.ratio.method, each.ratio.against} <= set(names), each


def test_check_names_what_fell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ratio = Ratio("infonce", "quick", "fp32", "ours (cpu)", "dense", "fwd+bwd", "time", 8.0)
    fine = dataclasses.replace(ratio, against="chunked loop", value=1.0)
    monkeypatch.setattr(guard, "read", lambda: [guard.Committed("here", each, 5.0) for each in (ratio, fine)])
    monkeypatch.setattr(guard, "device_kind", lambda device: "here")
    measured = {"ours (cpu)": 2.0, "dense": 9.0, "chunked loop": 11.0}
    rows = [
        Row("infonce", "quick", "", "fp32", name, "fwd+bwd", "min ms", time)
        for name, time in measured.items()
    ]
    monkeypatch.setattr(cli, "measure_all", lambda *arguments: (rows, []))
    terminal = Terminal(width=200)
    assert cli.check("cpu", FAST, [], terminal) == 1
    printed = capsys.readouterr().out
    assert (
        "fell below its bar 5 infonce quick fp32 fwd+bwd: time of 'dense' / 'ours (cpu)': 4.5, was 8"
        in printed
    )
    assert "holds infonce quick fp32 fwd+bwd: time of 'chunked loop' / 'ours (cpu)': 5.5, was 1" in printed
    measured["dense"] = 15.0
    rows[1] = dataclasses.replace(rows[1], value=15.0)
    assert cli.check("cpu", FAST, [], terminal) == 0
    monkeypatch.setattr(guard, "device_kind", lambda device: "elsewhere")
    assert cli.check("cpu", FAST, [], terminal) == 2


# Pages


def test_the_page_and_the_readme_say_what_the_results_say() -> None:
    for path, text in pages.pages(draw=False).items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.pages"


def test_the_readme_has_the_newest_cpu_and_the_newest_gpu() -> None:
    def of(name: str, method: str, date: str) -> list[Record]:
        each = Row("infonce", "", "A4", "fp32", method, "fwd+bwd", "min ms", 1.0)
        return [Record(each, dataclasses.replace(ABOUT, device=name, date=date))]

    devices = [
        of("old cpu", "ours (cpu)", "2026-01-01"),
        of("gpu", "ours (cuda)", "2025-01-01"),
        of("cpu", "ours (cpu)", "2026-02-01"),
    ]
    chosen = [records[0].environment.device for records in pages.newest_of_each_kind(devices)]
    assert chosen == ["cpu", "gpu"]


def test_what_a_step_adds_is_told() -> None:
    def told(shape: Images, **milliseconds: float) -> list[list[str]]:
        names = {"off": "contrast off", "loops": "loops + dense"}
        rows = [
            Row("network_step", "", str(shape), "fp32", names.get(name, name), "fwd+bwd", "min ms", figure)
            for name, figure in milliseconds.items()
        ]
        return list(summary.telling([Record(each, ABOUT) for each in rows]))

    compact, hrnet = Images(B=8, H=180, W=240), Images(B=4, H=64, W=96, A=512, N=48)
    ours = {"ours (cpu), all": 140.0, "ours (cpu), used": 107.0}
    assert told(hrnet, off=100.0, **ours, loops=370.0) == [
        [
            "training step of the HRNet-W48: 4 images of 64x96, 512 anchors x 190,000 keys, D 256",
            "a device",
            "the contrast adds 7% to a step without it, 40% if it projects every pixel; by loops and the dense loss it "
            "adds 270%",
        ]
    ]
    ((what, _, before),) = told(compact, off=100.0, **{"ours (cpu)": 149.0}, loops=370.0)  # had no "used" yet
    assert (
        what == "training step of the compact model: 8 images of 180x240, 1024 anchors x 190,000 keys, D 256"
    )
    assert before == "the contrast adds 49% to a step without it; by loops and the dense loss it adds 270%"


def test_a_verdict_names_the_cases_that_are_behind() -> None:
    def case(name: str, **milliseconds: float) -> list[Row]:
        return [
            Row("infonce", name, "A4", "fp32", method.replace("_", " "), "fwd+bwd", "min ms", figure)
            for method, figure in milliseconds.items()
        ]

    rows = case("large", ours=10.0, dense=40.0, chunked_loop=25.0, two_bare_products=5.0)
    assert summary.verdict(results.by_case(rows)) == (
        "Ours is ahead of all that do the same work in 1 of 1 cases: the nearest takes 2.50 times as long. "
        "It is behind in none."
    )
    rows += case("small", ours=10.0, dense=9.0)
    assert summary.verdict(results.by_case(rows)).endswith("Behind at small fp32 (dense takes 0.90).")
    mined = {
        "ours (cpu), random": 1.0,
        "ours (cpu), hardest": 20.0,
        "dense, random": 5.0,
        "dense, hardest": 10.0,
    }
    rows = [Row("mining", "a", "A4", "fp32", name, "fwd+bwd", "min ms", time) for name, time in mined.items()]
    assert summary.verdict(results.by_case(rows)).endswith("Behind at a fp32 (dense, hardest takes 0.50).")
    assert summary.verdict(results.by_case(rows[:2])) == ""  # ours alone


def timed(op: str, name: str, shape: Rows | Images, dtype: str = "fp32", **milliseconds: float) -> list[Row]:
    names = {
        "ours": "ours (cpu)",
        "used": "ours (cpu), used",
        "all": "ours (cpu), all",
        "off": "contrast off",
    }
    return [
        Row(
            op,
            name,
            str(shape),
            dtype,
            names.get(method, method.replace("_", " ")),
            "fwd+bwd",
            "min ms",
            figure,
        )
        for method, figure in milliseconds.items()
    ]


def test_three_sentences_of_a_device() -> None:
    small, large = Rows(A=64, K=950), Rows(A=1024, K=190_000)
    rows = timed("infonce", "large", large, ours=10.0, dense=40.0, chunked_loop=25.0, two_bare_products=5.0)
    rows += [
        Row("infonce", "large", str(large), "fp32", method, "fwd+bwd", "extra MiB", size)
        for method, size in {"ours (cpu)": 5.0, "dense": 5195.0}.items()
    ]
    won, lost, pays = summary.conclusions(results.by_case(rows))
    assert won == (
        "**Won**: 1 of 1 cases. In units of our time the nearest of the methods that do the same work takes 2.50 for "
        "loss and gradient."
    )
    assert lost == (
        "**Lost**: none. chunked loop came nearest, with 2.50 times our time at 1,024 anchors x 190,000 keys (fp32)."
    )
    assert pays.startswith("**It pays** from 1,024 anchors x 190,000 keys on, the smallest that was timed; ")
    assert "needs 5 MiB beside its inputs, and the dense loss 5,195" in pays

    rows += timed("infonce", "small", small, "bf16", ours=10.0, dense=9.0)
    rows += timed("infonce", "in-batch", Rows(A=64), ours=10.0, dense=30.0)
    rows += timed("network_step", "step", Images(N=48, A=512), off=100.0, all=140.0, used=107.0)
    won, lost, pays = summary.conclusions(results.by_case(rows))
    assert won.startswith("**Won**: 2 of 3 cases.")
    assert won.endswith("takes 2.50 to 3.00 for loss and gradient.")
    assert lost == "**Lost**: in units of our time, dense takes 0.90 at 64 anchors x 950 keys (bf16)."
    assert "190,000 keys on, of the sizes that were timed; " in pays  # not from the smaller one that is won
    assert pays.endswith(
        "; a step of the HRNet-W48 with 512 anchors takes 7% longer than without (40% if it projects every pixel)."
    )

    rows = timed("infonce", "small", small, ours=10.0, dense=9.0)
    assert list(summary.conclusions(results.by_case(rows)))[2] == "**It pays** at no size that was timed."


def test_the_loss_is_told_in_seven_columns() -> None:
    rows = timed("infonce", "large", Rows(A=1024, K=190_000), ours=10.0, dense=40.0)
    rows += timed("infonce", "sweep-K-10000", Rows(A=1024, K=10_000), ours=1.0)  # those are in a picture
    rows.append(
        Row("infonce", "large", rows[0].shape, "fp32", "ours (cpu)", "fwd+bwd", "p50 ms", 11.0)
    )  # not this
    header, lines = summary.loss_table(results.by_case(rows))
    assert len(header) == 7
    assert lines == [["`large`: 1,024 anchors x 190,000 keys", "fp32", "10 (cpu)", "4x", "-", "-", "- / -"]]


def test_a_table_has_what_is_added_or_the_share_of_the_floor() -> None:
    rows = [
        row("a", "off", "min ms", 100.0),
        row("a", "ours", "min ms", 107.5),
        row("a", "ours", "time added", 0.075),
        row("a", "ours", "MiB added", 12.0),
    ]
    header, lines = table(Figures(rows))
    added = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(each["time added"], each["MiB added"]) for each in added] == [("", ""), ("7.5%", "12")]
    assert "of the floor" not in header
    assert "of the floor" in table(Figures(rows[:2]))[0]


def test_plots_follow_one_size_at_a_time() -> None:
    def timed(name: str, shape: Rows, milliseconds: float) -> Row:
        return Row("infonce", name, str(shape), "fp32", "dense", "fwd+bwd", "min ms", milliseconds)

    rows = [
        timed("sweep-K-10000", Rows(K=10_000), 1.0),
        timed("camvid", Rows(K=22_000, C=11), 2.0),  # other classes
        timed("cityscapes", Rows(K=190_000), 19.0),
        timed("in-batch", Rows(), 0.1),
        timed("sweep-A-256", Rows(A=256, K=19_000), 0.5),
    ]
    assert plots.sweep(rows, "K", "fp32", "min ms") == {"dense": [(10_000, 1.0), (190_000, 19.0)]}
    assert plots.sweep(rows, "D", "fp32", "min ms") == {}
    assert plots.sweep(rows, "K", "bf16", "min ms") == {}


def test_figures_of_a_case() -> None:
    figures = Figures(
        [row("a", "dense", "p50 ms", 3.0, "fwd+bwd"), row("a", "gone", "absent", math.nan, "", "why")]
    )
    assert (figures.methods, figures.absent, figures.whole()) == (["dense"], {"gone": "why"}, "fwd+bwd")
