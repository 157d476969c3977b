"""The labelled zoo: real small trainings, and how they are judged.

Runs: `healthy` and `healthy_kinds`; `sick_flow` and `sick_training`, each with a proof in plain PyTorch and a cure; `small`,
sick runs of a few seconds; `outside` and `held`, first scored unseen, with models and data of their own, `stranger` likewise
by another hand. What they are
built of: `data`, `losses`, models (`dense`, `convolutions`, `residual`, `sequence`, `composed`, `library`), `surgery` and
`disturbances`. How they are judged: `training`, `proofs`, `judging`, `peers`, `score`, `table`, `pages`.
"""
