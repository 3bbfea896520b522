"""Results of evaluations as one page: published scores, intervals, paired comparisons and failures."""
