"""Runs side by side: means over seeds, differences, fairness, and the routings themselves."""
