"""Models with a train step of their own: adversarial nets and a physics-informed one."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from benchmarks.everyday.task import Data, Task, register


class Adversaries(keras.Model):
    """A generator of points in the plane and its critic, each with an optimizer.

    The train step is that of Keras's own example of a DCGAN, but for noise on what the critic
    sees, without which they chase each other in circles.
    """

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential(
            [keras.Input((4,)), layers.Dense(32, "relu"), layers.Dense(32, "relu"), layers.Dense(2)]
        )
        self.discriminator = keras.Sequential(
            [
                keras.Input((2,)),
                layers.Dense(32),
                layers.LeakyReLU(negative_slope=0.2),
                layers.Dropout(0.1),
                layers.Dense(32),
                layers.LeakyReLU(negative_slope=0.2),
                layers.Dense(1),
            ]
        )
        self.draws = keras.random.SeedGenerator(1)
        self.built = True

    def compile(self, optimizer, **kwargs):
        """Gives the critic an optimizer of its own, of the same kind."""
        super().compile(optimizer=optimizer, **kwargs)
        self.second_optimizer = type(optimizer).from_config(optimizer.get_config())
        self.bce = keras.losses.BinaryCrossentropy(from_logits=True)

    def call(self, codes):
        """Generates."""
        return self.generator(codes)

    def blur(self, points):
        """Adds noise."""
        return points + 0.5 * keras.random.normal(ops.shape(points), seed=self.draws)

    def train_step(self, data):
        """Trains the critic, then the generator."""
        points = data[0]
        count = ops.shape(points)[0]
        fake = self.generator(keras.random.normal((count, 4), seed=self.draws))
        everything = self.blur(ops.concatenate([fake, points]))
        labels = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))])
        with tf.GradientTape() as tape:
            loss = self.bce(labels, self.discriminator(everything))
        weights = self.discriminator.trainable_weights
        self.second_optimizer.apply_gradients(
            zip(tape.gradient(loss, weights), weights, strict=True)
        )
        codes = keras.random.normal((count, 4), seed=self.draws)
        with tf.GradientTape() as tape:
            scores = self.discriminator(self.blur(self.generator(codes)))
            loss = self.bce(ops.zeros((count, 1)), scores)
        weights = self.generator.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


_CODES = np.random.default_rng(11).normal(size=(500, 4)).astype("float32")


def _energy_distance(model, x, y, weight):
    """Between generated points and the data, zero where their distributions are one."""

    def mean_distance(a, b):
        return ops.mean(ops.sqrt(ops.sum((a[:, None] - b) ** 2, -1) + 1e-12))

    fake = model.generator(ops.convert_to_tensor(_CODES), training=False)
    return 2 * mean_distance(fake, x) - mean_distance(fake, fake) - mean_distance(x, x)


def _ring(rng):
    angle = rng.uniform(0, 2 * np.pi, 1000)
    points = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.normal(size=(1000, 2)) + 2
    points = points.astype("float32")
    y = np.zeros((500, 1), "float32")
    return Data(points[:500], y, points[500:], y)


class PhysicsInformed(keras.Model):
    """A net that satisfies `u'' = -sin x` on [-3, 3] with the solution's values at the ends."""

    def __init__(self):
        super().__init__()
        self.net = keras.Sequential(
            [keras.Input((1,)), layers.Dense(32, "tanh"), layers.Dense(32, "tanh"), layers.Dense(1)]
        )
        self.built = True

    def call(self, x):
        """The solution."""
        return self.net(x)

    def residual(self, x):
        """Of equation and ends, a scalar."""
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                u = self.net(x)
            slope = first.gradient(u, x)
        ends = tf.constant([[-3.0], [3.0]])
        inside = tf.reduce_mean((second.gradient(slope, x) + tf.sin(x)) ** 2)
        return inside + tf.reduce_sum((self.net(ends) - tf.sin(ends)) ** 2)

    def train_step(self, data):
        """A loss of derivatives, which Keras does not see."""
        with tf.GradientTape() as tape:
            loss = self.residual(data[0])
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def _interval(rng):
    x = np.linspace(-3, 3, 64)[:, None].astype("float32")
    test = rng.uniform(-3, 3, (64, 1)).astype("float32")
    return Data(x, np.zeros_like(x), test, np.zeros_like(test))


class OwnLoop(keras.Model):
    """A classifier whose train step computes its loss by itself, as many do."""

    def __init__(self):
        super().__init__()
        self.stack = keras.Sequential(
            [keras.Input((8,)), layers.Dense(32, "relu"), layers.Dropout(0.1), layers.Dense(3)]
        )
        self.built = True

    def call(self, x):
        """Logits."""
        return self.stack(x)

    def loss_of(self, x, y):
        """Cross-entropy of logits."""
        losses = keras.losses.sparse_categorical_crossentropy(y, self(x), from_logits=True)
        return ops.mean(losses)

    def train_step(self, data):
        """Not by `compute_loss`."""
        with tf.GradientTape() as tape:
            loss = self.loss_of(*data)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def _three_classes(rng):
    x = rng.normal(size=(2000, 8)).astype("float32")
    score = np.stack([x[:, 0] * x[:, 1], x[:, 2], 0.5 * x[:, 3] ** 2], 1)
    y = (score + 0.2 * rng.gumbel(size=score.shape)).argmax(1)
    return Data(x[:1600], y[:1600], x[1600:], y[1600:])


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """All optimizers of a compiled model."""
    second = getattr(model, "second_optimizer", None)
    return [model.optimizer] if second is None else [model.optimizer, second]


register(
    Task(
        "adversaries",
        _ring,
        Adversaries,
        None,
        (64,),
        (1000,),
        measure=_energy_distance,
        last_points=4,
    ),
    Task(
        "physics-informed",
        _interval,
        PhysicsInformed,
        None,
        (64,),
        (500,),
        measure=lambda model, x, y, weight: model.residual(x),
        last_points=3,
    ),
    Task(
        "own train step",
        _three_classes,
        OwnLoop,
        None,
        (4, 32),
        (600, 300),
        measure=lambda model, x, y, weight: model.loss_of(x, y),
    ),
)
