"""What a task is, and the register of all tasks.

A task is a function of a random generator that makes `Data`, a function that makes a model, a
loss and what else `compile` takes. Each module beside this one registers its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Data:
    """Arrays of one task, examples along the first axis.

    Args:
        x: Inputs, an array or a dictionary of arrays.
        y: Targets, likewise.
        x_test: Inputs that nobody trains on.
        y_test: Their targets.
        weight: Weights of the training examples, or None.
        weight_test: Weights of the test examples, or None.
    """

    x: Any
    y: Any
    x_test: Any
    y_test: Any
    weight: np.ndarray | None = None
    weight_test: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Something that people train.

    Args:
        name: Its name.
        data: Makes the data from a generator of random numbers.
        model: Makes the model, built, of Keras's own layers.
        loss: What `compile` takes as loss, or None for a model with a train step of its own.
        batches: Batch sizes to train with.
        steps: Number of steps for each of the batch sizes.
        options: More arguments of `compile`.
        floor: A value that the loss cannot go below, or a function of the data to it, for losses
            that may be negative or end far from zero; ratios are those of what is above it.
        measure: Function from model and data, `(x, y, weight)`, to the loss that counts, for
            models with a train step of their own; None for the compiled loss.
        last_points: Over how many of the last tenths of a training the loss at the end is
            averaged, for one that never settles.
        held_out: Whether the task is kept for the final check: no default may be chosen by it.
    """

    name: str
    data: Callable[[np.random.Generator], Data]
    model: Callable[[], keras.Model]
    loss: Any
    batches: Sequence[int]
    steps: Sequence[int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    floor: float | Callable[[Data], float] = 0.0
    measure: Callable[..., Any] | None = None
    last_points: int = 1
    held_out: bool = False

    def floor_of(self, data: Data) -> float:
        """The floor on these data."""
        return float(self.floor(data) if callable(self.floor) else self.floor)


TASKS: dict[str, Task] = {}


def register(*tasks: Task) -> None:
    """Adds tasks to `TASKS`."""
    for task in tasks:
        if task.name in TASKS:
            raise ValueError(f"Two tasks have the same name. Received: name={task.name!r}")
        if len(task.batches) != len(task.steps):
            raise ValueError(
                "Arguments `batches` and `steps` must have the same length. Received: "
                f"batches={task.batches} and steps={task.steps}"
            )
        TASKS[task.name] = task


def split(x: Any, y: Any, test: int, weight: np.ndarray | None = None) -> Data:
    """Data with the last `test` examples for testing."""

    def part(tree: Any, rows: slice) -> Any:
        return keras.tree.map_structure(lambda array: array[rows], tree)

    train, rest = slice(None, -test), slice(-test, None)
    return Data(
        part(x, train),
        part(y, train),
        part(x, rest),
        part(y, rest),
        None if weight is None else weight[train],
        None if weight is None else weight[rest],
    )
