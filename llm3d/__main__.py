"""`python -m llm3d`, which is how torchrun starts it."""

from llm3d.cli import main

# Processes that a command starts import this file again; they must not start the command again.
if __name__ == "__main__":
    main()
