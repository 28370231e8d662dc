"""The construct matrix of autocast: one table of small functions, from its families."""

from support import autocast_cases_control, autocast_cases_layers, autocast_cases_rules, autocast_models

CASES = autocast_cases_layers.CASES | autocast_cases_control.CASES | autocast_cases_rules.CASES | autocast_models.CASES
