"""Everything is in pyproject.toml; this is for tools that still look for a setup.py."""

from setuptools import setup

setup()
