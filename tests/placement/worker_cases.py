"""What each of two workers runs for `test_workers`: cases by name, results as a line of JSON."""

import hashlib
import json
import os
import pathlib
import sys
import time

import tensorflow as tf

# Graphs of a few steps take longer to optimise than to run.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_kfc  # noqa: E402
from keras_kfc import KFC  # noqa: E402
from keras_kfc.placement import sharded  # noqa: E402

CONFIG = json.loads(os.environ["TF_CONFIG"])
# Beside a chief, workers are counted from the second one on.
WORKER = CONFIG["task"]["index"] + (
    "chief" in CONFIG["cluster"] and CONFIG["task"]["type"] == "worker"
)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.integers(0, 3, size=48)
PERIODS = {"curvature_update_period": 3, "inverse_update_period": 4, "seed": 3}
ONE_DEVICE = tf.distribute.get_strategy()


def compiled(strategy, optimizer, policy="float32"):
    keras.backend.clear_session()
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras_kfc.layers.Dense(5, activation="tanh"),
                keras_kfc.layers.Dense(3, activation="softmax", dtype="float32"),
            ]
        )
        model.compile(optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data(count=48, x=X, repeats=1):
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((x[:count], Y[:count])).batch(16)
    return batches.repeat(repeats).with_options(options)


def digest(model):
    arrays = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


class Digests(keras.callbacks.Callback):
    """What a worker's weights and optimizer state are after each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(digest(self.model))


def trained(strategy, optimizer, epochs=1, policy="float32", callbacks=(), check=None, **batches):
    model = compiled(strategy, optimizer, policy)
    digests = Digests()
    history = model.fit(
        data(**{"repeats": 3, **batches}),
        epochs=epochs,
        verbose=0,
        callbacks=[digests, *callbacks],
        validation_data=check,
    )
    return model, history.history, digests.seen


def difference(one, two):
    return max(
        float(np.abs(np.asarray(a, "float64") - np.asarray(b, "float64")).max())
        for a, b in zip(one, two, strict=True)
    )


def against_one_device(optimizer, **options):
    """Digests, and how far weights and losses are from those of one device."""
    model, history, digests = trained(STRATEGY, optimizer, **options)
    alone, own_history, _ = trained(ONE_DEVICE, optimizer, **options)
    losses, own_losses = (list(numbers.values()) for numbers in (history, own_history))
    weights = difference(model.get_weights(), alone.get_weights())
    return {
        "digests": digests,
        "weights": weights,
        "losses": difference(losses, own_losses),
        "last": [float(history["loss"][-1]), float(own_history["loss"][-1])],
    }


def stock_keras(folder):
    """Before any KFC is made."""
    model = compiled(STRATEGY, keras.optimizers.Adam)
    failed = {}
    for name, call in (
        ("fit", lambda: model.fit(data(), verbose=0)),
        ("test_on_batch", lambda: model.test_on_batch(X[:8], Y[:8])),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            failed[name] = type(error).__name__
    return failed


def options(folder):
    return against_one_device(
        lambda: KFC(**PERIODS, fisher="exact", weight_decay=0.1, use_ema=True, global_clipnorm=0.3),
        epochs=2,
        check=data(),
    )


def sampled(folder):
    return against_one_device(lambda: KFC(seed=1), repeats=8)


def uneven(folder):
    """In the last batch there are four examples for one worker, and five for the other."""
    return against_one_device(lambda: KFC(**PERIODS, fisher="exact"), count=41)


def empty(folder):
    """The last batch is of one example: one worker has none."""
    model, history, digests = trained(STRATEGY, lambda: KFC(**PERIODS), count=33)
    return {"digests": digests, "loss": history["loss"]}


def mixed_float16(folder):
    return against_one_device(lambda: KFC(**PERIODS, fisher="exact"), policy="mixed_float16")


def broken(folder):
    """One worker's part of the first batch is not finite."""
    x = X.copy()
    x[9] = np.nan
    model, history, digests = trained(STRATEGY, lambda: KFC(**PERIODS), x=x)
    counters = ("skipped_steps", "rejected_factor_updates", "rejected_inverse_updates")
    counts = {name: int(getattr(model.optimizer, name).numpy()) for name in counters}
    finite = all(np.isfinite(weights).all() for weights in model.get_weights())
    return {"digests": digests, "finite": finite, **counts}


def shared_out(folder):
    """Steps are the same. With clipping, gradients are preconditioned twice."""
    weights, digests = [], []
    for sharding in ("inverses", "none", "preconditioning"):
        model, _, seen = trained(
            STRATEGY, lambda kind=sharding: KFC(**PERIODS, sharding=kind, global_clipnorm=0.5)
        )
        weights.append(model.get_weights())
        digests += seen
    first, *others = weights
    return {"digests": digests, "weights": [difference(first, other) for other in others]}


def own_loop(folder):
    """A loop of one's own, with `strategy.run`."""
    model = compiled(STRATEGY, lambda: KFC(**PERIODS))
    with STRATEGY.scope():
        model.optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy()

    @tf.function(autograph=False)
    def step(batch):
        def replica(x, y):
            with keras_kfc.Capture() as capture, tf.GradientTape() as tape:
                outputs = model(x, training=True)
                value = loss(y, outputs) / STRATEGY.num_replicas_in_sync
            gradients = tape.gradient(value, model.trainable_variables)
            model.optimizer.update_factors(capture, loss, y, outputs)
            model.optimizer.apply(gradients, model.trainable_variables)
            return value

        return STRATEGY.reduce("SUM", STRATEGY.run(replica, batch), None)

    losses = []
    losses += [float(step(b)) for b in STRATEGY.experimental_distribute_dataset(data(repeats=3))]
    return {"digests": [digest(model)], "losses": losses}


def saved_by_the_chief(folder):
    """The other workers do not take part in saving; all load the file and go on."""
    path = folder / "model.keras"
    model, _, _ = trained(STRATEGY, lambda: KFC(**PERIODS))
    if WORKER == 0:
        model.save(folder / "being_written.keras")
        (folder / "being_written.keras").rename(path)
    while not path.exists():
        time.sleep(0.1)
    with STRATEGY.scope():
        loaded = keras.saving.load_model(path)
    outputs = []
    for one in (model, loaded):
        one.fit(data(repeats=2), verbose=0)
        outputs.append(one.predict(X, verbose=0))
    return {"digests": [digest(loaded)], "equal": difference(outputs[:1], outputs[1:]) == 0}


def refused(folder):
    """Workers of different configurations; last, since nothing is to be trained after it."""
    try:
        trained(STRATEGY, lambda: KFC(momentum=0.9 if WORKER else 0.8))
    except ValueError as error:
        return str(error)


class Death(keras.callbacks.Callback):
    """Ends the process in the middle of training."""

    def on_train_batch_end(self, batch, logs=None):
        if WORKER == 1 and int(self.model.optimizer.iterations.numpy()) == 8:
            os._exit(9)


def backed_up(folder, *others):
    backup = keras.callbacks.BackupAndRestore(folder / f"backup-{WORKER}")
    return trained(STRATEGY, lambda: KFC(**PERIODS), 4, callbacks=[backup, *others], repeats=1)


def killed(folder):
    backed_up(folder, Death())


def restarted(folder):
    """Goes on after the second epoch, as if nothing had happened."""
    _, history, digests = backed_up(folder)
    _, _, whole = trained(STRATEGY, lambda: KFC(**PERIODS), 4, repeats=1)
    return {"digests": digests, "whole": whole, "epochs": len(history["loss"])}


if __name__ == "__main__":
    sharded._FEWEST_PRODUCTS = 0
    results = {}
    for case in sys.argv[2:]:
        begin = time.perf_counter()
        results[case] = globals()[case](pathlib.Path(sys.argv[1]))
        print(case, round(time.perf_counter() - begin, 1), file=sys.stderr, flush=True)
    print(json.dumps(results))
