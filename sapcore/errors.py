"""One error class for what a user can mend: its message says what was wrong and what is allowed."""

import numbers

import torch


class SapcoreError(ValueError):
    """Bad input or a missing file. The message is one sentence; notebooks and the command line show it alone."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def check_tensor(name: str, given: object) -> None:
    """Raise `SapcoreError` unless it is a tensor."""
    if not isinstance(given, torch.Tensor):
        raise SapcoreError(f"{name} is a {type(given).__name__}, but must be a torch.Tensor; torch.as_tensor makes one")


def check_module(given: object) -> None:
    """Raise `SapcoreError` unless it is a network."""
    if not isinstance(given, torch.nn.Module):
        raise SapcoreError(f"the network is a {type(given).__name__}, but must be a torch.nn.Module")


def is_number(given: object) -> bool:
    """Whether it is a real number, numpy's among them; a truth value is none."""
    return isinstance(given, numbers.Real) and not isinstance(given, bool)


def check_count(name: str, number: object) -> None:
    """Raise `SapcoreError` unless it is a whole number of 1 or more."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 1:
        raise SapcoreError(f"{name} is {number!r}, but must be a whole number of 1 or more")
