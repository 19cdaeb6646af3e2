"""The head of a model: what it reads, what becomes of its logits, and a model that stops before it.

Needs torch. Some models scale or cap what their head gives: cohere, granite and falcon_h1 multiply
it, gemma2, vaultgemma and nanochat take ``cap * tanh(x / cap)``. Which of them a model does is read
off the model as it runs, not off its configuration: wrappers of language models exist that leave
out what the language model's own configuration asks for.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qsens.checkpoint.structure import head_of
from qsens.data.samples import Batch
from qsens.errors import UserError

# Rows of the head's output that are held at once in more than the model's own data type.
HEAD_ROWS = 512
# Largest value that a head is taken to give, to see where logits are capped, and the smallest.
_LARGEST, _SMALLEST = 1e4, 1e-3
_POINTS = 64
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LogitFunction:
    """What a model makes of what its head gives: ``scale * x``, or ``cap * tanh(scale * x / cap)``.

    Attributes:
        scale: The factor.
        cap: The bound of a logit's magnitude; none where there is none.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, in the data type of ``x``; ``x`` itself where they are the same."""
        if self.scale != 1.0:
            x = x * self.scale
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap

    def derivative(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Return the derivative of each logit, given the logits."""
        if self.cap is None:
            return self.scale
        return self.scale * (1 - (logits / self.cap).square())


_FUNCTIONS: WeakKeyDictionary[nn.Module, LogitFunction] = WeakKeyDictionary()


class _Reached(Exception):
    """A model has come to its head.

    Args:
        hidden: What the head was to read.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("the head was called outside of head_input()")
        self.hidden = hidden


@dataclass(frozen=True)
class Head:
    """The output embedding of a model.

    Attributes:
        module: The module, a linear one.
        logits: What the model makes of what it gives.
    """

    module: nn.Linear
    logits: LogitFunction

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return that of a model, which runs once for it.

        Raises:
            UserError: What the model does after its head is more than this engine knows.
        """
        module = head_of(model)
        if type(module).forward is not nn.Linear.forward:
            raise _refusal(model, "its head is no linear module")
        if model not in _FUNCTIONS:
            _FUNCTIONS[model] = _logit_function(model, module)
        return cls(module, _FUNCTIONS[model])

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the model's logits, ``(rows, vocabulary)``.

        Args:
            rows: What the head reads, ``(rows, hidden)``.
            weight: Its weight; its own when not given.
        """
        return self.logits(self.product(rows, weight))

    def product(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the module gives, which the logits are made of; see :meth:`__call__`."""
        chosen = self.module.weight if weight is None else weight
        return nn.functional.linear(rows, chosen, self.module.bias)


@contextmanager
def without_head(head: nn.Module) -> Iterator[None]:
    """Let a model stop where its head would run, while the context lasts."""
    with _replaced(head, _stop):
        yield


def head_input(model: Any, batch: Batch) -> torch.Tensor:
    """Return what the head reads, ``(samples, longest, hidden)``, of a model without its head.

    No mask is handed over: padding stands on the right, where no real token looks under causal
    attention, and attention kernels are several times faster without one.

    Args:
        model: The model, within :func:`without_head`.
        batch: The batch, on the model's device.
    """
    try:
        run(model, batch.inputs())
    except _Reached as reached:
        return reached.hidden
    raise RuntimeError(f"{type(model).__name__} gives logits without calling its head")


def run(model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Run a model that keeps nothing for further tokens."""
    kind: Any = type(model)
    return model(**inputs, use_cache=False) if _takes_cache(kind) else model(**inputs)


@functools.cache
def _takes_cache(kind: Any) -> bool:
    """Return whether a class of models can be told to keep nothing for further tokens."""
    parameters = inspect.signature(kind.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return "use_cache" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _stop(hidden: torch.Tensor) -> torch.Tensor:
    raise _Reached(hidden)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@torch.no_grad()
def _logit_function(model: Any, head: nn.Linear) -> LogitFunction:
    """Return what a model makes of what its head gives, from what it makes of chosen values."""
    vocabulary = head.out_features
    points = min(_POINTS, vocabulary // 2)
    sizes = torch.logspace(math.log10(_SMALLEST), math.log10(_LARGEST), points)
    signs = torch.tensor([1.0, -1.0])
    given = torch.outer(sizes, signs).flatten().repeat(vocabulary // (2 * points) + 1)
    given = given[:vocabulary].to(head.weight.device)

    def chosen(hidden: torch.Tensor) -> torch.Tensor:
        return given.expand(*hidden.shape[:-1], vocabulary)

    ids = torch.tensor([_plain_tokens(model.config)], device=head.weight.device)
    with _replaced(head, chosen):
        logits = getattr(run(model, {"input_ids": ids}), "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[-1:] != given.shape:
        raise _refusal(model, "its logits are not those of its head alone")
    made = logits.reshape(-1, vocabulary)[-1].double()
    x = given.double()
    least, most = x.abs().argmin(), x.abs().argmax()
    scale, highest = float(made[least] / x[least]), float(made.abs().max())
    capped = highest < (1 - _TOLERANCE) * abs(scale * float(x[most]))
    values = _numbers(model.config)
    function = LogitFunction(_exact(scale, values), _exact(highest, values) if capped else None)
    if not torch.allclose(function(x), made, rtol=_TOLERANCE, atol=_TOLERANCE * _SMALLEST):
        raise _refusal(model, "its logits are neither scaled nor capped outputs of its head")
    return function


def _exact(value: float, known: list[float]) -> float:
    """Return a configuration's number, or its inverse, for a value that was read off the model."""
    candidates = [1.0, *known, *(1 / number for number in known if number)]
    nearest = min(candidates, key=lambda number: abs(number - value))
    return nearest if math.isclose(nearest, value, rel_tol=_TOLERANCE) else value


def _plain_tokens(config: Any) -> list[int]:
    """Return two tokens that no configuration gives a meaning, such as that of a picture."""
    special = {value for value in _numbers(config) if value == int(value)}
    return [token for token in range(len(special) + 3) if token not in special][:2]


def _numbers(config: Any) -> list[float]:
    values = [*vars(config).values(), *vars(config.get_text_config()).values()]
    return [float(value) for value in values if type(value) in (int, float)]


def _refusal(model: Any, what: str) -> UserError:
    return UserError(
        what, where=type(model).__name__, remedy="Use autoquant.engine=modelopt for this model."
    )
