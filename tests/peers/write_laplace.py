"""Writes what laplace-torch makes of two small trained networks, for `test_laplace_torch.py`.

Run by hand where PyTorch and laplace-torch are installed, neither of which the tests need:

    pip install laplace-torch==0.3
    python tests/peers/write_laplace.py

Layers have no biases: it gives these a block of their own, and keras_kfc one with the kernel.
"""

import pathlib

import numpy as np
import torch
from laplace import Laplace

PRECISION, NOISE = 0.7, 0.3


def main() -> None:
    """Trains, computes and writes."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    stored = {}
    for likelihood, outputs in (("classification", 3), ("regression", 2)):
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 5, bias=False),
            torch.nn.Tanh(),
            torch.nn.Linear(5, outputs, bias=False),
        )
        x = torch.randn(40, 4)
        if likelihood == "classification":
            y, loss = torch.randint(0, 3, (40,)), torch.nn.CrossEntropyLoss()
        else:
            y, loss = torch.randn(40, 2), torch.nn.MSELoss()
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(100):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        new = torch.randn(7, 4)
        stored |= {f"{likelihood}/{k}": v.numpy() for k, v in {"x": x, "y": y, "new": new}.items()}
        for key, value in model.named_parameters():
            stored[f"{likelihood}/{key}"] = value.detach().numpy()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=40)
        for subset in ("all", "last_layer"):
            for structure in ("kron", "diag", "full"):
                options = {"sigma_noise": NOISE**0.5} if likelihood == "regression" else {}
                posterior = Laplace(
                    model,
                    likelihood,
                    subset_of_weights=subset,
                    hessian_structure=structure,
                    prior_precision=PRECISION,
                    **options,
                )
                posterior.fit(loader)
                name = f"{likelihood}/{subset}/{structure}"
                evidence = posterior.log_marginal_likelihood()
                stored[f"{name}/evidence"] = evidence.detach().numpy()
                mean, covariance = posterior._glm_predictive_distribution(new)
                stored[f"{name}/mean"] = mean.detach().numpy()
                stored[f"{name}/covariance"] = covariance.detach().numpy()
                if likelihood == "classification":
                    stored[f"{name}/probit"] = posterior(new, link_approx="probit").detach().numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("laplace.npz"), **stored)


if __name__ == "__main__":
    main()
