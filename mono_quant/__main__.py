"""`python -m mono_quant` is the command line."""

from mono_quant.apps.cli import main

main()
