"""Trainings whose weights are stored: a change of the code's form must not change them.

Five nets in float64 with the exact Fisher matrix, 12 steps each.
`python tests/golden/trajectories.py --check` compares to the bit, which holds on one machine; the
tests allow for what another machine's sums round to. `--write` stores new weights, after a change
of the method.
"""

import argparse
import pathlib

import keras
import numpy as np
import tensorflow as tf

import keras_kfc
from keras_kfc import layers

FOLDER = pathlib.Path(__file__).parent
STEPS = 12


def conv_net():
    """Strides, dilation, groups, batch normalisation and dropout; classes."""
    model = keras.Sequential(
        [
            keras.Input((9, 8, 2)),
            layers.Conv2D(4, 3, strides=2, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            layers.Conv2D(6, 2, groups=2, activation="tanh"),
            layers.Conv2D(4, 2, dilation_rate=2, use_bias=False, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.2, seed=3),
            layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, {"loss": loss}, {}


def two_heads():
    """A shared layer used twice, two losses with weights, clipping."""
    inputs = keras.Input((9, 8, 2))
    shared = layers.Dense(5, activation="tanh")
    flat = keras.layers.Flatten()(inputs)
    hidden = shared(layers.Dense(5, activation="elu")(shared(layers.Dense(5)(flat))))
    outputs = {
        "number": layers.Dense(2, name="number")(hidden),
        "kind": layers.Dense(1, activation="sigmoid", name="kind")(hidden),
    }
    model = keras.Model(inputs, outputs)
    losses = {"number": "mse", "kind": "binary_crossentropy"}
    return (
        model,
        {"loss": losses, "loss_weights": {"number": 0.3, "kind": 2.0}},
        {"clipnorm": 0.5},
    )


def sequence_net():
    """Layers without a block beside ones with, masks, factors cut into parts."""
    model = keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            keras.layers.Embedding(11, 6, mask_zero=True),
            layers.Dense(8, activation="tanh"),
            keras.layers.LSTM(4),
            keras.layers.LayerNormalization(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    return model, {"loss": "sparse_categorical_crossentropy"}, {"max_factor_dim": 3}


def custom_loss():
    """A loss whose lowest value is not known, on few examples of the factors, without momentum."""
    model = keras.Sequential(
        [
            keras.Input((9, 8, 2)),
            keras.layers.Flatten(),
            layers.Dense(6, activation="tanh"),
            layers.Dense(2),
        ]
    )

    def fourth_power(y_true, y_pred):
        return tf.reduce_mean(tf.abs(y_true - y_pred) ** 4 - 3.0, axis=-1)

    options = {"momentum": 0.0, "nesterov": False, "factor_batch_size": 5}
    return model, {"loss": fourth_power}, options


def trust_region():
    """Absolute damping and a trust region, with a schedule, accumulation and average weights."""
    model = keras.Sequential(
        [
            keras.Input((9, 8, 2)),
            layers.Conv2D(3, 3, activation="softplus"),
            keras.layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )
    options = {
        "learning_rate": keras.optimizers.schedules.CosineDecay(0.05, 10),
        "damping": 0.05,
        "relative_damping": False,
        "polyak_scaling": None,
        "norm_constraint": 1e-3,
        "use_ema": True,
        "gradient_accumulation_steps": 2,
    }
    return model, {"loss": "mse"}, options


NETS = {net.__name__: net for net in (conv_net, two_heads, sequence_net, custom_loss, trust_region)}


def batches(name):
    """Targets of the right kind for a net, 16 examples, three batches."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(48, 9, 8, 2))
    numbers, kinds = rng.normal(size=(48, 2)), rng.integers(0, 3, size=48)
    if name == "sequence_net":
        return rng.integers(0, 11, size=(48, 7)), kinds
    if name == "conv_net":
        return x, kinds
    if name == "two_heads":
        return x, {"number": numbers, "kind": (kinds[:, None] > 0).astype("float64")}
    return x, numbers


def weights_after_training(name, steps=STEPS):
    """All weights of a net after some steps, by number."""
    keras.backend.clear_session(free_memory=False)
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(7)
    model, compiled, options = NETS[name]()
    model.compile(
        keras_kfc.KFC(
            **{
                "damping": 0.2,
                "fisher": "exact",
                "curvature_update_period": 2,
                "seed": 2,
                **options,
            }
        ),
        **compiled,
    )
    model.optimizer.build(model.trainable_variables)
    x, y = batches(name)
    model.fit(x, y, batch_size=16, epochs=steps // 3, shuffle=False, verbose=0)
    # Dropout's state is a weight, too.
    numbers = [w for w in model.weights if w.dtype == "float64"]
    return {f"{index}": w.numpy() for index, w in enumerate(numbers)}


def main():
    """Stores the trajectories, or compares them to the bit."""
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    # Sums of several threads round otherwise from run to run.
    tf.config.experimental.enable_op_determinism()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for name in NETS:
        weights = weights_after_training(name)
        path = FOLDER / f"{name}.npz"
        if arguments.write:
            np.savez_compressed(path, **weights)
            continue
        stored = np.load(path)
        same = all(np.array_equal(stored[key], value) for key, value in weights.items())
        print(f"{name}: {'equal' if same else 'other weights'}")


if __name__ == "__main__":
    main()
