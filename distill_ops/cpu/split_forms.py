"""All phases of the CPU path for rows whose columns ranks split. ``gpu_phases.py`` is its twin."""

from .pair_phases import pair_part as pair_part
from .pair_phases import pair_sums as pair_sums
from .pair_phases import statistics_gradient as statistics_gradient
from .parts import fills as fills
from .phases import KEPT as KEPT
from .phases import differentiate as differentiate
from .phases import kept_rows as kept_rows
from .phases import normalise as normalise
from .phases import reduce as reduce
from .token_phases import token_gradient as token_gradient
from .token_phases import token_part as token_part

combined = None  # the numbers of a row are few, and PyTorch adds them up
