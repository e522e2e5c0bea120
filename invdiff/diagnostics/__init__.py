"""Calibration against exact posteriors, and checks of priors."""
