"Ways to train a one-step student from a teacher."
