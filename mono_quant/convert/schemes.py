"""The dtypes that a model can be converted to, by name: a new one gets a line here."""

from collections.abc import Mapping

from mono_quant.convert.arrival import Arrival
from mono_quant.convert.contract import Scheme
from mono_quant.convert.half import FP16
from mono_quant.convert.int8 import INT8

SCHEMES: Mapping[str, Scheme] = {scheme.dtype: scheme for scheme in (INT8, FP16)}

# How weights are converted while they are read, for the dtypes that can be made one weight at a time: float16 decides about
# a module when it has all of its values.
ARRIVALS: Mapping[str, type[Arrival]] = {INT8.dtype: Arrival}
