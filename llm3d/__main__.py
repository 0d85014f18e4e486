"""`python -m llm3d`, which is how torchrun starts it."""

from llm3d.cli import main

main()
