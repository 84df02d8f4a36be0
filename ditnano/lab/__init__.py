"Experiments, their records, their tables and figures, and what is shipped."
