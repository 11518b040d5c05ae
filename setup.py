"""Package metadata. The folder ``kernels/`` is installed as ``distill_ops.kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "distill_ops/__init__.py").read_text())[1]

TEST = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100"]
BENCH = ["rich>=13", "matplotlib>=3.8"]
EXAMPLES = ["transformers>=4.50", "tokenizers>=0.21", "matplotlib>=3.8", "rich>=13"]

setup(
    name="distill_ops",
    version=VERSION,
    description="Fused GPU kernels for knowledge-distillation losses of language models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["distill_ops", "distill_ops.*"]), "distill_ops.kernels"],
    package_dir={"distill_ops.kernels": "kernels"},
    package_data={"distill_ops": ["py.typed"]},
    install_requires=["torch>=2.11", "typing_extensions>=4.8", "numpy>=1.26", "safetensors>=0.4.3"],
    extras_require={
        # PyTorch's CUDA builds bring the Triton that they were built with
        "triton": ["triton>=3.6; platform_system == 'Linux'"],
        "test": [*TEST, "triton>=3.6; platform_system == 'Linux'"],
        "bench": BENCH,
        "examples": EXAMPLES,
        # its experimental trainers change from release to release: the one that the recipe runs with
        "trl": ["trl==1.16.0"],
        "dev": ["ruff==0.17.6"],
    },
)
