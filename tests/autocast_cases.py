"""The construct matrix of autocast: one table of small functions, from its families."""

import autocast_cases_control
import autocast_cases_layers
import autocast_cases_rules
import autocast_models

CASES = autocast_cases_layers.CASES | autocast_cases_control.CASES | autocast_cases_rules.CASES | autocast_models.CASES
