"""The two settings for weights that an example uses at many positions (Eschenhagen et al. 2023)."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap

RNG = np.random.default_rng(0)
MAPS = {
    "dense": (DenseMap(5, 3), (6, 4, 5), (6, 4, 3)),
    "conv": (Conv2DMap((2, 2), 3, 4), (6, 4, 5, 3), (6, 3, 4, 4)),
    "groups": (Conv2DMap((2, 2), 4, 6, groups=2), (6, 4, 5, 4), (6, 3, 4, 6)),
}


def factors(linear_map, inputs, derivatives, sharing, masks=(None,), use_bias=True, max_dim=None):
    layout = STRUCTURES["kronecker"].layout(linear_map, use_bias, max_dim, sharing)
    size, masks = tf.constant(6), list(masks)
    inputs, derivatives = [tf.constant(a) for a in inputs], [tf.constant(d) for d in derivatives]
    (omega,) = layout.from_inputs(inputs, size, masks)
    (gamma,) = layout.from_pass([], derivatives, size, masks)
    return omega.numpy(), gamma.numpy()


def rows(linear_map, tensor, kind):
    """`(G, B, T, n)` in float64, with the bias for inputs."""
    flat = getattr(linear_map, kind)(tf.constant(tensor)).numpy()
    flat = flat.reshape(flat.shape[0], 6, -1, flat.shape[2])
    return np.pad(flat, ((0, 0),) * 3 + ((0, 1),), constant_values=1) if "input" in kind else flat


@pytest.mark.parametrize("case", MAPS)
def test_reduce_is_made_of_mean_inputs_and_summed_derivatives(case):
    linear_map, in_shape, out_shape = MAPS[case]
    a, ds = RNG.normal(size=in_shape), RNG.normal(size=out_shape)
    omega, gamma = factors(linear_map, [a], [ds], "reduce")
    means = rows(linear_map, a, "input_rows").mean(2)
    sums = rows(linear_map, ds, "derivative_rows").sum(2)
    assert relative_error(omega, np.einsum("gbi,gbj->gij", means, means) / 6) < 1e-12
    assert relative_error(gamma, np.einsum("gbi,gbj->gij", sums, sums) / 6) < 1e-12
    # Negative control: the other setting is another matrix.
    assert relative_error(factors(linear_map, [a], [ds], "expand")[1], gamma) > 0.1


def test_reduce_is_exact_where_all_positions_see_the_same():
    """One example whose derivatives differ by position: its Fisher block is one outer product."""
    linear_map = DenseMap(5, 3)
    a = np.broadcast_to(RNG.normal(size=(6, 1, 5)), (6, 4, 5))
    a = np.broadcast_to(a[:1], a.shape)
    ds = np.broadcast_to(RNG.normal(size=(1, 4, 3)), (6, 4, 3))
    omega, gamma = factors(linear_map, [a], [ds], "reduce")
    gradient = np.einsum("ti,tj->ij", np.pad(a[0], ((0, 0), (0, 1)), constant_values=1), ds[0])
    fisher = np.outer(gradient, gradient)
    assert relative_error(np.kron(omega[0], gamma[0]), fisher) < 1e-12
    expanded = factors(linear_map, [a], [ds], "expand")
    assert relative_error(np.kron(expanded[0][0], expanded[1][0]), fisher) > 0.1


def test_positions_that_a_mask_leaves_out_count_nowhere():
    linear_map = DenseMap(5, 3)
    a, ds = RNG.normal(size=(6, 4, 5)), RNG.normal(size=(6, 4, 3))
    mask = np.arange(4) < RNG.integers(1, 5, (6, 1))
    omega, gamma = factors(linear_map, [a], [ds], "reduce", [tf.constant(mask)])
    means = np.stack([np.append(a[b][mask[b]].mean(0), 1.0) for b in range(6)])
    sums = np.stack([ds[b][mask[b]].sum(0) for b in range(6)])
    assert relative_error(omega[0], means.T @ means / 6) < 1e-12
    assert relative_error(gamma[0], sums.T @ sums / 6) < 1e-12


def test_uses_of_a_layer_are_positions_too():
    linear_map = DenseMap(5, 3)
    a, ds = RNG.normal(size=(6, 4, 5)), RNG.normal(size=(6, 4, 3))
    together = factors(linear_map, [a], [ds], "reduce")
    apart = factors(
        linear_map, [a[:, :1], a[:, 1:]], [ds[:, :1], ds[:, 1:]], "reduce", [None, None]
    )
    for one, other in zip(together, apart, strict=True):
        assert relative_error(one, other) < 1e-12


def test_wide_factors_are_cut_as_in_the_other_setting():
    linear_map, in_shape, out_shape = MAPS["conv"]
    a, ds = RNG.normal(size=in_shape), RNG.normal(size=out_shape)
    whole, _ = factors(linear_map, [a], [ds], "reduce")
    cut, gamma = factors(linear_map, [a], [ds], "reduce", max_dim=9)
    assert cut.shape == (2, 9, 9) and gamma.shape == (1, 4, 4)
    # Channels 0 and 1 of all four kernel positions, and the bias.
    own = [tap * 3 + channel for tap in range(4) for channel in (0, 1)] + [12]
    assert relative_error(cut[0], whole[0][np.ix_(own, own)]) < 1e-12


def test_a_batch_with_rows_of_no_example_is_no_error():
    linear_map = DenseMap(5, 3)
    omega, gamma = factors(
        linear_map, [RNG.normal(size=(7, 5))], [RNG.normal(size=(7, 3))], "reduce"
    )
    assert np.isfinite(omega).all() and np.isfinite(gamma).all()


def test_a_layer_and_the_optimizer_may_choose():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((5, 3)), keras.layers.LSTM(4, return_sequences=True), keras.layers.Dense(2)]
    )
    keras_kfc.instrument(model)

    def chosen(optimizer):
        optimizer.build(model.trainable_variables)
        return [block.layout.weight_sharing for block in optimizer.blocks]

    assert chosen(keras_kfc.KFC()) == ["trace"] * 2
    assert chosen(keras_kfc.KFC(weight_sharing="expand")) == ["expand"] * 2
    model.layers[-1].weight_sharing = "reduce"
    assert chosen(keras_kfc.KFC()) == ["trace", "reduce"]
    with pytest.raises(ValueError, match=r"`weight_sharing` must be .*'expand', 'reduce', 'trace'"):
        keras_kfc.KFC(weight_sharing="both")


@pytest.mark.slow
def test_a_sample_of_the_examples_has_all_their_steps():
    """Factors from two examples of four are those of two neighbours, whatever their steps."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.SimpleRNN(4)])
    keras_kfc.instrument(model).compile(
        keras_kfc.KFC(factor_batch_size=2, seed=3, curvature_ema=0.0, weight_sharing="reduce"),
        "mse",
    )
    x = RNG.normal(size=(4, 5, 3)).astype("float32")
    model.fit(x, np.zeros((4, 4), "float32"), batch_size=4, shuffle=False, verbose=0)
    own = np.r_[:3, -1]  # without the states
    omega = model.optimizer.blocks[0].omega.numpy()[0][np.ix_(own, own)]
    means = np.pad(x.mean(1), ((0, 0), (0, 1)), constant_values=1)
    pairs = [means[[i, (i + 1) % 4]] for i in range(4)]
    errors = [relative_error(omega, pair.T @ pair / 2) for pair in pairs]
    assert min(errors) < 1e-5
