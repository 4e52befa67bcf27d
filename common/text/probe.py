"""A fixed short text that travels through every quantization: errors per linear and recorded logits
are measured on it.

It belongs to no calibration or evaluation set, so what is measured on it is comparable between
methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.base.device import dtype_name
from common.base.errors import UserError

TEXT = """The lighthouse at the end of the pier had been dark for eleven years when the council \
decided to sell it. Nobody on the island expected a buyer. It had no road, no water and only half \
a roof, and the stairs inside were so narrow that the last keeper used to carry his coal up in a \
hat. But in the spring a retired engineer named Marta Olsen came over on the mail boat, walked \
around it twice, and asked the clerk what the lamp had cost when it was new.

"Four hundred and twenty crowns," said the clerk, who had looked it up. "Plus the glass."

"Then I will give you that," she said, "and I will light it again before winter."

To light a lamp you need three things: a source of energy, something that turns the energy into \
light, and a way to send the light where it is wanted. The first keeper burned whale oil. The \
second burned paraffin, which is cleaner and gives about twice as much light for the same weight. \
Olsen used sunlight: eight panels on the south wall charge a battery of 24 volts during the day, \
and at night a diode no larger than a coin does what a flame as tall as a child once did. If each \
panel delivers 50 watts for 6 hours, the eight of them store 8 * 50 * 6 = 2400 watt-hours, and a \
lamp of 100 watts can burn for 24 hours on that.

Her notebook contains the whole program that switches it:

def lamp_is_on(hour, sunset, sunrise):
    # The night spans midnight, so one comparison is not enough.
    return hour >= sunset or hour < sunrise

Fishermen say that the light can be seen from the mainland, 19 miles away. On clear evenings \
children count the seconds between its flashes, and they always get the same answer: one, two, \
three, four, five."""


# Usual tokenizers make some 400 of the text; one of single bytes makes 1,700.
MOST_TOKENS = 512


def probe_tokens(tokenizer) -> Tensor:
    """Token ids [1, length] of the probe text, at most its first MOST_TOKENS."""
    return tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :MOST_TOKENS]


def overflow(where: str, dtype: torch.dtype) -> UserError:
    """The error of activations that a type does not hold: some models have single values hundreds
    of times the usual.
    """
    kind = dtype_name(dtype)
    way_out = "use --dtype float32"
    if dtype == torch.float32:
        way_out = "check the model's weights, as those of usual models do not"
    return UserError(f"{where}: its inputs or outputs overflow in {kind}; {way_out}")


def check_finite(values: Tensor, where: str, dtype: torch.dtype) -> None:
    """Raises UserError where values, computed in `dtype`, hold NaN or Inf.

    Args: where: what the values are, for the message.
    """
    if not torch.isfinite(values).all():
        raise overflow(where, dtype)
