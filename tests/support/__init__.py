"""What tests share: models, tables of cases, strategies, programs that they start, and ways to compare."""
