"""From plain weights to stored ones: types and fallbacks, recipes, plans, runs, results, errors."""
