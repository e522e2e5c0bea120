"""What likelihoods of stacked measurements share: checks, rows, and the proof that two operators are one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import Operator, fingerprint


def as_measurements(y: Tensor, operator: Operator) -> Tensor:
    r"""Return measurements as (problems, \*out_shape), floating or complex as A's outputs are.

    Raises
    ------
    ShapeError
        If they do not fit the operator's output.
    InputError
        If they are not finite, complex where A's outputs are real, or the reverse.
    """
    if not y.is_floating_point() and not y.is_complex():
        y = y.to(torch.get_default_dtype())  # counts and bytes: integers would truncate a decoder's offset
    if tuple(y.shape) == operator.out_shape:
        y = y[None]
    if tuple(y.shape[1:]) != operator.out_shape or y.shape[0] == 0:
        raise ShapeError(
            f"The measurement has shape {tuple(y.shape)}, but {type(operator).__name__} gives {operator.out_shape}; "
            "pass one measurement of that shape, or several along a leading axis."
        )
    if y.is_complex() and not operator.complex_output:
        raise InputError(
            f"The measurement is complex and the output of {type(operator).__name__} is real. Give the real and "
            "imaginary parts as two real channels, as operators.MRI does; or, if the operator's output is complex, set "
            "complex_output = True in its class."
        )
    if operator.complex_output and not y.is_complex():
        raise InputError(
            f"The measurement is real ({y.dtype}) and the output of {type(operator).__name__} is complex. Give a "
            "complex measurement, e.g. torch.complex(real, imaginary), or take an operator whose output is real."
        )
    if not bool(torch.isfinite(torch.view_as_real(y) if y.is_complex() else y).all()):
        bad = int((~torch.isfinite(y)).sum())
        raise InputError(
            f"The measurement holds {bad} values that are not finite; mask them out with operators.Inpainting."
        )
    return y


def pick(y: Tensor, index: Tensor) -> Tensor:
    """Measurement of each row; a single one serves all rows."""
    return y if len(y) == 1 else y[index]


def flat_sum(t: Tensor) -> Tensor:
    """Sum over all but the leading axis."""
    return t.flatten(1).sum(1)


def shared_operator(operators: Sequence[Operator]) -> Operator:
    """Return the one operator of all; InputError if their fingerprints differ."""
    first = operators[0]
    print_of_first = None
    for operator in operators[1:]:
        if operator is not first:
            print_of_first = print_of_first or fingerprint(first)
            if fingerprint(operator) != print_of_first:
                raise InputError(
                    "Problems that run together share one operator; these have different ones. Solve them one by one."
                )
    return first
