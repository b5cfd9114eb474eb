"""Patch second moments against patches laid out, and against the convolution itself.

Run as `python -m benchmarks.patches`; `--help` lists the options. Each case is one
layer's input. Ours and patches both give second moment and patch sum; all that is
compared runs in turns, and medians are shown. Memory is
what a process takes at most beyond the result, in a process of its own.
"""

import argparse
import dataclasses
import json
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.harness import in_child_process, interleaved, memory_of_process, report
from keras_kfc.patches.moment import FORMS, patch_second_moment


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's input and kernel; padding is "same".

    Args:
        size: Height and width of the map.
        channels: Channels.
        kernel: Kernel size.
        stride: Stride.
        batch: Number of images.
    """

    size: int
    channels: int
    kernel: int
    stride: int = 1
    batch: int = 128

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{self.size}x{self.size}x{self.channels}, {self.kernel}x{self.kernel}{stride}, "
            f"batch {self.batch}"
        )

    def images(self) -> tf.Tensor:
        """Random images."""
        shape = (self.batch, self.size, self.size, self.channels)
        return tf.constant(np.random.default_rng(0).normal(size=shape).astype("float32"))

    @property
    def patch_bytes(self) -> int:
        """Size of the patches laid out in float32."""
        positions = self.batch * (-(-self.size // self.stride)) ** 2
        return 4 * positions * self.kernel**2 * self.channels


CASES = (
    Case(28, 1, 5),
    Case(14, 16, 5),
    Case(16, 32, 5),
    Case(32, 32, 3),
    Case(32, 64, 3),
    Case(16, 64, 3),
    Case(8, 128, 3),
    Case(56, 64, 3, batch=64),
    Case(224, 3, 7, 2, batch=16),
    Case(14, 256, 1),
)
# A ResNet's other layers, small maps and large strides.
MORE_CASES = (
    Case(32, 3, 3),
    Case(32, 16, 3),
    Case(32, 16, 3, 2),
    Case(16, 32, 3, 2),
    Case(7, 512, 3, batch=32),
    Case(4, 64, 3),
    Case(1, 64, 3),
    Case(56, 64, 1, 2, batch=64),
    Case(16, 16, 2, 2),
    Case(112, 3, 11, 4, batch=32),
)


def patch_matrix(images: tf.Tensor, kernel: int, stride: int) -> tf.Tensor:
    """Patches as rows of one matrix, joined from a slice of the images for each tap."""
    size, channels = images.shape[1], images.shape[3]
    outputs = -(-size // stride)
    surplus = max((outputs - 1) * stride + kernel - size, 0)
    border = (surplus // 2, surplus - surplus // 2)
    padded = tf.pad(images, ((0, 0), border, border, (0, 0)))
    reach = stride * (outputs - 1) + 1
    slices = [
        padded[:, row : row + reach : stride, column : column + reach : stride]
        for row in range(kernel)
        for column in range(kernel)
    ]
    return tf.reshape(tf.concat(slices, axis=-1), (-1, kernel**2 * channels))


def moments_of(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sum of outer products of rows, and sum of rows, each as one product."""
    ones = tf.ones((1, tf.shape(matrix)[0]), matrix.dtype)
    return tf.matmul(matrix, matrix, transpose_a=True), ones @ matrix


def ours(case: Case, form: str | None, jit_compile: bool = False, any_batch: bool = False):
    """A graph function of images: the package's second moment and patch sum."""

    def moments(images):
        return patch_second_moment(images, case.kernel, case.stride, "same", form=form)

    batch = None if any_batch else case.batch
    signature = [tf.TensorSpec((batch, case.size, case.size, case.channels))]
    return tf.function(moments, input_signature=signature, autograph=False, jit_compile=jit_compile)


def measure(case: Case, repeats: int, forms: list[str | None], jit_compile: bool) -> dict:
    """One row of the table."""
    images = case.images()
    filters = tf.random.normal((case.kernel, case.kernel, case.channels, max(case.channels, 16)))
    graph = {"autograph": False, "jit_compile": jit_compile}
    convolution = tf.function(lambda x: tf.nn.conv2d(x, filters, case.stride, "SAME"), **graph)
    patches = tf.function(lambda x: moments_of(patch_matrix(x, case.kernel, case.stride)), **graph)
    functions = {"convolution": convolution, "im2col": patches}
    functions |= {str(form or "ours"): ours(case, form, jit_compile) for form in forms}
    result = functions["ours"](images)[0][0].numpy()
    patch_rows = tf.cast(patch_matrix(images, case.kernel, case.stride), tf.float64)
    expected = moments_of(patch_rows)[0].numpy()
    calls = {
        name: lambda function=function: tf.nest.map_structure(lambda x: x.numpy(), function(images))
        for name, function in functions.items()
    }
    seconds = interleaved(calls, repeats)
    row: dict[str, Any] = {"input, kernel": str(case)}
    row |= {f"{name} ms": 1e3 * value for name, value in seconds.items()}
    row["im2col / ours"] = seconds["im2col"] / seconds["ours"]
    row["ours / convolution"] = seconds["ours"] / seconds["convolution"]
    row["error"] = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
    return row


def peak_memory(case: Case, form: str | None) -> int:
    """Bytes that this process takes at most for one second moment, beyond the result."""
    images = case.images()
    function = ours(case, form, any_batch=True)
    # Traces, starts the threads and makes their scratch space. More would leave freed
    # memory behind, which the allocator keeps, and hide what the whole batch takes.
    function(images[: max(1, case.batch // 16)])
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak is forgotten
    before = memory_of_process("VmRSS")
    moment, _ = function(images)
    return memory_of_process("VmHWM") - before - 4 * int(tf.size(moment))


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--more", action="store_true", help="more cases")
    parser.add_argument("--forms", action="store_true", help="each form beside the one chosen")
    parser.add_argument("--jit", action="store_true", help="compile everything with XLA")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", type=int, help="print the peak memory of one case as JSON")
    arguments = parser.parse_args()
    cases = (*CASES, *(MORE_CASES if arguments.more else ()))
    if arguments.memory is not None:
        print(json.dumps(peak_memory((*CASES, *MORE_CASES)[arguments.memory], None)))
        return
    forms: list[str | None] = [None, *(FORMS if arguments.forms else ())]
    rows = []
    for number, case in enumerate(cases):
        row = measure(case, arguments.repeats, forms, arguments.jit)
        if not arguments.jit:
            used = in_child_process("benchmarks.patches", ["--memory", str(number)])
            row["memory / patches"] = used / case.patch_bytes
        rows.append(row)
        print(f"{row['input, kernel']}: {row['im2col / ours']:.1f}x", flush=True)
    compiled = " under XLA" if arguments.jit else ""
    name = "patches-xla" if arguments.jit else "patches"
    report(name, f"Patch second moment{compiled}", rows, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
