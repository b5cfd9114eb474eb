"""A small model to be saved and resumed, for the tests of both."""

import keras
import nets

import keras_kfc

SEED = 11


def compiled(layers=keras_kfc.layers, optimizer=None, **kwargs):
    """A small conv net with dropout and batch norm, compiled."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    model = keras.Sequential(nets.conv_stack(layers))
    model.compile(
        optimizer=default_optimizer() if optimizer is None else optimizer,
        loss="sparse_categorical_crossentropy",
        **kwargs,
    )
    return model


def default_optimizer(**kwargs):
    return keras_kfc.KFC(seed=SEED, curvature_update_period=3, inverse_update_period=4, **kwargs)


def fit(model, epochs, first=0, **kwargs):
    """Three batches an epoch, in one order, so that epochs do not end on a due step."""
    images, labels = nets.image_batch(36)
    nets.build_optimizer(model)
    return model.fit(
        images,
        labels,
        batch_size=12,
        epochs=epochs,
        initial_epoch=first,
        shuffle=False,
        verbose=0,
        **kwargs,
    )


def stored_state(optimizer):
    """What the optimizer gives to a file."""
    store = {}
    optimizer.save_own_variables(store)
    return store
