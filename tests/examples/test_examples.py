"""Each example runs to its end as a user starts it, learns, fills its bank, and goes on from its own checkpoint."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.support.pages import ROOT
from tools import processes

EXAMPLES = ROOT / "examples"
SITE = Path(__file__).with_name("site")  # see there
FILES = sorted(EXAMPLES.rglob("*.py")) + sorted(EXAMPLES.rglob("*.sh"))


def run(*command: object, cwd: Path, path: Path = ROOT, **environment: str) -> str:
    """What a command prints, once it has ended well."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (SITE, ROOT, path))),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",  # nothing is fetched
        **environment,
    }
    done = processes.run(command, one_stream=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def need(*packages: str) -> None:
    """Skip what needs a package that is not there; none is imported here, where nothing stands in for what it lacks."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-examples")


def numbers(output: str, name: str) -> list[float]:
    """The values that are printed behind a name."""
    return [float(value) for value in re.findall(rf"\b{name}['\"]?:? ['\"]?([-+.\deE]+|nan|inf)", output)]


def keys_of(state: dict[str, torch.Tensor]) -> int:
    """How many keys the one bank of a checkpoint holds."""
    (labels,) = (value for name, value in state.items() if name.endswith("bank.key_labels"))
    return int((labels >= 0).sum())


def assert_learns(output: str, name: str = "cross_entropy") -> None:
    """The sum rises when the contrast sets in, so a part that is there from the beginning is looked at."""
    losses = numbers(output, name)
    assert losses[-1] < losses[0] - 0.1, output


def assert_contrast_learns(output: str, name: str = "loss", first: int = 1) -> None:
    """A sum, from the number on that is printed after the warm-up."""
    losses = numbers(output, name)
    assert losses[-1] < losses[first], output


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_they_are_short(file):
    assert len(file.read_text().splitlines()) <= 80


LOOPS = [
    ("plain_loop.py", "torch"),
    ("torchvision_deeplabv3.py", "torchvision"),
]


@pytest.mark.parametrize(("example", "package"), LOOPS, ids=[example for example, _ in LOOPS])
def test_a_loop(example, package, tmp_path):
    need(package)
    first = run(sys.executable, EXAMPLES / example, tmp_path / "new", cwd=tmp_path)
    assert_learns(first)
    assert numbers(first, "contrast")[0] == 0  # the warm-up
    assert numbers(first, "contrast")[-1] > 0
    assert numbers(first, "anchors")[-1] > 0
    assert numbers(first, "accuracy")[0] > 0.4
    saved = torch.load(tmp_path / "new" / "last.pt")
    assert any(name.startswith("head.") for name in saved["model"])
    keys = keys_of(saved["criterion"])
    assert keys > 100
    again = run(sys.executable, EXAMPLES / example, tmp_path / "new", cwd=tmp_path)
    assert f"goes on with {keys} keys" in again
    assert numbers(again, "contrast")[0] > 0  # the warm-up is over
    assert numbers(again, "cross_entropy")[0] < numbers(first, "cross_entropy")[0]


def test_a_loop_without_a_folder(tmp_path):
    assert_learns(run(sys.executable, EXAMPLES / "plain_loop.py", cwd=tmp_path))
    assert not list(tmp_path.iterdir())


def test_accelerate(tmp_path):
    need("accelerate")
    first = run(sys.executable, EXAMPLES / "accelerate_loop.py", tmp_path, cwd=tmp_path)
    assert_learns(first)
    assert numbers(first, "contrast")[0] == 0
    assert numbers(first, "contrast")[-1] > 0
    keys = keys_of(torch.load(tmp_path / "state" / "custom_checkpoint_0.pkl"))
    assert keys > 100
    from safetensors.torch import load_file

    assert any(name.startswith("head.") for name in load_file(tmp_path / "state" / "model.safetensors"))
    again = run(sys.executable, EXAMPLES / "accelerate_loop.py", tmp_path, cwd=tmp_path)
    assert f"goes on with {keys} keys" in again
    assert numbers(again, "contrast")[0] > 0


def test_transformers(tmp_path):
    need("transformers")
    from safetensors.torch import load_file

    first = run(sys.executable, EXAMPLES / "hf_segformer.py", tmp_path, cwd=tmp_path)
    assert_contrast_learns(first)
    state = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert any(name.startswith("head.") for name in state)
    assert keys_of(state) > 100
    assert state["criterion.contrast.step"] == 5
    again = run(sys.executable, EXAMPLES / "hf_segformer.py", tmp_path, cwd=tmp_path)
    assert numbers(again, "loss")[0] < numbers(first, "loss")[1]
    later = load_file(tmp_path / "checkpoint-40" / "model.safetensors")
    assert keys_of(later) > keys_of(state)
    assert later["criterion.contrast.step"] == 5


def test_transformers_divides_an_accumulated_loss(tmp_path):
    """It takes a model whose forward has **kwargs for one that does so by itself, and logs the sum of its batches."""
    need("transformers")
    program = (
        "from hf_segformer import *; "
        "sizes = dict(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4); "
        "model = SegformerWithContrast(SegformerConfig(num_labels=CLASSES, decoder_hidden_size=64, **sizes)); "
        "settings = dict(max_steps=1, gradient_accumulation_steps=4, logging_steps=1, save_strategy='no'); "
        "Trainer(model, TrainingArguments('out', use_cpu=True, report_to=[], **settings), "
        "train_dataset=Scenes()).train()"
    )
    output = run(sys.executable, "-c", program, cwd=tmp_path, path=EXAMPLES)
    assert 1 < numbers(output, "loss")[0] < 2.5  # of five classes, log 5


def column_of(folder: Path, version: int, name: str) -> list[float]:
    """What Lightning's CSVLogger wrote under a name in the run of this number."""
    (path,) = folder.rglob(f"version_{version}/metrics.csv")
    lines = [line.split(",") for line in path.read_text().splitlines()]
    return [float(line[lines[0].index(name)]) for line in lines[1:] if line[lines[0].index(name)]]


def test_lightning(tmp_path):
    need("lightning", "segmentation_models_pytorch")
    run(sys.executable, EXAMPLES / "lightning_smp.py", tmp_path, cwd=tmp_path)
    losses, contrasts = (column_of(tmp_path, 0, name) for name in ("cross_entropy", "contrast"))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert contrasts[:5] == [0] * 5
    assert contrasts[5] > 0
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert any(name.startswith("model.head.") for name in saved["state_dict"])
    keys = keys_of(saved["state_dict"])
    assert keys > 100
    run(sys.executable, EXAMPLES / "lightning_smp.py", tmp_path, cwd=tmp_path)
    again = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert again["epoch"] > saved["epoch"]
    assert keys_of(again["state_dict"]) >= keys
    assert column_of(tmp_path, 1, "contrast")[0] > 0  # the warm-up was over


def test_mmsegmentation(tmp_path):
    need("mmengine", "mmcv", "mmseg")
    folder = EXAMPLES / "mmseg_config"
    program = (
        "from mmengine import Config, runner; "
        f"runner.Runner.from_cfg(Config.fromfile({str(folder / 'config.py')!r})).train()"
    )
    output = run(sys.executable, "-c", program, cwd=tmp_path, path=folder)
    assert_learns(output, "decode.loss_ce")
    contrasts = numbers(output, "decode.loss_contrast")
    assert contrasts[:5] == [0] * 5
    assert contrasts[-1] > 0
    assert numbers(output, "mIoU")
    state = torch.load(tmp_path / "work" / "iter_15.pth", weights_only=False)["state_dict"]
    assert any(name.startswith("decode_head.embed.") for name in state)
    assert keys_of(state) > 100
    program = (
        "from mmengine import Config, runner; "
        f"config = Config.fromfile({str(folder / 'config.py')!r}); "
        "config.merge_from_dict({'load_from': 'work/iter_15.pth', 'resume': True, 'train_cfg.max_iters': 20}); "
        "runner.Runner.from_cfg(config).train()"
    )
    # mmengine's checkpoints hold more than torch reads unless it is told to.
    again = run(
        sys.executable, "-c", program, cwd=tmp_path, path=folder, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"
    )
    assert len(numbers(again, "decode.loss_contrast")) == 5
    assert numbers(again, "decode.loss_contrast")[0] > 0
    assert numbers(again, "decode.loss_ce")[0] < numbers(output, "decode.loss_ce")[0]
    assert torch.load(tmp_path / "work" / "iter_20.pth", weights_only=False)["meta"]["iter"] == 20


def test_mmsegmentation_in_a_cascade_and_without_a_bank(tmp_path):
    """As OCR's head, which is given the output of the head before it too."""
    need("mmengine", "mmcv", "mmseg")
    program = (
        "import torch, pixel_contrast as example; "
        "from mmseg.models.decode_heads import OCRHead; "
        "kind = type('OCRHeadWithContrast', (example.WithContrast, OCRHead), {}); "
        "settings = dict(ocr_channels=8, in_channels=16, channels=8, num_classes=5, norm_cfg=dict(type='BN')); "
        "head = kind(embed_dim=32, contrast=dict(min_pixels=5), **settings); "
        "samples = [example.Scenes(2, 64)[index]['data_samples'] for index in range(2)]; "
        "losses = head.loss([torch.randn(2, 16, 16, 16)], torch.randn(2, 5, 16, 16), samples, None); "
        "print('loss_contrast', float(losses['loss_contrast']))"
    )
    output = run(sys.executable, "-c", program, cwd=tmp_path, path=EXAMPLES / "mmseg_config")
    assert numbers(output, "loss_contrast")[0] > 0


RANKS = [
    ("plain_loop.py", "torch"),
    ("accelerate_loop.py", "accelerate"),
    ("hf_segformer.py", "transformers"),
]


@pytest.mark.parametrize(("example", "package"), RANKS, ids=[example for example, _ in RANKS])
def test_two_ranks(example, package, tmp_path):
    need(package)
    output = run(EXAMPLES / "ddp_torchrun.sh", EXAMPLES / example, tmp_path, cwd=tmp_path)
    if example == "hf_segformer.py":
        assert_contrast_learns(output)
        assert numbers(output, "loss")[0] < 2.5  # a mean over the ranks too
    else:
        assert_learns(output)
        # Two that trained apart would print each line twice.
        steps = re.findall(r"^(?:epoch \d+ )?step \d+", output, re.M)
        assert len(steps) == len(set(steps)) > 1


def test_two_ranks_by_default(tmp_path):
    assert_learns(run(EXAMPLES / "ddp_torchrun.sh", cwd=tmp_path))
