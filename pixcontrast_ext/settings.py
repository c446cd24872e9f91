"""Parts of a loss that are given as their settings: the configs of mmengine, hydra and others hold dicts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.head import ProjectionHead
from pixcontrast_ext.ops.mining import Mining, check_mining
from pixcontrast_ext.project import Head, check_head

Part = TypeVar("Part")
Other = TypeVar("Other")


def built(name: str, kind: type[Part], value: Other | Mapping[str, Any], **given: Any) -> Part | Other:
    """`kind(**given, **value)` if `value` is a mapping, else `value` itself.

    Raises:
        TypeError, ValueError: settings that `kind` does not have, or has but that are `given`, or that it needs; and
            what it raises itself.
    """
    if not isinstance(value, Mapping):
        return value
    settings = dict(value)
    parameters = inspect.signature(kind).parameters
    for key in settings:
        if key in given:
            raise ValueError(
                f"{name}: {key} is that of the loss, {given[key]!r}: leave it out of the settings"
            )
        if key not in parameters:
            known = ", ".join(key for key in parameters if key not in given)
            raise ValueError(f"{name}: {key!r} is no setting of {kind.__name__}, which has {known}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in settings and key not in given:
            raise ValueError(f"{name}: {kind.__name__} needs {key}, got {', '.join(settings) or 'nothing'}")
    return kind(**given, **settings)


def bank_for(
    bank: MemoryBank | Mapping[str, Any] | None, *, num_classes: int, ignore_index: int, normalize: bool
) -> MemoryBank | None:
    """The bank of a loss with these settings, from one or from the rest of its settings.

    Raises:
        TypeError, ValueError: it is neither, or not of the same settings; and as `built`.
    """
    of_loss = dict(num_classes=num_classes, ignore_index=ignore_index, normalize=normalize)
    bank = built("bank", MemoryBank, bank, **of_loss)
    if bank is None:
        return None
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"bank must be a MemoryBank, or a dict of its settings, got {type(bank).__name__}")
    if bank.num_classes != num_classes:
        raise ValueError(f"the bank has {bank.num_classes} classes, the loss {num_classes}")
    if bank.ignore_index != ignore_index:
        raise ValueError(f"the bank ignores label {bank.ignore_index}, the loss {ignore_index}")
    if bank.normalize != normalize:
        raise ValueError(f"the bank has normalize={bank.normalize}, the loss normalize={normalize}")
    if bank.region_slots + min(bank.pixel_slots, bank.pixels_per_image) == 0:
        raise ValueError(
            f"the bank would stay empty: region_slots is 0, and pixel_slots={bank.pixel_slots} get "
            f"pixels_per_image={bank.pixels_per_image}; without a bank give bank=None"
        )
    return bank


def head_for(head: Head | Mapping[str, Any] | None) -> Head | None:
    """The head of a loss, from one or from its settings.

    Raises:
        TypeError, ValueError: it cannot be called, or a layer reads several pixels; and as `built`.
    """
    head = built("head", ProjectionHead, head)
    if head is not None:
        check_head(head)
    return head


def mining_for(mining: Mining | Mapping[str, Any] | str | None, *, normalize: bool) -> Mining | None:
    """The mining of a loss, from one, its strategy, or its settings.

    Raises:
        TypeError, ValueError: a setting out of range, or ranking by a cosine where rows are not normalised; and as
            `built`.
    """
    mining = built("mining", Mining, dict(strategy=mining) if isinstance(mining, str) else mining)
    if mining is None:
        return None
    check_mining(mining)
    if mining.by_cosine and not normalize:
        raise ValueError(f"mining={mining.strategy!r} ranks by cosine, got normalize={normalize}")
    return mining
