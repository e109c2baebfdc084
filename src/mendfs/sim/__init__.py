"""A whole cluster in one process, on simulated time, network and disk, from one seed (design section 9).

`loop` is time and processes, `network` and `disk` the outside, `scenario` a cluster made of them. No production module
imports this package; `mendfs simulate` alone does.
"""
