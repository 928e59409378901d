"""What `sweep` searches: the range of every hyperparameter, and why; and which optimizers contain others.

A space is a range for each hyperparameter by name. An optimizer has the hyperparameters of its arguments
(`BY_ARGUMENT`), its learning rate (`RATES`), those of all (`OF_ALL`), and what `OWN` says of it: other ranges, or None
for what is not searched. What an own combination sets, and what the command line says of the schedule, is not searched
either.

`betas[1]` is the second entry of `betas`. Five names are no arguments of optimizers. `shrinkage` is the weight decay in
another unit: by how many factors of e it alone would shrink the weights over a run of the full length at the peak of
the schedule, `lr weight_decay steps`. `rest_ratio` is the learning rate of all tensors that are no hidden matrices over
`lr`, and `rest_beta2` their second beta, of optimizers whose arguments have no rate and no betas for these. `warmup`
and `decay` are the schedule's, in shares of a run of the full length; shorter runs have as many steps of warm-up.

Beside the trials stand the *usual options*: the preset's schedule, the learning rate in the middle of its range, and in
all else the optimizer's own defaults, but for those that nobody trains language models with (`CUSTOMARY`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values of a hyperparameter from `low` to `high`, and why these.

    `scale`: "log", evenly spread in log(value); "linear"; "near 1", evenly spread in log(1 - value). Values have three
    significant digits, of "near 1" the distance to 1.
    """

    low: float
    high: float
    scale: str
    why: str

    def at(self, share: float) -> float:
        """The value at a share of the range, 0 for `low` and 1 for `high`."""
        low, high = self._spread(self.low), self._spread(self.high)
        raw = low + share * (high - low)
        if self.scale == "near 1":
            return round(1 - float(f"{math.exp(-raw):.3g}"), 9)
        return float(f"{math.exp(raw) if self.scale == 'log' else raw:.3g}")

    def share(self, value: float) -> float:
        """Where a value is in the range; outside of [0, 1] for values outside of the range."""
        low, high = self._spread(self.low), self._spread(self.high)
        return (self._spread(value) - low) / (high - low)

    def _spread(self, value: float) -> float:
        if self.scale == "linear":
            return value
        positive = value if self.scale == "log" else 1 - value
        found = math.log(positive) if positive > 0 else -math.inf
        return found if self.scale == "log" else -found


#: A range by hyperparameter.
Space = dict[str, Range]

#: Values of the usual options in the place of defaults: a second beta of 0.999 averages over more steps than a run has,
#: Shampoo's 1 sums all of them, a weight decay of 0.01 does nothing in so few, and SGD's momentum of 0 is none.
CUSTOMARY: dict[str, dict[float, float]] = {
    "betas[1]": {0.999: 0.95, 1.0: 0.95},
    "aux_betas[1]": {0.999: 0.95},
    "beta2": {0.999: 0.95},
    "weight_decay": {0.01: 0.1},
    "momentum": {0.0: 0.9},
}

AVERAGE = Range(0.8, 0.99, "near 1", "averages over 5 to 100 gradients; published defaults are 0.9 and 0.95")
FIRST = Range(0.8, 0.98, "near 1", "averages over 5 to 50 gradients; published defaults are 0.9 and 0.95")
SECOND = Range(
    0.9,
    0.998,
    "near 1",
    "averages over 10 to 500 squared gradients, the longest as long as the run; defaults 0.95, 0.999",
)
SHRINKAGE = Range(
    0.05,
    5.0,
    "log",
    "from almost none to weights that forget the start five times over; in this unit one range serves optimizers whose "
    "rates differ a thousandfold",
)
ADAMW_RATE = Range(
    1e-3, 3.2e-2, "log", "AdamW moves these tensors, and AdamW's own rates are searched in this range too"
)

#: The hyperparameters of whoever has the argument, if the argument's value is a number, or a list that has the entry.
BY_ARGUMENT: dict[str, Space] = {
    "weight_decay": {"shrinkage": SHRINKAGE},
    "momentum": {"momentum": AVERAGE},
    "mu": {"mu": AVERAGE},
    "betas": {"betas[0]": FIRST, "betas[1]": SECOND},
    "beta2": {"beta2": SECOND},
    "aux_lr": {"aux_lr": ADAMW_RATE},
    "aux_betas": {"aux_betas[1]": SECOND},
}

#: The hyperparameters of all.
OF_ALL: Space = {
    "warmup": Range(0.005, 0.1, "log", "from hardly any to a tenth of the run, around the usual 0.03"),
    "decay": Range(0.2, 1.0, "linear", "from a short decay to one that begins with the run"),
}

#: For tensors that are no hidden matrices, where the optimizer's arguments say nothing of them: AdamW's embeddings and
#: head are tuned as those of Muon are.
REST_RATIO = Range(0.25, 4.0, "log", "two octaves to both sides of one rate for all")

#: The middles of the ranges of learning rates: about the best rates of earlier sweeps at the preset `quick`, of
#: optimizers without one those of their nearest relatives.
RATES = {
    "adafactor": 0.04,
    "adagrad": 0.04,
    "adam": 0.006,
    "adamax": 0.01,
    "adamh": 0.032,
    "adammini": 0.006,
    "adamp": 0.006,
    "adamuon": 0.08,
    "adamw": 0.006,
    "ademamix": 0.006,
    "aro": 0.032,
    "asgo": 0.016,
    "auon": 0.96,
    "columndescent": 0.001,
    "dasgo": 0.004,
    "dion": 0.04,
    "hybridauon": 0.06,
    "klshampoo": 0.02,
    "lamb": 0.016,
    "lars": 8.0,
    "lion": 0.001,
    "muon": 0.04,
    "muonh": 0.032,
    "muonplus": 0.04,
    "muonplusplus": 0.06,
    "nadam": 0.006,
    "nap": 0.012,
    "normalizedsgd": 0.05,
    "normuon": 0.04,
    "novograd": 0.016,
    "nucleardescent": 0.032,
    "polargrad": 0.32,
    "rmsprop": 0.0025,
    "rowdescent": 0.064,
    "scale": 0.004,
    "scion": 0.02,
    "sgd": 1.28,
    "sgdp": 1.28,
    "shampoo": 0.008,
    "signsgd": 0.004,
    "signum": 0.001,
    "sinkgd": 0.08,
    "soap": 0.016,
    "spectraldescent": 0.02,
    "stormplus": 2.0,
    "subsetnorm": 0.006,
    "swan": 0.1,
}
#: Octaves to each side of a known middle, the same for all; and of the default of an optimizer that was never swept.
OCTAVES, UNKNOWN_OCTAVES = 2.5, 4.0
#: The learning rate of step sizes that find it is a factor of what they find. These optimizers have such a step size.
FREE = ("dadaptadam", "prodigy")
FREE_RATE = Range(0.25, 4.0, "log", "two octaves to both sides of the rate that the step size finds")
FREE_DECAY = Range(
    0.01, 1.0, "log", "decades around the usual 0.1; the learning rate that it is multiplied by is not known"
)

#: L2 regularization in the gradient of these is no decay of the weights; their published weight decay is 0.
L2 = ("adagrad", "adam", "adamax", "lars", "nadam", "novograd")
OWN: dict[str, dict[str, Range | None]] = {
    **{name: {"shrinkage": None} for name in L2},
    "adafactor": {
        "beta2_decay": Range(
            -1.0, -0.5, "linear", "the published -0.8, and what averages over more and over fewer steps"
        )
    },
    "ademamix": {
        "alpha": Range(0.0, 10.0, "linear", "0 is AdamW; the authors' runs have 5 to 8"),
        "betas[2]": Range(
            0.98, 0.999, "near 1", "averages over 50 to 1000 gradients; a run of 600 steps has no use for more"
        ),
    },
    "dadaptadam": {"weight_decay": None},  # L2 here too
    "lamb": {"shrinkage": None, "weight_decay": FREE_DECAY},  # decay is part of the update, whose length is normalized
    "muonplus-soap": {"momentum": None},  # its entry has a momentum of its own for hidden matrices
    "olion": {"momentum_2": AVERAGE},
    "rmsprop": {"shrinkage": None, "momentum": None, "alpha": SECOND},  # L2 here too, and usually no momentum
    "sgd": {"shrinkage": Range(0.005, 0.5, "log", "as for all, divided by the 10 steps that momentum adds up")},
    "sgdp": {"shrinkage": Range(0.005, 0.5, "log", "as for all, divided by the 10 steps that momentum adds up")},
    "spel": {"shrinkage": None, "weight_decay": FREE_DECAY},  # a share of the weights before they are normalized
    "steepestdescent": {"lr": Range(1e-4, 1.0, "log", "a norm can have any scale")},
    "stormplus": {"shrinkage": None},  # its step size is no learning rate
}


@dataclass(frozen=True)
class Inclusion:
    """One optimizer is another at certain values of its options, so that well tuned it must not lose to it.

    `at`: these values in words. `inside`: whether the space of `container` has them. `options`: the options of
    `container` there, from those of `contained`.
    """

    container: str
    contained: str
    at: str
    inside: bool
    options: Callable[[dict[str, Any]], dict[str, Any]]


#: What holds for the update of every tensor. MuonPlus without its normalization is Muon at another scale, and SOAP's
#: basis cannot be switched off, so that these are not here.
INCLUSIONS = (
    Inclusion("ademamix", "adamw", "alpha = 0", True, lambda o: {**o, "alpha": 0.0, "betas": (*o["betas"], 0.99)}),
    Inclusion("adamp", "adamw", "delta = 0", False, lambda o: {**o, "delta": 0.0}),
    Inclusion("lion", "signum", "equal betas", True, lambda o: {"betas": (o["momentum"],) * 2}),
    Inclusion("lion", "signsgd", "betas[0] = 0", False, lambda o: {**o, "betas": (0.0, 0.99)}),
    Inclusion("signum", "signsgd", "momentum = 0", False, lambda o: {**o, "momentum": 0.0}),
)
