"""Training: resumed and killed runs against an unbroken one, several ranks, dtypes, and whether it learns."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pixcontrast_ext.tap import FeatureTap
from pixcontrast_ext.trainer import models
from pixcontrast_ext.trainer import train as training
from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.checkpoints import CheckpointStore, read_checkpoint
from pixcontrast_ext.trainer.config import DataConfig, ModelConfig, OptimConfig, load_config, save_config
from pixcontrast_ext.trainer.data import IGNORE, dataset_spec, eval_loader
from pixcontrast_ext.trainer.distributed import Ranks
from pixcontrast_ext.trainer.evaluate import evaluate, load_model
from pixcontrast_ext.trainer.logs import read_rows
from pixcontrast_ext.trainer.pictures import draw_diagnostics
from pixcontrast_ext.trainer.train import CrossEntropy, learning_rate, train
from tests.support import forked
from tools import processes


def final(config):
    return CheckpointStore(config.out / "checkpoints").load_latest()[1]


def leaves(tree, path=""):
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{path}/{name}")
    elif isinstance(tree, list):
        yield from leaves(dict(enumerate(tree)), path)
    else:
        yield path, tree


def assert_same_state(one, other, *, parts=("step", "model", "criterion", "optimizer")):
    first = dict(leaves({part: one[part] for part in parts}))
    second = dict(leaves({part: other[part] for part in parts}))
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
        assert same, path


def record(path):
    return [
        {key: str(value) for key, value in row.items() if key not in ("seconds_per_step", "memory_mib")}
        for row in read_rows(path)
    ]


def assert_same_record(one, other):
    for name in ("train.csv", "val.csv"):
        rows = record(one / name)
        assert rows == record(other / name)
        steps = [row["step"] for row in rows]
        assert steps
        assert len(set(steps)) == len(steps)


def keep_until(config, step):
    """Turn a finished run into one killed after its checkpoint of `step`; its record may go further, and does."""
    store = CheckpointStore(config.out / "checkpoints")
    for path in store.paths():
        if int(path.name.split("-")[1]) > step:
            path.unlink()
    assert store.load_latest()[1]["step"] == step


@pytest.mark.parametrize(
    ("contrast", "project", "changes"),
    [
        ("bank", "all", {}),
        (
            "bank",
            "all",
            {"optim": OptimConfig(optimizer="adamw", lr=1e-3, clip=0.5, lr_warmup=3), "amp": "bf16"},
        ),
        ("bank", "used", {"amp": "bf16"}),
        ("batch", "all", {}),
        ("off", "used", {}),
    ],
)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tiny, contrast, project, changes):
    config = tiny("unbroken", contrast, keep_checkpoints=9, **changes)
    config = replace(config, loss=replace(config.loss, project=project))
    train(config)
    resumed = replace(config, out=config.out.with_name("resumed"))
    shutil.copytree(config.out, resumed.out)
    keep_until(resumed, 4)  # the middle of the second epoch
    train(resumed, resume=True)
    assert_same_state(final(config), final(resumed))
    assert_same_record(config.out, resumed.out)
    if contrast == "bank":
        assert (final(config)["criterion"]["contrast.bank.key_labels"] >= 0).any()


def test_resuming_with_a_damaged_checkpoint_goes_on_from_the_one_before(tiny, caplog):
    config = tiny("unbroken", keep_checkpoints=9)
    train(config)
    resumed = replace(config, out=config.out.with_name("resumed"))
    shutil.copytree(config.out, resumed.out)
    keep_until(resumed, 6)
    newest = CheckpointStore(resumed.out / "checkpoints").paths()[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    train(resumed, resume=True)
    assert newest.name in caplog.text
    assert "step-00000004" in caplog.text
    assert_same_state(final(config), final(resumed))
    assert_same_record(config.out, resumed.out)


def test_the_best_checkpoint_is_kept_beside_the_last(tiny, monkeypatch):
    """Scores that rise and fall, and a run that is cut after the fall."""
    scores = iter([0.2, 0.5, 0.3, 0.3, 0.25, 0.1])

    def score(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        return replace(found, miou=next(scores))

    monkeypatch.setattr(training, "evaluate", score)
    config = tiny("run", steps=9, eval_every=3, checkpoint_every=3)
    train(config)
    best = read_checkpoint(config.out / "best.pt")
    assert (best["step"], best["miou"]) == (6, 0.5)
    assert set(best["model"]) == set(final(config)["model"])
    _, _, step = load_model(config.out / "best.pt", torch.device("cpu"))
    assert step == 6
    keep_until(config, 6)
    train(config, resume=True)  # 0.3 again, no better
    assert read_checkpoint(config.out / "best.pt")["step"] == 6
    keep_until(config, 3)
    train(config, resume=True)  # the 0.5 is of a step that is taken anew
    best = read_checkpoint(config.out / "best.pt")
    assert (best["step"], best["miou"]) == (6, 0.25)


def test_resuming_a_finished_run_changes_nothing(tiny):
    config = tiny(contrast="off")
    first = train(config)
    before = final(config)
    again = train(config, resume=True)
    assert again.miou == first.miou
    assert_same_state(before, final(config))


def steps_until_killed(config, target, output, *command):
    """Rows of the log when a run was killed after `target` of them, or None if it finished before that."""
    process, rows = forked.start(output, *command), 0
    end = time.monotonic() + processes.LIMIT
    while rows < target and process.is_alive():
        if time.monotonic() > end:
            process.kill()
            raise processes.overdue("a training run", forked.errors_of(output).read_text())
        time.sleep(0.002)
        rows = len(read_rows(config.out / "train.csv"))
    process.kill()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return rows
    assert process.exitcode == 0, forked.errors_of(output).read_text()
    return None


def test_kill_9_then_resume_is_the_unbroken_run(tiny, tmp_path):
    """A real process, killed at a random point, three times."""
    config = tiny("unbroken", steps=24, checkpoint_every=3, log_every=1)
    train(config)
    killed = replace(config, out=config.out.with_name("killed"))
    save_config(killed, tmp_path / "killed.json")
    command, output = ["train", "--config", tmp_path / "killed.json"], tmp_path / "output.txt"
    saved = 0
    for target in (4, 11, 17):
        before = shutil.copytree(killed.out, tmp_path / f"before {target}") if saved else None
        resume = ["--resume"] if saved else []
        while (rows := steps_until_killed(killed, target, output, *command, *resume)) is None:
            shutil.rmtree(killed.out)  # it finished before anyone looked: try again
            if before is not None:
                shutil.copytree(before, killed.out)
        saved = final(killed)["step"]
        assert saved >= rows - 3 - 1  # at most the steps since the last checkpoint (and one on its way)
    train(killed, resume=True)
    assert_same_state(final(config), final(killed))
    assert_same_record(config.out, killed.out)


def test_runs_with_and_without_contrast_start_alike(tiny):
    """Weights and images are the same; during the warm-up only the criterion's name differs."""
    runs = {name: tiny(name, name, steps=1, log_every=1, checkpoint_every=1) for name in ("off", "bank")}
    for config in runs.values():
        train(config)
    off, bank = (read_rows(config.out / "train.csv")[0] for config in runs.values())
    assert off["loss"] == off["cross_entropy"] == bank["cross_entropy"]
    weights = {name: final(config)["model"] for name, config in runs.items()}
    for name, value in weights["off"].items():
        assert torch.equal(value, weights["bank"][name]), name


@pytest.mark.parametrize("contrast", ["off", "batch", "bank"])
def test_training_lowers_the_loss_and_raises_the_score(tiny, contrast):
    config = tiny(
        contrast=contrast,
        steps=60,
        log_every=1,
        eval_every=30,
        checkpoint_every=60,
        data=DataConfig(size=(32, 48), synthetic_images=(16, 4), augment=False),
        optim=OptimConfig(optimizer="adamw", lr=3e-3),
    )
    result = train(config)
    values = [row["cross_entropy"] for row in read_rows(config.out / "train.csv")]
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
    assert result.miou > 0.12  # predicting only land scores below 0.1
    if contrast != "off":
        terms = [row["contrast"] for row in read_rows(config.out / "train.csv")]
        assert abs(terms[0]) < 1e-5  # warm-up
        assert max(terms) > 0.05  # after the warm-up


def nearly_the_same(one, other):
    """Assert that two runs' losses differ by little, if at all, and that their weights have the same names."""
    losses = [[row["loss"] for row in read_rows(run.out / "train.csv")] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert final(one)["model"].keys() == final(other)["model"].keys()


@pytest.mark.parametrize("project", ["all", "used"])
def test_diagnostics_are_written_and_change_nothing(tiny, project, quick_tsne, monkeypatch):
    plain = tiny("plain")
    plain = replace(plain, loss=replace(plain.loss, project=project))
    train(plain)
    watched = replace(plain, out=plain.out.with_name("watched"), diagnose_every=2, pictures=True)
    train(watched)
    assert_same_state(final(plain), final(watched))
    assert_same_record(plain.out, watched.out)
    rows = read_rows(watched.out / "diagnostics.csv")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    classes = dataset_spec("synthetic").classes
    for row in rows[1:]:
        assert row["floor"] < row["contrast"]
        assert row["gradient_ratio"] > 0
        assert -1 <= row["gradient_cosine"] <= 1
        assert sum(row[f"anchors/{name}"] for name in classes) == row["anchors"] > 0
        assert max(row[f"pixel_fill/{name}"] for name in classes) > 0
    assert (watched.out / "pictures" / "diagnostics.png").stat().st_size > 0
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    draw_diagnostics(watched.out, watched.out / "again.png")
    of_banks = [each for each in rows[0] if "fill" in each or "turnover" in each]
    (watched.out / "diagnostics.csv").write_text(
        "\n".join(
            ",".join(map(str, [row[each] if values else each for each in rows[0] if each not in of_banks]))
            for row, values in [(rows[0], False), *((row, True) for row in rows)]
        )
    )
    draw_diagnostics(watched.out, watched.out / "again.png")  # as without a bank
    assert [[len(axes.lines) for axes in each.axes] for each in saved] == [
        [4, 2, 2, 3, 4, 2],
        [4, 2, 2, 1, 4, 0],
    ]
    assert saved[1].axes[5].axison is False
    for place, (name, of) in enumerate(
        (name, of) for name in ("anchors", "positives") for of in (np.mean, min)
    ):
        expected = [of([row[f"{name}/{each}"] for each in classes]) for row in rows]
        assert list(saved[0].axes[4].lines[place].get_ydata()) == pytest.approx(expected)
    expected = [np.mean([row[f"pixel_turnover/{each}"] for each in classes]) for row in rows]
    assert list(saved[0].axes[5].lines[0].get_ydata()) == pytest.approx(expected)


def test_an_evaluation_leaves_no_features_in_the_tap(tiny, monkeypatch):
    taps = []

    class Watched(FeatureTap):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            taps.append(self)

    monkeypatch.setattr(training, "FeatureTap", Watched)
    train(tiny(steps=4, diagnose_every=4, eval_every=4))
    (tap,) = taps
    with pytest.raises(RuntimeError, match="was not called since"):
        tap.take()


def test_the_gradient_ratio_is_in_proportion_to_the_weight(tiny):
    """The contrast as it is added to the cross-entropy, its weight included."""
    ratios = []
    for weight in (0.1, 0.3):
        config = tiny(f"weight-{weight}", "batch", steps=1, diagnose_every=1)
        config = replace(config, loss=replace(config.loss, weight=weight, warmup_steps=0))
        train(config)
        ratios.append(read_rows(config.out / "diagnostics.csv")[0]["gradient_ratio"])
    assert ratios[1] == pytest.approx(3 * ratios[0], rel=1e-3)


def test_without_contrast_there_is_nothing_to_diagnose(tiny):
    config = tiny("run", "off", diagnose_every=1, steps=2)
    train(config)
    assert not (config.out / "diagnostics.csv").exists()


def test_bf16_trains(tiny):
    plain, half = tiny("plain", steps=3, log_every=1), tiny("bf16", steps=3, log_every=1, amp="bf16")
    train(plain)
    train(half)
    assert read_rows(plain.out / "train.csv")[0]["loss"] != read_rows(half.out / "train.csv")[0]["loss"]
    nearly_the_same(plain, half)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_bank_of_16_bit_trains(tiny, dtype):
    plain, half = tiny("plain", steps=3, log_every=1), tiny(dtype, steps=3, log_every=1)
    half = replace(half, loss=replace(half.loss, bank_dtype=dtype))
    train(plain)
    train(half)
    assert final(half)["criterion"]["contrast.bank.keys"].dtype == training.BANK_DTYPES[dtype]
    rows = [read_rows(run.out / "train.csv")[-1]["contrast"] for run in (plain, half)]
    assert rows[0] == pytest.approx(rows[1], rel=0.02)
    assert rows[0] != rows[1]


def test_projecting_used_pixels_trains_nearly_alike(tiny):
    """Nearly: the head's norm sees other pixels, and a region is the mean of fewer."""
    runs = {project: tiny(project, log_every=1, checkpoint_every=9) for project in ("all", "used")}
    for project, config in runs.items():
        train(replace(config, loss=replace(config.loss, project=project, region_views=20)))
    nearly_the_same(runs["all"], runs["used"])
    rows = {project: read_rows(config.out / "train.csv") for project, config in runs.items()}
    for one, other in zip(rows["all"], rows["used"], strict=True):
        assert one["contrast"] == pytest.approx(other["contrast"], rel=0.2)
    assert rows["all"][-1]["contrast"] > 0
    assert rows["all"][-1]["contrast"] != rows["used"][-1]["contrast"]
    model, config, _ = load_model(runs["used"].out, torch.device("cpu"), with_embed_head=True)
    assert config.loss.project == "used"
    assert set(model(torch.rand(1, 3, 16, 16))) == {"seg", "embed"}


def test_used_pixels_are_projected_in_the_models_precision(tiny):
    config = tiny(steps=1, amp="bf16")
    config = replace(config, loss=replace(config.loss, project="used", max_samples=40, bank_samples=30))
    run = training._Run(config, Ranks(0, 1, torch.device("cpu")), resume=False)
    run.model.train()
    seen = []
    run.model.embed_head.register_forward_hook(lambda head, given, made: seen.append((*given, made)))
    run._step(0, next(iter(run.loader)), measure=False)
    run.log.close()
    ((features, embeddings),) = seen
    assert features.shape == (1, 128, 40 + 30, 1)
    assert embeddings.shape == (1, 16, 40 + 30, 1)
    assert features.dtype == embeddings.dtype == torch.bfloat16
    assert not any("head" in name for name in run.criterion.state_dict())


def test_ranks_train_a_head_that_the_loss_calls(tiny, tmp_path):
    """DDP reduces the gradients of a head which its own forward leaves out."""
    config = tiny("used", steps=2, checkpoint_every=1, keep_checkpoints=2)
    config = replace(config, diagnose_every=1, loss=replace(config.loss, project="used", warmup_steps=0))
    save_config(config, tmp_path / "used.json")
    forked.ranks(tmp_path, 2, "train", "--config", tmp_path / "used.json")
    for row in read_rows(config.out / "diagnostics.csv"):  # of both ranks, not of their mean
        assert row["contrasted"] == int(row["contrasted"])
        assert 64 < row["anchors"] <= 2 * config.loss.max_samples
    first, last = (
        read_checkpoint(path)["model"] for path in CheckpointStore(config.out / "checkpoints").paths()
    )
    assert not torch.equal(first["embed_head.project.0.weight"], last["embed_head.project.0.weight"])
    assert (final(config)["criterion"]["contrast.bank.region_fill"] > 0).any()


def test_a_model_that_cannot_leave_its_head_to_the_loss_is_told(tiny, monkeypatch):
    class Whole(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.backbone, self.embed_head = model, model.backbone, model.embed_head

    monkeypatch.setitem(models.MODELS, "whole", lambda *args: Whole(models.build_compact(*args)))
    config = tiny(net=ModelConfig(model="whole", embed_dim=16))
    with pytest.raises(ValueError, match="--project is 'used', but Whole has no `defers_head`"):
        train(replace(config, loss=replace(config.loss, project="used")))


def test_compile_trains(tiny, monkeypatch):
    class Backbone(nn.Sequential):  # small, because compiling takes longer than training
        channels = 8

        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU())

    monkeypatch.setitem(models.MODELS, "small", lambda *heads: models.SegmentationModel(Backbone(), *heads))
    net = ModelConfig(model="small", embed_dim=16)
    plain, compiled = (
        tiny("plain", steps=3, log_every=1, net=net),
        tiny("compiled", steps=3, log_every=1, net=net),
    )
    train(plain)
    train(replace(compiled, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    nearly_the_same(plain, compiled)


def test_camvid_trains(tiny, camvid, quick_tsne):
    config = tiny(
        data=DataConfig(dataset="camvid", root=camvid(".jpg"), scale=0.75, crop=(24, 24)), pictures=True
    )
    result = train(config)
    rows = read_rows(config.out / "val.csv")
    assert [row["step"] for row in rows] == [4, 8, 9]
    assert result.class_iou["road"] > 0
    assert result.miou == rows[-1]["miou"]
    for name in ("curves", "panels", "tsne"):
        assert (config.out / "pictures" / f"{name}.png").stat().st_size > 10_000


def torchrun(environment, world, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return processes.run([*command, "-m", "pixcontrast_ext.trainer", *args], env=environment)


def test_two_ranks_train_resume_and_evaluate(tiny, environment, tmp_path, capsys):
    config = tiny("two", steps=6, keep_checkpoints=9)
    path = config.out.parent / "two.json"
    save_config(config, path)
    done = torchrun(environment, 2, "train", "--config", path)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_rows(config.out / "train.csv")] == [2, 4, 6]

    resumed = replace(config, out=config.out.with_name("resumed"))
    shutil.copytree(config.out, resumed.out)
    keep_until(resumed, 4)
    forked.ranks(tmp_path, 2, "train", "--out", resumed.out, "--resume")
    assert_same_state(final(config), final(resumed))
    assert_same_record(config.out, resumed.out)

    model, _, _ = load_model(config.out, torch.device("cpu"))
    spec = dataset_spec(config.data.dataset)
    loader = eval_loader(spec.build(config.data, "val"), 8)
    scores = evaluate(model, loader, spec.classes, Ranks(0, 1, torch.device("cpu")))
    assert scores.miou == read_rows(config.out / "val.csv")[-1]["miou"]  # the score of the saved weights

    told = forked.ranks(tmp_path, 2, "eval", "--checkpoint", config.out)
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(config.out)]) == 0
    assert told == capsys.readouterr().out
    assert f"{read_rows(config.out / 'val.csv')[-1]['miou']:.4f}" in told

    alone = replace(config, out=config.out.with_name("alone"))
    train(alone)
    # Only nearly equal: each rank's norms see half a batch, and the augmentation differs.
    for one, two in zip(*(read_rows(run.out / "train.csv") for run in (alone, config)), strict=True):
        assert one["cross_entropy"] == pytest.approx(two["cross_entropy"], rel=0.3)


def test_evaluation_is_of_the_first_ranks_statistics(tiny, monkeypatch):
    def marked(ranks, tensors):
        for tensor in tensors:
            tensor.fill_(3)

    def check(model, *args, **options):
        assert all((buffer == 3).all() for buffer in model.buffers())
        return evaluate(model, *args, **options)

    monkeypatch.setattr(Ranks, "copy_from_first", marked)
    monkeypatch.setattr("pixcontrast_ext.trainer.train.evaluate", check)
    train(tiny(contrast="off", steps=1))


def test_images_of_several_sizes_train(tiny, pascal_context, quick_tsne):
    """Images are padded to one size, cropped, and evaluated at their own; pictures name the classes shown."""
    data = DataConfig(dataset="pascal_context", root=pascal_context, crop=(32, 32))
    config = tiny(steps=2, batch_size=2, data=data, pictures=True)
    result = train(config)
    assert len(result.class_iou) == 59
    assert 0 <= result.miou <= 1
    assert {path.name for path in (config.out / "pictures").iterdir()} == {
        "curves.png",
        "panels.png",
        "tsne.png",
    }


def test_a_run_is_not_overwritten(tiny):
    config = tiny(contrast="off", steps=1)
    train(config)
    with pytest.raises(FileExistsError, match="run holds a run already: --resume it or choose another --out"):
        train(config)


@pytest.mark.parametrize(
    "left", ["train.csv", "val.csv", "best.pt", "checkpoints/step-00000004-0123456789abcdef.pt"]
)
def test_what_a_run_has_left_is_not_overwritten_without_its_config(tiny, left):
    path = tiny().out / left
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(FileExistsError, match="run holds a run already"):
        train(tiny())
    assert path.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_do_not_train_in_one_folder(tiny, resume):
    config = tiny(steps=1, pictures=False)
    with (
        forked.holding(config.out) as process,
        pytest.raises(FileExistsError, match=f"run is in use by process {process}"),
    ):
        train(config, resume=resume)
    train(config, resume=resume)


def test_every_rank_tells_that_the_folder_is_in_use(tmp_path):
    """None is left to wait in a collective for a first rank that has ended."""
    with forked.holding(tmp_path / "run") as process:
        running = forked.start_ranks(tmp_path, 2, "train", "--out", tmp_path / "run")
        for rank, output in running:
            rank.join(processes.LIMIT)
            assert rank.exitcode == 2
            assert f"run is in use by process {process}" in forked.errors_of(output).read_text()


def test_resume_before_the_first_checkpoint_starts(tiny, caplog):
    config = tiny(contrast="off", steps=2)
    train(config, resume=True)
    assert "no checkpoint in" in caplog.text
    assert final(config)["step"] == 2


def test_resume_names_changed_options_and_refuses_what_cannot_be(tiny, caplog):
    config = tiny(steps=2)
    train(config)
    train(replace(config, steps=4), resume=True)
    assert "--steps was 2, is now 4" in caplog.text
    with pytest.raises(ValueError, match=r"--steps is 3, but .*step-00000004.* is of step 4"):
        train(replace(config, steps=3), resume=True)
    with pytest.raises(ValueError, match=r"step-00000004.* does not fit the options of this run"):
        train(replace(config, steps=4, loss=replace(config.loss, pixel_slots=9)), resume=True)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resuming_takes_changed_options_of_the_optimizer(tiny, name):
    before, now = (
        OptimConfig(optimizer=name, lr=1e-3, weight_decay=decay, momentum=momentum)
        for decay, momentum in ((1e-4, 0.9), (0.5, 0.3))
    )
    config = tiny(contrast="off", steps=2, optim=before)
    train(config)
    train(replace(config, steps=4, optim=now), resume=True)
    groups = final(config)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0, 0.5, 0.0]  # weights and others, twice
    assert all(group.get("momentum", 0.3) == 0.3 for group in groups)
    other = "adamw" if name == "sgd" else "sgd"
    with pytest.raises(ValueError, match=f"--optimizer is '{other}', but .* was trained with '{name}'"):
        train(replace(config, steps=6, optim=replace(now, optimizer=other)), resume=True)


@pytest.mark.parametrize("project", ["all", "used"])
@pytest.mark.parametrize("left_out", [dict(warmup_steps=9), dict(weight=0.0)])
def test_every_weight_has_a_gradient_whatever_the_criterion_leaves_out(tiny, left_out, project):
    """DDP fails if a weight has no gradient."""
    config = tiny(steps=3)
    config = replace(config, loss=replace(config.loss, project=project, **left_out))
    train(config)
    optimizer = final(config)["optimizer"]
    weights = [weight for group in optimizer["param_groups"] for weight in group["params"]]
    assert sorted(optimizer["state"]) == sorted(weights)
    assert all(value["momentum_buffer"] is not None for value in optimizer["state"].values())


def test_a_loss_that_blows_up_stops_the_run(tiny):
    config = tiny(contrast="off", optim=OptimConfig(lr=1e20), steps=9, log_every=1)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) and .* at step .* --lr"):
        train(config)
    assert all(
        path.name.split("-")[1] < "00000009" for path in CheckpointStore(config.out / "checkpoints").paths()
    )


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_blows_up_stops_the_run_and_is_not_saved(tiny, monkeypatch, clip):
    class Infinite(CrossEntropy):
        def forward(self, logits, *rest, **options):
            logits.register_hook(lambda gradient: gradient * torch.inf)
            return super().forward(logits, *rest, **options)

    monkeypatch.setattr("pixcontrast_ext.trainer.train.CrossEntropy", Infinite)
    config = tiny(contrast="off", optim=OptimConfig(clip=clip), checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"the gradient norm (nan|inf) at step 1 "):
        train(config)
    assert not CheckpointStore(config.out / "checkpoints").paths()


def test_bad_options_are_named(tiny):
    with pytest.raises(ValueError, match="--batch-size is 40, but there are only 15 training images"):
        train(tiny(batch_size=40))
    with pytest.raises(ValueError, match="--device is 'tpu'"):
        train(tiny(device="tpu"))
    with pytest.raises(ValueError, match="--dataset is 'nope'"):
        train(tiny(data=DataConfig(dataset="nope")))


def test_inference_needs_no_head(tiny):
    config = tiny(steps=2)
    train(config)
    model, saved, step = load_model(config.out, torch.device("cpu"))
    assert model.embed_head is None
    assert step == 2
    assert saved == load_config(config.out / "config.json") == config
    assert load_model(config.out, torch.device("cpu"), with_embed_head=True)[0].embed_head is not None


def test_cross_entropy_of_a_batch_without_labels_is_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = CrossEntropy()(logits, None, torch.full((2, 8, 8), IGNORE))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_learning_rate_rises_and_decays():
    config = OptimConfig(lr=0.1, lr_warmup=4, power=0.9)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[0] == pytest.approx(0.025)
    assert max(rates) == rates[3]
    assert rates[3] < 0.1
    assert rates[10] == pytest.approx(0.1 * 0.5**0.9)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(OptimConfig(lr=0.1, power=0), 19, 20) == 0.1


@pytest.mark.parametrize(("nesterov", "head_lr"), [(True, 1.0), (False, 10.0)])
def test_a_step_of_sgd_is_the_formula(tiny, nesterov, head_lr):
    """Two steps with momentum, for backbone and heads, weights and norms."""
    options = OptimConfig(
        lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.01, head_lr=head_lr, power=0
    )
    run = training._Run(tiny(optim=options, batch_size=2), Ranks(0, 1, torch.device("cpu")), resume=False)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    velocity = {name: torch.zeros_like(weight) for name, weight in before.items()}
    for step, batch in zip(range(2), run.loader, strict=False):
        run._step(step, batch, measure=False)
        for name, weight in run.model.named_parameters():
            decay = 0.01 if weight.dim() > 1 else 0.0
            gradient = weight.grad + decay * before[name]
            velocity[name] = 0.5 * velocity[name] + gradient
            move = gradient + 0.5 * velocity[name] if nesterov else velocity[name]
            rate = 0.1 if name.startswith("backbone.") else 0.1 * head_lr
            expected = before[name] - rate * move
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)
            before[name] = weight.detach().clone()
    run.log.close()
