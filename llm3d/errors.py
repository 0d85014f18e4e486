"""The two ways in which a run ends that are not bugs."""


class InputError(ValueError):
    """What the user gave cannot be used: a setting, a file, a layout. Ends the command with exit code 2.

    The message is one line that says what was wrong, where, and what to do.
    """


class TrainingAborted(RuntimeError):
    """Training cannot go on: a loss that is not finite, no space left. Ends the command with exit code 3."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after all was saved, and the message says where. Ends the command with exit code 130."""
