"""The exact Fisher block of a convolution, and what each assumption of KFC makes of it.

Everything here is NumPy in float64, from the definitions, for networks small enough that
the block can be written down. With `ā_t` the patch and `Ds_t` the derivative at position t
of one example, the gradient of the weights with bias is `Σ_t ā_t Ds_tᵀ`, and the expectation runs
over examples and over targets drawn from the model's prediction:

    exact          E[Σ_t Σ_t' (ā_t ā_t'ᵀ) ⊗ (Ds_t Ds_t'ᵀ)]
    independent    Σ_t Σ_t' E[ā_t ā_t'ᵀ] ⊗ E[Ds_t Ds_t'ᵀ]     activations and derivatives
    uncorrelated   Σ_t E[ā_t ā_tᵀ] ⊗ E[Ds_t Ds_tᵀ]            derivatives at two positions
    homogeneous    Ω ⊗ Γ                                      moments at all positions

Each line makes one more assumption of Grosse & Martens (2016), section 3.

Shapes: N examples, C classes, T positions, n rows of the weights with bias, m output channels.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf


@dataclasses.dataclass
class Statistics:
    """What one convolution sees and gets back on a batch.

    Attributes:
        patches: `ā`, `(N, T, n)`.
        derivatives: `Ds` of every class as the target, `(C, N, T, m)`.
        weights: Probability of that class, `(C, N)`.
        map_shape: Height and width of the map of positions.
    """

    patches: np.ndarray
    derivatives: np.ndarray
    weights: np.ndarray
    map_shape: tuple[int, int]

    @property
    def weighted(self) -> np.ndarray:
        """Derivatives whose plain sums over classes are expectations, `(C, N, T, m)`."""
        return np.sqrt(self.weights)[..., None, None] * self.derivatives


def statistics_of(model: keras.Model, layer: keras.layers.Conv2D, images) -> Statistics:
    """Runs a classifier forward once and backward once for each class.

    Args:
        model: A functional or sequential model that ends in a `Softmax` layer.
        layer: One of its convolutions, with a bias and no activation of its own.
        images: Inputs.

    Returns:
        The statistics, in float64.
    """
    taps = keras.Model(model.inputs[0], [layer.input, layer.output, model.layers[-1].input])
    with tf.GradientTape(persistent=True) as tape:
        inputs, outputs, logits = taps(images, training=False)
        log_probabilities = tf.nn.log_softmax(logits)
        log_likelihoods = tf.unstack(log_probabilities, axis=1)
    derivatives = [-tape.gradient(value, outputs) for value in log_likelihoods]
    patches = tf.image.extract_patches(
        inputs,
        (1, *layer.kernel_size, 1),
        (1, *layer.strides, 1),
        (1, *layer.dilation_rate, 1),
        layer.padding.upper(),
    )
    count, height, width, _ = patches.shape
    rows = np.reshape(patches.numpy().astype("float64"), (count, height * width, -1))
    return Statistics(
        np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2),
        np.stack([d.numpy().astype("float64") for d in derivatives]).reshape(
            len(derivatives), count, height * width, -1
        ),
        np.exp(log_probabilities.numpy()).astype("float64").T,
        (height, width),
    )


def exact_block(statistics: Statistics) -> np.ndarray:
    """The layer's Fisher block, `(n * m, n * m)`."""
    gradients = np.einsum("btn,cbtm->cbnm", statistics.patches, statistics.weighted, optimize=True)
    rows = gradients.reshape(-1, gradients.shape[-2] * gradients.shape[-1])
    return rows.T @ rows / len(statistics.patches)


def approximations(statistics: Statistics) -> dict[str, np.ndarray]:
    """The block under each assumption, by its name in the module's text."""
    patches, derivatives = statistics.patches, statistics.weighted
    count, positions, rows = patches.shape
    columns = derivatives.shape[-1]
    size = rows * columns
    pairs_a = np.einsum("btn,bup->tunp", patches, patches, optimize=True) / count
    pairs_d = np.einsum("cbtm,cbuq->tumq", derivatives, derivatives, optimize=True) / count

    def kronecker(first, second):
        # Sums of Kronecker products, over the axis that both lead with.
        return np.einsum("tnp,tmq->nmpq", first, second, optimize=True).reshape(size, size)

    every_pair = (
        pairs_a.reshape(positions**2, rows, rows),
        pairs_d.reshape(positions**2, columns, columns),
    )
    same_a, same_d = (np.einsum("tt...->t...", pairs) for pairs in (pairs_a, pairs_d))
    return {
        "independent": kronecker(*every_pair),
        "uncorrelated": kronecker(same_a, same_d),
        "homogeneous": np.kron(same_a.sum(axis=0), same_d.mean(axis=0)),
    }


def nearest_kronecker_product(block: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The Kronecker product of an (n, n) and an (m, m) matrix nearest to a block.

    Van Loan & Pitsianis (1993): the leading singular vectors of the rearranged block. No
    choice of two factors comes closer in the Frobenius norm.
    """
    rearranged = block.reshape(rows, columns, rows, columns).transpose(0, 2, 1, 3)
    left, values, right = np.linalg.svd(
        rearranged.reshape(rows**2, columns**2), full_matrices=False
    )
    return values[0] * np.kron(left[:, 0].reshape(rows, rows), right[0].reshape(columns, columns))


def product_of_partial_traces(block: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The Kronecker product that has a block's partial traces, KFC's `weight_sharing="trace"`."""
    parts = block.reshape(rows, columns, rows, columns)
    omega, gamma = np.einsum("iojo->ij", parts), np.einsum("ioip->op", parts)
    return np.kron(omega, gamma) / np.trace(block)


def relative_error(approximation: np.ndarray, block: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the block."""
    return float(np.linalg.norm(approximation - block) / np.linalg.norm(block))


def natural_cosine(approximation: np.ndarray, block: np.ndarray, damping: float) -> float:
    """How alike the two damped inverses turn gradients: a cosine, 1 if in the same way.

    It is the mean, over gradients with the block as their covariance, of the cosine between
    `(F + λ I)⁻¹ g` for the exact block and for the approximation, in the norm of the exact
    one. Both get the same damping `λ`, `damping` times the block's mean eigenvalue.
    """
    size = len(block)
    shift = damping * np.trace(block) / size * np.eye(size)
    eigenvalues, vectors = np.linalg.eigh(block)
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0))
    gradients = root @ np.random.default_rng(0).normal(size=(size, 200))
    metric = block + shift
    ours = np.linalg.solve(approximation + shift, gradients)
    exact = np.linalg.solve(metric, gradients)
    # ⟨x, y⟩ = xᵀ (F + λ I) y
    inner = np.sum(ours * (metric @ exact), axis=0)
    norms = np.sum(ours * (metric @ ours), axis=0) * np.sum(exact * (metric @ exact), axis=0)
    return float(np.mean(inner / np.sqrt(norms)))


def correlations(values: np.ndarray, map_shape: tuple[int, int], reach: int) -> np.ndarray:
    """Mean correlation of the same channel at two positions, by their displacement.

    Args:
        values: `(..., T, channels)`, whose leading axes are averaged over. Moments are taken
            about zero.
        map_shape: Height and width of the map.
        reach: Largest displacement along each axis.

    Returns:
        `(2 * reach + 1, 2 * reach + 1)`; its centre is 1.
    """
    height, width = map_shape
    maps = values.reshape(-1, height, width, values.shape[-1])
    moments = np.sqrt(np.mean(maps**2, axis=0))
    result = np.zeros((2 * reach + 1, 2 * reach + 1))
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            here = (
                slice(None),
                slice(max(0, -i), height - max(0, i)),
                slice(max(0, -j), width - max(0, j)),
            )
            there = (
                slice(None),
                slice(max(0, i), height + min(0, i)),
                slice(max(0, j), width + min(0, j)),
            )
            products = np.mean(maps[here] * maps[there], axis=0)
            norms = moments[here[1:]] * moments[there[1:]]
            alive = norms > 1e-12 * norms.max()
            result[i + reach, j + reach] = np.mean(products[alive] / norms[alive])
    return result


def map_of_moments(values: np.ndarray, map_shape: tuple[int, int]) -> np.ndarray:
    """Second moment at each position over their mean, summed over channels, as a map."""
    moments = np.mean(np.sum(values**2, axis=-1).reshape(-1, *map_shape), axis=0)
    return moments / moments.mean()
