"""Features tapped out of a network, in all that trainers do with one."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from pixcontrast_ext import FeatureTap, ProjectionHead, WithEmbeddings
from tests.support import two_ranks
from tests.support.tap_ranks import Segmenter

pytestmark = pytest.mark.whole

IMAGES = torch.randn(2, 3, 8, 8)


def make(network=None, **settings):
    network = network or Segmenter()
    return WithEmbeddings(network, settings.pop("layer", "classifier.1"), ProjectionHead(6, 5), **settings)


def expected(model, images=IMAGES):
    """What a network that returns its features would give."""
    network = model.network
    features = network.classifier[0](network.body(images))
    return network.classifier[1](features), model.head(features)


def gradients(model, results):
    loss = sum((result * torch.arange(result.shape[1])[:, None, None]).sin().mean() for result in results)
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_same(model, found, images=IMAGES):
    """Values and gradients of all weights."""
    reference = expected(model, images)
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradients(model, found), gradients(model, reference))


# What is taken


def test_the_input_of_a_layer_with_its_graph():
    network = Segmenter()
    tap = FeatureTap(network.classifier[1])
    network(IMAGES)
    seen = tap.take()
    assert torch.equal(seen, network.classifier[0](network.body(IMAGES)))
    assert torch.autograd.grad(seen.sum(), network.body[0].weight)[0].any()


def test_the_output_of_a_layer():
    network = Segmenter()
    tap = FeatureTap(network.body, of="output")
    network(IMAGES)
    assert torch.equal(tap.take(), network.body(IMAGES))


class Echo(nn.Module):
    """Returns what it is given."""

    def forward(self, *args, **kwargs):
        return args[0] if args else kwargs


A, B = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("given", "index", "found"),
    [
        ([A, B], -1, B),
        ((A, B), 0, A),
        ({"out": A, "aux": B}, "out", A),
        ({"out": A, "aux": B}, "aux", B),
        (A, 7, A),
    ],
)
@pytest.mark.parametrize("of", ["input", "output"])
def test_index_chooses_from_a_collection(of, given, index, found):
    layer = Echo()
    tap = FeatureTap(layer, of, index)
    layer(given)
    assert tap.take() is found


def test_keyword_arguments():
    layer = Echo()
    tap = FeatureTap(layer)
    layer(scale=2, features=A)
    assert tap.take() is A
    layer(3, features=A)  # no positional tensor
    assert tap.take() is A
    layer(size=(4, 4), features=A)  # a collection, and none of tensors
    assert tap.take() is A
    layer((4, 4), [], A)
    assert tap.take() is A
    named = FeatureTap(layer, index="b")
    with pytest.raises(ValueError, match=r"the layer Echo was given a, b: index must name one of them"):
        layer(a=A, b=B)
    tap.remove()
    layer(a=A, b=B)
    assert named.take() is B


def test_the_last_call_counts():
    network = Segmenter()
    tap = FeatureTap(network.classifier[1])
    network(IMAGES)
    network(2 * IMAGES)
    assert torch.equal(tap.take(), network.classifier[0](network.body(2 * IMAGES)))


@pytest.mark.parametrize(
    ("given", "settings", "error", "message"),
    [
        (
            [A],
            dict(index=1),
            ValueError,
            "the input of the layer Echo is a list of 1: index must be a position",
        ),
        ([A], dict(index=-2), ValueError, "index must be a position in it, got -2"),
        ((A,), dict(index="out"), ValueError, "is a tuple of 1: index must be a position in it, got 'out'"),
        ({"out": A}, {}, ValueError, "is a dict of out: index must be one of them, got -1"),
        ({"out": A}, dict(of="output"), ValueError, "the output of the layer Echo is a dict of out"),
        ([A, 3], {}, TypeError, "the input of the layer Echo must be a tensor, got int"),
        (3, {}, TypeError, "the layer Echo was given no tensor"),
        (3, dict(of="output"), TypeError, "the output of the layer Echo must be a tensor, got int"),
    ],
)
def test_what_does_not_fit_is_named(given, settings, error, message):
    layer = Echo()
    FeatureTap(layer, **settings)
    with pytest.raises(error, match=message):
        layer(given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("classifier",), TypeError, "module must be a torch.nn.Module, got str"),
        ((nn.ReLU(), "inputs"), ValueError, "of must be 'input' or 'output', got 'inputs'"),
        ((nn.ReLU(), "input", 1.0), TypeError, "index must be an int or a str, got 1.0"),
        ((nn.ReLU(), "input", True), TypeError, "index must be an int or a str, got True"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FeatureTap(*arguments)


# What is kept


def test_what_was_taken_is_forgotten():
    network = Segmenter()
    tap = FeatureTap(network.classifier[1])
    with pytest.raises(RuntimeError, match=r"the layer Conv2d was not called since its input was last taken"):
        tap.take()
    network(IMAGES)
    seen = weakref.ref(tap.take())
    gc.collect()
    assert seen() is None
    with pytest.raises(RuntimeError, match=r"the layer Conv2d was not called"):
        tap.take()


def test_a_removed_tap_costs_nothing():
    network = Segmenter()
    for of in ("input", "output"):
        tap = FeatureTap(network.classifier[1], of)
        network(IMAGES)
        tap.remove()
        with pytest.raises(RuntimeError, match=r"was not called"):
            tap.take()
    assert not network.classifier[1]._forward_pre_hooks
    assert not network.classifier[1]._forward_hooks


def test_the_network_alone_keeps_nothing_and_runs_no_head():
    model = make()
    model.head = nn.Linear(1, 1)  # which would raise
    output = model.network(IMAGES)
    assert torch.equal(output, model.network.classifier(model.network.body(IMAGES)))
    with pytest.raises(RuntimeError, match=r"was not called"):
        model.tap.take()


def test_a_forward_that_fails_keeps_nothing():
    """Neither its features for the next step, nor the tap awake for the network alone."""
    network = Segmenter()
    model = make(network)
    network.fails = True
    with pytest.raises(ArithmeticError):
        model(IMAGES)
    network.fails = False
    network(IMAGES)
    with pytest.raises(RuntimeError, match=r"was not called"):
        model.tap.take()
    assert_same(model, model(IMAGES))


def test_a_layer_that_the_network_does_not_call_is_named():
    model = make(layer="unused")
    with pytest.raises(RuntimeError, match=r"the layer 'unused' \(Conv2d\) was not called"):
        model(IMAGES)


# The model


@pytest.mark.parametrize("layer", ["classifier.1", "the module"])
def test_output_and_embeddings(layer):
    network = Segmenter()
    model = make(network, layer=network.classifier[1] if layer == "the module" else layer)
    assert_same(model, model(IMAGES))
    assert_same(model, model(images=2 * IMAGES), 2 * IMAGES)


def test_an_output_by_its_key():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 6, 1)

        def forward(self, images):
            return {"low": self.body(images), "high": images}

    network = nn.Sequential(Backbone())
    model = make(network, layer="0", of="output", index="low")
    output, embeddings = model(IMAGES)
    assert output.keys() == {"low", "high"}
    assert torch.equal(embeddings, model.head(network[0].body(IMAGES)))


def test_keys_of_the_state_dict():
    model = make()
    keys = {f"network.{key}" for key in model.network.state_dict()}
    keys |= {f"head.{key}" for key in model.head.state_dict()}
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("classifer.1",),
            ValueError,
            r"no layer 'classifer.1'; its nearest are 'classifier.1', 'classifier",
        ),
        (("module.classifier.1",), ValueError, "its nearest are 'classifier.1'"),
        (("xyz",), ValueError, "its nearest are 'body', 'classifier', 'unused'"),
        ((nn.ReLU(),), ValueError, "layer must be a module of the network, got another ReLU"),
        ((7,), TypeError, "layer must be a path or a torch.nn.Module, got int"),
    ],
)
def test_a_layer_that_is_not_there(arguments, error, message):
    with pytest.raises(error, match=message):
        WithEmbeddings(Segmenter(), *arguments, nn.Identity())


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_network_alone_are_told_where_they_belong(strict):
    wrapped = make()
    old = wrapped.network.state_dict()
    within = nn.ModuleDict({"inner": wrapped})
    for model, state in ((wrapped, old), (within, {f"inner.{name}": value for name, value in old.items()})):
        with pytest.raises(
            RuntimeError, match=r"weights of the network alone .*: load them by model\.network"
        ):
            model.load_state_dict(state, strict=strict)
    wrapped.network.load_state_dict(old)
    wrapped.load_state_dict(wrapped.state_dict(), strict=strict)
    wrapped.load_state_dict({}, strict=False)


def test_a_layer_within_a_wrapper_is_the_nearest():
    with pytest.raises(ValueError, match=r"its nearest are '0.classifier.1'"):
        WithEmbeddings(nn.Sequential(Segmenter()), "classifier.1", nn.Identity())


def test_a_layer_of_two_paths_has_both():
    network = Segmenter()
    network.tied = network.classifier[1]
    model = make(network, layer="tied")
    assert_same(model, model(IMAGES))


def test_network_and_head_must_be_modules():
    with pytest.raises(TypeError, match=r"head must be a torch.nn.Module, got function"):
        WithEmbeddings(Segmenter(), "unused", lambda features: features)
    with pytest.raises(TypeError, match=r"network must be a torch.nn.Module, got str"):
        WithEmbeddings("network", "unused", nn.Identity())


# Copies


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, by_pickle, by_torch_save, lambda model: AveragedModel(model).module]


@pytest.mark.parametrize("of", ["input", "output"])
@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save", "AveragedModel"])
def test_a_copy_has_a_tap_of_its_own(duplicate, of):
    """A hook that is a closure would stay with the original: the copy's embeddings would be the original's."""
    model = make() if of == "input" else make(layer="classifier.0", of="output")
    model(IMAGES)
    other = duplicate(model)
    with torch.no_grad():
        for weight in other.network.parameters():
            weight.mul_(-1.5)
    model.tap.records = other.tap.records = True
    other.network(IMAGES)
    with pytest.raises(RuntimeError, match=r"was not called"):
        model.tap.take()
    other.tap.forget()
    assert_same(other, other(IMAGES))
    assert_same(model, model(IMAGES))
    other.tap.remove()
    assert not other.network.classifier[1]._forward_pre_hooks
    assert not other.network.classifier[0]._forward_hooks
    assert_same(model, model(IMAGES))


def test_a_copy_between_forward_and_take_has_nothing_to_take():
    """A tensor with a graph cannot be copied."""
    network = nn.ModuleList([Segmenter()])
    network.tap = FeatureTap(network[0].classifier[1])
    network[0](IMAGES)
    other = copy.deepcopy(network)
    with pytest.raises(RuntimeError, match=r"was not called"):
        other.tap.take()
    other[0](IMAGES)
    assert torch.equal(other.tap.take(), network.tap.take())


# In training


@pytest.mark.parametrize("compiled", ["eager", "aot_eager"])
def test_compiled_in_one_graph(compiled):
    model = make()
    counter = CompileCounterWithBackend(compiled)
    run = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        assert_same(model, run(IMAGES))
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError, match=r"was not called"):
        model.tap.take()


def test_a_compiled_network_within():
    network = Segmenter()
    model = make(network)
    network.compile(backend="aot_eager", fullgraph=True)
    for factor in (1, 2):
        assert_same(model, model(factor * IMAGES), factor * IMAGES)
        network(IMAGES)
        with pytest.raises(RuntimeError, match=r"was not called"):
            model.tap.take()


def test_a_tap_alone_in_a_compiled_network():
    network = Segmenter()
    tap = FeatureTap(network.classifier[1])
    run = torch.compile(network, backend="aot_eager", fullgraph=True)
    for factor in (1, 2):
        run(factor * IMAGES)
        torch.testing.assert_close(tap.take(), network.classifier[0](network.body(factor * IMAGES)))


def test_autocast():
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(IMAGES)
        reference = expected(model)
    assert found[1].dtype == torch.bfloat16
    for one, other in zip(found, reference, strict=True):
        assert torch.equal(one, other)


def test_accumulated_gradients():
    model = make().eval()  # of the halves, batch norm would take other statistics
    parameters = list(model.parameters())
    for half in IMAGES.split(1):
        logits, embeddings = model(half)
        (logits.square().sum() + embeddings.square().sum()).backward()
    logits, embeddings = expected(model)
    whole = torch.autograd.grad(
        logits.square().sum() + embeddings.square().sum(), parameters, allow_unused=True
    )
    for weight, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.parametrize("part", ["body", "all"])
def test_activation_checkpointing(part):
    """Of the recomputation nothing is kept, whatever part of the network is checkpointed."""
    network = Segmenter()
    model = make(network)
    network.checkpointed = part
    assert_same(model, model(IMAGES))
    tap = FeatureTap(network.classifier[1])
    output = network(IMAGES)
    assert tap.take().requires_grad
    output.sum().backward()
    with pytest.raises(RuntimeError, match=r"was not called"):
        tap.take()


def test_checkpointing_that_runs_a_layer_without_gradients_gives_features_without_a_graph():
    """As the docstring says: nothing can be done about it from a hook."""
    network = Segmenter()
    tap = FeatureTap(network.classifier[1])
    checkpoint(network, IMAGES.clone().requires_grad_(), use_reentrant=True)
    assert not tap.take().requires_grad


@pytest.mark.parametrize("of", ["input", "output"])
def test_replicas_of_data_parallel_are_refused(of):
    """Its threads would take each other's features; transformers' Trainer wraps a model so if it sees several GPUs."""
    layer = nn.Identity()
    tap = FeatureTap(layer, of)
    with pytest.raises(RuntimeError, match=r"does not serve torch.nn.DataParallel"):
        layer._replicate_for_data_parallel()(IMAGES)
    tap.records = False
    layer._replicate_for_data_parallel()(IMAGES)


def test_two_ranks(tmp_path):
    """`DistributedDataParallel` and FSDP2 reduce the head with the network: as one process with the whole batch."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    two_ranks.run(tmp_path, *torchrun, "-m", "tests.support.tap_ranks", tmp_path)
    results = {
        name: torch.load(tmp_path / f"{name}.pt") for name in ("together", "rank0", "rank1", "sharded")
    }
    together = results.pop("together")
    for result, state in results.items():
        assert state.keys() == together.keys()
        for name, value in together.items():
            torch.testing.assert_close(
                state[name], value, msg=lambda text, of=f"{result}, {name}": f"{of}: {text}"
            )
    for name, value in results["rank0"].items():
        assert torch.equal(value, results["rank1"][name]), name
