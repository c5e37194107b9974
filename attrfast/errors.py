"""Every error that attrfast raises on purpose.

Each message names the offending value and says what to do about it. The classes also derive from the
built-in error that a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations


class AttrfastError(Exception):
    """Base class of all errors raised by attrfast."""


class InputError(AttrfastError, ValueError):
    """An argument, a batch or a label is not usable."""


class BackendError(AttrfastError, RuntimeError):
    """A kernel backend or a device was asked for that this machine does not have."""


class ModelError(AttrfastError, RuntimeError):
    """The model cannot be scored or pruned as it is."""


class NoGradientError(ModelError):
    """The objective does not depend on what it is differentiated by."""


class NumericalError(AttrfastError, ArithmeticError):
    """A loss, an activation or a gradient is not finite."""


class TargetError(AttrfastError, ValueError):
    """A pruning target cannot be reached; the message says how close it gets."""


class OutOfMemoryError(AttrfastError, MemoryError):
    """Memory does not hold what a single sample needs."""


class DistributedError(AttrfastError, RuntimeError):
    """Another of the processes that work together failed, died or did not come in time."""
