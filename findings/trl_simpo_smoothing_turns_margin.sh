#!/bin/sh
# TRL's SimPO (CPOTrainer, loss_type="simpo") turns the margin gamma round together with the pair where
# label_smoothing is set: with labels that are coin flips it still wants chosen replies ahead.
#
# Versions: trl 1.14.0, transformers 5.17.0, torch 2.13.0, datasets 4.8.5, Python 3.11.
# Expected: smoothing by e is the loss of the pair, and with weight e that of the pair turned round,
# which has a margin to win by like any other: -logsigmoid(-beta * d - gamma). At e = 1/2 neither reply
# is better, and the loss is least at d = 0.
# Seen: it is -logsigmoid(-(beta * d - gamma)): the loss at e = 1/2 is least at d = gamma / beta.
# Exit: 0 while this is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.17.0 trl==1.14.0 datasets==4.8.5
HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END' || { cat "$folder/log" >&2; exit 1; }
from types import SimpleNamespace

import torch
from torch.nn.functional import logsigmoid
from trl.experimental.cpo import CPOTrainer

BETA, GAMMA = 2.0, 1.0
ahead = torch.linspace(-2, 2, 401, dtype=torch.float64)  # chosen over rejected, nats a token


def loss(smoothing):
    """The trainer's own, of its settings alone."""
    settings = SimpleNamespace(
        loss_type="simpo", beta=BETA, simpo_gamma=GAMMA, label_smoothing=smoothing, alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    return CPOTrainer.cpo_loss(settings, ahead, torch.zeros_like(ahead))[0]


plain, coin = loss(0.0), loss(0.5)
assert torch.allclose(plain, -logsigmoid(BETA * ahead - GAMMA)), "SimPO itself has changed"
turned = 0.5 * (plain - logsigmoid(-BETA * ahead - GAMMA))
least = {name: float(ahead[one.argmin()]) for name, one in (("TRL", coin), ("expected", turned))}
print(f"with labels that are coin flips the loss is least where chosen is ahead by {least}")
raise SystemExit(0 if abs(least["TRL"] - GAMMA / BETA) < 0.01 and abs(least["expected"]) < 0.01 else 1)
END
