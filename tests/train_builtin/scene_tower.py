"""The picture side of scenes: what is seen of a scene, made from the features of its things' pictures.

A thing is its picture's feature, sent through a matrix for each color, size and count that it has. A scene
is the sum of its things, each through the matrix of its place in the relation. To add a vector for a color
would bind too little: "red cube" and "blue sphere" would add up to "blue cube" and "red sphere".
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.train_builtin.scenes import COLORS, COUNTS, RELATIONS, SHAPES, SIZES

KINDS = (COLORS, SIZES, COUNTS)


def near_identity(*shape, turn):
    """Return matrices [*shape, E, E], the identity and an orthogonal matrix mixed."""
    made = torch.empty(*shape)
    for matrix in made.view(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix)
    return (1 - turn**2) ** 0.5 * torch.eye(shape[-1]) + turn * made


class SceneTower(nn.Module):
    def __init__(self, embed=128, hidden=256):
        super().__init__()
        self.shapes = nn.Parameter(torch.randn(len(SHAPES), embed))
        self.turns = nn.ParameterList(near_identity(len(kind), embed, embed, turn=0.8) for kind in KINDS)
        self.places = nn.Parameter(near_identity(len(RELATIONS), 2, embed, embed, turn=0.7))
        self.leanings = nn.Parameter(torch.randn(len(RELATIONS), embed) * 0.02)
        self.change = nn.Sequential(nn.Linear(2 * embed, hidden), nn.GELU(), nn.Linear(hidden, embed))
        nn.init.zeros_(self.change[2].weight)
        nn.init.zeros_(self.change[2].bias)

    def things(self, things, world, table):
        """Return features [n, embed] of things, some of them None; table holds the emoji's pictures."""
        table = torch.cat([table, F.normalize(self.shapes, dim=-1)])
        rows = [0 if t is None else self.row(t, world, len(table) - len(SHAPES)) for t in things]
        seen = table[torch.tensor(rows)]
        for kind, turns in enumerate(self.turns):
            values = torch.tensor([t.values[kind] if t else 0 for t in things])
            all_turns = torch.cat([torch.eye(seen.shape[1])[None], turns])  # value 0: nothing is said
            seen = torch.einsum("nij,nj->ni", all_turns[values], seen)
        there = torch.tensor([float(t is not None) for t in things])
        return seen * there[:, None]

    @staticmethod
    def row(thing, world, emoji):
        return emoji + SHAPES.index(thing.noun) if thing.noun in SHAPES else world.row[thing.noun]

    def forward(self, scenes, world, table):
        """Return unit features [n, embed] of scenes."""
        first = self.things([s.first for s in scenes], world, table)
        second = self.things([s.second for s in scenes], world, table)
        relation = torch.tensor([RELATIONS.index(s.relation) for s in scenes])
        # "a and b" is "b and a": both things take the same place.
        other = torch.tensor([0 if s.relation == "and" else 1 for s in scenes])
        x = torch.einsum("nij,nj->ni", self.places[relation, 0], first)
        x = x + torch.einsum("nij,nj->ni", self.places[relation, other], second)
        joint = (
            self.change(torch.cat([first * second, x], -1)) * (relation != RELATIONS.index("and"))[:, None]
        )
        return F.normalize(x + joint + self.leanings[relation], dim=-1)
