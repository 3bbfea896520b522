"""The dataset index: what every sample costs in tiles and tokens and what is wrong with the rest, one row a record."""
