"""Runs written by one who had not read the rules: other models, data and trainings than the rules were made on.

Runs: `sick_flow`, `sick_training` and `healthy`, of models in `pictures`, `sequences`, `vectors` and `models`, on the data of
`data`; `proofs` are those that the first zoo has no need of. In the zoo their names begin with `outside/`.
"""

from zoo.outside import healthy, sick_flow, sick_training

OUTSIDE_SICK = {
    f"outside/{name}": case
    for cases in (sick_flow.DEPTH, sick_flow.BRANCHES, sick_flow.NUMBERS, sick_training.ACTIVATIONS, sick_training.OPTIMIZER)
    for name, case in cases.items()
}
OUTSIDE_HEALTHY = {f"outside/{name}": setup for name, setup in healthy.HEALTHY.items()}
