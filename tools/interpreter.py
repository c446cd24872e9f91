"""Makes Triton's interpreter fast enough to test with.

The interpreter patches the Triton language again at every call of a function within a kernel, although only the first
time has an effect; and it takes as long for a small tile as for a large one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from pixcontrast_ext.backends.triton import pools, sort
from pixcontrast_ext.backends.triton.infonce import forward, prepare


def hasten() -> None:
    """From now on, interpreted kernels take half the time or less."""
    patch_once_a_launch()
    sort.SORT.update(BLOCK=64, OTHERS=512)
    pools.SCATTER.update(OTHERS=256)
    forward.FINISH.update(ROWS=64, SPLITS=4)
    prepare.LINES, prepare.STRIP, prepare.RANGES = tl.constexpr(256), tl.constexpr(512), tl.constexpr(256)


def patch_once_a_launch() -> None:
    """Patch every function once per launch; at its end the interpreter removes the patches.

    Unlike larger tiles, this leaves the masks as they are.
    """
    patched: set[Callable[..., Any]] = set()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    def patch_once(function: Callable[..., Any]) -> Any:
        if function in patched:
            return None
        patched.add(function)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = patch_once
