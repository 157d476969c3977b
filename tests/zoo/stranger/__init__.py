"""Runs by one who had read neither the rules nor the runs they were mended on: models, data and sicknesses of its own.

`models` has models, data and losses; `runs` the two tables. In the zoo their names begin with `stranger/`.
"""

from zoo.stranger import runs

STRANGER_SICK = {f"stranger/{name}": case for name, case in runs.SICK.items()}
STRANGER_HEALTHY = {f"stranger/{name}": setup for name, setup in runs.HEALTHY.items()}
