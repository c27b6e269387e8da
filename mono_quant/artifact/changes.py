"""What a report may still say of a model whose layers were changed after the conversion: by merging adapters."""

from dataclasses import replace

from torch import nn

from mono_quant.convert.stored import StoredModule
from mono_quant.planning.report import QuantReport


def as_it_is(report: QuantReport, model: nn.Module) -> QuantReport:
    """Return a report without what was measured before layers of the model were encoded anew; itself where none was."""
    changed = {
        f"{name}.{held}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, StoredModule)
        for held in module.changed
    }
    if not changed:
        return report
    rows = (replace(row, sqnr_db=None, gap_db=None) if row.name in changed else row for row in report.rows)
    return replace(
        report,
        rows=tuple(rows),
        fidelity=None,
        fidelity_note="the model was changed after it was converted and measured",
        notes=(
            *report.notes,
            f"adapters were merged into {len(changed)} of its weights after the conversion",
        ),
    )
