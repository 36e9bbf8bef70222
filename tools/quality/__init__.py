"""How good the types are: two trained models, quantised to everything, measured on text that neither was tuned on."""
