"""The dtypes that a model can be converted to, by name: a new one gets a line here."""

from collections.abc import Mapping

from mono_quant.convert.contract import Scheme
from mono_quant.convert.half import FP16
from mono_quant.convert.int8 import INT8

SCHEMES: Mapping[str, Scheme] = {scheme.dtype: scheme for scheme in (INT8, FP16)}
