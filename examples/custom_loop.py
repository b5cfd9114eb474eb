"""A custom training loop with KFC.

Three lines differ from any other Keras loop: the forward pass runs inside a
`keras_kfc.Capture`, `update_factors` follows it, and the optimizer is built
beforehand, so that its factors exist when the loop is traced.

Run `python examples/custom_loop.py --help` for the options.
"""

import argparse
import os
import pathlib
import sys

if not __package__:  # run as a script: let it find the modules beside it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import keras_kfc
from examples.data import load_digits
from examples.nets import digits_net


def main(arguments: list[str] | None = None) -> int:
    """Trains the digits net and prints the loss after each epoch.

    Args:
        arguments: Command line, by default that of the process.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"argument --epochs: expected a positive integer, received {options.epochs}")

    data = load_digits()
    batches = tf.data.Dataset.from_tensor_slices((data.train_images, data.train_labels))
    batches = batches.shuffle(len(data.train_images), seed=1).batch(64)
    model = keras_kfc.instrument(digits_net())
    loss = keras.losses.SparseCategoricalCrossentropy()
    optimizer = keras_kfc.KFC()
    optimizer.build(model.trainable_variables)

    @tf.function
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            with keras_kfc.Capture() as capture:
                predictions = model(images, training=True)
            value = loss(labels, predictions)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.update_factors(capture, loss, labels, predictions)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return value

    for epoch in range(options.epochs):
        mean = keras.metrics.Mean()
        for images, labels in batches:
            mean.update_state(train_step(images, labels))
        print(f"epoch {epoch + 1}: loss {float(mean.result()):.4f}", flush=True)
    predicted = model.predict(data.test_images, verbose=0).argmax(axis=-1)
    print(f"held-out accuracy: {(predicted == data.test_labels).mean():.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
