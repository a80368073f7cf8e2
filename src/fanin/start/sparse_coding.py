"""Sparse coding: each target a sum of K atoms of a dictionary, and a dictionary learnt for a set of targets.

The support is found by orthogonal matching pursuit (Pati, Rezaiifar & Krishnaprasad, Asilomar 1993), a few atoms a round
where K is large (generalised OMP: Wang, Kwon & Shim, IEEE Transactions on Signal Processing 2012), the values on it by
least squares. With groups, runs of `group` targets choose one support by their joint energy (simultaneous sparse
approximation, Tropp et al., Signal Processing 2006). The dictionary alternates codes and least squares (the method of
optimal directions, Engan et al., ICASSP 1999). A code is stored as index [ceil(n / G), K] int64, ascending and distinct in
each row, and value [n, K]; nothing here is as large as targets times atoms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 32  # of atoms chosen when the codes are final
LEARNING_ROUNDS = 8  # while the dictionary still changes: three times as fast, and the dictionary is as good
RIDGE = 1e-3  # of the least squares on a support: its atoms may be nearly dependent
EXACT = 1e-10  # of a target's energy
KMEANS_ROUNDS = 8
SOLVER_ROUNDS = 10  # conjugate gradients a dictionary update, from the dictionary before it
CPU_BUDGET, GPU_BUDGET = 2**21, 2**26  # numbers in a chunk's largest array: on a CPU it should stay in the cache


def encode(targets: Tensor, atoms: Tensor, fan_in: int, group: int = 1, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """targets [n, D] and atoms [m, D] of unit length -> a code (index, value), its `fan_in` atoms chosen in `rounds`."""
    targets, n = F.pad(targets, (0, 0, 0, -len(targets) % group)), len(targets)
    some = max(_budget(targets) // max(len(atoms) * group, fan_in * atoms.shape[1]), 1)
    index = torch.cat([_support(part, atoms, fan_in, group, rounds) for part in targets.split(some * group)])
    index = index.sort(dim=1).values
    return index, _least_squares(targets, atoms, index, group)[:n]


def decode(index: Tensor, value: Tensor, atoms: Tensor, group: int = 1) -> Tensor:
    """A code and atoms [m, D] -> [n, D]: what the code stands for."""
    return F.embedding_bag(_rows(index, len(value), group), atoms, per_sample_weights=value, mode="sum")


def learn_dictionary(targets: Tensor, atoms: int, fan_in: int, group: int, rounds: int, generator: torch.Generator) -> Tensor:
    """targets [n, D] -> [atoms, D] unit rows that code them well; an error counts by the square of its target's length.

    Starts from `kmeans_dictionary`; the last of `rounds` rounds is the caller's own, final coding.
    """
    dictionary = kmeans_dictionary(targets, atoms, generator)
    for _ in range(rounds - 1):
        index, value = encode(targets, dictionary, fan_in, group, LEARNING_ROUNDS)
        dictionary = _best_dictionary(_rows(index, len(value), group), value, targets, dictionary)
    return dictionary


def kmeans_dictionary(targets: Tensor, atoms: int, generator: torch.Generator) -> Tensor:
    """targets [n, D] -> [atoms, D] unit rows: k-means on the sphere, up to sign, of targets weighted by their lengths.

    It starts at the longest targets, at random among equals. Atoms that no target chooses, and those beyond the number of
    targets, are random directions.
    """
    width = targets.shape[1]
    random = torch.randn(atoms, width, generator=generator).to(targets)
    shuffled = torch.randperm(len(targets), generator=generator).to(targets.device)
    longest = targets.norm(dim=1)[shuffled].mul(1e4).round().argsort(descending=True, stable=True)
    some = shuffled[longest[:atoms]]
    dictionary = random.clone()
    dictionary[: len(some)] = F.normalize(targets[some], dim=1) + 0.01 * random[: len(some)]  # equals give atoms that differ
    dictionary = F.normalize(dictionary, dim=1)
    for _ in range(KMEANS_ROUNDS):
        near = [(part @ dictionary.T).abs().argmax(1) for part in targets.split(max(_budget(targets) // atoms, 1))]
        index = torch.cat(near)[:, None]
        sign = torch.linalg.vecdot(targets, dictionary[index[:, 0]]).sign()[:, None]
        mean = _adjoint(index, sign, atoms)(targets)
        empty = mean.norm(dim=1, keepdim=True) < 1e-6
        dictionary = F.normalize(torch.where(empty, random, mean), dim=1)
    return dictionary


def _support(targets: Tensor, atoms: Tensor, fan_in: int, group: int, rounds: int) -> Tensor:
    """targets [n, D] in whole groups -> [n / group, fan_in]: each round adds the atoms with the most energy in what is left.

    What is left of a target is orthogonal to the atoms chosen: they are kept as an orthonormal basis.
    """
    left = targets.unflatten(0, (-1, group))
    groups, width = len(left), atoms.shape[1]
    index = torch.empty(groups, fan_in, dtype=torch.int64, device=targets.device)
    basis = targets.new_empty(groups, fan_in, width)
    at_once, known = -(-fan_in // rounds), 0
    floor = EXACT * left.square().sum(2, keepdim=True)  # what is left below it is rounding, which should choose nothing
    while known < fan_in:
        score = (left.flatten(0, 1) @ atoms.T).square_().unflatten(0, (-1, group))
        energy = (score[:, 0] if group == 1 else score.sum(1)).scatter_(1, index[:, :known], -1)
        for chosen in energy.topk(min(at_once, fan_in - known), dim=1).indices.T:
            new, before = atoms[chosen, None], basis[:, :known]
            new = F.normalize(new - torch.bmm(torch.bmm(new, before.mT), before), dim=2)
            index[:, known], basis[:, known] = chosen, new[:, 0]
            left = left - torch.bmm(torch.bmm(left, new.mT), new)
            known += 1
        left = left * (left.square().sum(2, keepdim=True) > floor)
    return index


def _least_squares(targets: Tensor, atoms: Tensor, index: Tensor, group: int) -> Tensor:
    """The values on each support: targets [n, D], index [n / group, K] -> [n, K]."""
    fan_in, width = index.shape[1], atoms.shape[1]
    ridge = RIDGE * torch.eye(fan_in, dtype=torch.float64, device=atoms.device)
    some = max(_budget(targets) // (fan_in * max(width, fan_in)), 1)
    values = []
    for rows, own in zip(index.split(some), targets.view(-1, group, width).split(some), strict=True):
        chosen = atoms[rows]
        factor = torch.linalg.cholesky((chosen @ chosen.mT).double() + ridge)
        solved = torch.cholesky_solve((chosen @ own.mT).double(), factor)
        values.append(solved.mT.reshape(-1, fan_in).to(targets))
    return torch.cat(values)


def _best_dictionary(index: Tensor, value: Tensor, targets: Tensor, dictionary: Tensor) -> Tensor:
    """The dictionary that suits a code S best, unit rows: (S'S + ridge) A = S'T by conjugate gradients, one system a column."""
    adjoint = _adjoint(index, value, len(dictionary))
    ridge = 1e-2

    def normal(a: Tensor) -> Tensor:
        return adjoint(decode(index, value, a)).add_(a, alpha=ridge)

    solution = dictionary.clone()
    residual = adjoint(targets) - normal(solution)
    direction = residual
    energy = residual.square().sum(0)
    for _ in range(SOLVER_ROUNDS):
        image = normal(direction)
        length = energy / (direction * image).sum(0).clamp_min(1e-30)
        solution = solution + length * direction
        residual = residual - length * image
        new_energy = residual.square().sum(0)
        direction = residual + new_energy / energy.clamp_min(1e-30) * direction
        energy = new_energy
    unused = torch.bincount(index.reshape(-1), minlength=len(dictionary)) == 0
    return F.normalize(torch.where(unused[:, None], dictionary, solution), dim=1)


class _adjoint:
    """A code's transpose S' [m, n], ready to multiply: sorted by atom once, so that the sums have a fixed order."""

    def __init__(self, index: Tensor, value: Tensor, atoms: int) -> None:
        atom, order = index.reshape(-1).sort(stable=True)
        self.row = order // index.shape[1]
        self.value = value.reshape(-1)[order]
        self.offsets = torch.searchsorted(atom, torch.arange(atoms, device=index.device))

    def __call__(self, targets: Tensor) -> Tensor:
        """targets [n, D] -> S' targets [m, D]."""
        return F.embedding_bag(self.row, targets, self.offsets, per_sample_weights=self.value, mode="sum")


def _rows(index: Tensor, n: int, group: int) -> Tensor:
    """[ceil(n / group), K] -> [n, K]: each row's own index."""
    return index if group == 1 else index.repeat_interleave(group, 0)[:n]


def _budget(tensor: Tensor) -> int:
    return CPU_BUDGET if tensor.device.type == "cpu" else GPU_BUDGET
