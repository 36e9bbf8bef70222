"""What is known of models: architectures, names of modules, patterns over them."""
