"""Making variables while a train step is traced, as if it were not."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import default_variable_creator_v2


@contextlib.contextmanager
def outside_of_the_trace() -> Iterator[None]:
    """Makes variables eagerly.

    A function in whose first trace variables are made is traced twice, and one that is being
    traced again refuses variables that it does not know of.
    """
    with tf.init_scope(), tf.variable_creator_scope(_plain_variable):
        yield


def _plain_variable(next_creator: Any, **arguments: Any) -> tf.Variable:
    return default_variable_creator_v2(**arguments)
