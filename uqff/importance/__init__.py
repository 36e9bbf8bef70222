"""How much each input of a layer matters: statistics of activations, and the files that they are kept in."""
