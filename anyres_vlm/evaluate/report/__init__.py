"""Results of evaluations as one page: beside published scores, with intervals, differences and failures."""
