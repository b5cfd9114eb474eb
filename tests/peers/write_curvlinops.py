"""Writes what another package makes of two small networks, for `test_curvlinops.py`.

Run by hand where PyTorch and curvlinops are installed, neither of which the tests need:

    pip install curvlinops-for-pytorch==3.0.1
    python tests/peers/write_curvlinops.py
"""

import pathlib

import numpy as np
import torch
from curvlinops import KFACLinearOperator


class Mean(torch.nn.Module):
    """The mean over positions, those of a sequence or of an image."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Takes `(B, T, C)` or `(B, C, H, W)`."""
        return rows.mean(dim=1 if rows.ndim == 3 else (2, 3))


def networks() -> dict[str, tuple[torch.nn.Module, tuple[int, ...]]]:
    """Networks with the shapes of their inputs."""
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, (2, 3)), torch.nn.Tanh(), Mean(), torch.nn.Linear(4, 3)
    )
    sequence = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), Mean(), torch.nn.Linear(4, 3)
    )
    return {"conv": (conv, (2, 4, 5)), "sequence": (sequence, (5, 3))}


def main() -> None:
    """Computes and writes."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    stored = {}
    for name, (model, shape) in networks().items():
        x, y = torch.randn(6, *shape), torch.randint(0, 3, (6,))
        stored |= {f"{name}/x": x.numpy(), f"{name}/y": y.numpy()}
        parameters = dict(model.named_parameters())
        for key, value in parameters.items():
            stored[f"{name}/{key}"] = value.detach().numpy()
        for setting in ("expand", "reduce"):
            operator = KFACLinearOperator(
                model,
                torch.nn.CrossEntropyLoss(),
                list(model.parameters()),
                [(x, y)],
                fisher_type="type-2",
                kfac_approx=setting,
                separate_weight_and_bias=False,
            )
            size = sum(value.numel() for value in parameters.values())
            stored[f"{name}/{setting}"] = (operator @ torch.eye(size)).detach().numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("curvlinops.npz"), **stored)


if __name__ == "__main__":
    main()
