"""The probe: its scores against loops and scikit-learn, its choice of pixels, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pixcontrast_ext.trainer import probe as probing
from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.data import IGNORE, dataset_spec
from pixcontrast_ext.trainer.models import build_model
from pixcontrast_ext.trainer.probe import NEIGHBOURS, Pixels, probe_pixels, score, some_of_each, take_pixels
from pixcontrast_ext.trainer.train import train

NAMES = ("sky", "road", "pole", "tree")


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rows_of(rng, labels, spread, dim=8):
    centres = unit(np.random.default_rng(5).normal(size=(len(NAMES), dim)))
    return unit(centres[labels] + spread * rng.normal(size=(len(labels), dim)))


def a_problem(spread=0.5):
    rng = np.random.default_rng(0)
    of_gallery = np.repeat(np.arange(4), (30, 20, 8, 25))
    of_queries = np.repeat(np.arange(4), (12, 9, 3, 7))
    return rows_of(rng, of_gallery, spread), of_gallery, rows_of(rng, of_queries, spread), of_queries


@pytest.mark.parametrize("block", [512, 10])
def test_scores_are_those_of_loops(monkeypatch, block):
    monkeypatch.setattr(probing, "_BLOCK", block)
    gallery, of_gallery, queries, of_queries = a_problem()
    found = score(gallery, of_gallery, queries, of_queries, NAMES)
    means = {label: unit(gallery[of_gallery == label].mean(0, keepdims=True))[0] for label in range(4)}
    per_class = {label: {"own": [], "other": [], "first": [], "ap": []} for label in range(4)}
    for row, label in zip(queries, of_queries, strict=True):
        entry = per_class[label]
        entry["own"].append(row @ means[label])
        entry["other"].append(max(row @ means[other] for other in range(4) if other != label))
        ranked = of_gallery[np.argsort(-(gallery @ row), kind="stable")] == label
        entry["first"].append(ranked[0])
        relevant = ranked.sum()
        precisions = [ranked[: place + 1].mean() for place in range(relevant) if ranked[place]]
        entry["ap"].append(sum(precisions) / relevant)

    def balanced(name):
        return np.mean([np.mean(entry[name]) for entry in per_class.values()])

    assert found.own_cosine == pytest.approx(balanced("own"), abs=1e-6)
    assert found.other_cosine == pytest.approx(balanced("other"), abs=1e-6)
    assert found.recall_at_1 == pytest.approx(balanced("first"))
    assert found.map_at_r == pytest.approx(balanced("ap"))
    pairs = [means[one] @ means[other] for one in range(4) for other in range(4) if one != other]
    assert found.between_cosine == pytest.approx(np.mean(pairs), abs=1e-6)


def test_the_vote_is_that_of_scikit_learn():
    gallery, of_gallery, queries, of_queries = a_problem(spread=0.8)
    found = score(gallery, of_gallery, queries, of_queries, NAMES)
    guessed = KNeighborsClassifier(NEIGHBOURS, metric="cosine").fit(gallery, of_gallery).predict(queries)
    recalls = [(guessed == label)[of_queries == label].mean() for label in range(4)]
    assert 0.2 < found.knn < 1
    assert found.knn == pytest.approx(np.mean(recalls))


def test_far_apart_is_perfect_and_the_control_is_chance():
    rng = np.random.default_rng(1)
    of_gallery, of_queries = np.repeat(np.arange(4), 200), np.repeat(np.arange(4), 100)
    gallery, queries = rows_of(rng, of_gallery, 0.02), rows_of(rng, of_queries, 0.02)
    found = score(gallery, of_gallery, queries, of_queries, NAMES)
    assert found.recall_at_1 == found.knn == found.linear == 1
    assert found.map_at_r == pytest.approx(1)
    assert found.class_recall == dict.fromkeys(NAMES, 1.0)
    assert found.own_cosine > 0.99
    noise = unit(rng.normal(size=(800, 8))), unit(rng.normal(size=(400, 8)))
    assert score(noise[0], of_gallery, noise[1], of_queries, NAMES).linear == pytest.approx(0.25, abs=0.08)
    # Within far clusters a permuted gallery still gives a whole cluster one label; over noise it is chance.
    assert score(noise[0], of_gallery, noise[1], of_queries, NAMES).control == pytest.approx(0.25, abs=0.08)


def test_one_class_alone():
    rows = unit(np.random.default_rng(0).normal(size=(6, 3)))
    found = score(rows, np.zeros(6, int), rows, np.zeros(6, int), NAMES)
    assert found.linear == found.recall_at_1 == 1
    assert np.isnan(found.other_cosine)


def test_some_of_each_class():
    labels = np.array([0] * 50 + [IGNORE] * 20 + [3] * 4)
    places = some_of_each(labels, 10, np.random.default_rng(0))
    assert sorted(labels[places].tolist()) == [0] * 10 + [3] * 4
    assert len(set(places.tolist())) == 14
    assert some_of_each(np.full(3, IGNORE), 10, np.random.default_rng(0)).tolist() == []


def test_models_are_asked_about_the_same_pixels():
    spec = dataset_spec("synthetic")
    dataset = spec.build(DataConfig(size=(32, 48), synthetic_images=(6, 3)), "train")
    torch.manual_seed(0)
    models = [build_model("compact", len(spec.classes), 16).eval() for _ in range(2)]
    one, other = (
        take_pixels(model, dataset, torch.device("cpu"), per_class=12, images=6, seed=3) for model in models
    )
    assert (one.labels == other.labels).all()
    assert not np.allclose(one.rows["features"], other.rows["features"])
    assert set(one.rows) == {"features", "embeddings"}
    for rows in one.rows.values():
        assert len(rows) == len(one.labels)
        assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.bincount(one.labels).max() <= 12
    again = take_pixels(models[0], dataset, torch.device("cpu"), per_class=12, images=6, seed=3)
    assert (again.rows["features"] == one.rows["features"]).all()
    otherwise = take_pixels(models[0], dataset, torch.device("cpu"), per_class=12, images=6, seed=4)
    assert not np.array_equal(otherwise.rows["features"], one.rows["features"])


def test_only_classes_of_both_splits_count():
    spec = dataset_spec("synthetic")
    rng = np.random.default_rng(0)
    gallery = Pixels({"features": unit(rng.normal(size=(9, 4)))}, np.repeat([0, 1, 2], 3))
    queries = Pixels({"features": unit(rng.normal(size=(9, 4)))}, np.repeat([1, 2, 4], 3))
    found = probe_pixels(gallery, queries, spec, 7, 0)
    assert found.classes == (spec.classes[1], spec.classes[2])
    assert set(found.scores["features"].class_recall) == set(found.classes)
    with pytest.raises(ValueError, match="no class"):
        probe_pixels(gallery, Pixels(queries.rows, np.full(9, 4)), spec, 7, 0)


def test_the_command(tiny, tmp_path, capsys, quick_tsne):
    for contrast in ("off", "bank"):
        train(tiny(contrast, contrast, steps=2))
    runs = [str(tmp_path / name) for name in ("off", "bank")]
    out = tmp_path / "probe"
    assert (
        main(["probe", *runs, "--queries", "20", "--gallery", "30", "--images", "4", "--out", str(out)]) == 0
    )
    said = capsys.readouterr().out
    assert said.split()[:2] == ["off", "bank"]
    assert "linear probe" in said
    record = json.loads((out / "probe.json").read_text())
    assert record["queries"] == 20
    assert set(record["runs"]["off"]["scores"]) == {"features"}
    assert set(record["runs"]["bank"]["scores"]) == {"features", "embeddings"}
    assert 0 <= record["runs"]["bank"]["scores"]["features"]["linear"] <= 1
    for name in ("probe.png", "probe-tsne.png"):
        assert (out / name).stat().st_size > 0


def test_bad_input_is_named(tiny, tmp_path, capsys):
    assert main(["probe", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    run = str(tmp_path / "run")
    assert main(["probe", run, run]) == 2
    assert "no two of one name" in capsys.readouterr().err
    assert main(["probe", run, "--queries", "0"]) == 2
    assert "--queries is 0" in capsys.readouterr().err
    config = tiny("run", "off", steps=1)
    train(config)
    assert main(["probe", run, "--split", "train"]) == 2
    assert "error: --split is 'train', which" in capsys.readouterr().err


def test_checkpoints_are_named_by_their_runs(tiny, tmp_path, capsys):
    for name in ("one", "other"):
        train(tiny(name, "off", steps=1))
    few = ["--queries", "5", "--gallery", "5", "--images", "2"]
    assert main(["probe", *(str(tmp_path / name / "best.pt") for name in ("one", "other")), *few]) == 0
    assert capsys.readouterr().out.split()[:2] == ["one/best.pt", "other/best.pt"]


def test_runs_that_are_scored_with_other_pixels_are_named(tiny, tmp_path, caplog):
    runs = [tiny(name, "off", steps=1) for name in ("one", "alike", "fewer")]
    runs[2] = replace(runs[2], data=replace(runs[2].data, train_fraction=0.5))
    for run in runs:
        train(run)
    few = ["--queries", "5", "--gallery", "5", "--images", "2"]
    assert main(["probe", *(str(run.out) for run in runs), *few]) == 0
    (told,) = [record.getMessage() for record in caplog.records if "other pixels" in record.getMessage()]
    assert told == (
        f"{runs[2].out} is scored with other pixels than {runs[0].out}: it was trained with --train-fraction 0.5"
    )


def test_runs_of_one_dataset(tiny, tmp_path, camvid, capsys):
    train(tiny("one", "off", steps=1))
    data = DataConfig(dataset="camvid", root=camvid(), size=(32, 48))
    train(replace(tiny("other", "off", steps=1), data=data))
    assert main(["probe", str(tmp_path / "one"), str(tmp_path / "other"), "--images", "1"]) == 2
    assert "of synthetic" in capsys.readouterr().err
