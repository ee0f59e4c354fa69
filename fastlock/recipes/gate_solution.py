"""A gate in closed form: ridge regression from what heads say to what should be added, of a given rank."""

from __future__ import annotations

import torch

from fastlock.errors import FastlockError

# What keeps the inverse finite where few texts were read, as a share of the mean eigenvalue.
RIDGE = 1e-2


def solved(
    second: torch.Tensor, means: torch.Tensor, weights: torch.Tensor, targets: torch.Tensor, rank: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate U Vᵀ that adds a target to x of each group, and as little as it can to everything else.

    The map that solves the ridge regression of AlphaSteer (arXiv 2506.07022), here with its null space weighed instead
    of cut out, is

        Δ = argmin  Σ_g w_g E_g|Δ x − t_g|² + β E|Δ b|² + λ|Δ|²  =  T diag(w) μᵀ (S + λ I)⁻¹

    with S = Σ_g w_g E_g[x xᵀ] + β E[b bᵀ] over the groups g and everything else b. The larger β, the nearer it is to
    the null space of b; at β → ∞ it is in it. Of rank r, the nearest to it, in the norm of S, is U Uᵀ Δ, with the first
    r eigenvectors of Δ S Δᵀ in U. What the ridge and the null space took off the targets is given back by one factor:
    in the mean over the groups, what U Vᵀ adds is along the targets as large as they are. That is strength 1.

    Args:
        second: S, [width, width] float64.
        means: μ, the mean of x in each group, [groups, width] float64.
        weights: w of each group, [groups] float64.
        targets: t, what should be added in each group, [groups, width] float64.
        rank: of the gate.
        name: of the layer, for messages.

    Returns:
        V and U, [width, rank] float64 each. Each column of V reads 1 of that group's mean of which it reads most.

    Raises:
        FastlockError: the targets have fewer directions than that, or nothing tells the groups from everything else.
    """
    damped = second + RIDGE * second.diagonal().mean() * torch.eye(
        len(second), dtype=second.dtype, device=second.device
    )
    weighted = (weights[:, None] * means).T
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise FastlockError(
            f"{name}: its heads say nothing, and no gate can read them. Choose other layers (`layers`)."
        )
    inverse = torch.cholesky_solve(weighted.to(damped), factor).to(means)  # (S + λ I)⁻¹ μᵀ diag(w)
    basis, r = torch.linalg.qr(targets.T)
    sizes, vectors = torch.linalg.eigh(r @ (weighted.T @ inverse) @ r.T)
    if rank > len(sizes) or sizes[-rank] <= 1e-12 * sizes[-1]:
        raise FastlockError(
            f"{name}: rank is {rank}, but the pairs give fewer directions for a gate to add. Lower the rank, or read "
            "more tokens of each answer."
        )
    top = vectors[:, -rank:].flip(1)
    writers, readers = basis @ top, inverse @ (r.T @ top)
    added = means @ readers @ writers.T
    writers = writers * ((weights[:, None] * targets * targets).sum() / (weights[:, None] * added * targets).sum())
    read = means @ readers
    most = read.gather(0, read.abs().argmax(0, keepdim=True))[0]
    return readers / most, writers * most
