"""`python -m mono_quant` is the command line."""

from mono_quant.cli import main

main()
