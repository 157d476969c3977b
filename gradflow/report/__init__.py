"""Findings and pictures of one run, or of several side by side, as one HTML file."""

from gradflow.report.page import compare, render, render_comparison, report

__all__ = ["compare", "render", "render_comparison", "report"]
