"""What every structure of the curvature must do, whatever it keeps.

Two facts hold for any damped inverse of a Fisher block: for damping beyond all
eigenvalues it is one over the damping, and relative damping makes it inversely
proportional to the curvature. The trace of a block is that of the explicit Fisher matrix
where a single example with a single position makes it.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from nets import flat_weights

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature.api import STRUCTURES, BlockLayout, CurvatureBlock
from keras_kfc.curvature.averaging import move_averages
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap
from keras_kfc.maps.embedding import EmbeddingMap
from keras_kfc.maps.weights import VariableIndices

# A line for each structure: what is to be had of it for any map, or the maps that it is for.
STRUCTURE_MAPS = {
    "diagonal": None,
    "eigenbasis": None,
    "diagonal_input": {"table": (EmbeddingMap(7, 3), (6, 5), (6, 5, 3))},
    "full": None,
    "kronecker": None,
    "tied": {"table": (EmbeddingMap(7, 3), (6, 5), (6, 5, 3))},
}
FOR_ANY_MAP = [name for name, maps in STRUCTURE_MAPS.items() if maps is None]
MAPS = {
    "dense": (DenseMap(4, 3), (6, 4), (6, 3)),
    "dense, positions": (DenseMap(4, 3), (6, 5, 4), (6, 5, 3)),
    "conv": (Conv2DMap((2, 2), 3, 4), (6, 4, 5, 3), (6, 3, 4, 4)),
    "groups": (Conv2DMap((2, 2), 4, 6, groups=2), (6, 4, 5, 4), (6, 3, 4, 6)),
}
QUICK = {("dense", True), ("groups", False), ("table", False)}
CASES = [
    pytest.param(name, case, bias, marks=() if (case, bias) in QUICK else pytest.mark.nightly)
    for name in STRUCTURE_MAPS
    for case in STRUCTURE_MAPS[name] or MAPS
    for bias in ((True, False) if case in MAPS else (False,))
]
every = pytest.mark.parametrize(("name", "case", "use_bias"), CASES)


def add_variable(shape, dtype, name):
    return keras.Variable(np.zeros(shape), dtype=dtype, name=name)


class Example:
    """A block with the moments of a random batch."""

    def __init__(self, name, case, use_bias, max_dim=None):
        self.linear_map, in_shape, out_shape = (STRUCTURE_MAPS[name] or MAPS)[case]
        rng = np.random.default_rng(0)
        numbers = rng.normal(size=in_shape)
        tokens = rng.integers(0, self.linear_map.inputs, in_shape)
        self.inputs = tf.constant(tokens if case == "table" else numbers)
        self.derivatives = tf.constant(rng.normal(size=out_shape))
        self.structure = STRUCTURES[name]
        self.layout = self.structure.layout(self.linear_map, use_bias, max_dim)
        indices = VariableIndices((0,), 1 if use_bias else None, (0,))
        self.block = self.structure.block("layer", self.layout, indices, "float64", add_variable)
        rows = self.linear_map.kernel_rows + use_bias
        columns = self.linear_map.outputs // self.linear_map.groups
        self.shape = (self.linear_map.groups, rows, columns)
        self.rng = rng

    def moments(self, scale=1.0):
        """Of the batch, with derivatives times `scale`."""
        inputs, derivatives, size = [self.inputs], [scale * self.derivatives], tf.constant(6)
        needed = inputs if self.layout.needs_inputs else []
        return (
            *self.layout.from_inputs(inputs, size, [None]),
            *self.layout.from_pass(needed, derivatives, size, [None]),
        )

    def update(self, moments, examples=6.0, decay=0.5, batch_is_finite=True):
        batch = tf.constant(examples), tf.constant(decay), tf.constant(batch_is_finite)
        return bool(move_averages([self.block], [moments], *batch)[0])

    def factors(self):
        return [self.block.state[name].numpy() for name in self.layout.factor_shapes]

    def refresh(self, damping, relative):
        refresh = self.structure.refresh([self.block])
        mean = refresh.trace / refresh.size if relative else None
        (refused,) = refresh.run(tf.constant(damping, tf.float64), mean)
        assert refresh.size == np.prod(self.shape)
        return bool(refused)

    def times(self, weights):
        return self.block.multiply(tf.constant(weights)).numpy()


def test_every_structure_is_here():
    assert set(STRUCTURE_MAPS) == set(STRUCTURES)
    for name, structure in STRUCTURES.items():
        assert structure.for_any_map == (name in FOR_ANY_MAP)


def test_a_user_chooses_among_those_for_any_map():
    for name in FOR_ANY_MAP:
        assert keras_kfc.KFC(structure=name).structure == name
    with pytest.raises(
        ValueError, match=r"`structure` .*'diagonal', 'eigenbasis', 'full', 'kronecker'.*input'"
    ):
        keras_kfc.KFC(structure="diagonal_input")


@every
def test_it_keeps_what_its_layout_says(name, case, use_bias):
    example = Example(name, case, use_bias)
    shapes = {**example.layout.factor_shapes, **example.layout.inverse_shapes}
    names = [name.removesuffix("_inverse") for name in example.layout.inverse_shapes]
    assert set(names) <= set(example.layout.factor_shapes)
    shapes |= {"weight": (), "inverted": (), **getattr(example.layout, "basis_shapes", {})}
    assert {role: tuple(v.shape) for role, v in example.block.state.items()} == shapes
    for moment, shape in zip(example.moments(), example.layout.factor_shapes.values(), strict=True):
        assert tuple(moment.shape) == shape
    for protocol, thing in ((BlockLayout, example.layout), (CurvatureBlock, example.block)):
        members = set(dir(protocol)) | set(protocol.__annotations__)
        for member in members:
            assert member.startswith("_") or hasattr(thing, member), member


@every
def test_batches_count_by_their_examples(name, case, use_bias):
    example = Example(name, case, use_bias)
    first, second = example.moments(), example.moments(3.0)
    assert not example.update(first, examples=6.0)
    for factor, moment in zip(example.factors(), first, strict=True):
        np.testing.assert_allclose(factor, moment)
    assert not example.update(second, examples=2.0, decay=0.5)
    for factor, one, other in zip(example.factors(), first, second, strict=True):
        np.testing.assert_allclose(factor, (3 * one + 2 * other) / 5)
    assert float(example.block.ema_weight) == 5.0
    # Quadratic in the derivatives, one factor of them: a use of their signs would show.
    changed = [relative_error(a, b) for a, b in zip(first, second, strict=True)]
    assert max(changed) == pytest.approx(8 / 9, rel=1e-6)


@every
def test_broken_batches_leave_no_trace(name, case, use_bias):
    example = Example(name, case, use_bias)
    example.update(example.moments())
    before = example.factors()
    assert example.update(example.moments(np.nan))
    assert example.update(example.moments(2.0), batch_is_finite=False)
    for factor, old in zip(example.factors(), before, strict=True):
        np.testing.assert_array_equal(factor, old)
    assert float(example.block.ema_weight) == 6.0


@every
def test_what_is_exchanged_as_a_triangle_is_symmetric(name, case, use_bias):
    example = Example(name, case, use_bias)
    layout = example.block.layout
    example.update(example.moments())
    assert set(layout.symmetric_factors) <= set(layout.factor_shapes)
    for factor in layout.symmetric_factors:
        stack = example.block.state[factor].numpy()
        assert stack.ndim == 3 and (np.any(stack) or factor == "hidden")
        np.testing.assert_allclose(stack, stack.transpose(0, 2, 1), rtol=1e-9, atol=1e-12)


@every
def test_the_inverse_is_symmetric_and_positive(name, case, use_bias):
    example = Example(name, case, use_bias)
    example.update(example.moments())
    assert not example.refresh(0.1, True)
    u, v = example.rng.normal(size=(2, *example.shape))
    one, other = np.sum(u * example.times(v)), np.sum(v * example.times(u))
    assert one == pytest.approx(other, rel=1e-9)
    assert np.sum(u * example.times(u)) > 0 and np.sum(v * example.times(v)) > 0
    assert float(example.block.has_inverses) == 1.0


@every
def test_much_damping_leaves_nothing_else(name, case, use_bias):
    example = Example(name, case, use_bias)
    example.update(example.moments())
    weights = example.rng.normal(size=example.shape)
    example.refresh(1e12, False)
    assert relative_error(1e12 * example.times(weights), weights) < 1e-4
    # Negative control: with little, curvature shows.
    example.refresh(1e-2, False)
    assert relative_error(1e-2 * example.times(weights), weights) > 0.1


@every
def test_relative_damping_is_free_of_scale(name, case, use_bias):
    steps = []
    for scale in (1.0, 7.0):
        example = Example(name, case, use_bias)
        example.update(example.moments(scale))
        example.refresh(0.3, True)
        steps.append(scale**2 * example.times(np.ones(example.shape)))
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-6)


@pytest.mark.parametrize("name", FOR_ANY_MAP)
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_trace_of_one_example_is_that_of_its_gradient(name, use_bias):
    example = Example(name, "dense", use_bias)
    a, ds = example.inputs[:1], example.derivatives[:1]
    needed = [a] if example.layout.needs_inputs else []
    moments = (
        *example.layout.from_inputs([a], tf.constant(1), [None]),
        *example.layout.from_pass(needed, [ds], tf.constant(1), [None]),
    )
    example.update(moments)
    gradient = np.append(a[0], 1.0)[: 4 + use_bias, None] * ds.numpy()
    trace = example.structure.refresh([example.block]).trace
    assert float(trace) == pytest.approx(np.sum(gradient**2), rel=1e-12)


@every
def test_spectra_are_those_of_the_inverse(name, case, use_bias):
    example = Example(name, case, use_bias)
    example.update(example.moments())
    example.refresh(0.1, True)
    layout = example.layout
    for inverse in layout.inverse_shapes:
        factor = inverse.removesuffix("_inverse")
        values, inverses = (
            np.sort(np.concatenate(example.block.spectra(n))) for n in (factor, inverse)
        )
        assert len(values) == len(inverses) and (inverses > 0).all()
        assert values[0] > -1e-9 and 1 / inverses[0] > values[-1]
        for matrix in example.block.matrices(factor):
            np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)


@every
def test_nothing_to_invert_is_refused_or_left(name, case, use_bias):
    """Without data nothing is inverted; a zero block without damping has no inverse."""
    example = Example(name, case, use_bias)
    assert not example.refresh(0.1, True)
    assert float(example.block.has_inverses) == 0.0
    example.update(example.moments(0.0))
    assert example.refresh(0.0, False)
    assert float(example.block.has_inverses) == 0.0


def net(name):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, activation="relu")]
    layers += [keras.layers.Flatten(), keras.layers.Dense(3)]
    model = keras_kfc.instrument(keras.Sequential(layers))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras_kfc.KFC(structure=name, seed=1), loss)
    return model


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 8, 8, 1)).astype("float32")
    return x, np.digitize(x[:, :4].mean((1, 2, 3)), [-0.1, 0.1])


@pytest.mark.parametrize("name", few(FOR_ANY_MAP, 1))
def test_it_trains_and_resumes(name, tmp_path):
    x, y = data()
    model = net(name)
    losses = model.fit(x, y, epochs=6, batch_size=32, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < 0.6 * losses[0]
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, resumed):
        one.fit(x, y, epochs=8, initial_epoch=6, batch_size=32, shuffle=False, verbose=0)
    np.testing.assert_array_equal(flat_weights(resumed), flat_weights(model))


def test_state_of_another_structure_is_refused():
    first, *others = FOR_ANY_MAP
    store = {}
    for name in (first, *others):
        optimizer = net(name).optimizer
        optimizer.build(net(name).trainable_variables)
        if name == first:
            optimizer.iterations.assign(7)
            optimizer.save_own_variables(store)
            continue
        alike, own = (STRUCTURES[n].layout(DenseMap(4, 3), True, None) for n in (first, name))
        refusal = pytest.warns(UserWarning, match="Skipping")
        if len(own.factor_shapes) == len(alike.factor_shapes):
            refusal = pytest.raises(ValueError, match="belongs to other layers or settings")
        with refusal:
            optimizer.load_own_variables(store)
        assert int(optimizer.iterations) == 0
