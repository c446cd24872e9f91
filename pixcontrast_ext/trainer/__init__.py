"""A small, complete segmentation trainer around the loss: `python -m pixcontrast_ext.trainer --help`.

It is an extra. Importing it checks for its libraries once, here, so that a missing one is reported as the
command that installs it rather than as a traceback from deep inside.
"""

from importlib.util import find_spec

_LIBRARIES = ("kornia", "matplotlib", "PIL", "scipy", "sklearn", "tensorboard", "tqdm", "tyro")

_missing = [name for name in _LIBRARIES if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"pixcontrast_ext.trainer needs {', '.join(_missing)}: pip install 'pixcontrast-ext[train]'"
    )
