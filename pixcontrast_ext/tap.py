"""Features out of a network that returns only its logits.

A head needs what the classifier reads, and no network that people take from a library returns it. A hook on that layer
gets at it without a change to the network.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FeatureTap:
    """Keeps the tensor that a layer received, or returned, in the last forward of its network, until it is taken.

    It stands for a hook of one's own, such as

        seen = []
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    but keeps one tensor at most, names what is wrong, and goes along when the network is copied or pickled together
    with it: then the copy's layer feeds the copy's tap. The tensor keeps its graph, so gradients reach the network
    through it, and its dtype, shape and device. Until it is taken it stays alive, in evaluation too; `WithEmbeddings`
    takes it in every forward.

    If the layer is called several times, the last call counts. A call within a backward, which is activation
    checkpointing at work, does not. With `use_reentrant=True` a checkpointed layer runs without gradients, and so has
    no graph that a head could train the network through; with `use_reentrant=False` it has.

    Register it before `torch.compile` traces the network, and `remove()` it before `torch.jit.script`.
    `torch.nn.DataParallel`, whose threads share the tap, is refused; `DistributedDataParallel` is supported.

    Args:
        module: the layer.
        of: "input": the first positional argument that is a tensor or a collection of them; if there is none, the only
            such keyword argument, or the one that is called `index`. "output": what the layer returns.
        index: which tensor of a list or tuple, by position, or of a dict, by key; of no effect on a tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value. In the forward of the network: the layer was
            given, or returned, something that `index` does not fit.
        RuntimeError: in the forward of a replica of `torch.nn.DataParallel`.
    """

    def __init__(self, module: nn.Module, of: str = "input", index: int | str = -1) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if of not in ("input", "output"):
            raise ValueError(f"of must be 'input' or 'output', got {of!r}")
        if isinstance(index, bool) or not isinstance(index, (int, str)):
            raise TypeError(f"index must be an int or a str, got {index!r}")
        self.of, self.index = of, index
        self.layer = type(module).__name__
        self.records = True
        self._seen: Tensor | None = None
        # Bound methods, because a copy of one belongs to the copy of its tap; a copied closure keeps the old one.
        if of == "input":
            self._handle = module.register_forward_pre_hook(self._see_input, with_kwargs=True)
        else:
            self._handle = module.register_forward_hook(self._see_output)

    def take(self) -> Tensor:
        """The tensor of the last forward, which the tap forgets.

        Raises:
            RuntimeError: the layer was not called since the tensor was last taken.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError(f"the layer {self.layer} was not called since its {self.of} was last taken")
        return seen

    def forget(self) -> None:
        """Let go of a tensor that nobody will take."""
        self._seen = None

    def remove(self) -> None:
        """Take the hook off the layer, and forget."""
        self._handle.remove()
        self._seen = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a tensor with a graph can neither be copied nor pickled

    def _see_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_asked(module):
            return
        given = [value for value in args if _holds_tensors(value)][:1]
        if not given and self.index in kwargs:
            given = [kwargs[str(self.index)]]
        elif not given:
            names = [name for name, value in kwargs.items() if _holds_tensors(value)]
            if len(names) > 1:
                raise ValueError(
                    f"the layer {self.layer} was given {', '.join(names)}: index must name one of them"
                )
            given = [kwargs[name] for name in names]
        if not given:
            raise TypeError(f"the layer {self.layer} was given no tensor")
        self._seen = self._chosen(given[0])

    def _see_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_asked(module):
            self._seen = self._chosen(output)

    def _is_asked(self, module: nn.Module) -> bool:
        if torch.compiler.is_compiling() or not self.records:
            return self.records
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "a tap does not serve torch.nn.DataParallel, whose threads share it: take DistributedDataParallel"
            )
        return torch._C._current_graph_task_id() == -1

    def _chosen(self, value: Any) -> Tensor:
        if isinstance(value, Mapping):
            if self.index not in value:
                raise ValueError(
                    f"the {self.of} of the layer {self.layer} is a dict of {', '.join(map(str, value))}: index must be "
                    f"one of them, got {self.index!r}"
                )
            value = value[self.index]
        elif isinstance(value, (list, tuple)):
            size = len(value)
            if not isinstance(self.index, int) or not -size <= self.index < size:
                raise ValueError(
                    f"the {self.of} of the layer {self.layer} is a {type(value).__name__} of {size}: index must be "
                    f"a position in it, got {self.index!r}"
                )
            value = value[self.index]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the {self.of} of the layer {self.layer} must be a tensor, got {type(value).__name__}"
            )
        return value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value)
    )


class WithEmbeddings(nn.Module):
    """A network, and beside it the head that training needs: `model(...)` returns (the network's output, embeddings).

    It replaces

        features, logits = network(images)
        return logits, head(features)

    for a network that does not return its features. Whatever wraps, saves, averages or optimises the model has the head
    with it; keys of the state dict begin with "network." and "head.". All that `forward` is given goes to the network.
    For inference call `model.network`, or deploy that alone: the head does not run and nothing is kept.

    `torch.compile(model, fullgraph=True)`, `DistributedDataParallel`, autocast, gradient accumulation, `copy.deepcopy`
    and pickle work. **Activation checkpointing** of the network works if the layer is not in a part that is
    checkpointed with `use_reentrant=True`, see `FeatureTap`. The head sees all pixels; to project only those that the
    loss uses give `torch.nn.Identity()` for a head here, and the head to the loss. `torch.nn.DataParallel` is not
    supported. Source: arXiv 2101.11939, section 3.4 (the head), for networks as they come.

    Args:
        network: of any arguments and results.
        layer: the layer whose features are projected, a module of the network or its dotted path, as in
            `network.named_modules()`; usually the last classifier, whose input has most to say about the pixels.
        head: from features [B, C, H, W] to embeddings [B, D, H, W].
        of, index: see `FeatureTap`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a layer that the network does not have: the nearest
            paths are named.
        RuntimeError: in `forward`, the network did not call the layer.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str | nn.Module,
        head: nn.Module,
        *,
        of: str = "input",
        index: int | str = -1,
    ) -> None:
        super().__init__()
        for name, module in (("network", network), ("head", head)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        path, found = _find(network, layer)
        self.network, self.head = network, head
        self.tap = FeatureTap(found, of, index)
        self.tap.layer = f"{path!r} ({type(found).__name__})"
        self.tap.records = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The network's output, and the embeddings [B, D, H, W] of its features."""
        tap = self.tap
        tap.records = True
        try:
            output = self.network(*args, **kwargs)
            features = tap.take()
        finally:  # a forward that failed keeps nothing either
            tap.records = False
            tap.forget()
        return output, self.head(features)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Name the mistake of loading the weights of the network alone, which `strict=False` would pass over."""
        if not any(key.startswith(f"{prefix}network.") for key in state_dict):
            bare = [name for name in self.network.state_dict() if f"{prefix}{name}" in state_dict]
            if bare:
                error_msgs: list[str] = args[-1]
                error_msgs.append(
                    f"these are weights of the network alone ({prefix}{bare[0]}, not {prefix}network.{bare[0]}): load "
                    "them by model.network.load_state_dict, or before wrapping"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _find(network: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """The path of a layer in a network, and the layer."""
    modules = dict(network.named_modules(remove_duplicate=False))  # one layer may have several paths
    if isinstance(layer, nn.Module):
        for path, module in modules.items():
            if module is layer:
                return path, layer
        raise ValueError(f"layer must be a module of the network, got another {type(layer).__name__}")
    if not isinstance(layer, str):
        raise TypeError(f"layer must be a path or a torch.nn.Module, got {type(layer).__name__}")
    if layer in modules:
        return layer, modules[layer]
    # Nearest first: the same path within a wrapper, then alike ones; if none is, what the network begins with.
    near = [path for path in modules if path.endswith(f".{layer}")]
    near += [path for path in difflib.get_close_matches(layer, modules, n=5, cutoff=0.5) if path not in near]
    near = near[:5] or [path for path in modules if path and "." not in path]
    raise ValueError(f"the network has no layer {layer!r}; its nearest are {', '.join(map(repr, near))}")
