"""A browser to open pages in."""

from tests.reports.conftest import chromium as chromium
