"""Verification that drafts change no token: requests, decoding in every way, judging differences, the report."""

from __future__ import annotations

from .cases import BUILT_IN, Case, CaseError, Limits, built_in_cases, read_cases
from .check import DEPTHS, verify
from .report import CaseReport, Check, Difference, Report, Verdict, Way, sampling_dict, worst

__all__ = [
    "BUILT_IN", "DEPTHS", "Case", "CaseError", "CaseReport", "Check", "Difference", "Limits", "Report", "Verdict",
    "Way", "built_in_cases", "read_cases", "sampling_dict", "verify", "worst",
]  # fmt: skip
