"""minidistill: Stable Diffusion with fewer blocks and fewer steps, from the papers, from scratch.

pipe = minidistill.load_pipeline("miniature")
pipe(["a red circle"], seed=0)[0].save("circle.png")
"""

from typing import TYPE_CHECKING

from minidistill.errors import InputError

if TYPE_CHECKING:  # editors see what `__getattr__` gives
    from minidistill.pipeline import Pipeline, load_pipeline

__version__ = "0.1.0"
__all__ = ["InputError", "Pipeline", "__version__", "load_pipeline"]


def __getattr__(name: str):
    """Import torch only once something is used: `--help` and `__version__` need not wait for it."""
    if name in ("Pipeline", "load_pipeline"):
        from minidistill import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'minidistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
