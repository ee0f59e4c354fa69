"""Only what pyproject.toml can't say: `kernels/`, at the top of the repository, installs as `fastlock.kernels`.

(The top-level import name `kernels` belongs to Hugging Face's package of that name.)
"""

from setuptools import setup

setup(
    packages=["fastlock", "fastlock.kernels"],
    package_dir={"fastlock": "fastlock", "fastlock.kernels": "kernels"},
    package_data={"fastlock": ["py.typed", "pairs.jsonl", "prompts.json", "harmless.txt", "texts.txt"]},
)
