"""Drills: after the faults and the comparison with the model, rule after rule is tried on purpose on the same cluster.

Random work meets a rule now and then; a drill makes the one incident that the rule is for. Rules that an honest client
never needs (a repeated request, a foreign id, an order from the past) are asked for over raw connections.
"""
