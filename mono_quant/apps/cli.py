"""The door of the command line: Ctrl-C is clean from here on, and only then comes what takes time to import."""

from typing import TYPE_CHECKING

from mono_quant.apps.interrupt import stoppable
from mono_quant.apps.late import Late

if TYPE_CHECKING:
    from mono_quant.apps import usage
else:
    usage = Late("mono_quant.apps.usage")


def main() -> None:
    """Run the command line and leave the process."""
    with stoppable():
        usage.main()
