"""The cheapest policy and rules that keep a loss within a tolerance."""
