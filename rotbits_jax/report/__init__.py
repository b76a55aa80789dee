"""What people read about a file: its savings as text, and a web page with pictures."""

from rotbits_jax.report.page import report_page
from rotbits_jax.report.savings import Report

__all__ = ['Report', 'report_page']
