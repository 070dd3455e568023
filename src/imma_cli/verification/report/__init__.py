"""What people read of a verification: ``report.html``, ``summary.json`` and a model card, from the raw lines alone."""

from imma_cli.verification.report.folder import read_report, read_thresholds, write_report

__all__ = ["read_report", "read_thresholds", "write_report"]
