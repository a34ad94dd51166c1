"""Packaging of minidistill: `pip install .`, or `pip install -e ".[test]"` to work on it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "minidistill" / "__init__.py").read_text())[1]

setup(
    name="minidistill",
    version=VERSION,
    description="Stable Diffusion made small (BK-SDM) and fast (SDXL-Lightning): both distillations, from scratch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["minidistill", "minidistill.*"]),
    package_data={"minidistill": ["py.typed", "interop/*.md", "miniature/*.json", "miniature/*/*", "miniature/*/*/*"]},
    entry_points={"console_scripts": ["minidistill = minidistill.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    install_requires=[
        "torch>=2.6,<2.14",
        "safetensors>=0.4.5",
        "tokenizers>=0.20",
        "numpy>=1.26",
        "pillow>=10.4",
        "huggingface-hub>=0.34",
    ],
    extras_require={
        # diffusers, transformers and peft are oracles: the tests compare with them, the package never imports them.
        # Pinned, with what they lean on and the formatter, to what the suite was last seen to pass with.
        "test": [
            "pytest>=8",
            'diffusers==0.42.1; python_version >= "3.11"',
            'diffusers==0.41.0; python_version < "3.11"',
            'transformers==5.24.0; python_version >= "3.11"',
            'transformers==5.20.2; python_version < "3.11"',
            "peft==0.21.2",
            "accelerate==1.15.0",
            "pytest-xdist>=3.6",
            "mypy>=1.15",
            "nbclient>=0.10",
            "ipykernel>=6",
            "matplotlib>=3.8",
            "ruff==0.17.6",
        ],
        "notebooks": ["jupyterlab>=4", "matplotlib>=3.8"],
    },
)
