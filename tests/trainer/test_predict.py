"""Masks and overlays against the prediction itself, and what happens to files that are not as they should be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.checkpoints import CheckpointStore
from pixcontrast_ext.trainer.config import DataConfig, InferenceConfig
from pixcontrast_ext.trainer.data import dataset_spec
from pixcontrast_ext.trainer.evaluate import load_model
from pixcontrast_ext.trainer.inference import predict
from pixcontrast_ext.trainer.predict import predict_folder
from pixcontrast_ext.trainer.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny_of_module):
    """A run on images of 32x48 whose model predicts another class every few pixels."""
    torch.manual_seed(20210118)
    config = tiny_of_module
    train(config)
    store = CheckpointStore(config.out / "checkpoints")
    state = store.load_latest()[1]
    state["model"]["seg_head.1.weight"].normal_(std=5)
    store.save(2, state)
    return config.out


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("one.png", (40, 56, 3)), ("two.jpg", (33, 47, 3)), ("grey.png", (32, 32))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def mask_of(out, name):
    return np.array(Image.open(out / "masks" / f"{name}.png"))


def predicted(model, image, size, options=None):
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        return predict(model, batch, size, options)[0].numpy()


def test_a_folder_is_predicted(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    views = ["--window", "24", "32", "--flip"]
    arguments = ["--checkpoint", str(run), "--images", str(photos), "--out", str(out), "--device", "cpu"]
    assert main(["predict", *arguments, *views]) == 0
    assert f"3 images predicted, masks and overlays in {out}" in capsys.readouterr().out
    spec = dataset_spec("synthetic")
    model, _, _ = load_model(run, CPU)
    palette = np.array(spec.colours, np.uint8)
    for path in (photos / "one.png", photos / "two.jpg", photos / "grey.png"):
        whole = Image.open(path).convert("RGB")
        image, options = np.array(whole), InferenceConfig(window=(24, 32), flip=True)
        expected = predicted(
            model, whole.resize((48, 32), Image.Resampling.BILINEAR), image.shape[:2], options
        )
        assert len(np.unique(expected)) > 3
        assert np.array_equal(mask_of(out, path.stem), expected)
        shown = np.array(Image.open(out / "masks" / f"{path.stem}.png").convert("RGB"))
        assert np.array_equal(shown, palette[expected])
        overlay = np.array(Image.open(out / "overlays" / f"{path.stem}.png"))
        mean = (image.astype(int) + palette[expected]) / 2
        assert overlay.shape == image.shape
        assert np.abs(overlay - mean).max() <= 1
    assert {path.name for path in (out / "masks").iterdir()} == {"one.png", "two.png", "grey.png"}
    classes = json.loads((out / "classes.json").read_text())
    assert [each["name"] for each in classes] == list(spec.classes)
    assert [tuple(each["colour"]) for each in classes] == list(spec.colours)


def test_an_exported_model_predicts_the_same(run, photos, tmp_path):
    exported = tmp_path / "model.pt"
    assert main(["export", "--checkpoint", str(run), "--out", str(exported)]) == 0
    for name, checkpoint in (("run", run), ("exported", exported)):
        arguments = ["--checkpoint", str(checkpoint), "--images", str(photos), "--out", str(tmp_path / name)]
        assert main(["predict", *arguments]) == 0
    assert np.array_equal(mask_of(tmp_path / "run", "one"), mask_of(tmp_path / "exported", "one"))


def test_images_are_shown_to_the_network_as_in_training(run, photos, tmp_path):
    """A model trained on half-size images gets half-size images, and its mask has the full size."""
    model, config, _ = load_model(run, CPU)
    data = replace(config.data, size=None, scale=0.5)
    predict_folder(model, dataset_spec("synthetic"), data, photos, tmp_path / "half", CPU)
    image = Image.open(photos / "one.png")
    expected = predicted(model, image.resize((28, 20), Image.Resampling.BILINEAR), (40, 56))
    assert np.array_equal(mask_of(tmp_path / "half", "one"), expected)


def test_a_photograph_is_turned_as_its_camera_says(run, photos, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6  # a quarter turn
    image = Image.open(photos / "one.png")
    for path in photos.iterdir():
        path.unlink()
    image.save(photos / "camera.png", exif=tags)
    model, _, _ = load_model(run, CPU)
    predict_folder(model, dataset_spec("synthetic"), DataConfig(), photos, tmp_path / "out", CPU)
    expected = predicted(model, image.transpose(Image.Transpose.ROTATE_270), (56, 40))
    assert np.array_equal(mask_of(tmp_path / "out", "camera"), expected)


def test_a_damaged_exif_block_does_not_matter(run, photos, tmp_path):
    image = Image.open(photos / "one.png")
    image.save(photos / "camera.jpg", exif=b"Exif\0\0no TIFF file at all", dpi=(72, 72))
    model, _, _ = load_model(run, CPU)
    found = predict_folder(model, dataset_spec("synthetic"), DataConfig(), photos, tmp_path / "out", CPU)
    assert found.images == 4
    assert not found.problems
    assert mask_of(tmp_path / "out", "camera").shape == (40, 56)


def test_what_cannot_be_read_is_named_and_the_rest_predicted(run, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes((photos / "one.png").read_bytes()[:300])
    Image.fromarray(np.full((40, 56), 40_000, np.uint16)).save(photos / "deep.png")
    out = tmp_path / "out"
    assert main(["predict", "--checkpoint", str(run), "--images", str(photos), "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "3 images predicted" in told.out
    assert told.err.startswith(f"error: {photos / 'broken.png'} cannot be read as an image")
    assert f"{photos / 'deep.png'} has 16 or 32 bits a pixel in one channel" in told.err
    assert len(list((out / "overlays").iterdir())) == 3


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "error: folder {folder} does not exist"),
        (lambda folder: folder.mkdir(), "error: folder {folder} holds no .png or .jpg"),
    ],
)
def test_a_folder_without_images_is_told(run, tmp_path, capsys, prepare, message):
    folder = tmp_path / "absent"
    prepare(folder)
    arguments = ["--checkpoint", str(run), "--images", str(folder), "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message.format(folder=folder))
    assert not (tmp_path / "out").exists()


def test_two_images_of_one_name_are_refused(run, photos, tmp_path, capsys):
    Image.open(photos / "one.png").save(photos / "one.jpg")
    arguments = ["--checkpoint", str(run), "--images", str(photos), "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments]) == 2
    assert "one.png have the same name: their masks would be one file" in capsys.readouterr().err


def test_what_was_predicted_is_not_predicted_again(run, photos, tmp_path):
    model, config, _ = load_model(run, CPU)
    for out in (photos / "predicted", photos):
        first, again = (
            predict_folder(model, dataset_spec("synthetic"), config.data, photos, out, CPU) for _ in range(2)
        )
        assert first.images == again.images
        shutil.rmtree(photos / "predicted", ignore_errors=True)


@pytest.mark.parametrize("name", ["masks/one.png", "overlays/one.png", "classes.json"])
def test_files_of_a_data_set_are_not_replaced(run, photos, tmp_path, capsys, name):
    out = tmp_path / "data"
    truth = out / name
    truth.parent.mkdir(parents=True)
    truth.write_text('["the", "truth"]')
    arguments = ["--checkpoint", str(run), "--images", str(photos), "--out", str(out)]
    assert main(["predict", *arguments]) == 2
    assert "is there already, and was not predicted: choose another --out" in capsys.readouterr().err
    assert truth.read_text() == '["the", "truth"]'
    assert [path for path in out.rglob("*") if path.is_file()] == [truth]


def test_folders_within_are_predicted_and_masks_may_hold_the_datasets_ids(run, tmp_path):
    """As for Cityscapes: its test images lie in a folder for each city, and its server takes labelIds."""
    images = tmp_path / "test"
    rng = np.random.default_rng(0)
    for city in ("berlin", "bonn"):
        (images / city).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(images / city / f"{city}_0.png")
    model, config, _ = load_model(run, CPU)
    spec = replace(dataset_spec("synthetic"), ids=tuple(range(7, 7 + len(dataset_spec("synthetic").classes))))
    plain, ids = tmp_path / "plain", tmp_path / "ids"
    assert predict_folder(model, spec, config.data, images, plain, CPU).images == 2
    assert predict_folder(model, spec, config.data, images, ids, CPU, ids=True).images == 2
    for name in ("berlin_0", "bonn_0"):
        assert (mask_of(ids, name) == mask_of(plain, name) + 7).all()
        assert Image.open(ids / "masks" / f"{name}.png").mode == "L"
    assert [each["value"] for each in json.loads((ids / "classes.json").read_text())] == list(spec.ids)
    (images / "bonn" / "berlin_0.png").write_bytes((images / "berlin" / "berlin_0.png").read_bytes())
    with pytest.raises(ValueError, match=r"berlin_0\.png and .*berlin_0\.png have the same name"):
        predict_folder(model, spec, config.data, images, plain, CPU)
    with pytest.raises(ValueError, match="--ids is given"):
        predict_folder(model, dataset_spec("synthetic"), config.data, images, plain, CPU, ids=True)
