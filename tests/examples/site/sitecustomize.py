"""Python imports this first in every example that the tests start: it stands in for what packages lack on a CPU.

The torchvision of the package index needs a torch for CUDA, and mmsegmentation imports the compiled ops of mmcv, which
mmcv-lite does not have. No example calls any of these.
"""

import contextlib
import importlib.machinery
import sys
import types


class _NoOps(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


with contextlib.suppress(ImportError):
    from tools.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    sys.modules["mmcv._ext"] = _NoOps("mmcv._ext")
    sys.modules["mmcv._ext"].__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
